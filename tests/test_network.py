"""Network: forks share, copies do not; calls are checked; fingerprints follow graph and tensors."""

from __future__ import annotations

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from zoo import BY_NAME, assert_close, captured, images, specimen

from downsize.errors import ArtifactError
from downsize.network.capture import capture
from downsize.network.network import batch_of
from downsize.network.rewrite import aten


def test_forks_share_tensors_and_not_the_graph():
    _, network = specimen("residual")
    fork = network.fork()
    assert all(one is two for (_, one), (_, two) in zip(network.named_tensors(), fork.named_tensors(), strict=True))
    nodes = len(network.graph.nodes)
    last = next(node for node in fork.graph.nodes if node.target is aten.linear.default)
    with fork.graph.inserting_after(last):
        doubled = fork.graph.call_function(aten.mul.Tensor, (last, 2.0))
    last.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    fork.recompile()
    x = images()(2)
    assert len(network.graph.nodes) == nodes and torch.equal(fork.predict(x), 2 * network.predict(x))


def test_copies_share_nothing_and_keep_ties():
    _, network = specimen("tied")
    copied = network.copy()
    tensors = dict(copied.named_tensors())
    assert not {t.data_ptr() for t in tensors.values()} & {t.data_ptr() for _, t in network.named_tensors()}
    ids = BY_NAME["tied"].inputs(2)
    before = network.predict(ids)
    with torch.no_grad():
        for tensor in copied.parameters():
            tensor.add_(1)
    assert torch.equal(network.predict(ids), before) and not torch.equal(copied.predict(ids), before)
    assert len(list(copied.parameters())) == len(list(network.parameters())) == 3


def test_frozen_parameters_stay_frozen_and_are_not_trainable():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    model[0].requires_grad_(False)
    network = capture(model, torch.randn(2, 4))
    for made in (network, network.copy(), network.fork()):
        assert [tuple(p.shape) for p in made.parameters()] == [(2, 4), (2,)]
        assert isinstance(made.tensor("0.weight"), nn.Parameter) and not made.tensor("0.weight").requires_grad


def test_predict_takes_what_a_batch_holds():
    _, network = specimen("bert")
    inputs = BY_NAME["bert"].inputs(2)
    expected = network.predict(inputs)["logits"]
    assert not expected.requires_grad and network(**inputs)["logits"].requires_grad
    assert torch.equal(network.predict(UserDict(inputs))["logits"], expected)
    assert torch.equal(network.predict({key: value.numpy() for key, value in reversed(inputs.items())})["logits"], expected)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(2, 3, 16, 15), r"Input x is float32\[2, 3, 16, 15\]; the network takes x: float32\[batch, 3, 16, 16\]"),
        (torch.zeros(3, 16, 16), r"Input x is float32\[3, 16, 16\]; the network takes x: float32\[batch, 3, 16, 16\]"),
        (torch.zeros(2, 3, 16, 16).double(), r"Input x is float64\[2, 3, 16, 16\]; the network takes x: float32"),
        ((torch.zeros(2, 3, 16, 16), 1), r"inputs\[0\] has 2 values; expected 1"),
        ({"y": torch.zeros(2, 3, 16, 16)}, r"inputs\[0\] has 0 values; expected 1"),
        ("text", r"inputs\[0\]\[0\] is a str; expected a tensor"),
        (np.array([["a"]]), r"Input x is no tensor: can't convert"),
    ],
)
def test_wrong_inputs_are_refused(inputs, words):
    with pytest.raises(ArtifactError, match=words):
        specimen("residual")[1].predict(inputs)


def test_inputs_that_do_not_belong_together_are_refused():
    inputs = BY_NAME["bert"].inputs(3)
    with pytest.raises(ArtifactError, match=r"attention_mask is int64\[2, 9\], so batch is 2; input input_ids has 3 there"):
        specimen("bert")[1].predict({**inputs, "attention_mask": inputs["attention_mask"][:2]})


def test_fingerprints_follow_graph_and_tensors_and_not_the_mode():
    _, network = specimen("depthwise")
    copied = network.copy()
    assert copied.fingerprint() == network.fingerprint() == network.fork().train().fingerprint()
    with torch.no_grad():
        next(copied.parameters()).view(-1)[0] += 1e-6
    assert copied.fingerprint() != network.fingerprint()
    x = torch.zeros(2, 4)
    assert captured(lambda self, x: x * 2.0, x).fingerprint() != captured(lambda self, x: x * 3.0, x).fingerprint()


def test_training_mode_is_switched_by_flags():
    network = specimen("plain")[1].fork()
    evaluating = network.fingerprint(), [node.args for node in network.graph.nodes]
    flags = [node.args[5] for node in network.train().graph.nodes if node.target is aten.batch_norm.default]
    assert flags == [True, True]
    assert next(node.args[2] for node in network.graph.nodes if node.target is aten.dropout.default) is True
    assert (network.eval().fingerprint(), [node.args for node in network.graph.nodes]) == evaluating


def test_dead_nodes_and_their_tensors_go():
    network = specimen("residual")[1].fork()
    output = next(node for node in network.graph.nodes if node.op == "output")
    stem = next(node for node in network.graph.nodes if node.target is aten.relu.default)
    output.args = ((stem,),)
    network.recompile()
    assert {name.split(".")[0] for name, _ in network.named_tensors()} == {"stem"}
    assert network.predict(images()(2)).shape == (2, 8, 16, 16)


def test_rows_of_a_batch():
    pair = namedtuple("pair", "one two")
    inputs = {"x": torch.arange(6).view(3, 2), "more": pair(torch.arange(3), [torch.arange(4), 7, None])}
    picked = batch_of(inputs, [2, 0])
    assert_close(picked["x"], torch.tensor([[4, 5], [0, 1]]))
    assert isinstance(picked["more"], pair) and picked["more"].one.tolist() == [2, 0]
    assert picked["more"].two[0].tolist() == [0, 1, 2, 3] and picked["more"].two[1:] == [7, None]
