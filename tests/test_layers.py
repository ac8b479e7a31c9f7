"""The structure of the code: import layers as ARCHITECTURE.md lists them, no circles, small files and functions, no torch where it is not needed."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "downsize"

# A file imports only from lines above, and within its line only from names to its left; a name with a slash is a folder.
LAYERS = (
    ("errors", "structure", "spool", "spec", "target", "facts", "progress", "processor"),
    ("numerics/",),
    ("scores", "inputs", "task"),
    ("network/",),
    ("quantization/", "pruning/", "factoring/", "training/"),
    ("techniques/",),
    ("runtimes/",),
    ("measure/",),
    ("lock", "recipe", "engine", "bench", "candidates", "inspection", "slower", "planner", "sensitivity"),
    ("tables", "testing", "cli", "__init__"),
)
WITHOUT_TORCH = (
    *("downsize", "downsize.errors", "downsize.structure", "downsize.spool", "downsize.spec", "downsize.target", "downsize.facts"),
    *("downsize.processor", "downsize.numerics.agreement", "downsize.scores", "downsize.task", "downsize.runtimes"),
    *("downsize.measure", "downsize.measure.worker"),
)
SOURCES = sorted(path for folder in ("downsize", "tests", "examples", "benchmarks", ".ci") for path in (ROOT / folder).rglob("*.py"))

Graph = dict[str, set[str]]


# What is checked ------------------------------------------------------------------------------------------------------------------


def modules_of(package: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of a package."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that a file imports, at its top, inside functions, and for type checking."""
    found = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names)
    return {name for name in found if name in known and name != module}


def graph_of(package: Path) -> Graph:
    known = modules_of(package)
    return {module: imports_of(module, path, known) for module, path in known.items()}


def place(module: str, layers: tuple[tuple[str, ...], ...]) -> tuple[int, str]:
    """Where a module stands in the list, counted from the top, and the name it stands under. Not listed: KeyError."""
    order = [name for layer in layers for name in layer]
    part = [*module.split("."), "__init__"][1]
    name = part if part in order else f"{part}/"
    return {name: position for position, name in enumerate(order)}[name], name


def layer_faults(graph: Graph, layers: tuple[tuple[str, ...], ...] = LAYERS) -> list[str]:
    faults = []
    for module, imported in sorted(graph.items()):
        try:
            here, name = place(module, layers)
        except KeyError:
            faults.append(f"{module} is in no layer")
            continue
        for other in sorted(imported):
            there, other_name = place(other, layers)
            if there > here or (there == here and not name.endswith("/")):
                faults.append(f"{module} imports {other}: {other_name} does not stand above {name}")
    return faults


def circle(graph: Graph) -> list[str]:
    """The modules of one import circle, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def technique_faults(graph: Graph) -> list[str]:
    """Technique files (those that techniques/__init__ lists) that import one another."""
    techniques = graph.get("downsize.techniques", set())
    return [f"{one} imports {other}" for one in sorted(techniques) for other in sorted(graph[one] & techniques)]


def length_faults(path: Path) -> list[str]:
    source = path.read_text()
    lines = len(source.splitlines())
    faults = [f"{path.name} has {lines} lines"] if lines >= 400 else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines >= 40:
                faults.append(f"{path.name}:{node.lineno} {node.name} has {lines} lines")
    return faults


# Of this package ------------------------------------------------------------------------------------------------------------------


def test_files_import_only_from_above():
    assert layer_faults(graph_of(PACKAGE)) == []


def test_no_import_circles():
    assert circle(graph_of(PACKAGE)) == []


def test_techniques_do_not_import_each_other():
    graph = graph_of(PACKAGE)
    assert "downsize.techniques.quantize" in graph.get("downsize.techniques", set())
    assert technique_faults(graph) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    assert length_faults(path) == []


def test_the_document_lists_the_same_layers():
    block = re.search(r"```layers\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    assert block is not None
    assert tuple(tuple(line.split()) for line in block.group(1).splitlines()) == LAYERS


def test_the_document_describes_every_file_and_no_other():
    described = re.findall(r"^- `([\w/]+\.py)`: \S", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_does_not_bring_torch_or_a_runtime(module):
    code = f"import {module}, sys; print(*{{'torch', 'onnxruntime', 'openvino', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# That the checks see faults -------------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path):
    """A package whose files break one rule each."""
    files = {
        "__init__.py": "from .cli import main",
        "errors.py": "def late():\n    from .target import Target",
        "target.py": "from . import errors",
        "stray.py": "",
        "facts.py": "import downsize.cli",
        "cli.py": "from .facts import fact",
        "network/__init__.py": "",
        "network/capture.py": "from .network import Network\nfrom ..numerics import grids",
        "network/network.py": "from ..runtimes.openvino import run",
        "numerics/__init__.py": "",
        "numerics/grids.py": "",
        "runtimes/__init__.py": "",
        "runtimes/openvino.py": "",
        "techniques/__init__.py": "from .prune import Prune\nfrom .quantize import Quantize",
        "techniques/prune.py": "from .quantize import Quantize",
        "techniques/quantize.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "downsize" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "downsize"


def test_a_wrong_import_is_seen_wherever_it_stands(faulty):
    assert layer_faults(graph_of(faulty)) == [
        "downsize.errors imports downsize.target: target does not stand above errors",
        "downsize.facts imports downsize.cli: cli does not stand above facts",
        "downsize.network.network imports downsize.runtimes.openvino: runtimes/ does not stand above network/",
        "downsize.stray is in no layer",
    ]
    assert technique_faults(graph_of(faulty)) == ["downsize.techniques.prune imports downsize.techniques.quantize"]


def test_a_circle_through_a_function_is_seen(faulty):
    assert circle({name: others for name, others in graph_of(faulty).items() if name in ("downsize.errors", "downsize.target")}) != []
    (faulty / "errors.py").write_text("")
    (faulty / "facts.py").write_text("")
    assert circle(graph_of(faulty)) == []


def test_long_files_and_functions_are_seen(tmp_path):
    path = tmp_path / "long.py"
    path.write_text("def f():\n" + "    x = 1\n" * 38)
    assert length_faults(path) == []
    path.write_text("def f():\n" + "    x = 1\n" * 39 + "y = 1\n" * 360)
    assert length_faults(path) == ["long.py has 400 lines", "long.py:1 f has 40 lines"]
