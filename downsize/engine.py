"""The run folder: steps that are built once, written whole, and found again.

    <folder>/run.json        whose folder this is: task, model, target
             lock            which process works in it now
             steps/<key>/    one finished step: its files and manifest.json with their sha256
             checkpoints/<key>/  the state of a training in a step that is not finished
             model.onnx      the best file so far, replaced in one move
             report.json     what was tried and measured

A step's key is the hash of the previous key, the step as spelled, and the version of the code that decides its bytes. It is built in
``steps/.tmp-<key>-<pid>``, brought to the disk, and appears by one rename: after a crash it is there whole or not at all, and running
again goes on from the last finished one. What follows a step starts from the *loaded* network and from random states that depend on
the key alone, so that a resumed run gives the bytes of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RunError
from .facts import VERSION
from .lock import Lock

if TYPE_CHECKING:
    from typing_extensions import Self

    from .network.network import Network

KEY_LENGTH = 20
MANIFEST = "manifest.json"
NETWORK = "network.safetensors"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
BYTE_DECIDING_LIBRARIES = ("torch", "numpy", "scipy", "onnx", "onnxscript", "onnx-ir")
# Parts of the package that can change without changing one byte of a step.
BYTE_NEUTRAL = (
    *("__init__.py", "cli.py", "tables.py", "planner.py", "candidates.py", "progress.py", "lock.py", "testing.py"),
    *("errors.py", "facts.py", "target.py", "measure"),
)


@dataclass(frozen=True)
class Stage:
    """A finished step that holds a network: its key, its folder, and the network as loaded from there."""

    key: str
    folder: Path
    network: Network


@functools.cache
def code_version() -> str:
    """What decides the bytes of a step besides its spelling: this package's sources and the versions of the libraries under it."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if relative.parts[0] not in BYTE_NEUTRAL:
            digest.update(f"{relative.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return "; ".join([f"downsize {VERSION} {digest.hexdigest()[:KEY_LENGTH]}"] + [f"{name} {_version(name)}" for name in BYTE_DECIDING_LIBRARIES])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def key_of(key_parts: Sequence[str]) -> str:
    """The name of a step's folder: a hash of its parts and of :func:`code_version`."""
    return hashlib.sha256(json.dumps([*key_parts, code_version()]).encode()).hexdigest()[:KEY_LENGTH]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


class Run:
    """A run folder, owned by this process until :meth:`close`.

    Args:
        folder: made when missing. An existing one must be empty or belong to the same ``identity``.
        identity: plain JSON that says whose folder it is, e.g. ``{"task": ..., "model": <hash>, "target": {...}}``.
        tell: takes one line of text when something deserves saying (a damaged step is built again).

    Raises:
        RunError: the folder is a file, cannot be written, belongs to another run, holds other files, or another process works in it.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any], tell: Callable[[str], None] | None = None) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.identity = json.loads(json.dumps(identity))
        self.tell = tell or (lambda line: None)
        self.steps = self.folder / "steps"
        _make_folder(self.folder)
        self._lock = Lock(self.folder / "lock")
        self._lock.acquire()
        try:
            self._claim()
            self._sweep()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder free for other processes; harmless when done twice."""
        self._lock.release()

    def step(self, key_parts: Sequence[str], build: Callable[[Path], None], needs: int = 0) -> Path:
        """The folder of one finished step, found or built.

        Args:
            key_parts: what the step depends on: the previous step's key and the step as spelled. The code version is added.
            build: writes the step's files into the folder it is given; it is called only when no sound step is there.
            needs: bytes it will write, if known: a disk that lacks them is refused before the work.

        Raises:
            RunError: the disk is full (the message has the bytes) or the folder cannot be written. Whatever ``build`` raises passes
                through; in each case the temporary folder is removed and finished steps stay.
        """
        key = key_of(key_parts)
        path = self.steps / key
        if path.exists():
            fault = _fault(path, key)
            if fault is None:
                return path
            self.tell(f"step {key} is damaged ({fault}): it is built again")
        self._require_space(needs)
        temporary = self.steps / f".tmp-{key}-{os.getpid()}"
        try:
            with self._writing(needs, temporary):
                temporary.mkdir()
            with self._building(needs, temporary), seeded(key):
                build(temporary)
            with self._writing(needs, temporary):
                _write_manifest(temporary, key, key_parts)
                _flush_tree(temporary)
                shutil.rmtree(path, ignore_errors=True)
                os.rename(temporary, path)
                _flush(self.steps)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return path

    def network(self, key_parts: Sequence[str], make: Callable[[], Network], needs: int = 0) -> Stage:
        """A step whose result is a network; what is given back is the network as loaded from the step's file."""
        from .network.network import Network

        folder = self.step(key_parts, lambda path: make().save(path / NETWORK), needs)
        return Stage(folder.name, folder, Network.load(folder / NETWORK))

    def place(self, key_parts: Sequence[str]) -> Path:
        """Where a step of these parts may keep what it needs to go on after an interruption. Its maker makes the folder when needed."""
        return self.folder / "checkpoints" / key_of(key_parts)

    def clear(self, key_parts: Sequence[str]) -> None:
        """Remove what was kept there: the step is finished."""
        shutil.rmtree(self.place(key_parts), ignore_errors=True)
        with contextlib.suppress(OSError):
            self.place(key_parts).parent.rmdir()

    def keep(self, source: Path, name: str) -> Path:
        """Put a copy of ``source`` into the folder as ``name`` by one replace: a reader sees the old file or the new one, whole."""
        size = source.stat().st_size
        self._require_space(size)
        return self._replace(name, lambda temporary: shutil.copyfile(source, temporary), size)

    def write(self, name: str, text: str) -> Path:
        """Put a UTF-8 text file into the folder as ``name`` by one replace."""
        return self._replace(name, lambda temporary: temporary.write_text(text, encoding="utf-8"), len(text))

    def _replace(self, name: str, write: Callable[[Path], object], size: int) -> Path:
        temporary = self.folder / f".tmp-{name}-{os.getpid()}"
        try:
            with self._writing(size, temporary):
                write(temporary)
                _flush(temporary)
                os.replace(temporary, self.folder / name)
                _flush(self.folder)
        finally:
            temporary.unlink(missing_ok=True)
        return self.folder / name

    def _claim(self) -> None:
        """Write run.json, or check that the one that is there says the same."""
        path = self.folder / "run.json"
        others = sorted(p.name for p in self.folder.iterdir() if p.name not in ("lock", "run.json") and not p.name.startswith(".tmp-"))
        if not path.exists() and others:
            raise RunError(f"{self.folder} is not empty ({', '.join(others[:3])}) and is not a run folder: give a new or an empty folder.")
        if path.exists() and any(name != "steps" or _finished(self.steps) for name in others):
            self._check_owner(path)
        with self._writing(0, self.folder):
            self.steps.mkdir(exist_ok=True)
        self.write("run.json", json.dumps({**self.identity, "code": code_version()}, indent=1, sort_keys=True) + "\n")

    def _check_owner(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            found.pop("code", None)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error}), so it is not known whose folder this is: give another folder.") from error
        differing = sorted(key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key))
        if differing:
            rows = "; ".join(f"{key} was {json.dumps(found.get(key))}, is now {json.dumps(self.identity.get(key))}" for key in differing)
            raise RunError(f"{self.folder} belongs to another run ({rows}): give another folder, or delete this one if nothing in it is needed.")

    def _sweep(self) -> None:
        """Remove what a process that died has left half-written; the lock says that none is at work."""
        for place in (self.folder, self.steps):
            for path in place.glob(".tmp-*"):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _require_space(self, needs: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needs > free:
            raise RunError(_space_message(self.folder, needs, free))

    @contextlib.contextmanager
    def _writing(self, needs: int, temporary: Path) -> Iterator[None]:
        """Turn a failing write of our own into a RunError."""
        with self._building(needs, temporary):
            try:
                yield
            except OSError as error:
                if not _out_of_space(error):
                    raise RunError(f"{self.folder} cannot be written ({error}): give a folder that can, or mend the disk.") from error
                raise

    @contextlib.contextmanager
    def _building(self, needs: int, temporary: Path) -> Iterator[None]:
        """Turn a full disk, whichever library met it, into a RunError with the bytes."""
        try:
            yield
        except Exception as error:
            if not _out_of_space(error):
                raise
            written = _bytes_under(temporary)
            shutil.rmtree(temporary, ignore_errors=True) if temporary != self.folder else None
            raise RunError(_space_message(self.folder, max(needs, written + 1), shutil.disk_usage(self.folder).free, error)) from error


def _space_message(folder: Path, needs: int, free: int, error: Exception | None = None) -> str:
    """``needs``: what is known of; what did not fit may have been more than that, or on another disk."""
    full = f"the disk that holds {folder} is full: at least {needs:,} bytes are needed, {free:,} are free. "
    if free >= needs:
        full = f"a disk is full ({error}): that of {folder}, where {free:,} bytes are free again, or that of checkpoints or temporary files. "
    return full + "Free some space or give a folder on another disk; finished steps are kept, so that running again goes on from there."


def _out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error; safetensors and ONNX Runtime report it as text only."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in NO_SPACE) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; a run needs a folder: give another name.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error}): give a folder that can be written.") from error


def _finished(steps: Path) -> bool:
    return steps.is_dir() and any(not path.name.startswith(".tmp-") for path in steps.iterdir())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _write_manifest(folder: Path, key: str, key_parts: Sequence[str]) -> None:
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in _files(folder)}
    text = json.dumps({"key": key, "parts": list(key_parts), "code": code_version(), "files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _fault(folder: Path, key: str) -> str | None:
    """What is wrong with a finished step, None when it is sound."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["key"] != key:
            return "its manifest is of another step"
        for name, sha256 in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256_of(folder / name) != sha256:
                return f"{name} does not have the sha256 it was written with"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {type(error).__name__}"
    return None


def _flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    """Bring a file or a folder's entries to the disk. Only POSIX systems can open a folder for that."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes_under(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(child.stat().st_size for child in path.rglob("*") if child.is_file()) if path.is_dir() else 0


@contextlib.contextmanager
def seeded(text: str) -> Iterator[None]:
    """Random states of Python, numpy and torch that depend on ``text`` alone; the caller's states are put back at the end.

    A step that draws random numbers (or whose data are drawn at random) would else depend on what ran before it in this process.
    """
    import numpy as np
    import torch

    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)
