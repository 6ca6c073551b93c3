"""What the site makes from the code, and the notebook. `make docs` builds it and refuses a broken link."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from advtune.methods import METHODS

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "harden.ipynb"


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_page(pages, name):
    from dataclasses import fields

    page, kind = pages.method_page(name), METHODS[name]
    number = kind.paper.removeprefix("arXiv:")
    assert f"[arXiv:{number}](https://arxiv.org/abs/{number})" in page or name == "guided"  # our own, no paper's
    for line in (kind.__doc__ or "").splitlines():
        if line.strip().startswith("L = "):
            assert f"```text\n{line.strip()}" in page
    for field in fields(kind):
        mark = " †" if field.metadata.get("reconstructed") else ""
        assert f"| `{field.name}`{mark} | `" in page
    assert pages.source_of(kind) in page
    assert f"class {kind.__name__}:" in page
    assert ("advtune train" in page) == (name != "zero-shot")
    (row,) = [line for line in pages.methods_page().splitlines() if f"[`{name}`]({name}.md)" in line]
    assert row.endswith(". |")  # whole sentences


def test_tables_hold_their_columns(pages):
    """A bar within a cell would make another column."""
    made = [pages.methods_page(), pages.attacks_page(), *(pages.method_page(name) for name in METHODS)]
    rows = [line for page in made for line in page.partition("## Code")[0].splitlines() if line.startswith("|")]
    assert len(rows) > 150
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 4, row


def test_every_attack_stands_on_the_page(pages):
    from advtune.attacks import ATTACKS, TRAINING
    from advtune.edits import TEXTUAL

    headings = re.findall(r"^##+ (\S+)$", pages.attacks_page(), re.MULTILINE)
    assert set(headings) == {*ATTACKS, *TEXTUAL, *TRAINING}


def test_the_api_names_exist(pages):
    import advtune

    for _, _, names in pages.API.values():
        for name in names.split():
            thing = advtune
            for part in name.split("."):
                thing = getattr(thing, part, None) or importlib.import_module(f"{thing.__name__}.{part}")
            assert thing.__doc__, name
    page = pages.api_page(*pages.API["attacks"])
    assert "      members: []\n\n| option | default | what it is |" in page.partition("::: advtune.attacks.PGD")[2]
    assert "| `eps` | `1/255` |" in page and "| `restarts` | `1` |" in page
    listed = set(pages.API["python"][2].split())
    assert listed == set(advtune.__all__) - {"METHODS", "ATTACKS", "__version__"}


def test_links_out_of_the_docs(pages):
    there, here = "https://host/o/r", None
    assert pages.home("src/advtune/methods/capt.py", "harden.md", here) == "methods/capt.md"
    assert pages.home("recipes/rates.py", "log.md", here) == "code/recipes/rates.py.md"
    assert pages.home("recipes/rates.py", "log.md", there) == f"{there}/blob/main/recipes/rates.py"


def test_what_asks_another_machine_is_seen(pages):
    asks = (
        '<script src="https://unpkg.com/x"></script>', "<img alt=x src=//cdn/x.png>", "@import 'https://x/y.css'",
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">', "<link href=https://x/y.css rel=stylesheet>",
        "src: url(https://x/y.woff)",
    )  # fmt: skip
    for text in asks:
        assert pages.REQUEST.search(text), text
    for text in ('<a href="https://arxiv.org/abs/1">x</a>', '<script src="assets/x.js"></script>', "url(data:x)"):
        assert not pages.REQUEST.search(text), text


def test_the_numbers_in_readme_and_reading_are_those_of_the_rows():
    from advtune.report import render
    from advtune.results import read

    rows = read(ROOT / "docs" / "results" / "demo.jsonl")
    readme, reading = (ROOT / "README.md").read_text(), (ROOT / "docs" / "reading.md").read_text()
    lines = [line for line in render(rows, "markdown").splitlines() if line.startswith("|")]
    assert len(lines) == 7
    assert all(line in readme for line in lines)
    for line in reading.splitlines()[2:3]:
        clean, robust = re.findall(r"[\d.]+ % \\\[[\d., ]+\\\]", line)
        assert f"| {clean.replace(' %', '')} | {robust.replace(' %', '')} |" in readme


def test_json_of_every_verb_is_described():
    from advtune.arguments import build

    page = (ROOT / "docs" / "terminal.md").read_text().partition("## For programs")[2].partition("##")[0]
    for name, verb in build().verbs().items():
        row = re.search(rf"^\|.*`{name}[` ].*\|", page, re.MULTILINE)
        inner = verb.verbs().values()  # advtune backbone inspect
        assert bool(row) == any(each.has("--json") for each in (verb, *inner)), name


def test_the_contents_name_every_page():
    contents = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f": {path.name}\n" in contents, path.name


def test_the_notebook_is_kept_with_what_it_printed(pages):
    text = NOTEBOOK.read_text()
    cells = json.loads(text)["cells"]
    assert [cell for cell in cells if cell["cell_type"] == "code" and cell["outputs"]]
    assert not re.search(r"/(?:root|home|tmp|work|Users)/", text)
    assert len(text) < 200_000
    assert all(output["output_type"] != "error" for cell in cells for output in cell.get("outputs", ()))
    made = pages.notebook_pages(NOTEBOOK)
    pictures = [place for place in made if place.endswith(".png")]
    page = made["notebooks/harden.md"]
    assert pictures
    assert all(made[place].startswith(b"\x89PNG") and Path(place).name in page for place in pictures)
    assert "```python\nimport advtune" in page


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(NOTEBOOK, as_version=4)
    before = {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}
    NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    now = {cell.id: cell.outputs for cell in book.cells if cell.cell_type == "code"}
    assert {key: bool(found) for key, found in now.items()} == {key: bool(found) for key, found in before.items()}
    robust = [float(re.search(r"robust +([\d.]+) %", now[key][0]["text"])[1]) for key in ("before", "after")]
    assert robust[1] > robust[0] + 10
