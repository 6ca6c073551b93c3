"""What recipes/results_page.py makes of rows: the right ones side by side, and no verdict that chance would give."""

from __future__ import annotations

import sys

import pytest
import results_page

from advtune.results import Row, accuracy, append

HALF, MORE, MUCH = "1" * 20 + "0" * 20, "1" * 24 + "0" * 16, "1" * 32 + "0" * 8


def made(method="fap", robust=HALF, seed=0, shots=16, data="dtd", trained="dtd", name="pgd", steps=20, **changes):
    """A row of 40 images; `robust` are also the clean flags."""
    attack = {"name": name, "eps": 1 / 255, "steps": steps, "step_size": 1 / 1020}
    facts = {
        "run": f"runs/{method}", "model": "m" * 64, "method": method, "options": {}, "reconstructed": [],
        "recipe": {"lr": 0.1}, "threat": "white-box", "zero_gradient": None, "stages": [], "checks": [],
        "precision": "fp32", "device": "cpu", "batch_size": 64, "seconds": 1.0, "versions": {}, "notes": [],
        "train": {"name": trained, "shots": shots, "seed": seed, "n": 470, "part": "train", "attack": {"eps": 1 / 255}},
        "backbone": {"name": "some/mini", "sha256": "b" * 64},
        "data": {"name": data, "part": "test", "sha256": "d" * 64, "classes": 4, "resolution": 64, "limit": 40},
        "attack": attack, "clean": accuracy([int(flag) for flag in robust]),
        "robust": accuracy([int(flag) for flag in robust]), "flags": {"clean": robust, "robust": robust},
    }  # fmt: skip
    return Row(**(facts | changes))


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Rows in the place of docs/results, and what one kind of mark makes of them."""
    monkeypatch.setattr(results_page, "ROWS", tmp_path)

    def make(kind, rows):
        (tmp_path / "rows.jsonl").unlink(missing_ok=True)
        for row in rows:
            append(tmp_path / "rows.jsonl", row)
        lines = results_page.KINDS[kind]("rows.jsonl").splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]

    return make


def test_a_ranking_is_told_as_compare_decides(page):
    def verdicts(first, second):
        rows = [made("fap", flags, seed) for seed, flags in enumerate(first)]
        rows += [made("advmaple", flags, seed) for seed, flags in enumerate(second)]
        return [(line[5], line[6].split()[0], line[-1]) for line in page("rankings", rows)[2:]]

    assert verdicts([MUCH], [HALF]) == [("1", "+30.0", "holds")]
    assert verdicts([HALF], [MUCH]) == [("1", "-30.0", "the other way")]
    assert verdicts([MORE], [HALF]) == [("1", "+10.0", "within noise")], "4 against 0: p = 0.125"
    assert verdicts([MUCH, MUCH], [HALF, HALF]) == [("2", "+30.0", "holds")]
    assert verdicts([MUCH, MUCH, HALF], [HALF, HALF, MORE])[0][2] == "within noise", "one seed points the other way"


def test_a_ranking_is_of_rows_that_belong_together(page):
    pair = [made("fap", MUCH), made("advmaple", HALF)]
    assert page("rankings", pair)[2][:5] == ["fap", "fap > advmaple", "16 shots", "+1.6", "dtd, mini, pgd-20, n 40"]
    for change in ({"shots": 8}, {"trained": "imagenet"}, {"name": "autoattack"}, {"data": "pcam"}):
        assert len(page("rankings", [pair[0], made("advmaple", HALF, **change)])) == 2, change
    val = made("fap").data | {"part": "val"}
    assert len(page("rankings", [made("fap", MUCH, data="dtd") for _ in "1"] + [made("advmaple", HALF)])) == 3
    assert len(page("rankings", [Row(**{**vars(row), "data": val}) for row in pair])) == 2, "not on test images"
    away = [
        made(method, flags, shots=None, trained="tinyimagenet")
        for method, flags in (("pmg-aft", MUCH), ("tecoa", HALF))
    ]
    assert [line[0] for line in page("rankings", away)[2:]] == ["pmg-aft", "tga-zsr"], "two papers say so"
    with pytest.raises(SystemExit, match="attacked in several ways"):
        page("rankings", [*pair, *(made(row.method, row.flags["robust"], steps=50) for row in pair)])


def test_tables_by_shots_with_zero_shot_in_each(page):
    zero = Row(**{**vars(made("zero-shot", HALF)), "train": None})
    few = [
        zero,
        made("fap", MUCH, shots=1),
        made("fap", MORE),
        made("fap", MUCH, seed=1),
        made("fap", MUCH, name="fgsm", steps=None),
    ]
    lines = page("table", few)
    heads = [line[0] for line in lines if line[0].startswith("**")]
    assert heads == [f"**dtd**, tuned on {shots}, mini, n = 40" for shots in ("1 shot", "16 shots")]
    assert [line[0] for line in lines].count("zero-shot") == 2
    assert ["fap", "2", "70.0 ± 14.1", "70.0 ± 14.1", "80.0 \\[65.2, 89.5\\] (1 seed)"] in lines
    assert page("table", [zero])[0] == ["**dtd**, tuned on nothing, mini, n = 40"]


def test_base_and_new_classes_stand_in_one_line(page):
    halves = [made("fap", flags, data="dtd") for flags in (MUCH, HALF)]
    rows = [
        Row(**{**vars(row), "data": row.data | {"subset": subset, "sha256": subset * 16}})
        for row, subset in zip(halves, ("base", "new"), strict=True)
    ]
    assert page("halves", rows)[2] == ["dtd", "fap", "0", "80.0", "50.0", "61.5", "80.0", "50.0", "61.5"]


def test_rows_taken_replace_what_was_made_before_with_other_settings(tmp_path, monkeypatch):
    rows, study = tmp_path / "rows", tmp_path / "few"
    rows.mkdir()
    (tmp_path / "page.md").write_text("text\n<!-- table few.jsonl -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(results_page, "ROWS", rows)
    monkeypatch.setattr(results_page, "PAGE", tmp_path / "page.md")
    append(rows / "few.jsonl", made("fap", HALF))
    append(rows / "few.jsonl", made("fap", HALF, seed=1))
    append(study / "run" / "results.jsonl", made("fap", MUCH, recipe={"lr": 0.3}))
    append(study / "run" / "results.jsonl", made("fap", MUCH, seed=1, recipe={"lr": 0.3}))
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--take", str(study)])
    results_page.main()
    assert "| fap | 2 | 80.0 ± 0.0 | 80.0 ± 0.0 |" in (tmp_path / "page.md").read_text()
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--check"])
    results_page.main()
    (tmp_path / "page.md").write_text((tmp_path / "page.md").read_text().replace("80.0", "81.0"))
    with pytest.raises(SystemExit, match="is not what the rows give"):
        results_page.main()


def test_a_curve_has_a_picture_that_a_check_does_not_draw(tmp_path, monkeypatch):
    rows = [made("fap", flags, name="pgd") for flags in (MUCH, HALF)]
    rows[1] = Row(**{**vars(rows[1]), "attack": rows[1].attack | {"eps": 2 / 255, "step_size": 1 / 510}})
    for row in rows:
        append(tmp_path / "curve.jsonl", row)
    (tmp_path / "page.md").write_text("<!-- curve curve.jsonl -->\n<!-- end -->\n")
    for name, value in (("ROWS", tmp_path), ("PICTURES", tmp_path / "assets"), ("PAGE", tmp_path / "page.md")):
        monkeypatch.setattr(results_page, name, value)
    (tmp_path / "assets").mkdir()
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--check"])
    with pytest.raises(SystemExit, match=r"curve.svg is not there"):
        results_page.main()
    monkeypatch.setattr(sys, "argv", ["results_page.py"])
    results_page.main()
    assert (tmp_path / "assets" / "curve.svg").read_bytes().startswith(b"<?xml")
    assert "![Robust accuracy over eps](assets/curve.svg)" in (tmp_path / "page.md").read_text()
