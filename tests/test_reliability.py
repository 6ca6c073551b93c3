"""docs/reliability.md names tests that are there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text()


def known():
    """Every test by name -> whether it is slow."""
    found = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text())
        whole = any(isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node) for node in tree.body)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = whole or any("mark.slow" in ast.unparse(each) for each in node.decorator_list)
    return found


def test_every_promise_names_tests_that_exist():
    there, rows = known(), [line for line in PAGE.splitlines() if re.match(r"\| (?!promise )", line)]
    assert len(rows) > 15
    for row in rows:
        promise, _, last = re.split(r"(?<!\\) \| ", row.strip("| "))
        named = re.findall(r"`(test_\w+)`( \(slow\))?", last)
        assert named, promise
        for name, slow in named:
            assert name in there, f"{promise}: no test {name}"
            assert bool(slow) == there[name], f"{name}: (slow) is said wrongly"


def test_every_test_of_faults_keeps_a_promise():
    for file in ("test_faults.py", "test_kills.py"):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert f"`{node.name}`" in PAGE, node.name
