"""What recipes/guided_page.py makes of the search's rows."""

from __future__ import annotations

import guided_page
import pytest

from advtune.results import Row, append
from test_results_page import HALF, MORE, MUCH, made


@pytest.fixture
def search(tmp_path, monkeypatch):
    monkeypatch.setattr(guided_page, "ROWS", tmp_path)

    def make(*rows):
        (tmp_path / "design-space.jsonl").unlink(missing_ok=True)
        for row in rows:
            append(tmp_path / "design-space.jsonl", row)
        return guided_page.search("guide").splitlines()[2:]

    return make


def tried(label, flags, data="cifar10", seed=0, **changes):
    row = made("guided", flags, seed, data=data, run=f"runs/x/{data}/guide-{label}/16shots-seed{seed}-0", **changes)
    return row


def test_a_candidate_is_a_line_and_its_mean_is_of_both_sets(search):
    assert search(
        tried("online-sees-clean", HALF),
        tried("none", HALF),
        tried("none", MUCH, seed=1),
        tried("none", HALF, data="fashion-mnist"),
        tried("none-consistency", MORE),
        tried("none-consistency", HALF, data="fashion-mnist"),
    ) == [
        "| none | 1 to 2 | 65.0 / 65.0 | 50.0 / 50.0 | 57.5 |",
        "| none, consistency | 1 | 60.0 / 60.0 | 50.0 / 50.0 | 55.0 |",
        "| online sees clean | 1 | 50.0 / 50.0 | - | - |",
    ]


def test_rows_of_other_options_do_not_stand_under_a_name(search):
    with pytest.raises(SystemExit, match="guide, none: rows of other options"):
        search(tried("none", HALF), tried("none", HALF, data="fashion-mnist", options={"lam": 2.0}))


def test_rows_taken_replace_those_of_the_same_run(search, tmp_path):
    search(tried("none", HALF), tried("none", HALF, data="fashion-mnist"))
    append(tmp_path / "new" / "a" / "results.jsonl", Row(**vars(tried("none", MUCH))))
    guided_page.take(tmp_path / "new")
    assert guided_page.search("guide").splitlines()[2:] == ["| none | 1 | 80.0 / 80.0 | 50.0 / 50.0 | 65.0 |"]
