"""The results as tables, on the screen and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods import METHODS
from models import SUBJECTS
from rich import box
from rich.table import Table

Row = dict[str, Any]


@dataclass(frozen=True)
class Cells:
    """A table of text; ``notes`` are told below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def tables(results: Row) -> list[Cells]:
    """Three tables for every model: the files, what making them cost, and downsize's latency against each peer's."""
    found = []
    for model, subject in SUBJECTS.items():
        rows = [row for row in results["rows"] if row["model"] == model]
        if rows:
            weights = f"{subject.name}, {rows[0]['weight_bytes'] / 1e6:.1f} MB of float weights"
            found += [files(rows, weights, subject.scores), makings(rows, f"{subject.name}: making the files"), against(rows, subject.name)]
    return [table for table in found if table.rows]


def files(rows: list[Row], title: str, scores: bool) -> Cells:
    roles = list(next((row["quality"] for row in rows if "quality" in row), {}))
    names = ["top-1", "rel. error", "KL"] if scores else ["cosine", "rel. error"]
    header = ["method", "MB", *(f"{name}, {role}" for role in roles for name in names), "speed ONNX Runtime", "speed OpenVINO"]
    lines, notes = [], []
    for row in rows:
        name = METHODS[row["method"]].name
        if "error" in row:
            lines.append([name, "failed", *[""] * (len(header) - 2)])
            notes.append(f"{name} failed: {row['error']}")
            continue
        if row["making"].get("note"):
            notes.append(f"{name}: {row['making']['note']}")
        notes += [f"{name} in OpenVINO: {text}" for text in openvino_differs(row, scores)]
        quality = [cell for role in roles for cell in quality_cells(row["quality"][role]["onnxruntime"], scores)]
        speeds = [speed(row.get("latency", {}), runtime) for runtime in ("onnxruntime", "openvino")]
        lines.append([name, f"{row['bytes'] / 1e6:.2f}", *quality, *speeds])
    return Cells(title, header, lines, notes)


def quality_cells(quality: Row, scores: bool) -> list[str]:
    if "error" in quality:
        return ["error", "", ""] if scores else ["error", ""]
    error = f"{quality['relative_error']:.3g}"
    if scores:
        return [f"{quality['top1']:.3f}", error, f"{quality['kl']:.3g}"]
    return [f"{quality['cosine']:.4f}", error]


def openvino_differs(row: Row, scores: bool) -> list[str]:
    """What is to be told of the file's answers in OpenVINO: an error, or answers that are further from the original by a tenth."""
    texts = []
    for role, found in row["quality"].items():
        one, other = found["onnxruntime"], found["openvino"]
        if "error" in other:
            texts.append(f"{role}: {other['error']}")
        elif "error" not in one and other["relative_error"] > 1.1 * one["relative_error"] + 1e-3:
            texts.append(f"{role}: {', '.join(quality_cells(other, scores))} ({'top-1, rel. error, KL' if scores else 'cosine, rel. error'})")
    return texts


def speed(latency: Row, runtime: str) -> str:
    """How many times as fast as the float file, with the 95 % interval."""
    found = latency.get(runtime, {})
    if "latency_ratio" not in found:
        return "error" if "error" in found else "-"
    ratio = found["latency_ratio"]
    bounds = "" if ratio["low"] is None else f" ({1 / ratio['high']:.2f} to {1 / ratio['low']:.2f})"
    return f"{1 / ratio['value']:.2f}x{bounds}"


def makings(rows: list[Row], title: str) -> Cells:
    lines = []
    for row in rows:
        if "error" not in row:
            making = row["making"]
            times = [f"{making[name]:.1f}" for name in ("seconds", "cpu_seconds")]
            peak = [f"{making['peak_bytes'] / 1e6:.0f}", f"{making['peak_bytes'] / making['weight_bytes']:.1f}x", f"{making['load_before']:.1f}"]
            lines.append([METHODS[row["method"]].name, *times, *peak])
    forward = next((making["forward_bytes"] / making["weight_bytes"] for row in rows if "forward_bytes" in (making := row["making"])), None)
    notes = [] if forward is None else [f"the torch model itself, run on one sample, takes {forward:.1f}x of the weights"]
    return Cells(title, ["method", "seconds", "CPU seconds", "peak MB", "of the weights", "load before"], lines, notes)


def against(rows: list[Row], name: str) -> Cells:
    header = ["beside", "time in ONNX Runtime", "time in OpenVINO"]
    lines = []
    for row in rows:
        if "ours_against_it" in row:
            lines.append([METHODS[row["method"]].name, *(share(row["ours_against_it"][runtime]) for runtime in ("onnxruntime", "openvino"))])
    return Cells(f"{name}: time of downsize's file as a share of the peer's, run in turn (below 1: downsize is faster)", header, lines, [])


def share(found: Row) -> str:
    if "error" in found:
        return "error"
    ratio = found["latency_ratio"]
    return f"{ratio['value']:.2f}" + ("" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})")


def to_rich(table: Cells) -> Table:
    shown = Table(*table.header, title=table.title, caption="\n".join(table.notes) or None, box=box.SIMPLE)
    shown.title_justify = shown.caption_justify = "left"
    for row in table.rows:
        shown.add_row(*row)
    return shown


def markdown(table: Cells) -> str:
    lines = [f"**{table.title}**", "", f"| {' | '.join(table.header)} |", "|---" * len(table.header) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join([*lines, *(["", *(f"- {note}" for note in table.notes)] if table.notes else [])])
