"""Steps as text, YAML and dataclasses: round trips for all values, and what errors say."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from downsize.errors import SpecError
from downsize.spec import Call, build, fields_of, from_yaml, frozen, parse, spell, to_yaml

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
QUANTITIES = st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,2})? ?(%|MB|kB|ms|s|x1?e)", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | QUANTITIES
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)
NESTED = st.recursive(VALUES, lambda inner: st.builds(Call, NAMES, st.dictionaries(NAMES, inner, max_size=3)), max_leaves=4)
CALLS = st.lists(st.builds(Call, NAMES, st.dictionaries(NAMES, VALUES, max_size=4)), max_size=4)


@given(CALLS)
def test_text_gives_the_calls_back(calls):
    assert parse(spell(calls)) == calls


@given(st.lists(st.builds(Call, NAMES, st.dictionaries(NAMES, NESTED, max_size=3)), max_size=2))
def test_text_gives_calls_in_calls_back(calls):
    assert parse(spell(calls)) == calls


@given(CALLS)
def test_yaml_gives_the_calls_back(calls):
    assert from_yaml(to_yaml(calls)) == calls


@given(st.text(alphabet="ab_1.(){}[]'\",|= %\\\n", max_size=30))
def test_any_text_is_read_or_refused_cleanly(text):
    for read, write in ((parse, spell), (from_yaml, to_yaml)):
        try:
            calls = read(text)
        except SpecError:
            continue
        assert read(write(calls)) == calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("", []),
        ("quantize", [Call("quantize")]),
        (" prune( macs = .5 ) |quantize() ", [Call("prune", {"macs": 0.5}), Call("quantize")]),
        ("a(x=1MB, y=5 ms, z=1%)", [Call("a", {"x": "1MB", "y": "5 ms", "z": "1%"})]),
        ("a(x=(1, 2), y={'k': [None, True]})", [Call("a", {"x": [1, 2], "y": {"k": [None, True]}})]),
        ("a(x='b|c, (d', y=\"it's\")", [Call("a", {"x": "b|c, (d", "y": "it's"})]),
        ("a(x=1e5, y=-2, z=0x10)", [Call("a", {"x": 1e5, "y": -2, "z": 16})]),
        ("a(x=b(), y=c(z=d(e='|,)')), f=1)", [Call("a", {"x": Call("b"), "y": Call("c", {"z": Call("d", {"e": "|,)"})}), "f": 1})]),
    ],
)
def test_text_forms(text, calls):
    assert parse(text) == calls


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a(", "brackets or quotes of 'a(' do not match"),
        ("a(x=1))", "brackets or quotes of 'a(x=1))' do not match"),
        ("a(x='1)", "do not match"),
        ("a(x=1) b(y=2)", "do not match"),
        ("a() |", "'' in 'a() |' is not a step; expected word(field=value, ...)"),
        ("1a()", "'1a()' in '1a()' is not a step"),
        ("a(1)", "'1' in 'a(1)' is not a field; expected name=value"),
        ("a(x=1,)", "'' in 'a(x=1,)' is not a field"),
        ("a(x=1, x=2)", "'x' is given twice in 'a(x=1, x=2)'; keep one"),
        ("a(x=static)", "'static' in 'a(x=static)' is not a value; quote text: 'static'"),
        ("a(x=f(1))", "'1' in 'f(1)' is not a field"),
        ("a(x=1+2j)", "(1+2j) came; expected a number, text"),
        ("a(x={1: 2})", "{1: 2} came; expected a number, text"),
        ("a(x=" * 800 + ")" * 800, "is nested too deeply"),
        ("a(x=[b()])", "'[b()]' in 'a(x=[b()])' is not a value"),
        ("a(x=b()c)", "'b()c' in 'a(x=b()c)' is not a value"),
        ("a(x=1e999)", "inf came; expected a finite number"),
    ],
)
def test_bad_text_says_what_and_how(text, says):
    with pytest.raises(SpecError, match=re.escape(says)):
        parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {x: 1}", "the YAML is a dict; expected a list of steps"),
        ("", "the YAML is a NoneType; expected a list"),
        ("- a: [1]", "{'a': [1]} is not a step"),
        ("- {a: {}, b: {}}", "is not a step; expected a word, or one word with its fields"),
        ("- 3", "3 is not a step"),
        ("- a: {x: 1, x: 2}", "'x' is given twice; keep one"),
        ("- a: {x: 2020-01-01}", "datetime.date(2020, 1, 1) came; expected a number, text"),
        ("- a: {x: .nan}", "nan came; expected a finite number"),
        ("- a: {3: 1}", "3 is not a name"),
        ("- a: {x: !!python/name:os.system }", "not YAML: could not determine a constructor"),
        ("- [", "not YAML"),
    ],
)
def test_bad_yaml_says_what_and_how(text, says):
    with pytest.raises(SpecError, match=re.escape(says)):
        from_yaml(text)


def test_yaml_takes_a_word_alone():
    assert from_yaml("- quantize\n- prune:\n- prune: {macs: 0.5}") == [Call("quantize"), Call("prune"), Call("prune", {"macs": 0.5})]


# Declared classes -----------------------------------------------------------------------------------------------------------------


@frozen
class Bake:
    """A class such as a technique is."""

    mode: Literal["dry", "wet"] = "dry"
    degrees: int = Field(default=180, ge=50)
    sizes: tuple[float, ...] = ()
    names: tuple[str, ...] = Field(default_factory=tuple)


@frozen
class Plate:
    name: str


@frozen
class Stir:
    pass


BAKES = st.builds(
    Bake,
    mode=st.sampled_from(["dry", "wet"]),
    degrees=st.integers(50, 300),
    sizes=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    names=st.lists(st.text(), max_size=3),
)


@given(BAKES)
def test_an_instance_is_built_from_its_fields(bake):
    assert build(Bake, fields_of(bake), "bake") == bake
    for calls in (parse(spell([Call("bake", fields_of(bake))])), from_yaml(to_yaml([Call("bake", fields_of(bake))]))):
        assert build(Bake, calls[0].fields, "bake") == bake


def test_fields_at_their_default_are_left_out():
    assert fields_of(Bake()) == {}
    assert fields_of(Bake(degrees=180, sizes=(), mode="wet")) == {"mode": "wet"}
    assert fields_of(Plate("a")) == {"name": "a"}


def test_instances_are_frozen_and_hashable():
    bake = Bake(degrees=200)
    with pytest.raises(AttributeError, match="degrees"):
        bake.degrees = 100  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(bake) == hash(Bake(degrees=200))


@pytest.mark.parametrize(
    ("cls", "fields", "says"),
    [
        (Bake, {"degree": 200}, "bake has no field 'degree'; did you mean 'degrees'? Known: degrees, mode, names, sizes."),
        (Stir, {"x": 1}, "bake has no field 'x'; it takes none."),
        (Plate, {}, "bake needs the field 'name'."),
        (Bake, {"mode": "hot"}, "bake: mode='hot' came; expected 'dry' or 'wet'."),
        (Bake, {"degrees": 10}, "bake: degrees=10 came; expected greater than or equal to 50."),
        (Bake, {"degrees": 60.5}, "bake: degrees=60.5 came; expected a valid integer"),
        (Bake, {"sizes": [1, "x"]}, "bake: sizes.1='x' came; expected a valid number"),
        (Bake, {"mode": "hot", "degree": 1}, "mode='hot' came; expected 'dry' or 'wet'.; bake has no field 'degree'"),
    ],
)
def test_a_wrong_field_says_what_and_how(cls, fields, says):
    with pytest.raises(SpecError, match=re.escape(says)):
        build(cls, fields, "bake")


def test_the_constructor_refuses_in_the_same_words():
    with pytest.raises(SpecError, match=re.escape("Bake: mode='hot' came; expected 'dry' or 'wet'.")):
        Bake(mode="hot")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match=re.escape("Bake has no field 'degree'; did you mean 'degrees'?")):
        Bake(degree=3)  # pyright: ignore[reportCallIssue]


def test_truth_may_be_spelled_as_in_yaml():
    (step,) = parse("a(x=true, y=false, w='true')")
    assert step.fields == {"x": True, "y": False, "w": "true"}
