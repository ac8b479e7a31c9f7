"""What the user brings: a trained model, data, and a score."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DownsizeError, TaskError, nearest
from .inputs import describe, named, refuse_not_finite, refuse_unlike, same, tensors_like
from .numerics.agreement import as_array, count_not_finite
from .scores import Score, evaluate
from .structure import CONSTANTS, as_call, flatten, is_named, looks_like_tensor, unflatten

if TYPE_CHECKING:
    import torch

ROLES = ("calibrate", "train", "validate", "test")
CALIBRATION_LOOK = 32  # how many calibration batches check() looks at
LOOK = 2  # how many batches of the other roles it looks at
FEW_SAMPLES = 8
SAME = 1e-5  # relative difference that two runs of one model on one input may have (threads sum in another order)


@dataclass(frozen=True, eq=False)
class Task:
    """A trained model, an example of its inputs, its data, and what counts as good.

    Attributes:
        model: a torch module in evaluation mode, on the CPU.
        example: inputs it can be called with: a tensor, a tuple (positions) or a dict (keywords), each with a batch dimension first.
        data: by role, a function that returns a fresh iterable of batches. A batch is ``(inputs, targets)``; inputs look like ``example``
            (other sizes, same types and ranks), targets may be None. "calibrate" is required. "validate" is for choices (else
            "calibrate"), "test" for the verdict (else "validate", else "calibrate"), "train" for techniques that train.
        score: ``(predict, batches) -> float``, higher is better. Roles whose targets are None, and tasks without a score, are judged by
            fidelity: the mean cosine between a model's outputs and the original's.
        name: for reports.
        loss: ``(outputs, targets) -> scalar``, lower is better, differentiable, for techniques that train on targets; outputs come in the model's
            own structure (a ModelOutput as a dict). Without one: cross-entropy, if the score is top1 or top5.
        models: further models by name, such as a student or another teacher for ``distill``; they take and give what ``model`` does.
        checkpoints: a folder where training keeps its state, so that a call that was stopped can go on; ``fit`` and ``run`` set one.
        progress: what training tells as it goes (:class:`~downsize.progress.Progress`); ``fit`` and ``run`` set theirs.
        clock: for techniques that choose by latency, what knows how long layers take (``pruning.latency.Clock``); ``fit`` and ``run`` set it to
            measurements in the target's runtime.

    Raises:
        TaskError: one of them is of a wrong kind. :meth:`check` looks deeper.
    """

    model: torch.nn.Module
    example: Any
    data: Mapping[str, Callable[[], Iterable[Any]]]
    score: Score | None = None
    name: str = "task"
    loss: Callable[[Any, Any], Any] | None = None
    models: Mapping[str, torch.nn.Module] = field(default_factory=dict)
    clock: Any = None
    checkpoints: str | os.PathLike[str] | None = None
    progress: Any = None

    def __post_init__(self) -> None:
        import torch

        if not isinstance(self.model, torch.nn.Module):
            raise TaskError(f"model is a {type(self.model).__name__}; expected a torch.nn.Module with its trained weights.")
        if not isinstance(self.data, Mapping):
            raise TaskError(f'data is a {type(self.data).__name__}; expected a dict such as {{"calibrate": lambda: loader}}.')
        for role, entry in self.data.items():
            if role not in ROLES:
                raise TaskError(f"data has {role!r}, which is no role; {nearest(str(role), ROLES)}")
            if not callable(entry):
                raise TaskError(f"data[{role!r}] is a {type(entry).__name__}; expected a function that returns it: lambda: loader.")
        if "calibrate" not in self.data:
            raise TaskError(f'data has the roles {sorted(self.data)}; "calibrate" is required: some batches like those of real use.')
        for name, model in self.models.items():
            if not isinstance(model, torch.nn.Module):
                raise TaskError(f"models[{name!r}] is a {type(model).__name__}; expected a torch.nn.Module.")
        if self.loss is not None and not callable(self.loss):
            raise TaskError(f"loss is a {type(self.loss).__name__}; expected a function (outputs, targets) -> scalar tensor, or None.")
        if self.score is not None and not callable(self.score):
            raise TaskError(f"score is a {type(self.score).__name__}; expected a function (predict, batches) -> float, or None.")

    @property
    def choice_role(self) -> str:
        """The role whose data decides between variants."""
        return "validate" if "validate" in self.data else "calibrate"

    @property
    def verdict_role(self) -> str:
        """The role whose data gives the final numbers."""
        return "test" if "test" in self.data else self.choice_role

    def predict(self, inputs: Any) -> Any:
        """The original model's outputs, without gradients: torch tensors for torch inputs, numpy arrays for numpy inputs.

        Mappings (such as the outputs of Hugging Face models) become dicts without their None entries.

        Raises:
            TaskError: the model is in training mode, cannot run on these inputs, or gives something else than tensors.
        """
        import torch

        if self.model.training:
            raise TaskError("the model is in training mode; expected evaluation mode: call model.eval() before you make the task.")
        refuse_unlike(inputs, inputs, "the model's input")
        leaves, structure = flatten(list(as_call(inputs)))
        given = [leaf if isinstance(leaf, torch.Tensor) else torch.from_numpy(np.require(leaf, requirements=["C", "W"])) for leaf in leaves]
        args, kwargs = unflatten(structure, given)
        try:
            with torch.no_grad():
                outputs = plain(self.model(*args, **kwargs))
        except DownsizeError:
            raise
        except Exception as error:
            raise TaskError(f"the model cannot run on {describe(inputs)}: {type(error).__name__}: {error}") from error
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return outputs
        answers, structure = flatten(outputs)
        return unflatten(structure, [as_array(answer) for answer in answers])

    def batches(self, role: str) -> Iterator[tuple[Any, Any]]:
        """The batches ``(inputs, targets)`` of a role, one at a time, each checked against the example.

        Raises:
            TaskError: there is no such role (at once), or while iterating: no batches, a batch that is no pair, inputs of another
                structure, type or rank than the example's, NaN or infinity in them, or an error in the user's data.
        """
        if role not in self.data:
            raise TaskError(f"the task has no data for {role!r}; {nearest(role, self.data)}")
        return self._checked_batches(role)

    def _checked_batches(self, role: str) -> Iterator[tuple[Any, Any]]:
        number = 0
        for number, batch in enumerate(_raw_batches(self.data[role], role), start=1):
            where = f"batch {number} of data[{role!r}]"
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TaskError(f"{where} is {_batch_kind(batch)}; expected a pair (inputs, targets), targets may be None.")
            refuse_unlike(self.example, batch[0], where)
            refuse_not_finite(batch[0], where)
            yield batch[0], batch[1]
        if not number:
            raise TaskError(
                f"data[{role!r}] is empty; expected batches (inputs, targets). If it was not empty at first, it reads from an iterator "
                "that is used up: make the iterable inside the function, so that each call gives a fresh one."
            )

    def variations(self) -> list[Any]:
        """Inputs from the data that, beside the example, show which dimensions vary: one for each new dimension seen to differ."""
        first = [leaf.shape for leaf in tensors_like(self.example, self.example)]
        seen: set[tuple[int, int]] = set()
        found = []
        for role in self.data:
            for inputs, _ in islice(self.batches(role), CALIBRATION_LOOK // 4 if role == "calibrate" else 1):
                shapes = [leaf.shape for leaf in tensors_like(self.example, inputs)]
                differ = {(i, d) for i, (one, other) in enumerate(zip(first, shapes, strict=True)) for d in range(len(one)) if one[d] != other[d]}
                if differ - seen:
                    seen |= differ
                    found.append(inputs)
        return found

    def check(self) -> tuple[str, ...]:
        """Refuse early what cannot work, looking at a bounded number of batches; returns remarks for the user.

        Raises:
            TaskError: training mode; NaN or infinity in weights or data; the model does not run on the example, or gives other outputs
                when run again; data that is empty, not fresh at each call or unlike the example; a score that fails or gives NaN.
        """
        _check_model(self.model)
        _check_example(self)
        labelled = {}
        remarks: list[str] = []
        for role in self.data:
            labelled[role], found = _check_role(self, role)
            remarks += found
        _check_score(self, labelled)
        return tuple(remarks)


def plain(outputs: Any) -> Any:
    """A model's outputs as tensors in tuples, lists and dicts; mappings become dicts without their None entries.

    Raises:
        TaskError: something else is among them, or no tensor is.
    """

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Mapping):
            return {str(key): visit(value, f"{path}[{key!r}]") for key, value in node.items() if value is not None}
        if isinstance(node, (tuple, list)):
            items = [visit(item, f"{path}[{i}]") for i, item in enumerate(node)]
            return items if isinstance(node, list) else type(node)(*items) if is_named(node) else tuple(items)
        if looks_like_tensor(node) or isinstance(node, CONSTANTS):
            return node
        raise TaskError(
            f"the model's {path} is a {type(node).__name__}; expected tensors in tuples, lists and dicts: wrap the model in a module that "
            "returns those (a Hugging Face cache: config.use_cache = False)."
        )

    result = visit(outputs, "output")
    if not flatten(result)[0]:
        raise TaskError(f"the model gives {outputs!r}; expected at least one tensor.")
    return result


def load_task(path: str | Path) -> Task:
    """The task that a Python file defines under the name ``task``: a :class:`Task`, or a function without arguments that returns one.

    The file's folder is added to the end of the import path, so that it can import its neighbours.

    Raises:
        TaskError: there is no such file, running it fails (the message has the line), or it defines no task.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise TaskError(f"{str(path)!r} is no Python file; expected one that defines `task`.")
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    name = f"downsize_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # always so for an existing .py file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, "task", None)
        made = made() if callable(made) else made
    except DownsizeError:
        raise
    except Exception as error:
        raise TaskError(f"{path}{_line_in(path, error)} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, Task):
        raise TaskError(f"{path} defines task = {made!r}; expected a downsize.Task, or a function without arguments that returns one.")
    return made


def _line_in(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f", line {error.lineno},"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path.resolve()]
    return f", line {lines[-1]}," if lines else ""


def _opened(entry: Callable[[], Iterable[Any]], role: str) -> Iterable[Any]:
    try:
        batches = entry()
    except DownsizeError:
        raise
    except Exception as error:
        raise TaskError(f"data[{role!r}]() raised {type(error).__name__}: {error}") from error
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TaskError(f"data[{role!r}]() gives a {type(batches).__name__}; expected an iterable of batches (inputs, targets).")
    return batches


def _raw_batches(entry: Callable[[], Iterable[Any]], role: str) -> Iterator[Any]:
    """The user's batches; errors of the user's code become TaskErrors that say where."""
    batches, number = _opened(entry, role), 0
    try:
        for number, batch in enumerate(batches, start=1):  # noqa: B007 (told in the error below)
            yield batch
    except DownsizeError:
        raise
    except Exception as error:
        raise TaskError(f"data[{role!r}] raised {type(error).__name__} after {number} batches: {error}") from error


def _batch_kind(batch: Any) -> str:
    many = f" of {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) else ""
    return f"a {type(batch).__name__}{many}"


def _check_model(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training:
            part = f"its part {name!r}" if name else "the model"
            raise TaskError(f"{part} ({type(module).__name__}) is in training mode; expected evaluation mode: call model.eval() first.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise TaskError(f"the weight {name!r} is on {tensor.device}; expected the CPU: call model.cpu() first.")
        if bad := count_not_finite(tensor):
            raise TaskError(f"the weight {name!r} has {bad} of {tensor.numel()} values that are NaN or infinite: load a sound checkpoint.")


def _check_example(task: Task) -> None:
    refuse_unlike(task.example, task.example, "the example")
    if not any(looks_like_tensor(leaf) for leaf in named(task.example).values()):
        raise TaskError(f"the example is {task.example!r}; expected the model's inputs: a tensor, a tuple or a dict of tensors.")
    refuse_not_finite(task.example, "the example")
    first, second = (flatten(task.predict(task.example))[0] for _ in range(2))
    for number, (one, other) in enumerate(zip(map(as_array, first), map(as_array, second), strict=True)):
        if bad := count_not_finite(one):
            raise TaskError(f"the model's output {number} for the example has {bad} values that are NaN or infinite; expected finite numbers.")
        scale = float(np.abs(one.astype(np.float64)).max(initial=0.0))
        gap = float(np.abs(one.astype(np.float64) - other).max(initial=0.0)) if one.shape == other.shape else float("inf")
        if gap > SAME * scale:
            raise TaskError(
                f"two runs of the model on the example differ by {gap:.3g} in output {number}; expected the same outputs: it draws random "
                "numbers or keeps state also in evaluation mode (dropout called with training=True?)."
            )


def _check_role(task: Task, role: str) -> tuple[bool, list[str]]:
    """Whether the role has targets, and remarks."""
    one = _opened(task.data[role], role)
    if isinstance(one, Iterator) and one is _opened(task.data[role], role):
        raise TaskError(f"data[{role!r}] returns the same iterator at each call; expected a fresh iterable: make it inside the function.")
    targets, samples, more, first = set(), 0, False, None
    look = CALIBRATION_LOOK if role == "calibrate" else LOOK
    for number, (inputs, target) in enumerate(task.batches(role)):
        if number == look:
            more = True
            break
        first = inputs if number == 0 else first
        targets.add(target is not None)
        samples += next(leaf.shape[0] if leaf.shape else 1 for leaf in tensors_like(task.example, inputs))
    if len(targets) == 2:
        raise TaskError(f"data[{role!r}] has batches with and without targets; expected one kind only.")
    task.predict(first)
    again, _ = next(task.batches(role))
    remarks = []
    if role != "train" and not same(first, again):
        remarks.append(f"data[{role!r}] gives other batches at each call: fix the order and the random seed, or results cannot be repeated.")
    if role == "calibrate" and not more and samples < FEW_SAMPLES:
        remarks.append(f"data['calibrate'] has {samples} samples; ranges from fewer than {FEW_SAMPLES} are unsure: give 100 or more.")
    return targets.pop(), remarks


def _check_score(task: Task, labelled: Mapping[str, bool]) -> None:
    if task.score is None:
        return
    if not any(labelled.values()):
        raise TaskError(
            "a score was given, but all targets are None, so it would never be used: give the truth as targets (they may be the inputs "
            "again), or leave the score out to be judged by fidelity to the original model."
        )
    for role in sorted({task.choice_role, task.verdict_role}):
        if not labelled[role]:
            continue
        what = f"the original model on data[{role!r}]"
        try:
            evaluate(task.score, task.predict, islice(task.batches(role), LOOK), what)
        except TaskError:  # some scores need more than a few samples, such as both classes: then all of them decide
            evaluate(task.score, task.predict, task.batches(role), what)
