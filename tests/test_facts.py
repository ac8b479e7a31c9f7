"""Facts as JSON, files described, and verdicts judged."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downsize.errors import ArtifactError, RunError, SpecError
from downsize.facts import (
    VERSION,
    Agreement,
    Artifact,
    Attempt,
    Host,
    Measurement,
    Outcome,
    Report,
    Verdict,
    from_json,
    made_by,
    to_json,
    worse,
)
from downsize.planner import Search
from downsize.target import LIMITS, Limit, Target, parse_fraction, parse_size, parse_time

FINITE = st.floats(allow_nan=False, allow_infinity=False)
HOSTS = st.builds(Host, cpu=st.text(), features=st.lists(st.text(), max_size=3).map(tuple), memory_bytes=st.integers(0, 2**60))
MEASUREMENTS = st.builds(
    Measurement,
    name=st.sampled_from(sorted(LIMITS)),
    value=FINITE,
    low=st.none() | FINITE,
    high=st.none() | FINITE,
    kind=st.sampled_from(["measured", "modelled"]),
    host=st.none() | HOSTS,
)
AGREEMENTS = st.builds(Agreement, top1=st.none() | st.floats(0, 1), relative_error=st.floats(0), cosine=FINITE, kl=st.none() | st.floats(0))
TARGETS = st.builds(
    Target,
    size=st.none() | st.integers(1, 10**12),
    latency=st.none() | st.floats(1e-9, 1e6),
    latency_ratio=st.none() | st.floats(0.01, 10),
    memory=st.none() | st.integers(1, 10**12),
    drop=st.none() | st.floats(0, 1),
)
VERDICTS = st.builds(
    Verdict.judge, TARGETS.map(Target.limits), st.lists(MEASUREMENTS, max_size=5).map(lambda found: {one.name: one for one in found})
)
ATTEMPTS = st.builds(
    Attempt,
    artifact=st.none() | st.builds(Artifact, path=st.sampled_from([Path("runs/a/model.onnx"), Path("/tmp/x y")])),
    measurements=st.dictionaries(st.text(), MEASUREMENTS, max_size=2),
    agreement=st.none() | AGREEMENTS,
    verdict=st.none() | VERDICTS,
)
REPORTS = st.builds(Report, target=TARGETS, baseline=ATTEMPTS, attempts=st.lists(ATTEMPTS, max_size=2).map(tuple), verdict=VERDICTS)


@given(HOSTS | MEASUREMENTS | AGREEMENTS | ATTEMPTS | VERDICTS | REPORTS | TARGETS)
def test_json_gives_every_fact_back(fact):
    text = to_json(fact)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert from_json(type(fact), text) == fact


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "a saved Limit is damaged or of another version: Limit: '{' came; Invalid JSON"),
        ('{"name": "size", "at_most": 1}', "Limit needs the field 'unit'."),
        ('{"name": "size", "at_most": 1, "unit": "bytes", "extra": 2}', "Limit has no field 'extra'"),
        ('{"name": "size", "at_most": "x", "unit": "bytes"}', "at_most='x' came; expected a valid number"),
    ],
)
def test_damaged_json_is_refused(text, says):
    with pytest.raises(RunError, match=re.escape(says)):
        from_json(Limit, text)


def test_a_measurement_must_be_finite():
    with pytest.raises(SpecError, match=re.escape("Measurement: value=nan came; expected a finite number.")):
        Measurement("latency", float("nan"), "seconds")


def test_a_measurement_is_shown_with_its_interval_and_kind():
    assert str(Measurement("latency", 0.0034, "seconds", low=0.003, high=0.004)) == "latency 3.4 ms (3 ms to 4 ms)"
    assert str(Measurement("energy", 0.5, "joules", kind="modelled")) == "energy 0.5 joules, modelled"


def test_an_artifact_describes_a_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"abc" * 1_000_000)
    assert Artifact.of(path, "onnxruntime") == Artifact(path, hashlib.sha256(b"abc" * 1_000_000).hexdigest(), 3_000_000, "onnxruntime")
    with pytest.raises(ArtifactError, match=r"none\.onnx' cannot be read: No such file"):
        Artifact.of(tmp_path / "none.onnx", "onnxruntime")
    with pytest.raises(ArtifactError, match="Is a directory"):
        Artifact.of(tmp_path, "onnxruntime")


def test_made_by_names_versions_of_what_is_installed():
    versions = made_by()
    assert versions["downsize"] == VERSION
    assert re.fullmatch(r"\d+\.\d+.*", versions["torch"])


# Verdicts -------------------------------------------------------------------------------------------------------------------------

SIZE, LATENCY, DROP = Limit("size", 5_200_000, "bytes"), Limit("latency", 0.005, "seconds"), Limit("drop", 0.05, "fraction")


def measured(**values):
    return {name: Measurement(name, value, LIMITS[name]) for name, value in values.items()}


def test_met_when_every_limit_is_met():
    verdict = Verdict.judge([SIZE, LATENCY], measured(size=5_200_000, latency=0.0034))
    assert (verdict.met, verdict.binding, verdict.relaxation) == (True, None, None)
    assert str(verdict) == "met\n  size 5.2 MB, limit 5.2 MB: met\n  latency 3.4 ms, limit 5 ms: met"


def test_the_limit_missed_by_the_most_binds_and_the_relaxation_names_all():
    verdict = Verdict.judge([SIZE, LATENCY, DROP], measured(size=5_209_999, latency=0.0061, drop=0.01))
    assert (verdict.met, verdict.binding) == (False, "latency")
    assert [outcome.met for outcome in verdict.outcomes] == [False, False, True]
    assert str(verdict) == (
        "not met: latency binds\n"
        "  size 5.21 MB, limit 5.2 MB: missed by 10 kB\n"
        "  latency 6.1 ms, limit 5 ms: missed by 1.1 ms\n"
        "  drop 1 %, limit 5 %: met\n"
        "This file would meet size at most 5.21 MB and latency at most 6.1 ms."
    )


def test_values_that_differ_are_shown_differently():
    (outcome,) = Verdict.judge([SIZE], measured(size=5_200_001)).outcomes
    assert outcome.text == "size 5.200001 MB, limit 5.2 MB: missed by 1 B"


def test_what_was_not_measured_is_not_met():
    verdict = Verdict.judge([SIZE, LATENCY], measured(size=9_000_000))
    assert (verdict.met, verdict.binding) == (False, "latency")
    assert verdict.outcomes[1] == Outcome(LATENCY, None, False, "latency at most 5 ms: not measured, so not met")
    assert verdict.relaxation == "This file would meet size at most 9 MB. Measure latency first."


def test_an_interval_that_straddles_the_limit_is_told():
    measurement = Measurement("latency", 0.0049, "seconds", low=0.0047, high=0.0052)
    (outcome,) = Verdict.judge([LATENCY], {"latency": measurement}).outcomes
    assert outcome.met
    assert outcome.text == "latency 4.9 ms, limit 5 ms: met; uncertain: the 95 % interval, 4.7 ms to 5.2 ms, straddles the limit"
    sure = Measurement("latency", 0.0049, "seconds", low=0.0047, high=0.005)
    assert "uncertain" not in Verdict.judge([LATENCY], {"latency": sure}).outcomes[0].text


def test_a_modelled_value_is_called_so():
    (outcome,) = Verdict.judge([SIZE], {"size": Measurement("size", 1, "bytes", kind="modelled")}).outcomes
    assert outcome.text == "size 1 B, limit 5.2 MB: met (modelled, not measured)"


def test_a_drop_limit_of_nothing():
    nothing = Limit("drop", 0, "fraction")
    assert Verdict.judge([nothing], measured(drop=-0.01)).met
    missed = Verdict.judge([SIZE, nothing], measured(size=6_000_000, drop=0.001))
    assert (missed.binding, missed.outcomes[1].text) == ("drop", "drop 0.1 %, limit 0 %: missed by 0.1 %")


def test_no_limit_is_met():
    assert str(Verdict.judge([], {})) == "met\n  no limit was set"


RATIO, DROPPED = Measurement("latency_ratio", 1.84, "ratio", 1.8, 1.87), Measurement("drop", 0.12, "fraction", 0.1, 0.14)


@pytest.mark.parametrize(
    ("found", "original", "limits", "words"),
    [
        (measured(size=6000), measured(size=5000), [], ["not smaller", "6 kB", "5 kB"]),
        (measured(size=5000), measured(size=5000), [], ["not smaller"]),
        (measured(size=6000), measured(size=5000), [SIZE], []),
        (measured(size=4000), measured(size=5000), [], []),
        ({"latency_ratio": RATIO}, {}, [DROP], ["slower", "1.84"]),
        ({"latency_ratio": Measurement("latency_ratio", 1.003, "ratio", 1.001, 1.005)}, {}, [], ["1.003", "1.001 to 1.005"]),
        (measured(size=5001), measured(size=5000), [], ["5.001 kB", "5 kB"]),
        ({"latency_ratio": RATIO}, {}, [LATENCY], []),
        ({"latency_ratio": RATIO}, {}, [Limit("latency_ratio", 2.0, "ratio")], []),
        ({"latency_ratio": replace(RATIO, low=0.99)}, {}, [], []),
        ({"drop": DROPPED}, {}, [SIZE], ["scores 12 % less"]),
        ({"drop": DROPPED}, {}, [DROP], []),
        ({"drop": replace(DROPPED, low=-0.01)}, {}, [], []),
        ({"drop": replace(DROPPED, value=0.009, low=0.001)}, {}, [], []),
    ],
)
def test_what_grew_worse_is_told_where_no_limit_asked(found, original, limits, words):
    told = worse(found, original, limits)
    assert len(told) == bool(words)
    assert all(word in told[0] for word in words)


def test_warnings_are_part_of_the_verdicts_text():
    warned = replace(Verdict.judge([], {}), warnings=worse({"latency_ratio": RATIO}, {}, []))
    text = "  warning: the file is slower than the original: 1.84 of its time (1.8 to 1.87); set latency_ratio=1 to rule this out"
    assert str(warned).splitlines()[2] == text
    assert from_json(Verdict, to_json(warned)) == warned
    assert from_json(Verdict, '{"met": true}').warnings == ()  # of a report before there were any


def test_the_original_is_not_worse_than_itself():
    one, other = (Attempt(name, "", None, measured(size=size), None, None, False, "") for name, size in (("original", 5000), ("made", 6000)))
    search: Any = SimpleNamespace(attempts=[one, other], limits=())
    verdict = Verdict.judge([], {})
    assert Search._warned(search, verdict, one, one.measurements) == verdict
    assert len(Search._warned(search, verdict, other, other.measurements).warnings) == 1


@given(TARGETS, st.lists(MEASUREMENTS, max_size=5))
def test_verdicts_follow_the_numbers(target, found):
    measurements = {one.name: one for one in found}
    verdict = Verdict.judge(target.limits(), measurements)
    missed = {
        limit.name: (measurements[limit.name].value - limit.at_most) / (limit.at_most or 1e-300) if limit.name in measurements else float("inf")
        for limit in target.limits()
        if limit.name not in measurements or measurements[limit.name].value > limit.at_most
    }
    assert verdict.met == (not missed)
    assert (verdict.binding is None) if verdict.met else missed[verdict.binding] == max(missed.values())


PARSE = {"bytes": parse_size, "seconds": parse_time, "fraction": parse_fraction, "ratio": parse_fraction}


@given(st.sampled_from(sorted(LIMITS)), st.floats(1.0001, 1e6))
def test_the_relaxed_limit_is_met(name, excess):
    limit = Limit(name, 1000.0, LIMITS[name])
    measurements = measured(**{name: limit.at_most * excess})
    relaxation = Verdict.judge([limit], measurements).relaxation
    match = re.fullmatch(rf"This file would meet {name} at most (.+)\.", relaxation or "")
    assert match is not None
    relaxed = Limit(name, PARSE[limit.unit](match.group(1)), limit.unit)
    assert Verdict.judge([relaxed], measurements).met
    assert relaxed.at_most <= limit.at_most * excess * 1.0101
