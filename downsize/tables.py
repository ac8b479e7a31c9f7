"""What the command line prints: tables of attempts, layers, measurements and runtimes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from .facts import Agreement, Attempt, Measurement, Report, Verdict
from .target import show

if TYPE_CHECKING:
    from .inspection import Inspection, Layer
    from .quantization.diagnosis import Sensitivity
    from .runtimes import Runtime

GRIDS = ("QuantizeLinear", "DequantizeLinear")  # they are fused away; shown only where a layer has nothing else


def result_text(report: Report) -> Group:
    """All attempts with their numbers, why each was taken or not, and the verdict."""
    rows = [report.baseline, *report.attempts]
    table = Table("", Column("file", overflow="fold"), "size", "latency", "ratio (95 %)", "drop (95 %)", "agreement", box=box.SIMPLE)
    for row in rows:
        numbers = row.measurements
        cells = [_value(numbers, "size"), _value(numbers, "latency"), _with_interval(numbers, "latency_ratio"), _with_interval(numbers, "drop")]
        table.add_row("*" if row.taken else "", row.name, *cells, _agreement(row), style="bold" if row.taken else None)
    reasons = [Text(f"{'*' if row.taken else ' '} {row.name}: {row.reason}") for row in rows]
    return Group(table, *reasons, Text(), verdict_text(report.verdict), Text(f"chosen: {report.chosen}"))


def verdict_text(verdict: Verdict) -> Text:
    """The verdict, green or red."""
    return Text(f"verdict: {verdict}", style="green" if verdict.met else "red")


def _value(numbers: Mapping[str, Measurement], name: str) -> str:
    return _plain(numbers[name].value, numbers[name].unit) if name in numbers else "-"


def _plain(value: float, unit: str) -> str:
    """A value without the last rounding errors: a fraction of 1e-12 is 0 %."""
    return show(round(value, 7) if unit == "fraction" else value, unit)


def _with_interval(numbers: Mapping[str, Measurement], name: str) -> str:
    if name not in numbers:
        return "-"
    found = numbers[name]
    bounds = "" if found.low is None or found.high is None else f" ({_plain(found.low, found.unit)} to {_plain(found.high, found.unit)})"
    return _plain(found.value, found.unit) + bounds


def _agreement(row: Attempt) -> str:
    if row.agreement is None:
        return "-"
    top1 = [] if row.agreement.top1 is None else [f"top-1 {show(row.agreement.top1, 'fraction')}"]
    return ", ".join([*top1, f"error {row.agreement.relative_error:.3g}"])


def measurement_table(found: Mapping[str, Measurement], agreement: Agreement | None) -> RenderableType:
    """Measurements one below the other, with their intervals, samples and notes; and the agreement with the original model."""
    table = Table("what", "value", "95 % interval", "samples", "kind", "note", box=box.SIMPLE)
    for name, item in found.items():
        bounds = "" if item.low is None or item.high is None else f"{show(item.low, item.unit)} to {show(item.high, item.unit)}"
        table.add_row(name, show(item.value, item.unit), bounds, str(item.samples), item.kind, item.note or "")
    if agreement is None:
        return table
    names = ("samples", "top1", "relative_error", "cosine", "kl")
    rows = [f"{name} {getattr(agreement, name):.4g}" for name in names if getattr(agreement, name) is not None]
    return Group(table, Text("agreement with the original: " + ", ".join(rows)))


def runtime_table(runtimes: Iterable[Runtime]) -> RenderableType:
    """The runtimes: version, file suffix, or why one cannot be used."""
    table = Table("runtime", "file", "here", box=box.SIMPLE)
    for runtime in runtimes:
        missing = runtime.missing()
        table.add_row(runtime.name, f"*{runtime.suffix}", runtime.version() if missing is None else Text(f"missing: {missing}", style="red"))
    return table


def inspection_table(found: Inspection) -> Group:
    """One row for each layer, the sum, and what was not counted."""
    seconds = sum(layer.seconds or 0.0 for layer in found.layers)
    timed = f"ms ({found.where})" if found.where else "ms"
    table = Table("layer", "operators", box=box.SIMPLE)
    for name in ("parameters", "MACs", "bytes", timed, "% of time"):
        table.add_column(name, justify="right")
    for layer in found.layers:
        table.add_row(*_layer_cells(layer, seconds))
    macs = sum(layer.macs or 0 for layer in found.layers)
    total = [f"{sum(layer.parameters for layer in found.layers):,}", f"{macs:,}", f"{sum(layer.bytes for layer in found.layers):,}"]
    table.add_section()
    table.add_row("total", "", *total, f"{seconds * 1e3:.3f}" if found.where else "-", "", style="bold")
    lost = ", ".join(f"{name} ({times}x)" for name, times in found.not_counted.items())
    return Group(
        table,
        Text(f"{macs:,} MACs = {2 * macs:,} FLOPs; operators without a count: {lost or 'none'}"),
        *([Text("A layer that the runtime has fused into its neighbour has no time of its own.")] if found.where else []),
    )


def _layer_cells(layer: Layer, seconds: float) -> list[str]:
    macs = "-" if layer.macs is None else f"{layer.macs:,}"
    time, share = ("-", "") if layer.seconds is None else (f"{layer.seconds * 1e3:.3f}", f"{layer.seconds / seconds:.1%}" if seconds else "")
    operators = [name for name in layer.operators if name not in GRIDS] or layer.operators
    return [layer.module, ", ".join(operators), f"{layer.parameters:,}", macs, f"{layer.bytes:,}", time, share]


def sensitivity_table(found: Iterable[Sensitivity]) -> Group:
    """One row for each weight: what the layer and what the outputs lose at each width; and below the reasons of large losses."""
    rows = list(found)
    widths = list(rows[0].loss) if rows else []
    inputs = list(next((row.inputs for row in rows if row.inputs), {}))
    table = Table("weight", "operator", box=box.SIMPLE)
    for name in (*(f"net {bits}b" for bits in widths), *(f"layer {bits}b" for bits in widths), *(f"input {bits}b" for bits in inputs)):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = [row.loss.get(bits) for bits in widths] + [row.output.get(bits) for bits in widths] + [row.inputs.get(bits) for bits in inputs]
        table.add_row(row.weight, row.operator, *("-" if number is None else f"{number:.2g}" for number in numbers))
    reasons = [Text(f"{row.weight}: {reason}") for row in rows for reason in row.reasons]
    told = "What is lost, as a part of the squares: by the outputs of the net, and of the layer, with one weight, or one input, in fewer bits."
    return Group(table, Text(told), *reasons)
