"""The pages of the packages: a directive that documents public names, and docstrings made fit for Sphinx.

A page lists names by role, a line each; a constant may have a description, since its type's docstring is none:

    ```{public} mhex_core
    MHEXBlock
    saliency_maps
    ERASER_FRACTIONS: Shares of the tokens that are taken away.
    ```

What kind of thing each is follows from the thing.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

# What in a docstring is code: between backticks, single or double, or a role. In the rest `*` and `|` mean themselves.
_CODE = re.compile(r"(``.+?``|:\w+(?::\w+)?:`[^`]+`|`[^`]+`)", re.DOTALL)
_MARKUP = re.compile(r"(?<!\\)([*|]|(?<=\w)_(?=\W|$))")
_ITEM = re.compile(r"\s*(?:- |\\\* |\d+\. )")
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Note|Example|Examples):$")
_LETTER = re.compile(r"^(\s*:[^:]+: )([A-Z]\.)")  # "K.", which would begin a list
_OURS = re.compile(r"mhex_(core|vision|text)\.")
_OUTSIDE = re.compile(r"(?<!!)\[([^\]\n]+)\]\(((?:\.\./)+[^)\s#]+)(?:#[^)\s]*)?\)")


class Public(SphinxDirective):
    """Documents names of a module, in the order given."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """The nodes of all names."""
        module = importlib.import_module(self.arguments[0])
        lines = ["````{eval-rst}", f".. py:currentmodule:: {module.__name__}", ""]
        for line in filter(None, (line.strip() for line in self.content)):
            name, _, described = line.partition(":")
            if not hasattr(module, name):
                raise self.error(f"{module.__name__} has no {name}")
            lines += [*_directive(f"{module.__name__}.{name}", getattr(module, name), described.strip()), ""]
        container = nodes.container()
        self.state.nested_parse(StringList([*lines, "````"], source=self.env.docname), self.content_offset, container)
        return container.children


def _directive(full: str, value: object, described: str) -> list[str]:
    name = full.rpartition(".")[2]  # data is of the current module, whatever its name says
    if inspect.ismodule(value):
        return [f".. py:data:: {name}", "", f"   {(value.__doc__ or '').splitlines()[0]}"]
    if inspect.isclass(value):
        return [f".. autoclass:: {full}", "   :members:"]
    if inspect.isroutine(value):
        return [f".. autofunction:: {full}"]
    lines = [f".. py:data:: {name}", "", f"   {described}"]
    if isinstance(value, Mapping):
        lines += ["", "   By name: " + ", ".join(f"``{key}``" for key in value)]
    elif isinstance(value, (str, int, float, tuple, frozenset)):
        lines += ["", f"   ``{value!r}``"]
    return lines


def read_docstring(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """From a docstring of ours to reStructuredText."""
    text = _escaped("\n".join(lines))
    readable = _without_types_in_returns(_literal_blocks(_spaced_lists(text.split("\n"))))
    # Of a property napoleon would take what stands before a colon for its type.
    kind = "method" if what in ("attribute", "property", "data") else what
    settings = Config(napoleon_use_ivar=True, napoleon_numpy_docstring=False)
    fields = GoogleDocstring(readable, settings, app, kind, name, obj, options).lines()
    lines[:] = [_LETTER.sub(r"\1\\\2", line) for line in fields]


def _escaped(text: str) -> str:
    parts = _CODE.split(text)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = _MARKUP.sub(r"\\\1", part)
            continue
        # Markup must not touch a letter: a plural's "s", say.
        if parts[index - 1][-1:].isalnum():
            parts[index] = f"\\ {parts[index]}"
        if parts[index + 1][:1].isalnum():
            parts[index] = f"{parts[index]}\\ "
    return "".join(parts)


def _spaced_lists(lines: list[str]) -> list[str]:
    """Lists set apart from the paragraph above them."""
    spaced: list[str] = []
    for line in lines:
        before = spaced[-1] if spaced else ""
        item = _ITEM.match(line)
        if item and before.strip() and not _ITEM.match(before) and _depth(before) <= _depth(line):
            spaced.append("")
        spaced.append(line.replace("\\* ", "* ", 1) if item else line)
    return spaced


def _literal_blocks(lines: list[str]) -> list[str]:
    """What is indented below a paragraph, a formula or code, shown as it stands."""
    found: list[str] = []
    literal = section = listed = False
    for line in lines:
        if line.strip() and _depth(line) == 0:
            if literal and found[-1].strip():
                found.append("")
            literal, section, listed = False, bool(_SECTION.match(line)), bool(_ITEM.match(line))
        elif line.strip() and not (literal or section or listed) and found:
            while found and not found[-1].strip():
                found.pop()
            found += ["", "::", ""]
            literal = True
        found.append(line.replace("\\*", "*").replace("\\|", "|").replace("\\_", "_") if literal else line)
    return found


def _without_types_in_returns(lines: list[str]) -> list[str]:
    """The signature has the type; what stands before a colon is part of the sentence."""
    found: list[str] = []
    inside = False
    for line in lines:
        if line.strip() in ("Returns:", "Yields:") and _depth(line) == 0:
            inside = True
            found += ["", f":{line.strip().lower()}"]
        elif inside and (not line.strip() or _depth(line) > 0):
            found.append(line)
        else:
            inside = False
            found.append(line)
    return found


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def skip_places(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out the fields of a named tuple that say only where they stand."""
    del app, what, name, skip, options
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def resolve_short(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Node | None:
    """Find a name of ours that is documented elsewhere than where it is said to be, or said to be nowhere."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].removesuffix("()")
    ours = _OURS.match(target) is not None
    wanted = target.rpartition(".")[2] if ours else target
    objects = env.get_domain("py").data["objects"]
    found = sorted(name for name in objects if name == wanted or name.endswith(f".{wanted}"))
    package = str((target if ours else node.get("py:module")) or "").partition(".")[0]
    near = [name for name in found if name.startswith(f"{package}.")]
    chosen = near or found
    if not chosen or (len(chosen) > 1 and not ours):
        return None
    place = objects[chosen[0]]
    return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, content, chosen[0])


def unlink_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Files of the repository that are no pages: named on the site, since there is nothing to lead to."""
    page = Path(app.srcdir, docname)

    def unlink(found: re.Match[str]) -> str:
        inside = (page.parent / found[2]).resolve().is_relative_to(Path(app.srcdir).resolve())
        return found[0] if inside else found[1]

    source[0] = _OUTSIDE.sub(unlink, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("public", Public)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("autodoc-skip-member", skip_places)
    app.connect("missing-reference", resolve_short)
    app.connect("source-read", unlink_outside)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
