"""What is known of the machine, and of the energy that a call takes on it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_files import mlp

from downsize.errors import MeasureError
from downsize.facts import Artifact
from downsize.measure import energy, host
from downsize.measure.energy import joules, modelled_energy, read_meters
from downsize.measure.host import allowed_cpus, choose_cpus
from downsize.measure.process import ask, label

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


# The machine ----------------------------------------------------------------------------------------------------------------------


@linux
def test_host():
    here, text = host(), Path("/proc/cpuinfo").read_text()
    words = set(text.split())
    assert set(here.features) <= words
    expected = {"avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "fma", "sve"} & words
    assert expected <= set(here.features)
    assert "smep" not in here.features and here.cpu in (text if "model name" in text else here.cpu)
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert abs(here.memory_bytes - total) < 0.1 * total
    assert here.cores == len(os.sched_getaffinity(0)) and here.python == ".".join(map(str, sys.version_info[:3]))


def test_cpus_are_chosen_idle_first_and_one_per_core():
    def siblings(cpu: int) -> set[int]:
        return {cpu % 4, cpu % 4 + 4}  # four cores with two CPUs each: 0 and 4, 1 and 5, ...

    busy = {0: 90, 1: 5, 2: 50, 3: 1, 4: 0, 5: 2, 6: 60, 7: 70}
    allowed = list(range(8))
    assert choose_cpus(allowed, 1, busy, siblings) == [4]
    assert choose_cpus(allowed, 3, busy, siblings) == [3, 4, 5]  # 5 is less busy than 1, and 1 is on its core
    assert choose_cpus(allowed, 5, busy, siblings) == [1, 2, 3, 4, 5]  # the four cores, then the least busy of the rest
    assert choose_cpus([6, 7], 4, busy, siblings) == [6, 7]
    assert choose_cpus([2, 6], 2, {}, siblings) == [2, 6]


@linux
def test_the_worker_is_kept_to_as_many_cpus_as_threads(tmp_path):
    before = os.sched_getaffinity(0)
    for threads in (1, len(before)):
        answer = ask("memory", [], noise(1, 32), "onnxruntime", threads, runs=1)
        assert len(answer["cpus"]) == threads and set(answer["cpus"]) <= set(allowed_cpus())
    assert os.sched_getaffinity(0) == before


# Energy ---------------------------------------------------------------------------------------------------------------------------


def test_modelled_energy_by_hand():
    """Horowitz 2014: 3.7 + 0.9 pJ for a float32 product and sum, 0.2 + 0.1 pJ for int8 ones; 1.3 to 2.6 nJ for 8 bytes of DRAM."""
    found = energy(10**9, 8 * 10**6)
    assert (found.name, found.unit, found.kind) == ("energy", "joules", "modelled")
    assert found.value == pytest.approx(4.6e-3 + 1.95e-3)
    assert modelled_energy({"int8": 10**9, "float32": 10**6}, 0).value == pytest.approx(0.3e-3 + 4.6e-6)
    with pytest.raises(MeasureError, match=r"'int7'.*did you mean 'int8'"):
        energy({"int7": 1}, 0)
    with pytest.raises(MeasureError, match="is -1; expected at least 0"):
        energy(-1, 0)
    with pytest.raises(MeasureError, match="bytes_read is -2"):
        energy(0, -2)


def test_energy_of_a_file_is_metered_where_there_is_a_meter_and_says_so(tmp_path):
    path = mlp(tmp_path / "a.onnx")
    found = energy(3 * 32 * 32, path.stat().st_size, path, noise(1, 32), seconds=0.2)
    assert found.sha256 == Artifact.of(path, "").sha256 and found.value > 0
    if read_meters():
        assert found.kind == "measured" and "RAPL" in str(found.note) and found.runtime == label("onnxruntime")
    else:
        assert found.kind == "modelled" and "no energy meter" in str(found.note)


def powercap(folder: Path, **counters: dict[str, str]) -> Path:
    for meter, files in counters.items():
        (folder / meter).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / meter / name).write_text(text)
    return folder


def test_meters_are_the_packages_and_turn_over(tmp_path):
    package = {"name": "package-0\n", "energy_uj": "900\n", "max_energy_range_uj": "1000\n"}
    folder = powercap(
        tmp_path,
        **{
            "intel-rapl:0": package,
            "intel-rapl:1": package | {"name": "package-1\n", "energy_uj": "5\n"},
            "intel-rapl:0:0": package | {"name": "core\n"},
            "intel-rapl:2": package | {"name": "psys\n"},
            "intel-rapl-mmio:0": package,
        },
    )
    before = read_meters(folder)
    assert before == {"intel-rapl:0": (900, 1000), "intel-rapl:1": (5, 1000)}
    powercap(folder, **{"intel-rapl:0": {"energy_uj": "100\n"}, "intel-rapl:1": {"energy_uj": "55\n"}})
    assert joules(before, read_meters(folder)) == pytest.approx((200 + 50) * 1e-6)
    assert read_meters(tmp_path / "none") == {}
    powercap(folder, **{"intel-rapl:1": {"energy_uj": "hidden"}})
    assert read_meters(folder) == {}
