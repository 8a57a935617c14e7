"""The notebooks as they are kept: with their outputs. `.ci/run` executes them."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path, kind):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def test_there_are_five():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_as_it_ran_from_top_to_bottom(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert "error" not in kinds
    pictures = [o for c in code for o in c["outputs"] if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    assert path.stat().st_size < 3_000_000
    said = [o for c in code for o in c["outputs"] if o.get("name") == "stderr"]
    assert not said  # no warning that a reader would wonder about


@pytest.mark.parametrize("path", [*NOTEBOOKS, FOLDER / "GUIDE.md"], ids=lambda path: path.name)
def test_what_it_refers_to_is_there(path):
    notebook = path.suffix == ".ipynb"
    text = "\n".join("".join(c["source"]) for c in cells(path, "markdown")) if notebook else None
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text or path.read_text()):
        assert "://" in target or (FOLDER / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_ci_can_make_it_small(path):
    tagged = [c for c in cells(path, "code") if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and re.search(r"^steps = \d+", "".join(tagged[0]["source"]), re.M)
