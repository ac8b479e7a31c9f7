"""The one training loop: everything that trains a network is an objective and hooks of it."""

from __future__ import annotations

import contextlib
import fnmatch
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError, TrainingError, nearest
from ..inputs import describe
from ..network.network import TRAINING_FLAGS, Network
from ..network.rewrite import aten
from ..network.statistics import Pieces
from ..progress import Progress
from ..pruning.renormalise import reestimate_batch_norms
from ..task import Task
from .checkpoint import Checkpoints, key_of
from .devices import Devices, move
from .hook import Hook, Learner
from .interrupt import Interrupt
from .keeping import Average, put, snapshot, with_tensors
from .objective import Batch, Objective
from .optimizer import optimizer_of, rate_at, set_rate, set_state, state_of
from .precision import faster_in_bfloat16
from .stream import Stream, seed_of
from .validation import Validation

RENORMALISING = 512  # samples that batch norms are measured again on


@dataclass(frozen=True)
class Settings:
    """A plan as the loop takes it; see :class:`~downsize.training.plan.Training`. ``share``: from which part of the steps to which."""

    epochs: float | None
    steps: int | None
    rate: float
    schedule: str
    warmup: float
    optimizer: str
    decay: float
    clip: float | None
    precision: str
    average: float | None
    norms: str
    renormalise: bool
    freeze: tuple[str, ...]
    every: int | None
    seed: int
    minutes: float
    share: tuple[float, float]


@dataclass
class Best:
    """The state that validation likes best so far: its tensors, score, and behind which step it was."""

    tensors: dict[str, Tensor]
    score: float | None = None
    step: int = 0


def train(network: Network, task: Task, objective: Objective, hooks: Sequence[Hook], settings: Settings) -> Network:
    """The network trained as the settings say, in evaluation mode; the one given is left as it was. See :class:`~downsize.training.plan.Training`."""
    made = network.copy()
    frozen = frozen_names(made, settings.freeze)
    run = _Run(made, task, objective, hooks, settings, frozen)
    with torch.random.fork_rng(devices=[]), Interrupt() as interrupt:
        result = run.through(interrupt)
    for name, tensor in result.named_tensors():
        if name in frozen:
            tensor.requires_grad_(True)
    return result


def frozen_names(network: Network, patterns: Sequence[str]) -> set[str]:
    """Turn off training of the parameters whose names match a pattern, in place. Returns those it was turned off for.

    Raises:
        TaskError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
    frozen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise TaskError(f"freeze={pattern!r} matches none of the tensors that can be trained; {nearest(pattern, names)}")
        frozen.update(found)
    for name in frozen:
        network.tensor(name).requires_grad_(False)
    if not any(True for _ in network.parameters()):
        raise TaskError("the network has no tensor that can be trained: all are frozen (requires_grad=False).")
    return frozen


@dataclass
class _Run:
    """One training: what it is made of, and where it stands."""

    network: Network
    task: Task
    objective: Objective
    hooks: Sequence[Hook]
    settings: Settings
    frozen: set[str]
    devices: Devices = field(default_factory=Devices.found)

    def __post_init__(self) -> None:
        settings, task = self.settings, self.task
        role = "train" if "train" in task.data else "calibrate"
        self.stream = Stream(lambda: _Batches(task, role), seed_of(settings.seed, settings.share[0]))
        self.key = key_of(self.network, settings, role, type(self.objective).__qualname__, [type(hook).__qualname__ for hook in self.hooks])
        move(self.network, self.devices.device)
        self.objective.to(self.devices.device)
        self.validation = Validation(task)
        self.epoch = self.stream.length() if settings.epochs is not None or settings.every is None else 0
        self.all = settings.steps if settings.steps is not None else max(1, round((settings.epochs or 0) * self.epoch))
        self.first, last = (round(part * self.all) for part in settings.share)
        _to_training(self.network, settings.norms)
        self.tapped = _with_taps(self.network, self.objective.taps)
        parameters = {name: tensor for name, tensor in self.network.named_tensors() if isinstance(tensor, nn.Parameter) and tensor.requires_grad}
        self.learner = Learner(self.network, _each_once(parameters), last - self.first)
        for hook in self.hooks:
            hook.begin(self.learner)
        factors = {name: factor for hook in self.hooks for name, factor in hook.rates(self.learner).items()}
        others = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self.optimizer = optimizer_of(settings.optimizer, self.learner.parameters, others, settings.decay, factors)
        self.trained = [*self.learner.parameters.values(), *others]
        self.masks = [(self.network.tensor(name), mask) for name, mask in self.network.masks().items()]
        self.average = None if settings.average is None else Average(self.network, settings.average)
        self.checkpoints = Checkpoints(task.checkpoints, self.key)
        self.progress: Progress = task.progress or Progress(quiet=True)
        self.bfloat16 = settings.precision == "bfloat16"
        self.before: float | None = None

    # The run ---------------------------------------------------------------------------------------------------------------------

    def through(self, interrupt: Interrupt) -> Network:
        """All steps from where it stands."""
        found = self.checkpoints.load()
        if found is None:
            self.best = Best(snapshot(self.network))
            self._decide_precision()
            self.before = self._validate(start=True)
        else:
            self._restore(*found)
        saved = time.monotonic()
        with self.progress.training(self.learner.steps) as show:
            while self.learner.step < self.learner.steps:
                loss = self._step()
                if self._is_time_to_validate():
                    self._validate()
                show(self.learner.step, loss, self.best.score, self.learner.rate)
                stop = self.devices.any(interrupt.asked)
                if stop or time.monotonic() - saved > 60 * self.settings.minutes:
                    self._save()
                    saved = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
        return self._result()

    def _is_time_to_validate(self) -> bool:
        every = self.settings.every or max(1, self.epoch)
        return self.learner.step == self.learner.steps or self.learner.step % every == 0

    def _step(self) -> float:
        """One step of the optimizer. Returns the loss.

        Raises:
            TrainingError: loss or gradients are not finite; weights are then those before the step.
        """
        learner, settings = self.learner, self.settings
        place = self.stream.epoch, self.stream.number
        inputs, targets = self._next_batch()
        inputs, targets, weight = self.devices.part(inputs, targets)
        torch.manual_seed(seed_of(settings.seed, "step", self.first + learner.step, self.devices.rank))
        learner.rate = rate_at(self.first + learner.step, self.all, settings.rate, settings.schedule, settings.warmup)
        for hook in self.hooks:
            hook.before(learner)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(Batch(inputs, targets, self.devices.to(self.network.flat(inputs))))
        value = float(loss.detach())
        (loss * weight).backward()
        self._refuse_not_finite(value, place, inputs)
        for hook in self.hooks:
            hook.gradients(learner)
        self._ready_gradients(value, place, inputs)
        set_rate(self.optimizer, learner.rate)
        self.optimizer.step()
        learner.step += 1
        self._keep_zeros()
        for hook in self.hooks:
            hook.after(learner)
        if self.average is not None:
            self.average.update(self.network, self.first + learner.step)
        return value

    def _next_batch(self) -> tuple[Any, Any]:
        """The next batch that batch norms in training can take: a single sample has no variance."""
        for _ in range(max(2, self.epoch + 1)):
            inputs, targets = self.stream.next()
            alone = self.network.ports[0].dims[:1] == ("batch",) and self.network.flat(inputs)[0].shape[0] == 1
            if not alone or not _has_training_norms(self.network):
                return inputs, targets
        raise TaskError('all batches of data["train"] have one sample, which batch norms cannot train on: give larger ones, or norms="freeze".')

    def _loss(self, batch: Batch) -> Tensor:
        with torch.autocast(self.devices.device.type, torch.bfloat16, enabled=self.bfloat16):
            values = self.tapped.graph_module(*batch.leaves)
        count = len(values) - len(self.objective.taps)
        loss = self.objective(batch, tuple(values[:count]), dict(zip(self.objective.taps, values[count:], strict=True)))
        for hook in self.hooks:
            penalty = hook.penalty(self.learner)
            loss = loss if penalty is None else loss + penalty
        if not loss.requires_grad:
            raise TaskError("the loss does not depend on anything that is trained: all layers before the outputs are frozen.")
        return loss

    def _ready_gradients(self, loss: float, place: tuple[int, int], inputs: Any) -> None:
        """Average over processes, keep masked weights still, clip, and refuse what is not finite."""
        for parameter in self.learner.parameters.values():
            if parameter.grad is None and self.devices.count > 1:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        self.devices.mean(gradients)
        for tensor, mask in self.masks:
            if tensor.grad is not None:
                tensor.grad.mul_(mask)
        norm = torch.nn.utils.get_total_norm(gradients)
        self._refuse_not_finite(float(norm), place, inputs, f"the gradients' norm at loss {loss:.4g}")
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.settings.clip, norm)

    def _keep_zeros(self) -> None:
        with torch.no_grad():
            for tensor, mask in self.masks:
                tensor.mul_(mask)

    def _refuse_not_finite(self, value: float, place: tuple[int, int], inputs: Any, what: str = "the loss") -> None:
        if not self.devices.any(not torch.isfinite(torch.tensor(value)).item()):
            return
        self._save()
        kept = "" if self.checkpoints.path is None else f" The last good state is in {self.checkpoints.path}."
        error = TrainingError(
            f"{what} is {value} at step {self.learner.step + 1} of {self.learner.steps}, learning rate {self.learner.rate:.3g}, batch "
            f"{place[1] + 1} of epoch {place[0] + 1} ({describe(inputs)}): lower the rate, or look at that batch.{kept}"
        )
        error.network = with_tensors(self.network, self.best.tensors)
        raise error

    # States ----------------------------------------------------------------------------------------------------------------------

    def _current(self) -> dict[str, Tensor]:
        return snapshot(self.network) if self.average is None else self.average.values

    def _validate(self, start: bool = False) -> float | None:
        """Score the present state, and keep it if it is the best of those that hooks call ready."""
        self.devices.mean(tensor for _, tensor in self.network.named_tensors() if tensor.is_floating_point() and not tensor.requires_grad)
        now = with_tensors(self.network, self._current())
        move(now, torch.device("cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            score = self.validation(now)
        ready = all(hook.ready(self.learner) for hook in self.hooks)
        better = score is None or self.best.score is None or score >= self.best.score
        if ready and (start or better or not self._chosen):
            self.best = Best({name: tensor.clone() for name, tensor in self._current().items()}, score, self.learner.step)
            self._chosen = True
        if not start and score is not None:
            self.progress.say(f"step {self.learner.step} of {self.learner.steps}: score {score:.4f}, best {self.best.score or score:.4f}")
        return score

    _chosen = False  # whether some state was ready yet

    def _decide_precision(self) -> None:
        if self.settings.precision == "auto":
            inputs, _ = self.stream.next()
            self.stream.seek(0, 0)
            self.bfloat16 = faster_in_bfloat16(self.tapped, self.devices.to(self.network.flat(inputs)))

    def _save(self) -> None:
        if self.checkpoints.path is None or not self.devices.main:
            return
        parts = {"network": dict(self.network.named_tensors()), "best": self.best.tensors, "optimizer": state_of(self.optimizer)}
        parts["objective"] = self.objective.state()
        if self.average is not None:
            parts["average"] = self.average.values
        for number, hook in enumerate(self.hooks):
            parts[f"hook{number}"] = hook.state()
        facts = {
            "step": self.learner.step,
            "place": [self.stream.epoch, self.stream.number],
            "best": [self.best.score, self.best.step],
            "before": self.before,
            "chosen": self._chosen,
            "bfloat16": self.bfloat16,
        }
        self.checkpoints.save({f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}, facts)

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        put(self.network, parts["network"])
        self.best = Best(parts["best"], *facts["best"])
        self.objective.restore(parts.get("objective", {}))
        if self.average is not None:
            self.average.values = parts["average"]
        for number, hook in enumerate(self.hooks):
            hook.restore(parts.get(f"hook{number}", {}))
        set_state(self.optimizer, parts.get("optimizer", {}))
        self.learner.step, self.before, self._chosen, self.bfloat16 = (facts[name] for name in ("step", "before", "chosen", "bfloat16"))
        self.stream.seek(*facts["place"])
        self.progress.say(f"going on from step {self.learner.step} of {self.learner.steps}")

    def _result(self) -> Network:
        """The best state, batch norms measured again where that was asked for and helps."""
        if not self._chosen:
            self.best = Best(self._current(), None, self.learner.step)
        made = with_tensors(self.network, self.best.tensors)
        move(made, torch.device("cpu"))
        if self.settings.renormalise:
            normed = made.fork()
            reestimate_batch_norms(normed, Pieces.of(normed, self.task.batches("calibrate"), RENORMALISING))
            score = self.validation(normed)
            if score is None or self.best.score is None or score >= self.best.score:
                made, self.best.score = normed, score
        told = {"steps": self.learner.steps, "best step": self.best.step, "score before": self.before, "score": self.best.score}
        made.origin["trained"] = [*made.origin.get("trained", []), told]
        self._save()
        return made


class _Batches:
    """The batches of a role, with the length of the user's iterable where it has one."""

    def __init__(self, task: Task, role: str) -> None:
        self.task, self.role = task, role

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self.task.batches(self.role)

    def __len__(self) -> int:
        batches = self.task.data[self.role]()
        with contextlib.suppress(TypeError):
            return len(batches)  # type: ignore[arg-type]
        return sum(1 for _ in self)


def _each_once(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """By its first name each parameter that has several."""
    return {name: parameter for name, parameter in reversed(list({id(p): (n, p) for n, p in reversed(parameters.items())}.values()))}


def _to_training(network: Network, norms: str) -> None:
    network.train()
    if norms == "freeze":
        position = TRAINING_FLAGS["aten.batch_norm.default"]
        for node in network.graph.nodes:
            if node.target is aten.batch_norm.default and len(node.args) > position:
                node.update_arg(position, node.meta["captured_flag"])
        network.recompile()


def _has_training_norms(network: Network) -> bool:
    return any(node.target is aten.batch_norm.default and node.args[5] for node in network.graph.nodes)


def _with_taps(network: Network, taps: Sequence[str]) -> Network:
    """A fork over the same tensors that gives the values of these nodes behind its outputs.

    Raises:
        TaskError: there is no such node.
    """
    made = network.fork()
    nodes = {node.name: node for node in made.graph.nodes}
    output: Any = made.graph.output_node()
    for name in taps:
        if name not in nodes:
            raise TaskError(f"the network has no node {name!r} to look at; {nearest(name, nodes)}")
    output.args = ((*output.args[0], *(nodes[name] for name in taps)),)
    made.recompile()
    return made
