"""The built-in scores against scikit-learn; judging a file against scipy's paired bootstrap and against scores computed by hand."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score, top_k_accuracy_score

from downsize import scores
from downsize.errors import ArtifactError, MeasureError, TaskError
from downsize.measure.score import Recording, judge
from downsize.spool import SMALL, Spool

WEIGHTS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
NOISE = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)


def original(inputs):
    return inputs @ WEIGHTS


def worse(inputs):
    return inputs @ (WEIGHTS + 0.7 * NOISE)


def batches(sizes=(8, 8, 5), targets=True) -> Iterator[tuple[Any, Any]]:
    generator = np.random.default_rng(2)
    for size in sizes:
        inputs = generator.normal(size=(size, 6)).astype(np.float32)
        noisy = original(inputs) + generator.normal(size=(size, 4))
        yield inputs, noisy.argmax(1) if targets else None


def gather(predict, given):
    pairs = [(predict(inputs), targets) for inputs, targets in given]
    return np.concatenate([outputs for outputs, _ in pairs]), np.concatenate([targets for _, targets in pairs])


def macro_f1(predict, given):
    outputs, targets = gather(predict, given)
    return f1_score(targets, outputs.argmax(1), average="macro", labels=range(4))


def auc(predict, given):
    outputs, targets = gather(predict, given)
    return roc_auc_score(targets == 0, outputs[:, 0])  # an error when a draw has one class only


# the built-in scores ------------------------------------------------------------------------------------------------------------


def test_top1_and_top5_are_sklearns():
    generator = np.random.default_rng(0)
    logits, classes = generator.normal(size=(200, 9)), generator.integers(0, 9, 200)
    given = [(logits[:150], classes[:150]), (logits[150:], classes[150:])]
    assert scores.top1(lambda x: x, given) == accuracy_score(classes, logits.argmax(1))
    assert scores.top5(lambda x: x, given) == top_k_accuracy_score(classes, logits, k=5)
    as_torch = [(torch.tensor(a), torch.tensor(b)) for a, b in given]
    assert scores.top5(lambda x: {"aux": x[:, :1], "logits": x}, as_torch) == scores.top5(lambda x: x, given)


def test_top1_of_tokens_leaves_out_minus_100():
    logits = np.array([[[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]]])
    assert scores.top1(lambda x: x, [(logits, np.array([[0, 0, -100]]))]) == 0.5


def test_a_nan_is_a_wrong_answer():
    logits = np.array([[np.nan, 1.0], [0.0, 1.0]])
    assert scores.top1(lambda x: x, [(logits, np.array([0, 1]))]) == 0.5
    assert scores.top1(lambda x: x, [(logits, np.array([1, 1]))]) == 0.5


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (None, "needs the right classes"),
        (np.eye(4)[:3], r"float64 \[3, 4\].*expects class numbers, whole numbers \[3\]"),
        (np.array([[0], [1], [2]]), "squeeze"),
        (np.array([0, 1, 4]), "class 4; the model has the classes 0 to 3"),
        (np.array([-100] * 3), "no samples"),
    ],
)
def test_top1_refuses_other_targets(targets, words):
    with pytest.raises(TaskError, match=words):
        scores.top1(lambda x: x, [(np.ones((3, 4)), targets)])


def test_top5_of_five_classes_is_refused():
    with pytest.raises(TaskError, match="more than 5 classes"):
        scores.top5(lambda x: x, [(np.ones((3, 5)), np.zeros(3, int))])


def test_fidelity_weighs_samples_not_batches():
    outputs = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    given = [(outputs[:1], np.array([[0.0, 1.0]])), (outputs[1:], outputs[1:])]
    assert scores.fidelity(lambda x: x, given) == pytest.approx(2 / 3)
    with pytest.raises(TaskError, match="targets are None"):
        scores.fidelity(lambda x: x, [(outputs, None)])


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda predict, given: float("nan"), "is nan; expected a finite number"),
        (lambda predict, given: -float("inf"), "is -inf"),
        (lambda predict, given: [1, 2], r"gave \[1, 2\]; expected one number"),
        (lambda predict, given: 1 / 0, "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_broken_score_is_named(score, words):
    score.__name__ = "mine"
    with pytest.raises(TaskError, match="'mine' of the original model.*" + words):
        judge(original, worse, score, batches())


# judging ------------------------------------------------------------------------------------------------------------------------


def test_the_drop_and_its_interval_are_scipys_paired_bootstrap():
    found = judge(original, worse, scores.top1, batches(), samples=400, seed=5).measurements
    right = [np.concatenate([run(x).argmax(1) == y for x, y in batches()]).astype(float) for run in (original, worse)]
    expected = stats.bootstrap(
        right, lambda a, b: a.mean() - b.mean(), paired=True, vectorized=False, n_resamples=400, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    drop = found["drop"]
    assert found["baseline_score"].value == right[0].mean()
    assert found["score"].value == right[1].mean()
    assert drop.value == pytest.approx(right[0].mean() - right[1].mean(), abs=1e-12)
    assert drop.value > 0
    assert (drop.low, drop.high) == pytest.approx(tuple(expected), abs=1e-12)
    assert (drop.samples, drop.unit, drop.note) == (21, "fraction", None)
    assert found["score"].unit == "fraction"


@pytest.mark.filterwarnings("ignore:F-score is ill-defined")  # in draws that lack a class
def test_a_score_that_is_no_mean_is_computed_again_on_each_draw():
    found = judge(original, worse, macro_f1, batches(), samples=60, seed=5).measurements["drop"]
    data = list(batches())
    inputs, targets = np.concatenate([x for x, _ in data]), np.concatenate([y for _, y in data])
    right, wrong = original(inputs).argmax(1), worse(inputs).argmax(1)

    def drop(a, b, y):
        one, other = (f1_score(y, classes, average="macro", labels=range(4)) for classes in (a, b))
        return one - other

    expected = stats.bootstrap(
        (right, wrong, targets), drop, paired=True, vectorized=False, n_resamples=60, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert found.value == pytest.approx(drop(right, wrong, targets), abs=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-9)


def test_a_score_of_unknown_unit_has_none():
    assert judge(original, worse, macro_f1, batches(), samples=5).measurements["score"].unit == ""


def test_a_score_that_some_draws_do_not_define_still_has_an_interval():
    drop = judge(original, worse, auc, batches(), samples=50).measurements["drop"]
    assert drop.samples == 21
    assert drop.low is not None
    assert drop.high is not None
    assert drop.low < drop.value < drop.high


def test_a_file_equal_to_the_original_loses_nothing():
    found = judge(original, original, scores.top1, batches())
    drop = found.measurements["drop"]
    assert (drop.value, drop.low, drop.high) == (0, 0, 0)
    assert (found.agreement.top1, found.agreement.relative_error, found.agreement.cosine, found.agreement.kl) == (1, 0, 1, 0)


def test_the_drop_has_no_rounding_error_that_misses_a_limit():
    def score(predict, given):
        return sum(float(predict(x).mean()) for x, _ in given)

    data = [(np.zeros((20, 1), np.float32), np.zeros(20))]
    drop = judge(lambda x: np.full((len(x), 1), 0.75), lambda x: np.full((len(x), 1), 0.70), score, data).measurements["drop"].value
    assert drop == 0.05 < 0.75 - 0.70


@pytest.mark.parametrize(("score", "targets", "note"), [(None, True, "the task has no score"), (scores.top1, False, "the targets are None")])
def test_without_score_or_targets_fidelity_to_the_original_counts(score, targets, note):
    found = judge(original, worse, score, batches(targets=targets))
    inputs = np.concatenate([x for x, _ in batches()])
    left, right = original(inputs), worse(inputs)
    cosine = ((left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)).mean()
    assert found.measurements["baseline_score"].value == 1
    assert found.measurements["score"].value == pytest.approx(cosine, rel=1e-5)
    assert found.measurements["score"].value == pytest.approx(found.agreement.cosine, rel=1e-12)
    assert note in str(found.measurements["drop"].note)


def test_a_score_of_whole_batches_redraws_batches():
    def best_in_batch(predict, given):  # another number when batches are cut
        return float(np.mean([predict(x).max() for x, _ in given]))

    assert judge(original, worse, best_in_batch, batches()).measurements["drop"].samples == 3


def test_targets_that_are_no_tensors_are_not_cut():
    given = [(x, y.tolist()) for x, y in batches()]
    found = judge(original, worse, lambda predict, data: float(np.mean([(predict(x).argmax(1) == y).mean() for x, y in data])), given)
    assert found.measurements["drop"].samples == 3


def test_one_unit_has_no_interval_but_says_so():
    drop = judge(original, worse, scores.top1, batches(sizes=(1,))).measurements["drop"]
    assert (drop.low, drop.high, drop.samples) == (None, None, 1)
    assert "one unit only" in str(drop.note)


def test_each_model_runs_once_and_batches_are_read_once():
    calls = {"original": 0, "worse": 0}

    def counted(name, run):
        def predict(inputs):
            calls[name] += 1
            return run(inputs)

        return predict

    recording = Recording(counted("original", original), batches())
    for _ in range(2):
        recording.judge(counted("worse", worse), macro_f1, samples=20)
    assert calls == {"original": 3, "worse": 6}


def test_a_score_with_inputs_of_its_own_runs_the_models():
    def flipped(predict, given):
        return float(np.mean([(predict(-x).argmax(1) == y).mean() for x, y in given]))

    found = judge(original, worse, flipped, batches(sizes=(8, 8))).measurements
    assert found["drop"].low is None
    assert "inputs of its own" in str(found["drop"].note)
    for name, run in (("baseline_score", original), ("score", worse)):
        assert found[name].value == np.mean([(run(-x).argmax(1) == y).mean() for x, y in batches(sizes=(8, 8))])


def test_a_score_sees_the_real_inputs_also_when_they_wait_on_disk():
    seen = set()

    def watching(predict, given):
        for x, _ in given:
            seen.update(np.unique(x))
        return 1.0

    data = [(np.full((3, SMALL), value, np.float32), np.zeros(3)) for value in (7, 9)]
    judge(lambda x: x[:, :4], lambda x: x[:, :4], watching, data)
    assert seen == {7, 9}


def test_torch_stays_torch_and_dicts_stay_dicts():
    kinds = set()

    def model(ids, mask):
        return {"logits": ids.float()[:, :4] * mask, "hidden": (ids.float(),)}

    def score(predict, given):
        for inputs, targets in given:
            outputs = predict(inputs)
            kinds.update(type(value) for value in (*inputs.values(), targets, outputs["logits"], outputs["hidden"][0]))
        return 1.0

    generator = torch.Generator().manual_seed(0)
    data = [({"ids": torch.randint(0, 9, (4, 5000), generator=generator), "mask": torch.ones(4, 1)}, torch.zeros(4)) for _ in range(2)]
    found = judge(lambda x: model(**x), lambda x: model(**x), score, data)
    assert kinds == {torch.Tensor}
    assert (found.measurements["score"].samples, found.agreement.samples) == (8, 8)


@pytest.mark.parametrize(
    ("artifact", "words"),
    [
        (lambda x: {"logits": worse(x)}, "have the structure"),
        (lambda x: worse(x)[:, :3], r"shape \[8, 3\]; expected \[8, 4\]"),
        (lambda x: worse(x) * np.nan, "32 values that are NaN or infinite in batch 1"),
    ],
)
def test_an_artifact_that_answers_otherwise_is_refused(artifact, words):
    with pytest.raises(ArtifactError, match=words):
        judge(original, artifact, scores.top1, batches())


@pytest.mark.parametrize(
    ("reference", "data", "words"),
    [
        (original, [], "no batches"),
        (original, [*batches(), *batches(targets=False)], "with and without targets"),
        (lambda x: original(x) / 0, [*batches()], "original model's output 0 has 32 values.* in batch 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_data_that_cannot_judge_is_refused(reference, data, words):
    with pytest.raises(TaskError, match=words):
        judge(reference, worse, scores.top1, data)


# the temporary file -------------------------------------------------------------------------------------------------------------


def test_a_spool_gives_back_what_was_written():
    big = np.random.default_rng(0).normal(size=(50, 100))
    tree = {
        "numpy": (big, big.T, big[::2]),
        "torch": [torch.tensor(big, dtype=torch.float32), torch.tensor(big, dtype=torch.bfloat16), torch.arange(5000)],
        "small": np.float32(3),
        "text": "kept",
        "none": None,
    }
    spool = Spool()
    spool.append(tree)
    spool.append(big + 1)
    for back, more in ((spool.read(0), spool.read(1)), spool.views()):
        assert (back["text"], back["none"], back["small"]) == ("kept", None, 3)
        assert all(np.array_equal(a, b) for a, b in zip(back["numpy"], tree["numpy"], strict=True))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(back["torch"], tree["torch"], strict=True))
        assert np.array_equal(more, big + 1)


def test_a_spool_copies_and_its_views_change_no_file():
    small, big = np.zeros(3), np.zeros(SMALL)
    spool = Spool()
    spool.append((small, big))
    small += 1
    big += 1
    for array in spool.views()[0]:
        assert not array.any()
        array += 2
    assert not spool.read(0)[1].any()


def test_a_full_disk_is_told(monkeypatch):
    class Full:
        def __init__(self, **options):
            self.file = open(os.devnull, "rb")  # noqa: SIM115

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(MeasureError, match="No space left on device; free space there, or set TMPDIR"):
        Spool().append(np.zeros(SMALL))


def test_judging_keeps_inputs_out_of_memory():
    program = """
import resource, numpy as np
from downsize.measure.score import Recording
from downsize import scores
def data():
    for i in range(40):
        yield np.full((8, 3 * 224 * 224), i, np.float32), np.zeros(8, int)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = lambda x: x[:, :10] + np.arange(10, dtype=np.float32)
next(data()); before = peak()
recording = Recording(model, data())
recording.judge(model, scores.top1)
import sys
print(peak() - before, "torch" in sys.modules)
"""
    grown, torch_came = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert int(grown) * 1024 < 0.2 * 40 * 8 * 3 * 224 * 224 * 4  # of 193 MB
    assert torch_came == "False"
