"""What is left out of torch's exporter, or done once, changes nothing that a file computes: its table of translations, stacks of calls, runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from downsize.network import exporter_words, onnx_file, translations
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write


def pooled(size: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Hardswish(), nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(2 * size**2, 3)).eval()


def test_the_table_is_read_once_and_the_bytes_are_those_of_a_table_of_its_own(tmp_path, monkeypatch):
    networks = [capture(pooled(size), torch.zeros(2, 1, 8, 8)) for size in (1, 3, 1)]
    for number, network in enumerate(networks):
        monkeypatch.setattr(translations, "_read", {})
        write(network, tmp_path / f"own{number}.onnx")
    read, build = [], ONNXRegistry.from_torchlib
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", staticmethod(lambda **settings: read.append(settings) or build(**settings)))
    monkeypatch.setattr(translations, "_read", {})
    for number, network in enumerate(networks):
        write(network, tmp_path / f"once{number}.onnx")
        assert (tmp_path / f"once{number}.onnx").read_bytes() == (tmp_path / f"own{number}.onnx").read_bytes()
    assert len(read) == 1


def test_a_translation_of_one_file_is_not_in_the_next(tmp_path):
    x = torch.randn(2, 1, 8, 8)
    for size in (1, 3):
        model, path = pooled(size), tmp_path / f"{size}.onnx"
        write(capture(model, x), path)
        assert ("GlobalAveragePool" in {node.op_type for node in onnx.load(path).graph.node}) == (size == 1)
        session = onnxruntime.InferenceSession(path)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), model(x), rtol=1e-5, atol=1e-6)


def test_what_is_added_to_one_table_is_not_in_the_next():
    target = torch.ops.aten.relu.default
    with translations.read_once():
        one, other = (ONNXRegistry.from_torchlib() for _ in range(2))
    known = len(other.get_decomps(target))
    one.register_op(target, lambda x: x)
    assert len(one.get_decomps(target)) == known + 1 and len(other.get_decomps(target)) == known > 0


def test_torchs_own_exporter_is_as_before_also_after_an_error(tmp_path, monkeypatch):
    own = vars(ONNXRegistry)["from_torchlib"]
    with translations.read_once():
        assert vars(ONNXRegistry)["from_torchlib"] is not own
    assert vars(ONNXRegistry)["from_torchlib"] is own
    network = capture(pooled(1), torch.zeros(2, 1, 8, 8))
    monkeypatch.setattr(onnx_file, "_export", lambda network: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(network, tmp_path / "m.onnx")
    assert vars(ONNXRegistry)["from_torchlib"] is own and not list(tmp_path.iterdir())


def test_a_table_in_another_form_is_copied_whole(monkeypatch):
    class Other:
        def __init__(self) -> None:
            self.entries = {"a": [1]}

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(lambda cls: Other()))
    monkeypatch.setattr(translations, "_read", {})
    with translations.read_once():
        one: Any = ONNXRegistry.from_torchlib()
        one.entries["a"].append(2)
        other: Any = ONNXRegistry.from_torchlib()
        assert other.entries == {"a": [1]}


def test_a_file_has_the_same_bytes_when_it_is_traced_briefly_and_torch_is_as_before(tmp_path, monkeypatch):
    from torch._export import utils
    from torch.fx import config

    lists, own = [], utils._materialize_cpp_cia_ops
    monkeypatch.setattr(utils, translations.LISTING, lambda: lists.append(1) or own())
    counting, network = utils._materialize_cpp_cia_ops, capture(pooled(3), torch.zeros(2, 1, 8, 8))
    lists.clear()
    write(network, tmp_path / "briefly.onnx")
    assert len(lists) == 1 and utils._materialize_cpp_cia_ops is counting and not config.do_not_emit_stack_traces
    monkeypatch.setattr(onnx_file, "traced_briefly", contextlib.nullcontext)
    write(network, tmp_path / "in full.onnx")
    assert len(lists) > 10
    assert (tmp_path / "briefly.onnx").read_bytes() == (tmp_path / "in full.onnx").read_bytes()


def runs(network: Network, path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How often the exporter takes operators apart, and how often it casts numbers, while the network is written."""
    from torch.onnx._internal.exporter import _fx_passes

    calls, names = [], ("decompose_with_registry", "insert_type_promotion_nodes")

    def counted(name: str) -> Any:
        own = getattr(_fx_passes, name)
        return lambda *given: calls.append(name) or own(*given)

    with monkeypatch.context() as patched:
        for name in names:
            patched.setattr(_fx_passes, name, counted(name))
        before = [getattr(_fx_passes, name) for name in names]
        write(network, path)
        assert [getattr(_fx_passes, name) for name in names] == before
    return calls.count(names[0]), calls.count(names[1])


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).permute(0, 2, 3, 1).contiguous().flatten(1, 2)
        x = x.reshape(x.shape[0], -1, 4, 8).flatten(2)
        return self.end(torch.softmax(x, -1) + x[:, :1])


class Of(nn.Module):
    """A function of the image [batch, 1, 8, 8], and of one layer of its own."""

    def __init__(self, function: Callable[[torch.Tensor, Any], torch.Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.layer)


WORDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "pooled to one": (lambda: pooled(1), (0, 0)),
    "pooled to more": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(3), nn.Softplus()), (1, 0)),
    "views": (Views, (0, 0)),
    "two flattens": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Flatten()), (0, 0)),
    "unflatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Unflatten(1, (12, 8))), (0, 0)),
    "unflatten the batch": (lambda: Of(lambda x, _: (x + x).transpose(0, 1).unflatten(1, (-1, 1)).squeeze(0)), (0, 0)),
    "pooled in one direction": (lambda: Of(lambda x, _: torch.adaptive_avg_pool1d(x[:, 0], 1)), (0, 0)),
    "chunks": (lambda: Of(lambda x, _: torch.cat(x.chunk(3, 2)[::-1], 2)), (0, 0)),
    "chunks of the first dimension": (lambda: Of(lambda x, _: torch.cat(x.transpose(0, 2).chunk(2)[::-1]).transpose(0, 2)), (0, 0)),
    "chunks of one dimension less": (lambda: Of(lambda x, _: torch.cat([part.sum(1) for part in x.chunk(2, 3)])), (0, 0)),
    "transposed": (lambda: nn.ConvTranspose2d(1, 4, 3, 2, (1, 0), (0, 1)), (0, 0)),
    "transposed, groups": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 6, (3, 2), bias=False, groups=2, dilation=(1, 2))),
        (0, 0),
    ),
    "transposed, one direction": (lambda: Of(lambda x, layer: layer(x[:, 0]), nn.ConvTranspose1d(8, 3, 2, 2)), (0, 0)),
    "smaller and larger": (lambda: Of(lambda x, _: torch.min(x, x.mT) - torch.max(x, 0.1 * x.mT)), (0, 0)),
    "and, or": (lambda: Of(lambda x, _: torch.where(((x > 0) & (x < 1)) | (x < -1) ^ (x.mT > 0), x, -x)), (0, 0)),
    "whole numbers": (lambda: Of(lambda x, _: (x + 1) * 2 - x**2 + torch.clamp(x, -1, 1) / 3 + 1 / (3 + x * x)), (0, 0)),
    "a whole number too large for a float": (lambda: Of(lambda x, _: x * (2**24 + 1)), (0, 1)),
    "floats from comparisons": (lambda: Of(lambda x, _: x * (x > 0).to(torch.float32) + (x < 1).float()), (0, 0)),
    "casts that change nothing": (lambda: Of(lambda x, _: x.to(torch.float32).sigmoid().to(torch.float32)), (0, 0)),
    "a sum of two types": (lambda: Of(lambda x, _: x + (x > 0).long() * 3), (0, 1)),
    "whole numbers divided": (lambda: Of(lambda x, _: x * ((x > 0).long() / 2)), (0, 1)),
    "a copy that is written into": (lambda: Of(lambda x, _: x * x.to(torch.float32, copy=True).add_(1)), (1, 0)),
    "batch norm": (lambda: Of(lambda x, layer: torch.relu(layer(torch.sigmoid(x))), nn.BatchNorm2d(1)), (1, 0)),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_file_computes_the_same_whether_or_not_its_program_was_run_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Oracle: the module in torch, at a batch that the example did not have; and the operators of a file made with torch's own runs."""
    torch.manual_seed(0)
    (build, expected), x = WORDS[name], torch.randn(3, 1, 8, 8)
    model = build().eval()
    network = capture(model, x[:2])
    assert runs(network, tmp_path / "whole.onnx", monkeypatch) == expected
    monkeypatch.setattr(onnx_file, "retraced_where_needed", contextlib.nullcontext)
    assert runs(network, tmp_path / "apart.onnx", monkeypatch) == (1, 1)
    kinds = []
    for kind in ("whole", "apart"):
        session = onnxruntime.InferenceSession(tmp_path / f"{kind}.onnx")
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(outputs[0]), model(x), rtol=1e-5, atol=1e-6)
        kinds.append({node.op_type for node in onnx.load(tmp_path / f"{kind}.onnx").graph.node})
    # Sizes that are known are said as constants; with decompositions they are computed, and views that change nothing go.
    assert kinds[0] - {"Flatten", "Reshape"} <= kinds[1]


def test_torchs_rules_elsewhere_leave_the_exporter_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = capture(pooled(1), torch.zeros(2, 1, 8, 8))

    def gone() -> None:
        raise ImportError("torch.onnx._internal.fx")

    monkeypatch.setattr(exporter_words, "rules", gone)
    assert runs(network, tmp_path / "m.onnx", monkeypatch) == (1, 1)
