"""The names that `import downsize` offers."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from pathlib import Path

import pytest

import downsize
from downsize.facts import VERSION


@pytest.mark.parametrize("name", downsize.__all__)
def test_every_name_is_there(name):
    thing = getattr(downsize, name)
    assert name in dir(downsize)
    assert inspect.ismodule(thing) or callable(thing) or name == "__version__"


def test_the_type_checker_sees_the_same_names_at_the_same_places():
    tree = ast.parse(Path(downsize.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            seen[alias.asname or alias.name] = f"{node.module}.{alias.name}" if node.module else alias.name
    assert seen == downsize.FACE
    assert sorted(downsize.__all__) == sorted(downsize.FACE)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'downsize' has no attribute 'prume'"):
        _ = downsize.prume  # pyright: ignore[reportAttributeAccessIssue]


def test_the_version_is_that_of_the_installed_package():
    assert downsize.__version__ == VERSION == importlib.metadata.version("downsize")
