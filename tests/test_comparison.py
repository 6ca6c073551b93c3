"""Two methods on the same images: the test, the interval, what is paired and what is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from advtune.comparison import bootstrap, compare, mcnemar, render
from advtune.errors import UserError
from advtune.results import Row, accuracy

ATTACK = {"name": "pgd", "eps": 4 / 255, "steps": 20, "step_size": 1 / 255, "seed": 0}
CLEAN_A, CLEAN_B = "1111110000", "1111111000"
ROBUST_A, ROBUST_B = "1111100000", "0000111100"  # alone right: 4 and 3


def make(
    method: str = "tecoa", seed: int | None = 0, clean: str = CLEAN_A, robust: str = ROBUST_A, **changes: Any
) -> Row:
    """A row of these flags; `seed` None is zero-shot; dicts are added to."""
    train = {"name": "pets", "part": "train", "shots": 16, "seed": seed, "n": 160, "sha256": f"t{seed}"}
    train |= {"attack": {"name": "pgd", "eps": 1 / 255}} | changes.pop("train", {})
    data = {"name": "pets", "part": "test", "n": len(clean), "resolution": 224, "sha256": "d" * 64, "classes": 37}
    data |= {"template": "a {}.", "texts_sha256": "e" * 64} | changes.pop("data", {})
    attack = changes.pop("attack", ATTACK)
    flags = {"clean": clean} | ({} if attack is None else {"robust": robust})
    facts: dict[str, Any] = {
        "method": method,
        "options": {"alpha": 1.0},
        "recipe": {"epochs": 5},
        "train": None if seed is None else train,
        "backbone": {"name": "tiny", "sha256": "b" * 64},
        "data": data,
        "attack": attack,
        "clean": accuracy(clean),
        "robust": None if attack is None else accuracy(robust),
        "flags": flags,
    }
    return Row(**(facts | changes))


def capt(**changes: Any) -> Row:
    return make(**({"method": "capt", "clean": CLEAN_B, "robust": ROBUST_B} | changes))


def flags(both: int, only_a: int, only_b: int, none: int = 0) -> tuple[str, str]:
    return (
        "1" * both + "1" * only_a + "0" * only_b + "0" * none,
        "1" * both + "0" * only_a + "1" * only_b + "0" * none,
    )


# 2 (C(6,0) + C(6,1)) / 2^6; no discordant pair; equal counts, where twice the tail passes 1; 2 / 2^10; 2 * 56 / 2^10
@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(5, 1, 14 / 64), (0, 0, 1.0), (3, 3, 1.0), (10, 0, 2 / 1024), (0, 1, 1.0), (8, 2, 112 / 1024)],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p: float) -> None:
    for both, none in ((0, 0), (7, 4)):
        a, b = flags(both, only_a, only_b, none)
        if a:
            assert mcnemar(a, b) == mcnemar(b, a) == p
    assert mcnemar([True, False, True], np.array([1, 0, 1])) == 1.0


def test_mcnemar_of_many_images() -> None:
    p = mcnemar(*flags(0, 25_224, 24_776))
    normal = 2 * NormalDist().cdf(-(448 - 1) / math.sqrt(50_000))  # with the correction for continuity
    assert p == pytest.approx(normal, rel=1e-3)
    assert mcnemar(*flags(0, 50_000, 0)) == 0.0  # 2^-49999 is below the least float
    assert mcnemar(*flags(0, 25_000, 25_000)) == 1.0


def test_mcnemar_against_scipy() -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for only_a, only_b in ((5, 1), (40, 62), (900, 1000)):
        assert mcnemar(*flags(3, only_a, only_b)) == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)


@pytest.mark.parametrize(("a", "b"), [("101", "10"), ("1", "101"), ("102", "101"), ([0.5], [1])])
def test_mcnemar_refuses(a: Any, b: Any) -> None:
    with pytest.raises(ValueError):
        mcnemar(a, b)


def test_bootstrap_is_near_the_normal_interval() -> None:
    n = 2000
    for differences in ([1] * 100 + [-1] * 60 + [0] * 1840, np.random.default_rng(1).normal(0.1, 1, n)):
        mean, error = np.mean(differences), np.std(differences) / math.sqrt(n)
        low, high = bootstrap(differences)  # the second has n distinct values: many chunks
        assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)


def test_bootstrap_covers_the_truth() -> None:
    rng, truth, inside = np.random.default_rng(0), 0.05, 0
    for _ in range(300):
        low, high = bootstrap(rng.choice([-1, 0, 1], 400, p=[0.1, 0.75, 0.15]), draws=1000)
        inside += low <= truth <= high
    assert 0.92 <= inside / 300 <= 0.98


def test_bootstrap_is_seeded_and_knows_no_order() -> None:
    differences = [1.0, 0.0, -1.0, 0.5, 0.0, 1.0] * 20
    assert bootstrap(differences) == bootstrap(sorted(differences)) != bootstrap(differences, seed=1)
    wide, narrow = bootstrap(differences, level=0.99), bootstrap(differences, level=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bootstrap([0.5] * 7) == (0.5, 0.5)
    assert all(-1 <= each <= 1 for each in bootstrap(np.ones(50_000) * np.arange(50_000) % 2))


@pytest.mark.parametrize(
    ("differences", "how"),
    [([], {}), ([1, float("nan")], {}), ([1, 0], {"level": 1.0}), ([1, 0], {"level": 0.0}), ([1, 0], {"draws": 0})],
)
def test_bootstrap_refuses(differences: list[float], how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no bootstrap"):
        bootstrap(differences, **how)


def test_one_pair() -> None:
    clean, robust = compare([make()], [capt()])
    assert (clean["which"], clean["a"], clean["b"], clean["difference"]) == ("clean", 0.6, 0.7, pytest.approx(0.1))
    assert (clean["only_a"], clean["only_b"], clean["p"]) == (0, 1, 1.0)
    assert (robust["a"], robust["b"], robust["difference"]) == (0.5, 0.4, -0.1)
    assert (robust["only_a"], robust["only_b"], robust["p"]) == (4, 3, 1.0)
    assert (robust["low"], robust["high"]) == bootstrap([-1] * 4 + [1] * 3 + [0] * 3)
    assert (robust["dataset"], robust["part"], robust["n"], robust["resolution"]) == ("pets", "test", 10, 224)
    assert (robust["attack"], robust["eps"], robust["steps"]) == ("pgd", 4 / 255, 20)
    assert robust["attack_options"] == {"step_size": 1 / 255}
    assert (robust["label_a"], robust["label_b"], robust["pairs"], robust["notes"]) == ("tecoa", "capt", [[0, 0]], [])
    assert json.loads(json.dumps([clean, robust])) == [clean, robust]
    back = compare([capt()], [make()])[1]
    assert (back["difference"], back["p_values"], back["only_a"]) == (-robust["difference"], robust["p_values"], 3)


def test_flags_after_a_stage_are_not_compared() -> None:
    rows = [replace(row, flags={**row.flags, "after apgd-ce": "1" * 10}) for row in (make(), capt())]
    assert [each["which"] for each in compare(rows[:1], rows[1:])] == ["clean", "robust"]


def test_without_attack_only_clean() -> None:
    (clean,) = compare([make(attack=None)], [capt(attack=None)])
    assert (clean["which"], clean["attack"], clean["eps"]) == ("clean", None, None)


def test_seeds_are_paired_with_their_equals() -> None:
    strong, weak = "1" * 9 + "0", "1" + "0" * 9
    a = [make(seed=0, robust=weak), make(seed=2, robust=strong), make(seed=10, robust=weak)]
    b = [capt(seed=10, robust=weak), capt(seed=2, robust=strong), capt(seed=0, robust=strong)]
    robust = compare(a, b)[1]
    assert robust["pairs"] == [[0, 0], [2, 2], [10, 10]]
    assert robust["differences"] == [0.8, 0.0, 0.0] and robust["p"] is None
    assert robust["p_values"] == [mcnemar(weak, strong), 1.0, 1.0]
    assert (robust["only_a"], robust["only_b"], robust["difference"]) == (0, 8, pytest.approx(0.8 / 3))
    assert (robust["a"], robust["b"]) == (pytest.approx(1.1 / 3), pytest.approx(1.9 / 3))
    assert (robust["low"], robust["high"]) == bootstrap([0] + [1 / 3] * 8 + [0])


def test_images_not_seeds_are_the_unit() -> None:
    one = compare([make()], [capt()])
    three = compare([make(seed=s) for s in range(3)], [capt(seed=s) for s in range(3)])
    for single, several in zip(one, three, strict=True):
        assert (several["low"], several["high"]) == (single["low"], single["high"])


def test_a_seed_of_one_side_is_left_out_aloud() -> None:
    robust = compare([make(seed=0), make(seed=1)], [capt(seed=1), capt(seed=2)])[1]
    assert robust["pairs"] == [[1, 1]] and robust["p"] == 1.0
    assert robust["notes"] == ["Training seeds that only one side has are left out: 0; 2."]


def test_zero_shot_goes_with_every_seed() -> None:
    zero, tuned = [make("zero-shot", seed=None)], [capt(seed=s) for s in (2, 0)]
    assert compare(zero, tuned)[1]["pairs"] == [[None, 0], [None, 2]]
    assert compare(tuned, zero)[1]["pairs"] == [[0, None], [2, None]]
    assert compare(zero, tuned)[1]["notes"] == []
    assert compare(zero, zero)[1]["pairs"] == [[None, None]]


def test_the_latest_of_a_repeated_row_counts() -> None:
    old = make(robust="0" * 10, time="2025-01-01T00:00:00+00:00")
    new = make(robust="1" * 10, time="2025-01-02T00:00:00+00:00", device="cuda", attack=ATTACK | {"seed": 3})
    for rows in ([old, new], [new, old]):
        assert compare(rows, [capt()])[1]["a"] == 1.0


def test_every_data_and_attack_has_its_lines_in_any_order() -> None:
    weak, dtd = ATTACK | {"eps": 1 / 255}, {"name": "dtd", "sha256": "f" * 64}
    changes: list[dict[str, Any]] = [{}, {"attack": weak}, {"data": dtd}, {"seed": 1}, {"attack": None}]
    changes += [{"attack": weak | {"restarts": n}} for n in range(2, 8)]
    a, b = [make(**each) for each in changes], [capt(**each) for each in changes]
    expected = compare(a, b)
    again = [each for each in expected if "restarts" in each["attack_options"]]
    assert [each["attack_options"]["restarts"] for each in again] == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    plain = [each for each in expected if each not in again]
    found = [(each["dataset"], each["eps"], each["which"], len(each["pairs"])) for each in plain]
    assert found == [
        ("dtd", 4 / 255, "clean", 1),
        ("dtd", 4 / 255, "robust", 1),
        ("pets", None, "clean", 1),
        ("pets", 1 / 255, "clean", 1),
        ("pets", 1 / 255, "robust", 1),
        ("pets", 4 / 255, "clean", 2),
        ("pets", 4 / 255, "robust", 2),
    ]
    shuffle = random.Random(0).shuffle
    for _ in range(10):
        shuffle(a)
        shuffle(b)
        assert compare(a, b) == expected
    alone = [make(data={"sha256": "x"}, method="apd"), make(data={"sha256": "x"})]  # two settings, but nothing to pair
    assert compare([*a, *alone], b) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"sha256": "f" * 64}}, ["not the same images", "sha256 dddddddd", "sha256 ffffffff"]),
        ({"data": {"classes": 5}}, ["not the same images", "37 classes", "5 classes"]),
        ({"data": {"resolution": 32}}, ["not the same images", "224 px", "32 px"]),
        ({"clean": "1", "robust": "1"}, ["not the same images", "n = 10", "n = 1,"]),
        ({"data": {"sha256": None}}, ["not the same images", "no rows of known images"]),
        ({"attack": ATTACK | {"eps": 1 / 255}}, ["not the same attack", "eps 4/255", "eps 1/255"]),
        ({"attack": ATTACK | {"step_size": 2 / 255}}, ["not the same attack", "step_size 1/255", "step_size 2/255"]),
        ({"attack": None}, ["no robust", "pgd eps 4/255", "no attack"]),
        ({"seed": 1}, ["no training seed in common", "first: 0", "second: 1"]),
    ],
)
def test_what_cannot_be_paired_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError, match="nothing to compare: ") as caught:
        compare([make()], [capt(**changes)])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_no_row_names_are_not_the_same() -> None:
    with pytest.raises(UserError, match="no rows of known images"):
        compare([make(data={"sha256": None})], [capt(data={"sha256": None})])


def test_no_rows() -> None:
    for rows in (([], [make()]), ([make()], []), ([], [])):
        with pytest.raises(UserError, match="nothing to compare"):
            compare(*rows)
    with pytest.raises(UserError, match="no comparison"):
        render([])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"method": "apd"}, "method apd / tecoa"),
        ({"seed": None, "method": "zero-shot"}, "method tecoa / zero-shot"),
        ({"options": {"alpha": 2.0}}, "options.alpha 1 / 2"),
        ({"recipe": {"epochs": 9}}, "recipe.epochs 5 / 9"),
        ({"train": {"shots": 4}}, "train.shots 16 / 4"),
        ({"train": {"attack": {"name": "pgd", "eps": 4 / 255}}}, "train.attack.eps 1/255 / 4/255"),
        ({"backbone": {"name": "tiny", "sha256": "c"}}, "backbone.sha256"),
        ({"precision": "bf16"}, "precision bf16 / fp32"),
        ({"data": {"texts_sha256": "other", "template": "{}\nX"}}, "class texts a {}. (eeee"),
    ],
)
def test_several_settings_on_a_side_are_refused(changes: dict[str, Any], word: str) -> None:
    rows = [make(), make(**({"seed": 1} | changes))]
    for side, call in (("first", lambda: compare(rows, [capt()])), ("second", lambda: compare([capt()], rows))):
        with pytest.raises(UserError, match=f"the {side} side has several settings on pets test") as caught:
            call()
        assert word in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
        assert str(caught.value).count(" / ") == 1  # of another method nothing else is listed


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"data": {"texts_sha256": "f" * 64}}, "class texts: a {}. (eeeeeeeeeeee) against a {}. (ffffffffffff)"),
        ({"precision": "bf16"}, "precision: fp32 against bf16"),
        ({"backbone": {"name": "big", "sha256": "c" * 64}}, f"backbone sha256: {'b' * 12} against {'c' * 12}"),
        ({"threat": "transfer"}, "threat: none against transfer"),
        ({"train": {"shots": 4}}, "train shots: 16 against 4"),
        ({"train": {"attack": {"eps": 4 / 255}}}, "train attack eps: 1/255 against 4/255"),
    ],
)
def test_what_else_differs_is_noted(changes: dict[str, Any], note: str) -> None:
    for line in compare([make()], [capt(**changes)]):
        assert line["notes"] == [f"Not the same {note}."]
    assert compare([make()], [capt(options={"lam": 2.0}, recipe={"epochs": 3})])[0]["notes"] == []


def test_how_the_same_images_were_named_does_not_matter() -> None:
    other = {"spec": "folder:pets", "name": "folder", "limit": 10}
    assert compare([make(), make(seed=1, data=other)], [capt(), capt(seed=1)])[0]["pairs"] == [[0, 0], [1, 1]]


def test_labels_tell_one_method_from_itself() -> None:
    line = compare([make()], [make(options={"alpha": 2.0})])[0]
    assert (line["label_a"], line["label_b"]) == ("tecoa (alpha 1)", "tecoa (alpha 2)")
    line = compare([make()], [make()])[0]
    assert (line["label_a"], line["label_b"]) == ("tecoa (first)", "tecoa (second)")


def cells(markdown: str) -> list[list[str]]:
    """The table's lines as a reader of the rendered page sees them."""
    found: list[list[str]] = []
    for before, token in pairwise(MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)):
        if token.type == "tr_open":
            found.append([])
        elif before.type in ("th_open", "td_open"):
            found[-1].append("".join(child.content for child in token.children or []))
    return found


def test_render() -> None:
    a, b = flags(both=100, only_a=20, only_b=60, none=320)
    text = render(compare([make(clean=a, robust=a)], [capt(clean=a, robust=b)]))
    head, clean, robust = cells(text)
    assert head[3:7] == ["Which", "A %", "B %", "Difference, points"]
    assert clean == ["pets test, 224 px", "pgd eps 4/255, 20 steps", "500", "clean", *clean[4:]]
    assert clean[4:] == ["24.0", "24.0", "+0.0 [0.0, 0.0]", "1.000", "0, 0"]
    low, high = bootstrap([-1] * 20 + [1] * 60 + [0] * 420)
    assert robust[3:] == ["robust", "24.0", "32.0", f"+8.0 [{100 * low:.1f}, {100 * high:.1f}]", "< 0.001", "20, 60"]
    assert "A: tecoa. B: capt." in text and "McNemar" in text and "bootstrap" in text
    assert "- pets test, 224 px, pgd eps 4/255, 20 steps: no clean difference between tecoa and capt" in text
    assert "that n = 500 can show (p = 1.000)" in text
    assert r"capt is better than tecoa by 8.0 points robust (p \< 0.001)" in text
    assert "tecoa is better than capt by" not in text
    assert "tecoa is better than capt by 8.0 points clean" in render(compare([make(clean=b)], [capt(clean=a)]))


def test_render_of_several_seeds() -> None:
    a, b = flags(both=100, only_a=20, only_b=60, none=320)
    rows_a = [make(seed=s, clean=a, robust=a) for s in range(3)]
    text = render(compare(rows_a, [capt(seed=s, clean=a, robust=a if s == 2 else b) for s in range(3)]))
    assert cells(text)[2][7] == "per seed: < 0.001, < 0.001, 1.000"
    assert (
        "capt is better than tecoa by 5.3 points robust (ahead in 2 of 3 seed pairs, the interval leaves 0 out)" in text
    )
    assert (
        "no clean difference between tecoa and capt that n = 500 can show (3 seed pairs, the interval holds 0)" in text
    )


def test_another_norm_than_linf_is_shown() -> None:
    l2, linf = ATTACK | {"norm": "l2", "eps": 0.5}, ATTACK | {"norm": "linf"}
    text = render(compare([make(attack=l2), make(attack=linf)], [capt(attack=l2), capt(attack=linf)]))
    found = {line[1] for line in cells(text)[1:]}
    assert found == {"pgd l2 eps 0.5, 20 steps", "pgd eps 4/255, 20 steps"}


def test_render_tells_attacks_apart_and_escapes_names() -> None:
    attacks = [ATTACK, ATTACK | {"step_size": 2 / 255}]
    name = "a|b *c* <i>"
    rows = [
        [make(attack=each, data={"name": name}) for each in attacks],
        [capt(method=name, attack=each, precision="bf16") for each in attacks],
    ]
    text = render(compare(*rows))
    found = {line[1] for line in cells(text)[1:]}
    assert found == {f"pgd eps 4/255, 20 steps, step_size {n}/255" for n in (1, 2)}
    assert r"B: a\|b \*c\* \<i\>." in text and {len(line) for line in cells(text)} == {9}
    assert {line[0] for line in cells(text)[1:]} == {f"{name} test, 224 px"}
    assert text.count(" test, 224 px: Not the same precision: fp32 against bf16.") == 1
