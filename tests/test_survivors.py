"""What recipes/survivors.py counts: images of one model that stand PGD and fall to AutoAttack."""

from __future__ import annotations

import pytest
from survivors import survivors

from advtune.results import Row, accuracy
from test_results_page import HALF, MORE, MUCH, made

CLEAN = "1" * 36 + "0" * 4


def under(name, robust, method="fap", seed=0, n=40, eps=1, **changes):
    clean = CLEAN[:n]
    row = made(method, robust[:n], seed, name=name, model=f"{method}{seed}", **changes)
    data = row.data | {"sha256": f"first {n}"}
    attack = row.attack | {"eps": eps / 255} | ({"steps": None} if name == "autoattack" else {})
    flags = {"clean": clean, "robust": robust[:n]}
    counts = accuracy(map(int, clean))
    return Row(**{**vars(row), "flags": flags, "clean": counts, "data": data, "attack": attack})


def lines(*rows):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in survivors(rows).splitlines() if line]
    return [line for line in cells if line[0] not in ("---", "Method")]


def test_a_line_a_method_and_the_sum_of_what_was_tuned():
    zero = [under("pgd", HALF, "zero-shot", train=None), under("autoattack", HALF, "zero-shot", train=None)]
    rows = [under("pgd", MORE), under("autoattack", HALF[:-1] + "1"), under("pgd", MUCH, "tecoa"), *zero]
    one = ["1", "90.0", "60.0", "52.5 \\[37.5, 67.1\\]", "4 of 24"]
    assert lines(*rows) == [
        ["**dtd**, 1/255, n = 40"],
        ["zero-shot", "-", "1", "90.0", "50.0", "50.0 \\[35.2, 64.8\\]", "0 of 20"],
        ["fap", "16", *one],
        ["all tuned", "", *one],
    ], "an image that stands AutoAttack alone is no survivor that fell"
    more = [under("pgd", MUCH, seed=1), under("autoattack", MUCH, seed=1), under("autoattack", MORE, "tecoa")]
    assert [line[:3] + line[5:] for line in lines(*rows, *more)[2:]] == [
        ["tecoa", "16", "1", "60.0 \\[44.6, 73.7\\]", "8 of 32"],
        ["fap", "16", "2", "66.2", "4 of 56"],
        ["all tuned", "", "3", "64.2", "12 of 88"],
    ]


def test_autoattack_on_the_first_images_meets_pgd_there():
    assert lines(under("pgd", MUCH), under("autoattack", HALF, n=30)) == [
        ["**dtd**, 1/255, n = 30"],
        ["fap", "16", "1", "100.0", "100.0", "66.7 \\[48.8, 80.8\\]", "10 of 30"],
        ["all tuned", "", "1", "100.0", "100.0", "66.7 \\[48.8, 80.8\\]", "10 of 30"],
    ]


def test_eps_and_shots_are_apart():
    rows = [under(name, HALF, eps=eps) for name in ("pgd", "autoattack") for eps in (1, 4)]
    rows += [under(name, HALF, seed=5, shots=4) for name in ("pgd", "autoattack")]
    assert [line[:3] for line in lines(*rows)] == [
        ["**dtd**, 1/255, n = 40"], ["fap", "16", "1"], ["fap", "4", "1"], ["all tuned", "", "2"],
        ["**dtd**, 4/255, n = 40"], ["fap", "16", "1"], ["all tuned", "", "1"],
    ]  # fmt: skip


def test_what_cannot_be_laid_side_by_side():
    pgd, auto = under("pgd", MORE), under("autoattack", HALF)
    with pytest.raises(SystemExit, match="no model has rows of both"):
        survivors([pgd, under("autoattack", HALF, seed=1)])
    with pytest.raises(SystemExit, match="two rows under one attack"):
        survivors([pgd, pgd, auto])
    for change in ({"data": auto.data | {"sha256": "other"}}, {"flags": auto.flags | {"clean": CLEAN[::-1]}}):
        with pytest.raises(SystemExit, match="not of the same images"):
            survivors([pgd, Row(**{**vars(auto), **change})])
    with pytest.raises(SystemExit, match="not of the same images"):
        survivors([Row(**{**vars(pgd), "data": pgd.data | {"skipped": ["a"]}}), under("autoattack", HALF, n=30)])
