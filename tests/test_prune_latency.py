"""prune(latency=...) from end to end: layers measured in the runtime, widths chosen by them, the file built and judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_nets import conv, task_of
from torch import nn

import downsize as ds
from downsize.measure.shapes import LatencyTable
from downsize.network.network import Network
from downsize.pruning.latency import predicted


@pytest.mark.slow
def test_latency_is_met_by_layers_measured_in_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Oracle: the same table of measurements, read again, over the layers of the network that was built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    # Large enough for the microseconds that a profile counts in.
    model = nn.Sequential(conv(3, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    image = torch.zeros(1, 3, 32, 32)
    task = task_of(model, image, batches=12)
    result = ds.run(task, "prune(latency=0.6)", ds.Target(), into=tmp_path / "run")
    assert result.artifact is not None and Path(result.artifact.path).stat().st_size > 0
    table = LatencyTable()
    assert table.known, "the measurements were kept"
    networks = [Network.load(path) for path in (tmp_path / "run" / "steps").glob("*/network.safetensors")]
    (original,) = [network for network in networks if "pruned" not in network.origin]
    (pruned,) = [network for network in networks if "pruned" in network.origin]
    whole, left = (predicted(table, network, image) for network in (original, pruned))
    assert left <= 0.6 * whole
    assert sum(tensor.numel() for tensor in pruned.parameters()) < sum(tensor.numel() for tensor in original.parameters())
