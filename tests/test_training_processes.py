"""Several processes train as one does: the same network within float tolerance, one checkpoint, one voice. On CPUs, through accelerate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_nets import distance

from downsize.network.network import Network

SCRIPT = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from training_nets import Pulse, Scaled, Signals, network_of, noisy, parts, samples, shuffled, smooth, task_of
from downsize.progress import Progress
from downsize.techniques.finetune import Finetune
from downsize.training.devices import Devices

folder, what = Path(sys.argv[1]), sys.argv[2]
devices = Devices.found()
# 42 samples in batches of 8: the last has 2, fewer than two rows for each process
task = task_of(noisy() if what == "norms" else smooth(), checkpoints=folder / "checkpoints", progress=Progress(stream=sys.stdout))
network = network_of(task)
plan = Finetune(epochs=3, rate=1e-2, decay=0.1, average=0.8, minutes=0)
hooks = [Pulse("3.bias")] if what == "hooks" else [Signals(8)] if what == "stops" else []
if what == "stops":
    try:
        plan.train(network, task, hooks=hooks)
    except KeyboardInterrupt:
        pass
    hooks = [Signals()]
try:
    trained = plan.train(network, task, hooks=hooks)
except KeyboardInterrupt:
    raise SystemExit(3)
trained.save(folder / f"{what}-{devices.count}-{devices.rank}.safetensors")
"""


def launched(folder: Path, what: str, *launcher: str) -> str:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, *launcher, str(script), str(folder), what]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchrun(count: int) -> tuple[str, ...]:
    """Starts several processes on CPUs too, which ``accelerate launch`` does by MPI alone; accelerate reads its environment."""
    return "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)


ACCELERATE = (
    "-m",
    "accelerate.commands.launch",
    "--cpu",
    "--num_processes",
    "1",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adamw", "hooks"])
def test_two_processes_give_what_one_gives(tmp_path, what):
    launched(tmp_path, what)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    checkpoint.unlink()
    said = launched(tmp_path, what, *torchrun(2))
    one, main, other = (Network.load(tmp_path / f"{what}-{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert distance(main, one) < 1e-5
    assert distance(main, other) == 0
    assert said.count("step 18 of 18: score") == 1
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_statistics_of_batch_norms_are_those_of_all_processes(tmp_path):
    launched(tmp_path, "norms", *torchrun(2))
    main, other = (Network.load(tmp_path / f"norms-2-{rank}.safetensors") for rank in range(2))
    assert distance(main, other) == 0


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_stopped(tmp_path):
    said = launched(tmp_path, "stops", *torchrun(2))
    assert said.count("stopped behind step 8 of 18") == said.count("going on behind step 8 of 18") == 1
    found = Network.load(tmp_path / "stops-2-0.safetensors")
    launched(tmp_path, "adamw", *torchrun(2))
    assert distance(found, Network.load(tmp_path / "adamw-2-0.safetensors")) == 0


@pytest.mark.slow
def test_one_launched_process_is_as_none(tmp_path):
    launched(tmp_path, "adamw")
    alone = (tmp_path / "adamw-1-0.safetensors").read_bytes()
    next((tmp_path / "checkpoints").iterdir()).unlink()
    launched(tmp_path, "adamw", *ACCELERATE)
    assert (tmp_path / "adamw-1-0.safetensors").read_bytes() == alone
