"""Every recipe that the documentation spells is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from downsize.recipe import Recipe
from downsize.techniques import TECHNIQUES

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SPELLED = re.compile(rf"`((?:{'|'.join(TECHNIQUES)})\([^`]*\))`")


def recipes(file: Path) -> list[str]:
    found = SPELLED.findall(" ".join(file.read_text().split()))
    # A name with empty brackets stands for the technique, which may need an amount.
    whole = [one.replace("\\|", "|") for one in found if "..." not in one and not re.search(r"\w=[,)]", one)]
    return [one for one in whole if not re.fullmatch(r"\w+\(\)", one)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_recipes_in_the_documentation_are_read(file: Path) -> None:
    for one in recipes(file):
        assert Recipe.parse(one).steps, one


def test_there_are_some() -> None:
    assert sum(len(recipes(file)) for file in FILES) > 10
