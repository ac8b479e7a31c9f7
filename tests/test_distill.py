"""distill(): laws, students, teachers, generations, chains with pruning, and that a teacher helps where labels are few."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax
from zoo import BY_NAME, specimen

from downsize.errors import CaptureError, SpecError, TaskError
from downsize.network.blocks import blocks
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.pruning.depth import main_layers
from downsize.recipe import Recipe
from downsize.scores import top1
from downsize.task import Task
from downsize.techniques.distill import Distill
from downsize.techniques.finetune import Finetune
from downsize.techniques.prune import Prune
from downsize.testing import check_technique
from downsize.training.hook import Hook, Learner
from downsize.training.pairing import layers
from downsize.training.students import narrow, shallow


def classifier(width: int = 16, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)).eval()


def batches(count: int = 4, seed: int = 0, targets: bool = True) -> list[tuple[Tensor, Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(8, 6, generator=generator) for _ in range(count)]
    return [(x, x[:, :4].argmax(1) if targets else None) for x in parts]


def task_of(model: nn.Module, **options: Any) -> Task:
    data = {"calibrate": lambda: batches(targets=options.get("score") is not None)}
    return Task(model, torch.zeros(2, 6), {**data, "train": data["calibrate"]}, **options)


def network_of(model: nn.Module) -> Network:
    return capture(model, torch.zeros(2, 6))


def distance(one: Network, two: Network) -> float:
    pairs = zip(one.named_tensors(), two.named_tensors(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for (_, a), (_, b) in pairs)


# Laws ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"features": "hint"}, {"branches": 1}, {"generations": 2}, {"outputs": "dist"}])
def test_no_steps_change_nothing(fields):
    model = classifier()
    network = network_of(model)
    made = Distill(steps=0, **fields)(network, task_of(model))
    assert distance(made, network) == 0 and [str(n.target) for n in made.graph.nodes] == [str(n.target) for n in network.graph.nodes]


@pytest.mark.parametrize(
    ("outputs", "features"),
    [("logits", "none"), ("dist", "hint"), ("dkd", "attention"), ("error", "relations"), ("auto", "similarity"), ("standardized", "none")],
)
def test_whoever_knows_all_learns_nothing(outputs, features):
    model = classifier()
    network = network_of(model)
    plan = Distill(steps=3, rate=1e-3, optimizer="sgd", weight=1.0, outputs=outputs, features=features)
    other = network_of(classifier(seed=1))
    moved = distance(plan(other, task_of(model)), other)
    assert moved > 1e-5 and distance(plan(network, task_of(model)), network) < 0.02 * moved


def test_the_network_given_stays_as_it_was():
    model, network = classifier(), network_of(classifier(seed=1))
    before = network.fingerprint()
    Distill(steps=2, features="hint", branches=1)(network, task_of(model))
    assert network.fingerprint() == before


class Stop(Hook):
    """Asks for an end behind some steps, as Ctrl-C does."""

    def __init__(self, *steps: int) -> None:
        self._steps = steps  # not a setting: a training is the same with and without

    def after(self, learner: Learner) -> None:
        if learner.step in self._steps:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("fields", [{}, {"features": "hint", "branches": 1, "weight": 0.5, "student": "width"}])
def test_stopped_and_resumed_it_gives_the_same_bits(tmp_path, fields):
    # Other batches each epoch: what the teacher said of a sample was computed in another batch than the one it comes in now.
    x, y = (torch.cat(parts) for parts in zip(*batches(5, seed=3), strict=True))  # pyright: ignore[reportArgumentType, reportCallIssue]

    def shuffled() -> list[tuple[Tensor, Tensor]]:
        return [(x[rows], y[rows]) for rows in torch.randperm(len(x)).split(7)]

    model = classifier(64)
    data = {"calibrate": lambda: [(x, y)], "train": shuffled}
    task = Task(model, x[:2], data, top1)
    plan = Distill(**{"steps": 14, "rate": 1e-2} | fields)
    start, plan = (narrow(network_of(model)), replace(plan, student=None)) if plan.student else (network_of(classifier(8, seed=4)), plan)
    wanted = plan.train(start, task, hooks=[Stop()])
    task = replace(task, checkpoints=tmp_path)
    for step in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            plan.train(start, task, hooks=[Stop(step)])
    found = plan.train(start, task, hooks=[Stop(4, 9)])
    assert found.fingerprint() == wanted.fingerprint() != start.fingerprint()


@pytest.mark.parametrize("fields", [{}, {"features": "hint", "branches": 1, "weight": 0.5}])
def test_the_same_seed_gives_the_same_student_and_another_one_another(fields):
    task = task_of(classifier(), score=top1)
    start = network_of(classifier(8, seed=3))
    plan = Distill(steps=6, rate=1e-2, **fields)
    one = plan(start, task)
    torch.rand(3)
    assert plan(start, task).fingerprint() == one.fingerprint()
    dropped = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    start = network_of(dropped)
    assert plan(start, task).fingerprint() != replace(plan, seed=1)(start, task).fingerprint()


def test_kept_answers_do_not_change_what_is_learnt():
    # An epoch over the same data asks the teacher nothing; to rounding the student is the one of a teacher that is always asked.
    model, start = classifier(), network_of(classifier(seed=1))
    asked: list[int] = []
    model.register_forward_hook(lambda module, args, outputs: asked.append(len(args[0])))
    task = task_of(model)
    plan = Distill(epochs=3, rate=1e-2)
    objective: Any = plan.objective(start, task)
    asked.clear()
    made = plan.train(start, task, objective)
    assert sum(asked) == 4 * 8 + 8 + 2
    objective = plan.objective(start, task)
    objective.teacher.answers.usable = False
    assert distance(plan.train(start, task, objective), made) < 1e-5


@pytest.mark.parametrize("fields", [{"features": "hint"}, {"branches": 1, "student": "width"}, {"generations": 2}])
def test_it_obeys_the_laws_of_techniques(tmp_path, fields):
    model = classifier()
    check_technique(Distill(steps=2, **fields), network_of(model), task_of(model), tmp_path)


def test_a_recipe_spells_it():
    text = "prune(macs=0.5) | distill(epochs=2.0, student='depth', features='hint', feature_weight=0.5) | distill(steps=5, outputs='dist')"
    assert str(Recipe.parse(text)) == text and Recipe.from_yaml(Recipe.parse(text).to_yaml()) == Recipe.parse(text)
    with pytest.raises(SpecError, match=r"outputs='logit' came"):
        Recipe.parse("distill(outputs='logit')")


# Students, teachers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder", "bert", "gpt2", "llama"])
def test_a_shallow_student_has_every_other_layer(name):
    network = specimen(name)[1]
    before, made = [block.name for block in main_layers(blocks(network))], shallow(network)
    assert made.origin["bypassed"] == before[1::2] and len(before) == 2
    inputs = BY_NAME[name].inputs(3)
    assert [one.shape for one in made.graph_module(*made.flat(inputs))] == [one.shape for one in network.graph_module(*network.flat(inputs))]


def test_without_repeated_layers_there_is_no_shallow_student():
    with pytest.raises(TaskError, match="the network has 0 of them"):
        shallow(specimen("plain")[1])


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "squeeze_excite", "shuffle", "encoder", "bert", "gpt2", "lstm", "gru", "tied"])
def test_a_narrow_student_has_the_strong_half_of_every_axis(name):
    network = specimen(name)[1]
    made = narrow(network)
    halves = [text.split(" -> ") for text in made.origin["pruned"]["widths"].values()]
    assert halves and all(int(after) == int(before) - int(before) // 2 for before, after in halves)
    inputs = BY_NAME[name].inputs(3)
    outputs = made.graph_module(*made.flat(inputs))
    assert [one.shape for one in outputs] == [one.shape for one in network.graph_module(*network.flat(inputs))]
    assert all(bool(one.isfinite().all()) for one in outputs)
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (network, made))
    assert after < 0.8 * before


def test_a_narrow_student_keeps_the_units_with_the_largest_weights():
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0], [4.0], [2.0], [3.0]]).expand(4, 3))
        first.bias.zero_()
        second.weight.fill_(0.1)
    made = narrow(capture(model, torch.zeros(2, 3)))
    assert made.tensor("0.weight")[:, 0].tolist() == [4.0, 3.0]


def test_a_model_of_the_users_becomes_the_student():
    small, model = classifier(4, seed=5), classifier()
    before = [parameter.clone() for parameter in small.parameters()]
    task = task_of(model, models={"small": small})
    made = Distill(student="small", steps=2, features="hint")(network_of(model), task)
    assert made.tensor("0.weight").shape == (4, 6) and made.origin["student"] == "small"
    assert distance(made, network_of(small)) > 0
    assert all(torch.equal(one, two) for one, two in zip(before, small.parameters(), strict=True))


def test_another_model_teaches():
    model, teacher = classifier(), classifier(seed=9)
    task = task_of(model, models={"strong": teacher})
    made = Distill(teacher="strong", steps=60, rate=1e-2, outputs="error")(network_of(model), task)
    x = batches(1)[0][0]
    wanted, before, after = teacher(x), model(x), made.predict(x)
    assert float((after - wanted).detach().square().sum()) < 0.3 * float((before - wanted).detach().square().sum())
    inner = Distill(teacher="strong", steps=3, rate=0.1, optimizer="sgd", weight=1.0, features="hint")
    assert distance(inner(network_of(teacher), task), network_of(teacher)) < 1e-5


def test_a_model_that_cannot_serve_is_named():
    models = {"awake": classifier(4).train(), "narrow": nn.Linear(1, 3).eval()}
    task = task_of(classifier(8), models=models)
    network = capture(task.model, task.example)
    for name, says in (("awake", "training mode"), ("narrow", "cannot be multiplied")):
        with pytest.raises(CaptureError, match=f"(?s)models\\['{name}'\\], the student: .*{says}"):
            Distill(student=name, steps=1)(network, task)
        with pytest.raises(TaskError, match=f"(?s)models\\['{name}'\\], the teacher: .*{says}"):
            Distill(teacher=name, steps=1)(network, task)


def test_unknown_names_are_refused_with_the_nearest():
    model = classifier()
    task = task_of(model, models={"smaller": classifier(4)})
    with pytest.raises(SpecError, match=r"no model 'small' in task.models; did you mean 'smaller'"):
        Distill(student="small")(network_of(model), task)
    with pytest.raises(SpecError, match=r"no model 'widht' in task.models; did you mean 'width'"):
        Distill(student="widht")(network_of(model), task)
    with pytest.raises(SpecError, match=r"no model 'big' in task.models; give it as Task"):
        Distill(teacher="big")(network_of(model), task_of(model))


def test_inside_another_step_it_has_no_student_of_its_own():
    model = classifier()
    for plan in (Distill(student="width"), Distill(generations=2)):
        with pytest.raises(SpecError, match="as a step by itself"):
            plan.train(network_of(model), task_of(model))


def test_each_generation_begins_anew_and_learns_from_the_one_before():
    model, start = classifier(), network_of(classifier(8, seed=2))
    task = task_of(model)
    first = Distill(steps=4, rate=1e-2)(start, task)
    second = Distill(steps=4, rate=1e-2, generations=2)(start, task)
    expected = Distill(steps=4, rate=1e-2, seed=1, teacher="first")(start, replace(task, models={"first": As(first)}))
    assert distance(second, expected) == 0 and distance(second, first) > 1e-5


class As(nn.Module):
    """A network as a module."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.inner = network.graph_module
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def test_early_exits_help_train_and_leave_no_trace():
    task = task_of(classifier(), score=top1)
    start = network_of(classifier(seed=1))
    made, plain = (Distill(steps=5, rate=1e-2, branches=count)(start, task) for count in (1, 0))
    assert [n.name for n in made.graph.nodes] == [n.name for n in start.graph.nodes] and distance(made, plain) > 1e-5


# Chains -------------------------------------------------------------------------------------------------------------------------------


def zoo_task(name: str) -> tuple[Network, Task]:
    model, network = specimen(name)
    inputs = [(BY_NAME[name].inputs(size), None) for size in (6, 7, 8)]
    return network, Task(model, BY_NAME[name].inputs(2), {"calibrate": lambda: inputs})


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "dense", "vit", "encoder", "lstm", "tied", "bert", "unet"])
def test_what_pruning_left_is_nearer_the_original_after_it(name):
    network, task = zoo_task(name)
    pruned = Prune(ratio=0.6, multiple=1, samples=0)(network, task)  # nothing repaired: there is something to learn
    made = Distill(steps=25, rate=5e-4, outputs="error", norms="freeze")(pruned, task)
    made.check()
    inputs = next(task.batches("calibrate"))[0]

    def error(one: Network) -> float:
        pairs = zip(one.graph_module(*one.flat(inputs)), network.graph_module(*network.flat(inputs)), strict=True)
        return sum(float((a - b).detach().square().sum() / b.detach().square().sum()) for a, b in pairs)

    assert error(made) < error(pruned)
    again = Distill(steps=2, features="none")(made, task)
    assert [tuple(one.shape) for _, one in again.named_tensors()] == [tuple(one.shape) for _, one in made.named_tensors()]


@pytest.mark.parametrize(("name", "features"), [("plain", "hint"), ("residual", "attention"), ("encoder", "relations"), ("vit", "similarity")])
def test_features_of_a_pruned_network_are_those_of_its_namesakes(name, features):
    network, task = zoo_task(name)
    pruned = Prune(ratio=0.6, multiple=1)(network, task)
    made = Distill(steps=2, features=features)(pruned, task)
    made.check()
    assert distance(made, pruned) > 0


def test_it_is_a_plan_inside_other_steps():
    network, task = zoo_task("plain")
    first, second = (
        "prune(ratio=0.6, multiple=1, tune=distill(steps=3, features='attention'))",
        "quantize(bits=4, train=distill(steps=6, features='hint'))",
    )
    recipe = Recipe.parse(f"{first} | {second}")
    pruned = recipe.steps[0](network, task)
    made = recipe.steps[1](pruned, task)
    made.check()
    assert [told["steps"] for told in pruned.origin["trained"]] == [3]
    assert sum(told["steps"] for told in made.origin["trained"]) == 9
    # where values are rounded, the layers are the values before, under the names they had
    assert [layer.name for layer in layers(made)] == [layer.name for layer in layers(pruned)] == ["max_pool2d", "relu__1"]


# That it helps ------------------------------------------------------------------------------------------------------------------------


def rings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points in 8 dimensions and one of 6 classes, by a random teacher network with noise: [count, 8], [count]."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 8, generator=generator)
    rule = torch.Generator().manual_seed(99)
    first, second = torch.randn(8, 24, generator=rule), torch.randn(24, 6, generator=rule)
    scores = torch.tanh(points @ first / 2) @ second
    return points, torch.multinomial(softmax(scores, 1), 1, generator=generator)[:, 0]


@pytest.mark.slow
def test_with_few_labels_a_student_of_a_teacher_beats_one_without():
    points, classes = rings(6000, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 96), nn.Tanh(), nn.Linear(96, 6))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
        for step in range(500):
            rows = torch.arange(step * 300, (step + 1) * 300) % 6000
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(points[rows]), classes[rows]).backward()
            optimizer.step()
    few, test = rings(240, 2), rings(4000, 3)
    data = [(x, y) for x, y in zip(few[0].split(40), few[1].split(40), strict=True)]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        students = {name: nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 6)).eval() for name in ("one", "two")}
    task = Task(model.eval(), points[:2], {"calibrate": lambda: data, "train": lambda: data}, top1, models=students)

    def score(network: Network) -> float:
        return top1(network.predict, [test])

    taught = [score(Distill(student=name, steps=300, rate=1e-2)(network_like(model), task)) for name in students]
    alone = [score(Finetune(steps=300, rate=1e-2)(network_like(student), task)) for student in students.values()]
    assert sum(taught) / 2 > sum(alone) / 2 + 0.02, (taught, alone)
    assert min(taught) > max(alone)


def network_like(model: nn.Module) -> Network:
    return capture(model, torch.zeros(2, 8))
