"""One line of the training benchmark: how a network is made, and what its written file is found to be."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downsize.network.cost import count
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.runtimes import open_artifact

Quality = dict[str, float]


@dataclass(frozen=True)
class Row:
    """``make`` gives the network, timed; ``judge`` writes it and looks at the file."""

    name: str
    make: Callable[[], Network]
    judge: Callable[[Network], Quality]


def measured(network: Network, sample: Any, judge: Callable[[Callable[[Any], Any]], Quality]) -> Quality:
    """What ``judge`` says of the written file in ONNX Runtime, with its bytes and MACs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        write(network, file)
        found = judge(open_artifact(file, "onnxruntime", 1))
        cost = count(network, sample)
        return {**found, "MMACs": cost.macs / 1e6, "kB": file.stat().st_size / 1e3}
