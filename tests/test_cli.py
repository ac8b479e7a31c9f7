"""The command line: help that teaches, clear refusals, exit status, and tables whose numbers are true."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from digits_task import batches, convolutional
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner

import downsize as ds
from downsize import cli, inspection
from downsize.facts import Report, from_json
from downsize.runtimes import OperatorTime
from downsize.target import Target

HERE = Path(__file__).parent
TASK = str(HERE / "digits_task.py")
COMMANDS = ("fit", "run", "inspect", "measure", "runtimes")


def downsize(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "downsize.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)


def shown(*arguments: object) -> str:
    """What a command prints, run in this process; it must end well."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_an_example_that_parses(command: str) -> None:
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", shown(command, "--help")).split())
    example = re.search(rf"Examples?: (downsize {command}[^·]*)", text)
    assert example is not None
    options = set(re.findall(r"--[a-z-]+", example.group(1)))
    assert all(option in text.split("Example")[0] for option in options)


def test_the_help_of_run_names_every_technique() -> None:
    from downsize.techniques import TECHNIQUES

    text = shown("run", "--help")
    assert all(re.search(rf"\b{word}\b", text.partition("Arguments")[0]) for word in TECHNIQUES)


def test_help_and_the_list_of_runtimes_do_not_import_torch() -> None:
    for arguments in (["--help"], ["fit", "--help"], ["runtimes"]):
        code = (
            f"import sys; sys.argv = ['downsize', *{arguments!r}]\nfrom downsize.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.strip().endswith("False"), done.stderr


def test_runtimes_lists_versions_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace
    from importlib.metadata import version

    from downsize import runtimes

    gone = replace(runtimes.RUNTIMES["openvino"], missing=lambda: "openvino is not installed: pip install it")
    monkeypatch.setitem(runtimes.RUNTIMES, "openvino", gone)
    text = shown("runtimes")
    assert version("onnxruntime") in text
    assert "missing: openvino is not installed: pip install it" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", TASK, "--size", "5"], r"size='5' has no unit"),
        (["fit", TASK, "--latency", "5parsec"], r"latency='5parsec' has the unknown unit"),
        (["fit", TASK, "--drop", "200%"], r"drop='200%' is more than 100 %"),
        (["fit", TASK, "--threads", "0"], r"threads='0' makes no sense"),
        (["fit", "nowhere.py"], r"'nowhere.py' is no Python file"),
        (["fit", TASK, "--runtime", "onxruntime"], r"onnxruntime"),
        (["run", TASK, "quantise()"], r"there is no technique 'quantise'; did you mean 'quantize'"),
        (["run", TASK, "quantize(bitz=4)"], r"no field 'bitz'"),
        (["inspect", "nowhere.onnx"], r"There is no file nowhere.onnx"),
        (["measure", "nowhere.onnx"], r"There is no file nowhere.onnx"),
    ],
)
def test_bad_input_is_one_message_on_stderr_and_status_2(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_fault_of_our_own_keeps_its_traceback_and_has_another_status(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['downsize', 'runtimes']\nfrom downsize import cli, runtimes\nruntimes.RUNTIMES = None\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 3 and "Traceback" in done.stderr


# inspect --------------------------------------------------------------------------------------------------------------------------


def numbers(text: str, layer: str) -> list[str]:
    """The cells of the row of a layer, without the layer and the operators."""
    row = next(line for line in text.splitlines() if line.split()[:1] == [layer])
    return row.split()[-5:] if "%" in row else row.split()[-4:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "digits.network"
    ds.capture(convolutional(), batches(0, 200)[0][0]).save(path)
    return path


def test_inspect_counts_what_the_formulas_say(saved: Path) -> None:
    text = shown("inspect", saved, "--no-time", "--batch", 3)
    # 3 samples of 8x8: a 3x3 convolution 1 -> 32 at stride 1, one 32 -> 64 at stride 2, a linear layer 64 -> 10 with bias.
    assert numbers(text, "0")[:3] == [f"{1 * 32 * 9:,}", f"{3 * 64 * 32 * 9:,}", f"{1 * 32 * 9 * 4:,}"]
    assert numbers(text, "3")[:3] == [f"{32 * 64 * 9:,}", f"{3 * 16 * 64 * 32 * 9:,}", f"{32 * 64 * 9 * 4:,}"]
    assert numbers(text, "8")[:2] == [f"{64 * 10 + 10:,}", f"{3 * 64 * 10:,}"]
    total = sum(p.numel() for p in convolutional().parameters())
    assert f"{total:,}" in text


def test_inspect_counts_the_same_in_the_file(saved: Path, tmp_path: Path) -> None:
    from downsize.network.onnx_file import write

    write(ds.Network.load(saved), tmp_path / "model.onnx")
    text = shown("inspect", tmp_path / "model.onnx", "--no-time", "--batch", 3)
    assert numbers(text, "0")[1] == f"{3 * 64 * 32 * 9:,}"
    assert numbers(text, "3")[1] == f"{3 * 16 * 64 * 32 * 9:,}"
    assert numbers(text, "8")[:2] == [f"{64 * 10 + 10:,}", f"{3 * 64 * 10:,}"]
    weights = sum(numpy_helper.to_array(item).nbytes for item in onnx.load(tmp_path / "model.onnx").graph.initializer)
    assert f"{weights:,}" in next(line for line in text.splitlines() if "total" in line)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_inspect_loses_no_time(saved: Path, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    ran: list[OperatorTime] = []
    real = inspection.per_operator

    def remembered(*arguments: object) -> list[OperatorTime]:
        ran.extend([*real(*arguments), OperatorTime("something of its own", "Whatever", 0.5, "")])  # type: ignore[arg-type]
        return ran

    monkeypatch.setattr(inspection, "per_operator", remembered)
    found = inspection.look(str(saved), Target(runtime=runtime))
    layers = {layer.module: layer for layer in found.layers}
    assert sum(layer.seconds or 0 for layer in found.layers) == pytest.approx(sum(item.seconds for item in ran))
    assert (layers[inspection.OUTSIDE].seconds or 0) >= 0.5
    assert "Whatever" in layers[inspection.OUTSIDE].operators
    # Convolutions and the linear layer run in their own layers, whatever the runtime calls them after fusing.
    heavy = [item for item in ran if "Conv" in item.operator and "Reorder" not in item.operator]
    assert len(heavy) == 2
    assert (layers["0"].seconds or 0) + (layers["3"].seconds or 0) >= sum(item.seconds for item in heavy) * 0.999
    assert layers["8"].seconds is not None


def test_depth_sums_up_what_lies_below() -> None:
    layers = inspection.Layers(2)
    layers.of("encoder.0.query").add("linear", 10, 100, 40)
    layers.of("encoder.0.key").add("linear", 20, None, 80)
    layers.of("").add("add")
    assert [(row.module, row.parameters, row.macs, row.bytes, row.operators) for row in layers.rows.values()] == [
        ("encoder.0", 30, 100, 120, ["linear"]),
        (inspection.MODEL, 0, None, 0, ["add"]),
    ]


def foreign(path: Path) -> Path:
    """A model of another maker: a 3x3 convolution 2 -> 4 with a Relu of 16x16, a recurrent layer that has no rule, open batch."""
    weight = numpy_helper.from_array(np.zeros((4, 2, 3, 3), np.float32), "w")
    gates = [numpy_helper.from_array(np.zeros((1, 12, size), np.float32), name) for name, size in (("wx", 16), ("wh", 3))]
    shape = numpy_helper.from_array(np.array([64, -1, 16]), "shape")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="/body/body.0/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="/body/body.1/Relu"),
        helper.make_node("Reshape", ["r", "shape"], ["s"], name="flat"),
        helper.make_node("LSTM", ["s", "wx", "wh"], ["y"], name="memory", hidden_size=3),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 16, 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight, *gates, shape]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    path.write_bytes(model.SerializeToString())
    return path


def test_inspect_reads_the_files_of_other_makers(tmp_path: Path) -> None:
    text = shown("inspect", foreign(tmp_path / "foreign.onnx"), "--batch", 2)
    assert numbers(text, "body.body.0")[:2] == ["72", f"{2 * 256 * 72:,}"]
    assert "operators without a count: Relu (1x), LSTM (1x)" in text
    assert float(numbers(text, "memory")[-2]) > 0
    assert numbers(text, "memory")[:2] == [f"{12 * 19:,}", "-"]


# The whole ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fit_says_what_it_made_and_ends_with_the_verdict(tmp_path: Path) -> None:
    met = downsize("fit", TASK, "--size", "60kB", "--drop", "3%", "--into", tmp_path / "run")
    assert met.returncode == 0, met.stderr
    report = from_json(Report, (tmp_path / "run" / "report.json").read_text())
    assert "verdict: met" in met.stdout and str(tmp_path / "run" / "model.onnx") in met.stdout
    for row in (report.baseline, *report.attempts):
        assert row.name in met.stdout and row.reason.split(":")[0] in met.stdout
    assert "building quantize() ..." in met.stderr and "Traceback" not in met.stderr
    other = downsize("fit", TASK, "--size", "50kB", "--into", tmp_path / "run")
    assert other.returncode == 2 and "belongs to another run (target was" in other.stderr
    # What was measured holds for whoever measures the file again.
    again = shown("measure", tmp_path / "run" / "model.onnx", "--task", TASK, "--seconds", "0.2")
    taken = report.attempts[-1]
    assert f"samples {taken.measurements['drop'].samples}" in again
    assert re.search(r"score +\S+ %", again) and taken.agreement is not None
    assert f"relative_error {taken.agreement.relative_error:.4g}" in again


@pytest.mark.slow
def test_run_ends_with_status_1_when_a_limit_is_missed(tmp_path: Path) -> None:
    missed = downsize("run", TASK, "quantize(activations='none')", "--size", "20kB", "--into", tmp_path / "run")
    assert missed.returncode == 1, missed.stderr
    assert "not met: size binds" in missed.stdout and "This file would meet size at most" in missed.stdout
    assert (tmp_path / "run" / "model.onnx").exists()


def test_an_interrupted_run_says_what_it_leaves(tmp_path: Path) -> None:
    assert cli._left_in(tmp_path) == "there is no file yet"
    (tmp_path / "baseline.onnx").write_bytes(b"the original")
    (tmp_path / "model.onnx").write_bytes(b"the original")
    assert cli._left_in(tmp_path) == f"no file is better than the original yet, which is {tmp_path / 'model.onnx'}"
    (tmp_path / "model.onnx").write_bytes(b"it made smaller")
    assert cli._left_in(tmp_path).startswith(f"the best file so far is {tmp_path / 'model.onnx'}, its numbers are in")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process")
def test_ctrl_c_leaves_the_best_file_and_says_where_it_is(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "downsize.cli", "fit", TASK, "--size", "60kB", "--into", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "building quantize(activations='dynamic')" in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate()
    assert process.returncode == 130, said + rest
    assert f"the best file so far is {tmp_path / 'run' / 'model.onnx'}" in rest
    assert "The same command goes on from there." in rest and "Traceback" not in rest
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["chosen"] == "quantize()"
    images, classes = batches(1400, 1700, 300)[0]
    assert float((ds.open(tmp_path / "run" / "model.onnx")(images).argmax(1) == classes).double().mean()) > 0.9


def test_a_model_that_cannot_be_captured_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "branching.py").write_text(
        "import torch, downsize as ds\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x * 2 if x.sum() > 0 else x\n"
        "x = torch.ones(4, 3)\n"
        "task = ds.Task(Net().eval(), x, {'calibrate': lambda: [(x, None)]})\n"
    )
    result = CliRunner().invoke(cli.app, ["fit", str(tmp_path / "branching.py"), "--into", str(tmp_path / "run")])
    assert result.exit_code == 2 and "branching.py" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "model.onnx").exists()


def test_the_modules_of_the_table_are_the_users(saved: Path) -> None:
    text = shown("inspect", saved, "--no-time")
    for name, module in convolutional().named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            assert numbers(text, name)[0] == f"{sum(p.numel() for p in module.parameters()):,}"


# Swallows Ctrl-C as garbage collection does, then works for a minute.
CLEARING = """
import time
from downsize import cli

class Cleared:
    def __del__(self):
        raise KeyboardInterrupt

def app():
    Cleared()
    for _ in range(600):
        time.sleep(0.1)
    print("worked on")

cli.app = app
cli.main()
"""


def test_ctrl_c_is_not_lost_while_objects_are_cleared_away() -> None:
    done = subprocess.run([sys.executable, "-c", CLEARING], capture_output=True, text=True)
    assert done.returncode and "worked on" not in done.stdout and done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "Exception ignored" not in done.stderr
