"""What a command line says in one text: a name with options, a list of names, a function of the user's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Value = int | float | bool | str
Method = TypeVar("Method")


def read_value(text: str) -> Value:
    """A number, true or false, or the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_spec(spec: str, *, known: Collection[str], textual: Collection[str] = ()) -> tuple[str, dict[str, Value]]:
    """Take "name:option=value,option=value" apart. Whether the name takes such options is the caller's to check.

    Args:
        spec: The text.
        known: The names that there are. What follows the colon of another name without an equals sign is no option:
            "module:function" is a name as a whole.
        textual: Options that are never read as a number: a layer may be called 4, or 1.10.

    Returns:
        The name, and its options, read by `read_value`.

    Raises:
        TypeError: The text is none.
        ValueError: It cannot be read.
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a string, got {type(spec).__name__}")
    name, colon, rest = spec.strip().partition(":")
    if not colon or (name not in known and "=" not in rest):
        return spec.strip(), {}
    options: dict[str, Value] = {}
    for part in rest.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"spec must be name:option=value,option=value, got {spec!r}")
        if key in options:
            raise ValueError(f"spec must give each option once, got {key} twice in {spec!r}")
        options[key] = value if key in textual else read_value(value)
    return name, options


def check_options(name: str, options: Collection[str], known: Collection[str]) -> None:
    """Answer an unknown option with the list of those there are.

    Raises:
        ValueError: An option is not among `known`.
    """
    unknown = [option for option in options if option not in known]
    if unknown:
        listed_options = ", ".join(known) if known else "none"
        raise ValueError(f"options of {name} must be among: {listed_options}; got {', '.join(unknown)}")


def look_here(names: Iterable[str]) -> None:
    """Have a command find the functions that its user wrote: whoever types "module:function" means the current folder.

    The folder comes last, so that what lies there takes no installed module's place, and only for such a name: beside
    the images there may be somebody else's `timm.py`.
    """
    here = str(Path.cwd())
    if here not in sys.path and any(":" in name and "=" not in name for name in names):
        sys.path.append(here)


def import_function(name: str) -> Callable[..., Any]:
    """Import "module:function".

    Raises:
        TypeError: It is no function.
        ValueError: There is no such module or function.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise ValueError(f"name must be a known explainer or 'module:function', got {name!r}")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"name must be a 'module:function' that can be imported, got {name!r}: {error}") from error
    if not callable(found):
        raise TypeError(f"name must name a function, got {name!r}, which is of type {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def methods_by_name(methods: Sequence[str] | Mapping[str, Method], parse: Callable[[str], Method]) -> dict[str, Method]:
    """The methods of a comparison.

    Args:
        methods: Texts that say what they are, or methods by name.
        parse: What makes a method of a text.

    Raises:
        TypeError: They are one text.
        ValueError: One comes twice, there is none, or `parse` does not know it.
    """
    if isinstance(methods, str):
        raise TypeError(f"methods must be a sequence of names, got the text {methods!r}")
    if isinstance(methods, Mapping):
        found = dict(methods)
    else:
        found = {name: parse(name) for name in methods}
        if len(found) != len(methods):
            raise ValueError(f"methods must be each once, got {', '.join(methods)}")
    if not found:
        raise ValueError("methods must be at least one, got none")
    return found


def listed(text: str) -> list[str]:
    """Names separated by commas; so are the options of one, which a part with "=" and no name of its own belongs to."""
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if names and ":" in names[-1] and "=" in part and ":" not in part.partition("=")[0]:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return names
