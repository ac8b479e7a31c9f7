"""Energy of one call: from the machine's own meter where it has one, else modelled from the work, and then called so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import MeasureError, nearest
from ..facts import Artifact, Measurement
from .host import host
from .process import ask, label

POWERCAP = Path("/sys/class/powercap")

# M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014: 45 nm, 0.9 V. Joules of one multiplication and
# one addition; products of 8-bit integers are added up in 32 bits.
JOULES_PER_MAC = {"float32": 3.7e-12 + 0.9e-12, "float16": 1.1e-12 + 0.4e-12, "int8": 0.2e-12 + 0.1e-12}
JOULES_PER_BYTE = (1.3e-9 / 8, 2.6e-9 / 8)  # of DRAM, low and high: 1.3 to 2.6 nJ for 64 bits

Meters = dict[str, tuple[int, int]]


def energy(
    macs: int | Mapping[str, int],
    bytes_read: int,
    path: str | Path | None = None,
    inputs: Any = None,
    runtime: str = "onnxruntime",
    threads: int = 1,
    seconds: float = 2.0,
) -> Measurement:
    """Joules of one call.

    Where the machine has a meter that may be read (RAPL) and a file is given, the file is run for ``seconds`` and the energy of the
    whole processor package is divided by the number of calls. Otherwise it is modelled by :func:`modelled_energy` and marked so.

    Args:
        macs: multiply-accumulates of the call, by the type of their operands; a single number means float32.
        bytes_read: bytes that come from main memory in the call, at the least those of the weights.
        path, inputs, runtime, threads: the file and how to run it, as for latency.

    Raises:
        MeasureError: an unknown type, a negative number, or the process that ran the file died.
        ArtifactError, SpecError, RuntimeMissing: the file cannot be run on the inputs.
    """
    modelled = modelled_energy(macs, bytes_read)
    sha256 = None if path is None else Artifact.of(path, runtime).sha256
    if path is None or not read_meters():
        why = "no file was given to run" if path is None else "this machine has no energy meter that may be read"
        return replace(modelled, sha256=sha256, note=f"{modelled.note}; {why}")
    answer = ask("energy", [path], inputs, runtime, threads, seconds=seconds)
    note = f"RAPL, all processor packages over {answer['seconds']:.1f} s, idle power and other programs included"
    value, runs = answer["joules"] / answer["runs"], answer["runs"]
    return Measurement("energy", value, "joules", samples=runs, sha256=sha256, host=host(), runtime=label(runtime), note=note)


def modelled_energy(macs: int | Mapping[str, int], bytes_read: int) -> Measurement:
    """Joules of arithmetic and of reading main memory, by the figures of Horowitz (ISSCC 2014) for a 45 nm chip.

    It leaves out caches, control and leakage, and today's chips need a fraction of it: use it to compare files, not as a number of watts.

    Raises:
        MeasureError: an unknown type of operand or a negative number.
    """
    by_type = macs if isinstance(macs, Mapping) else {"float32": macs}
    for dtype, count in by_type.items():
        if dtype not in JOULES_PER_MAC:
            raise MeasureError(f"There is no energy figure for multiply-accumulates of {dtype!r}; {nearest(dtype, JOULES_PER_MAC)}")
        if count < 0:
            raise MeasureError(f"The number of {dtype} multiply-accumulates is {count}; expected at least 0.")
    if bytes_read < 0:
        raise MeasureError(f"bytes_read is {bytes_read}; expected at least 0.")
    arithmetic = sum(JOULES_PER_MAC[dtype] * count for dtype, count in by_type.items())
    low, high = (per_byte * bytes_read for per_byte in JOULES_PER_BYTE)
    note = (
        f"Horowitz, ISSCC 2014, 45 nm: {arithmetic:.3g} J of arithmetic, {low:.3g} to {high:.3g} J (taken: the middle) to read "
        f"{bytes_read} bytes of DRAM once"
    )
    return Measurement("energy", arithmetic + (low + high) / 2, "joules", kind="modelled", note=note)


def read_meters(folder: Path = POWERCAP) -> Meters:
    """The energy counters of all processor packages: {name: (microjoules, the value after which it starts again at 0)}.

    Empty where there is none, or where only the administrator may read them.
    """
    meters: Meters = {}
    try:
        # intel-rapl:0 is a package (AMD's too); intel-rapl:0:1 is a part of it and intel-rapl-mmio:0 the same once more.
        for package in sorted(folder.iterdir()):
            if re.fullmatch(r"intel-rapl:\d+", package.name) and (package / "name").read_text().startswith("package"):
                counts = [int((package / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")]
                meters[package.name] = (counts[0], counts[1])
    except (OSError, ValueError):
        return {}
    return meters


def joules(before: Meters, after: Meters) -> float:
    """Joules between two readings less than one turn of the counters apart."""
    total = 0
    for name, (start, _) in before.items():
        end, turn = after[name]
        total += end - start if end >= start else end + turn - start
    return total * 1e-6
