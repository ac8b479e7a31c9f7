"""Opening and running model files: against numpy and onnx's reference evaluator, in every runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_files import conv, mlp, quantized, run_mlp, save, structured

from downsize.errors import ArtifactError, RuntimeMissing
from downsize.runtimes import RUNTIMES, onnxruntime, open_artifact, require
from downsize.runtimes.onnx_header import read_header

ROOT = Path(__file__).parent.parent
RUNTIME_NAMES = [pytest.param(name, marks=pytest.mark.skipif(RUNTIMES[name].missing() is not None, reason=f"no {name}")) for name in RUNTIMES]
every_runtime = pytest.mark.parametrize("runtime", RUNTIME_NAMES)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


def reference(path: Path, **inputs: np.ndarray) -> np.ndarray:
    """The first output of the onnx package's own evaluator, which is written in numpy."""
    outputs: Any = ReferenceEvaluator(str(path)).run(None, inputs)
    return outputs[0]


def fresh(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new Python process."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


# Outputs --------------------------------------------------------------------------------------------------------------------------


@every_runtime
@pytest.mark.parametrize("batch", [1, 5])
def test_mlp_equals_numpy(tmp_path, runtime, batch):
    """1e-5 would not hold if the runtime computed in bfloat16, as OpenVINO does by default where the CPU can."""
    x = noise(batch, 256)
    y = open_artifact(mlp(tmp_path / "a.onnx", 256), runtime)(x)
    assert (y.shape, y.dtype) == ((batch, 256), np.float32)
    np.testing.assert_allclose(y, run_mlp(x), rtol=1e-5, atol=1e-5)


@every_runtime
@pytest.mark.parametrize("threads", [1, 2])
def test_conv_equals_the_reference_at_any_size(tmp_path, runtime, threads):
    path = conv(tmp_path / "a.onnx")
    session = open_artifact(path, runtime, threads)
    for shape in [(1, 3, 8, 8), (2, 3, 5, 9)]:
        image = noise(*shape)
        np.testing.assert_allclose(session(image), reference(path, image=image), rtol=1e-4, atol=1e-5)


@every_runtime
def test_quantized_equals_the_reference(tmp_path, runtime):
    path = quantized(tmp_path / "a.onnx")
    x = noise(64, 16) * 3  # some of it saturates
    np.testing.assert_allclose(open_artifact(path, runtime)(x), reference(path, x=x), rtol=1e-4, atol=1e-4)


@every_runtime
def test_structure_of_inputs_and_outputs_comes_from_the_metadata(tmp_path, runtime):
    session = open_artifact(structured(tmp_path / "a.onnx"), runtime)
    assert session.input_names == ["mask", "ids"]
    ids, mask = np.array([[5, 6, 7]]), np.array([[1, 1, 0]])
    out = session({"fast": True, "ids": ids, "mask": mask})
    assert list(out) == ["sum", "parts"] and isinstance(out["parts"], tuple)
    np.testing.assert_array_equal(out["sum"], [[6, 7, 7]])
    np.testing.assert_array_equal(out["parts"][0], [[4, 5, 7]])
    by_name = session({"ids": ids, "mask": mask})  # the file's own input names
    np.testing.assert_array_equal(by_name["parts"][0], [[4, 5, 7]])


@every_runtime
def test_a_file_without_metadata_goes_by_name_or_order(tmp_path, runtime):
    shape = ["n"]
    inputs, outputs = ([(name, TensorProto.FLOAT, shape) for name in names] for names in (["a", "b"], ["difference", "product"]))
    nodes = [helper.make_node("Sub", ["a", "b"], ["difference"]), helper.make_node("Mul", ["a", "b"], ["product"])]
    session = open_artifact(save(tmp_path / "a.onnx", nodes, inputs, outputs, {}), runtime)
    a, b = np.array([3.0, 4.0], "float32"), np.array([1.0, 2.0], "float32")
    for given_inputs in [(a, b), [a, b], {"b": b, "a": a}]:
        out = session(given_inputs)
        assert {name: value.tolist() for name, value in out.items()} == {"difference": [2.0, 2.0], "product": [3.0, 8.0]}


@every_runtime
def test_torch_in_torch_out(tmp_path, runtime):
    import torch

    session = open_artifact(mlp(tmp_path / "a.onnx"), runtime)
    x = noise(2, 32)
    y = session(torch.from_numpy(x).requires_grad_())
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), session(x))
    with pytest.raises(ArtifactError, match=r"bfloat16.*no numpy array.*convert"):
        session(torch.zeros(2, 32, dtype=torch.bfloat16))


@every_runtime
def test_scalars_and_views_are_passed_whole(tmp_path, runtime):
    """A 0-d input stays 0-d, and arrays in another memory order give the same numbers."""
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"])]
    inputs = [("x", TensorProto.FLOAT, ["rows", 3]), ("factor", TensorProto.FLOAT, [])]
    session = open_artifact(save(tmp_path / "a.onnx", nodes, inputs, [("y", TensorProto.FLOAT, ["rows", 3])], {}), runtime)
    x = noise(3, 4).T
    frozen = noise(3, 4).T
    frozen.flags.writeable = False
    for view in (x, frozen, x[::-1], x.astype(">f4")):
        np.testing.assert_array_equal(session((view, np.float32(2))), view.astype("float32") * 2)


@every_runtime
def test_narrow_integers_are_widened(tmp_path, runtime):
    session = open_artifact(structured(tmp_path / "a.onnx"), runtime)
    out = session({"ids": np.array([[-5, 100]], "int8"), "mask": np.array([[1, 70000]], "int32")})
    assert out["sum"].dtype == np.int64 and out["sum"].tolist() == [[-4, 70100]]


@every_runtime
def test_outputs_of_one_call_survive_the_next(tmp_path, runtime):
    session = open_artifact(mlp(tmp_path / "a.onnx"), runtime)
    first = session(noise(2, 32))
    before = first.copy()
    session(noise(2, 32) * 5)
    np.testing.assert_array_equal(first, before)


# What a process gets with a runtime -------------------------------------------------------------------------------------------------


def test_importing_the_runtimes_imports_none():
    code = "import sys, downsize.runtimes; print({'torch', 'onnxruntime', 'openvino', 'onnx'} & set(sys.modules))"
    done = fresh(code)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@every_runtime
def test_opening_and_running_imports_no_torch_and_calls_no_one(tmp_path, runtime, monkeypatch):
    """Both runtimes report each import to their makers if nobody stops them: OpenVINO from Python, where an audit hook sees every socket, new
    process and file opened for writing; ONNX Runtime from a thread of its own, which leaves a data base in the home folder."""
    code = """
import sys
seen = []
def hook(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event.split(".")[0] in ("socket", "subprocess") or event in ("os.fork", "os.exec", "os.posix_spawn", "os.mkdir"):
        seen.append((event, args))
sys.addaudithook(hook)
import numpy, downsize.runtimes
y = downsize.runtimes.open_artifact(sys.argv[1], sys.argv[2])(numpy.ones((1, 32), "float32"))
print(y.shape, {"torch", "onnx", "transformers"} & set(sys.modules), seen)
"""
    for name in ("CI", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY"):  # OpenVINO is silent where CI is set
        monkeypatch.delenv(name, raising=False)
    done = fresh(code, str(mlp(tmp_path / "a.onnx")), runtime, HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert (done.stdout, done.stderr) == ("(1, 32) set() []\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize(("name", "pip"), [("openvino", 'pip install "downsize[openvino]"'), ("onnxruntime", "pip install onnxruntime")])
def test_a_missing_runtime_says_how_to_bring_it(tmp_path, name, pip):
    code = """
import sys
sys.modules[sys.argv[2]] = None  # the import system then finds no such package
from downsize.errors import RuntimeMissing
from downsize.runtimes import open_artifact
try:
    open_artifact(sys.argv[1], sys.argv[2])
except RuntimeMissing as error:
    print(error)
print(open_artifact(sys.argv[1], {"openvino": "onnxruntime", "onnxruntime": "openvino"}[sys.argv[2]]).runtime)
"""
    done = fresh(code, str(mlp(tmp_path / "a.onnx")), name)
    other = {"openvino": "onnxruntime", "onnxruntime": "openvino"}[name]
    assert done.stdout == f"The runtime {name!r} cannot be used: {name} is not installed: {pip}\n{other}\n"


def test_a_runtime_that_does_not_load_says_why(tmp_path):
    """A package of that name that fails as one with a missing system library does."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    code = "from downsize.runtimes import require; require('onnxruntime')"
    done = fresh(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert RuntimeMissing.__name__ in done.stderr and "installed but does not load (libgomp.so.1" in done.stderr


@every_runtime
def test_versions_are_those_of_the_packages(runtime):
    module = __import__(runtime)
    assert module.__version__.startswith(require(runtime).version())


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_onnxruntime_starts_as_many_threads_as_asked(tmp_path):
    """The calling thread is one of them."""
    path = mlp(tmp_path / "a.onnx")
    for threads in (1, 2, 3):
        before = len(os.listdir("/proc/self/task"))
        session = open_artifact(path, "onnxruntime", threads)
        assert len(os.listdir("/proc/self/task")) - before == threads - 1
        del session


@every_runtime
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps processes to CPUs")
def test_running_leaves_the_callers_cpus_alone(tmp_path, runtime):
    before = os.sched_getaffinity(0)
    open_artifact(mlp(tmp_path / "a.onnx"), runtime)(noise(1, 32))
    assert os.sched_getaffinity(0) == before


# Profiles -------------------------------------------------------------------------------------------------------------------------


def test_onnxruntime_profile_names_the_nodes(tmp_path):
    times = RUNTIMES["onnxruntime"].profile(mlp(tmp_path / "a.onnx", 64), 1, noise(4, 64), 5)
    expected = [(f"{kind}{i}", operator) for i in range(3) for kind, operator in [("linear", "MatMul"), ("activation", "Relu")]]
    assert [(time.node, time.operator) for time in times] == expected
    assert {time.detail for time in times} == {"float -> float"}
    assert all(time.seconds >= 0 for time in times) and sum(time.seconds for time in times) > 0


@pytest.mark.skipif(RUNTIMES["openvino"].missing() is not None, reason="no openvino")
def test_openvino_profile_names_the_kernels(tmp_path):
    times = RUNTIMES["openvino"].profile(mlp(tmp_path / "a.onnx", 64), 1, noise(4, 64), 5)
    assert [time.node for time in times if time.operator == "FullyConnected"] == ["linear0", "linear1", "linear2"]
    assert all(time.seconds >= 0 for time in times) and sum(time.seconds for time in times) > 0


def test_profile_sums_per_inference_and_takes_the_median():
    """By hand: one run to warm up (dropped), three counted; node a runs twice in each, inside a loop whose own time is not counted."""
    events = [{"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 900}]
    for run, (a, b) in enumerate([(900, 900), (10, 1), (30, 2), (20, 9)]):
        start = 1000 * (run + 1)
        events.append({"cat": "Session", "name": "model_run", "ts": start, "dur": 990})
        for offset, name, operator, duration in [(1, "a", "Conv", a), (400, "a", "Conv", 5), (600, "b", "Add", b), (0, "loop", "Loop", 980)]:
            args = {"op_name": operator, "input_type_shape": [{"uint8": [1]}, {"int8": [2]}], "output_type_shape": [{"uint8": [3]}]}
            events.append({"cat": "Node", "name": f"{name}_kernel_time", "ts": start + offset, "dur": duration, "args": args})
            events.append({"cat": "Node", "name": f"{name}_fence_before", "ts": start + offset, "dur": 77, "args": args})
    times = onnxruntime._operator_times(events[::-1], warm_up=1)
    detail = "uint8, int8 -> uint8"
    assert [(t.node, t.operator, t.detail) for t in times] == [("a", "Conv", detail), ("b", "Add", detail)]
    assert [t.seconds for t in times] == pytest.approx([25e-6, 2e-6])


# With the writer ------------------------------------------------------------------------------------------------------------------


@every_runtime
def test_an_exported_network_opens_with_its_structure(tmp_path, runtime):
    """The metadata that the writer puts in are those that a session reads."""
    import torch

    from downsize.network.capture import capture

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 4)

        def forward(self, x, scale):
            y = self.linear(x)
            return {"logits": y * scale, "hidden": (y,)}

    torch.manual_seed(0)
    model = Model().eval()
    example = {"x": torch.randn(3, 6), "scale": torch.rand(3, 1)}
    RUNTIMES[runtime].export(capture(model, example), tmp_path / "a.onnx")
    assert "downsize.io" in read_header(tmp_path / "a.onnx").metadata
    session = open_artifact(tmp_path / "a.onnx", runtime)
    for batch in (1, 5):
        inputs = {"x": torch.randn(batch, 6), "scale": torch.rand(batch, 1)}
        out, expected = session(inputs), model(**inputs)
        assert json.dumps(list(out)) == json.dumps(list(expected)) and isinstance(out["hidden"], tuple)
        torch.testing.assert_close(out["logits"], expected["logits"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out["hidden"][0], expected["hidden"][0], rtol=1e-5, atol=1e-6)
