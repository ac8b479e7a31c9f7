"""From a task and a target to a file and a verdict: build the recipes that fit, measure the files, keep the best."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .bench import Bench, digest_of_model, tensor_bytes
from .candidates import best_of, explained, floats_for, halves_for, is_lossless, needs_speed, recipes_for, shares_for, smaller_for, why_not_worth_it
from .engine import Run
from .errors import DownsizeError, RunError, TargetError
from .facts import Artifact, Attempt, Measurement, Report, Verdict, from_json, made_by, to_json, worse
from .measure import host
from .progress import Progress
from .recipe import Recipe
from .runtimes import require
from .slower import slower_layers
from .spec import fields_of
from .target import Target, show
from .task import Task

ORIGINAL, FINAL = "original", "final"
REPORT = "report.json"
TRIAL_SECONDS = 3.0
FINAL_SECONDS = 6.0


@dataclass(frozen=True)
class Result:
    """What a run gives: the verdict, the file, and everything that was tried."""

    verdict: Verdict
    artifact: Artifact
    report: Report


def fit(task: Task, target: Target, into: str | os.PathLike[str], progress: Progress | None = None) -> Result:
    """Make a file of ``task`` that meets the limits of ``target``, or the one that comes nearest, in the folder ``into``.

    The original model itself is a candidate. Files are chosen by the "validate" data (else "calibrate"); the chosen one is judged once by
    the "test" data. The best file so far is always at ``into/model.onnx``; after an interruption the same call goes on from the last
    finished step.

    Raises:
        TaskError, CaptureError, ExportError, RuntimeMissing, TargetError, RunError: before any long work.
    """
    return _run(task, target, into, None, progress or Progress(quiet=True))


def run(task: Task, recipe: Recipe | str, target: Target, into: str | os.PathLike[str], progress: Progress | None = None) -> Result:
    """Build the file of one ``recipe`` and judge it by ``target``, whether or not it pays; see :func:`fit`.

    Raises:
        SpecError: the recipe names something that does not exist. Else as :func:`fit`.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    return _run(task, target, into, recipe, progress or Progress(quiet=True))


def _run(task: Task, target: Target, into: str | os.PathLike[str], recipe: Recipe | None, progress: Progress) -> Result:
    refuse_impossible(target)
    runtime = require(target.runtime)
    identity = {"task": task.name, "model": digest_of_model(task.model), "target": fields_of(target)}
    with Run(into, identity, progress.say) as run:
        search = Search(Bench.set_up(task, target, runtime, run, progress), recipe)
        try:
            search.look()
            return search.finish()
        except BaseException:
            # Interrupted, or a full disk: what was found stays, with its report if that can still be written.
            with contextlib.suppress(RunError):
                search.leave()
            raise


class Search:
    """The attempts of one run; the file of the best one is always in the run folder.

    Args:
        bench: the original model, ready.
        only: the user's own recipe; None tries those that fit the target.
    """

    def __init__(self, bench: Bench, only: Recipe | None) -> None:
        self.bench, self.only = bench, only
        self.limits = bench.target.limits()
        self.notes: dict[str, str] = {}
        self.file = f"model{bench.runtime.suffix}"
        artifact = Artifact.of(bench.baseline, bench.runtime.name)
        self.attempts = [Attempt(ORIGINAL, "", artifact, bench.weigh(bench.baseline), None, None, False, "")]
        self.earlier, self.kept = self._names_of_earlier(), ""
        self._keep()
        bench.run.keep(bench.baseline, f"baseline{bench.runtime.suffix}")
        self.floor = floor_note(bench, self.attempts[0].measurements["size"])

    def look(self) -> None:
        """Measure the original, then build and measure every recipe."""
        if self.floor:
            self.bench.progress.say(f"note: {self.floor}")
        self.attempts[0] = self._measured(self.attempts[0])
        if self.only is not None:
            self._add(self._measured(self._built(self.only)))
            return
        for text in recipes_for(self.bench.runtime.name, self.bench.original.network, host().features):
            self._add(self._try(Recipe.parse(text)))
        self._keep_slow_layers(self.attempts[1])
        for texts in (halves_for(self.bench.runtime.precisions()), floats_for(self.attempts[1], self.bench.target)):
            best = self._chosen()
            if best is self.attempts[0] or not is_lossless(best):
                for text in texts:
                    self._add(self._try(Recipe.parse(text)))
        self._look_for_smaller()

    def _look_for_smaller(self) -> None:
        """Where no file meets the limits of size, time and memory, try those with fewer multiply-accumulates, until one does."""
        nearest = self._chosen()
        shares = shares_for(nearest)
        for share in shares:
            for text in smaller_for(self.bench.original.network, nearest.recipe, share):
                self._add(self._try(Recipe.parse(text)))
            if not shares_for(self._chosen()):
                return

    def _keep_slow_layers(self, attempt: Attempt) -> None:
        """Try an int8 recipe once more with the layers in float that are slower in integers here, and note by how much."""
        if attempt.artifact is None or attempt.verdict is None:
            return
        bench, names = self.bench, {name for name, _ in self.bench.original.network.named_tensors()}
        with bench.progress.doing("profiling the layers in integers and in float"):
            where = bench.inputs, bench.runtime.name, bench.target.threads
            try:
                slow = slower_layers(bench.baseline, attempt.artifact.path, names, *where)
            except DownsizeError as error:  # the files are measured already; only a further trial is lost
                bench.progress.say(f"note: no profile of the layers: {error}")
                return
        if slow:
            (step,) = Recipe.parse(attempt.recipe).steps
            recipe = Recipe((replace(step, keep=tuple(name for one in slow for name in one.weights)),))  # type: ignore[type-var]
            self.notes[str(recipe)] = "kept in float: " + ", ".join(map(str, slow))
            bench.progress.say(self.notes[str(recipe)])
            self._add(self._try(recipe))

    def finish(self) -> Result:
        """Measure the chosen file once more, on the data for the verdict, and write the report; that attempt is its last."""
        chosen, task = self._chosen(), self.bench.task
        self.earlier = set()
        self._keep()
        path = self.bench.run.folder / self.file
        self.bench.progress.say(f"chosen: {chosen.name}; measuring it for the verdict")
        found, agreement = {**chosen.measurements, **self.bench.time(path, FINAL_SECONDS)}, chosen.agreement
        if task.verdict_role != task.choice_role:
            scores, agreement = self.bench.judge(path, task.verdict_role)
            found |= scores
        artifact, verdict = Artifact.of(path, self.bench.runtime.name), self._warned(self._verdict(found), chosen, found)
        reason = f"{chosen.name} measured again, its score on the data for {task.verdict_role!r}"
        final = Attempt(FINAL, chosen.recipe, artifact, found, agreement, verdict, True, reason)
        report = self._report([*self._explained(chosen), final], chosen, verdict)
        return Result(verdict, artifact, report)

    def leave(self) -> None:
        """Write the report of what there is when a run ends before its end; an earlier call that came further keeps its own."""
        if not self._overtaken():
            return
        chosen = self._chosen()
        rows = [replace(row, reason=f"the best when the run was stopped; {row.reason}") if row.taken else row for row in self._explained(chosen)]
        self._report(rows, chosen, self._warned(chosen.verdict or self._verdict(chosen.measurements), chosen, chosen.measurements))

    def _try(self, recipe: Recipe) -> Attempt:
        """One of our own recipes: that it cannot be built or run here is a finding, not the end."""
        try:
            built = self._built(recipe)
            if why_not_worth_it(built, self.attempts[0]) and not needs_speed(self.bench.target):
                return built
            return self._measured(built)
        except RunError:
            raise
        except DownsizeError as error:
            return Attempt(str(recipe), str(recipe), None, {}, None, None, False, f"failed: {error}")

    def _built(self, recipe: Recipe) -> Attempt:
        path = self.bench.build(recipe)
        artifact = Artifact.of(path, self.bench.runtime.name)
        return Attempt(str(recipe), str(recipe), artifact, self.bench.weigh(path), None, None, False, "")

    def _measured(self, attempt: Attempt) -> Attempt:
        assert attempt.artifact is not None
        path = attempt.artifact.path
        scores, agreement = self.bench.judge(path, self.bench.task.choice_role)
        found = {**attempt.measurements, **self.bench.time(path, TRIAL_SECONDS), **scores}
        return replace(attempt, measurements=found, agreement=agreement, verdict=self._verdict(found))

    def _verdict(self, found: dict[str, Measurement]) -> Verdict:
        verdict = Verdict.judge(self.limits, found)
        missed = {outcome.limit.name for outcome in verdict.outcomes if not outcome.met}
        return replace(verdict, relaxation=f"{verdict.relaxation} {self.floor}") if self.floor and "size" in missed else verdict

    def _warned(self, verdict: Verdict, chosen: Attempt, found: dict[str, Measurement]) -> Verdict:
        """With what is worse than the original without a limit having asked; the original itself is not."""
        original = self.attempts[0]
        return verdict if chosen is original else replace(verdict, warnings=worse(found, original.measurements, self.limits))

    def _add(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        self.bench.progress.say(f"{attempt.name}: {summary(attempt)}")
        self._keep()

    def _chosen(self) -> Attempt:
        return self.attempts[-1] if self.only is not None else best_of(self.attempts, self.bench.target)

    def _explained(self, chosen: Attempt) -> list[Attempt]:
        if self.only is None:
            rows = explained(self.attempts, chosen, self.bench.target)
            return [replace(row, reason=f"{row.reason}; {self.notes[row.name]}") if row.name in self.notes else row for row in rows]
        return [
            replace(row, taken=row is chosen, reason="the recipe that was asked for" if row is chosen else "for comparison") for row in self.attempts
        ]

    def _names_of_earlier(self) -> set[str]:
        """The recipes that an earlier call had tried when it ended; its file and report stay until all of them are measured again."""
        if self.only is not None or not (self.bench.run.folder / self.file).exists():
            return set()
        try:
            report = from_json(Report, (self.bench.run.folder / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError, RunError):
            return set()
        return {attempt.name for attempt in report.attempts} - {FINAL}

    def _overtaken(self) -> bool:
        return self.earlier <= {attempt.name for attempt in self.attempts}

    def _keep(self) -> None:
        """Put the best file so far into its place."""
        best = self._chosen().artifact
        if best is not None and best.sha256 != self.kept and self._overtaken():
            self.bench.run.keep(best.path, self.file)
            self.kept = best.sha256

    def _report(self, rows: Sequence[Attempt], chosen: Attempt, verdict: Verdict) -> Report:
        report = Report(self.bench.task.name, self.bench.target, rows[0], tuple(rows[1:]), chosen.name, verdict, made_by())
        self.bench.run.write(REPORT, to_json(report) + "\n")
        return report


def summary(attempt: Attempt) -> str:
    """The numbers of an attempt on one line, or why there are none."""
    shown = [attempt.measurements[name] for name in ("size", "latency", "latency_ratio", "memory", "drop") if name in attempt.measurements]
    return "; ".join(map(str, shown)) or attempt.reason


def refuse_impossible(target: Target) -> None:
    """Refuse a size that no model file can have, however small the model.

    Raises:
        TargetError: the limit is below the size of an ONNX file with one node and no weights.
    """
    smallest = smallest_file()
    if target.size is not None and target.size < smallest:
        raise TargetError(
            f"size={show(target.size, 'bytes')} cannot be met: an ONNX file with one node and no weights has {smallest} bytes already. "
            "Raise the limit."
        )


def smallest_file() -> int:
    """The bytes of an ONNX file with one node and no weights."""
    from onnx import TensorProto, helper

    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    return helper.make_model(helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ports[:1], ports[1:])).ByteSize()


def floor_note(bench: Bench, size: Measurement) -> str | None:
    """Why a size limit is out of reach for any encoding of this model's weights, None when it is not."""
    limit = bench.target.size
    if limit is None:
        return None
    weights = tensor_bytes(bench.original.network)
    graph = max(int(size.value) - weights, 0)
    bit = graph + weights // 32
    if limit >= bit:
        return None
    what = (
        f"the graph without any weight takes about {show(graph, 'bytes')}"
        if limit < graph
        else f"1 bit for each weight takes about {show(bit, 'bytes')}"
    )
    return f"The size limit of {show(limit, 'bytes')} is out of reach for this architecture: {what}; fewer layers or a smaller model are needed."
