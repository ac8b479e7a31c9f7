"""Factors in the place of layers: low rank chosen by measured error and cost, solved in closed form."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Literal

from pydantic import Field

from ..errors import SpecError
from ..factoring.factorize import Settings, factorize, ladder_of, nearest, ready
from ..factoring.options import Way
from ..factoring.rewriting import put
from ..network.network import Network
from ..spec import frozen
from ..task import Task
from ..training.choosing import better
from ..training.plan import Training
from ..training.ranks import LearnedRanks

AMOUNTS = ("macs", "parameters", "size", "latency", "ratio")


@frozen
class Factorize:
    """Replace layers by products of smaller ones: plain layers in the graph, which every other technique and every runtime takes as such.

    ``factorize(macs=0.5)`` decomposes every layer in several forms on what it reads (Gram matrices of calibration data, centred), measures
    at several ranks how far the whole network's outputs move on held-back samples, solves for the forms and ranks with the least summed error,
    and then makes the factors once more, layer after layer, on what each reads behind those before it, to give what the original gives. No
    labels, no training.

    Fields:
        macs, parameters, size, latency, ratio: how much may REMAIN; one of them. ``macs`` (multiply-accumulates, at the example's sizes),
            ``parameters``, ``size`` (bytes of the weights in their types) and ``latency`` (the summed latency of the layers on this machine,
            measured by shape) are shares of the whole network's own up to 1, above 1 absolute numbers (latency: milliseconds, of the
            layers); ``ratio`` is the share of each layer's own multiply-accumulates (of a table: weights) that stays.
        ranks: ``ladder`` (the least error under the amount), or without an amount ``energy`` (each layer in the cheapest form that keeps the
            share ``energy`` of its centred output's energy) or ``evbmf`` (the ranks that variational Bayes finds in the weights).
        forms: of convolutions: ``channel`` (kernel to few channels, then 1 x 1), ``spatial`` (k x 1, then 1 x k), ``tucker`` (1 x 1, kernel,
            1 x 1), ``separable`` (depthwise, then 1 x 1), ``tensor_train`` (1 x 1, k x 1, 1 x k, 1 x 1: few weights), ``cp`` (1 x 1, depthwise
            k x 1 and 1 x k, 1 x 1). Transposed ones and those in three directions have them, too.
        what: kinds of layers: ``linear``, ``conv``, ``embedding`` (rows weigh as often as they are looked up in the calibration data).
        multiple: ranks are multiples of this, where there is room for four; kernels work in blocks of 8 or 16.
        joint: linear layers that read the same value (queries, keys and values) may share their first factor, where that is better.
        refit: solve layer after layer for the original's values; kept where held-back samples agree.
        fold: fold batch norms into convolutions first, and drop dropout; False keeps both for training.
        samples: calibration samples used at most, of which every ``holdout``-th judges the choices; 0: use no data, go by the weights.
        damping: of the Gram matrices, as a share of their mean diagonal.
        train: learn forms and ranks while the network trains as the plan says (true: imitate the original model): in the first part of the steps,
            ``learned``, layers stay whole and are drawn towards the factors nearest to them, which are chosen anew every while, all under the
            amount; in the rest the factors themselves train. Batch norms are kept. Where a short training ends below the factors solved for,
            and there is data for "validate" to show it, these are kept.

    Layers whose weight others read in another way, is sparse or is computed stay as they are; ``origin["factorized"]`` says which, and why.

    Example: ``factorize(macs=0.5)``.
    """

    macs: float | None = Field(default=None, gt=0)
    parameters: float | None = Field(default=None, gt=0)
    size: float | None = Field(default=None, gt=0)
    latency: float | None = Field(default=None, gt=0)
    ratio: float | None = Field(default=None, gt=0, le=1)
    ranks: Literal["ladder", "energy", "evbmf"] = "ladder"
    energy: float = Field(default=0.95, gt=0, le=1)
    forms: tuple[Literal["channel", "spatial", "tucker", "separable", "tensor_train", "cp"], ...] = ("channel", "spatial", "tucker", "separable")
    what: tuple[Literal["linear", "conv", "embedding"], ...] = ("linear", "conv", "embedding")
    multiple: int = Field(default=8, ge=1)
    joint: bool = True
    refit: bool = True
    fold: bool = True
    samples: int = Field(default=512, ge=0)
    holdout: int = Field(default=5, ge=2)
    damping: float = Field(default=0.01, ge=0)
    train: bool | Training = False
    learned: float = Field(default=0.6, ge=0, le=1)

    def __post_init__(self) -> None:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if self.ranks == "ladder" and len(given) != 1:
            raise SpecError(f"factorize: {', '.join(given) or 'no amount'} came; expected one of {', '.join(AMOUNTS)}, e.g. factorize(macs=0.5).")
        if self.ranks != "ladder" and given:
            raise SpecError(f"factorize: ranks={self.ranks!r} with {', '.join(given)} came; these ranks follow from the layers: give no amount.")
        if not self.what or not self.forms:
            raise SpecError(f"factorize: what={self.what}, forms={self.forms} came; expected at least one of each.")
        if self.train and self.ranks != "ladder":
            raise SpecError(f"factorize: ranks={self.ranks!r} came with train, which learns ranks under an amount: leave one of them out.")

    def __call__(self, network: Network, task: Task) -> Network:
        """The network with factors.

        Raises:
            TaskError: nothing can be factored, there is too little calibration data, or ``latency`` was asked for without a clock.
            AllocationError: so little cannot remain; the message says how little can.
            CutError: the network is quantized.
        """
        if self.train:
            trained = self._trained(network, task, Training() if self.train is True else self.train)
            return better(task, trained, lambda: factorize(network, task, replace(self.settings(), fold=False)))
        return factorize(network, task, self.settings())

    def _trained(self, network: Network, task: Task, plan: Training) -> Network:
        settings = replace(self.settings(), fold=False)
        made = ready(network, settings)
        nearest(made, task, settings)  # what cannot be done is said before any training
        if self.learned:
            hook = LearnedRanks(lambda trained: nearest(trained, task, settings)[0], astuple(settings))
            made = plan.train(made, task, hooks=[hook], share=(0.0, self.learned))
        products, told = nearest(made, task, settings)
        made = made.fork()
        put(made, products)
        made.origin["factorized"] = told | {"by": "learned in training"}
        return plan.train(made, task, share=(self.learned, 1.0)) if self.learned < 1 else made

    def ladder(self, network: Network, task: Task) -> list[list[Way]]:
        """For each layer, or layers that read the same value, the ways of doing them with cost and error; nothing is changed."""
        return ladder_of(network, task, self.settings())

    def settings(self) -> Settings:
        """What was asked for."""
        given = next((name for name in AMOUNTS if getattr(self, name) is not None), "ratio")
        return Settings(
            amount=given,
            most=getattr(self, given),
            ranks=self.ranks,
            energy=self.energy,
            forms=self.forms,
            what=self.what,
            multiple=self.multiple,
            samples=self.samples,
            holdout=self.holdout,
            refit=self.refit and self.samples > 0,
            joint=self.joint and self.ranks != "evbmf",
            damping=self.damping,
            fold=self.fold,
        )
