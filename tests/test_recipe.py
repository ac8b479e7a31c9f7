"""Recipes: one spelling in Python, text and YAML."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from downsize.errors import SpecError
from downsize.recipe import Recipe
from downsize.spec import frozen


@frozen
class Cut:
    """Takes a part away."""

    macs: float = 1.0
    sites: tuple[str, ...] = ()

    def __call__(self, network, task):
        return network


@frozen
class Round:
    """Rounds to fewer bits."""

    bits: int = 8
    mode: Literal["static", "dynamic"] = "static"
    limit: str | None = None

    def __call__(self, network, task):
        return network


@frozen
class Plan:
    """Has no word of its own."""

    epochs: float = 3.0


@frozen
class Tune(Plan):
    """Trains."""

    rate: float = 1e-3

    def __call__(self, network, task):
        return network


@frozen
class Rework:
    """Takes a plan, and settings that look like one."""

    plan: bool | Plan = False
    inner: bool | Cut = False
    options: dict[str, dict[str, int]] = Field(default_factory=dict)

    def __call__(self, network, task):
        return network


TABLE = {"cut": Cut, "round": Round}
NESTED = {**TABLE, "tune": Tune, "rework": Rework}
STEPS = st.builds(Cut, macs=st.floats(0, 1), sites=st.lists(st.text(), max_size=2).map(tuple)) | st.builds(
    Round, bits=st.integers(1, 16), mode=st.sampled_from(["static", "dynamic"]), limit=st.none() | st.text() | st.just("1MB")
)


@given(st.lists(STEPS, max_size=4))
def test_text_and_yaml_give_the_recipe_back(steps):
    recipe = Recipe(tuple(steps), TABLE)
    assert Recipe.parse(str(recipe), TABLE) == recipe == Recipe.from_yaml(recipe.to_yaml(), TABLE)
    assert list(recipe) == steps
    assert len(recipe) == len(steps)


def test_spelling():
    recipe = Recipe.parse("cut(macs=0.5, sites=('a', 'b'))|round(bits=8, limit=1MB)", TABLE)
    assert recipe == Recipe((Cut(macs=0.5, sites=("a", "b")), Round(limit="1MB")), TABLE)
    assert str(recipe) == "cut(macs=0.5, sites=['a', 'b']) | round(limit=1MB)"
    assert recipe.to_yaml() == "- cut:\n    macs: 0.5\n    sites:\n    - a\n    - b\n- round:\n    limit: 1MB\n"


PLANS = st.booleans() | st.builds(Tune, epochs=st.floats(0, 9), rate=st.floats(0, 1))
REWORKS = st.builds(Rework, plan=PLANS, inner=st.booleans() | st.builds(Cut, macs=st.floats(0, 1), sites=st.lists(st.text(), max_size=2).map(tuple)))


@given(st.lists(REWORKS | STEPS, max_size=3))
def test_steps_in_steps_have_one_spelling_too(steps):
    recipe = Recipe(tuple(steps), NESTED)
    assert Recipe.parse(str(recipe), NESTED) == recipe == Recipe.from_yaml(recipe.to_yaml(), NESTED)


def test_spelling_of_steps_in_steps():
    recipe = Recipe((Rework(plan=Tune(epochs=2), options={"a": {"b": 1}}),), NESTED)
    assert str(recipe) == "rework(plan=tune(epochs=2.0), options={'a': {'b': 1}})"
    assert recipe.to_yaml() == "- rework:\n    plan:\n      tune:\n        epochs: 2.0\n    options:\n      a:\n        b: 1\n"
    assert Recipe.from_yaml("- rework:\n    plan:\n      tune:\n", NESTED) == Recipe((Rework(plan=Tune()),), NESTED)
    assert Recipe.parse("rework(plan=True)", NESTED) == Recipe((Rework(plan=True),), NESTED)


@pytest.mark.parametrize(
    ("text", "yaml", "says"),
    [
        ("rework(plan=tun())", "- rework: {plan: {tun: {}}}", "there is no technique 'tun'; did you mean 'tune'?"),
        (
            "rework(plan=tune(epoch=1))",
            "- rework: {plan: {tune: {epoch: 1}}}",
            "tune has no field 'epoch'; did you mean 'epochs'?",
        ),
        ("rework(plan=cut())", "- rework: {plan: {cut: }}", "rework: plan"),
        ("rework(plan='tune')", "- rework: {plan: tune}", "rework(plan=...): 'tune' came; expected a step, tune() in text, {tune: {}} in YAML."),
        ("rework(plan=tune)", "- rework: {plan: tune}", "quote text: 'tune'|expected a step, tune()"),
        ("rework(plan={'epochs': 1})", "- rework: {plan: {epochs: 1}}", "rework(plan=...): a Plan has no word in recipes; expected one of tune."),
    ],
)
def test_what_is_unknown_inside_is_refused_with_the_nearest(text, yaml, says):
    words = "|".join(re.escape(part) for part in says.split("|"))
    with pytest.raises(SpecError, match=words):
        Recipe.parse(text, NESTED)
    with pytest.raises(SpecError, match=words):
        Recipe.from_yaml(yaml, NESTED)


def test_recipes_differ_by_order_and_fields():
    assert Recipe.parse("cut() | round()", TABLE) != Recipe.parse("round() | cut()", TABLE)
    assert Recipe.parse("round(bits=4)", TABLE) != Recipe.parse("round()", TABLE)
    assert hash(Recipe.parse("round(bits=8)", TABLE)) == hash(Recipe.parse("round", TABLE))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rond(bits=4)", "there is no technique 'rond'; did you mean 'round'? Known: cut, round."),
        ("round(bit=4)", "round has no field 'bit'; did you mean 'bits'? Known: bits, limit, mode."),
        ("cut() | round(mode='quick')", "round: mode='quick' came; expected 'static' or 'dynamic'."),
        ("round(bits=4", "do not match"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest(text, says):
    with pytest.raises(SpecError, match=re.escape(says)):
        Recipe.parse(text, TABLE)


def test_yaml_is_refused_in_the_same_words():
    with pytest.raises(SpecError, match="there is no technique 'rond'; did you mean 'round'"):
        Recipe.from_yaml("- rond: {bits: 4}", TABLE)


def test_a_step_of_no_known_class_is_refused():
    with pytest.raises(SpecError, match=r"Round\(.*\) is not an instance of a technique of the table; known: cut\."):
        Recipe((Round(),), {"cut": Cut})


def test_a_plan_without_a_word_is_refused_in_python_too():
    with pytest.raises(SpecError, match=re.escape("rework(plan=...): a Plan has no word in recipes; expected one of tune.")):
        Recipe((Rework(plan=Plan()),), NESTED)


def test_plans_of_the_own_table():
    text = "prune(macs=0.5, rounds=3, tune=finetune(epochs=1.0)) | sparsify(sparsity=0.9, train=True) | quantize(bits=4, train=distill(steps=9))"
    recipe = Recipe.parse(text)
    assert str(recipe) == text
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    with pytest.raises(SpecError, match="finetune has no field 'epoch'; did you mean 'epochs'"):
        Recipe.parse("quantize(train=finetune(epoch=1))")


def test_the_own_table_is_the_default():
    recipe = Recipe.parse("quantize(activations='dynamic')")
    assert str(recipe) == "quantize(activations='dynamic')"
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
