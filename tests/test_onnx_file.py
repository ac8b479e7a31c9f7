"""The ONNX writer: files compute what the network does in every runtime and size, say how they are called, and are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, conv, int8, weight
from torch import Tensor, nn
from zoo import BY_NAME, specimen

from downsize.errors import ExportError
from downsize.network import onnx_file
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.network.rewrite import set_constant
from downsize.runtimes import RUNTIMES, open_artifact
from downsize.structure import flatten

ROWS, IMAGE, TEXT = torch.randn(2, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 5, 16)
RUNTIME_NAMES = [pytest.param(name, marks=pytest.mark.skipif(RUNTIMES[name].missing() is not None, reason=f"no {name}")) for name in RUNTIMES]
every_runtime = pytest.mark.parametrize("runtime", RUNTIME_NAMES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_same(network: Network, path: Path, inputs: Any, runtime: str, tolerance: float = 1e-5) -> None:
    expected, got = network.predict(inputs), open_artifact(path, runtime)(inputs)
    assert flatten(expected)[1] == flatten(got)[1]
    for one, two in zip(flatten(expected)[0], flatten(got)[0], strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert float((one - two).abs().max()) <= tolerance * float(one.abs().max())


# Float files ----------------------------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[Network, Path]] = {}


def exported(name: str, folder: Path) -> tuple[Network, Path]:
    """A specimen of the zoo, written once."""
    if name not in FILES:
        network = specimen(name)[1]
        write(network, folder / f"{name}.onnx")
        FILES[name] = network, folder / f"{name}.onnx"
    return FILES[name]


@pytest.mark.slow
@every_runtime
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_files_compute_what_the_network_does_at_every_batch(name, runtime, tmp_path_factory):
    network, path = exported(name, tmp_path_factory.getbasetemp())
    for batch in (1, 3):
        assert_same(network, path, BY_NAME[name].inputs(batch), runtime)


@every_runtime
def test_other_open_sizes(runtime, tmp_path):
    model = Net(lambda net, x: F.interpolate(F.relu(net.a(x)), scale_factor=2).mean((2, 3)), a=conv(3, 8)).eval()
    network = capture(model, IMAGE, more=[torch.randn(2, 3, 12, 16)])
    write(network, tmp_path / "m.onnx")
    for shape in ((1, 3, 8, 8), (3, 3, 16, 8), (2, 3, 24, 40)):
        assert_same(network, tmp_path / "m.onnx", torch.randn(shape), runtime)


@every_runtime
def test_open_lengths_with_a_causal_mask(runtime, tmp_path):
    model = Net(lambda net, x: F.scaled_dot_product_attention(net.q(x), x, x, is_causal=True), q=nn.Linear(16, 16)).eval()
    network = capture(model, TEXT, more=[torch.randn(2, 9, 16)])
    write(network, tmp_path / "m.onnx")
    for shape in ((1, 3, 16), (3, 12, 16)):
        assert_same(network, tmp_path / "m.onnx", torch.randn(shape), runtime)


# Attention ------------------------------------------------------------------------------------------------------------------------


def heads(*counts: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, *([count] if count else []), 5, 8) for count in counts)


HIDDEN = torch.rand(2, 1, 5, 5) > 0.3
HIDDEN[0, 0, 2] = False  # one query may read nothing
ATTENTION = {
    "4-D": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), heads(3, 3, 3)),
    "3-D": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.2), heads(0, 0, 0)),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), heads(3, 3, 3)),
    "grouped": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), heads(6, 2, 2)),
    "bool mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), (*heads(3, 3, 3), HIDDEN)),
    "float mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), (*heads(3, 3, 3), torch.randn(2, 1, 5, 5))),
    "infinite mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        (*heads(3, 3, 3), torch.zeros(2, 1, 5, 5).masked_fill(~HIDDEN, float("-inf"))),
    ),
    "3-D, mask": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), (*heads(0, 0, 0), torch.randn(2, 5, 5))),
}


@every_runtime
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, runtime, tmp_path):
    function, inputs = ATTENTION[name]
    network = capture(Net(lambda net, *x: function(*x)).eval(), inputs)
    write(network, tmp_path / "m.onnx")
    assert_same(network, tmp_path / "m.onnx", inputs, runtime)


@every_runtime
def test_a_view_of_what_attention_gives_is_written_whatever_its_layout(runtime, tmp_path):
    """With heads that are views of a layer's output, no copy is captured in front of the last view; the exporter's trace has another layout there."""

    def attend(net, x: Tensor) -> Tensor:
        q, k, v = (net.layer(x).view(x.shape[0], 5, -1, 8).transpose(1, 2) for _ in range(3))
        return F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).contiguous().view(x.shape[0], 5, 24)

    x = torch.randn(2, 5, 24)
    network = capture(Net(attend, layer=nn.Linear(24, 24)).eval(), x)
    write(network, tmp_path / "m.onnx")
    assert_same(network, tmp_path / "m.onnx", x, runtime)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "t5"])
def test_models_whose_attention_the_exporter_itself_refuses(name, tmp_path):
    hf = pytest.importorskip("transformers")
    if name == "swin":
        config = hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=5)
        model, inputs = hf.SwinForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}
    else:
        model = hf.T5EncoderModel(hf.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4))
        inputs = {"input_ids": torch.randint(0, 50, (2, 7))}
    network = capture(model.eval(), inputs)
    write(network, tmp_path / "m.onnx")
    installed = [runtime for runtime in RUNTIMES if RUNTIMES[runtime].missing() is None]
    assert installed
    for runtime in installed:
        assert_same(network, tmp_path / "m.onnx", inputs, runtime)


# Names and structure --------------------------------------------------------------------------------------------------------------


class Structured(nn.Module):
    """Keywords in, nested containers out, with constants among them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, first: Tensor, second: Tensor, scale: float = 1.0) -> dict[str, Any]:
        one, two = self.left(first), self.right(second)
        return {"sum": one + two * scale, "parts": (one, [two, first]), "same": one, "count": 2, "none": None}


@every_runtime
def test_structured_inputs_and_outputs_come_back(runtime, tmp_path):
    model = Structured().eval()
    inputs = {"second": torch.randn(2, 8), "first": torch.randn(2, 8), "scale": 0.5}
    network = capture(model, inputs)
    write(network, tmp_path / "m.onnx")
    got = open_artifact(tmp_path / "m.onnx", runtime)({"first": inputs["first"], "second": inputs["second"], "scale": 0.5})
    expected = model(**inputs)
    assert list(got) == ["sum", "parts", "same", "count", "none"] and got["count"] == 2 and got["none"] is None
    assert isinstance(got["parts"], tuple) and isinstance(got["parts"][1], list)
    assert torch.allclose(got["parts"][1][0], expected["parts"][1][0], atol=1e-6) and torch.equal(got["parts"][1][1], inputs["first"])
    arrays = open_artifact(tmp_path / "m.onnx", runtime)({"first": inputs["first"].numpy(), "second": inputs["second"].numpy(), "scale": 0.5})
    assert isinstance(arrays["sum"], np.ndarray)


@every_runtime
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Net(lambda net, x: net.l(x) * net.output, l=nn.Linear(8, 8), output=weight(8)), ROWS),
        (Net(lambda net, x: (net.l(x), x, net.l(x) + 1), l=nn.Linear(8, 8)), ROWS),
        (Net(lambda net, x: net.output0(x), output0=nn.Sequential(nn.Linear(8, 8), nn.ReLU())), ROWS),
    ],
    ids=["a parameter called output", "an input given back", "a module called output0"],
)
def test_names_that_could_clash(model, inputs, runtime, tmp_path):
    network = capture(model.eval(), inputs)
    write(network, tmp_path / "m.onnx")
    assert_same(network, tmp_path / "m.onnx", inputs, runtime)


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, output: Tensor) -> Tensor:
        return self.layer(output)


def test_an_input_called_output_in_an_int8_file():
    made = int8(Output(), ROWS)
    assert_same(made.quantized, made.path, made.inputs, "onnxruntime", tolerance=0.02)


def test_nodes_are_named_by_the_users_modules_and_files_hold_nothing_else(tmp_path):
    model = nn.Sequential(nn.Sequential(conv(3, 4), nn.ReLU()), nn.Flatten(), nn.Linear(256, 4)).eval()
    write(capture(model, IMAGE), tmp_path / "m.onnx")
    file = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(file, full_check=True)
    names = {node.op_type: node.name.split(":")[0] for node in file.graph.node}
    assert names["Conv"] == "0.0" and names["Relu"] == "0.1" and names["Gemm"] == "2"
    assert len({node.name for node in file.graph.node}) == len(file.graph.node)
    assert file.producer_name == "downsize" and not any(node.doc_string or node.metadata_props for node in file.graph.node)
    assert [entry.key for entry in file.metadata_props] == ["downsize.io"]
    assert file.ByteSize() < 4 * sum(p.numel() for p in model.parameters()) + 3000
    assert [str(d.dim_param or d.dim_value) for d in file.graph.input[0].type.tensor_type.shape.dim] == ["batch", "3", "8", "8"]


@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
def test_a_table_that_is_a_layers_weight_too_is_written_once(activations):
    net = Net(lambda net, ids: F.linear(torch.tanh(F.embedding(ids, net.w)), net.w), w=weight(300, 64))
    made = int8(net, torch.randint(0, 50, (2, 7)), activations=activations, correct=False)
    sizes = [int(np.prod(tensor.dims)) for tensor in onnx.load(made.path).graph.initializer]
    assert sizes.count(300 * 64) + sizes.count(300 * 56) == 1  # bytes, or 7 bits each where the processor asks for that
    # Runtimes round float inputs of integer weights by themselves.
    assert_same(made.quantized, made.path, made.inputs, "onnxruntime", tolerance=0.02 if activations == "none" else 1e-5)


# Whole or absent ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> Network:
    return capture(nn.Sequential(nn.Linear(8, 4)).eval(), ROWS)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(failure, network, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    write(network, path)
    before = path.read_bytes()

    def broken(model, target):
        Path(target).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(onnx_file.ir, "save", broken)
    expected = ExportError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected, match="No space left" if expected is ExportError else None):
        write(network, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_missing_folder_is_refused(network, tmp_path):
    with pytest.raises(ExportError, match=r"none/m\.onnx cannot be written: No such file"):
        write(network, tmp_path / "none" / "m.onnx")


def test_writing_changes_nothing_and_gives_the_same_bytes(network, tmp_path):
    before = network.fingerprint()
    write(network, tmp_path / "a.onnx")
    write(network, tmp_path / "b.onnx")
    assert network.fingerprint() == before
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# Refusals -------------------------------------------------------------------------------------------------------------------------


def test_an_operator_that_onnx_cannot_say_is_named_with_its_line(tmp_path):
    class Median(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.kthvalue(2, dim=1).values  # the line

    network = capture(Median().eval(), ROWS)
    with pytest.raises(
        ExportError, match=r"aten\.kthvalue[\s\S]*test_onnx_file\.py:\d+: return x\.kthvalue\(2, dim=1\)\.values  # the line"
    ) as caught:
        write(network, tmp_path / "m.onnx")
    assert "Traceback" not in str(caught.value) and not list(tmp_path.iterdir())


def test_more_than_one_file_can_hold_is_refused_before_any_work(network, tmp_path, monkeypatch):
    weights = next(node for node in network.graph.nodes if node.op == "get_attr" and node.target.endswith("weight"))
    # 3.6 GB on paper: one number, repeated.
    set_constant(network, weights, torch.zeros(1, 1).expand(30_000, 30_000))
    monkeypatch.setattr(onnx_file, "_translate", lambda *arguments: pytest.fail("the exporter was called"))
    with pytest.raises(ExportError, match=r"3\.6 GB; one ONNX file holds at most 2 GB"):
        write(network, tmp_path / "m.onnx")


def test_what_counts_is_the_size_of_the_file_not_of_the_float_weights(monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 40_000)
    model = nn.Sequential(nn.Linear(100, 250))
    assert int8(model, torch.randn(2, 100)).path.stat().st_size < 40_000
    with pytest.raises(ExportError, match="2 GB"):
        write(capture(model.eval(), torch.randn(2, 100)), Path("never.onnx"))
