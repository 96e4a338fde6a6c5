"""Runs the blocks of one page: Python in this process, with shared names; the rest by `bash -e`.

`python running.py BLOCKS.json`, in the page's folder. The first block that fails ends it, with the place in the page.
"""

from __future__ import annotations

import json
import linecache
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main(file: str) -> int:
    names: dict[str, Any] = {"__name__": "__main__"}
    sys.path.insert(0, "")  # as where `python` was started
    for block in json.loads(Path(file).read_text(encoding="utf-8")):
        begin = time.monotonic()
        right = run_python(block, names) if block["language"] == "python" else run_bash(block)
        if not right:
            sys.stderr.write(f"\n{block['place']}: this block failed\n")
            return 1
        sys.stderr.write(f"{block['place']}: {time.monotonic() - begin:.1f} s\n")
    return 0


def run_python(block: dict[str, Any], names: dict[str, Any]) -> bool:
    place = f"<{block['place']}>"
    text = block["text"] + "\n"
    linecache.cache[place] = (len(text), None, text.splitlines(keepends=True), place)
    try:
        exec(compile(text, place, "exec"), names)
    except BaseException:  # noqa: BLE001 - sys.exit in a page is a mistake as well
        traceback.print_exc()
        return False
    sys.stdout.flush()
    return True


def run_bash(block: dict[str, Any]) -> bool:
    sys.stdout.flush()
    return subprocess.run(["bash", "-e", "-c", block["text"]], stdin=subprocess.DEVNULL, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
