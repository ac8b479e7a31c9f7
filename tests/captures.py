"""The networks of architectures.py and forms.py, each captured once a process for all tests: take a fork before changing one."""

from __future__ import annotations

import functools

import torch
from architectures import ARCHITECTURES
from forms import FORMS
from torch import nn
from zoo import Specimen

from downsize.network.capture import capture
from downsize.network.network import Network


@functools.cache
def architecture(name: str) -> tuple[nn.Module, Network]:
    return made(ARCHITECTURES[name])


@functools.cache
def form(name: str) -> Network:
    return made(FORMS[name][0])[1]


def made(specimen: Specimen) -> tuple[nn.Module, Network]:
    torch.set_num_threads(1)
    model = specimen.make()
    return model, capture(model, specimen.inputs(2))
