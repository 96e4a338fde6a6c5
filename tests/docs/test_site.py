"""What the pages promise without being run: links, names, options, and that the site builds."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .pages import ROOT, blocks_of, name_of, paths

DOCS = ROOT / "docs"
PAGES = {name_of(path): path for path in paths()}
PACKAGES = ("mhex_core", "mhex_vision", "mhex_text")
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)(?:\s+\"[^\"]*\")?\)")


def prose(path):
    """A page without its fenced blocks and without code in a line."""
    text = re.sub(
        r"^ *(`{3,}|~{3,}).*?^ *\1`*\s*$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return re.sub(r"`[^`\n]+`", "", text)


def anchors(path):
    """What the headings of a page are called in an address."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    for found in _LINK.finditer(prose(page)):
        target = found["target"]
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), f"{name}: {target}"
        if anchor and other.suffix == ".md":
            assert anchor in anchors(other), f"{name}: {target}"


@pytest.mark.parametrize("name", PAGES)
def test_no_page_holds_a_path_of_one_machine(name):
    text = PAGES[name].read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.~])/(work|tmp|root|home|mnt|Users)/\w", text)


def test_every_page_is_reached_from_the_first():
    (tree,) = (block for block in blocks_of(DOCS / "index.md") if block.language == "{toctree}" and "why" in block.text)
    listed = {
        entry for block in blocks_of(DOCS / "index.md") if block.language == "{toctree}" for entry in entries(block)
    }
    assert tree
    for path in DOCS.rglob("*.md"):
        place = path.relative_to(DOCS).with_suffix("").as_posix()
        if "_build" not in path.parts and place != "index":
            assert place in listed, f"{place} is in no table of contents"


def entries(block):
    for line in block.text.splitlines():
        if line.strip() and not line.startswith(":"):
            yield from (path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob(f"{line.strip()}.md"))


# ---------------------------------------------------------------------------------------------------- public names


def public_modules(package):
    """The package and all packages in it that say what is public."""
    yield package
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        hidden = any(part.startswith("_") for part in found.name.split("."))
        if found.ispkg and not hidden and hasattr(importlib.import_module(found.name), "__all__"):
            yield found.name


def documented(package):
    page = DOCS / "api" / f"{package.removeprefix('mhex_')}.md"
    names = {}
    for block in blocks_of(page):
        if block.language == "{public}":
            module = page.read_text(encoding="utf-8").splitlines()[block.line - 2].split()[-1]
            lines = filter(None, map(str.strip, block.text.splitlines()))
            names.setdefault(module, []).extend(line.partition(":")[0] for line in lines)
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_all_public_names_are_on_the_page_of_their_package(package):
    listed = documented(package)
    for module in public_modules(package):
        public = importlib.import_module(module).__all__
        # A name that is imported from a package above is documented there, and only there.
        above = {name for other in listed if module.startswith(f"{other}.") for name in listed[other]}
        own = listed.get(module, [])
        assert len(own) == len(set(own)), module
        missing = sorted(set(public) - set(own) - above)
        assert not missing, f"{module}: {', '.join(missing)}"
    for module, names in listed.items():
        assert module.split(".")[0] == package
        loaded = importlib.import_module(module)
        for name in names:
            assert hasattr(loaded, name), f"{module}.{name}"
            assert not name.startswith("_")


# --------------------------------------------------------------------------------------------------------- options


def test_the_page_of_commands_has_every_option():
    done = subprocess.run(
        [sys.executable, DOCS / "option_tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_commands_in_the_pages_have_the_options_they_are_given():
    sys.path.insert(0, str(DOCS))
    try:
        tables = importlib.import_module("option_tables")
    finally:
        sys.path.remove(str(DOCS))
    known = {
        (program, command): {option for group in groups for row in group.rows for option in row.options}
        for program in tables.PROGRAMS
        for command, groups in tables.commands(program).items()
    }
    for path in paths():
        for line in commands_in(path):
            words = line.split()
            for index, word in enumerate(words):
                if word in tables.PROGRAMS and index + 1 < len(words) and (word, words[index + 1]) in known:
                    given = {part.split("=")[0] for part in words[index + 2 :] if part.startswith("--")}
                    assert given <= known[word, words[index + 1]], f"{name_of(path)}: {line}"


def commands_in(path):
    for block in blocks_of(path):
        if block.language in ("bash", "console"):
            text = block.script.replace("\\\n", " ")
            yield from (line.split(" #")[0] for line in re.split(r"\n|&&|\|", text))


# ------------------------------------------------------------------------------------------------------------ site


@pytest.fixture
def site(tmp_path):
    """The site that MHEX_SITE names, as `nox -s docs` has built it, or one that is built here."""
    built = os.environ.get("MHEX_SITE")
    if built:
        return Path(built)
    for library in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed; `nox -s docs` builds the site")
    folder = tmp_path / "site"
    options = ["-W", "--keep-going", "-n", "-q", "-d", tmp_path / "trees"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, DOCS, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_every_public_name(site):
    assert (site / "searchindex.js").stat().st_size > 10_000
    for package in PACKAGES:
        page = (site / "api" / f"{package.removeprefix('mhex_')}.html").read_text(encoding="utf-8")
        for module, names in documented(package).items():
            for name in names:
                assert f'id="{module}.{name}"' in page, f"{module}.{name}"
