"""Measurements of model files: bytes, latency, memory, energy and score."""

from __future__ import annotations

from .energy import energy
from .host import host
from .process import latency, memory, per_operator, size
from .score import Judgement, Recording, judge

__all__ = ["Judgement", "Recording", "energy", "host", "judge", "latency", "memory", "per_operator", "size"]
