"""The objective of distillation: what it adds up, which loss an output gets, features, padding, early exits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_nets import Net
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from zoo import images, specimen, tokens

from downsize.errors import TaskError
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.numerics.distillation import attention_maps, dkd, embedding, relations, relative_error, similarity_preserving, soft_logits, standardized
from downsize.scores import top1
from downsize.structure import flatten
from downsize.task import Task
from downsize.techniques.distill import Distill
from downsize.training.branches import Branches
from downsize.training.distillation import Distillation
from downsize.training.norms import to_training
from downsize.training.objective import Batch
from downsize.training.outputs import class_dimension
from downsize.training.pairing import layers
from downsize.training.students import narrow
from downsize.training.teacher import with_values


def classifier(width: int = 8, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)).eval()


def data(targets: bool = True, count: int = 3) -> list[tuple[Tensor, Tensor | None]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 6, generator=generator), torch.randint(0, 4, (5,), generator=generator) if targets else None) for _ in range(count)]


def task_of(model: nn.Module, batches: list[Any], **options: Any) -> Task:
    return Task(model, batches[0][0], {"calibrate": lambda: batches, "train": lambda: batches}, **options)


def loss_of(plan: Distill, student: Network, task: Task) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor], Batch]:
    """The objective's value on the first batch, the student's and the teacher's outputs, and the batch."""
    objective = plan.objective(student, task)
    inputs, targets = next(task.batches("train"))
    leaves = student.flat(inputs)
    values = with_values(student, objective.taps).graph_module(*leaves)
    count = len(values) - len(objective.taps)
    batch = Batch(inputs, targets, leaves)
    loss = objective(batch, values[:count], dict(zip(objective.taps, values[count:], strict=True)))
    return loss, values[:count], flatten(task.predict(inputs))[0], batch


STUDENT = capture(classifier(seed=7), torch.zeros(2, 6))


# The sum ------------------------------------------------------------------------------------------------------------------------------


def test_labels_and_teacher_share_the_weight():
    task = task_of(classifier(), data(), score=top1)
    loss, (out,), (teacher,), batch = loss_of(Distill(temperature=2.0, weight=0.7), STUDENT, task)
    expected = 0.3 * cross_entropy(out, batch.targets) + 0.7 * soft_logits(out, teacher, 2.0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_the_tasks_own_loss_is_the_one_with_the_rest_of_the_weight():
    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().sum() + targets.sum()

    task = task_of(classifier(), data(), loss=own)
    loss, (out,), (teacher,), batch = loss_of(Distill(outputs="error", weight=0.5), STUDENT, task)
    assert float(loss.detach()) == pytest.approx(float((0.5 * own(out, batch.targets) + 0.5 * relative_error(out, teacher)).detach()), rel=1e-6)


@pytest.mark.parametrize("plan", [Distill(weight=0.2), Distill(weight=1.0)])
def test_without_labels_the_teacher_stands_alone(plan):
    task = task_of(classifier(), data(targets=False), score=top1)
    loss, (out,), (teacher,), _ = loss_of(plan, STUDENT, task)
    assert float(loss.detach()) == pytest.approx(float(soft_logits(out, teacher, 4.0).detach()), rel=1e-6)


def test_with_no_weight_the_teacher_is_not_asked():
    task = task_of(classifier(), data(), score=top1)
    objective: Any = Distill(weight=0.0).objective(STUDENT, task)
    inputs, targets = data()[0]
    out = STUDENT.graph_module(inputs)
    batch = Batch(inputs, targets, [inputs])
    objective.teacher = None
    assert targets is not None and torch.equal(objective(batch, out, {}), cross_entropy(out[0], targets))


@pytest.mark.parametrize(
    ("outputs", "features"),
    [("logits", "none"), ("dist", "hint"), ("dkd", "attention"), ("error", "relations"), ("auto", "similarity"), ("standardized", "none")],
)
def test_a_student_that_is_its_teacher_has_no_loss(features, outputs):
    model = classifier()
    task = task_of(model, data(), score=top1)
    loss, *_ = loss_of(Distill(weight=1.0, outputs=outputs, features=features), capture(model, torch.zeros(2, 6)), task)
    assert abs(float(loss.detach())) < 1e-5
    assert float(loss_of(Distill(weight=1.0, outputs=outputs, features=features), STUDENT, task)[0].detach()) > 1e-2


# Outputs ------------------------------------------------------------------------------------------------------------------------------


def test_targets_decide_which_dimension_is_the_classes():
    pixels, numbers = torch.zeros(2, 5, 3, 3), torch.zeros(2, 3, 3).long()
    assert class_dimension(pixels, numbers) == 1
    assert class_dimension(torch.zeros(2, 3, 5), torch.zeros(2, 3).int()) == 2
    assert class_dimension(torch.zeros(2, 5), torch.zeros(2).long()) == 1
    for targets in (None, torch.zeros(2), torch.zeros(2, 5).long(), torch.zeros(2).bool(), [1, 2]):
        assert class_dimension(torch.zeros(2, 5), targets) is None


def test_maps_of_class_scores_are_compared_over_the_classes():
    model = Net(lambda net, x: net.conv(x), conv=nn.Conv2d(3, 4, 3)).eval()
    other = capture(Net(lambda net, x: net.conv(x), conv=nn.Conv2d(3, 4, 3)).eval(), torch.zeros(2, 3, 5, 5))
    for targets in (torch.zeros(2, 3, 3).long(), None):
        task = task_of(model, [(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)), targets)])
        loss, (out,), (teacher,), _ = loss_of(Distill(outputs="logits"), other, task)
        expected = soft_logits(out.permute(0, 2, 3, 1).reshape(-1, 4), teacher.permute(0, 2, 3, 1).reshape(-1, 4))
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_vectors_of_length_one_are_compared_by_cosines_and_numbers_by_their_error():
    def unit(net: Any, x: Tensor) -> dict[str, Any]:
        y = net.linear(x)
        return {"raw": y, "unit": normalize(y, dim=1), "whole": y.long()}

    models = [Net(unit, linear=nn.Linear(6, 4)).eval() for _ in range(2)]
    student = capture(models[1], torch.zeros(2, 6))
    loss, mine, theirs, _ = loss_of(Distill(), student, task_of(models[0], data(targets=False)))
    expected = (relative_error(mine[0], theirs[0]) + embedding(mine[1], theirs[1])) / 2
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss, mine, theirs, _ = loss_of(Distill(outputs="embedding"), student, task_of(models[0], data(targets=False)))
    expected = (embedding(mine[0], theirs[0]) + embedding(mine[1], theirs[1])) / 2
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_output_called_logits_is_the_main_one():
    def two(net: Any, x: Tensor) -> dict[str, Tensor]:
        y = net.one(x)
        return {"hidden": y, "logits": net.two(y)}

    models = [Net(two, one=nn.Linear(6, 5), two=nn.Linear(5, 4)).eval() for _ in range(2)]
    loss, mine, theirs, _ = loss_of(Distill(weight=1.0), capture(models[1], torch.zeros(2, 6)), task_of(models[0], data(), score=top1))
    expected = (relative_error(mine[0], theirs[0]) + soft_logits(mine[1], theirs[1])) / 2
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_standardized_scores_are_compared_at_the_temperature():
    task = task_of(classifier(), data(), score=top1)
    loss, (out,), (teacher,), _ = loss_of(Distill(outputs="standardized", temperature=3.0, weight=1.0), STUDENT, task)
    assert float(loss.detach()) == pytest.approx(float(standardized(out, teacher, 3.0).detach()), rel=1e-5)


def test_dkd_takes_labels_or_else_the_teachers_choice():
    for targets in (True, False):
        task = task_of(classifier(), data(targets), score=top1)
        loss, (out,), (teacher,), batch = loss_of(Distill(outputs="dkd", weight=1.0), STUDENT, task)
        right = batch.targets if targets else teacher.argmax(1)
        assert float(loss.detach()) == pytest.approx(float(dkd(out, teacher, right).detach()), rel=1e-5)


def test_a_class_that_is_to_be_ignored_is_the_teachers_choice():
    batches = data()
    batches[0][1][:2] = -100  # pyright: ignore[reportOptionalSubscript]
    task = task_of(classifier(), batches, score=top1)
    loss, (out,), (teacher,), batch = loss_of(Distill(outputs="dkd", weight=1.0), STUDENT, task)
    right = torch.where(batch.targets < 0, teacher.argmax(1), batch.targets)
    assert float(loss.detach()) == pytest.approx(float(dkd(out, teacher, right).detach()), rel=1e-5)


def test_what_cannot_be_compared_is_refused():
    task = task_of(classifier(), data(), score=top1)
    other = capture(nn.Linear(6, 3).eval(), torch.zeros(2, 6))
    with pytest.raises(TaskError, match=r"student's outputs are \[\[5, 3\]\], the teacher's \[\[5, 4\]\]"):
        Distill().objective(other, task)
    flat = Net(lambda net, x: net.linear(x).sum(1), linear=nn.Linear(6, 3)).eval()
    with pytest.raises(TaskError, match=r"outputs='logits' needs class scores .* use outputs='error'"):
        Distill(outputs="logits").objective(capture(flat, torch.zeros(2, 6)), task_of(flat, data()))
    whole = Net(lambda net, x: net.linear(x).long(), linear=nn.Linear(6, 3)).eval()
    with pytest.raises(TaskError, match="no outputs of real numbers"):
        Distill().objective(capture(whole, torch.zeros(2, 6)), task_of(whole, data()))
    with pytest.raises(TaskError, match="features='hint' needs a layer"):
        Distill(features="hint").objective(capture(nn.Linear(6, 4).eval(), torch.zeros(2, 6)), task_of(nn.Linear(6, 4).eval(), data()))


# Features -----------------------------------------------------------------------------------------------------------------------------


def tapped(network: Network, names: tuple[str, ...], inputs: Any) -> list[Tensor]:
    values = with_values(network, names).graph_module(*network.flat(inputs))
    return [value.detach() for value in values[-len(names) :]]


def test_features_are_the_mean_over_the_pairs():
    model, network = specimen("plain")
    student = network.copy()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    inputs = images()(6)
    task = task_of(model, [(inputs, None)])
    names = tuple(layer.name for layer in layers(network))
    pairs = list(zip(tapped(student, names, inputs), tapped(network, names, inputs), strict=True))

    def rows(value: Tensor) -> Tensor:
        return value.flatten(2).transpose(1, 2)

    plain, *_ = loss_of(Distill(), student, task)
    for kind, loss in {
        "hint": relative_error,
        "attention": lambda one, two: attention_maps(rows(one), rows(two)),
        "similarity": similarity_preserving,
    }.items():
        found, *_ = loss_of(Distill(features=kind, feature_weight=3.0), student, task)  # pyright: ignore[reportArgumentType]
        expected = 3 * sum(float(loss(one, two)) for one, two in pairs) / len(pairs)
        assert len(pairs) == 2 and float((found - plain).detach()) == pytest.approx(expected, rel=1e-4)


def test_hints_to_a_wider_teacher_train_a_layer_of_their_own():
    model, network = specimen("plain")
    student = narrow(network)
    objective = Distill(features="hint").objective(student, task_of(model, [(images()(6), None)]))
    assert sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad) == 8 * 4 + 8 + 12 * 6 + 12
    loss, *_ = loss_of(Distill(features="hint"), student, task_of(model, [(images()(6), None)]))
    assert loss.requires_grad


def convolutions(width: int, seed: int) -> nn.Module:
    """Three convolutions with batch norms that have seen no data, of weights so small that without them next to nothing is left."""
    torch.manual_seed(seed)
    parts = [[nn.Conv2d(before, width, 3), nn.BatchNorm2d(width), nn.ReLU()] for before in (3, width, width)]
    model = nn.Sequential(*(layer for part in parts for layer in part), nn.Flatten(), nn.Linear(width * 4, 5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05 if parameter.dim() == 4 else 1)
    return model


def test_hints_of_random_weights_start_below_the_loss_of_saying_nothing():
    """Predicting zeros has a relative error of 1; regressors of least squares on the values that training gives have less."""
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    teacher = convolutions(12, 0)
    with torch.no_grad():
        teacher.train()(images)
    task = task_of(teacher.eval(), [(images, None)])
    student = capture(convolutions(6, 1), images)
    objective = Distill(features="hint").objective(student, task)
    trained = student.copy()
    to_training(trained, "train", lambda name: False)
    values = with_values(trained, objective.taps).graph_module(images)
    assert isinstance(objective, Distillation) and objective.features is not None
    inner = objective.features(dict(zip(objective.taps, values[1:], strict=True)), objective.teacher(images)[1], None)
    assert 0 < float(inner.detach()) < 1


def text_task(model: nn.Module, fill: int) -> Task:
    """Sentences padded with any token where the mask is 0."""
    ids, mask = tokens()(6), torch.ones(6, 9).long()
    mask[:3, 5:] = 0
    inputs = {"input_ids": torch.where(mask.bool(), ids, fill), "attention_mask": mask}
    return task_of(model, [(inputs, None)])


def test_relations_are_those_of_queries_keys_and_values_of_the_last_attention():
    model, network = specimen("bert")
    student = network.copy()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(6.0)
    task = text_task(model, 0)
    inputs = next(task.batches("train"))[0]
    last = [node for node in network.graph.nodes if "scaled_dot_product" in str(node.target)][-1]
    names = tuple(node.name for node in last.args[:3])  # pyright: ignore[reportAttributeAccessIssue]
    mine, theirs = tapped(student, names, inputs), tapped(network, names, inputs)
    real = inputs["attention_mask"].bool()
    parts = [relations(one.transpose(1, 2).flatten(2), two.transpose(1, 2).flatten(2), 4, real) for one, two in zip(mine, theirs, strict=True)]
    plain, *_ = loss_of(Distill(), student, task)
    found, *_ = loss_of(Distill(features="relations"), student, task)
    assert float((found - plain).detach()) == pytest.approx(float(sum(parts)) / 3, rel=1e-4)
    assert float(sum(parts)) > 1e-4


@pytest.mark.parametrize("kind", ["none", "hint", "attention", "relations", "similarity"])
def test_padding_counts_in_no_loss(kind):
    model = Padded().eval()
    student = capture(Padded(seed=1).eval(), next(text_task(model, 0).batches("train"))[0])
    first, *_ = loss_of(Distill(features=kind), student, text_task(model, 0))
    second, mine, theirs, batch = loss_of(Distill(features=kind), student, text_task(model, 33))
    assert float(first.detach()) == pytest.approx(float(second.detach()), rel=1e-4)
    if kind == "none":
        real = batch.leaves[1].bool()
        expected = (relative_error(mine[0][real], theirs[0][real]) + relative_error(mine[1], theirs[1])) / 2
        assert float(second.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


class Padded(nn.Module):
    """Outputs at each token, which at padding depend on what stands there, and their mean without padding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(50, 16)
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x, real = self.embedding(input_ids), attention_mask.bool()
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~real)
        mask = attention_mask[..., None].to(x.dtype)
        return {"tokens": x, "mean": (x * mask).sum(1) / mask.sum(1)}


# Early exits --------------------------------------------------------------------------------------------------------------------------


def test_early_exits_by_hand():
    network = STUDENT
    found = layers(network)
    assert [layer.width for layer in found] == [8, 8]
    made = Branches(found, 1, 4, True, seed=0)
    inputs, targets = data()[0]
    first, last = tapped(network, made.taps, inputs)
    end = network.graph_module(inputs)[0].detach()
    adapter, head = made.adapters[0], made.heads[0]
    features = adapter(first)
    answer = head(torch.relu(features))
    soft = 0.3 * soft_logits(answer, end, 3.0)
    near = 0.03 * relative_error(features, last)
    values = dict(zip(made.taps, (first, last), strict=True))
    expected = 0.7 * cross_entropy(answer, targets) + soft + near  # pyright: ignore[reportArgumentType]
    assert torch.allclose(made(values, end, targets, None), expected, rtol=1e-6)
    assert torch.allclose(made(values, end, None, None), soft / 0.3 + near, rtol=1e-6)
    numbers = Branches(found, 1, 4, False, seed=0)
    assert torch.allclose(numbers(values, end, targets, None), relative_error(answer, end) + near, rtol=1e-6)
    assert all(torch.equal(one, two) for one, two in zip(made.parameters(), numbers.parameters(), strict=True))


def test_the_end_is_not_taught_by_its_pupils():
    found = layers(STUDENT)
    made = Branches(found, 1, 4, True, seed=0)
    values = {layer.name: torch.randn(5, 8).requires_grad_() for layer in found}
    end = torch.randn(5, 4).requires_grad_()
    made(values, end, None, None).backward()
    assert end.grad is None and values[found[1].name].grad is None and values[found[0].name].grad is not None


def test_early_exits_need_layers_and_one_vector_a_sample():
    task = task_of(classifier(), data(), score=top1)
    with pytest.raises(TaskError, match="branches=2 came; the network has 1 inner layers"):
        Distill(branches=2).objective(STUDENT, task)
    model, network = specimen("unet")
    with pytest.raises(TaskError, match=r"needs an output \[samples, width\]"):
        Distill(branches=1).objective(network, task_of(model, [(images()(4), None)]))
