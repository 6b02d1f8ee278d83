"""docs/first_steps.ipynb: what is committed was run from top to bottom, and it runs, here for one epoch."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_steps.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def kinds(cell):
    """What a cell put out: streams by name, pictures and texts by type."""
    return [output.get("name") or sorted(output.get("data", [output.output_type])) for output in cell.outputs]


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def plan_of(notebook):
    """What it says of the network, which is the same however long it is trained."""
    (cell,) = [cell for cell in code_of(notebook) if cell.source == "print(optimizer.plan())"]
    return cell.outputs[0].text


def test_it_runs_and_puts_out_what_is_committed(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("EPOCHS", "1")
    monkeypatch.delenv("CIFAR_10", raising=False)
    committed, plan = [kinds(cell) for cell in code_of(notebook)], plan_of(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert [kinds(cell) for cell in code_of(notebook)] == committed
    assert plan_of(notebook) == plan  # not that of an earlier version
    assert ["image/png", "text/plain"] in [kind for cell in committed for kind in cell]


def test_its_outputs_are_small_and_of_one_run(notebook):
    assert NOTEBOOK.stat().st_size < 150_000
    assert [cell.execution_count for cell in code_of(notebook)] == [*range(1, len(code_of(notebook)) + 1)]
