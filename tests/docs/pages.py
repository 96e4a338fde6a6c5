"""What the pages of the documentation hold: fenced blocks, marks and links.

A block that is not run is preceded by `<!-- not run: reason -->`. Two kinds of block say so by themselves: one that
does nothing but install or build, and one with an ellipsis in place of what the reader has to fill in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "bash", "console")  # what is run
SHOWN = ("text", "json", "yaml", "toml", "html", "cpp", "bibtex", "markdown")  # what is only read

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})\s*(?P<info>.*?)\s*$")
_MARK = re.compile(r"^<!--\s*not run:\s*(?P<reason>.+?)\s*-->$")
_INSTALLS = re.compile(r"^(python -m )?(pip install|nox)\b")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The file, from the root of the repository.
        line: Of its first line of text, from 1.
        language: What stands behind the fence; "{name}" for a directive.
        text: Without the fences.
        reason: Why it is not run, or None.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None = None

    @property
    def runs(self) -> bool:
        return self.language in LANGUAGES and self.reason is None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def script(self) -> str:
        """What bash is given: of a console, what stands behind the prompts."""
        if self.language != "console":
            return self.text
        commands, goes_on = [], False
        for line in self.text.splitlines():
            if line.startswith("$ "):
                commands.append(line[2:])
            elif goes_on:
                commands.append(line.removeprefix("> "))
            goes_on = bool(commands) and (line.startswith("$ ") or goes_on) and line.endswith("\\")
        return "\n".join(commands)


def paths() -> list[Path]:
    """README.md and all pages of docs."""
    pages = (path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
    return [ROOT / "README.md", *sorted(pages)]


def name_of(path: Path, root: Path = ROOT) -> str:
    return path.relative_to(root).as_posix()


def blocks_of(path: Path, root: Path = ROOT) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        ValueError: A fence is never closed.
    """
    found: list[Block] = []
    opened: re.Match[str] | None = None
    start, held, mark = 0, list[str](), None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is not None:
            if fence and not fence["info"] and fence["fence"].startswith(opened["fence"]):
                text = "\n".join(part.removeprefix(opened["indent"]) for part in held)
                language = opened["info"].split()[0] if opened["info"] else ""
                found.append(Block(name_of(path, root), start, language, text, mark or _by_itself(language, text)))
                opened, mark = None, None
            else:
                held.append(line)
        elif fence:
            opened, start, held = fence, number + 1, []
        elif marked := _MARK.match(line.strip()):
            mark = marked["reason"]
        elif line.strip():
            mark = None
    if opened is not None:
        raise ValueError(f"{name_of(path, root)}:{start - 1}: the fence is never closed")
    return found


def _by_itself(language: str, text: str) -> str | None:
    """Why a block cannot run, where its text says it."""
    if language not in ("bash", "console"):
        return None
    lines = [line.partition(" #")[0].removeprefix("$ ").strip() for line in text.splitlines() if line.strip()]
    if lines and all(_INSTALLS.match(part.strip()) for line in lines for part in line.split("&&")):
        return "installs or builds"
    return "the reader fills in the rest" if any(" ... " in f"{line} " for line in lines) else None
