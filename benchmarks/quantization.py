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
from rows import Row, main
from training_fashion import EXAMPLE, LENET_EPOCHS, dense, score, task_of

from downsize.network.capture import capture
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


CASES = {"lenet": lenet, **quantization_lstm.CASES, **quantization_models.CASES}
SEEDS = {**dict.fromkeys(CASES, (0,)), "lenet": (0, 1, 2)}

if __name__ == "__main__":
    sys.exit(main((__doc__ or "").partition("\n")[0], CASES, SEEDS, "runs/quantization/results.json"))
