"""Writes the options of all commands into command-line.md, between its marks; `--check` says if they are those.

`python docs/option_tables.py`
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent / "command-line.md"
PROGRAMS = ("mhex-vision", "mhex-text")


@dataclass(frozen=True)
class Row:
    """An option: what it is called, what it takes, and what it means."""

    options: tuple[str, ...]
    takes: str
    meaning: str

    def __str__(self) -> str:
        called = " ".join((", ".join(self.options), self.takes)).strip()
        return f"| `{_cell(called)}` | {_cell(self.meaning)} |"


@dataclass(frozen=True)
class Group:
    """Options under one heading of a command's help."""

    title: str
    rows: tuple[Row, ...]


def commands(program: str) -> dict[str, tuple[Group, ...]]:
    """The commands of a program, and their options as its parser has them."""
    parser: argparse.ArgumentParser = importlib.import_module(f"{program.replace('-', '_')}.cli")._parser()
    (chosen,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: tuple(_groups(command)) for name, command in chosen.choices.items()}


def _groups(command: argparse.ArgumentParser) -> list[Group]:
    found = []
    for group in command._action_groups:
        rows = tuple(_row(action) for action in group._group_actions if action.dest != "help")
        if rows:
            found.append(Group("" if group.title in ("options", "positional arguments") else str(group.title), rows))
    return found


def _row(action: argparse.Action) -> Row:
    if action.nargs == 0:
        takes = ""
    elif action.choices is not None:
        takes = "|".join(map(str, action.choices))
    else:
        takes = str(action.metavar or action.dest.upper())
    meaning = " ".join((action.help or "").split())
    # As argparse does it: "%(default)s" and its kin.
    values = {name: getattr(action, name) for name in ("default", "dest", "metavar")}
    required = "; must be given" if action.required else ""
    return Row(tuple(action.option_strings), takes, f"{meaning % values}{required}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(program: str, command: str) -> str:
    """The options of a command in Markdown."""
    lines = []
    for group in commands(program)[command]:
        lines += ["", f"*{group.title}*"] if group.title else []
        lines += ["", "| option | |", "|---|---|", *map(str, group.rows)]
    return "\n".join(lines).strip() + "\n"


def filled(text: str) -> str:
    """The page with its tables as they should be.

    Raises:
        ValueError: A command has no place on the page, or a place no command.
    """
    wanted = {f"{program} {command}" for program in PROGRAMS for command in commands(program)}
    there = set(re.findall(r"<!-- options: (.+?) -->", text))
    if there != wanted:
        raise ValueError(f"{PAGE.name} must have a place for each command, and differs in {sorted(there ^ wanted)}")

    def fill(found: re.Match[str]) -> str:
        return f"<!-- options: {found[1]} -->\n{table(*found[1].split())}<!-- end -->"

    return re.sub(r"<!-- options: (.+?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where the page differs")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if check and after != before:
        sys.stderr.write(f"{PAGE.name} is not what the commands say; run python docs/{Path(__file__).name}\n")
        return 1
    if not check:
        PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
