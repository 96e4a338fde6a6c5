"""The verbs of the repository. Versions and dependencies are declared in the pyproject files, never here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests", "browser", "docs", "native"]
# What `full` runs: other ways to install the same code, which seldom fail where the sessions above pass.
FULL = ("notebooks", "pure", "transformers4", "sdist", "abi")

PYPROJECT = nox.project.load_toml("pyproject.toml")
PACKAGES = ("packages/mhex-core", "packages/mhex-vision[all]", "packages/mhex-text[all]")


ROOT = Path(__file__).parent
SOURCES = {".h", ".inl", ".cpp", ".cu", ".cuh"}
CORE = nox.project.load_toml("packages/mhex-core/pyproject.toml")["project"]
# Small tensors are fastest on one thread, and threads that spin while they wait make a busy machine many times slower.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
ELSEWHERE = ("--ignore=tests/browser", "--ignore=tests/docs")
# Tests of what reaches the compiled code, and of its absence.
WITH_KERNELS = (
    *("tests/core", "tests/native", "tests/repo", "tests/vision/bulk", "tests/text/bulk"),
    *(f"tests/vision/test_{name}.py" for name in ("classifier", "explain", "explaining", "explanation", "cli", "demo")),
    *(f"tests/text/test_{name}.py" for name in ("modeling", "explain", "explanation", "cli", "demo")),
)
CPU_ONLY = {"MHEX_NATIVE": "1", "MHEX_CUDA": "0"}


def groups(*names: str) -> tuple[str, ...]:
    """What the named dependency groups hold."""
    return tuple(nox.project.dependency_groups(PYPROJECT, *names))


def install(session: nox.Session, *names: str, editable: bool = True, native: str = "auto", cuda: str = "0") -> None:
    """Install the three packages and the named dependency groups in one resolution, so that siblings meet.

    CUDA kernels, which take longer to compile than all else, are left to the `native` and `gpu` sessions.
    """
    packages = [part for package in PACKAGES for part in (("-e", package) if editable else (f"./{package}",))]
    session.install(*packages, *groups(*names), env={"MHEX_NATIVE": native, "MHEX_CUDA": cuda})


def run_tests(session: nox.Session, *places: str, marks: str = "not slow", **environment: str) -> None:
    """Run pytest with the arguments given, a file per process; the long tests only where they are asked for."""
    chosen = [] if "-m" in session.posargs else ["-m", marks]
    spread = ["-n", "auto", "--maxprocesses=4", "--dist=loadfile", "--no-loadscope-reorder"]
    session.run("pytest", *spread, *chosen, *session.posargs, *places, env={**ONE_THREAD, **environment})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting (`nox -s lint -- --fix` mends what can be mended)."""
    fix = "--fix" in session.posargs
    session.install(*groups("lint"))
    session.run("ruff", "check", *session.posargs, ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")
    sources = [str(path) for path in sorted(Path("csrc").rglob("*")) if path.suffix in SOURCES]
    session.run("clang-format", *(["-i"] if fix else ["--dry-run", "--Werror"]), *sources)


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "types", native="0")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests (`nox -s tests -- -m slow` runs the long ones), but for those of `browser` and `docs`."""
    install(session, "test")
    run_tests(session, *ELSEWHERE)


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """Run what takes long and seldom fails alone: notebooks, wheels without kernels, old versions, distributions."""
    for name in FULL:
        session.notify(name)


@nox.session
def native(session: nox.Session) -> None:
    """Build the kernels, for CUDA too where there is an nvcc, and insist on them in their tests."""
    session.install("./packages/mhex-core", *groups("test"), env={"MHEX_NATIVE": "1"})
    run_tests(session, "tests/native", MHEX_NATIVE="1")


@nox.session
def pure(session: nox.Session) -> None:
    """Run what kernels have a part in on wheels without compiled code: all of the core, and what explains."""
    install(session, "test", editable=False, native="0")
    run_tests(session, *WITH_KERNELS, "--ignore=tests/core/bulk/test_cluster.py")


@nox.session
def sdist(session: nox.Session) -> None:
    """Build the source distribution, a wheel from it, and use that elsewhere."""
    session.install(*groups("test"))
    folder = Path(session.create_tmp()).resolve()
    for leftover in folder.glob("mhex_core-*"):
        leftover.unlink()
    session.run("python", "-m", "build", "--installer=uv", "--outdir", str(folder), "packages/mhex-core", env=CPU_ONLY)
    (wheel,) = folder.glob("*.whl")
    session.install("--reinstall-package=mhex-core", str(wheel))
    with session.chdir(folder):
        session.run("python", str(ROOT / "tests" / "native" / "parity.py"), env={"MHEX_NATIVE": "1"})


@nox.session
def abi(session: nox.Session) -> None:
    """One CPU wheel on the oldest torch that is supported and on the newest."""
    session.install(*groups("test"))
    folder = Path(session.create_tmp()).resolve()
    for leftover in folder.glob("mhex_core-*"):
        leftover.unlink()
    session.run(
        *("python", "-m", "build", "--wheel", "--installer=uv", "--outdir", str(folder), "packages/mhex-core"),
        env=CPU_ONLY,
    )
    (wheel,) = folder.glob("*.whl")
    for choice in ("lowest-direct", "highest"):
        session.install(
            "--upgrade", "--reinstall-package=mhex-core", f"--resolution={choice}", str(wheel), *CORE["dependencies"]
        )
        with session.chdir(folder):
            session.run("python", str(ROOT / "tests" / "native" / "parity.py"), env={"MHEX_NATIVE": "1"})


@nox.session
def transformers4(session: nox.Session) -> None:
    """Run the tests of texts on the last transformers before version 5."""
    packages = ("./packages/mhex-core", "./packages/mhex-vision", "./packages/mhex-text[all]")
    session.install(*packages, *groups("test"), "transformers<5", env={"MHEX_NATIVE": "0"})
    # It warns of what torch has deprecated since.
    run_tests(session, "tests/text", "-W", "default")


@nox.session
def browser(session: nox.Session) -> None:
    """Open the explorer in a real Chromium: that of MHEX_CHROMIUM, or on PATH, or one that is installed for it."""
    install(session, "browser", "test", native="0")
    chromium = find_chromium(session)
    session.log(f"Chromium: {chromium}")
    run_tests(session, "tests/browser", MHEX_BROWSER="1", MHEX_CHROMIUM=chromium)


def find_chromium(session: nox.Session) -> str:
    """Where there is a Chromium; installs one, as the system's packages or playwright have it, where there is none."""
    found = chromium_here()
    if found:
        return found
    if shutil.which("apt-get") and os.geteuid() == 0:
        session.run("apt-get", "update", "-qq", external=True, success_codes=range(256))
        session.run("apt-get", "install", "-qq", "-y", "chromium", external=True, success_codes=range(256))
        found = chromium_here()
    if not found:
        session.run("playwright", "install", "chromium", success_codes=range(256))
        code = "from playwright.sync_api import sync_playwright as p; print(p().start().chromium.executable_path)"
        found = str(session.run("python", "-c", code, silent=True)).strip()
    if not Path(found).exists():
        session.error("no Chromium was found: put one on PATH, or name it in MHEX_CHROMIUM")
    return found


def chromium_here() -> str | None:
    """The Chromium that MHEX_CHROMIUM names, or the first on PATH."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("MHEX_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@nox.session
def bench(session: nox.Session) -> None:
    """Time the kernels beside their rivals, and explaining beside classifying; on a quiet machine."""
    install(session, "bench", editable=False)
    session.run("python", "benchmarks/bench.py", *session.posargs)
    session.run("python", "benchmarks/tables.py")


@nox.session
def gpu(session: nox.Session) -> None:
    """Build the CUDA kernels, check them and time them, on a machine with a GPU."""
    install(session, "bench", editable=False, native="1", cuda="1")
    session.run("python", "benchmarks/gpu.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into `docs/_build/html`, every warning an error, and run every block of code in it."""
    install(session, "docs", "test")
    build = ("sphinx-build", "-W", "--keep-going", "-n", "-b", "html", "-d", "docs/_build/doctrees")
    session.run(*build, "docs", "docs/_build/html")
    # A page per process, and all of them.
    site = str(ROOT / "docs" / "_build" / "html")
    run_tests(session, "--dist=worksteal", "tests/docs", marks="slow or not slow", MHEX_SITE=site)


@nox.session
def notebooks(session: nox.Session) -> None:
    """Run the notebooks of `examples/notebooks` in a real kernel."""
    install(session, "notebooks", "test")
    run_tests(session, "tests/e2e/test_notebooks.py", marks="slow or not slow")


@nox.session
def demo(session: nox.Session) -> None:
    """Train on the embedded lesions, explain, draw: the main job in one command, without a download."""
    install(session, editable=False)
    session.run("mhex-vision", "demo", *session.posargs)
