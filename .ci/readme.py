"""Run the code blocks of a Markdown file that are marked with `<!-- ci: run -->` on the line before the fence.

`bash` blocks run whole; in `console` blocks the lines after `$ ` are the commands; `python` blocks run as a script. The first one that
fails ends the run with its status. A file with no marked block is a failure too: it would mean that nothing is checked.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import time

MARK = "<!-- ci: run -->"
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str, bool]]:
    """Each fenced block: its language, its text, whether it is marked."""
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n")[2].strip()
        found.append((match[1], match[2], before == MARK))
    return found


def command(language: str, text: str) -> list[str]:
    """The process that runs one block."""
    if language == "python":
        return [sys.executable, "-c", text]
    if language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    elif language not in ("bash", "sh"):
        raise SystemExit(f"a {language} block is marked to be run; only bash, sh, console and python blocks can be.")
    return ["bash", "-euo", "pipefail", "-c", text]


def main() -> int:
    path = pathlib.Path(sys.argv[1])
    found = blocks(path.read_text(encoding="utf-8"))
    marked = [(language, text) for language, text, is_marked in found if is_marked]
    print(f"{path}: {len(marked)} of {len(found)} blocks are marked to be run")
    if not marked:
        print(f"{path}: no block is marked with {MARK}", file=sys.stderr)
        return 1
    environment = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    for language, text in marked:
        print(f"\n--- {language}\n{text.rstrip()}\n---", flush=True)
        start = time.monotonic()
        status = subprocess.run(command(language, text), env=environment, check=False).returncode
        print(f"--- exit status {status}, {time.monotonic() - start:.0f} s", flush=True)
        if status:
            return status if status > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
