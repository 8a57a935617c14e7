"""The notebooks as they are kept: with their outputs. `.ci/run` executes them."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
DOCUMENTS = [*NOTEBOOKS, FOLDER / "GUIDE.md", FOLDER.parent / "README.md"]


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
    assert len(pictures) >= 2
    assert path.stat().st_size < 3_000_000
    said = [o for c in code for o in c["outputs"] if o.get("name") == "stderr"]
    assert not said  # no warning that a reader would wonder about


def text_of(path):
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))


def anchors(path):
    """The names that links to a file's headings have."""
    headings = re.findall(r"^#+ (.+)$", text_of(path), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_it_refers_to_is_there(path):
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text_of(path))
    for target, anchor in links:
        if "://" in target:
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_ci_can_make_it_small(path):
    tagged = [c for c in cells(path, "code") if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and re.search(r"^steps = \d+", "".join(tagged[0]["source"]), re.M)
