"""The architectures that pruning must know: 42 small networks whose prunable dimensions have at least 8 positions, and attention 4 heads or more.

:data:`ARCHITECTURES` has them by name. Weights are random and large, so that a channel which goes astray shows in the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers_architectures import TRANSFORMERS
from zoo import Recurrent, Specimen, Tied, block, floats, head, images, tokens


def vivid(model: nn.Module, seed: int = 1) -> nn.Module:
    """Weights of the size 1 / sqrt(inputs), gains of 0.5 to 1.5, shifts of up to 0.3: what libraries start with hides most mistakes.

    (Layer scales of 1e-6, attention that is flat, biases of zero, gains of one.)
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
            elif name.rpartition(".")[2].startswith("bias"):
                parameter.uniform_(-0.3, 0.3, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def with_attention(specimen: Specimen, implementation: str) -> Specimen:
    """The same model of the transformers library with its attention written as "eager" (plain operators) or "sdpa" (one operator)."""

    def build() -> Any:
        model: Any = specimen.build()
        model.set_attn_implementation(implementation)
        return model

    return replace(specimen, build=build)


# Convolutions ----------------------------------------------------------------------------------------------------------------------


def conv_bn(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; the sum where shapes allow it (MobileNetV2, arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * 3
        self.adds = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            conv_bn(inputs, hidden, 1), nn.ReLU6(), conv_bn(hidden, hidden, 3, stride, hidden), nn.ReLU6(), conv_bn(hidden, outputs, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenet_v2() -> nn.Module:
    return nn.Sequential(block(3, 8), InvertedResidual(8, 12, 1), InvertedResidual(12, 12, 1), InvertedResidual(12, 16, 2), block(16, 24), head(24))


class DenseNet(nn.Module):
    """Two dense blocks and the transition between them (arXiv 1608.06993)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1, bias=False), head(32)
        self.one, self.two = (nn.ModuleList(self.layer(16 + 8 * i) for i in range(2)) for _ in range(2))
        self.between = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1, bias=False), nn.AvgPool2d(2))

    @staticmethod
    def layer(inputs: int) -> nn.Sequential:
        bottleneck = (nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 16, 1, bias=False))
        return nn.Sequential(*bottleneck, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layers in (self.one, self.two):
            for layer in layers:  # type: ignore[attr-defined]
                x = torch.cat([x, layer(x)], 1)
            x = self.between(x) if layers is self.one else x
        return self.head(x)


class SqueezeExcite(nn.Module):
    """A residual block whose branch is scaled by a gate of its own mean (arXiv 1709.01507)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = block(3, 16), block(16, 32), conv_bn(32, 16), head(16)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.one(x)
        return self.head(F.relu(x + self.two(y * self.gate(y)[:, :, None, None])))


class ResNeXt(nn.Module):
    """A bottleneck with a grouped convolution (arXiv 1611.05431)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = block(3, 16), head(24)
        self.branch = nn.Sequential(block(16, 32, size=1), block(32, 32, groups=4), conv_bn(32, 24, 1))
        self.skip = conv_bn(16, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.branch(x) + self.skip(x)))


class SharedWeights(nn.Module):
    """One head over two levels of a pyramid, as in detectors, and one block that runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.again = block(3, 16), block(16, 16, stride=2), conv_bn(16, 16)
        self.tower, self.boxes = block(16, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = self.stem(x)
        for _ in range(3):
            one = F.relu(one + self.again(one))
        return self.boxes(self.tower(one)), self.boxes(self.tower(self.down(one)))


class ShuffleUnit(nn.Module):
    """Half of the channels pass, half are convolved, then both are shuffled (ShuffleNetV2, arXiv 1807.11164)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(block(half, half, size=1), conv_bn(half, half, 3, 1, half), block(half, half, size=1))

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, dim=1)
        x = torch.cat([one, self.branch(two)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class SuperResolution(nn.Module):
    """Pixel shuffle twice, and a global skip (ESPCN, arXiv 1609.05158)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.out = nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + F.relu(self.body(y))
        y = F.relu(F.pixel_shuffle(self.up(y), 2))
        return F.pixel_shuffle(self.out(y), 2) + F.interpolate(x, scale_factor=4.0, mode="bilinear", align_corners=False)


class OptionA(nn.Module):
    """The shortcut takes every second pixel and pads missing channels with zeros (ResNet for CIFAR, arXiv 1512.03385)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = block(3, 12), block(12, 24, stride=2), conv_bn(24, 24), head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 6, 6))
        return self.head(F.relu(self.two(self.one(x)) + short))


class UNet(nn.Module):
    """Two levels with GroupNorm, skips by concatenation and a time embedding that is added, as diffusion models have it (arXiv 2006.11239)."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 32))
        self.one, self.two, self.middle = self.level(3, 16), self.level(16, 32), self.level(32, 32)
        self.down, self.up, self.out = nn.Conv2d(16, 16, 3, 2, 1), nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(16, 3, 1)
        self.last = self.level(32, 16)

    @staticmethod
    def level(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU())

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(self.down(one)) + self.time(time)[:, :, None, None]
        return self.out(self.last(torch.cat([one, self.up(self.middle(two))], 1)))


class Autoencoder(nn.Module):
    """A convolutional variational autoencoder in eval mode: two outputs beside the picture (arXiv 1312.6114)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(), nn.Conv2d(16, 24, 4, 2, 1), nn.LeakyReLU(), nn.Flatten())
        self.mean, self.spread, self.back = nn.Linear(24 * 16, 8), nn.Linear(24 * 16, 8), nn.Linear(8, 24 * 16)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(24, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.encoder(x)
        return self.decoder(F.relu(self.back(self.mean(x))).view(-1, 24, 4, 4)), self.mean(x), self.spread(x)


def volumes() -> nn.Module:
    one, two = nn.Conv3d(1, 8, 3, padding=1, bias=False), nn.Conv3d(8, 16, 3, 2, 1)
    body = (one, nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), two, nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool3d((1, 2, 2)), nn.Flatten(), nn.Linear(64, 5))


class Temporal(nn.Module):
    """Dilated causal convolutions with weight norm and residual sums (TCN, arXiv 1803.01271)."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ModuleList(weight_norm(nn.Conv1d(6 if i == 0 else 16, 16, 3, dilation=2**i)) for i in range(3))
        self.two = nn.ModuleList(weight_norm(nn.Conv1d(16, 16, 3, dilation=2**i)) for i in range(3))
        self.skip, self.head = nn.Conv1d(6, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            y = F.relu(self.one[i](F.pad(x, (2 * 2**i, 0))))
            y = F.relu(self.two[i](F.pad(y, (2 * 2**i, 0))))
            x = F.relu(y + (self.skip(x) if i == 0 else x))
        return self.head(x[:, :, -1])


class ConvolutionsThenLSTM(nn.Module):
    """Columns of feature maps as a sequence (CRNN, arXiv 1507.05717)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(block(1, 8), nn.MaxPool2d(2), block(8, 12), nn.MaxPool2d((2, 1)))
        self.rnn, self.head = nn.LSTM(12 * 4, 16, bidirectional=True, batch_first=True), nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).permute(0, 3, 1, 2).flatten(2)
        return F.log_softmax(self.head(self.rnn(x)[0]), -1)


# Linear layers and attention -------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Perceptrons across patches and across channels (MLP-Mixer, arXiv 2105.01601)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 10)
        self.across = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.within = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.one, self.two = nn.LayerNorm(24), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.across(self.one(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.two(x + self.within(x)).mean(1))


class GatedPerceptron(nn.Module):
    """Gate and value from one layer, cut in two by GLU (arXiv 2002.05202), twice: by the operator and by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.out = nn.Linear(12, 32), nn.Linear(16, 48), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.one(x), -1)
        gate, value = self.two(x).chunk(2, -1)
        return self.out(x + self.three(F.silu(gate) * value))


class FusedAttention(nn.Module):
    """Query, key and value from one layer, split by reshape, permute and unbind."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class FusedViT(nn.Module):
    """A vision transformer (arXiv 2010.11929) with fused projections, a class token and layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 10)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 32)), nn.Parameter(torch.zeros(1, 17, 32))
        self.attention = nn.ModuleList(FusedAttention(32, 4) for _ in range(2))
        self.ffn = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in range(2))
        self.norms, self.last, self.scale = nn.ModuleList(nn.LayerNorm(32) for _ in range(2)), nn.LayerNorm(32), nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for norm, attention, ffn in zip(self.norms, self.attention, self.ffn, strict=True):
            x = x + attention(norm(x)) * self.scale
            x = x + ffn(x)
        return self.head(self.last(x)[:, 0])


class Attended(nn.Module):
    """nn.MultiheadAttention, to itself and to a second sequence of another width; the attention weights are an output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.itself = nn.Linear(12, 32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.other, self.head = nn.MultiheadAttention(32, 4, kdim=10, vdim=10, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        x = x + self.itself(x, x, x, need_weights=False)[0]
        y, weights = self.other(x, context, context)
        return self.head(F.relu(x + y)), weights


class TransformerEncoder(nn.Module):
    """nn.TransformerEncoder, normed first."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True, activation="gelu")
        self.embed, self.encoder = nn.Linear(12, 32), nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def shuffle_net() -> nn.Module:
    return nn.Sequential(block(3, 24), ShuffleUnit(24), nn.MaxPool2d(2), ShuffleUnit(24), ShuffleUnit(24), block(24, 32, size=1), head(32))


def pictures_and_times(batch: int) -> tuple[Tensor, Tensor]:
    return images()(batch), floats(8)(batch)


def two_sequences(batch: int) -> tuple[Tensor, Tensor]:
    return floats(7, 12)(batch), floats(5, 10)(batch)


def specimen(name: str, build: Callable[[], nn.Module], inputs: Callable[[int], Any]) -> Specimen:
    return Specimen(name, lambda: vivid(build()), inputs)


HAND_WRITTEN = (
    specimen("mobilenet_v2", mobilenet_v2, images()),
    specimen("densenet", DenseNet, images()),
    specimen("squeeze_excite", SqueezeExcite, images()),
    specimen("resnext", ResNeXt, images()),
    specimen("shared_weights", SharedWeights, images()),
    specimen("shufflenet", shuffle_net, images()),
    specimen("pixel_shuffle", SuperResolution, images(size=8)),
    specimen("resnet_option_a", OptionA, images()),
    specimen("unet_groupnorm", UNet, pictures_and_times),
    specimen("autoencoder", Autoencoder, images()),
    specimen("conv3d", volumes, floats(1, 8, 8, 8)),
    specimen("tcn", Temporal, floats(6, 20)),
    specimen("crnn", ConvolutionsThenLSTM, images(channels=1)),
    specimen("lstm", lambda: Recurrent(nn.LSTM, num_layers=2), floats(7, 6)),
    specimen("bidirectional_gru", lambda: Recurrent(nn.GRU, bidirectional=True), floats(7, 6)),
    specimen("mlp_mixer", Mixer, images()),
    specimen("glu_mlp", GatedPerceptron, floats(12)),
    specimen("tied_embeddings", Tied, tokens()),
    specimen("fused_qkv_vit", FusedViT, images()),
    specimen("multihead_attention", Attended, two_sequences),
    specimen("transformer_encoder", TransformerEncoder, floats(7, 12)),
)
ARCHITECTURES = {one.name: one for one in (*HAND_WRITTEN, *(specimen(name, build, inputs) for name, (build, inputs) in TRANSFORMERS.items()))}
