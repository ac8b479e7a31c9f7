"""Every way to write a layer that a rule of lineage could get wrong, each in the smallest network: :data:`FORMS`, and what can be cut of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from architectures import vivid
from small_nets import Net, weight
from torch import Tensor, nn
from zoo import Specimen, floats, images, tokens

Forward = Callable[..., Any]


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def heads(x: Tensor, count: int = 4) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def projections(inner: int = 16, keys: int = 16, values: int = 24, **more: Any) -> dict[str, Any]:
    out = nn.Linear(more.pop("joined", values), 5)
    return {"q": nn.Linear(12, inner), "k": nn.Linear(12, keys), "v": nn.Linear(12, values), "o": out, **more}


def attended(net: Any, x: Tensor, **options: Any) -> Tensor:
    q, k, v = (heads(layer(x)) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2))


def plain_attention(net: Any, x: Tensor, change: Forward = lambda w: w, prepare: Forward = lambda x: x) -> Tensor:
    q, k, v = (heads(layer(x)) for layer in (net.q, net.k, net.v))
    return net.o((change(prepare(q) @ prepare(k).mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))


def merged_with_batch(net: Any, x: Tensor, outer: bool) -> Tensor:
    """Heads and batch as one dimension, one outside or the other."""
    n = x.shape[0]
    order = (2, 0, 1, 3) if outer else (0, 2, 1, 3)
    q, k, v = (layer(x).view(n, 5, 4, -1).permute(order).reshape(4 * n, 5, -1) for layer in (net.q, net.k, net.v))
    y = torch.bmm((q @ k.mT).softmax(-1), v)
    y = y.view(4, n, 5, -1).permute(1, 2, 0, 3) if outer else y.view(n, 4, 5, -1).transpose(1, 2)
    return net.o(y.reshape(n, 5, -1))


def cut_into_batch(net: Any, x: Tensor, by_view: bool) -> Tensor:
    """Heads side by side in the batch, taken apart again by chunk."""
    n = x.shape[0]
    if by_view:
        q, k, v = (layer(x).view(n, 5, 4, -1).permute(2, 0, 1, 3).reshape(4 * n, 5, -1) for layer in (net.q, net.k, net.v))
    else:
        q, k, v = (torch.cat(layer(x).chunk(4, -1), 0) for layer in (net.q, net.k, net.v))
    return net.o(torch.cat(((q @ k.mT).softmax(-1) @ v).chunk(4, 0), -1))


def grouped_queries(net: Any, x: Tensor) -> Tensor:
    q, k, v = heads(net.q(x), 8), heads(net.k(x), 2), heads(net.v(x), 2)
    return net.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def grouped_queries_by_einsum(net: Any, x: Tensor) -> Tensor:
    n = x.shape[0]
    q, k, v = net.q(x).view(n, 5, 2, 4, 4), net.k(x).view(n, 5, 2, 4), net.v(x).view(n, 5, 2, 4)
    w = torch.einsum("btgmd,bsgd->bgmts", q, k).softmax(-1)
    return net.o(torch.einsum("bgmts,bsgd->btgmd", w, v).reshape(n, 5, 32))


def rotary(net: Any, x: Tensor) -> Tensor:
    def turned(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return x * net.cos.repeat(1, 2) + torch.cat([-two, one], -1) * net.sin.repeat(1, 2)

    q, k, v = (heads(layer(x)) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True).transpose(1, 2).flatten(2))


def linear_attention(net: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(layer(x)) for layer in (net.q, net.k, net.v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return net.o(((q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT)).transpose(1, 2).flatten(2))


def baddbmm(net: Any, x: Tensor) -> Tensor:
    n = x.shape[0]
    q, k, v = (heads(layer(x)).reshape(n * 4, 5, -1) for layer in (net.q, net.k, net.v))
    bias = net.slopes[:, None, None].expand(4, 1, 5).repeat(n, 1, 1)
    y = torch.bmm(torch.baddbmm(bias, q, k.mT, beta=0.7, alpha=0.5).softmax(-1), v)
    return net.o(y.view(n, 4, 5, -1).transpose(1, 2).reshape(n, 5, -1))


def states(net: Any, x: Tensor) -> Tensor:
    """A bidirectional LSTM whose initial states are computed, and learned."""
    n = x.shape[0]
    first = net.first(x.mean(1)).view(n, 2, 7).transpose(0, 1).contiguous()
    y, (h, c) = net.rnn(x, (first, net.cell.expand(2, n, 7).contiguous()))
    return net.out(torch.cat([y[:, -1], h[0], h[1], c[-1]], 1))


def lstm_by_hand(net: Any, x: Tensor) -> Tensor:
    h = c = torch.zeros(x.shape[0], 7)
    for step in range(5):
        i, f, g, o = (net.one(x[:, step]) + net.two(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return net.out(h)


def written_into(net: Any, x: Tensor) -> Tensor:
    y = net.one(x)
    y[:, :4] += 1
    y[:, 4:].mul_(2)
    y.view(-1, 2, 4).transpose(1, 2).sub_(0.3)
    return net.two(F.relu_(y))


def filled(net: Any, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 16)
    y[:, :8] = net.one(x)
    y[:, 8:] = F.relu(net.other(x))
    return net.both(y)


def slices(net: Any, x: Tensor) -> Tensor:
    y = net.one(x)
    return net.a(y[:, -6:-1]) + net.b(y[:, :-3]) + net.c(y[:, 2:None]) + y[:, -2:-1] + y.select(1, 3)[:, None] + y[:, -5][:, None]


def repeated(net: Any, x: Tensor) -> Tensor:
    y = net.one(x)
    wide, each = y[:, :, None].expand(-1, -1, 4).flatten(1), y.repeat_interleave(2, 1, output_size=16)
    return net.a(wide) + net.b(y.repeat(1, 2)) + net.c(each)


def squeezed(net: Any, x: Tensor) -> Tensor:
    """Dimensions of one position go; one that is cut down to one stays."""
    y = net.one(x)
    return net.two(y.squeeze(1)) + net.two(net.other(x)[:, :, None].squeeze()) + net.two(torch.squeeze(y[..., None], (-1, 1)))


def unbound(net: Any, x: Tensor) -> Tensor:
    a, b, c = net.one(x).view(-1, 3, 8).unbind(1)
    return net.two(torch.stack([a * b, c], -1).flatten(1))


def mixture(net: Any, x: Tensor) -> Tensor:
    hidden = F.relu(torch.einsum("bi,eih->beh", x, net.w1))
    return net.out(torch.einsum("be,beo->bo", net.route(x).softmax(-1), torch.einsum("beh,eho->beo", hidden, net.w2)))


def response_norm(net: Any, x: Tensor) -> Tensor:
    y = net.one(x).permute(0, 2, 3, 1)
    size = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
    return net.last(net.gain * (y * size / (size.mean(-1, keepdim=True) + 1e-6)) + y)


def weights_by_formula(net: Any, x: Tensor) -> Tensor:
    """A weight that is normed in the graph, one of two parts, one with a low-rank sum, one that is used both ways round."""
    normed = net.gain[:, None] * net.w / torch.linalg.vector_norm(net.w, dim=1, keepdim=True)
    y = F.linear(net.one(x), normed)
    one, two = F.linear(y, torch.cat([net.w1, net.w2])).chunk(2, -1)
    z = F.linear(one * two, net.w3 + 0.5 * net.up @ net.down)
    return net.out(F.linear(F.relu(F.linear(z, net.both)), net.both.t()) + z)


def weights_without_mean(net: Any, x: Tensor) -> Tensor:
    return net.two(F.conv2d(net.one(x), net.w - net.w.mean((1, 2, 3), keepdim=True), padding=1))


def hand_norm(net: Any, x: Tensor) -> Tensor:
    y = net.one(x)
    mean = y.mean(-1, keepdim=True)
    y = (y - mean) * torch.rsqrt((y - mean).square().mean(-1, keepdim=True) + 1e-5) * net.gain
    return net.two(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5))


def masks(net: Any, x: Tensor) -> Tensor:
    y = net.one(x).masked_fill(net.one(x) > 0.5, -1.0)
    y = torch.where(net.other(x) > 0, y, net.other(x))
    return net.two(torch.where(y > 0.1, y, 0.3) + torch.full((8,), 0.3) + torch.ones_like(y))


def counts(net: Any, x: Tensor) -> Tensor:
    """How many units are positive, as an index."""
    return net.two(F.relu(net.other(x))) + net.table((net.one(x) > 0).sum(1))


def windows(net: Any, x: Tensor) -> Tensor:
    n = x.shape[0]
    y = net.one(x).permute(0, 2, 3, 1).view(n, 2, 4, 2, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 16)
    q, k, v = net.qkv(y).reshape(-1, 16, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
    w = ((q @ k.mT).view(n, 4, 4, 16, 16) + net.shift[:, None]).view(-1, 4, 16, 16).softmax(-1)
    y = net.out((w @ v).transpose(1, 2).reshape(-1, 16, 16))
    return net.last(y.view(n, 2, 2, 4, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(n, 64, 16))


# The table: name -> network, inputs (vectors, sequences, pictures), and its axes as "kind units", ~ where not exact ----


def linears(function: Forward, **more: Any) -> nn.Module:
    return Net(function, **{"one": nn.Linear(6, 8), "other": nn.Linear(6, 8), "two": nn.Linear(8, 3), **more})


def convs(function: Forward, **more: Any) -> nn.Module:
    return Net(function, **{"one": conv(3, 8), "two": conv(8, 4), **more})


def after(function: Forward, **more: Any) -> nn.Module:
    """What a function makes of a convolution's output, read by another."""
    return convs(lambda net, x: net.two(function(net, net.one(x))), **more)


def pairs(function: Forward, **more: Any) -> nn.Module:
    """What a function makes of all products of two layers' units."""
    parts = {"other": nn.Linear(6, 7), "two": nn.Linear(56, 3), **more}
    return linears(lambda net, x: function(net, torch.tanh(net.one(x)[:, :, None] * net.other(x)[:, None, :] + 1), x), **parts)


V, S, P = floats(6), floats(5, 12), images(3, 8)
THREE = "heads 4, head_dims 4, head_dims 6"
Row = tuple[Callable[[], nn.Module], Callable[[int], Any], str]
ATTENTION: dict[str, Row] = {
    "attention": (lambda: Net(attended, **projections()), S, THREE),
    "attention with a bias a head": (
        lambda: Net(lambda n, x: attended(n, x, attn_mask=n.slopes[:, None, None] * n.far, scale=0.3),
                    **projections(slopes=weight(4), far=weight(5, 5))),
        S,
        THREE,
    ),
    "masks, scales and biases a head": (
        lambda: Net(lambda n, x: plain_attention(n, x, lambda w: (w * n.scale + n.bias).masked_fill(n.far > 0.3, -1e9)),
                    **projections(scale=weight(4, 1, 1), bias=weight(1, 4, 5, 5), far=weight(5, 5))),
        S,
        THREE,
    ),
    "talking heads": (
        lambda: Net(lambda n, x: plain_attention(n, x, lambda w: torch.einsum("bhij,hg->bgij", n.mix(w), n.post)),
                    **projections(mix=nn.Conv2d(4, 4, 1), post=weight(4, 4))),
        S,
        "channels 4, heads 4, heads 4, head_dims 4, head_dims 6",
    ),
    "cosine attention": (lambda: Net(lambda n, x: plain_attention(n, x, prepare=lambda q: F.normalize(q, dim=-1)), **projections()), S,
                         THREE),
    "heads within the batch": (lambda: Net(lambda n, x: merged_with_batch(n, x, False), **projections()), S, THREE),
    "heads around the batch": (lambda: Net(lambda n, x: merged_with_batch(n, x, True), **projections()), S, THREE),
    "heads by chunk in the batch": (lambda: Net(lambda n, x: cut_into_batch(n, x, False), **projections()), S, "head_dims 4, head_dims 6"),
    "heads by view, chunked": (lambda: Net(lambda n, x: cut_into_batch(n, x, True), **projections()), S, "head_dims 6, head_dims 4"),
    "grouped queries": (lambda: Net(grouped_queries, **projections(32, 8, 8, joined=32)), S, "head_dims 4, heads 2, head_dims 4, heads 4"),
    "grouped queries by einsum": (lambda: Net(grouped_queries_by_einsum, **projections(32, 8, 8, joined=32)), S,
                                  "neurons 2, neurons 4, neurons 4, neurons 4"),
    "rotary": (lambda: Net(rotary, **projections(32, 32, cos=weight(5, 4), sin=weight(5, 4))), S, "head_dims 4, heads 4, head_dims 6"),
    "linear attention": (lambda: Net(linear_attention, **projections()), S, THREE),
    "baddbmm": (lambda: Net(baddbmm, **projections(slopes=weight(4))), S, THREE),
    "windows": (lambda: Net(windows, one=conv(3, 16), qkv=nn.Linear(16, 48), out=nn.Linear(16, 16), last=nn.Linear(16, 3),
                            shift=weight(4, 16, 16)), P,
                "channels 16, neurons 16, heads 4, head_dims 4"),
}  # fmt: skip
RECURRENT: dict[str, Row] = {
    "initial states": (
        lambda: Net(states, first=nn.Linear(12, 14), cell=weight(2, 1, 7), rnn=nn.LSTM(12, 7, batch_first=True, bidirectional=True),
                    out=nn.Linear(35, 5)),
        S,
        "neurons 7",
    ),
    "time first": (
        lambda: Net(lambda n, x: n.out(n.rnn(n.one(x).mT.permute(2, 0, 1))[0].transpose(0, 1)), one=nn.Linear(12, 8),
                    rnn=nn.GRU(8, 7, num_layers=2, bidirectional=True), out=nn.Linear(14, 5)),
        S,
        "neurons 8, neurons 7",
    ),
    "an lstm by hand": (lambda: Net(lstm_by_hand, one=nn.Linear(12, 28), two=nn.Linear(7, 28), out=nn.Linear(7, 5)), S, "neurons 7"),
}  # fmt: skip
VIEWS: dict[str, Row] = {
    "written into views": (lambda: linears(written_into), V, "neurons 2, neurons 4"),
    "written into zeros": (lambda: linears(filled, both=nn.Linear(16, 3)), V, "neurons 8, neurons 8"),
    "slices": (lambda: Net(slices, one=nn.Linear(6, 8), a=nn.Linear(5, 3), b=nn.Linear(5, 3), c=nn.Linear(6, 3)), V, "neurons 2, neurons 2"),
    "repeated": (lambda: Net(repeated, one=nn.Linear(6, 8), a=nn.Linear(32, 3), b=nn.Linear(16, 3), c=nn.Linear(16, 3)), V, "neurons 8, neurons 4"),
    "squeezed": (lambda: linears(squeezed), V, "neurons 8"),
    "unflattened": (lambda: linears(lambda n, x: n.two((n.one(x).unflatten(1, (2, 4)) * n.other(x).unflatten(-1, (-1, 4))).flatten(1))), V,
                    "neurons 2, neurons 4"),
    "stacked and unbound": (lambda: Net(unbound, one=nn.Linear(6, 24), two=nn.Linear(16, 3)), V, "neurons 8"),
    "rows of all samples": (lambda: Net(lambda n, x: n.out(F.relu(n.two(n.one(x).reshape(-1, 8))).view(x.shape[0], -1)), one=nn.Linear(12, 8),
                                        two=nn.Linear(8, 10), out=nn.Linear(50, 4)), S, "neurons 8, neurons 10"),
    "flipped": (lambda: after(lambda n, x: x.flip(1, -1) * x), P, "channels 4"),
    "padded channels": (lambda: after(lambda n, x: F.pad(x, (0, 0, 1, 0, 2, 3), value=0.7), two=conv(13, 4)), P, "channels 8, neurons 5"),
    "concatenated": (lambda: convs(lambda n, x: n.two(torch.cat([n.one(x), n.other(x), x[:, :1]], 1)), other=conv(3, 6), two=conv(15, 4)), P,
                     "channels 8, channels 6"),
}  # fmt: skip
CONVOLUTIONS: dict[str, Row] = {
    "grouped": (
        lambda: Net(lambda n, x: n.d(n.c(n.b(n.a(x)))), a=conv(3, 8), b=conv(8, 16, groups=4), c=conv(16, 16, groups=8), d=conv(16, 4)),
        P,
        "channels 2, channels 4, channels 2",
    ),
    "grouped and transposed": (
        lambda: after(
            lambda n, x: n.b(n.a(x)),
            a=nn.ConvTranspose2d(8, 16, 2, 2, groups=4),
            b=nn.ConvTranspose2d(16, 16, 3, groups=16, bias=False),
            two=conv(16, 4),
        ),
        P,
        "channels 4, channels 4, channels 2",
    ),
    "two outputs a channel": (lambda: after(lambda n, x: n.a(x), a=conv(8, 16, groups=8), two=conv(16, 4)), P, "channels 8, channels 2"),
    "a spelled shuffle": (
        lambda: after(lambda n, x: F.channel_shuffle(n.a(x), 4), one=conv(3, 16), a=conv(16, 16, groups=4), two=conv(16, 4, groups=4)),
        P,
        "channels 4, channels 4",
    ),
    "padding by word": (
        lambda: convs(lambda n, x: n.two(n.one(x)), one=nn.Conv2d(3, 8, 3, padding="same"), two=nn.Conv2d(8, 4, 3, padding="valid")),
        P,
        "channels 8",
    ),
    "gated linear unit": (lambda: after(lambda n, x: F.glu(x, 1), two=conv(4, 4)), P, "channels 4"),
    "pixels shuffled there and back": (
        lambda: after(lambda n, x: F.pixel_unshuffle(torch.tanh(F.pixel_shuffle(x, 2)), 2), one=conv(3, 32), two=conv(32, 4)),
        P,
        "channels 8",
    ),
    "prelu": (lambda: after(lambda n, x: n.act(x), act=nn.PReLU(8)), P, "channels 8"),
    "pooled to fixed sizes": (
        lambda: convs(
            lambda n, x: n.two((F.adaptive_avg_pool2d(n.one(x), (2, 3)) + F.adaptive_max_pool2d(n.one(x), (3, 2)).mT).flatten(1)),
            two=nn.Linear(48, 4),
        ),
        P,
        "channels 8",
    ),
    "resized": (lambda: after(lambda n, x: F.interpolate(x, size=(9, 7)) + F.interpolate(x, size=(9, 7), mode="bilinear")), P, "channels 8"),
    "along a sequence": (
        lambda: Net(
            lambda n, x: n.out(n.norm(n.two(n.one(x).mT)).mT),
            one=nn.Linear(12, 8),
            two=nn.Conv1d(8, 10, 3, padding=1),
            norm=nn.BatchNorm1d(10),
            out=nn.Linear(10, 4),
        ),
        S,
        "neurons 8, channels 10",
    ),
    "a gate of means": (
        lambda: after(lambda n, x: x * torch.sigmoid(n.gate(x.mean((2, 3))))[:, :, None, None], gate=nn.Linear(8, 8)),
        P,
        "channels 8",
    ),
    "attention without parameters": (
        lambda: after(lambda n, x: x * torch.sigmoid((x - x.mean((2, 3), keepdim=True)).square() / x.square().sum((2, 3), keepdim=True))),
        P,
        "channels 8",
    ),
}
PRODUCTS: dict[str, Row] = {
    "sum over two axes": (lambda: pairs(lambda n, z, x: z.sum((1, 2))[:, None] * x), V, "neurons 8, neurons 7"),
    "norm over two axes": (
        lambda: pairs(lambda n, z, x: n.two((z / torch.linalg.vector_norm(z, dim=(1, 2), keepdim=True)).flatten(1))), V, "neurons 8, neurons 7"),
    "outer product read whole": (lambda: pairs(lambda n, z, x: n.two(z.flatten(1))), V, "neurons 8, neurons 7"),
    "differences of all pairs": (lambda: linears(lambda n, x: n.two((n.one(x)[:, :, None] - n.one(x)[:, None]).abs().sum(2))), V, "neurons 8"),
    "product with itself": (lambda: Net(lambda n, x: n.two(n.one(x) @ n.one(x).mT @ n.one(x)), one=nn.Linear(12, 8), two=nn.Linear(8, 3)),
                            S, "head_dims 8"),
    "bilinear form": (lambda: linears(lambda n, x: n.two(torch.einsum("bi,ij,bj->bi", n.one(x), n.w, n.one(x))), w=weight(8, 8)), V, "neurons 8"),
    "mixture of experts": (lambda: Net(mixture, route=nn.Linear(6, 4), w1=weight(4, 6, 8), w2=weight(4, 8, 8), out=nn.Linear(8, 3)), V,
                           "neurons 8, neurons 8"),
    "weights by formula": (
        lambda: linears(weights_by_formula, w=weight(8, 8), gain=weight(8), w1=weight(7, 8), w2=weight(7, 8), w3=weight(6, 7), up=weight(6, 4),
                        down=weight(4, 7), both=weight(10, 6), out=nn.Linear(6, 3)),
        V,
        "neurons 8, neurons 8, neurons 7, neurons 6, neurons 4, neurons 10",
    ),
    "tied to the embedding": (lambda: Net(lambda n, x: F.linear(F.gelu(n.m(n.e(x))), n.e.weight), e=nn.Embedding(50, 8), m=nn.Linear(8, 8)),
                              tokens(), "neurons 8"),
    "masks": (lambda: linears(masks), V, "neurons 8"),
    "counts": (lambda: linears(counts, table=nn.Embedding(9, 3)), V, "neurons 8, neurons 8"),
    "one buffer twice": (lambda: linears(lambda n, x: n.two(n.one(x) * n.scale) + n.two(n.other(x)) * n.scale.sum(), scale=weight(8)), V,
                         "neurons 8"),
    "layer scale": (lambda: linears(lambda n, x: n.two(n.one(x) + n.gamma * n.back(F.relu(n.up(n.one(x))))), up=nn.Linear(8, 16),
                                    back=nn.Linear(16, 8),
                                    gamma=weight(8)), V, "neurons 8, neurons 16"),
}  # fmt: skip
STATISTICS: dict[str, Row] = {
    "norms by hand": (lambda: linears(hand_norm, gain=weight(8)), V, "~width 8"),
    "layer norm of maps": (lambda: after(lambda n, x: n.norm(x), norm=nn.LayerNorm([8, 8, 8])), P, "~width 8"),
    "layer norm of two dimensions": (lambda: linears(lambda n, x: n.two(n.norm(n.one(x).view(-1, 2, 4)).flatten(1)), norm=nn.LayerNorm([2, 4])),
                                     V, "~width 2, ~width 4"),
    "group norm": (lambda: after(lambda n, x: n.norm(x), one=conv(3, 16), norm=nn.GroupNorm(4, 16), two=conv(16, 4)), P, "channels 4, ~width 4"),
    "group norm in groups of one": (lambda: after(lambda n, x: n.norm(x), norm=nn.GroupNorm(8, 8)), P, "channels 8"),
    "response norm": (lambda: Net(response_norm, one=conv(3, 8), last=nn.Linear(8, 4), gain=weight(1, 1, 1, 8)), P, "~width 8"),
    "weights without their mean": (lambda: convs(weights_without_mean, one=conv(3, 6), w=weight(8, 6, 3, 3)), P, "channels 8, ~width 6"),
    "mean of a part": (lambda: linears(lambda n, x: n.two(n.one(x)[:, 4:]) * n.one(x)[:, :4].mean(1, keepdim=True), two=nn.Linear(4, 3)), V,
                       "~width 4, neurons 4"),
    "centred products": (lambda: pairs(lambda n, z, x: n.two((z - z.mean((1, 2), keepdim=True)).flatten(1))), V, "~width 8, ~width 7"),
}  # fmt: skip
TABLES = {**ATTENTION, **RECURRENT, **VIEWS, **CONVOLUTIONS, **PRODUCTS, **STATISTICS}
FORMS = {name: (Specimen(name, lambda build=build: vivid(build()), inputs), axes) for name, (build, inputs, axes) in TABLES.items()}
