"""The house rules that a machine can check."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "advtune"
FILES = sorted(SOURCE.rglob("*.py"))


def lines_of(node):
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_sizes_and_docstrings(path):
    text = path.read_text()
    tree = ast.parse(text)
    limit = 110 if path.parent.name == "methods" and path.name != "__init__.py" else 310
    assert text.count("\n") <= limit
    assert ast.get_docstring(tree), "a module says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert lines_of(node) <= 60, f"{node.name} is {lines_of(node)} lines long"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and path.name != "cli.py":
            long = lines_of(node) > 12
            assert not long or ast.get_docstring(node), f"{node.name} has no docstring"


def test_nobody_inherits_from_a_method_or_an_attack():
    for path in [*SOURCE.glob("methods/*.py"), *SOURCE.glob("attacks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert [ast.unparse(b) for b in node.bases] in ([], ["Protocol"]), f"{path.name}: {node.name}"


def test_no_run_of_six_lines_stands_in_two_method_files():
    seen = {}
    for path in SOURCE.glob("methods/*.py"):
        lines = [line.strip() for line in path.read_text().splitlines()]
        lines = [line for line in lines if line and not line.startswith(("from ", "import "))]
        for run in {tuple(lines[i : i + 6]) for i in range(len(lines) - 5)}:
            assert run not in seen, f"{path.name} and {seen.get(run)}: {run[0]}"
            seen[run] = path.name
    assert len(seen) > 300


def test_methods_cite_and_mark():
    from advtune.methods import METHODS
    from advtune.options import describe

    marked = {name: {o["name"] for o in describe(kind) if o["reconstructed"]} for name, kind in METHODS.items()}
    for kind in METHODS.values():
        assert kind.paper in (kind.__doc__ or "")
    assert {"weight", "lam", "prompt_length", "depth", "coupling", "ce", "direction"} <= marked["capt"]
    assert {"teacher", "feedback", "temperature", "ce"} <= marked["apd"]
    assert {name for name, fields in marked.items() if fields} == {"capt", "apd", "apt"}
    assert marked["apt"] == {"ascent"}


def test_no_unsafe_load_and_no_machine_paths():
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    checked, place = 0, ROOT if ROOT.parent == Path("/") else ROOT.parent
    for name in tracked:
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".json", ".jsonl", ".txt", ".sh")
            and path.is_file()
            and path.name != "tokenizer.json"
        ):
            text = path.read_text()
            checked += 1
            assert f"{place}/" not in text, f"{name} holds a path of this machine"
            if path.suffix == ".py" and path != Path(__file__):
                for call in re.findall(r"torch\.load\([^\n]*", text):
                    assert "weights_only=True" in call, name
    assert checked > 30


def test_the_readme_tree_is_true():
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("src/advtune/\n") : readme.index("recipes/  ")]
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:]}
    there = {p.name for p in SOURCE.iterdir() if p.name not in ("__pycache__", "__init__.py", "py.typed")}
    assert listed == there


def test_the_public_names():
    import advtune

    assert set(advtune.__all__) == {
        "ATTACKS", "AutoAttack", "Classifier", "METHODS", "PGD", "Row", "UserError", "VLM", "compare", "evaluate",
        "evaluate_curve", "load", "load_task", "tune", "__version__",
    }  # fmt: skip
    for name in advtune.__all__:
        assert getattr(advtune, name)


def test_the_version_is_one():
    import tomllib

    import advtune

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == advtune.__version__


@pytest.mark.parametrize("page", ["results_page", "which_page", "guided_page", "performance_page", "scale"])
def test_a_page_is_what_its_rows_give(page, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{page}.py", "--check"])
    try:
        importlib.import_module(page).main()
    except SystemExit as ended:
        assert not ended.code, ended.code
