import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # Those of the notebook client's own dependencies.
def test_every_cell_runs(path):
    notebook = nbformat.read(path, as_version=4)
    shown = [kinds(cell) for cell in notebook.cells]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=path.parent)
    assert any("image/png" in kinds(cell) for cell in notebook.cells)
    assert [kinds(cell) for cell in notebook.cells] == shown  # The committed outputs are those of this code.


def test_there_are_notebooks():
    assert "losses" in [path.stem for path in NOTEBOOKS]


def kinds(cell):
    """What a cell shows, without the pixels: image types, and text as it is."""
    found = []
    for output in cell.get("outputs", []):
        found += [output.text] if "text" in output else [k for k in output.get("data", {}) if k != "text/plain"]
    return found
