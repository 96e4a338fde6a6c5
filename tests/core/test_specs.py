"""Texts of a command line: names with options, lists, functions of the user's own."""

import math
import sys

import pytest

from mhex_core.specs import (
    check_options,
    import_function,
    listed,
    look_here,
    methods_by_name,
    parse_spec,
    read_value,
)

KNOWN = ("random", "shap", "gradcam")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-2", -2),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("soft", "soft"),
        ("3.1.4", "3.1.4"),
        ("", ""),
    ],
)
def test_values_are_read_as_what_they_look_like(text, value):
    found = read_value(text)
    assert found == value
    assert type(found) is type(value)


def test_infinity_is_a_number_like_any_other():
    assert read_value("inf") == math.inf


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("random", "random", {}),
        ("  random  ", "random", {}),
        ("random:seed=3", "random", {"seed": 3}),
        (" shap:evaluations=200, blur = 8 ", "shap", {"evaluations": 200, "blur": 8}),
        ("gradcam:layer=1.10", "gradcam", {"layer": "1.10"}),
        ("my.module:function", "my.module:function", {}),
        ("nobody", "nobody", {}),
        ("nobody:seed=3", "nobody", {"seed": 3}),
        ("shap:mask=a=b", "shap", {"mask": "a=b"}),
    ],
)
def test_a_spec_is_a_name_and_its_options(spec, name, options):
    assert parse_spec(spec, known=KNOWN, textual=("layer",)) == (name, options)


@pytest.mark.parametrize("spec", ["random:", "random:seed", "random:=3", "random:seed=", "random:seed=1,", "x:a=1,b"])
def test_a_spec_that_cannot_be_read(spec):
    with pytest.raises(ValueError, match="spec must be name:option=value,option=value, got"):
        parse_spec(spec, known=KNOWN)


def test_a_spec_says_each_option_once_and_is_a_text():
    with pytest.raises(ValueError, match="got seed twice in 'random:seed=1,seed=2'"):
        parse_spec("random:seed=1,seed=2", known=KNOWN)
    with pytest.raises(TypeError, match="spec must be a string, got NoneType"):
        parse_spec(None, known=KNOWN)


def test_unknown_options_are_answered_with_the_known_ones():
    check_options("random", {"seed": 3}, ["seed"])
    check_options("random", (), ())
    with pytest.raises(ValueError, match="options of shap must be among: steps, blur; got step, bluer"):
        check_options("shap", {"step": 1, "blur": 2, "bluer": 3}, ("steps", "blur"))
    with pytest.raises(ValueError, match="options of mine must be among: none; got seed"):
        check_options("mine", ["seed"], ())


@pytest.fixture
def module(tmp_path, monkeypatch):
    code = "number = 3\ndef double(x): return 2 * x\nclass Group:\n    @staticmethod\n    def half(x): return x / 2\n"
    (tmp_path / "my_functions.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_functions"
    sys.modules.pop("my_functions", None)


def test_functions_are_imported(module):
    assert import_function(f"{module}:double")(4) == 8
    assert import_function(f"{module}:Group.half")(4) == 2


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere:f", ValueError, "'module:function' that can be imported, got 'nowhere:f'"),
        ("my_functions:absent", ValueError, "got 'my_functions:absent'"),
        (
            "my_functions:number",
            TypeError,
            "name must name a function, got 'my_functions:number', which is of type int",
        ),
        (":f", ValueError, "or 'module:function', got ':f'"),
        ("my_functions:", ValueError, "or 'module:function'"),
        (".my_functions:f", ValueError, "or 'module:function'"),
        ("a:b:c", ValueError, "or 'module:function'"),
        (3, TypeError, "name must be a string, got int"),
    ],
)
def test_what_is_no_function(module, name, error, message):
    with pytest.raises(error, match=message):
        import_function(name)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("a", ["a"]),
        (" a, b ,", ["a", "b"]),
        ("a:x=1,y=2,b", ["a:x=1,y=2", "b"]),
        ("a:x=1,b:y=2,z=3", ["a:x=1", "b:y=2,z=3"]),
        ("module:function,a", ["module:function", "a"]),
        ("a,x=1", ["a", "x=1"]),
    ],
)
def test_lists_keep_options_with_their_names(text, names):
    assert listed(text) == names


def test_methods_come_by_name():
    assert methods_by_name(["a", "b"], str.upper) == {"a": "A", "b": "B"}
    assert methods_by_name({"mine": 3}, int) == {"mine": 3}
    for methods, error, message in (
        ("a", TypeError, "methods must be a sequence of names, got the text 'a'"),
        (["a", "a"], ValueError, "methods must be each once, got a, a"),
        ([], ValueError, "methods must be at least one, got none"),
        ({}, ValueError, "methods must be at least one, got none"),
    ):
        with pytest.raises(error, match=message):
            methods_by_name(methods, str.upper)


@pytest.fixture
def beside_images(tmp_path, monkeypatch):
    """A current folder with modules in it, of which two are called as installed ones are."""
    for name in ("numpy", "timm", "own_of_the_user"):
        (tmp_path / f"{name}.py").write_text("def double(value):\n    return 2 * value\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(tmp_path)


@pytest.mark.parametrize("names", [[], ["mhex"], ["mhex:beta=0.5", "gradcam:layer=layer3.1"]], ids=str)
def test_the_current_folder_stays_out_of_the_import_path(beside_images, names):
    look_here(names)
    assert beside_images not in sys.path


def test_it_comes_last_for_a_function_that_was_named(beside_images):
    before = list(sys.path)
    look_here(["mhex", "own_of_the_user:double"])
    look_here(["timm:double"])
    assert sys.path == [*before, beside_images]
    assert import_function("own_of_the_user:double")(4) == 8
    with pytest.raises(ValueError, match="can be imported"):
        import_function("numpy:of_no_such_name")  # the installed one
