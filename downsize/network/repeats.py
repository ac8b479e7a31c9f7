"""What a graph computes more than once, it computes once."""

from __future__ import annotations

import torch
from torch import fx

from .memory import is_written, writes

aten = torch.ops.aten
# torch counts these among the random operators; they are only where they drop: the place of that number among their arguments.
DROPS = {
    aten.scaled_dot_product_attention.default: 4,
    **dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), 5),
}


def merge_repeats(graph: fx.Graph) -> None:
    """Let readers of equal calls (the same operator, the same arguments) all read the first one, in place; the others stand unread.

    Calls that draw random numbers, now or when training switches them on, stay as they are, and so does what an operator writes into.
    A batch norm that is called twice on one input moves its statistics once a step from then on: nearer to their old value, to the same end.
    """
    written = any(writes(node) for node in graph.nodes)
    first: dict[tuple[object, ...], fx.Node] = {}
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_function") or _is_random(node):
            continue
        if written and any(map(is_written, (node, *node.all_input_nodes))):
            continue
        # The text of a node is its name, and tells 1, 1.0 and True apart.
        kept = first.setdefault((node.target, repr(node.args), repr(sorted(node.kwargs.items()))), node)
        if kept is not node:
            node.replace_all_uses_with(kept)


def _is_random(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    place = DROPS.get(node.target)  # type: ignore[arg-type]
    return place is None or bool(len(node.args) > place and node.args[place]) or bool(node.kwargs.get("dropout_p"))
