"""Small models of every common architecture, with random weights: the laws must hold on all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.structure import as_call


@dataclass(frozen=True)
class Specimen:
    """One architecture: ``make()`` gives the module in eval mode, ``inputs(batch)`` the inputs of one batch of that size."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build()
        shake(model)
        return model.eval()


def shake(model: nn.Module) -> None:
    """Give batch norms statistics, gains and shifts that are not the neutral ones."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high)


def images(channels: int = 3, size: int = 16) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))


def tokens(vocabulary: int = 50, length: int = 9) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))


def floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def block(inputs: int, outputs: int, stride: int = 1, groups: int = 1, size: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def head(channels: int, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, classes))


def plain() -> nn.Module:
    return nn.Sequential(block(3, 8), nn.MaxPool2d(2), block(8, 12, stride=2), head(12))


class Residual(nn.Module):
    """Residual blocks with an in-place addition and an in-place activation on the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = block(3, 8), block(8, 8), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.skip, self.relu, self.head = nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.two(self.one(x))
        y += self.skip(x)
        return self.head(self.relu(y))


class Depthwise(nn.Module):
    """Inverted bottleneck with the asymmetric padding of TensorFlow's 'same'."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = block(3, 12, size=1), nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, 2, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True))
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.project(self.depthwise(F.pad(self.expand(x), [0, 1, 0, 1]))))


class Dense(nn.Module):
    """Every layer reads all earlier ones (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(4 + 4 * i), nn.ReLU(), nn.Conv2d(4 + 4 * i, 4, 3, padding=1)) for i in range(3))
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding="same"), head(16)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return self.head(torch.cat(parts, 1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = block(3, 8), head(8)
        self.gate = nn.Sequential(nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x * self.gate(x.mean((2, 3), keepdim=True)))


class Shuffle(nn.Module):
    """Split, grouped convolution and channel shuffle (ShuffleNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = block(3, 8), block(4, 4, groups=2), head(8)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.stem(x).chunk(2, dim=1)
        x = torch.cat([one, self.branch(two)], 1)
        n, c, h, w = x.shape
        return self.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.SiLU())
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(24, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down(x)
        two = self.middle(one)
        three = F.interpolate(two, scale_factor=2.0, mode="nearest")[:, :8]
        return self.out(torch.cat([one, self.up(two), three], 1))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.attention, self.norm = nn.Conv2d(3, 16, 4, 4), nn.MultiheadAttention(16, 4, batch_first=True), nn.LayerNorm(16)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.ffn, self.head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.ffn(self.norm(x)))[:, 0])


class Encoder(nn.Module):
    """nn.TransformerEncoder over token embeddings, with a padding mask from the values."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * math.sqrt(16)
        return self.head(self.encoder(x, src_key_padding_mask=ids == 0).mean(1))


class Recurrent(nn.Module):
    def __init__(self, cell: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = cell(6, 8, batch_first=True, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    """The embedding is the output layer's weight too, and one block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(50, 12), nn.Linear(12, 12), nn.Linear(12, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(torch.tanh(self.block(torch.tanh(self.block(x)))))


class Fusion(nn.Module):
    """A dict of inputs with an optional one, and outputs in nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, left: Tensor, right: Tensor, mask: Tensor | None = None, scale: float = 1.0, sign: bool = False) -> dict[str, Any]:
        one, two = self.left(left), self.right(right) * scale
        if mask is not None:
            two = two * mask[:, None]
        return {"sum": -one - two if sign else one + two, "parts": (one, [two, {"max": torch.maximum(one, two)}]), "nothing": None}


class Text(nn.Module):
    """Conv1D over characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(50, 8), nn.BatchNorm1d(12), nn.Linear(12, 4)
        self.convolutions = nn.ModuleList(nn.Conv1d(8, 12, k, dilation=k, padding="same") for k in (1, 3, 5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        return self.head(sum(self.norm(F.relu(layer(x))).amax(2) for layer in self.convolutions))  # type: ignore[arg-type]


def transformers_model(name: str) -> nn.Module:
    """A tiny model of the transformers library, made from its configuration; nothing is downloaded."""
    import transformers as hf

    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50}
    resnet: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5}
    segformer: dict[str, Any] = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
    }
    segformer |= {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16, "num_labels": 3}
    made = {
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        ),
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**small, max_position_embeddings=32)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**small, num_key_value_heads=2, max_position_embeddings=32)),
        "resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**resnet)),
        "segformer": lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**segformer)),
    }
    return made[name]()


def masked_tokens(batch: int) -> dict[str, Tensor]:
    ids = tokens()(batch)
    mask = torch.ones_like(ids)
    mask[-1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def fusion_inputs(batch: int) -> dict[str, Any]:
    return {"right": floats(5)(batch), "left": floats(6)(batch), "mask": None, "scale": 0.5, "sign": True}


ZOO = (
    Specimen("plain", plain, images()),
    Specimen("residual", Residual, images()),
    Specimen("depthwise", Depthwise, images()),
    Specimen("dense", Dense, images()),
    Specimen("squeeze_excite", SqueezeExcite, images()),
    Specimen("shuffle", Shuffle, images()),
    Specimen("unet", UNet, images()),
    Specimen("vit", ViT, images()),
    Specimen("encoder", Encoder, tokens()),
    Specimen("lstm", lambda: Recurrent(nn.LSTM, num_layers=2), floats(7, 6)),
    Specimen("gru", lambda: Recurrent(nn.GRU, bidirectional=True), floats(7, 6)),
    Specimen("tied", Tied, tokens()),
    Specimen("fusion", Fusion, fusion_inputs),
    Specimen("text", Text, tokens()),
    Specimen("gpt2", lambda: transformers_model("gpt2"), lambda batch: {"input_ids": tokens()(batch)}),
    Specimen("bert", lambda: transformers_model("bert"), masked_tokens),
    Specimen("llama", lambda: transformers_model("llama"), masked_tokens),
    Specimen("resnet", lambda: transformers_model("resnet"), lambda batch: {"pixel_values": images()(batch)}),
    Specimen("segformer", lambda: transformers_model("segformer"), images(size=32)),
)
BY_NAME = {specimen.name: specimen for specimen in ZOO}


class Layer(nn.Module):
    """A linear layer, a counter, and any forward over them."""

    count: Tensor

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.chosen = nn.Linear(4, 4), forward
        self.register_buffer("count", torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.chosen(self, *args, **kwargs)


def captured(forward: Callable[..., Any], example: Any = None, **options: Any) -> Network:
    return capture(Layer(forward).eval(), torch.randn(2, 4) if example is None else example, **options)


def targets(network: Network) -> list[str]:
    return [str(node.target) for node in network.graph.nodes if node.op == "call_function"]


@functools.cache
def specimen(name: str) -> tuple[nn.Module, Network]:
    """The module of that name and its Network, made once: copy the Network before changing it."""
    torch.set_num_threads(1)
    model = BY_NAME[name].make()
    return model, capture(model, BY_NAME[name].inputs(2))


def run(model: nn.Module, inputs: Any) -> Any:
    """The module's outputs in plain containers; what a Network leaves out (None of a ModelOutput, caches) is left out."""
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        return plain_output(model(*args, **kwargs))


def plain_output(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: plain_output(item) for key, item in value.items() if item is None or isinstance(item, (Tensor, tuple, list, dict))}
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain_output, value))
    return value


def assert_close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same containers, and tensors that differ by at most ``tolerance`` of the largest value (0: bit-equal)."""
    if isinstance(expected, Tensor):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        if tolerance and expected.is_floating_point():
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()
        else:
            assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key, value in expected.items():
            assert_close(got[key], value, tolerance)
    elif isinstance(expected, (tuple, list)):
        assert type(got) is type(expected) and len(got) == len(expected)
        for one, two in zip(got, expected, strict=True):
            assert_close(one, two, tolerance)
    else:
        assert got == expected
