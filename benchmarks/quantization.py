"""Quantization below 8 bits, and of layers that int8 leaves out, beside other tools; after training, without labels.

    python benchmarks/quantization.py                           # everything
    python benchmarks/quantization.py --case lenet --seed 0     # one case, one seed
    python benchmarks/quantization.py --show --markdown         # the tables of what was run so far

Results are added to runs/quantization/results.json line by line; a line that is there already is not made again. All figures are of the written
ONNX file in ONNX Runtime. What is measured, and how, stands in benchmarks/README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import fashion
import quantization_lstm
import quantization_models
import quantization_peers
from rows import Quality, Row, main
from torch import nn
from training_fashion import EXAMPLE, LENET_EPOCHS, dense, score, task_of

from downsize.network.capture import capture
from downsize.network.cost import count
from downsize.scores import top1
from downsize.techniques.quantize import Quantize


def lenet(seed: int) -> Iterator[Row]:
    """LeNet-300-100 on Fashion-MNIST, all three layers in few bits, one scale a row."""
    model = dense(fashion.LeNet, seed, LENET_EPOCHS, 0.05)
    task, start = task_of(model), capture(model, EXAMPLE)
    yield Row("float", lambda: start, score)
    for bits in (4, 3, 2):
        plain = Quantize(bits=bits, ends=bits, activations="none", rounding="nearest")
        yield Row(f"{bits} bits, to nearest", lambda technique=plain: technique(start, task), score)
        solved = Quantize(bits=bits, ends=bits, activations="none", samples=fashion.CALIBRATION)
        yield Row(f"{bits} bits, GPTQ, in order", lambda technique=solved: technique(start, task), score)
    macs = count(start, EXAMPLE[:1]).macs / 1e6  # of all lines the same

    def score_of(made: nn.Module) -> Quality:
        right = top1(quantization_peers.answering(made), fashion.test())
        return {"top-1": 100 * right, "MMACs": macs, "kB": quantization_peers.saved_bytes(made) / 1e3}

    yield from quantization_peers.lenet(model, score_of)


CASES = {"lenet": lenet, **quantization_lstm.CASES, **quantization_models.CASES}
SEEDS = {**dict.fromkeys(CASES, (0,)), "lenet": (0, 1, 2)}

if __name__ == "__main__":
    sys.exit(main((__doc__ or "").partition("\n")[0], CASES, SEEDS, "runs/quantization/results.json"))
