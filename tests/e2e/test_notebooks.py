"""The notebooks: run from top to bottom in a kernel of their own, and kept without what they once showed."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
LIMIT = 500  # seconds of a cell


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["core", "text", "vision"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_keeps_nothing_of_a_run(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
            compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.from_dict(notebook))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_something(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    # The notebook's kernel is to be this Python, whatever kernels a user has; and nothing is asked of the network.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    kinds = [kind for shown in outputs.values() for output in shown for kind in output.get("data", {})]
    assert "text/html" in kinds
    assert {"image/png", "image/svg+xml"} & set(kinds)
    errors = [output.text for shown in outputs.values() for output in shown if output.get("name") == "stderr"]
    # Without ipywidgets, which nothing here needs, tqdm speaks of its bars.
    assert [text for text in errors if "TqdmWarning: IProgress not found" not in text] == []
    # What is written goes into a folder that the notebook takes away again.
    assert list(tmp_path.iterdir()) == []
