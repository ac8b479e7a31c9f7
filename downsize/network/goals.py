"""What each layer of a compressed network should give: which value of the original, less which values of its own network."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, fx

from .columns import MATRIX_LAYERS, can_unfold, channel_axis
from .dry import shapes
from .network import Network
from .rewrite import IDENTITIES, argument, aten, constant, only_user, set_constant

DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)


@dataclass(frozen=True)
class Goal:
    """The student's ``layer`` should give ``target``, a value of the teacher, its channels ``rows`` (None: all), less the student's
    ``others``. ``reason``, unless empty, says why it cannot be refitted; the rest then means nothing."""

    layer: fx.Node
    target: fx.Node
    others: tuple[fx.Node, ...] = ()
    rows: Tensor | None = None
    form: Literal["output", "sum", "span"] = "output"
    reason: str = ""


class Link(NamedTuple):
    """A node that a layer's output comes to, having met ``others`` in sums on the way."""

    node: fx.Node
    others: tuple[fx.Node, ...]


def goals_of(
    teacher: Network, student: Network, layers: Sequence[str] | None, rows: Mapping[str, Tensor], spans: Mapping[str, fx.Node]
) -> list[Goal]:
    """The goals of the student's layers of these names (None: of all that can be refitted), in the graph's order.

    Each target comes, in the teacher, before the targets of later layers. ``spans``: what nodes of the student should give.

    Raises:
        ValueError: a layer that is not in the student.
    """
    pair = _Pair(teacher, student, rows, spans)
    nodes = {node.name: node for node in student.graph.nodes}
    if unknown := sorted({*(layers or ()), *rows} - nodes.keys()):
        raise ValueError(f"{unknown[0]} is no node of the student; expected names of its layers.")
    chosen = [node for name, node in nodes.items() if (name in layers if layers is not None else not pair.reason(node))]
    found: list[Goal] = []
    limit = len(pair.teacher_rank)
    for layer in reversed(chosen):
        reason = pair.reason(layer)
        goal = pair.goal(layer, limit) if not reason else Goal(layer, layer, reason=reason)
        found.append(goal)
        limit = limit if goal.reason else min(limit, pair.teacher_rank[pair.twins[layer.name]])
    return found[::-1]


def links(layer: fx.Node) -> Iterator[Link]:
    """The layer, and what its output, alone or in sums, goes into and nothing else does."""
    node, others = layer, ()
    while node is not None:
        yield Link(node, others)
        before, node = node, only_user(node)
        if node is None or (node.target in IDENTITIES and not (node.target in DROPOUTS and argument(node, 2, "train"))):
            continue
        summands = [summand for summand in node.args[:2] if summand is not before] if node.target is aten.add.Tensor else []
        if len(summands) != 1 or not isinstance(summands[0], fx.Node) or node.kwargs.get("alpha", 1) != 1:
            return
        others = (*others, summands[0])


def resolve_spans(teacher: Network, student: Network, spans: Mapping[str, str]) -> dict[str, fx.Node]:
    """From the student's nodes, by name, to the teacher's whose values they should give.

    Where both are layer norms, from the input of one to that of the other; the student's norm takes the teacher's gain and shift.

    Raises:
        ValueError: a name that is not there.
    """
    here, there = ({node.name: node for node in network.graph.nodes} for network in (student, teacher))
    found = {}
    for name, other in spans.items():
        if name not in here or other not in there:
            raise ValueError(f"the span from {name} to {other} is not there; expected a node of the student and one of the teacher.")
        one, two = here[name], there[other]
        if one.target is two.target is aten.layer_norm.default and _take_affine(student, one, teacher, two):
            one, two = one.args[0], two.args[0]
        found[one.name] = two
    return found


def _take_affine(student: Network, one: fx.Node, teacher: Network, two: fx.Node) -> bool:
    """Give one layer norm the other's gain and shift; False, and nothing done, where that cannot make the two alike."""
    mine, theirs = (node.args[2:4] for node in (one, two))
    tensors = [(constant(student, a), constant(teacher, b)) for a, b in zip(mine, theirs, strict=False)]
    alike = len(mine) == len(theirs) and all(a is not None and b is not None and a.shape == b.shape for a, b in tensors)
    if not alike or argument(one, 4, "eps", 1e-5) != argument(two, 4, "eps", 1e-5) or any(len(node.users) > 1 for node in mine):
        return False
    for node, (_, tensor) in zip(mine, tensors, strict=True):
        set_constant(student, node, tensor.detach())
    return True


class _Pair:
    """Teacher and student, and what is known of their nodes."""

    def __init__(self, teacher: Network, student: Network, rows: Mapping[str, Tensor], spans: Mapping[str, fx.Node]) -> None:
        self.student, self.rows, self.spans = student, rows, spans
        self.twins = {node.name: node for node in teacher.graph.nodes}
        self.teacher_rank, self.rank = ({node: i for i, node in enumerate(network.graph.nodes)} for network in (teacher, student))
        self.teacher_shapes, self.shapes = shapes(teacher), shapes(student)
        self.readings = [id(constant(student, node)) for node in student.graph.nodes if node.op == "get_attr"]

    def reason(self, layer: fx.Node) -> str:
        """Why a node is no layer that can be refitted; empty where it is one."""
        if layer.target not in MATRIX_LAYERS:
            return "it is neither a linear layer nor a convolution"
        weight, bias = layer.args[1], argument(layer, 2, "bias")
        if constant(self.student, weight) is None or (bias is not None and constant(self.student, bias) is None):
            return "its weight or bias is computed"
        if len(weight.users) > 1 or self.readings.count(id(constant(self.student, weight))) > 1:
            return "others read its weight too"
        if not can_unfold(layer):
            return "its sizes are computed"
        twin = self.twins.get(layer.name)
        return "" if twin is not None and twin.target is layer.target else "the teacher has no such layer"

    def goal(self, layer: fx.Node, limit: int) -> Goal:
        """The furthest value that the layer can be fitted to, among those that the teacher computes before the node of rank ``limit``."""
        twin, rows = self.twins[layer.name], self.rows.get(layer.name)
        sums = {link.node.name for link in links(twin) if link.others}
        reason = "" if self._fits(layer, twin) else "its outputs are not the teacher's: say which rows they are"
        goal = Goal(layer, twin, (), rows, reason=reason)
        if self.teacher_rank[twin] >= limit:
            return Goal(layer, twin, reason="the teacher computes its layers in another order")
        for node, others in links(layer):
            known = all(other.op == "get_attr" or self.rank[other] < self.rank[layer] for other in others)
            if not known or self.shapes[node] != self.shapes[layer]:
                break
            target = self.spans.get(node.name) or self.twins.get(node.name)
            spanned = node.name in self.spans
            if (spanned or (others and node.name in sums)) and self._fits(layer, target) and self.teacher_rank[target] < limit:
                goal = Goal(layer, target, others, rows, "span" if spanned else "sum")
        return goal

    def _fits(self, layer: fx.Node, target: fx.Node) -> bool:
        """Whether the chosen channels of the teacher's value have the shape of the layer's output."""
        wanted, given = self.shapes[layer], list(self.teacher_shapes.get(target, ()))
        rows = self.rows.get(layer.name)
        if len(given) == len(wanted) and rows is not None:
            given[channel_axis(layer, len(given))] = len(rows)
        return tuple(given) == wanted
