"""Which operators a Network may hold, and how their arguments are written as JSON.

A saved network is data from anywhere, so what it may call is a whitelist: ATen operators that compute tensors from tensors, our own
operators, and the integer arithmetic that shapes need. Nothing that reads files, touches storages or runs code is on it.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..errors import NetworkFileError
from ..numerics import grids, groups, halves, recurrent  # noqa: F401  (they register torch.ops.downsize)

# Functions on shape integers that torch.export leaves in a graph.
SYMBOLIC: dict[str, Callable[..., Any]] = {
    f"{module.__name__.removeprefix('_')}.{function}": getattr(module, function)
    for module, functions in (
        (operator, "add sub mul floordiv mod neg eq ne lt le gt ge getitem truediv and_ or_ pow pos abs index"),
        (math, "ceil floor trunc sqrt"),
        (torch, "sym_max sym_min sym_not sym_int sym_float sym_ite sym_sum"),
        (builtins, "max min abs round int float"),
    )
    for function in functions.split()
}
SYMBOLIC_NAME = {function: name for name, function in reversed(SYMBOLIC.items())}

# ATen operators that are neither tagged core nor pointwise, but ordinary parts of models.
_ORDINARY = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d addbmm addmv addr
    alias align_tensors all any arange argmax argmin argsort as_strided atleast_1d atleast_2d avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm
    bilinear block_diag bmm broadcast_tensors broadcast_to bucketize cat cdist celu channel_shuffle chunk clamp clone column_stack concat
    concatenate constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution copy copy_
    cosine_similarity count_nonzero cross cummax cummin cumprod cumsum detach detach_ diag diag_embed diagonal diff dot dropout einsum elu
    embedding embedding_bag empty empty_like expand expand_as eye feature_dropout fill fill_ flatten flip fliplr flipud floor_divide
    frobenius_norm full full_like gather gelu glu grid_sampler grid_sampler_2d group_norm gru hardsigmoid hardshrink hardswish hardtanh hstack
    huber_loss im2col col2im index index_add index_copy index_fill index_put index_select inner instance_norm isclose kthvalue layer_norm
    leaky_relu lerp lift_fresh lift_fresh_copy linalg_norm linalg_vector_norm linear linspace log_sigmoid log_softmax logcumsumexp logsumexp lstm
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell masked_fill masked_scatter masked_select matmul matrix_power max max_pool1d max_pool2d
    max_pool3d max_pool2d_with_indices mean median meshgrid min mish mm mode movedim moveaxis mul multiply mv nan_to_num nanmean nansum narrow
    native_group_norm native_layer_norm new_empty new_full new_ones new_zeros nonzero norm normalize numpy_T one_hot ones
    ones_like outer pad pairwise_distance permute pixel_shuffle pixel_unshuffle prelu prod rand_like randn_like ravel reflection_pad1d
    reflection_pad2d reflection_pad3d relu relu6 renorm repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape
    reshape_as resolve_conj resolve_neg rms_norm rnn_relu rnn_tanh roll rot90 rrelu rsub scalar_tensor scaled_dot_product_attention scatter
    scatter_add scatter_reduce searchsorted select select_copy select_scatter selu silu slice slice_copy slice_scatter softmax softmin softplus
    softshrink sort special_expit split split_with_sizes squeeze stack std std_mean sub sum swapaxes swapdims sym_numel sym_size sym_stride t
    take_along_dim tanhshrink tensor_split threshold tile to topk trace transpose tril triu true_divide type_as unbind unflatten unfold
    unsafe_chunk unsafe_split unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d var var_mean view view_as vstack where zero zero_ zeros zeros_like
    complex polar stft istft alpha_dropout feature_alpha_dropout tensordot kron vdot linalg_matmul chain_matmul hsplit vsplit dsplit dstack argwhere
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa quantile nanmedian
    _adaptive_avg_pool2d _cdist_forward _convolution _euclidean_dist _fft_c2c _log_softmax _shape_as_tensor _softmax _to_copy _trilinear
    _unsafe_view _weight_norm mH mT matrix_H adjoint linalg_householder_product __and__
    __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ bitwise_and bitwise_or fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2
    fft_irfft2 view_as_real view_as_complex real imag
"""
ORDINARY = frozenset(_ORDINARY.split())
OPERATOR_NAMESPACES = ("aten", "downsize")
# The last two lines read or write past the end of a tensor when another argument lies about its size, as all backward operators do.
_FORBIDDEN = """
    from_file set_ set resize_ resize _print _local_scalar_dense item data requires_grad_
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _native_batch_norm_legit_functional
    batch_norm_with_update _batch_norm_no_update _batch_norm_with_update
    """
FORBIDDEN = frozenset(_FORBIDDEN.split())


def allowed(target: object) -> bool:
    """Whether a Network may hold a call to ``target``."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        if target.namespace == "downsize":
            return True
        if target.namespace != "aten" or name in FORBIDDEN or name.endswith("_backward") or _writes_out(target):
            return False
        functional = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        tagged = bool({torch.Tag.core, torch.Tag.pointwise} & set(target.tags))
        return name in ORDINARY or functional in ORDINARY or tagged or _out_of_place(target, functional)
    return target in SYMBOLIC_NAME


def _writes_out(target: Any) -> bool:
    return any(argument.is_out for argument in target._schema.arguments)


def _out_of_place(target: Any, functional: str) -> bool:
    """An in-place operator is allowed when the operator it is the in-place form of is."""
    packet = getattr(torch.ops.aten, functional, None) if functional != target._schema.name.split("::")[1] else None
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    return overload is not None and bool({torch.Tag.core, torch.Tag.pointwise} & set(overload.tags))


def name_of(target: Any) -> str:
    """The name a target is saved under: ``aten.conv2d.default``, ``operator.mul``.

    Raises:
        NetworkFileError: the target is not allowed.
    """
    if not allowed(target):
        raise NetworkFileError(f"{target} cannot be part of a Network: it is not on the list of operators in network/operators.py.")
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return SYMBOLIC_NAME[target]


def target_of(name: str) -> Any:
    """The inverse of :func:`name_of`; refuses everything that is not allowed."""
    if name in SYMBOLIC:
        return SYMBOLIC[name]
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in OPERATOR_NAMESPACES and all(part.isidentifier() for part in parts):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        overload = getattr(packet, parts[2], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
        if isinstance(overload, torch._ops.OpOverload) and allowed(overload):
            return overload
    raise NetworkFileError(
        f"The file calls {name!r}, which is not an operator a Network may hold: it is damaged or forged, or made by a newer version."
    )


_TORCH_VALUES = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def encode(value: Any) -> Any:
    """An operator's argument as JSON; tensors appear only as references to nodes."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [encode(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": value.type}
    for kind, cls in _TORCH_VALUES.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise NetworkFileError(f"An operator has an argument of type {type(value).__name__} ({value!r}), which cannot be saved.")


def decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    """The inverse of :func:`encode`. ``nodes`` holds the nodes made so far: an argument can only refer to an earlier one."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise NetworkFileError(f"An argument reads {value!r}: the file is damaged.")
    ((kind, content),) = value.items()
    if kind == "node":
        if not isinstance(content, str) or content not in nodes:
            raise NetworkFileError(f"A node refers to {content!r}, which does not come before it: the file is damaged.")
        return nodes[content]
    if kind in ("list", "tuple", "slice") and isinstance(content, list):
        items = [decode(item, nodes) for item in content]
        if kind == "slice" and len(items) != 3:
            raise NetworkFileError(f"A slice has {len(items)} parts: the file is damaged.")
        return items if kind == "list" else tuple(items) if kind == "tuple" else slice(*items)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "device" and content == "cpu":
        return torch.device("cpu")
    if kind in _TORCH_VALUES and isinstance(content, str) and isinstance(getattr(torch, content, None), _TORCH_VALUES[kind]):
        return getattr(torch, content)
    raise NetworkFileError(f"An argument reads {value!r}, which this version does not know: the file is damaged or from a newer version.")
