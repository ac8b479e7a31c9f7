"""What can be taken out of a Network whole: residual branches and repeated layers, and the network without them.

A block is a region of the graph with one entry and one exit of the same shape and dtype; without it, everything that reads the exit reads
the entry. Other values (masks, rotary tables, position ids) may come in from the side, but nothing but the exit may leave.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

from torch import fx

from ..errors import SpecError, nearest
from .flow import SHAPE_READERS, Flow
from .network import Network
from .rewrite import IDENTITIES, argument, aten, only_user, reshape_views

SUMS = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device}
PASSED_ON = IDENTITIES | CASTS | {aten.contiguous.default}


@dataclass(frozen=True, eq=False)
class Block:
    """A region that can be taken out.

    ``kind``: ``branch``, what a sum adds to a value that runs past it, or ``layer``, one of the modules of a numbered list (with the
    sum it is added by, where it is such a branch itself), or one of several parts of the same form in a row. ``name``: the module's path,
    with the exit's name behind it where several blocks have that path.

    ``nodes``: what goes with it, in the graph's order, the exit and the readers of its tensors among them. ``macs`` (at the example's
    sizes) and ``parameters`` (elements) are theirs; a tensor or value that the rest of the network reads too does not go. ``aligned``:
    entry and exit lie in memory in the same way.
    """

    name: str
    kind: str
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    macs: int
    parameters: int
    aligned: bool

    def contains(self, other: Block) -> bool:
        """Whether the other goes with this one."""
        return set(other.nodes) <= set(self.nodes)

    def crosses(self, other: Block) -> bool:
        """Whether the two overlap and neither contains the other: then they cannot both be taken out."""
        mine, others = set(self.nodes), set(other.nodes)
        shared = {node for node in mine & others if node.op != "get_attr"}
        return bool(shared) and not mine <= others and not others <= mine


def blocks(network: Network) -> tuple[Block, ...]:
    """All that can be taken out, outer blocks before those in them; each computes products (blocks without MACs are not worth listing).

    A layer is found by the module paths of its nodes; where nodes have none, by a form that repeats between values that all data passes.
    """
    flow = Flow(network)
    branches = list(_branches(flow))
    layers = [_with_its_sum(layer, branches) for layer in _numbered(flow)]
    unique: dict[tuple[fx.Node, fx.Node], Block] = {}
    for block in [*layers, *_repeated(flow, branches), *branches]:
        other = unique.setdefault((block.entry, block.exit), block)
        # A list of one layer has the region of its only layer.
        if other.kind == block.kind == "layer" and len(block.name) > len(other.name):
            unique[block.entry, block.exit] = block
    place = flow.place
    return _named(sorted(unique.values(), key=lambda b: (place[b.entry], -place[b.exit])))


def bypass(network: Network, names: Iterable[str]) -> Network:
    """A fork without the blocks of these names (see :func:`blocks`), whose removal is noted in ``origin["bypassed"]``.

    Raises:
        SpecError: there is no block of a name, or two of them cross.
        NetworkFileError: what remains cannot run.
    """
    found = {block.name: block for block in blocks(network)}
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in found:
            raise SpecError(f"There is no block {name!r} to take out; {nearest(name, found)}")
    made = without(network, [found[name] for name in wanted])
    made.check()
    return made


def without(network: Network, removed: Sequence[Block]) -> Network:
    """A fork without these blocks of the network; nodes that remain keep their names.

    Raises:
        SpecError: two of them cross.
    """
    made = network.fork()
    twins = dict(zip(network.graph.nodes, made.graph.nodes, strict=True))
    order = {node: number for number, node in enumerate(network.graph.nodes)}
    removed = sorted(outermost(removed), key=lambda b: order[b.exit])
    gone = {node for block in removed for node in block.nodes}
    stands_for: dict[fx.Node, fx.Node] = {}
    for block in removed:
        # The exit of the block before may be this one's entry.
        entry = stands_for.get(block.entry, block.entry)
        stands_for[block.exit] = entry
        twins[block.exit].replace_all_uses_with(twins[entry])
        for node in block.nodes:
            for reader in [user for user in node.users if user.target in SHAPE_READERS and user not in gone]:
                twins[reader].replace_input_with(twins[node], twins[entry])
    for node in sorted(gone, key=order.__getitem__, reverse=True):
        if not twins[node].users:
            made.graph.erase_node(twins[node])
    if not all(block.aligned for block in removed):
        reshape_views(made)
    if removed:
        made.origin["bypassed"] = [*made.origin.get("bypassed", []), *(block.name for block in removed)]
    made.recompile()
    return made


def outermost(removed: Sequence[Block]) -> list[Block]:
    """The blocks that lie in no other of them.

    Raises:
        SpecError: two of them cross.
    """
    kept: list[Block] = []
    for block in sorted(removed, key=lambda b: -len(b.nodes)):
        for other in kept:
            if block.crosses(other):
                raise SpecError(f"The blocks {other.name!r} and {block.name!r} overlap, and neither lies in the other: take out one of them.")
        if not any(other.contains(block) for other in kept):
            kept.append(block)
    return kept


# Regions --------------------------------------------------------------------------------------------------------------------------


def _region(flow: Flow, kind: str, name: str, entry: fx.Node, leaving: fx.Node, inner: int) -> Block | None:
    """The block whose nodes that depend on the entry are ``inner``, or None where it cannot be taken out whole."""
    gone = flow.dying(entry, leaving, inner)
    kept = inner & ~gone
    # Branches may share what computes no products: the normalisation before attention and feed-forward side by side.
    whole = not (kept if kind == "layer" else flow.macs_of(kept))
    if not whole or not flow.macs_of(inner) or not _memory_allows(flow, entry, leaving, gone):
        return None
    nodes = tuple(flow.nodes_of(gone))
    aligned = flow.strides[entry] == flow.strides[leaving]
    return Block(name, kind, entry, leaving, nodes, flow.macs_of(gone), flow.parameters_of(nodes), aligned)


def _memory_allows(flow: Flow, entry: fx.Node, leaving: fx.Node, gone: int) -> bool:
    """Whether no write into memory would be lost, or meet other readers, when the exit's readers read the entry."""
    home = flow.memory(entry)
    chained = bool(home & flow.bit(leaving))
    for writer in flow.writers:
        family = flow.written_by(writer)
        if flow.bit(writer) & gone:
            # Into the block's own values; or, as in ``x += f(x)``, into the value that runs past it.
            if family & ~(gone | (home if chained else 0)):
                return False
        elif chained:
            if family & home and flow.place[entry] < flow.place[writer] < flow.place[leaving]:
                return False
        elif family & flow.bit(leaving) or (family & home and flow.place[writer] > flow.place[entry]):
            return False
    return True


# Branches -------------------------------------------------------------------------------------------------------------------------


def _branches(flow: Flow) -> Iterator[Block]:
    """What sums add to a value that runs past it: x + f(x), and each of f and g in x + f(x) + g(x)."""
    for total in flow.network.graph.nodes:
        for kept, added in _kept_and_added(flow, total):
            past = [node for node in _passing(kept) | _beside(total, kept) if flow.reaches(node, added)]
            if past:
                source = max(past, key=flow.place.__getitem__)
                inner = flow.between(source, total) & ~flow.before(kept) & ~flow.bit(kept)
                block = _region(flow, "branch", "", kept, total, inner)
                if block is not None:
                    yield replace(block, name=_common_path(node for node in flow.nodes_of(inner) if flow.macs.get(node)))


def _kept_and_added(flow: Flow, total: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operands of a sum, as (what would stay, what would go)."""
    if total.target not in SUMS:
        return
    left, right = total.args[:2]
    if isinstance(left, fx.Node) and isinstance(right, fx.Node) and left is not right:
        if flow.alike(left, total):
            yield _before_casts(flow, left), right
        plain = total.target is aten.add.Tensor and argument(total, 2, "alpha", 1) == 1
        if plain and flow.alike(right, total):
            yield _before_casts(flow, right), left


def _before_casts(flow: Flow, node: fx.Node) -> fx.Node:
    """The value that a cast to its own dtype was given."""
    while node.target in CASTS and isinstance(node.args[0], fx.Node) and flow.alike(node.args[0], node):
        node = node.args[0]
    return node


def _passing(value: fx.Node) -> set[fx.Node]:
    """The value and those that it is a sum of."""
    found: set[fx.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            operands = node.args[:2] if node.target in SUMS else node.args[:1] if node.target in PASSED_ON else ()
            todo.extend(operand for operand in operands if isinstance(operand, fx.Node))
    return found


def _beside(total: fx.Node, kept: fx.Node) -> set[fx.Node]:
    """What a sum of three or more adds to ``total``: in (f(x) + g(x)) + x it is x that runs past both."""
    found: set[fx.Node] = set()
    reader = only_user(total)
    while reader is not None and reader.target in SUMS:
        for operand in reader.args[:2]:
            if isinstance(operand, fx.Node) and operand is not total:
                found |= _passing(operand)
        total, reader = reader, only_user(reader)
    return found


def _common_path(nodes: Iterable[fx.Node]) -> str:
    """The path of the smallest module that holds all the nodes."""
    paths = [node.meta.get("module", "").split(".") for node in nodes]
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


# Layers ---------------------------------------------------------------------------------------------------------------------------


def _numbered(flow: Flow) -> Iterator[Block]:
    """The modules of numbered lists, each call of them apart."""
    members: dict[str, int] = {}
    for node in flow.network.graph.nodes:
        parts = node.meta.get("module", "").split(".")
        for depth in (depth for depth, part in enumerate(parts, 1) if part.isdigit()):
            path = ".".join(parts[:depth])
            members[path] = members.get(path, 0) | flow.bit(node)
    for path, inside in members.items():
        readers = flow.nodes_of(inside)
        offered = {source for node in readers for source in node.all_input_nodes if not flow.bit(source) & inside}
        for leaving in [node for node in readers if any(not flow.bit(user) & inside for user in node.users)]:
            regions = [_call(flow, path, entry, leaving, inside) for entry in offered]
            # The layer's input is what most of it is computed from.
            best = max((r for r in regions if r), key=lambda r: (r[0], flow.place[r[1].entry]), default=None)
            if best is not None:
                yield from _calls(flow, best[1])


def _call(flow: Flow, path: str, entry: fx.Node, leaving: fx.Node, inside: int) -> tuple[int, Block] | None:
    """One call of a module, and how many MACs are computed from the entry."""
    if not flow.alike(entry, leaving) or not flow.reaches(entry, leaving):
        return None
    inner = flow.between(entry, leaving)
    if inner & ~(inside | flow.nameless):
        return None
    block = _region(flow, "layer", path, entry, leaving, inner)
    return (flow.macs_of(inner), block) if block is not None else None


def _calls(flow: Flow, block: Block) -> Iterator[Block]:
    """A module that runs several times in a row, with the same tensors, is as many layers."""
    waists = [node for node in flow.waists(block.entry, block.exit) if node in (block.entry, block.exit) or _before_casts(flow, node) is node]
    signs = [flow.signature(one, two, tensors=True) for one, two in pairwise(waists)]
    period = next(p for p in range(1, len(signs) + 1) if len(signs) % p == 0 and signs[p:] == signs[:-p])
    corners = waists[::period]
    parts = [_region(flow, "layer", block.name, one, two, flow.between(one, two)) for one, two in pairwise(corners)]
    whole = all(part is not None and flow.alike(part.entry, part.exit) for part in parts)
    yield from (part for part in parts if part is not None) if whole else [block]


def _with_its_sum(layer: Block, branches: Iterable[Block]) -> Block:
    """A layer that is a whole branch goes with its sum: x + x is not x."""
    for branch in branches:
        if branch.macs == layer.macs and branch.contains(layer) and layer.exit is not branch.exit:
            return replace(branch, kind="layer", name=layer.name)
    return layer


def _repeated(flow: Flow, branches: Iterable[Block]) -> Iterator[Block]:
    """Parts of the same form in a row, where nodes have no module path."""
    output = next(node for node in flow.network.graph.nodes if node.op == "output")
    ports = [node for node in flow.network.graph.nodes if node.op == "placeholder" and flow.reaches(node, output)]
    seen: set[fx.Node] = set()
    # A mask made from the input runs past all layers; what runs from the first branch's entry does not.
    for source in [*ports, *(branch.entry for branch in branches)]:
        if source in seen:
            continue
        waists = [node for node in flow.waists(source, output)[:-1] if _before_casts(flow, node) is node]
        seen.update(waists)
        signs = [flow.signature(one, two, tensors=False) for one, two in pairwise(waists)]
        for start, period in _tandems(signs):
            entry, leaving = waists[start], waists[start + period]
            inner = flow.between(entry, leaving)
            if flow.alike(entry, leaving) and not inner & ~flow.nameless:
                block = _region(flow, "layer", "", entry, leaving, inner)
                if block is not None:
                    yield block


def _tandems(signs: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """(start, length) of every unit that stands at least twice in a row, longest runs from their ends; a unit is no repetition itself.

    >>> list(_tandems("xababb"))
    [(4, 1), (5, 1), (1, 2), (3, 2)]
    """
    for period in range(1, len(signs) // 2 + 1):
        same = [one == two for one, two in zip(signs, signs[period:], strict=False)] + [False]
        start = 0
        while start < len(same):
            stop = same.index(False, start)
            length = stop - start + period
            unit = list(signs[start : start + period])
            primitive = not any(period % p == 0 and unit[p:] == unit[:-p] for p in range(1, period))
            if length >= 2 * period and primitive:
                yield from ((first, period) for first in range(start + length % period, start + length, period))
            start = stop + 1


def _named(found: Sequence[Block]) -> tuple[Block, ...]:
    """The same with a name each: the path, or where several have it, the path and the exit's name, or the entry's too."""
    paths = Counter((block.name, block.kind) for block in found)

    def alone(block: Block) -> bool:
        return bool(block.name) and paths[block.name, block.kind] == 1 and (block.kind == "layer" or not paths[block.name, "layer"])

    ends = Counter((block.name, block.exit) for block in found if not alone(block))
    made: dict[str, Block] = {}
    for block in found:
        nodes = [] if alone(block) else [block.entry, block.exit] if ends[block.name, block.exit] > 1 else [block.exit]
        name = ":".join(filter(None, [block.name, *(node.name for node in nodes)]))
        name = name if name not in made else f"{block.entry.name}:{block.exit.name}:{block.kind}"
        made[name] = replace(block, name=name)
    return tuple(made.values())
