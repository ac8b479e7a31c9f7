"""Sentences of several domains for all-MiniLM-L6-v2: what it is fitted on, and what it is judged on.

Fitting on one domain loses on others, so calibration mixes Python's documentation with the docstrings of torch, numpy and scipy. Judged on
other sentences of Python's documentation (``held``), on licence texts and on the descriptions of Debian's packages: nothing of those two is
ever fitted on. Which packages Debian describes depends on the machine's package lists.
"""

from __future__ import annotations

import importlib
import random
import re
import subprocess
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from models import example

from downsize.errors import TaskError

CALIBRATION, HELD, OTHER = 2000, 500, 300  # sentences
LICENCES = Path("/usr/share/common-licenses")
# fmt: off
DOCUMENTED = [
    "torch", "torch.nn", "torch.nn.functional", "torch.nn.init", "torch.optim", "torch.distributions", "torch.linalg", "torch.special",
    "torch.utils.data", "numpy", "numpy.linalg", "numpy.random", "numpy.fft", "numpy.polynomial", "numpy.ma", "scipy.cluster.hierarchy",
    "scipy.fft", "scipy.integrate", "scipy.interpolate", "scipy.linalg", "scipy.ndimage", "scipy.optimize", "scipy.signal", "scipy.sparse",
    "scipy.sparse.linalg", "scipy.spatial", "scipy.spatial.distance", "scipy.special", "scipy.stats",
]
# fmt: on


def shuffled(sentences: list[str]) -> list[str]:
    """The sentences in an order that is random and always the same."""
    found = sorted(sentences)
    random.Random(0).shuffle(found)
    return found


@cache
def held() -> list[str]:
    """500 sentences of Python's language reference."""
    return example("sentences").documentation()[-HELD:]


@cache
def docstrings() -> list[str]:
    """Sentences of the docstrings of the public names of torch, numpy and scipy."""
    texts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that will go
        for module in map(importlib.import_module, DOCUMENTED):
            found = (getattr(module, name, None) for name in sorted(dir(module)) if not name.startswith("_"))
            texts += [text for item in found if isinstance(text := getattr(item, "__doc__", None), str)]
    return shuffled(example("sentences").sentences_in(texts))


@cache
def calibration() -> list[str]:
    """2,000 sentences, half of them Python's language reference without those of :func:`held`, half docstrings, in turn."""
    known = set(held())
    reference = [sentence for sentence in example("sentences").documentation()[:-HELD] if sentence not in known]
    others = [sentence for sentence in docstrings() if sentence not in known]
    return [sentence for pair in zip(reference, others, strict=False) for sentence in pair][:CALIBRATION]


@cache
def licences() -> list[str]:
    """300 sentences of the licence texts that Debian installs."""
    files = sorted({path.resolve() for path in LICENCES.glob("*")})
    return _enough(example("sentences").sentences_in(path.read_text(errors="ignore") for path in files), f"licence texts in {LICENCES}")


@cache
def descriptions() -> list[str]:
    """300 one-line descriptions of Debian's packages, of 6 words or more that are mostly plain words."""
    try:
        lists = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, errors="ignore", check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise TaskError(f"apt-cache, which this benchmark reads package descriptions from, fails: {error}") from None
    lines = set(re.findall(r"^Description(?:-en)?: (.+)$", lists, re.MULTILINE))
    # Written as sentences, so that the same filter tells prose from lists of names.
    sentences = example("sentences").sentences_in(f"{line[0].upper()}{line[1:].rstrip('.')}." for line in sorted(lines))
    return _enough(sentences, "Debian's package lists (apt-get update brings them)")


def _enough(sentences: list[str], what: str) -> list[str]:
    if len(sentences) < OTHER:
        raise TaskError(f"{len(sentences)} sentences were found in {what}; expected at least {OTHER}.")
    return shuffled(sentences)[:OTHER]


def batches(sentences: list[str]) -> Iterator[tuple[dict, None]]:
    return example("sentences").batches(sentences)
