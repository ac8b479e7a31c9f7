"""What training gives back: fine-tuning, distillation, few bits, few weights; beside the same budget without a teacher.

    python benchmarks/training.py                               # everything: hours
    python benchmarks/training.py --case lenet5 --seed 0        # one case, one seed
    python benchmarks/training.py --show --markdown             # the tables of what was run so far

Results are added to runs/training/results.json line by line; a line that is there already is not made again. All figures are of the written
ONNX file in ONNX Runtime. What is measured, and how, stands in benchmarks/README.md.
"""

from __future__ import annotations

import sys

import training_fashion
import training_real
from rows import main

CASES = {**training_fashion.CASES, **training_real.CASES}
SEEDS = {**dict.fromkeys(training_fashion.CASES, (0, 1, 2)), **dict.fromkeys(training_real.CASES, (0,))}

if __name__ == "__main__":
    sys.exit(main((__doc__ or "").partition("\n")[0], CASES, SEEDS, "runs/training/results.json"))
