"""What recipes/claims.py says of ours and a rival: the right rows side by side, and no claim that chance would give."""

from __future__ import annotations

from itertools import product
from math import erfc

import claims
import numpy as np
import pytest

from advtune.results import Row, accuracy
from test_results_page import made

CLAIM = claims.Claim(("fap",), ("dtd", "pcam"), (4, 16), (0, 1))


def text(share, n=100, last=False):
    """Flags of n images of which a share is right: the first ones, or the last ones."""
    right = round(share * n)
    return "0" * (n - right) + "1" * right if last else "1" * right + "0" * (n - right)


HALF = text(0.5)


def row(method, cell, robust, clean=None, name="pgd", n=100, **data):
    clean = text(0.5) if clean is None else clean
    of = made(method, robust[:n], cell[2], cell[1], cell[0], cell[0], name, model=f"{method}{cell}")
    about = {"sha256": f"{cell[0]} {n}", "limit": n, **data}
    flags = {"clean": clean[:n], "robust": robust[:n]}
    return Row(**{**vars(of), "flags": flags, "clean": accuracy(map(int, clean[:n])), "data": of.data | about})


def side(method, robust=HALF, clean=None, claim=CLAIM, auto=None, **how):
    """All promised rows of a method under PGD, and under AutoAttack with `auto` on the first 50 images."""
    robust = robust if callable(robust) else lambda cell, flags=robust: flags
    found = [row(method, cell, robust(cell), clean, **how) for cell in claim.cells()]
    return found + [row(method, cell, auto, clean, "autoattack", 50) for cell in claim.cells() if auto]


def lines(*rows, claim=CLAIM):
    page = claims.claimed(claim, [each for some in rows for each in some]).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page[2:-2]], page[-1]


def said(robust, clean=None, theirs=HALF, theirs_clean=None, claim=CLAIM):
    """The verdict under PGD on 100 images."""
    ours, rival = side("guided", robust, clean, claim, auto=text(0.5)), side("fap", theirs, theirs_clean, claim)
    return lines(ours, rival, claim=claim)[0][-1][-1]


def test_a_claim_is_won_by_two_points_at_no_less_of_the_other():
    assert said(text(0.8)) == "won: robust"
    assert said(text(0.5), text(0.8)) == "won: clean"
    assert said(text(0.8), text(0.8)) == "won: robust and clean"
    assert said(text(0.2)) == "lost: robust"
    assert said(text(0.5)) == "not told", "level"
    assert said(text(0.8), text(0.2)) == "not told", "a trade is no win, and no loss"
    assert said(text(0.8), text(0.49)) == "not told", "a point less clean"
    assert said(text(0.55, last=True)) == "not told", "five points, but other images are right: chance"
    assert said(text(0.8), text(0.5, last=True)) == "not told", "other images are right: no less is not known"


def test_less_than_two_points_are_no_win_however_sure():
    def numbers(difference, low, high):
        return {"difference": difference, "low": low, "high": high}

    level = numbers(0.0, -0.01, 0.01)
    assert claims.verdict(numbers(0.019, 0.01, 0.03), level) == "not told"
    assert claims.verdict(numbers(0.42 - 0.40, 0.01, 0.03), level) == "won: robust", "two points, but for rounding"
    assert claims.verdict(numbers(0.03, -0.001, 0.06), level) == "not told"
    assert claims.verdict(numbers(0.03, 0.01, 0.06), numbers(0.001, -0.021, 0.02)) == "not told"
    assert claims.verdict(numbers(0.03, 0.01, 0.06), numbers(-0.001, -0.015, 0.01)) == "not told"
    assert claims.verdict(numbers(-0.03, -0.06, -0.01), level) == "lost: robust"
    assert claims.verdict(numbers(-0.03, -0.06, 0.001), level) == "not told"


def test_autoattack_is_on_the_first_images_and_clean_accuracy_on_all():
    ours, theirs = side("guided", text(0.9), text(0.4, last=True), auto=text(0.3, 50)), side("fap", text(0.1))
    (auto, pgd), sentence = lines(ours, theirs)
    assert auto[1:5] == ["8", "AutoAttack / PGD", "50", "30.0 / 20.0"]
    assert pgd[1:5] == ["8", "PGD / PGD", "100", "90.0 / 10.0"]
    assert auto[7] == pgd[7] == "40.0 / 50.0"
    assert sentence == "Under AutoAttack: won against 0 of 1; the claim does not hold."
    both = side("fap", text(0.1), auto=text(0.08, 50))
    assert lines(ours, both)[0][0][2:5] == ["AutoAttack / AutoAttack", "50", "30.0 / 8.0"]
    assert lines(side("guided", auto=text(1.0, 50)), theirs)[1].endswith("won against 1 of 1; the claim holds.")


def test_what_is_missing_is_said_and_nothing_is_claimed():
    ours, theirs = side("guided", text(0.9), auto=text(0.9, 50)), side("fap", text(0.1))
    found, sentence = lines(ours, theirs[1:])
    assert found[0][1] == "7" and found[0][-1] == "7 of 8 models"
    assert sentence.endswith("0 of 1; not all of the models are there.")
    with pytest.raises(SystemExit, match="guided and capt have no model in common"):
        lines(ours, theirs, claim=claims.Claim(("capt",), CLAIM.sets, CLAIM.shots, CLAIM.seeds))
    with pytest.raises(SystemExit, match="no model in common under autoattack"):
        lines(side("guided"), theirs)


def test_a_weaker_attack_on_theirs_does_not_lose_it_for_ours():
    ours, theirs = side("guided", auto=text(0.2, 50)), side("fap")
    assert [each[-1] for each in lines(ours, theirs)[0]] == ["not told", "not told"]
    assert lines(ours, side("fap", auto=text(0.5, 50)))[0][0][-1] == "lost: robust"


def test_an_untuned_model_stands_beside_every_seed():
    claim = claims.Claim(("fap",), CLAIM.sets, (None,), CLAIM.seeds, trained="sun397", beside=("zero-shot",))

    def away(rows):
        return [Row(**{**vars(each), "train": {**each.train, "name": "sun397"}}) for each in rows]

    ours, theirs = away(side("guided", claim=claim, auto=text(0.9, 50))), away(side("fap", claim=claim))
    untuned = [row("zero-shot", (name, None, 0), text(0.1)) for name in claim.sets]
    untuned = [Row(**{**vars(each), "train": None}) for each in untuned]
    found, _ = lines(ours, theirs, untuned, claim=claim)
    assert found[1][:6] == ["beside: zero-shot", "4", "AutoAttack / PGD", "50", "90.0 / 20.0", found[1][5]]
    assert found[1][-1] == "won: robust"


def test_what_stands_beside_is_shown_and_does_not_count():
    ours, theirs = side("guided", text(0.9), auto=text(0.9, 50)), side("fap", text(0.1))
    claim = claims.Claim(("fap",), CLAIM.sets, CLAIM.shots, CLAIM.seeds, beside=("tecoa",))
    found, sentence = lines(ours, theirs, side("tecoa", text(1.0))[1:], claim=claim)
    assert [each[0] for each in found] == ["fap", "beside: tecoa"] * 2
    assert [each[-1] for each in found] == ["won: robust", "7 of 8 models"] * 2
    assert sentence == "Under AutoAttack: won against 1 of 1; the claim holds."


def test_only_what_was_promised_counts():
    ours, theirs = side("guided", auto=text(0.5, 50)), side("fap")
    other = [
        (method, cell) for method in ("guided", "fap") for cell in (("dtd", 1, 0), ("dtd", 4, 7), ("sun397", 4, 0))
    ]
    more = [row(method, cell, text(method == "guided")) for method, cell in other]
    far, away = (row("guided", ("dtd", 4, 0), text(1.0)) for _ in range(2))
    far.attack["eps"], away.train["name"] = 4 / 255, "pcam"
    assert lines(ours, more, [far, away], theirs) == lines(ours, theirs)


def test_rows_that_do_not_belong_together_are_refused():
    ours, theirs = side("guided", auto=text(0.5, 50)), side("fap")

    def refused(match, **changes):
        changed = Row(**{**vars(theirs[0]), **changes})
        with pytest.raises(SystemExit, match=match):
            lines(ours, [changed, *theirs[1:]])

    data = theirs[0].data
    refused("fap: not one options, recipe", options={"depth": 3})
    refused("fap: not one options, recipe", recipe={"lr": 3})
    refused("not one words, classes, part", data=data | {"texts_sha256": "a photo"})
    refused("not one words, classes, part", data=data | {"part": "val"})
    refused("not one first 100 images of dtd", data=data | {"sha256": "others"})
    refused("not one backbone on dtd", backbone={"sha256": "other"})
    refused("images left out", data=data | {"skipped": ["a.jpg"]})
    with pytest.raises(SystemExit, match="two rows of"):
        lines(ours, theirs, [Row(**{**vars(theirs[0]), "time": "later"})])
    with pytest.raises(SystemExit, match="guided: not one model"):
        lines([Row(**{**vars(ours[0]), "model": "other"}), *ours[1:]], theirs)
    val = [Row(**{**vars(each), "data": each.data | {"part": "val"}}) for each in [*ours, *theirs]]
    with pytest.raises(SystemExit, match="not of test images"):
        lines(val)


def test_the_mean_is_over_sets_of_shots_of_seeds():
    def robust(cell):
        return text({("dtd", 4, 0): 1.0, ("dtd", 4, 1): 0.6, ("dtd", 16, 0): 0.2}.get(cell, 0.0))

    (_, pgd), _ = lines(side("guided", robust, auto=text(0.5, 50)), side("fap", text(0.0)))
    assert pgd[4] == "22.5 / 0.0"  # ((1 + 0.6) / 2 + (0.2 + 0) / 2) / 2 / 2
    swapped = side("guided", lambda cell: text(cell[2] == 1), auto=HALF)
    assert lines(swapped, side("fap", lambda cell: text(cell[2] == 0)))[0][1][6] == "1.0000", (
        "the mean of both seeds is 0"
    )


@pytest.mark.parametrize(("seeds", "images"), [(1, 80), (4, 1), (3, 60)])
def test_the_interval_is_over_images_within_sets_and_over_seeds(seeds, images):
    """Beside a bootstrap drawn by hand: the set's images once for all of its models, seeds apart."""
    rng = np.random.default_rng(2)
    sets = [[rng.normal(size=(seeds, images * more)) for _ in range(2)] for more in (1, 3)]
    drawn = []
    for _ in range(4000):
        total = 0.0
        for own in sets:
            columns = rng.integers(own[0].shape[1], size=own[0].shape[1])
            for each in own:
                total += each[rng.integers(seeds, size=seeds)][:, columns].mean() / 4
        drawn.append(total)
    spread = np.std(drawn)
    expected = np.quantile(drawn, [0.025, 0.975])
    assert claims.interval(sets) == pytest.approx(tuple(expected), abs=0.2 * spread)


def test_signs_flipped_give_the_p_of_a_normal_mean():
    for shift in (0.0, 0.1, 0.2, 0.3):
        numbers = np.random.default_rng(5).normal(size=200) + shift
        z = numbers.mean() / numbers.std() * 200**0.5
        assert claims.flipped([numbers]) == pytest.approx(erfc(abs(z) / 2**0.5), abs=0.02)
    small, large = np.ones(4), np.zeros(400)  # 2 of 16 signs give as much
    assert claims.flipped([small, large]) == pytest.approx(2 / 16, abs=0.01)


def test_the_promises_are_the_issues():
    few, transfer = claims.CLAIMS["few-shot"], claims.CLAIMS["transfer"]
    assert set(few.cells()) == set(product(("caltech101", "cifar10", "fashion-mnist"), (4, 16), (0, 1, 2)))
    assert set(transfer.cells()) == set(product(("caltech101", "cifar10", "fashion-mnist"), (None,), (0, 1, 2)))
    assert transfer.trained == "tinyimagenet" and not few.trained
    assert few.rivals == ("capt", "apd", "fap", "advmaple")
    assert transfer.rivals == ("tecoa", "fare", "pmg-aft", "agft", "tga-zsr")
    assert claims.MARGIN == 0.02
