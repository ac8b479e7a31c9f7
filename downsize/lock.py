"""One process at a time in a folder: a lock file made with O_EXCL that names its owner, so that a dead owner's lock is taken over."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from .errors import RunError


class Lock:
    """A lock file at ``path``, held from :meth:`acquire` to :meth:`release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = False

    def acquire(self) -> None:
        """Take the lock, at once or not at all.

        Raises:
            RunError: a living process (or one on another host, of which nothing is known here) holds it, or the folder cannot be written.
        """
        for _ in range(3):
            if self._create():
                return
            owner = self._owner()
            if owner is not None and _lives(owner):
                raise RunError(
                    f"{self.path.parent} is in use by process {owner.get('pid')} on {owner.get('host')}: wait for it, or give another folder. "
                    f"If no such process works there any more, delete {self.path}."
                )
            self._remove(owner)
        raise RunError(f"{self.path} could not be taken: other processes are taking it at this moment. Try again.")

    def release(self) -> None:
        """Remove the lock file if this object holds it."""
        if self._held:
            self._held = False
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Write the lock beside and link it into place: nobody ever sees one without its owner in it. False when one is there."""
        mine = self.path.with_name(f".tmp-lock-{os.getpid()}-{id(self)}")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
        try:
            _write_new(mine, owner)
            try:
                os.link(mine, self.path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                _write_new(self.path, owner)
        except FileExistsError:
            return False
        except OSError as error:
            raise RunError(f"{self.path.parent} cannot be written ({error}): give a folder that can, or free some space.") from error
        finally:
            with contextlib.suppress(OSError):  # a file system that is read only refuses this too, of a file that is not there
                mine.unlink()
        self._held = True
        return True

    def _owner(self) -> dict[str, Any] | None:
        """Who holds the lock; None when nobody does any more or the file says nothing."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return owner if isinstance(owner, dict) and isinstance(owner.get("pid"), int) else None

    def _remove(self, judged: dict[str, Any] | None) -> None:
        """Take a dead owner's lock away; another process that was quicker gets its fresh lock back."""
        aside = self.path.with_name(f".tmp-stale-lock-{os.getpid()}-{id(self)}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        try:
            if Lock(aside)._owner() != judged:
                os.link(aside, self.path)
        except OSError:
            pass
        finally:
            aside.unlink(missing_ok=True)


def _write_new(path: Path, owner: dict[str, Any]) -> None:
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w", encoding="utf-8") as file:
        file.write(json.dumps(owner))


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the owner still runs. Where that cannot be known (another host, not a POSIX system) it is taken to run."""
    if owner.get("host") != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs under another user
        pass
    # A number is given again to a new process, soon in a container: the same number with another start is another process.
    return owner.get("started") in (None, _started(owner["pid"]))


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot, with the boot's own id; None where /proc does not tell, or when it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return None if state == "Z" else f"{boot} {fields[18]}"
    except (OSError, IndexError, ValueError):
        return None
