"""The one training loop: everything that trains a network is an objective and hooks of it."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError, TrainingError, nearest
from ..inputs import describe
from ..network.network import Network
from ..network.statistics import Pieces
from ..progress import Progress
from ..pruning.renormalise import reestimate_batch_norms
from ..task import Task
from .checkpoint import Checkpoints, key_of
from .devices import Devices, move
from .digest import digest_of_settings
from .hook import Hook, Learner
from .interrupt import Interrupt
from .keeping import Average, snapshot, with_tensors
from .layout import arrange, arranged
from .norms import alone, moving, to_training
from .objective import Batch, Objective
from .optimizer import optimizer_of, rate_at, set_rate
from .precision import faster_in_bfloat16
from .state import Best, State
from .stream import Batches, Stream, drawing, seed_of, seed_torch
from .teacher import with_values
from .validation import Validation

RENORMALISING = 512  # samples that batch norms are measured again on
LONELY = 1000  # batches of one sample in a row that are passed over

Place = tuple[int, int]  # epoch and batch, both counted from 0


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


def train(network: Network, task: Task, objective: Objective, hooks: Sequence[Hook], settings: Settings) -> Network:
    """The network trained as the settings say, in evaluation mode; the one given is left as it was. See :class:`~downsize.training.plan.Training`."""
    made = network.copy()
    frozen = frozen_names(made, settings.freeze)
    with drawing(settings.seed, "training", settings.share):
        run = _Run(made, task, objective, hooks, settings, frozen)
        with Interrupt() as interrupt:
            return run.through(interrupt)


def frozen_names(network: Network, patterns: Sequence[str]) -> set[str]:
    """Turn off training of the parameters whose names match a pattern, in place. Returns those it was turned off for.

    Raises:
        TaskError: a pattern matches no tensor, nothing is left to train, or what is left has 16 bits.
    """
    tensors = dict(network.named_tensors())
    found: set[str] = set()
    for pattern in patterns:
        matched = [name for name in tensors if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise TaskError(f"freeze={pattern!r} matches none of the network's tensors; {nearest(pattern, tensors)}")
        found.update(matched)
    frozen = {name for name in found if isinstance(tensors[name], nn.Parameter) and tensors[name].requires_grad}
    for name in frozen:
        tensors[name].requires_grad_(False)
    if not any(True for _ in network.parameters()):
        raise TaskError("the network has no tensor that can be trained: all are frozen (requires_grad=False); model.requires_grad_(True) frees them.")
    for name, tensor in tensors.items():
        if tensor.requires_grad and tensor.dtype in (torch.float16, torch.bfloat16):
            # What a step adds to a weight is mostly less than half of its last bit, and AdamW's second moments are zero in float16.
            raise TaskError(
                f"The weight {name} is {str(tensor.dtype)[6:]}, which rounds steps away; training needs float32: call model.float() before."
            )
    return frozen


@dataclass
class _Run:
    """One training: what it is made of, and where it stands. ``frozen``: names of tensors that are not trained this time."""

    network: Network
    task: Task
    objective: Objective
    hooks: Sequence[Hook]
    settings: Settings
    frozen: set[str]
    devices: Devices = field(default_factory=Devices.found)

    def __post_init__(self) -> None:
        settings, task = self.settings, self.task
        self.checkpoints = Checkpoints(task.checkpoints, "" if task.checkpoints is None else self._key())
        self.stream = Stream(lambda: Batches(task, self.role), seed_of(settings.seed, settings.share[0]))
        self.validation = Validation(task)
        move(self.network, self.devices.device)
        self.objective.to(self.devices.device)
        self._count_steps()
        self._make_learner()
        self.channels_last = arrange(self.tapped, self.devices.there(self.network.flat(task.example)))
        self.masks = [(self.network.tensor(name), mask) for name, mask in self.network.masks().items()]
        average = None if settings.average is None else Average(self.network, settings.average)
        self.state = State(self.network, self.objective, self.optimizer, average, self.hooks)
        self.progress: Progress = task.progress if task.progress and self.devices.main else Progress(quiet=True)
        self.bfloat16 = settings.precision == "bfloat16"
        self.before: float | None = None

    @property
    def role(self) -> str:
        return "train" if "train" in self.task.data else "calibrate"

    def _key(self) -> str:
        """What tells this training from all others, but for its data, of which only the first batch for "validate" counts here."""
        task = self.task
        settings = astuple(replace(self.settings, minutes=0.0))
        parts = [digest_of_settings(part) for part in (self.objective, *self.hooks)]
        forms = [(name, list(tensor.shape)) for name, tensor in (*self.objective.named_parameters(), *self.objective.named_buffers())]
        judged = next(task.batches("validate")) if "validate" in task.data else None
        return key_of(self.network, settings, self.role, parts, forms, task.model, dict(task.models), task.loss, task.score, judged)

    def _count_steps(self) -> None:
        """How many batches an epoch has (0 where nothing depends on it), and which steps of the plan are made here: ``first`` of ``all``."""
        settings = self.settings
        needed = settings.epochs is not None or (settings.every is None and self.validation.possible)
        self.epoch = self.stream.length(settings.steps) if needed else 0
        self.all = settings.steps if settings.steps is not None else max(1, round((settings.epochs or 0) * self.epoch))
        self.first, self.last = (round(part * self.all) for part in settings.share)

    def _make_learner(self) -> None:
        settings, network = self.settings, self.network
        to_training(network, settings.norms, lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.freeze))
        self.tapped = with_values(network, self.objective.taps)
        self.statistics = moving(network)
        parameters = {name: tensor for name, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter) and tensor.requires_grad}
        self.learner = Learner(network, _each_once(parameters), self.last - self.first)
        for hook in self.hooks:
            hook.begin(self.learner)
        factors = {id(network.tensor(name)): factor for hook in self.hooks for name, factor in hook.rates(self.learner).items()}
        named = {name: factors[id(tensor)] for name, tensor in self.learner.parameters.items() if id(tensor) in factors}
        others = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self.optimizer = optimizer_of(settings.optimizer, self.learner.parameters, others, settings.decay, named)
        self.trained = [*self.learner.parameters.values(), *others]

    # The run ---------------------------------------------------------------------------------------------------------------------

    def through(self, interrupt: Interrupt) -> Network:
        """All steps from where it stands."""
        if not self._resumed():
            self.best = Best(snapshot(self.network))
            self._decide_precision()
            self.before = self._validate(start=True)
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
                    self.devices.wait()  # who goes on in this process must not find the checkpoint before
                    self.progress.say(f"stopped behind step {self.learner.step} of {self.learner.steps}")
                    raise KeyboardInterrupt
        return self._result()

    def _is_time_to_validate(self) -> bool:
        every = self.settings.every or self.epoch or 1
        return self.learner.step == self.learner.steps or (self.validation.possible and self.learner.step % every == 0)

    def _step(self) -> float:
        """One step of the optimizer. Returns the loss.

        Raises:
            TrainingError: loss or gradients are not finite; the network is then as it was before the step.
        """
        learner, settings = self.learner, self.settings
        (inputs, targets), place, weight = self._next_batch()
        before = [tensor.clone() for tensor in self.statistics]
        seed_torch(seed_of(settings.seed, "step", self.first + learner.step, self.devices.rank))
        learner.rate = rate_at(self.first + learner.step, self.all, settings.rate, settings.schedule, settings.warmup)
        set_rate(self.optimizer, learner.rate)
        for hook in self.hooks:
            hook.before(learner)
        self.optimizer.zero_grad(set_to_none=True)
        inputs = arranged(inputs) if self.channels_last else inputs
        loss = self._loss(Batch(inputs, self.devices.there(targets), self._leaves(inputs)))
        (loss * weight).backward()
        value = float(loss.detach())
        broken = self.devices.any(not torch.isfinite(loss.detach()).item())
        if broken or not self._ready_gradients():
            raise self._broken("the loss" if broken else f"the norm of the gradients at loss {value:.4g}", value, place, inputs, before)
        self.optimizer.step()
        learner.step += 1
        self._keep_zeros()
        for hook in self.hooks:
            hook.after(learner)
        self.devices.mean(self.statistics)
        if self.state.average is not None:
            self.state.average.update(self.network, self.first + learner.step)
        return value

    def _next_batch(self) -> tuple[tuple[Any, Any], Place, float]:
        """This process' part of the next batch that batch norms in training can take, its place, and what it counts."""
        begun = self.stream.epoch
        for _ in range(LONELY):
            inputs, targets = self.stream.next()
            place = self.stream.epoch, self.stream.number - 1
            leaves = self._leaves(inputs)
            rows = leaves[0].shape[0] if leaves[0].dim() else 1
            if rows > 1 or not alone(self.network, leaves):
                divisible = self.network.ports[0].dims[:1] == ("batch",)
                *batch, weight = self.devices.part(inputs, targets, rows if divisible else 1)
                return (batch[0], batch[1]), place, weight
            if self.stream.epoch > begun + 1:
                break
        raise TaskError(
            f'batches of data["{self.role}"] have one sample, and a batch norm then one value a channel, which it cannot train on: '
            'give larger batches, or norms="freeze".'
        )

    def _leaves(self, inputs: Any) -> list[Tensor]:
        return self.devices.there(self.network.flat(inputs))

    def _loss(self, batch: Batch) -> Tensor:
        with torch.autocast(self.devices.device.type, torch.bfloat16, enabled=self.bfloat16):
            values = self.tapped.graph_module(*batch.leaves)
        if self.bfloat16:
            values = [value.float() if value.dtype == torch.bfloat16 else value for value in values]
        count = len(values) - len(self.objective.taps)
        loss = self.objective(batch, tuple(values[:count]), dict(zip(self.objective.taps, values[count:], strict=True)))
        for hook in self.hooks:
            penalty = hook.penalty(self.learner)
            loss = loss if penalty is None else loss + penalty
        if not loss.requires_grad:
            raise TaskError("the loss does not depend on anything that is trained: all layers before the outputs are frozen.")
        return loss

    def _ready_gradients(self) -> bool:
        """Average over processes, let hooks act, keep masked weights still, and clip. Returns whether they are finite."""
        self.devices.mean([parameter.grad for parameter in self.trained if parameter.grad is not None])
        for hook in self.hooks:
            hook.gradients(self.learner)
        for tensor, mask in self.masks:
            if tensor.grad is not None:
                tensor.grad.mul_(mask)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.trained if parameter.grad is not None])
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.settings.clip, norm)
        return bool(torch.isfinite(norm))

    def _keep_zeros(self) -> None:
        with torch.no_grad():
            for tensor, mask in self.masks:
                tensor.mul_(mask)

    def _broken(self, what: str, loss: float, place: Place, inputs: Any, statistics: list[Tensor]) -> TrainingError:
        """The error for a step that cannot be made, which is undone."""
        with torch.no_grad():
            for tensor, value in zip(self.statistics, statistics, strict=True):
                tensor.copy_(value)
        self.stream.seek(*place)
        self._save()
        kept = "" if self.checkpoints.path is None else f" The state before it is in {self.checkpoints.path}."
        elsewhere = " (in another process)" if what == "the loss" and torch.isfinite(torch.tensor(loss)) else ""
        value = f"is {loss}" if what == "the loss" else "is not finite"
        error = TrainingError(
            f"{what} {value}{elsewhere} at step {self.learner.step + 1} of {self.learner.steps}, learning rate {self.learner.rate:.3g}, batch "
            f"{place[1] + 1} of epoch {place[0] + 1} ({describe(inputs)}): lower the rate, or look at that batch.{kept}"
        )
        error.network = self._made(self.best.tensors if self.validation.possible else self._current())
        return error

    # States ----------------------------------------------------------------------------------------------------------------------

    def _current(self) -> dict[str, Tensor]:
        return dict(self.network.named_tensors()) if self.state.average is None else self.state.average.values

    def _made(self, tensors: dict[str, Tensor]) -> Network:
        """A network of copies of these tensors, as it is given back: in evaluation mode, on the CPU, nothing frozen that was not before."""
        made = with_tensors(self.network, tensors)
        move(made, torch.device("cpu"))
        for name in self.frozen:
            made.tensor(name).requires_grad_(True)
        return made

    def _validate(self, start: bool = False) -> float | None:
        """Score the present state, and keep it if it is the best of those that hooks call ready."""
        score = None
        if self.validation.possible:
            with drawing(self.settings.seed, "validate"):
                score = self.validation(self._made(self._current()))
        best = self.best
        better = start or not best.chosen or score is None or best.score is None or score >= best.score
        if better and all(hook.ready(self.learner) for hook in self.hooks):
            tensors = {name: tensor.detach().clone() for name, tensor in self._current().items()}
            self.best = Best(tensors, score, self.learner.step, chosen=True)
        if not start and score is not None:
            best_score = "none yet" if self.best.score is None else f"{self.best.score:.4f}"
            self.progress.say(f"step {self.learner.step} of {self.learner.steps}: score {score:.4f}, best {best_score}")
        return score

    def _decide_precision(self) -> None:
        if self.settings.precision == "auto":
            (inputs, _), _, _ = self._next_batch()
            self.stream.seek(0, 0)
            self.bfloat16 = self.devices.any(faster_in_bfloat16(self.tapped, self._leaves(inputs)))

    def _save(self) -> None:
        if self.checkpoints.path is None or not self.devices.main:
            return
        best = self.best
        facts = {
            "step": self.learner.step,
            "place": [self.stream.epoch, self.stream.number],
            "seen": self.stream.seen(),
            "best": [best.score, best.step, best.chosen],
            "before": self.before,
            "bfloat16": self.bfloat16,
        }
        self.checkpoints.save(self.state.tensors(best), facts)

    def _resumed(self) -> bool:
        """Go on from the checkpoint, if all processes find one, and the data gives the same batch before it as then."""
        found, path = self.checkpoints.load(), self.checkpoints.path
        if found is None and path is not None and path.is_file():
            self.progress.say(f"the checkpoint {path} is damaged, or of another training: training begins anew")
        if self.devices.any(found is None):
            return False
        assert found is not None
        tensors, facts = found
        self.stream.seek(*facts["place"])
        if self.devices.any(self.stream.seen() != facts["seen"]):
            self.progress.say(f'data["{self.role}"] gives other batches than before the interruption: training begins anew')
            self.stream.seek(0, 0)
            return False
        self.best = Best(self.state.restore(tensors), *facts["best"])
        self.learner.step, self.before, self.bfloat16 = facts["step"], facts["before"], facts["bfloat16"]
        self.progress.say(f"going on behind step {self.learner.step} of {self.learner.steps}")
        return True

    def _result(self) -> Network:
        """The best state, batch norms measured again where that was asked for and helps."""
        self._save()
        self.devices.wait()
        best = self.best if self.best.chosen else Best(self._current(), None, self.learner.step)
        made, score = self._made(best.tensors), best.score
        if self.settings.renormalise:
            with drawing(self.settings.seed, "renormalise"):
                normed = made.fork()
                reestimate_batch_norms(normed, Pieces.of(normed, self.task.batches("calibrate"), RENORMALISING))
                now = self.validation(normed)
            if now is None or score is None or now >= score:
                made, score = normed, now
        if self.learner.steps:
            told = {"steps": self.learner.steps, "best step": best.step, "score before": self.before, "score": score}
            made.origin["trained"] = [*made.origin.get("trained", []), told]
        return made


def _each_once(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """By its first name each parameter that has several."""
    return {name: parameter for name, parameter in reversed(list({id(p): (n, p) for n, p in reversed(parameters.items())}.values()))}
