"""What recipes/guided_page.py makes of the search's rows."""

from __future__ import annotations

import design_space
import guided_page
import pytest

from advtune.results import Row, append
from test_results_page import HALF, MORE, MUCH, made


@pytest.fixture
def search(tmp_path, monkeypatch):
    monkeypatch.setattr(guided_page, "ROWS", tmp_path)

    def make(*rows, stage="guide"):
        (tmp_path / "design-space.jsonl").unlink(missing_ok=True)
        for row in rows:
            append(tmp_path / "design-space.jsonl", row)
        table = guided_page.search(stage) if stage else guided_page.others()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]

    return make


def tried(label, flags, data="cifar10", seed=0, stage="guide", out="runs/x", **options):
    """A row of the run that a stage has for a candidate, or, with options, of one that it has no more."""
    known = {**design_space.STAGES[stage]()[label], **options}
    key = design_space.run(stage, label, known, data, seed).key
    row = made("guided", flags, seed, data=data, run=f"{out}/{key}", options={"guide": "none"})
    row.data.update(part="val", subset="all")
    row.train["part"] = "fit"
    return row


def test_a_candidate_is_a_line_beside_the_reference(search):
    pair = [tried("none, consistency", HALF, name) for name in design_space.DATA]
    lines = search(*pair, tried("none", MORE), tried("none", HALF, "fashion-mnist"), tried("online sees clean", MUCH))
    assert [line[:-1] for line in lines] == [
        ["none", "1", "60.0 / 60.0", "50.0 / 50.0", "55.0"],
        ["none, consistency", "1", "50.0 / 50.0", "50.0 / 50.0", "50.0"],
        ["online sees clean", "1", "80.0 / 80.0", "-", "-"],
    ]
    assert lines[0][-1] == "+5.0 \\[1.2, 10.0\\]", "4 of 40 images of one set of two"
    assert [line[-1] for line in lines[1:]] == ["+0.0 \\[0.0, 0.0\\]", "-"]


def test_seeds_are_averaged_and_held_beside_the_same_seeds(search):
    rows = [tried("none, consistency", HALF, name, seed) for name in design_space.DATA for seed in (0, 1)]
    rows += [tried("none", flags, name, seed) for name in design_space.DATA for seed, flags in ((0, HALF), (1, MUCH))]
    assert search(*rows)[0][:5] == ["none", "2", "65.0 / 65.0", "65.0 / 65.0", "65.0"]
    assert search(*rows)[0][5].startswith("+15.0 \\[0.0, "), "both seeds of seed 0 may be drawn"
    assert search(*rows[:-1])[0][1:2] + search(*rows[:-1])[0][4:] == ["1 to 2", "-", "-"]


def test_a_stage_of_its_own_sets_has_no_reference(search):
    assert search(tried("capt", HALF, stage="baselines"), stage="baselines") == [["capt", "1", "50.0 / 50.0", "-", "-"]]


def test_halves_of_the_classes_stand_beside_each_other_and_the_untuned_model(search):
    label = "low-rank lr=0.001, plain"

    def halves(label, seed, *both):
        rows = [tried(label, flags, "tinyimagenet", seed, stage="transfer") for flags in both]
        for row, half in zip(rows, ("base", "new"), strict=True):
            row.data["subset"] = half
        return rows

    tuned = halves(label, 0, HALF, MUCH)
    assert search(*tuned, stage="transfer") == [[label, "1", "50.0 / 50.0", "80.0 / 80.0", "80.0", "-"]]
    untuned = [Row(**{**vars(row), "train": None, "run": ""}) for row in halves("zero-shot", 0, MUCH, HALF)]
    first, last = search(*untuned, *tuned, *halves(label, 1, HALF, HALF), stage="transfer")
    assert first == ["zero-shot", "1", "80.0 / 80.0", "50.0 / 50.0", "50.0", "+0.0 \\[0.0, 0.0\\]"]
    assert last[1:5] == ["2", "50.0 / 50.0", "65.0 / 65.0", "65.0"]
    assert last[5].startswith("+15.0 "), "what decides is the classes not tuned on, for every seed"
    assert search(*untuned, stage="") == []
    tuned[1].data["subset"] = "all"
    assert search(*tuned, stage="transfer") == [[label, "1", "50.0 / 50.0", "-", "-", "-"]]


def test_runs_of_other_options_are_no_candidates(search):
    now, before = tried("none", HALF), tried("none", MUCH, lam=3.0)
    assert search(now, before) == [["none", "1", "50.0 / 50.0", "-", "-", "-"]]
    assert search(now, before, stage="") == [["guide-none", "cifar10", "80.0 / 80.0", "guide=none"]]


def test_images_that_are_not_to_choose_on_are_refused(search):
    for side in ("data", "train"):
        row = tried("none", HALF)
        getattr(row, side)["part"] = "test"
        with pytest.raises(SystemExit, match="no business with"):
            search(row)


def test_rows_taken_replace_those_of_the_same_run_in_whatever_folder(search, tmp_path):
    search(tried("none", HALF), tried("none", HALF, "fashion-mnist"))
    append(tmp_path / "new" / "results.jsonl", Row(**vars(tried("none", MUCH, out="elsewhere/y"))))
    guided_page.take(tmp_path / "new")
    assert guided_page.search("guide").splitlines()[2] == "| none | 1 | 80.0 / 80.0 | 50.0 / 50.0 | 65.0 | - |"
