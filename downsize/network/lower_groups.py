"""Weights that layers read as floats, on their way into a file: tables, weights in groups or of few levels, weights of float layers.

They are stored as packed bits, and decoded in one of three places: by a kernel that multiplies with packed weights, when the file is loaded
(standard operators on constants, which runtimes compute once), or, of a table, row by row as it is read.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ..numerics import grids
from ..numerics.groups import group_codes, group_count, level_codes
from ..numerics.packing import gather_block_quantized, matmul_nbits
from .network import Network
from .packed import Packed, stored_scale
from .rewrite import add_constant, argument, constant

aten = torch.ops.aten
ours = torch.ops.downsize
AT_LOAD, AT_RUN, IN_KERNEL = "at load", "at run", "in the kernel"
KERNEL_GROUPS = (128, 64, 32, 16, 256)
# Widths that a runtime's kernel takes, and from how many elements on it is not slower than one for floats: ONNX Runtime's kernel for 4 bits
# took 1.3 to 3 times as long in weights that fit the processor's cache, 0.4 to 1 times for one row in larger ones; its kernels for 2 and 8
# bits took up to 50 times as long. OpenVINO's took as long as for floats.
KERNELS = {"onnxruntime": {4: 2**22}, "openvino": {2: 0, 4: 0, 8: 0}}
# Groups in which a runtime's kernel also rounds its input to int8 and multiplies in integers, by the bits of the weight. ONNX Runtime takes
# floats instead on a processor that its kernels do not know, and for 2 bits outside of these groups.
INTEGER_KERNELS = {"onnxruntime": {2: (32, 64, 128), 4: KERNEL_GROUPS, 8: KERNEL_GROUPS}}
# Whose operator reads rows of a packed table: ONNX Runtime's took a sixth of the time of standard operators; OpenVINO's wants other scales.
READERS = ("onnxruntime",)


class Decoding(NamedTuple):
    """Where a weight of a file becomes numbers to compute with: its name, bits a code, bytes in the file with its scales and zero points."""

    weight: str
    bits: int
    stored: int
    when: str


def insert_call(network: Network, before: fx.Node, target: object, args: tuple[object, ...]) -> fx.Node:
    """A call of ``target`` before ``before``, which stands for the same part of the user's model."""
    with network.graph.inserting_before(before):
        made = network.graph.call_function(target, args)
    made.meta = dict(before.meta)
    return made


@dataclass
class GroupedWeight:
    """A fake-quantized weight as a matrix [rows, columns] of codes, and what was made of it so far.

    ``q``: codes, or numbers of ``levels``. ``scale`` and ``zero_point`` (None: zero): [rows, groups]. ``bits``: of its grid.
    """

    network: Network
    fake: fx.Node
    q: Tensor
    bits: int
    scale: Tensor
    zero_point: Tensor | None
    group: int
    levels: Tensor | None = None
    made: dict[str, fx.Node] = field(default_factory=dict)
    stored: int = 0

    @staticmethod
    def of(network: Network, fake: fx.Node) -> GroupedWeight:
        """The weight that ``fake`` quantizes: in groups, to levels, or with one scale for each row or all."""
        weight, scale, third = (constant(network, node) for node in fake.args[:3])
        assert weight is not None and scale is not None and third is not None
        weight, scale, third = weight.detach(), scale.detach(), third.detach()
        # The nodes that decode it bear the name of the module that it is in.
        fake.meta["module"] = fake.meta.get("module") or str(fake.args[0].target).rpartition(".")[0]
        rows, columns = weight.flatten(1).shape
        if fake.target is ours.fake_quantize_levels.default:
            q = level_codes(weight, scale, third, fake.args[3])
            return GroupedWeight(network, fake, q, max((len(third) - 1).bit_length(), 1), scale, None, fake.args[3], third.float())
        if fake.target is ours.fake_quantize_groups.default:
            group, grid = fake.args[3], grids.Grid(*fake.args[4:6])
        else:
            group, grid = columns, grids.Grid(*fake.args[4:6])
            scale, third = (each.reshape(-1, 1).expand(rows, 1).contiguous() for each in (scale, third))
        q = group_codes(weight, scale, third, group, grid)
        return GroupedWeight(network, fake, q, (grid.high - grid.low).bit_length(), scale, third if bool(third.any()) else None, group)

    @property
    def name(self) -> str:
        return str(self.fake.args[0].target)

    def constant(self, what: str, tensor: Tensor) -> fx.Node:
        """A constant of the file, made once."""
        if what not in self.made:
            self.made[what] = add_constant(self.network, f"{self.name}_{what}", tensor.detach(), self.fake)
            self.stored += tensor.numel() * tensor.element_size() if what != "table" and not what.endswith("_table") else 0
        return self.made[what]

    def lower(self, runtime: str) -> list[Decoding]:
        """Replace the fake quantizer, and say where the weight is decoded."""
        places: list[str] = []
        tables = [user for user in self.fake.users if user.target is aten.embedding.default and user.args[0] is self.fake]
        linear = [user for user in self.fake.users if _is_plain_linear(user, self.fake)]
        of_floats, of_integers = self._kernel_block(runtime), [self._integer_block(user, runtime) for user in linear]
        block = next(filter(None, of_integers), of_floats)
        products = [user for user, own in zip(linear, of_integers, strict=True) if block and block in (own, of_floats)]
        for user in products:
            self._lower_product(user, block, self._integer_block(user, runtime) == block)
            places.append(IN_KERNEL)
        if set(self.fake.users) - set(tables):
            values = self._values(by_rows=bool(tables))
            self.fake.replace_all_uses_with(values, delete_user_cb=lambda user: user not in tables)
            places.append(AT_LOAD)
        reader = 0 if places else self._reader_block(runtime)
        for user in tables:
            if reader:
                self._lower_rows(user, reader)
            else:
                self._lower_table(user)
            places.append(AT_RUN)
        made = Decoding(self.name, self.bits, self.stored, " and ".join(dict.fromkeys(places)))
        self.network.graph.erase_node(self.fake)
        return [made]

    # Constants -------------------------------------------------------------------------------------------------------------------------

    def _codes(self, by_rows: bool, before: fx.Node, index: object = None) -> fx.Node:
        """The decoded codes, [rows, columns] or of the rows ``index``. Packed row by row, or, smaller, as one run."""
        if "blocks" in self.made:
            bits, table, width, columns = self.made["blocks"], self._kernel_table(), self.bits, self.q.shape[1]
        else:
            matrix = self.q if by_rows else self.q.reshape(1, -1)
            if self.levels is None and Packed.of(matrix).saves <= 0:
                codes = self.constant("codes", self.q)
                return codes if index is None else insert_call(self.network, before, ours.packed_rows.default, (codes, index))
            packed = self._packed(matrix)
            bits, table, width, columns = self.constant("packed", packed.bits), packed.table, packed.width, packed.columns
        table_node = self.constant("table", table)
        if index is not None:
            bits = insert_call(self.network, before, ours.packed_rows.default, (bits, index))
        elif "blocks" in self.made:
            bits = insert_call(self.network, before, aten.reshape.default, (bits, [self.q.shape[0], -1]))
        codes = insert_call(self.network, before, ours.unpack.default, (bits, table_node, width, columns))
        return codes if index is not None or by_rows else insert_call(self.network, before, aten.reshape.default, (codes, list(self.q.shape)))

    def _packed(self, matrix: Tensor) -> Packed:
        if self.levels is not None:
            width = self.bits
            table = torch.nn.functional.pad(self.levels, (0, 2**width - len(self.levels)))
            return Packed.numbered(matrix.long(), table, width)
        return Packed.of(matrix)

    def _zeros(self, by_rows: bool, before: fx.Node, index: object = None) -> fx.Node | None:
        if self.zero_point is None:
            return None
        if int(self.zero_point.max()) - int(self.zero_point.min()) > 255:
            wide = self.constant("offsets", self.zero_point)
            return wide if index is None else insert_call(self.network, before, ours.packed_rows.default, (wide, index))
        packed = Packed.of(self.zero_point if by_rows else self.zero_point.reshape(1, -1))
        bits, table = self.constant("offsets", packed.bits), self.constant("offsets_table", packed.table)
        if index is not None:
            bits = insert_call(self.network, before, ours.packed_rows.default, (bits, index))
        zeros = insert_call(self.network, before, ours.unpack.default, (bits, table, packed.width, packed.columns))
        return zeros if by_rows else insert_call(self.network, before, aten.reshape.default, (zeros, list(self.zero_point.shape)))

    # Where it is decoded ---------------------------------------------------------------------------------------------------------------

    def _values(self, by_rows: bool) -> fx.Node:
        """The whole weight in float, decoded when the file is loaded."""
        by_rows = by_rows or "blocks" in self.made
        codes, zeros = self._codes(by_rows, self.fake), self._zeros(by_rows, self.fake)
        scale = self.constant("scale", stored_scale(self.scale))
        values = insert_call(self.network, self.fake, ours.decode_groups.default, (codes, scale, zeros, self.group))
        shape = list(self.network.tensor(self.name).shape)
        return values if len(shape) == 2 else insert_call(self.network, self.fake, aten.reshape.default, (values, shape))

    def _lower_table(self, user: fx.Node) -> None:
        """Rows are read packed, and decoded alone."""
        index = user.args[1]
        scale = insert_call(self.network, user, ours.packed_rows.default, (self.constant("scale", stored_scale(self.scale)), index))
        codes = self._codes(True, user, index)
        args = codes, scale, self._zeros(True, user, index), self.group
        user.replace_all_uses_with(insert_call(self.network, user, ours.decode_groups.default, args))
        self.network.graph.erase_node(user)

    def _lower_rows(self, user: fx.Node, block: int) -> None:
        """Rows are decoded by the operator that reads them."""
        zero = self._kernel_zeros()
        bits, zeros = gather_block_quantized(self.q.int() - self._base, torch.zeros(1, 1) if zero is None else zero, block, self.bits)
        parts = self.constant("packed", bits), self.constant("scale", stored_scale(self.scale))
        args = *parts, None if zero is None else self.constant("offsets", zeros), user.args[1], self.bits, block
        user.replace_all_uses_with(insert_call(self.network, user, ours.group_rows.default, args))
        self.network.graph.erase_node(user)

    def _lower_product(self, user: fx.Node, block: int, integers: bool) -> None:
        zero = self._kernel_zeros()
        blocks, zeros = matmul_nbits(self.q.int() - self._base, torch.zeros(1, 1) if zero is None else zero, block, self.bits)
        parts = self.constant("blocks", blocks), self.constant("scale", stored_scale(self.scale))
        source = user.args[0].args[0] if integers else user.args[0]
        args = source, *parts, None if zero is None else self.constant("offsets_of_blocks", zeros), self.bits, block
        made = insert_call(self.network, user, ours.block_linear.default if integers else ours.group_linear.default, args)
        bias = argument(user, 2, "bias")
        if bias is not None:
            made = insert_call(self.network, user, aten.add.Tensor, (made, bias))
        user.replace_all_uses_with(made)
        rounded = user.args[0]
        self.network.graph.erase_node(user)
        if integers and not rounded.users:
            self.network.graph.erase_node(rounded)

    @property
    def _base(self) -> int:
        """What the kernels take off a code: theirs are unsigned."""
        return -(2 ** (self.bits - 1)) if self.q.dtype is torch.int8 else 0

    def _kernel_table(self) -> Tensor:
        return (torch.arange(2**self.bits) + self._base).to(self.q.dtype)

    def _kernel_zeros(self) -> Tensor | None:
        """The zero points of a kernel's blocks, unsigned; None where they are what it takes by default, half of all codes."""
        zero = (torch.zeros_like(self.scale, dtype=torch.int32) if self.zero_point is None else self.zero_point) - self._base
        return None if bool((zero == 2 ** (self.bits - 1)).all()) else zero

    def _kernel_block(self, runtime: str) -> int:
        """How many columns share a scale in the kernel of ``runtime``; 0 where it has none for this weight."""
        (rows, columns), groups = self.q.shape, self.scale.shape[1]
        smallest = KERNELS.get(runtime, {}).get(self.bits)
        if smallest is None or rows * columns < smallest or (self.bits == 8 and groups == 1) or not self._is_unsigned():
            return 0
        if groups > 1:
            return self.group if self.group in KERNEL_GROUPS else 0
        # Zero points would have to be repeated for every block.
        return min(KERNEL_GROUPS[:4], key=lambda block: group_count(columns, block) * block) if self._kernel_zeros() is None else 0

    def _integer_block(self, user: fx.Node, runtime: str) -> int:
        """How many columns share a scale in the kernel that rounds this layer's input as the graph does; 0 where neither does, or one alone."""
        blocks = INTEGER_KERNELS.get(runtime, {}).get(self.bits, ())
        if user.args[0].target is not ours.fake_quantize_blocks.default or not blocks or not self._is_unsigned():
            return 0
        columns, of_input, groups = self.q.shape[1], user.args[0].args[1], self.scale.shape[1]
        # Where a row is one block, so it is in any larger one.
        same = [block for block in blocks if block == of_input or min(block, of_input) >= columns]
        # One scale is repeated for every block; zero points would have to be packed anew.
        repeats = groups == 1 and self._kernel_zeros() is None
        return min((block for block in same if repeats or block == self.group or (groups == 1 and block >= columns)), default=0)

    def _reader_block(self, runtime: str) -> int:
        """How many columns share a scale in the operator of ``runtime`` that reads rows; 0 where it has none for this table."""
        if runtime not in READERS or self.bits not in (2, 4, 8) or self.q.shape[1] * self.bits % 8 or not self._is_unsigned():
            return 0
        block = max(16, 1 << (self.q.shape[1] - 1).bit_length()) if self.scale.shape[1] == 1 else self.group
        return block if block >= 16 and block & (block - 1) == 0 else 0

    def _is_unsigned(self) -> bool:
        """Whether codes and zero points are those of a kernel: even steps, from ``_base`` on."""
        parts = self.q.int() - self._base, self._kernel_zeros()
        return self.levels is None and all(0 <= int(part.min()) <= int(part.max()) < 2**self.bits for part in parts if part is not None)


def _is_plain_linear(user: fx.Node, fake: fx.Node) -> bool:
    """Whether it is a linear layer with this weight, and with nothing else."""
    return user.target is aten.linear.default and user.args[1] is fake and user.args[0] is not fake
