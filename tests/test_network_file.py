"""Network files: loaded equals live to the bit, nothing is pickled, and what is no network file is refused."""

from __future__ import annotations

import _pickle
import io
import pickle
from typing import Any

import pytest
import torch
from forgery import Victim, read, victim, write
from safetensors.torch import save_file
from torch import Tensor, nn
from zoo import BY_NAME, assert_close, captured, specimen

from downsize.errors import NetworkFileError
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.rewrite import add_constant, aten

NAMES = sorted(BY_NAME)


class Refused:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")


def round_trip(network: Network, folder: Any) -> Network:
    """Save and load, where everything that pickles is broken."""
    with pytest.MonkeyPatch.context() as patch:
        for module, names in (
            (pickle, "load loads Unpickler _Unpickler dump dumps Pickler"),
            (_pickle, "load loads Unpickler"),
            (torch, "load save"),
        ):
            for name in names.split():
                patch.setattr(module, name, Refused)
        network.save(folder / "n.safetensors")
        return Network.load(folder / "n.safetensors")


def test_the_guard_against_pickle_guards(tmp_path):
    with pytest.raises(AssertionError, match="pickle was used"):
        round_trip(Pickling(), tmp_path)  # type: ignore[arg-type]


class Pickling:
    def save(self, path: Any) -> None:
        torch.save(1, path)


@pytest.mark.parametrize("name", NAMES)
def test_loaded_equals_live_to_the_bit(name, tmp_path):
    _, network = specimen(name)
    loaded = round_trip(network, tmp_path)
    for batch in (1, 3):
        assert_close(loaded.predict(BY_NAME[name].inputs(batch)), network.predict(BY_NAME[name].inputs(batch)), tolerance=0)
    assert (loaded.ports, loaded.inputs, loaded.outputs) == (network.ports, network.inputs, network.outputs)
    assert [(n.op, n.name, str(n.target), n.meta["module"], n.meta["source"]) for n in loaded.graph.nodes if n.op != "output"] == [
        (n.op, n.name, str(n.target), n.meta["module"], n.meta["source"]) for n in network.graph.nodes if n.op != "output"
    ]
    assert loaded.fingerprint() == network.fingerprint()


def test_saving_twice_gives_the_same_bytes(tmp_path):
    _, network = specimen("bert")
    loaded = round_trip(network, tmp_path)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "n.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "n.safetensors"]


def test_tied_weights_stay_tied_and_are_written_once(tmp_path):
    network = specimen("tied")[1].fork()
    head = next(node for node in reversed(network.graph.nodes) if node.target is aten.linear.default)
    tied = next(name for name, tensor in network.named_tensors() if tensor.shape == (50, 12))
    head.update_arg(1, add_constant(network, "a.second.name", network.tensor(tied), head))
    network.recompile()
    loaded = round_trip(network, tmp_path)
    assert loaded.tensor("a.second.name") is loaded.tensor(tied) and len(list(loaded.parameters())) == 3
    assert loaded.copy().tensor("a.second.name") is not loaded.tensor(tied)
    assert sum(tensor.shape == (50, 12) for tensor in read(tmp_path / "n.safetensors")[1].values()) == 1


def test_parameters_buffers_and_what_trains_are_kept(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[0].weight.requires_grad_(False)
    network = capture(model, torch.randn(2, 4))
    loaded, x = round_trip(network, tmp_path), torch.randn(3, 4)
    for (name, one), (_, two) in zip(network.named_tensors(), loaded.named_tensors(), strict=True):
        assert (type(one), one.requires_grad) == (type(two), two.requires_grad), name
    assert torch.equal(loaded.train().predict(x), network.fork().train().predict(x))


def test_views_of_one_storage_are_saved_each(tmp_path):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(4, 4)
            self.four: Tensor
            self.one, self.two, self.three = nn.Parameter(whole), nn.Parameter(whole.view(16)), nn.Parameter(whole.t())
            self.register_buffer("four", whole[1:3])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.one + self.two[:4] + x @ self.three + self.four.sum(0)

    network = capture(Views().eval(), torch.randn(2, 4))
    x = torch.randn(3, 4)
    assert torch.equal(round_trip(network, tmp_path).predict(x), network.predict(x))


def test_channels_last_stays_channels_last(tmp_path):
    model = BY_NAME["plain"].make().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = capture(model, BY_NAME["plain"].inputs(2))
    loaded, x = round_trip(network, tmp_path), BY_NAME["plain"].inputs(3)
    assert torch.equal(loaded.predict(x), network.predict(x))
    for (name, one), (_, two) in zip(network.named_tensors(), loaded.named_tensors(), strict=True):
        assert one.stride() == two.stride(), name


def test_structure_of_inputs_and_outputs_survives(tmp_path):
    model, network = Victim().eval(), victim()
    loaded = round_trip(network, tmp_path)
    inputs = Victim.example(3)
    with torch.no_grad():
        assert_close(loaded.predict(inputs), model(**inputs), 1e-5)
    assert loaded.predict(inputs)["rest"][1][1] == "text" and loaded.inputs["items"][1]["items"][2]["value"] == float("inf")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.int8, torch.bool])
def test_every_dtype(kind, tmp_path):
    constant = torch.tensor([1, 0, 2], dtype=torch.float64).to(kind)
    network = captured(lambda self, x: (x, constant), torch.zeros(2, 4))
    assert_close(round_trip(network, tmp_path).predict(torch.zeros(2, 4))[1], constant, 0)


def test_special_floats_among_arguments(tmp_path):
    def forward(self: Any, x: Tensor) -> Tensor:
        return x.masked_fill(x > 0, float("-inf")).masked_fill(x < -1, float("nan")) * -0.0 + 1e-320

    network = captured(forward, torch.randn(2, 4))
    x = torch.randn(5, 4)
    assert torch.equal(round_trip(network, tmp_path).predict(x).view(torch.int32), network.predict(x).view(torch.int32))


def test_saving_in_training_mode_saves_evaluation_and_changes_nothing(tmp_path):
    network = specimen("plain")[1].fork().train()
    loaded = round_trip(network, tmp_path)
    assert loaded.fingerprint() == specimen("plain")[1].fingerprint()
    assert [node.args[5] for node in network.graph.nodes if "batch_norm" in str(node.target)] == [True, True]


# What is no network file -------------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_is_a_clean_error(tmp_path):
    with pytest.raises(NetworkFileError, match="cannot be written"):
        victim().save(tmp_path / "missing" / "n.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    victim().save(tmp_path / "n.safetensors")
    before = (tmp_path / "n.safetensors").read_bytes()

    def full(tensors: Any, path: str, metadata: Any) -> None:
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("downsize.network.file.save_file", full)
    with pytest.raises(NetworkFileError, match="No space left on device"):
        specimen("plain")[1].save(tmp_path / "n.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["n.safetensors"] and (tmp_path / "n.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a network file"),
        (b"PK\x03\x04 something", "is not a network file"),
        (b"\x80\x04\x95", "is not a network file"),
        (b"\xff" * 64, "is not a network file"),
    ],
)
def test_other_files_are_refused(content, words, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(NetworkFileError, match=words):
        Network.load(tmp_path / "x")


def test_other_paths_and_archives_are_refused(tmp_path):
    with pytest.raises(NetworkFileError, match="does not exist"):
        Network.load(tmp_path / "nothing")
    with pytest.raises(NetworkFileError, match="is not a network file"):
        Network.load(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(NetworkFileError, match="a safetensors file without a network in it"):
        Network.load(tmp_path / "plain")
    torch_archive = io.BytesIO(b"PK\x03\x04" + b"\x00" * 100)
    (tmp_path / "old.pt").write_bytes(torch_archive.getvalue())
    with pytest.raises(NetworkFileError, match="is not a network file"):
        Network.load(tmp_path / "old.pt")


def test_a_changed_value_is_noticed(tmp_path):
    victim().save(tmp_path / "n")
    record, tensors = read(tmp_path / "n")
    content = (tmp_path / "n").read_bytes()
    for where in (len(content) - 1, len(content) - 40, content.index(b"aten.conv2d") + 5):
        (tmp_path / "n").write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
        with pytest.raises(NetworkFileError, match=r"checksum|not a network file"):
            Network.load(tmp_path / "n")
    write(tmp_path / "n", record, tensors)
    assert Network.load(tmp_path / "n").fingerprint() == victim().fingerprint()


def test_another_version_is_named(tmp_path):
    victim().save(tmp_path / "n")
    record, tensors = read(tmp_path / "n")
    write(tmp_path / "n", {**record, "version": 2}, tensors)
    with pytest.raises(NetworkFileError, match="format 2; this version of downsize reads 1"):
        Network.load(tmp_path / "n")
