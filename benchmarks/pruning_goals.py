"""The numbers that downsize is to reach without training, and what was reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pruning_methods import BASELINE, METHODS, OURS
from pruning_models import SUBJECTS, Amount
from tables import Cells

Row = dict[str, Any]
PEER = "torch-pruning"  # what the names of its methods begin with
OTHER_TEXTS = ("licences", "descriptions")
TWO_THIRDS = 1 / 1.5
SPEED = "speed-up / ratio of MACs"


@dataclass(frozen=True)
class Goal:
    """``figure``, in the worst of the ``roles`` (data, or runtimes), is to be at least ``least``.

    With ``below_dense``: at least the dense network's figure less that.
    """

    model: str
    amount: Amount
    figure: str
    roles: tuple[str, ...]
    least: float = 0.0
    below_dense: float | None = None

    def value(self, row: Row, dense: Row) -> float | None:
        """What the row reached; None where there is nothing."""
        if "error" in row:
            return None
        if self.figure == SPEED:
            found = [row.get("latency", {}).get(runtime, {}).get("latency_ratio") for runtime in self.roles]
            fewer = dense["making"]["macs"] / row["making"]["macs"]
            return None if None in found else min(1 / ratio["value"] for ratio in found) / fewer
        qualities = [row["quality"][role] for role in self.roles]
        return min(quality[self.figure] for quality in qualities) if all(self.figure in quality for quality in qualities) else None


GOALS = (
    Goal("lenet", Amount("ratio", 0.25), "top-1", ("test",), 0.86),
    Goal("small-resnet", Amount("macs", 0.5), "top-1", ("test",), below_dense=0.015),
    Goal("lite0", Amount("macs", 0.9), "agreement", ("validate",), 0.82),
    Goal("lite0", Amount("macs", 0.75), "agreement", ("validate",), 0.48),
    Goal("minilm", Amount("macs", TWO_THIRDS), "cosine", ("held",), 0.95),
    Goal("minilm", Amount("macs", TWO_THIRDS), "cosine", OTHER_TEXTS, 0.87),
    Goal("minilm", Amount("macs", 0.5), "cosine", ("held",), 0.91),
    Goal("minilm", Amount("macs", 0.5), "cosine", OTHER_TEXTS, 0.79),
    Goal("minilm", Amount("layers", 0.5), "cosine", ("held",), 0.88),
    Goal("minilm", Amount("layers", 0.5), "cosine", OTHER_TEXTS, 0.72),
    Goal("resnet18", Amount("ratio", 0.5), SPEED, ("onnxruntime", "openvino"), 0.9),
)


def goals(rows: list[Row]) -> Cells:
    """Each goal beside what downsize reached and the best of Torch-Pruning's methods."""
    lines = [line for goal in GOALS if (line := judged(goal, rows))]
    return Cells("numbers to reach", ["model", "asked for", "figure", "at least", "downsize", "", "best of Torch-Pruning"], lines, [])


def judged(goal: Goal, rows: list[Row]) -> list[str] | None:
    mine = [row for row in rows if row["model"] == goal.model]
    dense = next((row for row in mine if row["method"] == BASELINE and "error" not in row), None)
    if dense is None:
        return None
    asked = [row for row in mine if (row["kind"], row["left"]) == (goal.amount.kind, goal.amount.left) and row is not dense]
    found = {row["method"]: value for row in asked if (value := goal.value(row, dense)) is not None}
    if not found:
        return None
    least = goal.least if goal.below_dense is None else (goal.value(dense, dense) or 0.0) - goal.below_dense
    reached = [f"{found[OURS]:.4f}", "met" if found[OURS] >= least else "missed"] if OURS in found else ["", "not made"]
    peers = [(value, METHODS[method].name) for method, value in found.items() if method.startswith(PEER)]
    best = "{:.4f} ({})".format(*max(peers)) if peers else ""
    return [SUBJECTS[goal.model].name, str(goal.amount), f"{goal.figure}, {' and '.join(goal.roles)}", f"{least:.4f}", *reached, best]
