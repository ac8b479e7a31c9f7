"""Measurements of model files: real files in real processes, and the arithmetic by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import conv, mlp, quantized, save, structured

from downsize.errors import ArtifactError, DownsizeError, MeasureError, RuntimeMissing, SpecError, TargetError
from downsize.facts import Artifact, Measurement
from downsize.measure import host, latency, memory, per_operator, process, size
from downsize.measure.host import memory_use
from downsize.measure.process import ask, death, label, summarize
from downsize.measure.worker import block_length
from downsize.runtimes import RUNTIMES

ROOT = Path(__file__).parent.parent
RUNTIME_NAMES = [pytest.param(name, marks=pytest.mark.skipif(RUNTIMES[name].missing() is not None, reason=f"no {name}")) for name in RUNTIMES]
every_runtime = pytest.mark.parametrize("runtime", RUNTIME_NAMES)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
FACTS = Measurement("", 0.0, "seconds")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


# Size -----------------------------------------------------------------------------------------------------------------------------


def test_size_is_that_of_the_file_and_of_the_weights_beside_it(tmp_path):
    path = mlp(tmp_path / "a.onnx", 64)
    found = size(path)
    assert (found.name, found.value, found.unit, found.sha256) == ("size", path.stat().st_size, "bytes", Artifact.of(path, "").sha256)
    onnx.save(onnx.load(path), tmp_path / "b.onnx", save_as_external_data=True, location="b.weights", size_threshold=0)
    sides = [(tmp_path / name).stat().st_size for name in ("b.onnx", "b.weights")]
    assert sides[1] >= 3 * 64 * 64 * 4
    assert size(tmp_path / "b.onnx").value == sum(sides)
    (tmp_path / "b.weights").unlink()
    with pytest.raises(ArtifactError, match=r"b\.weights"):
        size(tmp_path / "b.onnx")
    with pytest.raises(ArtifactError, match="cannot be read"):
        size(tmp_path / "c.onnx")


# Latency --------------------------------------------------------------------------------------------------------------------------


@every_runtime
def test_latency_of_a_file_and_of_one_with_64_times_the_work(tmp_path, runtime):
    """The work differs 64-fold, so the ratio is well below 1 on the busiest machine."""
    small, large = mlp(tmp_path / "small.onnx", 512, 1), mlp(tmp_path / "large.onnx", 512, 16)
    found = latency(small, noise(16, 512), runtime, 1, baseline=large, seconds=0.4)
    assert set(found) == {"latency", "latency_p90", "cpu_latency", "baseline_latency", "latency_ratio", "cpu_latency_ratio"}
    assert 0 < found["latency_ratio"].value < 0.7 and 0 < found["cpu_latency_ratio"].value < 0.7
    assert found["latency"].value < found["baseline_latency"].value
    assert found["latency"].value <= found["latency_p90"].value
    for name, measurement in found.items():
        assert measurement.name == name
        assert measurement.unit == ("ratio" if "ratio" in name else "seconds")
        assert (measurement.kind, measurement.runtime, measurement.host) == ("measured", label(runtime), host())
        assert measurement.sha256 == Artifact.of(large if name == "baseline_latency" else small, runtime).sha256
        assert measurement.low is not None and measurement.high is not None and measurement.low <= measurement.high
        assert "CPU time" in str(measurement.note)


def test_latency_without_a_baseline_takes_the_models_own_structure(tmp_path):
    import torch

    ids = torch.ones(2, 3, dtype=torch.int32)
    found = latency(structured(tmp_path / "a.onnx"), {"ids": ids, "mask": ids, "fast": True}, seconds=0.1)
    assert set(found) == {"latency", "latency_p90", "cpu_latency"}
    assert found["latency"].samples >= 8 and found["latency"].value > 0


def test_block_length():
    assert block_length(1e-3, 3.0, 2) == 36  # 3 s for 2 x 40 blocks: 37.5 ms, of which one call is not timed
    assert block_length(1e-6, 3.0, 2) == 50
    assert block_length(0.5, 3.0, 1) == 1


def test_summary_of_known_times():
    """By hand: the file takes 2 or 4 s in every block, the baseline twice that; the machine slows down all the while."""
    slowing = np.linspace(1, 3, 20)[:, None]
    own = slowing * np.array([[2.0, 2.0, 2.0, 2.0, 4.0]])
    wall, cpu = [own, own[:, :4] * 2], [own / 2, own[:, :4] * 5]
    found = summarize(wall, cpu, FACTS)
    assert {name: measurement.value for name, measurement in found.items()} == pytest.approx(
        {
            "latency": np.median(own),
            "latency_p90": np.quantile(own, 0.9),
            "cpu_latency": np.median(own) / 2,
            "baseline_latency": np.median(own[:, :4]) * 2,
            "latency_ratio": 0.5,
            "cpu_latency_ratio": 0.1,
        }
    )
    ratio = found["latency_ratio"]
    assert (ratio.low, ratio.high, ratio.samples) == (pytest.approx(0.5), pytest.approx(0.5), 20)  # drift cancels in pairs, but not in:
    low, high = found["latency"].low, found["latency"].high
    assert low is not None and high is not None and low < found["latency"].value < high and high - low > 0.2
    assert (found["latency"].samples, found["baseline_latency"].samples) == (100, 80)
    assert set(summarize(wall[:1], cpu[:1], FACTS)) == {"latency", "latency_p90", "cpu_latency"}


def test_the_interval_of_the_ratio_is_that_of_the_median_of_the_pairs():
    """Oracle: the 95 % interval of a median from the order statistics of 51 pairs (binomial: the 19th to the 33rd)."""
    ratios = np.random.default_rng(3).permutation(np.linspace(0.5, 1.5, 51))
    found = summarize([ratios[:, None], np.ones((51, 1))], [ratios[:, None], np.ones((51, 1))], FACTS)["latency_ratio"]
    ordered = np.sort(ratios)
    assert found.value == pytest.approx(ordered[25])
    assert found.low == pytest.approx(ordered[18], abs=0.041) and found.high == pytest.approx(ordered[32], abs=0.041)  # two places


def test_the_note_tells_of_a_busy_machine():
    """One thread that waits for its CPU half of the time in a tenth of its calls: 10 % more wall time, then 20 %."""
    wall, cpu = np.full((2, 10), 1.0), np.full((2, 10), 1.0)
    wall[:, 0] = 2.0
    assert process._note([wall], [cpu], 1, [3]) == "2 blocks of 10 calls on CPU 3; CPU time 1000 ms"
    wall[:, 1] = 2.0
    assert process._note([wall], [cpu], 1, [3]).endswith("; the machine was busy: together the calls took 1.20 times their CPU time")
    assert "busy" not in process._note([wall], [cpu], 2, [3])  # the CPU time of several threads adds up
    assert "on CPU 3, fewer than the 2 threads" in process._note([wall], [cpu], 2, [3])
    assert "not kept to CPUs" in process._note([wall], [cpu], 1, [])


# Memory ---------------------------------------------------------------------------------------------------------------------------


def embedding(path: Path, rows: int) -> Path:
    """index [n] -> rows of a float32 table [rows, 256], 1 KiB each."""
    table = np.random.default_rng(0).standard_normal((rows, 256)).astype("float32")
    nodes = [helper.make_node("Gather", ["table", "index"], ["y"], name="rows")]
    return save(path, nodes, [("index", TensorProto.INT64, ["n"])], [("y", TensorProto.FLOAT, ["n", 256])], {"table": table})


@linux
@pytest.mark.slow
@every_runtime
def test_memory_grows_with_the_weights(tmp_path, runtime):
    """96 MiB more of weights are at least that much more memory, and not beyond what three copies of them need."""
    mib, rows = 2**20, 2**10
    index = np.arange(4)
    few, many = (memory(embedding(tmp_path / f"{n}.onnx", n * rows), index, runtime) for n in (4, 100))
    assert 95 * mib <= many.value - few.value <= 3 * 97 * mib
    assert few.value > 0 and (few.unit, few.samples) == ("bytes", 3) and "VmHWM" in str(few.note)


@linux
def test_memory_is_not_inherited_from_this_process(tmp_path):
    """A child's ru_maxrss starts at its parent's peak; VmHWM does not."""
    ballast = np.ones(60_000_000)  # 480 MB
    answer = ask("memory", [mlp(tmp_path / "a.onnx")], noise(1, 32), "onnxruntime", 1, runs=1)
    assert memory_use().peak > ballast.nbytes > 3 * answer["peak"]
    assert answer["resident"] <= answer["peak"]


@linux
def test_peak_outlives_what_was_freed():
    code = "import numpy; from downsize.measure.host import memory_use; x = numpy.ones(30_000_000); del x; print(*memory_use()[:2])"
    resident, peak = map(int, subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout.split())
    assert peak - resident > 200_000_000


# Operators ------------------------------------------------------------------------------------------------------------------------


def test_time_per_operator(tmp_path):
    times = per_operator(conv(tmp_path / "a.onnx"), noise(1, 3, 16, 16), runs=5)
    convs = [time.node for time in times if time.operator in ("Conv", "FusedConv")]
    assert len(convs) == 1 and convs[0].startswith(("conv", "relu"))  # fused, it is called after the last node that went into it
    # Which layout pools run in, and under which name, depends on the processor.
    assert any("Pool" in time.operator for time in times) and any("flatten" in time.node for time in times)
    assert all(time.seconds >= 0 for time in times) and sum(time.seconds for time in times) > 0
    int8 = per_operator(quantized(tmp_path / "b.onnx"), noise(4, 16), runs=5)
    assert any("uint8" in time.detail for time in int8)


@pytest.mark.skipif(RUNTIMES["openvino"].missing() is not None, reason="no openvino")
def test_time_per_operator_in_openvino(tmp_path):
    times = per_operator(mlp(tmp_path / "a.onnx", 64), noise(4, 64), "openvino", runs=5)
    assert [time.node for time in times if time.operator == "FullyConnected"] == ["linear0", "linear1", "linear2"]


# What goes wrong ------------------------------------------------------------------------------------------------------------------


def test_errors_of_the_worker_are_raised_as_they_are(tmp_path):
    path = mlp(tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match="expected 32 in dimension 1"):
        latency(path, noise(1, 31))
    with pytest.raises(ArtifactError, match=r"There is no file .*b\.onnx"):
        memory(tmp_path / "b.onnx", noise(1, 32))
    with pytest.raises(SpecError, match="did you mean 'onnxruntime'"):
        latency(path, noise(1, 32), "onnxruntim")
    with pytest.raises(TargetError, match="threads is 0"):
        latency(path, noise(1, 32), threads=0)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(MeasureError, match="positive number of seconds"):
            latency(path, noise(1, 32), seconds=seconds)


def test_a_missing_runtime_is_told(tmp_path, monkeypatch):
    """The worker finds an openvino that does not load, as with a missing system library."""
    package = tmp_path / "bad"
    package.mkdir()
    (package / "openvino.py").write_text("raise ImportError('libtbb.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(package))
    with pytest.raises(RuntimeMissing, match=r"libtbb.*pip install"):
        latency(mlp(tmp_path / "a.onnx"), noise(1, 32), "openvino")


def test_a_worker_with_torch_in_it_is_refused(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import torch")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MeasureError, match="has imported torch"):
        ask("memory", [mlp(tmp_path / "a.onnx")], noise(1, 32), "onnxruntime", 1, runs=1)


def workers(parent: int) -> list[int]:
    """The worker processes that ``parent`` has started and that live."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                if b"downsize.measure.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
            except OSError:
                continue
    return found


def wait_for_worker(parent: int) -> int:
    while not (found := workers(parent)):
        time.sleep(0.02)
    return found[0]


@linux
@pytest.mark.parametrize(("number", "words"), [(signal.SIGSEGV, r"SIGSEGV\. .*Segmentation fault"), (signal.SIGKILL, r"SIGKILL: .*out of memory")])
def test_a_worker_that_dies_is_told_with_its_last_words(tmp_path, number, words):
    """The signals are those of a crash inside a runtime and of a system without memory."""
    path, caught = mlp(tmp_path / "a.onnx"), []

    def measure() -> None:
        try:
            ask("energy", [path], noise(1, 32), "onnxruntime", 1, seconds=600.0)
        except DownsizeError as error:
            caught.append(error)

    thread = threading.Thread(target=measure)
    thread.start()
    worker = wait_for_worker(os.getpid())
    while b"onnxruntime" not in Path(f"/proc/{worker}/maps").read_bytes():
        time.sleep(0.02)
    os.kill(worker, number)
    thread.join()
    with pytest.raises(MeasureError, match=rf"measures energy of .*a\.onnx in onnxruntime was ended by {words}"):
        raise caught[0]


def test_how_a_process_ended():
    assert death(3) == "ended with exit code 3 and no answer"
    assert death(-11) == "was ended by SIGSEGV"
    assert death(-64) in ("was ended by SIGRTMAX", "was ended by signal 64")


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_the_worker_ends_with_its_parent(tmp_path, number):
    code = """
import signal, sys, numpy
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
from downsize.measure import memory
from downsize.measure.process import ask
ask("energy", [sys.argv[1]], numpy.ones((1, 32), "float32"), "onnxruntime", 1, seconds=600.0)
"""
    command = [sys.executable, "-c", code, str(mlp(tmp_path / "a.onnx"))]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    worker = wait_for_worker(parent.pid)
    while b"onnxruntime" not in Path(f"/proc/{worker}/maps").read_bytes():
        time.sleep(0.02)
    parent.send_signal(number)
    errors = parent.communicate()[1]
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    while Path(f"/proc/{worker}").exists() and "(zombie)" not in Path(f"/proc/{worker}/status").read_text():
        time.sleep(0.02)


def test_modules_of_the_current_folder_are_not_imported(tmp_path, monkeypatch):
    """A user's folder may hold a file called like a package that the worker needs."""
    (tmp_path / "numpy.py").write_text("raise RuntimeError('the wrong numpy')")
    path = mlp(tmp_path / "a.onnx")
    monkeypatch.chdir(tmp_path)
    answer = ask("memory", [path.name], noise(1, 32), "onnxruntime", 1, runs=1)
    assert answer["peak"] > 0
