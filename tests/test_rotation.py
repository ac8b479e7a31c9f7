"""Heads in another basis: nothing changes, the last dimensions carry least, and what is left of a head is the best product of its rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import vivid
from forms import FORMS
from hypothesis import given, settings
from random_nets import networks
from small_nets import Net, task_of
from torch import Tensor, nn
from transformers_architectures import TRANSFORMERS
from zoo import BY_NAME, Specimen, assert_close, floats

from downsize.factoring.rotation import rotate
from downsize.network.capture import capture
from downsize.network.lineage import Lineage
from downsize.network.network import Network
from downsize.network.statistics import walk
from downsize.techniques.prune import Prune

X = floats(6, 24)
EXACT = 1e-5


# Nothing changes ----------------------------------------------------------------------------------------------------------------------


def rotated(specimen: Specimen, network: Network | None = None) -> tuple[Network, Network, list[str]]:
    """The network of vivid weights, the rotated one, and what was rotated; outputs are those of before at two other batch sizes."""
    if network is None:
        torch.manual_seed(0)
        network = capture(vivid(specimen.build()).eval(), specimen.inputs(2))
    made = network.fork()
    told = rotate(made, [network.flat(specimen.inputs(batch)) for batch in (4, 3)], None)
    for batch in (1, 5):
        leaves = network.flat(specimen.inputs(batch))
        for one, other in zip(walk(made, leaves, {}), walk(network, leaves, {}), strict=True):
            assert_close(one.nan_to_num(), other.nan_to_num(), EXACT)
    changed = {name for name, tensor in made.named_tensors() if not torch.equal(tensor, network.tensor(name))}
    assert {part for one in told for part in one.split(" x ")} == {name for name in changed if name.rpartition(".")[2].endswith("weight")}
    return network, made, told


def pairs(*modules: str, told: str = "{0}.q.weight x {0}.k.weight, {0}.v.weight x {0}.o.weight") -> str:
    return ", ".join(told.format(module) for module in modules)


BOTH, VALUES = "q.weight x k.weight, v.weight x o.weight", "v.weight x o.weight"
FOUND = {
    "attention": BOTH,
    "attention with a bias a head": BOTH,
    "masks, scales and biases a head": BOTH,
    "talking heads": BOTH,
    "cosine attention": VALUES,  # queries and keys are normalised
    "heads within the batch": BOTH,
    "heads around the batch": BOTH,
    "heads by chunk in the batch": "",  # which channels meet depends on the batch
    "heads by view, chunked": "q.weight x k.weight",
    "grouped queries": BOTH,
    "rotary": VALUES,
    "linear attention": "",
    "baddbmm": BOTH,
    "windows": "qkv.weight x qkv.weight, qkv.weight x out.weight",
}


MORE = ("attention with a bias a head", "masks, scales and biases a head", "talking heads", "heads by view, chunked", "linear attention", "baddbmm")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE)) for name in FOUND])
def test_forms_of_attention_compute_what_they_did(name):
    assert ", ".join(rotated(FORMS[name][0])[2]) == FOUND[name]


FUSED = "{0}.in_proj_weight x {0}.in_proj_weight, {0}.in_proj_weight x {0}.out_proj.weight"
IN_THE_ZOO: dict[str, str] = {
    "vit": pairs("attention", told=FUSED),
    "encoder": pairs("encoder.layers.0.self_attn", "encoder.layers.1.self_attn", told=FUSED),
    "bert": pairs(
        *(f"bert.encoder.layer.{i}.attention" for i in (0, 1)),
        told="{0}.self.query.weight x {0}.self.key.weight, {0}.self.value.weight x {0}.output.dense.weight",
    ),
    "llama": pairs("model.layers.0.self_attn", "model.layers.1.self_attn", told="{0}.v_proj.weight x {0}.o_proj.weight"),
    "gpt2": pairs(*(f"transformer.h.{i}.attn" for i in (0, 1)), told="{0}.c_attn.weight x {0}.c_attn.weight, {0}.c_attn.weight x {0}.c_proj.weight"),
    "tied": "",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("bert", "llama", "gpt2", "encoder"))) for name in IN_THE_ZOO]
)
def test_the_zoo_computes_what_it_did(name):
    assert ", ".join(rotated(BY_NAME[name])[2]) == IN_THE_ZOO[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "segformer", "detr", "distilbert", "qwen3", "t5", "wav2vec2"])
def test_models_of_the_library_compute_what_they_did(name):
    build, inputs = TRANSFORMERS[name]
    _, _, told = rotated(Specimen(name, build, inputs))
    scores = [one for one in told if "v_proj" not in one.lower() and ".v." not in one and "v_lin" not in one]
    assert told and bool(scores) == (name != "qwen3")  # whose queries and keys are normed and turned by position


@pytest.mark.slow
@settings(max_examples=10)
@given(networks(3))
def test_random_networks_compute_what_they_did(specimen):
    rotated(specimen)


# What is left alone -------------------------------------------------------------------------------------------------------------------


def split(x: Tensor, heads: int = 4) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def attend(*parts: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*parts)  # pyright: ignore[reportArgumentType]


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attention(net: Any, x: Tensor, change: Callable[[Any, str, Tensor], Tensor] = lambda net, name, y: y) -> Tensor:
    """Attention of 4 heads of 8 dimensions; ``change`` is applied to the queries, keys and values in heads, and to the mixtures ``z``."""
    q, k, v = (change(net, name, split(layer(x))) for name, layer in (("q", net.q), ("k", net.k), ("v", net.v)))
    return net.o(joined(change(net, "z", attend(q, k, v))))


def net(forward: Callable[..., Any], **more: Any) -> Net:
    layers = {name: nn.Linear(24, 32) for name in "qkv"} | {"o": nn.Linear(32, 24)}
    return Net(forward, **{**layers, **more})


def changed(which: str, change: Callable[[Any, Tensor], Tensor], **more: Any) -> Callable[[], nn.Module]:
    return lambda: net(lambda n, x: attention(n, x, lambda n, name, y: change(n, y) if name in which else y), **more)


def with_one_more(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :, :1])], 2)


def with_computed_weight() -> nn.Module:
    made = net(attention)
    nn.utils.parametrizations.weight_norm(made.q)  # pyright: ignore[reportArgumentType]
    return made


def with_mixtures(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    mixtures = joined(attend(*(split(layer(x)) for layer in (net.q, net.k, net.v))))
    return net.o(mixtures), mixtures


SCORES = "q.weight x k.weight"
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an activation": (changed("q", lambda n, y: torch.tanh(y)), VALUES),
    "a norm of keys": (changed("k", lambda n, y: n.norm(y), norm=nn.LayerNorm(8)), VALUES),
    "a factor for each dimension": (changed("v", lambda n, y: y * n.gain, gain=nn.Parameter(torch.rand(8))), SCORES),
    "a mask multiplied in": (changed("z", lambda n, y: y * (y > 0)), SCORES),
    "a sum with a constant": (changed("k", lambda n, y: y + n.shift, shift=nn.Parameter(torch.rand(8))), VALUES),
    "numbers": (changed("qkvz", lambda n, y: y * 0.5 / 3), BOTH),
    "numbers, in place": (changed("q", lambda n, y: y.clone().mul_(2.0)), BOTH),
    "a tensor, in place": (changed("q", lambda n, y: y.clone().mul_(y[:, :, :1])), VALUES),
    "queries that are given out": (lambda: net(lambda n, x: (attention(n, x), n.q(x))), VALUES),
    "mixtures that are given out": (lambda: net(with_mixtures), SCORES),
    "queries of three heads given out": (lambda: net(lambda n, x: attention(n, x) + n.q(x)[..., :24]), BOTH),  # of the fourth
    "a key weight that is a table too": (lambda: net(lambda n, x: attention(n, x) + n.k.weight.sum()), VALUES),
    "a bias that others read": (lambda: net(lambda n, x: attention(n, x) + n.v.bias.mean()), SCORES),
    "a weight that is computed": (with_computed_weight, VALUES),
    "keys that are values": (lambda: net(lambda n, x: n.o(joined(attend(split(n.q(x)), *[split(n.k(x))] * 2)))), ""),
    "queries that are keys": (lambda: net(lambda n, x: n.o(joined(attend(*[split(n.q(x))] * 2, split(n.v(x)))))), VALUES),
    "a key more for all": (
        lambda: net(
            lambda n, x: n.o(joined(attend(split(n.q(x)), *(with_one_more(split(y(x))) for y in (n.k, n.v))))),
        ),
        "",
    ),
    "half of the mixtures": (
        lambda: net(
            lambda n, x: n.o(joined(attend(*(split(y(x)) for y in (n.q, n.k, n.v)))[..., :4])),
            o=nn.Linear(16, 24),
        ),
        SCORES + ", " + VALUES,
    ),
    "one dimension a head": (
        lambda: net(lambda n, x: n.o(joined(attend(*(split(y(x), 32) for y in (n.q, n.k, n.v)))))),
        "",
    ),
    "the same block twice": (lambda: net(lambda n, x: attention(n, attention(n, x))), BOTH),
    "a reader that also reads the input": (lambda: net(lambda n, x: attention(n, x) + n.o(torch.tanh(n.q(x)))), ""),
}


@pytest.mark.parametrize("name", LEFT)
def test_only_what_is_free_is_rotated(name):
    build, expected = LEFT[name]
    assert ", ".join(rotated(Specimen(name, build, X))[2]) == expected


def test_dropout_counts_only_while_it_is_switched_on():
    network = capture(changed("q", lambda n, y: F.dropout(y, 0.5, n.training))().eval(), X(2))
    pieces = [network.flat(X(3))]
    assert rotate(network.fork().train(), pieces, None) == [VALUES]
    assert rotate(network.fork(), pieces, None) == [SCORES, VALUES]


def test_zeros_that_must_stay_are_left_alone():
    network = capture(net(attention).eval(), X(2))
    network.keep_zeros("k.weight")
    assert rotate(network, [network.flat(X(3))], None) == [VALUES]


def test_a_fork_keeps_its_weights_and_parameters_stay_trainable():
    network = capture(net(attention).eval(), X(2))
    fork, before = network.fork(), {name: tensor.clone() for name, tensor in network.named_tensors()}
    rotate(network, [network.flat(X(3))], None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fork.named_tensors())
    assert {name for name, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter) and tensor.requires_grad} == set(before)


# What the basis is --------------------------------------------------------------------------------------------------------------------


def inner(network: Network, leaves: list[Tensor], names: str) -> dict[str, Tensor]:
    """What these layers give, and with ``z`` what the layer ``o`` reads, by heads: [heads, positions, dimensions]."""
    found: dict[str, Tensor] = {}

    def keep(name: str, data: Tensor) -> None:
        found[name] = data.reshape(-1, 4, data.shape[-1] // 4).transpose(0, 1).double()

    layers = {str(node.args[1].target)[0]: node for node in network.graph.nodes if "linear" in str(node.target)}  # type: ignore[union-attr]
    hooks: dict[Any, Any] = {layers[name]: lambda args, value, name=name: keep(name, value) for name in names if name != "z"}
    walk(network, leaves, hooks | {layers["o"]: lambda args, value: keep("z", args[0])})
    return found


def test_each_dimension_carries_less_than_the_one_before_it():
    torch.manual_seed(0)
    network = capture(vivid(net(attention)).eval(), X(2))
    leaves = network.flat(X(40))
    rotate(network, [leaves], None)
    data = inner(network, leaves, "qkz")
    columns = network.tensor("o.weight").detach().double().reshape(24, 4, 8).transpose(0, 1)
    centred = {name: data[name] - data[name].mean(1, keepdim=True) for name in "kz"}
    for left, right in ((data["q"], centred["k"]), (centred["z"], columns)):
        for one in (left, right):
            moment = one.mT @ one
            values = moment.diagonal(dim1=1, dim2=2)
            assert (moment - values.diag_embed()).abs().max() < 1e-4 * values.max()
            assert bool((values.diff(dim=1) <= 1e-6 * values.max()).all())


def test_padding_does_not_count():
    """Positions that a mask hides may hold anything: the weights come out the same."""
    torch.manual_seed(0)

    def masked(n: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (split(layer(x)) for layer in (n.q, n.k, n.v))
        return n.o(joined(attend(q, k, v, mask[:, None, None].bool()))) * mask[..., None]

    x, mask = X(8), torch.ones(8, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    network = capture(vivid(net(masked)).eval(), (x, mask))
    other, unmasked = network.fork(), network.fork()
    changed = torch.where(mask[..., None] == 0, 5.0, x)
    rotate(network, [[x, mask]], 1)
    rotate(other, [[changed, mask]], 1)
    rotate(unmasked, [[changed, mask]], None)
    expected = dict(network.named_tensors())
    for name, tensor in other.named_tensors():
        assert_close(tensor, expected[name], 1e-3)
    assert not torch.allclose(unmasked.tensor("q.weight").norm(dim=1), network.tensor("q.weight").norm(dim=1), rtol=0.1)


# Pruning ------------------------------------------------------------------------------------------------------------------------------


def planted() -> nn.Module:
    """Each head of 8 dimensions with products of rank 4, in no basis that shows it."""
    model = vivid(net(attention))
    for seed, name in enumerate(("k", "o")):
        layer = getattr(model, name)
        for head in range(4):
            basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(10 * seed + head)))[0][:, :4]
            project, own = basis @ basis.mT, slice(8 * head, 8 * head + 8)
            with torch.no_grad():
                if name == "o":
                    layer.weight[:, own] @= project
                else:
                    layer.weight[own], layer.bias[own] = project @ layer.weight[own], project @ layer.bias[own]
    return model.eval()


def loss(model: nn.Module, network: Network, inputs: Tensor) -> float:
    """The error of the outputs, of their norm."""
    with torch.no_grad():
        expected = model(inputs)
        return float((network.predict(inputs) - expected).norm() / expected.norm())


def test_half_of_heads_of_half_rank_goes_without_loss():
    model = planted()
    network, task = capture(model, X(2)), task_of(model, X(2), batches=16)
    made = Prune(ratio=0.5, what=("head_dims",), multiple=1)(network, task)
    assert sorted(axis.units for axis in Lineage(made).axes if axis.kind == "head_dims") == [4, 4]
    assert made.origin["rotated"] == [SCORES, VALUES]
    assert loss(model, made, X(16)) < 1e-5
    plain = Prune(ratio=0.5, what=("head_dims",), multiple=1, rotate=False)(network, task)
    assert "rotated" not in plain.origin
    assert loss(model, plain, X(16)) > 0.3
    bare = Prune(ratio=0.5, what=("head_dims",), multiple=1, refit=False)(network, task)
    assert loss(model, bare, X(16)) < 1e-5  # the cut alone loses nothing


def test_ladders_are_those_of_rotated_heads():
    model = planted()
    network, task = capture(model, X(2)), task_of(model, X(2), batches=6)
    with_it, without = (Prune(macs=0.5, what=("head_dims",), multiple=1, rotate=on).ladder(network, task) for on in (True, False))
    assert [one.errors[one.widths.index(4)] < 1e-9 for one in with_it] == [True, True]
    assert all(one.errors[one.widths.index(4)] > 1e-2 for one in without)


@pytest.mark.parametrize("options", [{"samples": 0}, {"what": ("heads",)}, {"rotate": False}], ids=str)
def test_without_data_head_dims_or_leave_nothing_is_rotated(options):
    model = planted()
    network, task = capture(model, X(2)), task_of(model, X(2), batches=4)
    assert Prune(ratio=0.5, **{"what": ("head_dims",), "multiple": 1, **options}).rotated(network, task) is network


@functools.cache
def reverser() -> nn.Module:
    """A transformer that was trained to say 8 words backwards."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = Net(
        lambda n, ids: n.head(n.encoder(n.embedding(ids) + n.position)),
        position=nn.Parameter(torch.randn(8, 32)), embedding=nn.Embedding(50, 32), encoder=encoder, head=nn.Linear(32, 50),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        ids = torch.randint(0, 50, (32, 8))
        optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flip(1).flatten()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_a_trained_transformer_loses_less_with_rotated_heads(ratio):
    model = reverser()
    example, held = torch.randint(0, 50, (2, 8)), torch.randint(0, 50, (64, 8))
    network, task = capture(model, example), task_of(model, example, batches=40)
    losses = []
    for turn, refit in ((True, True), (False, True), (True, False), (False, False)):
        made = Prune(ratio=ratio, what=("head_dims",), multiple=1, rotate=turn, refit=refit)(network, task)
        losses.append(loss(model, made, held))
    assert losses[0] < 0.75 * losses[1] and losses[2] < 0.75 * losses[3]
