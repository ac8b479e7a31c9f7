"""The run folder: found again, whole or not there, bit-equal after a kill, and clear errors before work is lost."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from downsize import engine
from downsize.engine import Run, key_of, seeded
from downsize.errors import RunError

IDENTITY = {"task": "digits", "model": "abc", "target": {"size": "1 MB"}}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder`` but the lock, by its relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock"}


def writes(text: str, calls: list[str]):
    def build(folder: Path) -> None:
        calls.append(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "data.txt").write_text(text)

    return build


def test_a_step_is_built_once_and_found_by_a_later_process(tmp_path: Path) -> None:
    calls: list[str] = []
    with Run(tmp_path / "run", IDENTITY) as run:
        first = run.step(["root", "quantize()"], writes("a", calls))
        assert run.step(["root", "quantize()"], writes("b", calls)) == first
    with Run(tmp_path / "run", IDENTITY) as run:
        assert run.step(["root", "quantize()"], writes("c", calls)) == first
        other = run.step(["root", "quantize(bits=4)"], writes("d", calls))
    assert calls == ["a", "d"]
    assert (first / "inner" / "data.txt").read_text() == "a"
    assert (other / "inner" / "data.txt").read_text() == "d"


def test_a_key_depends_on_the_previous_step_the_spelling_and_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key_of(["p", "quantize()"]), key_of(["q", "quantize()"]), key_of(["p", "quantize(bits=4)"]), key_of(["pquantize()"])]
    monkeypatch.setattr(engine, "code_version", lambda: "another version")
    keys.append(key_of(["p", "quantize()"]))
    assert len(set(keys)) == 5
    assert all(len(key) >= 16 and set(key) <= set("0123456789abcdef") for key in keys)


@pytest.mark.parametrize("damage", ["changed", "missing", "manifest", "another step's manifest"])
def test_a_damaged_step_is_built_again_and_said_so(tmp_path: Path, damage: str) -> None:
    calls: list[str] = []
    said: list[str] = []
    with Run(tmp_path, IDENTITY, tell=said.append) as run:
        step = run.step(["a"], writes("good", calls))
        assert said == []
        if damage == "changed":
            (step / "inner" / "data.txt").write_text("gOod")
        elif damage == "missing":
            (step / "inner" / "data.txt").unlink()
        elif damage == "manifest":
            (step / "manifest.json").write_text("[]")
        else:
            (step / "manifest.json").write_bytes((run.step(["b"], writes("other", [])) / "manifest.json").read_bytes())
        run.step(["a"], writes("good", calls))
    assert calls == ["good", "good"]
    assert len(said) == 1 and step.name in said[0] and "damaged" in said[0]
    assert (step / "inner" / "data.txt").read_text() == "good"


def test_a_failing_build_leaves_nothing_and_passes_its_error_on(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with Run(tmp_path, IDENTITY) as run:
        kept = run.step(["a"], writes("a", []))
        with pytest.raises(KeyboardInterrupt):
            run.step(["b"], build)
        assert [path.name for path in run.steps.iterdir()] == [kept.name]


CHAIN = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    import torch
    from downsize.engine import Run

    def main(folder, kill_in):
        with Run(folder, {"task": "chain"}) as run:
            key, state = "root", torch.zeros(1000)
            for number in range(4):
                def build(path):
                    torch.rand(7 if number == 2 else 1)  # how much a step draws must not reach into the next one
                    result = state + torch.rand(1000)
                    (path / "a.bin").write_bytes(result.numpy().tobytes()[:2000])
                    if number == kill_in:
                        os.kill(os.getpid(), signal.SIGKILL)
                    (path / "b.bin").write_bytes(result.numpy().tobytes()[2000:])
                step = run.step([key, f"step {number}"], build)
                key = step.name
                state = torch.frombuffer(bytearray((step / "a.bin").read_bytes() + (step / "b.bin").read_bytes()), dtype=torch.float32)
            run.keep(step / "b.bin", "model.onnx")

    main(sys.argv[1], int(sys.argv[2]))
    """
)


def chain(folder: Path, kill_in: int) -> int:
    return subprocess.run([sys.executable, "-c", CHAIN, str(folder), str(kill_in)], check=False).returncode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    assert chain(tmp_path / "whole", -1) == 0
    for kill_in in (2, 3):
        assert chain(tmp_path / "killed", kill_in) == -signal.SIGKILL
        leftovers = list((tmp_path / "killed" / "steps").glob(".tmp-*"))
        assert len(leftovers) == 1 and (leftovers[0] / "a.bin").exists()
        assert (tmp_path / "killed" / "lock").exists()
        assert not (tmp_path / "killed" / "model.onnx").exists()
    assert chain(tmp_path / "killed", -1) == 0
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert len(whole) == 4 * 3 + 2
    assert resumed == whole


def test_seeded_depends_on_its_text_alone_and_puts_the_callers_states_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    with seeded("a"):
        first = draw()
    before = random.getstate(), torch.get_rng_state(), np.random.get_state(legacy=False)
    with seeded("a"):
        again = draw()
    with seeded("b"):
        other = draw()
    assert first == again
    assert all(x != y for x, y in zip(first, other, strict=True))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert str(np.random.get_state(legacy=False)) == str(before[2])


def test_another_runs_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    with Run(tmp_path, IDENTITY) as run:
        run.step(["a"], writes("a", []))
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"another run \(model was \"abc\", is now \"xyz\"\): give another folder"):
        Run(tmp_path, {**IDENTITY, "model": "xyz"})
    assert contents(tmp_path) == before
    assert not (tmp_path / "lock").exists()


def test_a_folder_in_which_no_step_was_finished_can_be_taken_by_another_run(tmp_path: Path) -> None:
    Run(tmp_path, IDENTITY).close()
    Run(tmp_path, {**IDENTITY, "model": "mended"}).close()
    assert json.loads((tmp_path / "run.json").read_text())["model"] == "mended"


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"not empty \(thesis.tex\) and is not a run folder"):
        Run(tmp_path, IDENTITY)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_an_unreadable_run_json_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path, IDENTITY) as run:
        run.step(["a"], writes("a", []))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        Run(tmp_path, IDENTITY)


def test_a_file_as_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file; a run needs a folder"):
        Run(tmp_path / "file", IDENTITY)
    with pytest.raises(RunError, match="cannot be made"):
        Run(tmp_path / "file" / "below", IDENTITY)


def test_an_unwritable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # the tests may run as root, whom no permission bits stop
    with pytest.raises(RunError, match=r"cannot be written .*Permission denied"):
        Run(tmp_path, IDENTITY)


def test_a_folder_on_a_read_only_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(RunError, match=r"cannot be written .*Read-only file system"):
        Run(tmp_path, IDENTITY)
    monkeypatch.undo()


def full(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def told_as_text(_: Path) -> None:
    raise ValueError("Error while serializing: IoError: No space left on device (os error 28)")


@pytest.mark.parametrize("fill", [full, told_as_text])
def test_a_full_disk_is_told_with_bytes_and_loses_nothing(tmp_path: Path, fill, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(folder: Path) -> None:
        (folder / "part.bin").write_bytes(b"x" * 5000)
        fill(folder)

    with Run(tmp_path, IDENTITY) as run:
        kept = run.step(["a"], writes("a", []))
        with pytest.raises(RunError, match=r"a disk is full \(.*\): that of .*, where [\d,]+ bytes are free again, or that of checkpoints"):
            run.step(["b"], build, needs=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
        with pytest.raises(RunError, match=r"full: at least 5,001 bytes are needed, 5,000 are free"):
            run.step(["b"], build)
        monkeypatch.undo()
        assert [path.name for path in run.steps.iterdir()] == [kept.name]
        assert run.step(["a"], writes("again", [])) == kept


def test_a_disk_too_small_for_what_is_needed_is_refused_before_the_work(tmp_path: Path) -> None:
    calls: list[str] = []
    with Run(tmp_path, IDENTITY) as run, pytest.raises(RunError, match="at least 1,000,000,000,000,000,000 bytes are needed"):
        run.step(["a"], writes("a", calls), needs=10**18)
    assert calls == []


def test_a_failed_replace_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run(tmp_path, IDENTITY) as run:
        (tmp_path / "steps" / "new.bin").write_bytes(b"new")
        (tmp_path / "steps" / "old.bin").write_bytes(b"old")
        run.keep(tmp_path / "steps" / "old.bin", "model.onnx")
        monkeypatch.setattr(os, "fsync", lambda handle: full(Path()))
        with pytest.raises(RunError, match="is full"):
            run.keep(tmp_path / "steps" / "new.bin", "model.onnx")
        assert (tmp_path / "model.onnx").read_bytes() == b"old"
        monkeypatch.undo()
        run.keep(tmp_path / "steps" / "new.bin", "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"new"
    assert not list(tmp_path.glob(".tmp-*"))


def test_two_processes_cannot_work_in_one_folder(tmp_path: Path) -> None:
    code = "import sys; from downsize.engine import Run; Run(sys.argv[1], {'task': 'digits'})"
    with Run(tmp_path, {"task": "digits"}):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
        assert "RunError" in other.stderr and f"is in use by process {os.getpid()}" in other.stderr
    Run(tmp_path, {"task": "digits"}).close()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_lock_of_an_earlier_process_with_the_same_number_is_stale(tmp_path: Path) -> None:
    with Run(tmp_path, IDENTITY):
        lock = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps({**lock, "started": "an earlier boot 17"}))
    Run(tmp_path, IDENTITY).close()
    (tmp_path / "lock").write_text(json.dumps({**lock, "host": "elsewhere"}))
    with pytest.raises(RunError, match=r"on elsewhere.*delete"):
        Run(tmp_path, IDENTITY)


def test_of_many_processes_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys, time
        from downsize.lock import Lock
        from downsize.errors import RunError
        from pathlib import Path
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            Lock(Path(sys.argv[1])).acquire()
            print("got it", flush=True)
            sys.stdin.readline()
        except RunError:
            print("refused", flush=True)
        """
    )
    (tmp_path / "lock").write_text("")
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    streams = [(p.stdin, p.stdout) for p in processes]
    answers = []
    try:
        for stdin, stdout in streams:
            assert stdin and stdout and stdout.readline() == "ready\n"
        for stdin, _ in streams:
            assert stdin
            stdin.write("\n")
            stdin.flush()
        for _, stdout in streams:
            assert stdout
            answers.append(stdout.readline())
    finally:
        for process in processes:
            process.communicate()
    assert sorted(answers) == ["got it\n"] + ["refused\n"] * 5
