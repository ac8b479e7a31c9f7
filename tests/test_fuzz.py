"""Fuzz of the loader: thousands of damaged and forged network files, each a NetworkFileError or a network whose graph runs."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import genuine, load, run, victim
from torch import Tensor

from downsize.errors import NetworkFileError
from downsize.network.network import Network
from downsize.network.operators import allowed

# Foreign arguments make torch warn; here only errors count.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def true(tmp_path_factory):
    return genuine(tmp_path_factory.mktemp("genuine"))


def test_every_operator_of_the_whitelist_is_refused_or_runs_with_foreign_arguments(true, tmp_path):
    """Any allowed operator in place of another: its dry run decides, and what passes it runs."""
    names = sorted(str(overload) for overload in overloads() if allowed(overload))
    assert len(names) > 500
    choices = random.Random(1)
    record, tensors = true
    spots = [i for i, item in enumerate(record["nodes"]) if item["op"] == "call_function"]
    loaded = 0
    for name in choices.sample(names, 300):
        forged = copy.deepcopy(record)
        forged["nodes"][choices.choice(spots)]["target"] = name
        loaded += survives(tmp_path / "n", forged, tensors)
    assert loaded > 3


def overloads() -> Iterator[Any]:
    for packet in dir(torch.ops.aten):
        for overload in getattr(getattr(torch.ops.aten, packet), "overloads", list)():
            yield getattr(getattr(torch.ops.aten, packet), overload)


def survives(path: Path, record: Any, tensors: dict[str, Tensor]) -> bool:
    """Load a forged file: NetworkFileError, or a graph that runs (or that torch refuses for its values, such as an index out of range)."""
    try:
        network = load(path, record, tensors)
    except NetworkFileError:
        return False
    with contextlib.suppress(IndexError, RuntimeError):
        run(network)
    return True


@pytest.mark.parametrize("seed", range(4))
def test_fuzz_bytes(seed, tmp_path):
    """250 files with flipped, lost, doubled or foreign bytes: every one is noticed."""
    victim().save(tmp_path / "n")
    content = (tmp_path / "n").read_bytes()
    choices = random.Random(seed)
    for _ in range(250):
        changed = mutated_bytes(content, choices)
        if changed != content:
            (tmp_path / "n").write_bytes(changed)
            with pytest.raises(NetworkFileError):
                Network.load(tmp_path / "n")


def mutated_bytes(content: bytes, choices: random.Random) -> bytes:
    made = bytearray(content)
    header = int.from_bytes(content[:8], "little")
    for _ in range(choices.choice([1, 1, 2, 8])):
        # Half of the changes hit the header: there they mean something.
        where = choices.randrange(8 + header) if choices.random() < 0.5 else choices.randrange(len(made) or 1)
        kind = choices.randrange(6)
        if kind == 0:
            made[where % (len(made) or 1)] ^= 1 << choices.randrange(8)
        elif kind == 1:
            del made[where : where + choices.choice([1, 7, 100])]
        elif kind == 2:
            made[where:where] = choices.randbytes(choices.choice([1, 8, 50]))
        elif kind == 3:
            made[where:where] = made[where : where + 30]
        elif kind == 4:
            made[:8] = choices.choice([0, 1, header - 1, header + 1, len(made), 2**31, 2**63]).to_bytes(8, "little")
        else:
            made[where : where + 1] = choices.choice([b"9", b"-", b'"', b"{", b"]", b"\x00", b"\xff"])
        if not made:
            break
    return bytes(made)


@pytest.mark.parametrize("seed", range(4))
def test_fuzz_structure(seed, true, tmp_path):
    """250 files with a changed header or changed tensors and a right checksum: refused, or a network whose graph runs."""
    choices = random.Random(100 + seed)
    loaded = 0
    for _ in range(250):
        record, tensors = copy.deepcopy(true[0]), dict(true[1])
        for _ in range(choices.choice([1, 1, 1, 2, 4])):
            if choices.random() < 0.15:
                mutate_tensors(tensors, choices)
            else:
                record = mutate(record, choices)
        loaded += survives(tmp_path / "n", record, tensors)
    assert 5 < loaded < 200


VALUES: list[Callable[[random.Random], Any]] = [
    lambda r: r.choice([0, 1, -1, 2, 3, 7, 2**20, 2**31, 2**40, 2**63, 2**64, -(2**63), 10**30, 10**4200]),
    lambda r: r.choice([0.5, -1.0, 1e300, float("inf"), float("nan"), True, False, None]),
    lambda r: r.choice(["", "x", "gelu", "batch", "__class__", "eval", "aten.add.Tensor", "operator.getitem", "reflect", "\u0000", "é" * 50]),
    lambda r: r.choice([[], {}, [[]], [None], {"list": []}, {"tuple": [1]}, {"node": "x"}, {"node": ["x"]}, {"node": {"x": 1}}, {"slice": [0, 1]}]),
    lambda r: r.choice(
        [{"dtype": "float16"}, {"dtype": "nope"}, {"device": "cuda"}, {"device": "cpu"}, {"float": "inf"}, {"layout": "strided"}, {"x": 1}]
    ),
]


def mutate(record: Any, choices: random.Random) -> Any:
    """One change at a random place of a JSON value: another value, a lost, doubled or moved entry, another key."""
    places = list(containers(record))
    place = choices.choice(places)
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    kind = choices.randrange(7)
    if not keys or kind == 0:
        value = choices.choice(VALUES)(choices)
        place.append(value) if isinstance(place, list) else place.__setitem__(choices.choice(["alpha", "x", "kind", "value", "keys"]), value)
        return record
    key = choices.choice(keys)
    if kind == 1:
        del place[key]
    elif kind == 2 and isinstance(place, list):
        place.insert(choices.randrange(len(place) + 1), copy.deepcopy(place[key]))
    elif kind == 3 and isinstance(place, list):
        choices.shuffle(place)
    elif kind == 4:
        place[key] = copy.deepcopy(choices.choice(places))
    elif kind == 5 and isinstance(place, dict):
        place[choices.choice(["name", "target", "a b", f"{key}_"])] = place.pop(key)
    else:
        place[key] = choices.choice(VALUES)(choices)
    return record


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


def mutate_tensors(tensors: dict[str, Tensor], choices: random.Random) -> None:
    name = choices.choice(sorted(tensors)) if tensors else "x"
    tensor = tensors.pop(name, torch.zeros(2))
    kind = choices.randrange(6)
    if kind == 1:
        tensors[name] = tensor.to(choices.choice([torch.int64, torch.bool, torch.float16, torch.complex64, torch.uint8]))
    elif kind == 2:
        tensors[name] = tensor.reshape(-1)[: choices.randrange(tensor.numel() + 1)].clone()
    elif kind == 3:
        tensors[choices.choice(["x", "graph", "__class__", "conv.weight.a", "_modules", name + ".b", "é"])] = tensor
    elif kind == 4:
        tensors[name] = torch.full_like(tensor, choices.choice([0, 1, float("nan"), float("inf")])) if tensor.is_floating_point() else tensor + 1000
    elif kind == 5:
        tensors[name], tensors["extra"] = tensor.unsqueeze(0), torch.zeros(0)
