"""Limits and units: what is read, what is shown, what is refused."""

from __future__ import annotations

import ast
import dataclasses
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downsize import target as target_module
from downsize.errors import SpecError, TargetError
from downsize.spec import Call, build, fields_of, from_yaml, parse, spell, to_yaml
from downsize.target import (
    Limit,
    Target,
    parse_fraction,
    parse_size,
    parse_time,
    show,
    show_fraction,
    show_ratio,
    show_size,
    show_time,
)

POSITIVE = st.floats(min_value=1e-9, max_value=1e12, allow_subnormal=False)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5.2 MB", 5_200_000), ("5.2MB", 5_200_000), ("1 MiB", 1_048_576), ("1.5kib", 1536), ("64mb", 64_000_000), ("2e3 B", 2000), ("1 GiB", 2**30)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5 ms", 0.005), ("3.4ms", 0.0034), ("2s", 2.0), ("250us", 0.00025), ("250 \u00b5s", 0.00025), ("7 \u03bcs", 7e-6), ("9ns", 9e-9)],
)
def test_times_are_read(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize(("text", "fraction"), [("5 %", 0.05), ("5%", 0.05), ("0.05", 0.05), ("100 %", 1.0), ("0%", 0.0), ("0.7 %", 0.007)])
def test_fractions_are_read(text, fraction):
    assert parse_fraction(text) == fraction


@given(POSITIVE)
def test_numbers_are_in_base_units(value):
    assert parse_time(value) == value
    assert parse_fraction(value) == value
    assert parse_size(value + 1) == int(value + 1)


@given(st.integers(1, 10**6), st.sampled_from([("B", 1), ("kB", 10**3), ("MB", 10**6), ("KiB", 2**10), ("GiB", 2**30)]))
def test_a_size_is_its_number_times_its_unit_rounded_down(hundredths, unit):
    exact = Fraction(hundredths, 100) * unit[1]
    if exact >= 1:
        assert parse_size(f"{hundredths // 100}.{hundredths % 100:02d} {unit[0]}") == int(exact)


@pytest.mark.parametrize(("parse_text", "show_value"), [(parse_time, show_time), (parse_fraction, show_fraction), (parse_fraction, show_ratio)])
@given(value=POSITIVE)
def test_what_is_shown_reads_back_near_and_rounded_up_it_covers_the_value(parse_text, show_value, value):
    assert parse_text(show_value(value)) == pytest.approx(value, rel=0.00501)
    assert parse_text(show_value(value, digits=17)) == value
    above = parse_text(show_value(value, up=True))
    assert value <= above <= value * 1.0101


@given(st.integers(1, 10**15))
def test_shown_sizes_read_back(size):
    assert parse_size(show_size(size)) == pytest.approx(size, rel=0.00501, abs=1)
    assert parse_size(show_size(size, digits=17)) == size
    assert size <= parse_size(show_size(size, up=True)) <= size * 1.0101


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (5_200_000, "bytes", "5.2 MB"),
        (999_999, "bytes", "1 MB"),
        (512, "bytes", "512 B"),
        (-1500, "bytes", "-1.5 kB"),
        (0, "seconds", "0 ns"),
        (0.0034, "seconds", "3.4 ms"),
        (12.0, "seconds", "12 s"),
        (0.05, "fraction", "5 %"),
        (-0.0123, "fraction", "-1.23 %"),
        (0.6512, "ratio", "0.651"),
        (0.12, "joules", "0.12 joules"),
        (float("inf"), "seconds", "inf ns"),
    ],
)
def test_values_are_shown_with_their_unit(value, unit, text):
    assert show(value, unit) == text


def test_a_target_reads_text_and_numbers():
    target = Target(size="5.2 MB", latency=0.005, latency_ratio="65 %", memory="64 MiB", drop="5%", threads=2)
    assert (target.size, target.latency, target.latency_ratio, target.memory, target.drop) == (5_200_000, 0.005, 0.65, 2**26, 0.05)
    assert target == Target(size=5_200_000, latency="5ms", latency_ratio=0.65, memory=2**26, drop=0.05, threads=2)
    assert str(target) == (
        "onnxruntime, 2 threads, batch 1, size at most 5.2 MB, latency at most 5 ms, latency_ratio at most 0.65, "
        "memory at most 67.1089 MB, drop at most 5 %"
    )


def test_limits_come_in_order_with_their_units():
    target = Target(drop="1 %", memory="1 MB", latency_ratio=0.5, latency="1 ms", size="1 kB")
    assert target.limits() == (
        Limit("size", 1000, "bytes"),
        Limit("latency", 0.001, "seconds"),
        Limit("latency_ratio", 0.5, "ratio"),
        Limit("memory", 1_000_000, "bytes"),
        Limit("drop", 0.01, "fraction"),
    )
    assert Target().limits() == ()


@given(
    st.builds(
        Target,
        runtime=st.sampled_from(["onnxruntime", "openvino"]),
        threads=st.integers(1, 64),
        size=st.none() | st.integers(1, 10**12),
        latency=st.none() | POSITIVE,
        latency_ratio=st.none() | st.floats(0.001, 10),
        memory=st.none() | st.integers(1, 10**12),
        drop=st.none() | st.floats(0, 1),
        batch=st.integers(1, 512),
    )
)
def test_a_target_is_spelled_and_read(target):
    call = Call("target", fields_of(target))
    assert build(Target, parse(spell([call]))[0].fields, "target") == target
    assert build(Target, from_yaml(to_yaml([call]))[0].fields, "target") == target


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"size": "5"}, "size='5' has no unit; write it with one of B, kB, MB, GB, KiB, MiB, GiB, e.g. size='5.2 MB'."),
        ({"size": "5 MBs"}, "size='5 MBs' has the unknown unit 'MBs'; did you mean 'MB'?"),
        ({"size": "big"}, "size='big' is not a quantity; expected a number and a unit"),
        ({"size": 0}, "size=0 is less than one byte"),
        ({"size": "0.4 B"}, "size='0.4 B' is less than one byte"),
        ({"size": -3}, "size=-3 is less than one byte"),
        ({"size": "1e999999999 MB"}, "makes no sense; expected a finite quantity"),
        ({"size": True}, "size=True makes no sense"),
        ({"size": [1]}, "size=[1] makes no sense"),
        ({"memory": "nan MB"}, "memory='nan MB' is not a quantity"),
        ({"latency": "5"}, "latency='5' has no unit; write it with one of s, ms, us, ns"),
        ({"latency": "5 MB"}, "latency='5 MB' has the unknown unit 'MB'"),
        ({"latency": 0}, "latency=0 is not positive"),
        ({"latency": "-1ms"}, "latency='-1ms' is not positive"),
        ({"latency": float("nan")}, "latency=nan makes no sense"),
        ({"latency": float("inf")}, "latency=inf makes no sense"),
        ({"latency_ratio": 0}, "latency_ratio=0 makes no sense"),
        ({"latency_ratio": "65"}, "latency_ratio='65' makes no sense; expected the artifact's latency as a part of the fp32 latency"),
        ({"drop": "-1 %"}, "drop='-1 %' is negative"),
        ({"drop": "101 %"}, "drop='101 %' is more than 100 %"),
        ({"drop": 5}, "drop=5 is more than 100 %; expected a loss of score from 0 to 100 %, e.g. drop='5 %'"),
        ({"drop": "1"}, "drop='1' could mean 1 % or 100 %; write drop='1 %' or drop='100 %'."),
        ({"drop": 1}, "drop=1 could mean 1 % or 100 %"),
        ({"drop": "5 percent"}, "drop='5 percent' has the unknown unit 'percent'; Known: %."),
        ({"threads": 0}, "threads=0 makes no sense; expected a whole number from 1 to 4096, e.g. threads=1."),
        ({"threads": True}, "threads=True makes no sense"),
        ({"batch": 2.5}, "batch=2.5 makes no sense"),
        ({"runtime": ""}, "runtime='' is not a name"),
    ],
)
def test_nonsense_is_refused_with_the_mend(fields, says):
    with pytest.raises(TargetError, match=re.escape(says)):
        Target(**fields)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(SpecError, match=re.escape("target has no field 'latncy'; did you mean 'latency'?")):
        build(Target, {"latncy": "5ms"}, "target")


def test_the_signature_for_the_type_checker_lists_the_fields():
    source = Path(target_module.__file__).read_text()
    (declared,) = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    assert [argument.arg for argument in declared.args.args[1:]] == [field.name for field in dataclasses.fields(Target)]
    assert [ast.literal_eval(value) for value in declared.args.defaults] == [getattr(Target(), field.name) for field in dataclasses.fields(Target)]
