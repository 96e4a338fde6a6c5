"""Every block of Python and every command of README.md and docs runs as it stands, page by page."""

from __future__ import annotations

import sys

import pytest

from .conftest import wanted
from .pages import LANGUAGES, SHOWN, Block, blocks_of, name_of, paths

PAGES = {name_of(path): path for path in paths()}
BLOCKS = {name: blocks_of(path) for name, path in PAGES.items()}
WITH_CODE = [name for name, blocks in BLOCKS.items() if any(block.runs for block in blocks)]
# The quick run keeps the README and one tutorial.
QUICK = ("README.md", "docs/tutorial-texts.md")
MOST_LEFT_OUT = 24


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WITH_CODE]
)
def test_the_blocks_of_a_page_run_in_order(runner, tmp_path, name):
    folder = tmp_path / "page"
    folder.mkdir()
    done = runner.run_page(PAGES[name], folder)
    sys.stdout.write(f"{done.stdout}\n{done.stderr}")  # how long each block took: pytest -s
    assert done.returncode == 0, done.stderr[-4000:]


def test_what_does_not_run_says_why_and_is_little():
    left_out = [block for blocks in BLOCKS.values() for block in blocks if block.language in LANGUAGES and block.reason]
    listed = "\n".join(f"{block.place}: {block.reason}" for block in left_out)
    sys.stdout.write(listed)
    assert len(left_out) <= MOST_LEFT_OUT, listed
    run = sum(block.runs for blocks in BLOCKS.values() for block in blocks)
    assert run > len(left_out)


def test_blocks_are_of_known_languages():
    for blocks in BLOCKS.values():
        for block in blocks:
            known = block.language in (*LANGUAGES, *SHOWN) or block.language.startswith("{")
            assert known, f"{block.place}: {block.language or 'no language'}"
            # What stands in a directive would not be found.
            assert not block.language.startswith("{") or "```" not in block.text, block.place


def test_python_blocks_are_python():
    for blocks in BLOCKS.values():
        for block in blocks:
            if block.language == "python":
                compile(block.text, block.place, "exec")


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("<!-- not run: takes a cluster -->\n\n```bash\nsbatch x\n```", "bash", "takes a cluster"),
        ("<!-- not run: takes a cluster -->\nOther words.\n```bash\nls\n```", "bash", None),
        ("```bash\npip install mhex-vision\n```", "bash", "installs or builds"),
        ("```bash\npip install mhex-vision\nmhex-vision info\n```", "bash", None),
        ("```bash\nmhex-vision batch ... --engine ray\n```", "bash", "the reader fills in the rest"),
        ("- item\n\n  ```python\n  x = [...]\n  ```", "python", None),
    ],
)
def test_how_a_page_is_read(tmp_path, text, language, reason):
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    (block,) = blocks_of(path, root=tmp_path)
    assert (block.language, block.reason) == (language, reason)
    assert not block.text.startswith(" ")


def test_a_fence_that_stays_open_is_an_error(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("```python\nx = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md:1: the fence is never closed"):
        blocks_of(path, root=tmp_path)


def test_of_a_console_the_commands_are_run():
    text = "$ mhex-vision info \\\n    --backbone resnet18\nmhex-vision 0.1.0\n$ ls\nphotos"
    assert Block("page", 1, "console", text).script == "mhex-vision info \\\n    --backbone resnet18\nls"


def test_a_page_is_given_the_runs_that_it_does_not_make():
    def blocks(*texts):
        return [Block("page", 1, "bash", text) for text in texts]

    assert wanted(blocks("mhex-vision explain --checkpoint runs/blood --input x --out y")) == {"runs/blood"}
    train = "mhex-vision train --data bloodmnist --out runs/blood"
    assert wanted(blocks(train, "mhex-vision info --checkpoint runs/blood")) == set()
    assert wanted(blocks("mhex-vision info --checkpoint runs/blood", train)) == {"runs/blood"}


def test_a_block_that_fails_is_named(runner, tmp_path):
    good = '```python\nx = 2\nopen("made", "w").write(str(x))\n```\n'
    for number, bad in enumerate(("```python\nassert x == 3\n```\n", "```bash\nfalse\ntrue\n```\n")):
        page, folder = tmp_path / "page.md", tmp_path / f"folder-{number}"
        page.write_text(good + bad, encoding="utf-8")
        folder.mkdir()
        done = runner.run_page(page, folder, root=tmp_path)
        assert done.returncode == 1
        assert "page.md:6: this block failed" in done.stderr
        assert (folder / "made").read_text() == "2"


def test_the_command_of_a_page_is_the_installed_one(runner, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\nmhex-vision --help > help; mhex-vision nothing || echo $? > status\n```\n")
    done = runner.run_page(page, tmp_path, root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "help").read_text().startswith("usage: mhex-vision")
    assert (tmp_path / "status").read_text() == "2\n"
