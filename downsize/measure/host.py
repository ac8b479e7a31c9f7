"""The machine: what it is, which of its CPUs to measure on, and how much memory this process has used."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..facts import Host
from ..processor import processor


class MemoryUse(NamedTuple):
    """Bytes of memory a process has in use, the most it ever had, and where the numbers come from."""

    resident: int
    peak: int
    source: str


@cache
def host() -> Host:
    """This machine. ``cores`` counts the CPUs this process may use."""
    name, features = processor()
    return Host(
        cpu=name,
        features=features,
        cores=len(allowed_cpus()),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
    )


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def memory_use() -> MemoryUse:
    """How much memory this process uses and has used.

    On Linux from /proc/self/status: VmHWM belongs to the program, whereas the peak that getrusage gives is inherited from the process
    that started it, and would be that of a parent with torch. Elsewhere getrusage is all there is.
    """
    try:
        status = Path("/proc/self/status").read_text()
        resident, peak = (int(re.findall(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return MemoryUse(resident, peak, "VmHWM of /proc/self/status")
    except (OSError, IndexError):
        import resource  # there is none on Windows, where measuring memory is not offered

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return MemoryUse(most, most, "ru_maxrss of getrusage")


def allowed_cpus() -> list[int]:
    """The numbers of the CPUs that this process may run on."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin(threads: int) -> list[int]:
    """Keep this process to ``threads`` CPUs, one per physical core as far as they go, those least busy just now; returns them.

    All the allowed ones when there are not enough; an empty list where a process cannot be kept to CPUs (only Linux can).
    """
    if sys.platform != "linux":
        return []
    before = _busy()
    time.sleep(0.1)
    after = _busy()
    chosen = choose_cpus(allowed_cpus(), threads, {cpu: after[cpu] - before.get(cpu, 0) for cpu in after}, _siblings)
    os.sched_setaffinity(0, chosen)
    return chosen


def choose_cpus(allowed: Sequence[int], threads: int, busy: dict[int, int], siblings=None) -> list[int]:
    """``threads`` of the ``allowed`` CPUs: first those on different physical cores, among these the least busy."""
    by_load = sorted(allowed, key=lambda cpu: (busy.get(cpu, 0), cpu))
    first: list[int] = []
    second: list[int] = []
    for cpu in by_load:
        same_core = siblings(cpu) if siblings else {cpu}
        (second if same_core & set(first) else first).append(cpu)
    return sorted((first + second)[:threads])


def _busy() -> dict[int, int]:
    """Clock ticks that each CPU has spent on work since the machine started."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return {}
    busy = {}
    for line in lines:
        if match := re.match(r"cpu(\d+) (.*)", line):
            ticks = [int(tick) for tick in match[2].split()]
            busy[int(match[1])] = sum(ticks) - sum(ticks[3:5])  # the fourth and fifth are idle and waiting for a disk
    return busy


def _siblings(cpu: int) -> set[int]:
    """The CPUs on the same physical core."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return {cpu}
    ends = [part.split("-") for part in text.strip().split(",")]
    return {number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)}
