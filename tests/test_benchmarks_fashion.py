"""The benchmark's reader of idx files, and the models it trains on Fashion-MNIST."""

import gzip
import importlib
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from downsize.errors import TaskError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def fashion():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("fashion")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("fashion", "models"):
            sys.modules.pop(name, None)


def written(path: Path, array: np.ndarray) -> Path:
    """The array as a gzipped idx file, by its definition."""
    path.write_bytes(gzip.compress(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()))
    return path


@pytest.mark.parametrize("shape", [(3,), (4, 5), (2, 3, 4), (0, 28, 28), (300, 2, 1)])
def test_an_idx_file_is_read_as_it_was_written(fashion: ModuleType, tmp_path: Path, shape: tuple[int, ...]):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = fashion.read_idx(written(tmp_path / "some.gz", array))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, array)


def test_a_damaged_idx_file_is_refused(fashion: ModuleType, tmp_path: Path):
    file = written(tmp_path / "some.gz", np.zeros((4, 5), np.uint8))
    content = gzip.decompress(file.read_bytes())
    for damaged, words in [
        (gzip.compress(content[:-1]), "19 values"),
        (gzip.compress(content + b"\x00"), "21 values"),
        (gzip.compress(b"\x00\x00\x0d" + content[3:]), "begins with"),
        (gzip.compress(content[:9]), "begins with"),
        (gzip.compress(b""), "begins with"),
        (file.read_bytes()[:-9], "cannot be unpacked"),
        (content, "cannot be unpacked"),
        (file.read_bytes()[:12] + b"\xff" * 9, "cannot be unpacked"),
    ]:
        file.write_bytes(damaged)
        with pytest.raises(TaskError, match=words):
            fashion.read_idx(file)
    with pytest.raises(TaskError, match="apt-get install"):
        fashion.read_idx(tmp_path / "missing.gz")


@pytest.mark.slow
def test_lenet_is_trained_once_and_as_good_as_the_numbers_to_reach_suppose(fashion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not fashion.FOLDER.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    inputs, classes = fashion.images("train")
    assert inputs.shape == (60000, 1, 28, 28)
    assert torch.bincount(classes).tolist() == [6000] * 10
    assert abs(inputs.mean().item()) < 1e-3
    assert abs(inputs.std().item() - 1) < 1e-3
    monkeypatch.setattr(fashion, "WEIGHTS", tmp_path)
    first = fashion.lenet()
    assert 0.87 <= fashion.accuracy(first) <= 0.88
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    second = fashion.lenet()
    assert file.stat().st_mtime_ns == before
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
