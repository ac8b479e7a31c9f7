"""Forged network files: no operator, name, text or number in one may run code, reach a file, or end in anything but NetworkFileError."""

from __future__ import annotations

import ast
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import Record, everywhere, genuine, load, node, refused, run, victim, with_calls, words
from torch import Tensor

from downsize.errors import NetworkFileError
from downsize.network.network import Network
from downsize.network.operators import SYMBOLIC

OTHERS = """
    aten.from_file.default aten.from_file.out aten.set_.source_Tensor aten.resize_.default aten.item.default aten._local_scalar_dense.default
    aten.max_pool2d_with_indices_backward.default aten.embedding_dense_backward.default aten._native_batch_norm_legit_no_training.default
    aten.add.out aten.cat.out aten._print.default aten.save.default aten.__class__.default aten.__dict__.default aten.add.__class__
    aten.add._op aten.add.decompose aten.conv2d aten.conv2d.default.__call__ aten..default aten.conv2d. .. torch.load torch.save torch.hub.load
    torch.classes.load_library prims.add.default quantized.linear.default profiler._record_function_enter.default higher_order.cond
    load_library.a.b aten.load_library.default os.system subprocess.run builtins.eval builtins.exec builtins.open builtins.getattr
    builtins.compile builtins.__import__ operator.attrgetter operator.methodcaller operator.setitem operator.call posix.system eval exec
    __import__ getattr math.factorial math.__loader__ operator.__builtins__ torch.ops.aten.add.Tensor
    """
MISREAD = """
    self torch device inf nan NoneType None True print eval exec open lambda class def __import__ __builtins__ __class__ fx_pytree pytree slice
    getattr 1a a-b a.b a[0] *a **a a=1
    """
HIDING = """
    __class__ __dict__ __init__ __call__ _modules _parameters _buffers training forward forward.x graph code meta recompile _graph _code
    graph.weight a..b .a a. a/b norm.running_mean.y parameters eval.weight state_dict __class__.__init__ conv.__class__ conv.forward
    conv._parameters conv.training T_destination
    """


@pytest.fixture(scope="module")
def true(tmp_path_factory):
    return genuine(tmp_path_factory.mktemp("genuine"))


def test_the_genuine_file_loads_and_runs(true, tmp_path):
    assert len(run(load(tmp_path / "n", *true))) == 3


# Operators ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [*words(OTHERS), "", " ", "aten.conv2d.default\n", "aten.conv2d.default "],
)
def test_other_operators_are_refused(target, true, tmp_path):
    record, tensors = copy.deepcopy(true[0]), true[1]
    node(record, "aten.conv2d.default")["target"] = target
    assert "is not an operator a Network may hold" in refused(tmp_path / "n", record, tensors)


@pytest.mark.parametrize("op", ["call_method", "call_module", "root", "", "__class__"])
def test_other_kinds_of_nodes_are_refused(op, true, tmp_path):
    record, tensors = copy.deepcopy(true[0]), true[1]
    node(record, "aten.conv2d.default")["op"] = op
    refused(tmp_path / "n", record, tensors)


# Names and texts: torch.fx writes them into Python source ----------------------------------------------------------------------------


def payloads(canary: Path) -> list[str]:
    """Texts that leave a file behind if any of them is ever run as code, alone or inside a call, a text, a line or an attribute."""
    touch = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    wide = touch.replace("'", '"')
    quoted = [f"'+{wide}+'", f'"+{touch}+"', f"\\'+{wide}+\\'", f"{{{touch}}}", f"%s{touch}", f"');{touch}#", f'");{touch}#', f'", {touch}) #']
    lines = [f"x\n{touch}", f"x\n    {touch}\n    ", f"x\r{touch}", f"x;{touch}", f"x = None\n{touch}\n", f"# COUNTER: 1\n{touch}", f"x\x0c\n{touch}"]
    calls = [
        touch,
        f"x={touch}, y",
        f"x = {touch}, y",
        f"x: {touch}",
        f"*{touch}",
        f"**{touch}",
        f"x[{touch}]",
        f"x.a if {touch} else x.b",
        f"x={touch}",
    ]
    return [
        *calls,
        *quoted,
        *lines,
        f"(lambda: {touch})()",
        f"alpha = ({touch} or 1), beta",
        f"self.{touch}",
        f"{touch}.default",
        f"aten.{touch}.default",
    ]


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every text in a JSON value; a path that ends in ``("key", k)`` is the name of an entry."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield (*path, ("key", key))
            yield from strings(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings(item, (*path, index))


def replaced(record: Record, path: tuple[Any, ...], text: str) -> Record:
    made = copy.deepcopy(record)
    place: Any = made
    for step in path[:-1]:
        place = place[step]
    if isinstance(path[-1], tuple):
        old = path[-1][1]
        entries = [(text if key == old else key, item) for key, item in place.items()]
        place.clear()
        place.update(entries)
    else:
        place[path[-1]] = text
    return made


def check_harmless(path: Path, record: Record, tensors: dict[str, Tensor], canary: Path) -> None:
    """Loading, running, printing and re-saving a forged file runs nothing of it."""
    try:
        network = load(path, record, tensors)
        check_source(network.graph_module.code)
        run(network)
        assert str(network.graph) and repr(network)
        network.copy().train().eval().save(path)
        Network.load(path)
    except NetworkFileError:
        pass
    assert not canary.exists()


def check_source(code: str) -> None:
    """The source that torch.fx made holds plain assignments and calls of operators and nothing else."""
    function = ast.parse(code.strip()).body
    assert len(function) == 1 and isinstance(function[0], ast.FunctionDef) and not function[0].decorator_list
    arguments = function[0].args
    assert not arguments.defaults and not arguments.kw_defaults and arguments.vararg is None and arguments.kwarg is None
    assert all(isinstance(statement, (ast.Assign, ast.Return)) for statement in function[0].body)
    for part in ast.walk(function[0]):
        assert not isinstance(part, (ast.Lambda, ast.NamedExpr, ast.ListComp, ast.JoinedStr, ast.Starred, ast.Await, ast.Yield, ast.IfExp))
        if isinstance(part, ast.Call):
            called = ast.unparse(part.func)
            assert called.startswith(("torch.ops.aten.", "torch.ops.downsize.")) or called in ("slice", "getattr", "device", *SYMBOLIC_CALLS), called


SYMBOLIC_CALLS = {name.replace(".", "_") for name in SYMBOLIC} | {f"torch.{name.split('.')[1]}" for name in SYMBOLIC} | {"max", "min", "abs", "round"}


def test_the_canary_sings(tmp_path):
    canary = tmp_path / "canary"
    exec(payloads(canary)[0])
    assert canary.exists()


def test_no_text_of_a_forged_file_becomes_code(true, tmp_path):
    record, tensors = true
    record = copy.deepcopy(record)
    node(record, "aten.conv2d.default")["kwargs"] = {"groups": 1}
    record["origin"] = {"made by": ["someone"]}
    canary = tmp_path / "canary"
    every = list(strings(record))
    assert len(every) > 300
    choices = random.Random(0)
    texts = payloads(canary)
    for number, path in enumerate(every):
        for text in {texts[number % len(texts)], choices.choice(texts)}:
            check_harmless(tmp_path / "n", replaced(record, path, text), tensors, canary)


@pytest.mark.parametrize(
    "place", ["kwargs of conv2d", "kwargs of getitem", "text argument", "node", "input", "symbol", "key of the inputs", "module"]
)
def test_texts_where_torch_would_write_them_as_they_are(place, true, tmp_path):
    canary = tmp_path / "canary"
    for text in payloads(canary):
        record = copy.deepcopy(true[0])
        if place.startswith("kwargs of"):
            target = {"conv2d": "aten.conv2d.default", "getitem": "operator.getitem"}[place.split()[-1]]
            node(record, target)["kwargs"] = {text: 1}
            assert "has no argument" in refused(tmp_path / "n", record, true[1]) or target == "operator.getitem"
        elif place == "text argument":
            node(record, "aten.gelu.default")["kwargs"] = {"approximate": text}
        elif place == "symbol":
            record = everywhere(record, "batch", text)
        elif place == "key of the inputs":
            record = everywhere(record, "ids", text)
        elif place == "module":
            node(record, "aten.conv2d.default").update(module=text, source=text)
        else:
            record = everywhere(record, {"node": "gelu", "input": "x"}[place], text)
        check_harmless(tmp_path / "n", record, true[1], canary)


@pytest.mark.parametrize(
    "name",
    [*words(MISREAD), "\uff41", "exec_\uff45", "é", "", " ", "a b", "a\n", "a,b", "a:int"],
)
def test_names_of_nodes_and_inputs_that_python_or_torch_would_misread(name, true, tmp_path):
    for old in ("gelu", "x"):
        try:
            network = load(tmp_path / "n", everywhere(true[0], old, name), true[1])
        except NetworkFileError:
            continue
        check_source(network.graph_module.code)
        assert name in {one.name for one in network.graph.nodes} and name.isascii() and name.isidentifier()
        assert all(torch.equal(a, b) for a, b in zip(run(network), run(victim()), strict=True))


@pytest.mark.parametrize(
    "name",
    [*words(HIDING), "\uff47raph", "", "a b", "a\nb", 'a"b', "a'b", "a\\b", '");x=("'],
)
def test_names_of_tensors_that_would_hide_something(name, true, tmp_path):
    record, tensors = everywhere(true[0], "conv.weight", name), dict(true[1])
    tensors[name] = tensors.pop("conv.weight")
    assert "is not a name" in refused(tmp_path / "n", record, tensors)


def test_aliases_cannot_hide_something(true, tmp_path):
    for name in ("__class__", "forward", "conv.weight", "conv", "graph", "_modules", "a\nb"):
        record = {**copy.deepcopy(true[0]), "aliases": {name: "norm.weight"}}
        refused(tmp_path / "n", record, true[1])
    for first in ("nothing", "__class__"):
        refused(tmp_path / "n", {**true[0], "aliases": {"free": first}}, true[1])


# Numbers: memory and time ------------------------------------------------------------------------------------------------------------


C0, C1, X = {"node": "c0"}, {"node": "c1"}, {"node": "x"}
BOMBS: dict[str, tuple[tuple[str, list[Any]], ...]] = {
    "a repeated text": (("operator.mul", ["a", 10**10]),),
    "a repeated list": (("operator.mul", [{"list": [0]}, 10**10]),),
    "a list that doubles": (("aten.unbind.int", [X]), ("operator.add", [C0, C0]), ("operator.add", [C1, C1])),
    "a formatted text": (("operator.mod", ["%1000000000d", 1]),),
    "a power": (("operator.pow", [9, 10**9]),),
    "a power of powers": (("operator.pow", [9, 9]), ("operator.pow", [C0, C0]), ("operator.pow", [C1, C1])),
    "a long number": (("builtins.int", ["9" * 10**5]),),
    "many squares": (
        ("aten.sym_size.int", [X, 0]),
        *(("operator.mul", [{"node": f"c{i}"}, {"node": f"c{i}"}]) for i in range(60)),
    ),
    "a huge tensor": (("aten.zeros.default", [{"list": [10**6, 10**6]}]),),
    "an overflowing tensor": (("aten.zeros.default", [{"list": [2**40, 2**40]}]),),
    "a huge range": (("aten.arange.default", [10**13]),),
    "a huge repetition": (("aten.repeat.default", [X, {"list": [10**9, 1, 1, 1]}]),),
    "a huge padding": (("aten.constant_pad_nd.default", [X, {"list": [10**9, 10**9]}]),),
    "a huge one hot": (("aten.one_hot.default", [{"node": "ids"}, 10**12]),),
    "many pieces": (("aten.arange.default", [10**8]), ("aten.unbind.int", [C0])),
    "many chunks": (("aten.arange.default", [10**8]), ("aten.chunk.default", [C0, 10**8])),
    "many splits": (("aten.arange.default", [10**8]), ("aten.split.Tensor", [C0, 1])),
}


@pytest.mark.parametrize("bomb", sorted(BOMBS))
def test_bombs_are_refused(bomb, true, tmp_path):
    assert "forged" in refused(tmp_path / "n", with_calls(true[0], *BOMBS[bomb]), true[1])


@pytest.mark.parametrize(
    "example", [[2**31 - 1, 2, 6, 6], [2, 2, 2**30, 2**30], [2, 2, -6, 6], [2, 2, 0, 6], [2, 3, 6, 6], [2, 2, 6], [2**63, 2, 6, 6]]
)
def test_examples_of_a_wrong_size_are_refused(example, true, tmp_path):
    record = copy.deepcopy(true[0])
    next(port for port in record["ports"] if port["name"] == "x")["example"] = example
    refused(tmp_path / "n", record, true[1])


def test_numbers_too_long_to_print_are_refused(true, tmp_path):
    for digits in (4000, 5000, 100_000):
        text = json.dumps(with_calls(true[0], ("operator.add", [1234567, 1]), ("aten.mul.Scalar", [X, 1234567])))
        refused(tmp_path / "n", text.replace("1234567", "9" * digits), true[1])


def test_deep_nesting_is_refused(true, tmp_path):
    for depth in (50, 150, 1000, 100_000):
        record = copy.deepcopy(true[0])
        node(record, "aten.gelu.default")["args"].append("PLACE")
        text = json.dumps(record).replace('"PLACE"', '{"list":[' * depth + "]}" * depth)
        refused(tmp_path / "n", text, true[1])  # type: ignore[arg-type]
        text = json.dumps({**record, "inputs": "PLACE"}).replace('"PLACE"', '{"kind":"tuple","items":[' * depth + "]}" * depth)
        refused(tmp_path / "n", text, true[1])  # type: ignore[arg-type]
