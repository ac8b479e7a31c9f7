"""Structured pruning: channels, heads, neurons and layers are really cut, chosen by measured error and repaired in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from ..errors import SpecError
from ..factoring.rotation import rotate
from ..network.network import Network
from ..pruning.ladder import Ladder
from ..pruning.pieces import collected
from ..pruning.structure import Settings, ladders_of, prepared, prune
from ..spec import frozen
from ..task import Task
from ..training.gates import train_gates
from ..training.plan import Training

AMOUNTS = ("macs", "parameters", "latency", "ratio")


@frozen
class Prune:
    """Cut units out of a network: what remains is a smaller network of the same kind, faster in every runtime.

    ``prune(macs=0.5)`` orders the units of every axis by what removing them costs (optimal brain surgery on Gram matrices of calibration
    data), measures the error of the whole network at several widths of each axis on held-back samples, solves for the widths with the
    least summed error, cuts, and fits layer after layer to the original's values in closed form. No labels, no training.

    Fields:
        macs, parameters, latency, ratio: how much may REMAIN; one of them. ``macs`` (multiply-accumulates, at the example's sizes),
            ``parameters`` and ``latency`` (the summed latency of the layers on this machine, measured by shape) are shares of the
            network's own up to 1, above 1 absolute numbers (latency: milliseconds, of the layers); ``ratio`` is the share of each
            axis' units that stays.
        scope: ``global`` (each axis as much as it can bear) or ``layer`` (the same share of each axis).
        what: kinds of axes: ``channels``, ``heads``, ``neurons``; also ``head_dims``, the inner dimension of heads, and ``width``, which
            crosses a normalisation over the units and so is inexact; or ``layers``: residual branches and repeated layers are taken out whole.
        importance: what orders the units: ``obs``; norms of all weights of a unit ``l1``, ``l2``; ``scale`` of batch norms; ``taylor``
            (gradients of the loss if there are class labels, else of the outputs); ``geometric_median``; ``energy`` of what is read; ``random``;
            ``gates``: before each cut the network is trained as ``tune`` says with a gate on each unit, so that those that open cost what may
            remain; units are ordered by how open they are (hard concrete gates; Louizos et al. 2018).
        rotate: with ``head_dims`` among ``what``, and data: give each head first the basis in which its last dimensions carry least of q k^T
            and of what is read of values, where that changes nothing (see :func:`~downsize.factoring.rotation.rotate`).
        refit: fit the layers that read cut units in closed form; each only if it helps on held-back samples.
        renormalise: measure batch norms again, where ``fold`` left any.
        fold: fold batch norms into convolutions first, which repairs better, and drop dropout; False keeps both, as by default with ``tune``
            (training needs them) and with importance ``scale`` (which reads them).
        rounds: cut in so many steps, each chosen anew on what the last one left.
        tune: train behind each step, the last one too, as long as the plan says: ``prune(macs=0.5, rounds=3, tune=distill(epochs=1))``;
            true: imitate the original model.
        multiple: widths are multiples of this, where an axis has four times as many units; kernels work in blocks of 8 or 16.
        samples: calibration samples used at most, of which every ``holdout``-th judges the choices; 0: use no data (then units are
            ordered and widths are chosen by weights alone, and nothing is repaired: ``origin["pruned"]`` says so).
        damping: of the Gram matrices, as a share of their mean diagonal. Little of it fits the calibration data best; more of it holds on data
            that are less like them.

    Example: ``prune(macs=0.75)``.
    """

    macs: float | None = Field(default=None, gt=0)
    parameters: float | None = Field(default=None, gt=0)
    latency: float | None = Field(default=None, gt=0)
    ratio: float | None = Field(default=None, gt=0, le=1)
    scope: Literal["global", "layer"] = "global"
    what: tuple[Literal["channels", "heads", "neurons", "head_dims", "width", "layers"], ...] = ("channels", "heads", "neurons")
    importance: Literal["obs", "l1", "l2", "scale", "taylor", "geometric_median", "energy", "random", "gates"] = "obs"
    rotate: bool = True
    refit: bool = True
    renormalise: bool = True
    fold: bool | None = None
    rounds: int = Field(default=1, ge=1)
    tune: bool | Training = False
    multiple: int = Field(default=8, ge=1)
    samples: int = Field(default=512, ge=0)
    holdout: int = Field(default=5, ge=2)
    damping: float = Field(default=0.1, ge=0)

    def __post_init__(self) -> None:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise SpecError(f"prune: {', '.join(given) or 'no amount'} came; expected one of {', '.join(AMOUNTS)}, e.g. prune(macs=0.5).")
        if "layers" in self.what and self.latency is not None:
            raise SpecError("prune: what=layers goes by macs, parameters or ratio; expected one of these instead of latency.")
        if not self.what or ("layers" in self.what and len(self.what) > 1):
            raise SpecError(f"prune: what={self.what} came; expected kinds of axes, or layers alone: prune(...) | prune(...) does both.")
        if "layers" in self.what and not self.samples:
            raise SpecError("prune: which layers can go is found out on data; expected samples above 0.")
        if not self.samples and self.importance in ("energy", "taylor"):
            raise SpecError(f"prune: importance={self.importance!r} needs data; expected samples above 0, or l2.")
        if self.importance == "gates" and (not self.tune or self.latency is not None or "layers" in self.what):
            raise SpecError("prune: gates are trained towards macs, parameters or a ratio of units; expected one of these and tune=True or a plan.")

    def __call__(self, network: Network, task: Task) -> Network:
        """The pruned network.

        Raises:
            TaskError: nothing can be cut, or there is too little calibration data, or it has NaN in it.
            AllocationError: so little cannot remain; the message says how little can.
            CutError: the network is quantized, or the cut network does not compute what it should, which would be a fault of downsize.
        """
        network = self.rotated(network, task)
        if not self.tune:
            return prune(network, task, self.settings())
        plan = Training() if self.tune is True else self.tune
        gates = self.importance == "gates"
        ranking = (lambda made, asked: train_gates(made, task, plan, asked)) if gates else None
        return prune(network, task, self.settings(), lambda made: plan.train(made, task), ranking)

    def ladder(self, network: Network, task: Task) -> list[Ladder]:
        """What each width of each axis costs in error: see :class:`~downsize.pruning.ladder.Ladder`. Nothing is pruned."""
        return ladders_of(self.rotated(network, task), task, replace(self.settings(), scope="global"))

    def rotated(self, network: Network, task: Task) -> Network:
        """The network with rotated heads, which ``origin["rotated"]`` names, if ``rotate`` says so; else as it is."""
        if not (self.rotate and self.samples and "head_dims" in self.what):
            return network
        made = prepared(network, self.settings().fold)
        data = collected(made, task, self.samples, self.holdout)
        made.origin["rotated"] = rotate(made, data.fit, data.port)
        return made

    def settings(self) -> Settings:
        """What was asked for, with what it implies; for :func:`downsize.pruning.structure.prune`, which can train between rounds."""
        (name,) = [name for name in AMOUNTS if getattr(self, name) is not None]
        return Settings(
            amount=name,
            most=getattr(self, name),
            scope="layer" if name == "ratio" else self.scope,
            what=self.what,
            importance=self.importance if self.samples or self.importance != "obs" else "l2",
            refit=self.refit and self.samples > 0,
            renormalise=self.renormalise and self.samples > 0,
            fold=self.fold if self.fold is not None else not self.tune and self.importance != "scale",
            rounds=self.rounds,
            multiple=self.multiple,
            samples=self.samples,
            holdout=self.holdout,
            damping=self.damping,
        )
