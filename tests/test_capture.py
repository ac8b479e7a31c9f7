"""capture: the law captured == original over the zoo, open dimensions, inputs and outputs, plain graphs, training."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import BY_NAME, Layer, assert_close, block, captured, images, run, specimen, targets, tokens

from downsize.errors import ArtifactError
from downsize.network.capture import capture
from downsize.network.onnx_file import write
from downsize.runtimes import open_artifact

NAMES = sorted(BY_NAME)


# The law ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_captured_equals_original(name, batch):
    model, network = specimen(name)
    inputs = BY_NAME[name].inputs(batch)
    assert_close(network.predict(inputs), run(model, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_graphs_are_plain(name):
    _, network = specimen(name)
    assert {node.op for node in network.graph.nodes} <= {"placeholder", "get_attr", "call_function", "output"}
    assert not [target for target in targets(network) if "_assert" in target or "wrap_with" in target or "constrain" in target]
    assert not [node for node in network.graph.nodes if getattr(getattr(node.target, "_schema", None), "is_mutable", False)]
    assert dict(network.named_tensors()).keys() <= {*dict(specimen(name)[0].state_dict(keep_vars=True)), *buffers_not_saved(name)}


def buffers_not_saved(name: str) -> set[str]:
    kept = {n for n, _ in specimen(name)[0].named_buffers(remove_duplicate=False)}
    return kept | {n for n, _ in specimen(name)[1].named_tensors() if ".lifted_tensor_" in f".{n}"}


def test_shares_the_tensors_of_the_model_under_its_names():
    model, network = specimen("residual")
    tensors = dict(network.named_tensors())
    for name, parameter in model.named_parameters():
        assert tensors[name] is parameter


def test_nodes_say_where_they_come_from():
    _, network = specimen("residual")
    rows = {(node.meta["module"], str(node.target)): node.meta["source"] for node in network.graph.nodes if node.op == "call_function"}
    assert ("stem.0", "aten.conv2d.default") in rows and ("two.1", "aten.batch_norm.default") in rows
    assert rows["", "aten.add.Tensor"].endswith("y += self.skip(x)") and "zoo.py:" in rows["", "aten.add.Tensor"]


@pytest.mark.parametrize("name", NAMES)
def test_sources_are_never_torchs(name):
    sources = {node.meta["source"] for node in specimen(name)[1].graph.nodes if node.op == "call_function"}
    assert all(not source or (source.startswith("/") and "/torch/" not in source) for source in sources)


def test_leaves_the_model_as_it_was():
    model = BY_NAME["residual"].make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture(model, images()(2))
    assert not model._forward_hooks and "forward" not in vars(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# Open dimensions -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_an_example_of_one_sample_leaves_the_batch_open(batch):
    model = BY_NAME["depthwise"].make()
    network = capture(model, images()(1))
    assert str(network.ports[0]) == "x: float32[batch, 3, 16, 16]"
    assert_close(network.predict(images()(batch)), run(model, images()(batch)))


def test_a_model_for_single_samples_keeps_its_batch_of_one():
    network = captured(lambda self, x: self.linear(x).view(1, 2, 2), torch.randn(1, 4))
    assert network.ports[0].dims == (1, 4)
    with pytest.raises(ArtifactError, match=r"Input args_0 is float32\[2, 4\]; the network takes args_0: float32\[1, 4\]"):
        network(torch.randn(2, 4))


def test_dimensions_that_differ_between_examples_are_open():
    model = BY_NAME["bert"].make()
    examples = [{"input_ids": tokens(50, length)(2), "attention_mask": torch.ones(2, length, dtype=torch.long)} for length in (5, 8, 11)]
    network = capture(model, examples[0], more=examples[1:2])
    assert [port.dims for port in network.ports] == [("batch", "size1"), ("batch", "size1")]
    assert_close(network.predict(examples[2]), run(model, examples[2]))


def test_image_sizes_can_be_open():
    model = BY_NAME["resnet"].make()
    network = capture(model, images(size=16)(2), more=[images(size=24)(3)])
    assert_close(network.predict(images(size=40)(1)), run(model, images(size=40)(1)))


def test_a_size_of_one_in_an_example_is_not_taken_as_a_constant():
    network = captured(lambda self, x: self.linear(x).sum(1), torch.randn(1, 1, 4), more=[torch.randn(1, 7, 4)])
    assert network.ports[0].dims == ("batch", "size1", 4)
    assert network(torch.randn(3, 2, 4)).shape == (3, 4)


def test_a_first_dimension_of_another_size_is_not_the_batch():
    network = captured(lambda self, x, table: self.linear(x) + table.mean(0), (torch.randn(2, 4), torch.randn(5, 4)))
    assert [port.dims for port in network.ports] == [("batch", 4), (5, 4)]
    network = captured(lambda self, x, table: self.linear(x) + table.mean(0), (torch.randn(2, 4), torch.randn(5, 4)), more=[(torch.randn(3, 4),) * 2])
    assert [port.dims for port in network.ports] == [("batch", 4), ("size1", 4)]


# Inputs and outputs ----------------------------------------------------------------------------------------------------------------


def test_constants_are_part_of_the_call():
    model, network = specimen("fusion")
    inputs = BY_NAME["fusion"].inputs(3)
    assert [port.name for port in network.ports] == ["right", "left"]
    reordered = {key: inputs[key] for key in sorted(inputs)}
    assert_close(network.predict(reordered), run(model, inputs))
    with pytest.raises(ArtifactError, match=r"captured with the constant True"):
        network.predict({**inputs, "sign": False})
    with pytest.raises(ArtifactError, match="captured with the constant None"):
        network.predict({**inputs, "mask": torch.ones(3)})


def test_infinite_constants():
    network = captured(lambda self, x, top=1.0: self.linear(x).clamp(max=top), {"x": torch.randn(2, 4), "top": float("inf")})
    assert network(x=torch.zeros(3, 4), top=float("inf")).shape == (3, 4)


def test_a_forward_of_keywords_only():
    class Batch(nn.Module):
        def forward(self, **batch: Any) -> Tensor:
            return batch["x"] * batch["scale"] - batch["y"]

    x, y = torch.randn(2, 4), torch.randn(2, 4)
    network = capture(Batch().eval(), {"scale": 3.0, "y": y, "x": x})
    assert [str(port) for port in network.ports] == ["y: float32[batch, 4]", "x: float32[batch, 4]"]
    assert_close(network(scale=3.0, x=x[:1], y=y[:1]), x[:1] * 3 - y[:1])


def test_containers_in_and_out():
    pair = collections.namedtuple("pair", "one two")
    x = torch.randn(2, 4)
    network = captured(lambda self, p, q: pair(self.linear(p.one) + p.two, [q[0] * 2]), (pair(x, x), [x]))
    result = network((x, x), [x])
    one, two = result
    assert result._fields == ("one", "two")
    assert one.shape == (2, 4) and isinstance(two, list) and torch.equal(two[0], x * 2)


def test_numpy_goes_in_too():
    network = captured(lambda self, x: self.linear(x), np.zeros((2, 4), np.float32))
    assert network(np.zeros((5, 4), np.float32)).shape == (5, 4)


def test_model_outputs_become_dicts_without_caches():
    model, network = specimen("gpt2")
    ids = BY_NAME["gpt2"].inputs(2)
    with torch.no_grad():
        assert model(**ids).past_key_values is not None
    assert list(network.predict(ids)) == ["logits"]


def test_a_forward_that_writes_into_its_inputs_spoils_nothing():
    x = torch.randn(2, 4)
    kept = x.clone()
    network = captured(lambda self, x: self.linear(x.add_(1)), x)
    network(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64, torch.float16])
def test_other_dtypes(kind):
    x = torch.ones(2, 4, dtype=kind)
    network = captured(lambda self, x: (self.linear(x.float()), x), x)
    assert network.ports[0].dtype == kind and network(x[:1])[1].dtype == kind


# Plain graphs ----------------------------------------------------------------------------------------------------------------------


def test_no_grad_blocks_are_inlined_and_still_stop_gradients():
    def forward(self: Layer, x: Tensor) -> Tensor:
        with torch.no_grad():
            first = self.linear(x) + torch.tensor(1.0)
            with torch.enable_grad():
                second = first * 2 + torch.tensor(3.0)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            third = x.sin() + torch.tensor(5.0)
        return self.linear(first + second + third)

    model, x = Layer(forward).eval(), torch.randn(3, 4)
    network = capture(model, x)
    assert_close(network(x), model(x))
    gradients = torch.autograd.grad(model(x).square().sum(), model.linear.weight)
    assert_close(torch.autograd.grad(network(x).square().sum(), network.tensor("linear.weight")), gradients)


class Masked(nn.Module):
    """torch's encoder and decoder with masks whose values torch looks at: causal ones, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        length = y.shape[1]
        sources, causal = (nn.Transformer.generate_square_subsequent_mask(size) for size in (5, length))
        places = torch.arange(length)
        other = -0.5 * (places[:, None] - places).abs()
        return (
            self.layers(x, y, src_mask=sources, src_is_causal=True, tgt_mask=causal),
            self.layers(x, y, tgt_mask=other),
        )


def test_masks_of_torchs_transformers_are_followed_by_value(tmp_path):
    own = nn.modules.transformer._detect_is_causal_mask
    model = Masked().eval()
    network = capture(model, (torch.randn(2, 5, 16), torch.randn(2, 6, 16)), more=[(torch.randn(2, 5, 16), torch.randn(2, 4, 16))])
    assert nn.modules.transformer._detect_is_causal_mask is own
    write(network, tmp_path / "m.onnx")
    for length in (6, 3):
        inputs = torch.randn(3, 5, 16), torch.randn(3, length, 16)
        with torch.no_grad():
            expected = model(*inputs)
        assert_close(network.predict(inputs), expected)
        for one, other in zip(open_artifact(tmp_path / "m.onnx", "onnxruntime")(inputs), expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-4, atol=1e-5)
        later = inputs[0], torch.cat([inputs[1][:, :1], torch.randn(3, length - 1, 16)], 1)
        first = [float((one[:, 0] - other[:, 0]).abs().max()) for one, other in zip(network.predict(later), expected, strict=True)]
        assert first[0] < 1e-5 < 1e-2 < first[1]  # where the mask is causal, the first position knows nothing of the others


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_is_spelled_in_numbers():
    layers = [nn.Conv1d(3, 4, 4, padding="same", dilation=3), nn.Conv1d(4, 4, 5, padding="same", bias=False), nn.Conv1d(4, 2, 2, padding="valid")]
    model = nn.Sequential(*layers).eval()
    network = capture(model, torch.randn(2, 3, 20))
    assert {target for target in targets(network) if "conv" in target} == {"aten.conv1d.default"} and targets(network).count("aten.pad.default") == 1
    x = torch.randn(3, 3, 20)
    assert_close(network(x), model(x))


def view_is_written(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    y.view(-1)[:3].add_(5)
    y.relu_()
    return y


def dropout_is_an_alias(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    z = F.dropout(y, 0.5, False)
    z.add_(1)
    return y + z


def slices_are_views(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    one = y[:, :2].transpose(0, 1)
    one.mul_(3)
    return y + one.sum()


def in_place_keeps_the_dtype(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x).half()
    y.add_(torch.arange(4) / 3)
    return y * 2


def read_before_and_after(self: Layer, x: Tensor) -> Tensor:
    y = self.linear(x)
    before = y * 1
    y.add_(1).mul_(2)
    y.sub_(before)
    return y + before


@pytest.mark.parametrize("forward", [view_is_written, dropout_is_an_alias, slices_are_views, in_place_keeps_the_dtype, read_before_and_after])
def test_in_place_operators_keep_their_meaning(forward):
    model, x = Layer(forward).eval(), torch.randn(3, 4)
    assert_close(capture(model, x)(x), model(x))


def test_counters_are_dropped():
    network = captured(lambda self, x: (self.count.add_(1), self.linear(x))[1])
    assert targets(network) == ["aten.linear.default"]


def test_weight_norm_and_spectral_norm():
    normed = nn.utils.parametrizations
    layers = [normed.weight_norm(nn.Conv1d(4, 6, 3)), normed.spectral_norm(nn.Linear(8, 5))]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 4, 10)
    assert_close(capture(model, x)(x), model(x))


def test_names_that_torch_needs_for_itself():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph, self.code, self.d = nn.Linear(4, 4), nn.Parameter(torch.randn(4)), nn.ModuleDict({"conv-1": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.d["conv-1"](self.graph(x) + self.code)

    model, x = Named().eval(), torch.randn(3, 4)
    network = capture(model, x)
    assert [name for name, _ in network.named_tensors()] == ["code_", "graph_.weight", "graph_.bias", "d.conv_1.weight", "d.conv_1.bias"]
    assert_close(network(x), model(x))


# Training --------------------------------------------------------------------------------------------------------------------------


class Trainable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.dropout = nn.Sequential(block(3, 6), block(6, 6, groups=2)), nn.Dropout(0.3)
        self.rnn, self.head = nn.LSTM(6, 5, num_layers=2, dropout=0.4, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean(3).transpose(1, 2)
        return self.head(self.dropout(self.rnn(x)[0][:, -1]))


def sgd(call: Callable[[Tensor], Tensor], parameters: list[Tensor], steps: int = 4) -> list[float]:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        loss = F.cross_entropy(call(images(3, 8)(4 + step)), torch.arange(4 + step) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_trains_like_the_module_and_goes_back():
    torch.manual_seed(0)
    model = Trainable().eval()
    network = capture(model, images(3, 8)(2)).copy()
    untouched = network.predict(images(3, 8)(3))
    losses = sgd(network.train(), list(network.parameters()))
    assert losses == pytest.approx(sgd(model.train(), list(model.parameters())), rel=1e-6)
    state = model.state_dict()
    for name, tensor in network.named_tensors():
        assert_close(tensor, state[name], 1e-5)
    x = images(3, 8)(3)
    network.eval()
    assert_close(network.predict(x), run(model.eval(), x))
    assert torch.equal(network.predict(x), network.predict(x)) and not torch.allclose(network.predict(x), untouched)


def test_what_was_captured_as_training_stays_so():
    network = captured(lambda self, x: F.batch_norm(self.linear(x), None, None, training=True))
    x = torch.randn(5, 4)
    before = network.predict(x)
    assert torch.equal(network.train().eval().predict(x), before)
