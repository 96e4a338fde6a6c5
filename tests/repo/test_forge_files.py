"""What the forge reads: workflows, licence, citation, and the pages that speak to contributors."""

import ast
import fnmatch
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github"
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((FOLDER / "workflows").glob("*.yml"))}
JOBS = {(file, name): job for file, workflow in WORKFLOWS.items() for name, job in workflow["jobs"].items()}
PACKAGES = ("mhex-core", "mhex-vision", "mhex-text")
PROJECTS = {name: tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text()) for name in PACKAGES}
VERSION = PROJECTS["mhex-core"]["project"]["version"]
CIBUILDWHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
PAGES = ("CONTRIBUTING.md", "SECURITY.md")


def triggers(workflow):
    """YAML 1.1 reads the key `on` as true."""
    return workflow[True]


def sessions_of_noxfile():
    """All sessions, and those of `nox` without a name."""
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    named, default = set(), []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("nox.session" in ast.unparse(one) for one in node.decorator_list):
            named.add(node.name)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "nox.options.sessions":
            default = ast.literal_eval(node.value)
    return named, default


def long_sessions():
    """Those that `nox -s full` calls."""
    (found,) = re.findall(r"^FULL = (\(.*\))$", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    return ast.literal_eval(found)


def commands(job):
    """What a job runs, each value of its matrix in its place: pairs (step, text)."""
    matrix = job.get("strategy", {}).get("matrix", {})
    rows = [{}]
    for key, values in matrix.items():
        rows = [row | {key: str(value)} for row in rows for value in values]
    for row in rows:
        for step in job.get("steps", []):
            text = step.get("run", "")
            for name, value in step.get("env", {}).items():
                for key, chosen in row.items():
                    value = str(value).replace(f"${{{{ matrix.{key} }}}}", chosen)
                text = re.sub(rf'"?\$\{{?{name}\b\}}?"?', value, text)
            yield step, text


def sessions_called(file):
    found = []
    for (of, _), job in JOBS.items():
        for _, text in commands(job) if of == file else ():
            found += re.findall(r"nox -s (\S+)", text)
    return found


def step_that_runs(file, name, start):
    (text,) = [step["run"] for step in JOBS[file, name]["steps"] if step.get("run", "").startswith(start)]
    return text


def shell(script, folder, **environment):
    """Run a script as the forge does."""
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], cwd=folder, env=os.environ | environment, check=False
    )


# ----------------------------------------------------------------------------------------------------------- workflows


def test_there_are_workflows():
    assert set(WORKFLOWS) == {"ci.yml", "docs.yml", "wheels.yml", "release.yml"}


@pytest.mark.parametrize("file", WORKFLOWS)
def test_sessions_that_are_called_exist(file):
    named, _ = sessions_of_noxfile()
    assert set(sessions_called(file)) <= named


def test_every_session_of_the_readme_s_command_and_the_long_ones_run_on_pull_requests():
    named, default = sessions_of_noxfile()
    called = [name for file in ("ci.yml", "docs.yml") for name in sessions_called(file)]
    assert default
    assert {*default, "full"} <= set(called)
    # What is in neither is called by hand: measurements, and the demo.
    assert named - set(default) - set(long_sessions()) == {"full", "bench", "gpu", "demo"}
    assert all("pull_request" in triggers(WORKFLOWS[file]) for file in ("ci.yml", "docs.yml"))


@pytest.mark.parametrize(("file", "name"), JOBS)
def test_a_job_may_do_as_little_as_it_can(file, name):
    assert WORKFLOWS[file]["permissions"] == {}
    job = JOBS[file, name]
    may = job["permissions"]
    written = {key for key, value in may.items() if value == "write"}
    expected = {"publish": {"id-token"}, "announce": {"contents"}, "deploy": {"pages", "id-token"}}
    assert written == expected.get(name, set())
    assert ("timeout-minutes" in job) != ("uses" in job)
    for step in job.get("steps", []):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize(("file", "name"), JOBS)
def test_actions_are_the_forge_s_own_but_for_one_and_pinned(file, name):
    used = [step["uses"] for step in JOBS[file, name].get("steps", []) if "uses" in step]
    lines = (FOLDER / "workflows" / file).read_text().splitlines()
    for action in used:
        owner, _, commit = action.partition("@")
        assert re.fullmatch("[0-9a-f]{40}", commit), action
        assert owner.startswith("actions/") or (owner, file) == ("pypa/gh-action-pypi-publish", "release.yml")
        said = {line.split("#")[1].strip() for line in lines if action in line}
        assert all(re.fullmatch(r"v\d+\.\d+\.\d+", tag) for tag in said), action


def test_one_commit_of_an_action_is_used_everywhere():
    used = {step["uses"] for job in JOBS.values() for step in job.get("steps", []) if "uses" in step}
    assert len({action.partition("@")[0] for action in used}) == len(used)


@pytest.mark.parametrize("file", ["wheels.yml", "release.yml"])
def test_what_makes_a_release_is_pinned(file):
    """But for the packages themselves, installed from the files that were built."""
    pinned = (FOLDER / "requirements-build.txt").read_text()
    for (of, _), job in JOBS.items():
        for _, text in commands(job) if of == file else ():
            for tools in re.findall(r"pip install (.*)", text):
                if "--find-links dist" in tools:
                    continue
                constraint, *names = tools.removeprefix("-c ").split()
                assert (ROOT / constraint).read_text() == pinned
                assert names
                assert all(re.search(rf"^{name}==\d", pinned, re.MULTILINE) for name in names)


@pytest.mark.parametrize(("file", "name"), JOBS)
def test_no_text_of_others_is_put_into_a_script(file, name):
    for step in JOBS[file, name].get("steps", []):
        assert "${{" not in step.get("run", "")


def test_the_data_of_the_maintainers_is_not_asked_for():
    assert all("MHEX_DATA" not in path.read_text() for path in (FOLDER / "workflows").glob("*.yml"))


# -------------------------------------------------------------------------------------------------- wheels and releases


def test_wheels_are_for_the_pythons_that_are_tested():
    tested = JOBS["ci.yml", "tests"]["strategy"]["matrix"]["python"]
    assert PROJECTS["mhex-core"]["project"]["requires-python"] == f">={tested[0]}"
    assert CIBUILDWHEEL["build"] == [f"cp{version.replace('.', '')}-*" for version in tested]


def test_a_wheel_with_kernels_is_insisted_on_and_tried():
    assert CIBUILDWHEEL["environment"]["MHEX_NATIVE"] == "1"
    script = CIBUILDWHEEL["test-command"].removeprefix("python {project}/")
    assert (ROOT / script).is_file()
    for system in ("linux", "macos"):
        command = CIBUILDWHEEL[system]["repair-wheel-command"]
        # torch's own libraries must not be packed.
        assert "{wheel}" in command
        assert "libtorch" in command
        assert "\n" not in command


def test_all_three_are_built_and_published():
    built = JOBS["wheels.yml", "pure"]["strategy"]["matrix"]["distribution"]
    published = JOBS["release.yml", "publish"]["strategy"]["matrix"]["distribution"]
    assert built == published == list(PACKAGES)  # mhex-core first, as the others pin it
    assert JOBS["release.yml", "publish"]["strategy"]["max-parallel"] == 1


def test_what_is_built_is_what_is_published():
    uploaded = {
        name.replace(f"${{{{ matrix.{key} }}}}", value)
        for job in (JOBS["wheels.yml", "kernels"], JOBS["wheels.yml", "pure"])
        for key, values in job["strategy"]["matrix"].items()
        for value in values
        for step in job["steps"]
        if "actions/upload-artifact" in step.get("uses", "")
        for name in [step["with"]["name"]]
    }
    (fetched,) = [
        step["with"]["pattern"]
        for step in JOBS["release.yml", "publish"]["steps"]
        if "actions/download-artifact" in step["uses"]
    ]
    patterns = [fetched.replace("${{ matrix.distribution }}", package) for package in PACKAGES]
    for name in uploaded:
        assert sum(fnmatch.fnmatch(name, pattern) for pattern in patterns) == 1, name
    assert all(any(fnmatch.fnmatch(name, pattern) for name in uploaded) for pattern in patterns)


def test_nothing_is_published_untested():
    assert JOBS["release.yml", "publish"]["environment"]["name"] == "pypi"
    assert set(JOBS["release.yml", "publish"]["needs"]) == {"tests", "build"}
    for name, file in {"tests": "ci.yml", "build": "wheels.yml"}.items():
        assert JOBS["release.yml", name]["uses"] == f"./.github/workflows/{file}"
        assert "workflow_call" in triggers(WORKFLOWS[file])
        assert JOBS["release.yml", name]["needs"] == "version"


@pytest.mark.parametrize(("tag", "right"), [(f"v{VERSION}", True), ("v99.0.0", False), ("v", False)])
def test_a_tag_must_be_the_version(tag, right):
    script = step_that_runs("release.yml", "version", "for name")
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], cwd=ROOT, env=os.environ | {"TAG": tag}, check=False
    )
    assert (done.returncode == 0) == right


def test_the_notes_of_a_release_are_those_of_its_version(tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 1.10.0\n\n- newest\n\n## 1.1.0\n\n- this\n\n## 1.0.0\n\n- old\n"
    )
    script = step_that_runs("release.yml", "announce", "sed")
    subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, env=os.environ | {"TAG": "v1.1.0"}, check=True
    )
    assert (tmp_path / "notes.md").read_text().split() == ["-", "this"]


# ------------------------------------------------------------------------------------------------- licence and citation


@pytest.mark.parametrize("name", PACKAGES)
def test_the_licence_is_there_and_declared(name):
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    # setuptools packs what lies beside the pyproject file.
    assert (ROOT / "packages" / name / "LICENSE").read_text() == text
    assert PROJECTS[name]["project"]["license"] == "Apache-2.0"
    assert PROJECTS[name]["project"]["readme"] == "README.md"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {str(citation["version"])} == {project["project"]["version"] for project in PROJECTS.values()}
    assert citation["license"] == "Apache-2.0"
    assert citation["authors"]
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2501.01311"
    for reference in citation["references"]:
        (identifier,) = reference["identifiers"]
        assert reference["url"].endswith(identifier["value"].removeprefix("arXiv:"))


# ------------------------------------------------------------------------------------------------- pages and templates


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_contributors_are_told_every_default_session():
    _, default = sessions_of_noxfile()
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert [name for name in default if f"`{name}`" not in text] == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.stem)
def test_issue_forms_ask_for_something(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(form)
    identifiers = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert identifiers
    assert len(set(identifiers)) == len(identifiers)
