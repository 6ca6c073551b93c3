"""Which images a Split picks: by content, the same on every machine, disjoint, balanced."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from advtune.data import Part, Split, Task, load_images, load_task
from advtune.data.fewshot import select
from advtune.data.task import take_subset
from advtune.errors import UserError


def make_task(contents: dict[str, list[tuple[int, bytes]]], classes=("cat", "dog", "owl"), prefix="f") -> Task:
    parts = {
        name: Part([y for y, _ in rows], [f"{prefix}{i}" for i in range(len(rows))], lambda i, rows=rows: rows[i][1])
        for name, rows in contents.items()
    }
    return Task("made", "made", classes, "a photo of a {}.", parts)


def rows_of(per_class: int, tag: str = "", classes: int = 3) -> list[tuple[int, bytes]]:
    return [(y, f"{tag}{y}-{i}".encode()) for y in range(classes) for i in range(per_class)]


def picked(task: Task, split: Split) -> list[tuple[int, bytes]]:
    part = select(task, split)
    return [(label, part.read(i)) for i, label in enumerate(part.labels)]


@pytest.fixture
def task() -> Task:
    return make_task({"train": rows_of(20, "train"), "test": rows_of(10, "test")})


def shuffled(task: Task) -> Task:
    contents = {}
    for name, part in task.parts.items():
        rows = [(label, part.read(i)) for i, label in enumerate(part.labels)]
        random.Random(3).shuffle(rows)
        contents[name] = rows
    return make_task(contents, prefix="renamed")


SPLITS = [
    Split("train"),
    Split("fit"),
    Split("val"),
    Split("test", limit=7),
    Split("all"),
    Split("train", shots=4),
    Split("fit", shots=4, seed=2, limit=5),
]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_choice_and_order_do_not_depend_on_source_order_or_names(task, split):
    assert picked(shuffled(task), split) == picked(task, split)


def test_single_split_source_does_not_depend_on_order():
    task = make_task({"all": rows_of(10)})
    for part in ("train", "test", "fit", "val", "all"):
        assert picked(shuffled(task), Split(part)) == picked(task, Split(part))


def test_shots_are_balanced_and_seeded(task):
    chosen = {seed: picked(task, Split("train", shots=4, seed=seed)) for seed in range(4)}
    for rows in chosen.values():
        assert Counter(label for label, _ in rows) == {0: 4, 1: 4, 2: 4}
    assert len({frozenset(rows) for rows in chosen.values()}) == 4
    assert picked(task, Split("train", shots=4)) == chosen[0]


def test_fewer_shots_are_a_subset_of_more(task):
    few, more = (set(picked(task, Split("train", shots=k, seed=1))) for k in (2, 8))
    assert few < more


@pytest.mark.parametrize("source", ["split", "single"])
def test_parts_are_disjoint_and_complete(task, source):
    if source == "single":
        task = make_task({"all": rows_of(20)})
    sets = {name: set(picked(task, Split(name))) for name in ("train", "fit", "val", "test", "all")}
    assert sets["fit"].isdisjoint(sets["val"]) and sets["fit"] | sets["val"] == sets["train"]
    assert sets["train"].isdisjoint(sets["test"]) and sets["train"] | sets["test"] == sets["all"]


def test_shares_of_every_class(task):
    assert Counter(y for y, _ in picked(task, Split("val"))) == {0: 5, 1: 5, 2: 5}
    single = make_task({"all": rows_of(10)})
    assert Counter(y for y, _ in picked(single, Split("test"))) == {0: 2, 1: 2, 2: 2}
    pairs = make_task({"all": rows_of(2)})
    for part in ("train", "test"):
        assert Counter(y for y, _ in picked(pairs, Split(part))) == {0: 1, 1: 1, 2: 1}


def test_fit_and_val_do_not_depend_on_seed(task):
    assert picked(task, Split("val", seed=5)) == picked(task, Split("val"))


def test_copies_of_an_image_stay_on_one_side():
    rows = [(y, f"{y}-{i}".encode()) for y in range(3) for i in range(8) for _ in range(3)]
    rows += [(1, b"0-0"), (2, b"0-1"), (0, b"1-1")]  # and under another label
    task = make_task({"train": rows})
    fit, val = ({content for _, content in picked(task, Split(part))} for part in ("fit", "val"))
    assert fit.isdisjoint(val)
    assert len(picked(task, Split("fit"))) + len(picked(task, Split("val"))) == len(rows)


def test_copies_in_a_class_can_be_chosen_more_than_once():
    task = make_task({"train": [(y, b"same%d" % y) for y in range(3) for _ in range(4)]})
    assert Counter(picked(task, Split("train", shots=3))) == {(y, b"same%d" % y): 3 for y in range(3)}


def test_copies_are_chosen_one_by_one():
    task = make_task({"train": [(y, b"%d-%d" % (y, i)) for y in range(3) for i in range(10) for _ in range(5)]})
    kinds = [len(set(picked(task, Split("train", shots=5, seed=seed)))) for seed in range(5)]
    assert min(kinds) > 3, "three classes of one image each would be 3"


def test_one_image_in_a_class_cannot_be_cut():
    task = make_task({"train": [*rows_of(5, classes=2), (2, b"lonely")]})
    with pytest.raises(UserError, match="'owl' has 1 distinct image,"):
        select(task, Split("fit"))


def test_every_prefix_is_balanced_and_limit_is_a_prefix(task):
    everything = picked(task, Split("train"))
    for n in range(1, len(everything) + 1):
        counts = Counter(label for label, _ in everything[:n])
        assert max(counts.values()) - min(counts.get(y, 0) for y in range(3)) <= 1
    assert picked(task, Split("train", limit=11)) == everything[:11]
    assert picked(task, Split("train", limit=10_000)) == everything


def test_a_small_limit_does_not_favour_the_first_labels():
    classes = tuple(f"class {i}" for i in range(40))
    task = make_task({"test": rows_of(3, classes=40)}, classes)
    labels = [label for label, _ in picked(task, Split(limit=10))]
    assert len(set(labels)) == 10 and max(labels) > 12 and labels != sorted(labels)


def test_too_many_shots_name_the_class_and_the_counts():
    task = make_task({"train": [*rows_of(6, classes=2), (2, b"a"), (2, b"b")]})
    with pytest.raises(UserError, match="4 shots asked for, but class 'owl' has 2"):
        select(task, Split("train", shots=4))
    flowers = Task("flowers102", "flowers102", task.classes, task.template, task.parts)
    with pytest.raises(UserError, match="or take CoOp's split"):
        select(flowers, Split("train", shots=4))
    many = {"train": make_task({"train": rows_of(2, classes=3) * 1500}).parts["train"]}
    with pytest.raises(UserError, match=r"ask for fewer$"):  # CoOp's has no more
        select(replace(flowers, parts=many), Split("train", shots=10_000))


def test_missing_part():
    task = make_task({"test": rows_of(3)})
    with pytest.raises(UserError, match="no train part, only test"):
        select(task, Split("fit"))


@pytest.mark.parametrize(
    "bad",
    [
        {"part": "dev"},
        {"shots": 0},
        {"shots": -1},
        {"shots": 1.5},
        {"shots": True},
        {"limit": 0},
        {"seed": "0"},
        {"resolution": 0},
        {"resolution": "big"},
        {"resolution": 64.0},
        {"on_bad": "ignore"},
    ],
    ids=str,
)
def test_meaningless_splits(bad):
    with pytest.raises(UserError, match=next(iter(bad))) as error:
        Split(**bad)
    assert "\n" not in str(error.value)


PINNED = {
    0: [
        "train/41984.png",
        "train/50520.png",
        "train/13726.png",
        "train/35548.png",
        "train/15620.png",
        "train/53479.png",
        "train/40121.png",
        "train/49097.png",
        "train/09639.png",
        "train/17129.png",
    ],
    1: [
        "train/56687.png",
        "train/22303.png",
        "train/59754.png",
        "train/50520.png",
        "train/21271.png",
        "train/12381.png",
        "train/22441.png",
        "train/49097.png",
        "train/02311.png",
        "train/14355.png",
    ],
}


def test_embedded_shots_are_pinned(monkeypatch, tmp_path):
    """The same shots on every machine: these ids were written down once."""
    monkeypatch.delenv("ADVTUNE_DATA", raising=False)
    task = load_task("fashion-mnist-mini")
    assert {name: len(part) for name, part in task.parts.items()} == {"train": 160, "test": 500}
    assert select(task, Split("train", shots=1, seed=0)).ids == PINNED[0]
    assert select(task, Split("train", shots=1, seed=1)).ids == PINNED[1]
    val = [
        "train/19010.png",
        "train/13738.png",
        "train/23728.png",
        "train/04676.png",
        "train/14253.png",
        "train/21133.png",
        "train/56734.png",
        "train/04752.png",
        "train/24532.png",
        "train/59242.png",
    ]
    assert select(task, Split("val", limit=10)).ids == val
    images = load_images(task, Split("train", shots=4, seed=0, resolution="native"), cache=tmp_path)
    assert images.sha256 == "b9e26fe96eb4ce944a455facc6a4cf61a33ce888ca398c993fa51788d4f7f984"


def test_base_and_new_are_the_two_halves_of_the_classes():
    classes = ("ant", "bee", "cat", "dog", "elk")
    part = Part([4, 0, 3, 1, 2, 3], list("abcdef"), lambda i: b"%d" % i)
    task = Task("made", "made", classes, "a {}.", {"test": part}, classes, "all", classes)
    base, new = take_subset(task, "base"), take_subset(task, "new")
    assert (base.classes, base.subset, base.source) == (("ant", "bee", "cat"), "base", classes)
    assert (new.classes, new.subset, new.all_classes) == (("dog", "elk"), "new", classes)
    assert (base.parts["test"].labels, base.parts["test"].ids) == ([0, 1, 2], ["b", "d", "e"])
    assert (new.parts["test"].labels, new.parts["test"].ids) == ([1, 0, 0], ["a", "c", "f"])
    assert [new.parts["test"].read(i) for i in range(3)] == [b"0", b"2", b"5"]
    assert take_subset(task, "all") is task
    three = Task("made", "made", classes[:3], "a {}.", {"test": part.subset([1, 3, 4])})
    for subset, match in (("new", "the new subset of 3 classes has 1"), ("old", "'old' is unknown; choose from all")):
        with pytest.raises(UserError, match=match):
            take_subset(three, subset)
