"""The planner: which file is chosen and why, what is refused before work, and that there is always a file, killed or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from digits_task import convolutional, digits, mlp, task_of
from torch import nn

import downsize as ds
from downsize import bench, engine, planner
from downsize.candidates import best_of, explained, floats_for, recipes_for, shares_for, smaller_for, why_not_worth_it
from downsize.errors import CaptureError, ExportError, RunError, SpecError, TargetError, TaskError
from downsize.facts import Agreement, Artifact, Attempt, Measurement, Report, Verdict, from_json
from downsize.target import Target

# Choosing -------------------------------------------------------------------------------------------------------------------------


def attempt(name: str, target: Target, size: float, ratio: float, drop: float, error: float = 0.1, spread: float = 0.02) -> Attempt:
    """An attempt with made-up numbers: size in MB, ratio with its interval, drop as a fraction."""
    numbers = {
        "size": Measurement("size", size * 1e6, "bytes"),
        "latency": Measurement("latency", ratio * 0.01, "seconds"),
        "latency_ratio": Measurement("latency_ratio", ratio, "ratio", ratio - spread, ratio + spread),
        "drop": Measurement("drop", drop, "fraction"),
    }
    artifact = Artifact(Path(name), "0", int(size * 1e6), "onnxruntime")
    return Attempt(name, name, artifact, numbers, Agreement(10, 1.0, error, 1.0, 0.0), Verdict.judge(target.limits(), numbers), False, "")


def choice(target: Target, *rows: tuple[str, float, float, float, float]) -> tuple[str, dict[str, str]]:
    """The chosen name, and the reasons by name, among the original (10 MB) and the rows."""
    attempts = [attempt("original", target, 10, 1, 0, 0), *(attempt(name, target, *numbers) for name, *numbers in rows)]
    chosen = best_of(attempts, target)
    told = explained(attempts, chosen, target)
    assert [row.name for row in told if row.taken] == [chosen.name]
    return chosen.name, {row.name: row.reason for row in told}


STATIC, DYNAMIC, WEIGHTS = ("static", 2.6, 0.5, 0.02, 0.1), ("dynamic", 2.7, 0.8, 0.005, 0.05), ("weights", 2.5, 1.3, 0.001, 0.01)


def test_of_the_files_that_meet_all_limits_the_one_with_the_least_loss_is_taken() -> None:
    name, reasons = choice(Target(size="3 MB", latency_ratio=0.9, drop="5 %"), STATIC, DYNAMIC, WEIGHTS)
    assert name == "dynamic"
    assert reasons["dynamic"] == "meets all limits with the least loss"
    assert "drop 2 %" in reasons["static"] and "drop 0.5 %" in reasons["static"]
    assert "size 10 MB" in reasons["original"]


def test_a_drop_below_zero_is_no_merit_and_the_output_error_decides() -> None:
    lucky, exact = ("lucky", 2.6, 0.5, -0.05, 0.3), ("exact", 2.6, 0.5, 0.0, 0.1)
    assert choice(Target(size="3 MB"), lucky, exact)[0] == "exact"


def test_of_two_files_that_lose_the_same_the_smaller_and_faster_one_is_taken() -> None:
    slow, fast = ("slow", 2.6, 0.9, 0.0101, 0.100), ("fast", 2.6, 0.5, 0.0104, 0.104)
    name, reasons = choice(Target(size="3 MB"), slow, fast)
    assert name == "fast"
    assert "loses as much and is not as small and fast as fast" in reasons["slow"]
    assert choice(Target(size="3 MB"), slow, ("fast", 2.6, 0.5, 0.02, 0.1))[0] == "slow"


def test_the_original_is_taken_when_it_meets_the_limits() -> None:
    name, reasons = choice(Target(size="20 MB", drop="1 %"), STATIC, DYNAMIC)
    assert name == "original"
    assert "loses more than original" in reasons["dynamic"]


def test_a_slower_file_is_rejected_with_its_interval_while_another_meets_the_limits() -> None:
    name, reasons = choice(Target(size="3 MB", drop="5 %"), STATIC, WEIGHTS)
    assert name == "static"
    assert reasons["weights"].startswith("slower than the original: latency_ratio 1.3 (1.28 to 1.32)")


def test_a_slower_file_is_taken_when_no_other_meets_the_limits() -> None:
    name, reasons = choice(Target(size="3 MB", drop="1 %"), STATIC, WEIGHTS)
    assert name == "weights"
    assert "although it is slower" in reasons["weights"]
    assert "drop 2 %, limit 1 %: missed" in reasons["static"]


def test_when_none_meets_all_limits_the_smallest_worst_miss_is_taken() -> None:
    target = Target(size="2 MB", latency_ratio=0.6)
    name, reasons = choice(target, STATIC, DYNAMIC, WEIGHTS)  # misses: static 30 % (size), dynamic 35 %, weights 117 % (ratio)
    assert name == "static"
    assert reasons["static"].startswith("no file meets all limits; this one comes nearest: size 2.6 MB, limit 2 MB")


def test_without_limits_the_smallest_and_fastest_that_keeps_its_skill_is_taken() -> None:
    broken = ("broken", 1.0, 0.1, 0.5, 2.0)
    assert choice(Target(), STATIC, DYNAMIC, broken)[0] == "dynamic"
    assert choice(Target(drop="2 %"), STATIC, DYNAMIC, broken)[0] == "static"
    assert choice(Target(drop="60 %"), STATIC, DYNAMIC, broken)[0] == "broken"


def test_only_an_interval_that_excludes_one_makes_a_file_slower() -> None:
    target = Target()
    original = attempt("original", target, 10, 1, 0)
    assert why_not_worth_it(attempt("a", target, 5, 1.05, 0, spread=0.06), original) is None
    assert "slower" in str(why_not_worth_it(attempt("a", target, 5, 1.05, 0, spread=0.04), original))
    assert "not smaller than the original: 10 MB against 10 MB" in str(why_not_worth_it(attempt("a", target, 10, 0.5, 0), original))


def test_recipes_fit_the_runtime_and_the_network() -> None:
    with_linear = ds.capture(mlp(), digits()[0][:2])
    without = ds.capture(convolutional(), digits()[0][:2])  # 650 of its 19,466 weights are in a linear layer
    dynamic = "quantize(activations='dynamic')"
    assert dynamic in recipes_for("onnxruntime", with_linear)
    assert dynamic not in recipes_for("onnxruntime", without)
    assert dynamic not in recipes_for("openvino", with_linear)
    for runtime in ("onnxruntime", "openvino"):
        assert {"quantize()", "quantize(activations='none')"} <= set(recipes_for(runtime, without))
    assert [str(ds.Recipe.parse(text)) for text in recipes_for("onnxruntime", with_linear)] == recipes_for("onnxruntime", with_linear)


def test_networks_are_made_smaller_where_bits_alone_miss_a_limit_that_this_could_meet() -> None:
    size = Target(size="2 MB")
    assert shares_for(attempt("quantize()", size, 2.5, 0.5, 0)) == (0.7, 0.5)
    assert shares_for(attempt("quantize()", size, 4.5, 0.5, 0)) == (0.5, 0.35)
    assert shares_for(attempt("quantize()", size, 1.9, 0.5, 0)) == shares_for(attempt("quantize()", size, 20, 0.5, 0)) == ()
    assert shares_for(attempt("quantize()", Target(drop="1 %"), 2.5, 0.5, 0.1)) == ()  # a smaller network loses more
    network = ds.capture(mlp(), digits()[0][:2])
    made = smaller_for(network, "quantize()", 0.5)
    assert made == ["prune(macs=0.5) | quantize()", "factorize(macs=0.5) | quantize()"]
    assert [str(ds.Recipe.parse(text)) for text in made] == made
    assert smaller_for(network, "", 0.5) == ["prune(macs=0.5)", "factorize(macs=0.5)"]


def test_layers_stay_in_float_where_integers_are_fast_enough_and_lose_score() -> None:
    both = Target(latency="6 ms", latency_ratio=0.9)
    made = floats_for(attempt("quantize()", both, 2.5, 0.5, 0.02), both)
    assert made == ["quantize(widths=[8, 32], latency=5.82 ms)", "quantize(widths=[8, 32], latency=0.873)"]
    assert [str(ds.Recipe.parse(text)) for text in made] == made
    half = Target(latency_ratio=0.5)
    (made_of_half,) = floats_for(attempt("quantize()", half, 2.5, 0.3, 0.02), half)
    assert str(ds.Recipe.parse(made_of_half)) == made_of_half == "quantize(widths=[8, 32], latency=0.485)"
    assert not floats_for(attempt("quantize()", both, 2.5, 0.7, 0.02), both)  # 7 ms
    assert not floats_for(attempt("quantize()", both, 2.5, 0.5, 0.009), both)
    generous = Target(latency_ratio=0.9, drop="5 %")
    assert not floats_for(attempt("quantize()", generous, 2.5, 0.5, 0.02), generous)
    assert not floats_for(attempt("quantize(activations='none')", both, 2.5, 0.5, 0.02), both)
    assert not floats_for(attempt("quantize()", Target(size="3 MB"), 2.5, 0.5, 0.02), Target(size="3 MB"))


def test_fit_tries_layers_in_float_where_integers_lose_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That integers were fast enough and lost is only said; the file is made and measured, or the clock of this machine refused it."""
    asked = "quantize(widths=[8, 32], latency=0.95)"
    for name, value in {"is_lossless": False, "halves_for": [], "recipes_for": ["quantize()"], "floats_for": [asked]}.items():
        monkeypatch.setattr(planner, name, lambda *_, value=value: value)
    made = ds.fit(task_of(mlp()), Target(drop="50 %"), tmp_path / "run")
    (tried,) = [row for row in made.report.attempts if row.name == asked]
    assert "latency_ratio" in tried.measurements or tried.reason.startswith("failed: quantize: latency") or "not smaller" in tried.reason


# Refusing -------------------------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_a_size_below_an_empty_file_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    smallest = planner.smallest_file()
    (tmp_path / "empty.onnx").write_bytes(_one_node())
    assert smallest == (tmp_path / "empty.onnx").stat().st_size
    with pytest.raises(TargetError, match=f"an ONNX file with one node and no weights has {smallest} bytes"):
        ds.fit(task_of(mlp()), Target(size=f"{smallest - 1} B"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _one_node() -> bytes:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:])).SerializeToString()


def test_what_cannot_be_used_is_refused_before_any_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "latency", lambda *_, **__: pytest.fail("measured before the refusal"))
    with pytest.raises(SpecError, match="onnxruntme"):
        ds.fit(task_of(mlp()), Target(runtime="onnxruntme"), tmp_path / "a")
    with pytest.raises(SpecError, match="quantise"):
        ds.run(task_of(mlp()), "quantise()", Target(), tmp_path / "b")
    with pytest.raises(CaptureError, match=r"test_planner\.py"):
        ds.fit(task_of(Branching().eval()), Target(), tmp_path / "c")
    with pytest.raises(TaskError, match="training mode"):
        ds.fit(replace(task_of(mlp()), model=nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10)).train()), Target(), tmp_path / "d")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert not list(tmp_path.glob("*/model.onnx"))


def test_a_failing_export_is_refused_before_any_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "latency", lambda *_, **__: pytest.fail("measured before the refusal"))

    def refuse(*_: object) -> None:
        raise ExportError("no such operator")

    monkeypatch.setattr("downsize.network.onnx_file.write", refuse)
    with pytest.raises(ExportError, match="no such operator"):
        ds.fit(task_of(mlp()), Target(), tmp_path / "run")
    assert not (tmp_path / "run" / "model.onnx").exists()


# Working --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "TRIAL_SECONDS", 0.2)
    monkeypatch.setattr(planner, "FINAL_SECONDS", 0.2)


def accuracy(path: Path, images: torch.Tensor, classes: torch.Tensor) -> float:
    """The accuracy of a file, by a plain loop of our own."""
    session = ds.open(path)
    return float(np.mean(session(images.numpy()).argmax(1) == classes.numpy()))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_fit_makes_a_file_whose_numbers_are_true(tmp_path: Path) -> None:
    target = Target(size="60 kB", drop="3 %")
    result = ds.fit(task_of(mlp()), target, tmp_path / "run")
    path, images, classes = tmp_path / "run" / "model.onnx", digits()[0][1400:], digits()[1][1400:]
    assert result.artifact.path == path and result.verdict.met
    report = from_json(Report, (tmp_path / "run" / "report.json").read_text())
    assert report == result.report
    taken = report.attempts[-1]
    assert taken.name == "final" and taken.verdict == result.verdict
    assert [row.name for row in report.attempts[:-1] if row.taken] == [report.chosen]
    assert taken.measurements["size"].value == path.stat().st_size <= 60_000 < (tmp_path / "run" / "baseline.onnx").stat().st_size
    with torch.no_grad():
        original = float((mlp()(images).argmax(1) == classes).double().mean())
    assert taken.measurements["baseline_score"].value == pytest.approx(original)
    assert taken.measurements["score"].value == pytest.approx(accuracy(path, images, classes))
    assert taken.measurements["drop"].value == pytest.approx(original - accuracy(path, images, classes), abs=1e-9)
    assert all(m.sha256 == result.artifact.sha256 for name, m in taken.measurements.items() if name in ("size", "latency", "drop"))
    kinds = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    assert sum(1 for item in onnx.load(path).graph.initializer if item.data_type in kinds and len(item.dims) == 2) == 3
    assert all(row.reason for row in (report.baseline, *report.attempts))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_size_out_of_reach_is_told_and_the_nearest_file_is_left(tmp_path: Path) -> None:
    result = ds.fit(task_of(convolutional()), Target(size="2 kB"), tmp_path / "run")
    assert not result.verdict.met and result.verdict.binding == "size"
    assert "out of reach for this architecture" in str(result.verdict)
    sizes = [row.artifact.bytes for row in (result.report.baseline, *result.report.attempts) if row.artifact]
    assert result.artifact.bytes == min(sizes)
    assert accuracy(result.artifact.path, *(part[1400:] for part in digits())) > 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_size_that_bits_alone_miss_is_met_by_a_smaller_network(tmp_path: Path) -> None:
    weights = sum(parameter.numel() for parameter in mlp().parameters())
    limit = int(0.9 * weights)  # int8 takes a byte a weight, and the graph
    result = ds.fit(task_of(mlp()), Target(size=f"{limit} B"), tmp_path / "run")
    assert result.verdict.met and result.artifact.bytes <= limit
    assert result.report.chosen.startswith(("prune(macs=", "factorize(macs=")) and "quantize(" in result.report.chosen
    assert accuracy(result.artifact.path, *(part[1400:] for part in digits())) > 0.8


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_run_builds_the_users_recipe_whether_or_not_it_pays(tmp_path: Path) -> None:
    result = ds.run(task_of(mlp()), "quantize(activations='none')", Target(size="1 MB"), tmp_path / "run")
    assert result.report.chosen == "quantize(activations='none')"
    assert [row.name for row in result.report.attempts] == ["quantize(activations='none')", "final"]
    assert result.artifact.bytes < result.report.baseline.measurements["size"].value
    assert not any("not smaller" in text for text in result.verdict.warnings)
    same = ds.run(task_of(mlp()), "finetune(steps=1)", Target(), tmp_path / "same")  # no limit asks, so the verdict warns
    assert "not smaller" in same.verdict.warnings[0]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_interruption_leaves_the_best_file_and_its_report_and_the_next_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, built = Target(size="60 kB", drop="3 %"), []
    make = engine.Run.network

    def interrupted(self: engine.Run, parts: list[str], *rest: object, **more: object) -> engine.Stage:
        if "dynamic" in parts[1]:
            raise KeyboardInterrupt
        return make(self, parts, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.Run, "network", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ds.fit(task_of(mlp()), target, tmp_path / "run")
    report = from_json(Report, (tmp_path / "run" / "report.json").read_text())
    assert report.chosen == "quantize()" and "when the run was stopped" in report.attempts[0].reason
    assert (tmp_path / "run" / "model.onnx").read_bytes() == Path(report.attempts[0].artifact.path).read_bytes()  # type: ignore[union-attr]
    assert not (tmp_path / "run" / "lock").exists()
    files = {name: (tmp_path / "run" / name).read_bytes() for name in ("model.onnx", "report.json")}

    def at_once(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.Bench, "judge", at_once)  # stopped again, earlier than the first time: nothing may be lost
    with pytest.raises(KeyboardInterrupt):
        ds.fit(task_of(mlp()), target, tmp_path / "run")
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files} == files
    monkeypatch.undo()

    from downsize.techniques import TECHNIQUES

    call = TECHNIQUES["quantize"].__call__
    monkeypatch.setattr(TECHNIQUES["quantize"], "__call__", lambda self, *rest: built.append((self.activations, self.keep)) or call(self, *rest))
    monkeypatch.setattr(planner, "TRIAL_SECONDS", 0.2)
    monkeypatch.setattr(planner, "FINAL_SECONDS", 0.2)
    result = ds.fit(task_of(mlp()), target, tmp_path / "run")
    assert len(result.report.attempts) >= 4 and ("static", ()) not in built and ("dynamic", ()) in built


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_recipe_that_fails_is_a_finding_and_a_full_disk_an_end_that_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from downsize.techniques import TECHNIQUES

    call = TECHNIQUES["quantize"].__call__

    def failing(self: Any, *rest: Any) -> Any:
        if self.activations == "static":
            raise ExportError("this graph cannot be said")
        if self.activations == "none":
            raise OSError(28, "No space left on device")
        return call(self, *rest)

    monkeypatch.setattr(TECHNIQUES["quantize"], "__call__", failing)
    with pytest.raises(RunError, match="is full"):
        ds.fit(task_of(mlp()), Target(size="60 kB"), tmp_path / "run")
    report = from_json(Report, (tmp_path / "run" / "report.json").read_text())
    assert report.attempts[0].reason == "failed: this graph cannot be said" and report.attempts[0].artifact is None
    assert report.chosen == "quantize(activations='dynamic')"
    assert accuracy(tmp_path / "run" / "model.onnx", *(part[1400:] for part in digits())) > 0.9
    assert not list((tmp_path / "run" / "steps").glob(".tmp-*"))


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    sys.path.insert(0, sys.argv[3])
    import digits_task
    import downsize as ds
    from downsize import planner
    from downsize.network.network import Network

    planner.TRIAL_SECONDS = planner.FINAL_SECONDS = 0.1
    kill_at, save, count = int(sys.argv[2]), Network.save, 0

    def save_or_die(self, path):
        global count
        count += 1
        save(self, path)
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Network.save = save_or_die
    ds.run(digits_task.task(), "quantize()", ds.Target(size="60 kB"), sys.argv[1])
    """
)


def steps(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("report.json", "lock")}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_run_killed_inside_a_step_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    def start(folder: Path, kill_at: int) -> int:
        command = [sys.executable, "-c", KILLED, str(folder), str(kill_at), str(Path(__file__).parent)]
        return subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"}).returncode

    assert start(tmp_path / "whole", 0) == 0
    for kill_at in (2,):  # while the quantized network is written
        assert start(tmp_path / "killed", kill_at) == -signal.SIGKILL
        assert list((tmp_path / "killed" / "steps").glob(".tmp-*/network.safetensors"))
    assert start(tmp_path / "killed", 0) == 0
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole")
    assert json.loads((tmp_path / "killed" / "report.json").read_text())["chosen"] == "quantize()"
