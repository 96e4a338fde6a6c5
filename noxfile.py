"""The verbs of the repository. Versions and dependencies are declared in the pyproject files, never here."""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PACKAGES = ("packages/mhex-core", "packages/mhex-vision[all]", "packages/mhex-text")


def install(session: nox.Session, *groups: str, editable: bool = True) -> None:
    """Install the three packages and the named dependency groups in one resolution, so that siblings meet."""
    packages = [part for package in PACKAGES for part in (("-e", package) if editable else (f"./{package}",))]
    session.install(*packages, *nox.project.dependency_groups(PYPROJECT, *groups))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting (`nox -s lint -- --fix` mends what can be mended)."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", *session.posargs, ".")
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]), ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "types")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests (`nox -s tests -- -m slow` runs the long ones)."""
    install(session, "test")
    selection = session.posargs if "-m" in session.posargs else ["-m", "not slow", *session.posargs]
    session.run("pytest", *selection)


@nox.session
def demo(session: nox.Session) -> None:
    """Train on the embedded lesions, explain, draw: the main job in one command, without a download."""
    install(session, editable=False)
    session.run("mhex-vision", "demo", *session.posargs)
