"""What recipes/claims.py says of ours and a rival: the right rows side by side, and no claim that chance would give."""

from __future__ import annotations

import claims
import numpy as np
import pytest

from advtune.results import Row, accuracy
from test_results_page import made

FEW, HALF, MORE = "1" * 10 + "0" * 30, "1" * 20 + "0" * 20, "1" * 30 + "0" * 10


def rows(method, robust, clean=HALF, name="pgd", seeds=(0, 1), data="dtd", n=40, shots=16):
    found = []
    for seed in seeds:
        row = made(method, robust[:n], seed, shots, data, data, name)
        flags = {"clean": clean[:n], "robust": robust[:n]}
        found.append(Row(**{**vars(row), "flags": flags, "clean": accuracy(map(int, clean[:n]))}))
    return found


def lines(*found):
    text = claims.claim([row for each in found for row in each], "guided", ["fap", "capt"])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_a_claim_is_won_by_two_points_at_no_less_of_the_other():
    def said(robust, clean):
        return lines(rows("guided", *robust), rows("fap", HALF, HALF), rows("guided", *robust, seeds=[9]))[0]

    assert said([MORE], HALF)[-1] == "won: robust"
    assert said([MORE], HALF)[5:7] == ["75.0 / 50.0", "+25.0 \\[12.5, 40.0\\]"]
    assert said([HALF, MORE], HALF)[-1] == "won: clean"
    assert said([HALF], HALF)[-1] == "not won", "level"
    assert said([MORE, FEW], HALF)[-1] == "not won", "25 points less clean"
    assert said([HALF[:-20] + "1" + "0" * 19], HALF)[-1] == "not won", "one image of forty: chance"


def test_every_seed_has_to_point_the_same_way():
    mixed = [*rows("guided", "1" * 40, seeds=[0, 1]), *rows("guided", FEW, seeds=[2])]
    assert lines(mixed, rows("fap", HALF, seeds=[0, 1, 2]))[0][6].startswith("+25.0")
    assert lines(mixed, rows("fap", HALF, seeds=[0, 1, 2]))[0][-1] == "not won"
    assert lines(mixed[:2], rows("fap", HALF, seeds=[0, 1, 2]))[0][2:4] == ["2", "40"], "seed 2 has no partner"
    assert lines(mixed[:2], rows("fap", HALF, seeds=[0, 1, 2]))[0][-1] == "won: robust"


def test_autoattack_first_and_a_rival_without_it_under_pgd_on_as_many_images():
    ours = [*rows("guided", MORE), *rows("guided", HALF, name="autoattack", n=20)]
    found = lines(ours, rows("fap", FEW), rows("capt", FEW), rows("capt", FEW, name="autoattack", n=30))
    assert [line[0] for line in found] == ["fap", "capt", "fap", "capt"]
    assert [line[3:6] for line in found] == [
        ["20", "AutoAttack / PGD", "100.0 / 50.0"],
        ["20", "AutoAttack / AutoAttack", "100.0 / 50.0"],
        ["40", "PGD / PGD", "75.0 / 25.0"],
        ["40", "PGD / PGD", "75.0 / 25.0"],
    ]


def test_sets_count_alike_however_many_models_and_images_they_have():
    ours = [*rows("guided", "1" * 40, shots=4), *rows("guided", "1" * 40), *rows("guided", "0" * 40, data="pcam", n=10)]
    theirs = [*rows("fap", "0" * 40, shots=4), *rows("fap", "0" * 40), *rows("fap", "0" * 40, data="pcam", n=10)]
    assert lines(ours, theirs)[0][1:7] == [
        "dtd, pcam",
        "6",
        "10 to 40",
        "PGD / PGD",
        "50.0 / 0.0",
        "+50.0 \\[50.0, 50.0\\]",
    ]


def test_the_interval_is_the_bootstraps_within_sets():
    rng = np.random.default_rng(1)
    small, large = rng.normal(0.3, 1, 60), rng.normal(-0.1, 0.5, 240)
    low, high = claims.interval([small, large])
    spread = 1.96 * np.sqrt(small.var() / 60 + large.var() / 240) / 2
    middle = (small.mean() + large.mean()) / 2
    assert (low, high) == pytest.approx((middle - spread, middle + spread), abs=0.1 * spread)


def test_other_eps_parts_and_repeated_rows_do_not_slip_in():
    far = rows("guided", MORE)
    for row in far:
        row.attack["eps"] = 4 / 255
    assert not lines(far, rows("fap", HALF))
    searched = rows("guided", MORE)
    searched[0].data["part"] = "val"
    with pytest.raises(SystemExit, match="not of test images"):
        lines(searched, rows("fap", HALF))
    with pytest.raises(SystemExit, match="two rows of dtd, seed 0, pgd"):
        lines(rows("guided", MORE), rows("guided", MORE), rows("fap", HALF))
