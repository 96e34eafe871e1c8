"""docs/tour.ipynb runs from top to bottom, shows what it ran, and defines nothing that model.py has."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOUR = json.loads((ROOT / "docs/tour.ipynb").read_text())
CELLS = [cell for cell in TOUR["cells"] if cell["cell_type"] == "code"]
CODE = "\n".join("".join(cell["source"]) for cell in CELLS)


def defined(code):
    return {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_the_tour_is_committed_with_the_outputs_of_one_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5


def test_the_outputs_of_the_tour_name_no_folder_of_the_machine_that_ran_it():
    assert str(Path.home()) not in json.dumps(TOUR) and "site-packages" not in json.dumps(TOUR)


def test_the_tour_defines_nothing_that_model_and_support_have():
    taken = set.union(*(defined(path.read_text()) for path in [ROOT / "model.py", *(ROOT / "support").glob("*.py")]))
    assert "import model" in CODE and defined(CODE) & (taken - {"run"}) == set()  # run: closures of theirs


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    for name in [*(path.name for path in ROOT.glob("*.py")), "support", "experiments", "config"]:
        (tmp_path / name).symlink_to(ROOT / name)                                 # its data and runs stay in tmp_path
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    tour = nbformat.from_dict(TOUR)
    for cell in tour.cells:
        source = re.sub(r"^STEPS = \d+$", "STEPS = 3", "".join(cell.source), flags=re.MULTILINE)
        cell.source = re.sub(r"^lengths = .*$", "lengths = [64, 1024]", source, flags=re.MULTILINE)
    for short in ("STEPS = 3\n", "lengths = [64, 1024]\n"):
        assert any(short in cell.source for cell in tour.cells)
    nbclient.NotebookClient(tour, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    assert (tmp_path / "out/tour/ckpt.pt").exists()
