"""The repository keeps its own promises: one version, one place for dependencies, a README that works, lean imports."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mhex-core", "mhex-vision", "mhex-text")
PROJECTS = {name: tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text()) for name in PACKAGES}


def test_the_three_packages_share_one_version_and_pin_each_other():
    versions = {PROJECTS[name]["project"]["version"] for name in PACKAGES}
    assert len(versions) == 1
    pin = f"mhex-core=={versions.pop()}"
    for name in PACKAGES[1:]:
        assert pin in PROJECTS[name]["project"]["dependencies"]


def test_the_changelog_names_the_version():
    assert f"## {PROJECTS['mhex-core']['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("mhex_core", ["torchvision", "transformers", "timm", "matplotlib", "PIL", "mhex_vision", "mhex_text"]),
        ("mhex_vision", ["mhex_text", "timm", "medmnist", "matplotlib.pyplot", "transformers", "ray", "datasets"]),
        ("mhex_text", ["mhex_vision", "torchvision", "matplotlib", "datasets", "accelerate"]),
        ("mhex_vision.cli", ["timm", "medmnist", "matplotlib"]),
    ],
)
def test_a_package_imports_only_what_it_may(python, module, forbidden):
    done = python.run("-c", f"import sys, {module}; print([name for name in {forbidden} if name in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_core_depends_on_torch_and_numpy_alone():
    names = {re.split(r"[<>=~! ]", line)[0] for line in PROJECTS["mhex-core"]["project"]["dependencies"]}
    assert names == {"torch", "numpy"}


def test_no_dependency_is_spelled_in_the_noxfile():
    text = (ROOT / "noxfile.py").read_text()
    assert not re.search(r"""["'](torch|pytest|ruff|mypy|numpy)\b""", re.sub(r"session\.run\(.*", "", text))


def test_ci_runs_exactly_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(python -m pip install .*)$", readme, flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].split("#")[0].rstrip().endswith("nox -s demo")
    assert commands[1].split("#")[0].strip() in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_carries_its_types_and_nothing_else_than_the_package(name, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT / "packages" / name],
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "MHEX_NATIVE": "0"},  # kernels want an isolated environment: `nox -s sdist`
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    module = name.replace("-", "_")
    assert f"{module}/py.typed" in names
    assert all(entry.startswith((f"{module}/", f"{module}-")) for entry in names)


def test_nothing_in_the_tree_is_a_path_of_one_machine():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(work|tmp|root|home)/[A-Za-z]")
    for name in done.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".yml") and path.is_file() and path != Path(__file__):
            assert not pattern.search(path.read_text(encoding="utf-8")), name


def test_the_tables_of_the_readme_are_those_of_the_results(python):
    done = python.run(ROOT / "benchmarks" / "tables.py", "--check")
    assert done.returncode == 0, done.stderr
