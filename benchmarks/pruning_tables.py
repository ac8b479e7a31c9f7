"""The pruning results as tables: one for every model, and what making the files took."""

from __future__ import annotations

from typing import Any

from pruning_goals import goals
from pruning_methods import BASELINE, METHODS
from pruning_models import SUBJECTS, Amount
from tables import Cells, speed

Row = dict[str, Any]
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def tables(results: Row) -> list[Cells]:
    found = []
    for model, subject in SUBJECTS.items():
        rows = [row for row in results["rows"] if row["model"] == model]
        if rows:
            found.append(files(rows, subject.name))
            if any("latency" in row for row in rows):
                found.append(speeds(rows, f"{subject.name}: speed, as a multiple of the dense file's"))
    return [table for table in (*found, goals(results["rows"]), makings(results["rows"])) if table.rows]


def amount(row: Row) -> str:
    return "all" if row["method"] == BASELINE else str(Amount(row["kind"], row["left"]))


def whole(rows: list[Row]) -> Row | None:
    return next((row["making"] for row in rows if row["method"] == BASELINE and "making" in row), None)


def files(rows: list[Row], name: str) -> Cells:
    """Sizes as shares of the dense network's; of the first data all figures, of others the first."""
    columns = quality_columns(rows)
    header = ["asked for", "method", "MACs", "of layers", "parameters", "MB", *(f"{figure}, {role}" for role, figure in columns)]
    dense, lines, notes = whole(rows), [], []
    for row in rows:
        method = METHODS[row["method"]].name
        if "error" in row:
            lines.append([amount(row), method, "failed", *[""] * (len(header) - 3)])
            notes.append(f"{method}, {amount(row)}: {row['error']}")
            continue
        sizes = [share(row["making"], dense, what) for what in ("macs", "layer_macs", "parameters")]
        cells = [cell(row["quality"][role], figure) for role, figure in columns]
        lines.append([amount(row), method, *sizes, f"{row['bytes'] / 1e6:.2f}", *cells])
    return Cells(name, header, lines, notes)


def quality_columns(rows: list[Row]) -> list[tuple[str, str]]:
    qualities = [row["quality"] for row in rows if "quality" in row]
    found: list[tuple[str, str]] = []
    for number, role in enumerate(qualities[0] if qualities else []):
        figures = next((list(quality[role]) for quality in qualities if "error" not in quality[role]), [])
        found += [(role, figure) for figure in (figures if number == 0 else figures[:1])]
    return found


def share(making: Row, dense: Row | None, what: str) -> str:
    return "" if dense is None else f"{making[what] / dense[what]:.3f}"


def cell(quality: Row, figure: str) -> str:
    return f"{quality[figure]:.4f}" if figure in quality else "error"


def speeds(rows: list[Row], title: str) -> Cells:
    """Measured speed-ups, and each as a share of what the MACs promise."""
    header = ["asked for", "method", "MACs fewer", *(text for name in RUNTIMES.values() for text in (name, "of the MACs'"))]
    dense, lines = whole(rows), []
    for row in rows:
        if "latency" in row and dense is not None:
            ratio = dense["macs"] / row["making"]["macs"]
            cells = [text for name in RUNTIMES for text in (speed(row["latency"], name), of_promised(row["latency"][name], ratio))]
            lines.append([amount(row), METHODS[row["method"]].name, f"{ratio:.2f}x", *cells])
    return Cells(title, header, lines, [])


def of_promised(found: Row, ratio: float) -> str:
    return "" if "error" in found else f"{1 / found['latency_ratio']['value'] / ratio:.2f}"


def makings(rows: list[Row]) -> Cells:
    header = ["model", "asked for", "method", "seconds", "CPU seconds", "added MB"]
    lines = []
    for row in rows:
        if "making" in row and row["method"] != BASELINE:
            making = row["making"]
            cells = [f"{making['seconds']:.1f}", f"{making['cpu_seconds']:.1f}", f"{making['added_bytes'] / 1e6:.0f}"]
            lines.append([row["model"], amount(row), METHODS[row["method"]].name, *cells])
    return Cells("making the networks", header, lines, [])
