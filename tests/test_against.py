"""Published numbers: well-formed, beside the right rows of ours, and every difference in protocol told."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from advtune.cli import main
from advtune.data import catalog
from advtune.errors import UserError
from advtune.methods import METHODS
from advtune.options import as_options
from advtune.report import published as published_module
from advtune.report import render_against
from advtune.report.against import against
from advtune.report.beside import what_differs
from advtune.report.published import papers, published
from advtune.results import Row, accuracy, append, wilson
from advtune.study import from_facts, plan, read

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
FULL = [path for path in RECIPES if not path.name.startswith(("offline-", "claims-"))]
FACTS = {
    "backbone", "resolution", "tower", "train", "shots", "data", "subset", "seeds", "split", "attack", "train_attack",
    "template",
}  # fmt: skip
PRINTED = re.compile(r"([a-z-]+) (-|\d+\.\d+)/(\d+\.\d+)")  # method clean/robust in a recipe's head
THREE = ["dtd", "pcam", "ucf101"]
PGD = {"name": "pgd", "eps": 1 / 255, "steps": 100, "step_size": 1 / 255, "seed": 0}
INNER = {"name": "pgd", "eps": 1 / 255, "steps": 2, "step_size": 1 / 255}
CLIP = {"name": "openai/clip-vit-base-patch32", "sha256": "b" * 64, "notice": "", "tuned": None}
TUNED = {"method": "tecoa", "on": "imagenet", "attack": INNER, "root": "openai/clip-vit-base-patch32"}
TOWER: dict[str, Any] = {"name": "runs/tecoa-imagenet-eps1", "sha256": "d" * 64, "tuned": TUNED}
PAPER = {
    "title": "A paper", "arxiv": "2401.00001", "note": "",
    "tables": {
        "few": {
            "title": "few-shot", "source": "paper",
            "protocol": {
                "backbone": "ViT-B/32", "resolution": 224, "train": "same", "shots": 16, "data": THREE,
                "seeds": 1, "attack": {"name": "pgd", "eps": "1/255", "steps": 100, "step_size": "1/255"},
                "train_attack": {"name": "pgd", "eps": "1/255", "steps": 2, "step_size": "1/255"},
            },
            "rows": [{"method": "tecoa", "clean": 50.0, "robust": 30.0, "recipe": {"epochs": 10, "lr": 0.1}}],
        }
    },
}  # fmt: skip


def make(data: str = "dtd", clean: int = 6, robust: int = 3, n: int = 10, method: str = "tecoa", **changes: Any) -> Row:
    """A row with so many right of n that follows PAPER's protocol; `train` None is untuned."""
    flags = {name: "1" * k + "0" * (n - k) for name, k in (("clean", clean), ("robust", robust))}
    train: Any = {"name": data, "spec": data, "part": "train", "shots": 16, "seed": 0, "limit": None, "attack": INNER}
    train = None if changes.get("train", 0) is None else train | changes.pop("train", {})
    facts: dict[str, Any] = {
        "method": method,
        "recipe": {"epochs": 10, "lr": 0.1} | changes.pop("recipe", {}),
        "train": train,
        "backbone": CLIP | changes.pop("backbone", {}),
        "data": {"name": data, "part": "test", "limit": None, "resolution": 224, "seed": 0} | changes.pop("slice", {}),
        "attack": PGD | changes.pop("attack", {}),
        "threat": "white-box",
        "clean": accuracy(flags["clean"]),
        "robust": accuracy(flags["robust"]),
        "flags": flags,
    }
    return Row(**(facts | changes))


def whole(**changes: Any) -> list[Row]:
    """PAPER's table run as it says, on all its sets."""
    return [make(data, **changes) for data in THREE]


@pytest.fixture
def paper(monkeypatch):
    """PAPER in place of the published ones; a mapping to change before it is read."""
    own = json.loads(json.dumps(PAPER))
    monkeypatch.setattr(published_module, "_read", lambda: json.dumps({"p": own}))
    return own


def line(rows: list[Row]) -> dict[str, Any]:
    (found,) = against(rows, "p")
    return found


def test_what_follows_the_protocol_differs_in_nothing(paper) -> None:
    found = line(whole())
    assert found["differs"] == []
    assert found["ours"]["clean_accuracy"] == pytest.approx(0.6)
    assert found["ours"]["robust_accuracy"] == pytest.approx(0.3)
    assert found["ours"]["n"] == 30 and found["ours"]["sets"] == ["dtd", "pcam", "ucf101"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"backbone": {"name": "mini", "notice": "not CLIP"}}, ("backbone", "mini (a stand-in)", "ViT-B/32")),
        ({"backbone": {"name": "folder/clip-vit-base-patch16"}}, ("backbone", "clip-vit-base-patch16", "ViT-B/32")),
        ({"slice": {"resolution": 64}}, ("resolution", "64 px", "224 px")),
        ({"attack": {"name": "apgd-ce"}}, ("attack", "apgd-ce", "pgd")),
        ({"attack": {"eps": 4 / 255}}, ("attack eps", "4/255", "1/255")),
        ({"attack": {"steps": 50}}, ("attack steps", "50", "100")),
        ({"attack": {"step_size": 0.25 / 255}}, ("attack step", "0.25/255", "1/255")),
        ({"attack": {"random_start": False}}, ("attack options", "random_start=False", "the defaults")),
        ({"attack": {"restarts": 1, "loss": "kl"}}, ("attack options", "loss=kl", "the defaults")),
        ({"train": {"attack": INNER | {"eps": 4 / 255}}}, ("training attack eps", "4/255", "1/255")),
        ({"train": {"attack": INNER | {"steps": 3}}}, ("training attack steps", "3", "2")),
        (
            {"train": {"attack": INNER | {"keep": "best"}}},
            ("training attack options", "keep=best", "the method's defaults"),
        ),
        ({"recipe": {"augment": True}}, ("options", "augment=True", "the method's defaults")),
        ({"train": {"part": "fit"}}, ("tuned on part", "fit", "train")),
        ({"train": {"resolution": 32}}, ("training resolution", "32 px", "224 px")),
        ({"train": {"template": "a {}"}}, ("training template", "a {}", "the set's usual")),
        ({"slice": {"template": "a {}"}}, ("template", "a {}", "the set's usual")),
        ({"slice": {"skipped": ["a", "b"]}}, ("test images skipped", "2 of dtd, 2 of pcam, 2 of ucf101", "none")),
        ({"train": {"skipped": ["a"]}}, ("training images skipped", "1 of dtd, 1 of pcam, 1 of ucf101", "none")),
        ({"precision": "bf16"}, ("precision", "bf16", "fp32, or not told")),
        ({"notes": ["warm-up of 9 steps cut to 1 of 12"]}, ("warm-up", "of 9 steps cut to 1 of 12", "not cut")),
        ({"notes": ["3 of the 10 images were tuned on"]}, ("test images", "3 of the 10 images were tuned on", "none")),
        ({"train": {"shots": 4}}, ("shots", "4", "16")),
        ({"train": {"shots": None}}, ("shots", "all", "16")),
        ({"train": {"limit": 80, "n": 79}}, ("training images", "only 79", "no limit")),
        ({"recipe": {"epochs": 2}}, ("epochs", "2", "10")),
        ({"recipe": {"lr": 0.01}}, ("lr", "0.01", "0.1")),
        ({"slice": {"limit": 500}}, ("test images", "500 a set", "no limit given")),
        ({"reconstructed": ["lam"]}, ("reconstructed by us", "lam", "not public")),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_each_difference_is_told(paper, changes, told) -> None:
    assert [tuple(fact.values()) for fact in line(whole(**changes))["differs"]] == [told]


def test_a_papers_own_template_is_what_ours_is_compared_with(paper) -> None:
    paper["tables"]["few"]["protocol"]["template"] = "the paper's {}"
    assert line(whole(slice={"template": "the paper's {}"}, train={"template": "the paper's {}"}))["differs"] == []
    own = {"template": "the set's {}"}
    told = line(whole(slice=own, train=own))["differs"]
    assert [(fact["what"], fact["paper"]) for fact in told] == [
        ("training template", "the paper's {}"), ("template", "the paper's {}"),
    ]  # fmt: skip


def test_another_norm_is_told_beside_its_eps(paper) -> None:
    told = [fact["what"] for fact in line(whole(attack={"norm": "l2", "eps": 0.5}))["differs"]]
    assert told == ["attack eps", "attack norm"]


def test_a_step_that_the_paper_does_not_tell_is_compared_with_the_default_at_our_eps(paper) -> None:
    told = paper["tables"]["few"]["protocol"]["attack"]
    del told["step_size"]
    assert line(whole(attack={"step_size": 0.25 / 255}))["differs"] == []
    told["eps"] = "4/255"
    assert line(whole(attack={"eps": 4 / 255}))["differs"] == []  # a quarter of eps
    (fact,) = line(whole(attack={"eps": 4 / 255, "step_size": 0.01 / 255}))["differs"]
    assert fact == {"what": "attack options", "ours": "step_size=3.92157e-05", "paper": "the defaults"}


def test_a_faster_training_attack_is_told_where_the_paper_does_not_name_its_own(paper) -> None:
    fast = {"name": "n-fgsm", "eps": 1 / 255, "noise": 2.0, "step_size": 1 / 255}
    rows = whole(train={"attack": fast})
    assert {"what": "training attack", "ours": "n-fgsm", "paper": "pgd"} in line(rows)["differs"]
    del paper["tables"]["few"]["protocol"]["train_attack"]["name"]
    told = {"what": "training attack options", "ours": "name=n-fgsm", "paper": "the method's defaults"}
    assert line(rows)["differs"] == [told]


@pytest.mark.parametrize("subset", ["all", "base", "new"])
def test_other_class_names_are_told(paper, subset) -> None:
    names = catalog.entry("dtd")["classes"]
    half = (len(names) + 1) // 2
    names = {"base": names[:half], "new": names[half:]}.get(subset, names)
    paper["tables"]["few"]["protocol"]["data"] = ["dtd"]
    paper["tables"]["few"]["rows"][0]["subset"] = subset

    def told(words: list[str]) -> list[str]:
        texts = hashlib.sha256("\n".join(f"{name} texture." for name in words).encode()).hexdigest()
        row = make(
            slice={"subset": subset, "template": "{} texture.", "texts_sha256": texts},
            train={"subset": "all" if subset == "all" else "base"},
        )
        return [fact["what"] for fact in line([row])["differs"]]

    assert told(names) == [] and told(["x", *names[1:]]) == ["class names"]


def test_seeds_that_only_some_sets_have_are_told(paper) -> None:
    (fact,) = line([*whole(), make("dtd", train={"seed": 1})])["differs"]
    assert fact == {"what": "seeds", "ours": "2, not on every set", "paper": "1"}


def test_options_that_are_not_the_defaults_are_told(paper) -> None:
    paper["tables"]["few"]["rows"][0]["method"] = "capt"
    usual = as_options(METHODS["capt"]())
    assert line(whole(method="capt", options=usual))["differs"] == []
    (fact,) = line(whole(method="capt", options=usual | {"lam": 0.0}))["differs"]
    assert fact == {"what": "options", "ours": "lam=0", "paper": "the method's defaults"}


def test_seeds_are_averaged_and_counted(paper) -> None:
    rows = [
        make(data, clean=4 + 2 * seed, train={"seed": seed}) for seed in (0, 1) for data in ("dtd", "pcam", "ucf101")
    ]
    found = line(rows)
    assert found["ours"]["clean_accuracy"] == pytest.approx(0.5)
    assert found["ours"]["clean_sd"] == pytest.approx(0.1414, abs=1e-4)
    assert found["ours"]["n"] == 30
    assert found["differs"] == [{"what": "seeds", "ours": "2", "paper": "1"}]


def test_the_tower_and_the_split_are_compared_when_the_paper_tells(paper) -> None:
    tower = {"method": "tecoa", "on": "imagenet", "eps": "1/255"}
    paper["tables"]["few"]["protocol"] |= {"tower": tower, "split": "CoOp"}
    told = [tuple(fact.values()) for fact in line(whole())["differs"]]
    assert told == [("tuned before", "none", "tecoa"), ("split", "not named", "CoOp's")]
    rows = whole(backbone=TOWER, slice={"split": "CoOp's file"})
    assert line(rows)["differs"] == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"root": "openai/clip-vit-base-patch16"}, ("backbone", "clip-vit-base-patch16", "ViT-B/32")),
        ({"method": "fare"}, ("tuned before", "fare", "tecoa")),
        ({"on": "cifar10"}, ("tower tuned on", "cifar10", "imagenet")),
        ({"attack": INNER | {"eps": 8 / 255}}, ("tower attack eps", "8/255", "1/255")),
        ({"root": None}, ("backbone", "tecoa-imagenet-eps1", "ViT-B/32")),  # an old row
    ],
    ids=str,
)
def test_a_tower_is_known_by_what_it_was_tuned_from_and_how(paper, changes, told) -> None:
    paper["tables"]["few"]["protocol"]["tower"] = {"method": "tecoa", "on": "imagenet", "eps": "1/255"}
    other = whole(clean=10, backbone=TOWER | {"tuned": TOWER["tuned"] | changes, "sha256": "c" * 64})
    assert [tuple(fact.values()) for fact in line(other)["differs"]] == [told]
    if told[0] != "tower tuned on":
        assert line(whole(backbone=TOWER) + other)["ours"]["clean_accuracy"] == pytest.approx(0.6), "the nearest tower"


def test_a_tower_that_the_paper_has_not_is_told(paper) -> None:
    (fact,) = line(whole(backbone=TOWER))["differs"]
    assert fact == {"what": "tuned before", "ours": "tecoa", "paper": "none"}
    assert line(whole(clean=10) + whole(backbone=TOWER))["ours"]["clean_accuracy"] == 1.0


def test_the_average_is_over_the_papers_sets_that_are_there(paper) -> None:
    rows = [make("dtd", clean=8, n=10), make("pcam", clean=40, n=100), make("cifar10", clean=0)]
    found = line(rows)
    assert found["ours"]["sets"] == ["dtd", "pcam"] and found["ours"]["n"] == 110
    assert found["ours"]["clean_accuracy"] == pytest.approx(0.6), "sets count alike, whatever their size"
    assert found["differs"] == [{"what": "test sets", "ours": "2 of 3: dtd, pcam", "paper": "average of 3"}]


def test_the_interval_of_one_set_is_wilsons_and_of_more_it_is_narrower(paper) -> None:
    one = line([make("dtd")])["ours"]
    assert (one["clean_low"], one["clean_high"]) == pytest.approx(wilson(6, 10))
    three = line(whole())["ours"]
    low = 0.6 - (0.6 - wilson(6, 10)[0]) / 3**0.5
    assert three["clean_low"] == pytest.approx(low) and three["clean_high"] < one["clean_high"]


def test_only_the_papers_sets_count(paper) -> None:
    assert line([make("cifar10"), make("mnist")])["ours"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"slice": {"split": "CoOp a.json"}},
        {"slice": {"template": "junk {}", "texts_sha256": "t"}},
        {"slice": {"template": "{} texture.", "texts_sha256": "other names"}},
        {"train": {"template": "junk {}"}},
        {"train": {"split": "CoOp a.json"}},
        {"attack": {"seed": 1}},
        {},
    ],
    ids=str,
)
def test_rows_of_a_set_and_a_seed_are_not_averaged_as_if_they_were_seeds(paper, changes) -> None:
    found = line(whole() + whole(clean=10, robust=9, **changes))["ours"]
    assert found["clean_accuracy"] in (pytest.approx(0.6), 1.0) and len(found["runs"]) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"slice": {"part": "all"}},
        {"train": {"part": "test"}},
        {"train": {"part": "all"}},
        {"backbone": {"tuned": {"method": "tecoa", "part": "test"}}},
    ],
    ids=str,
)
def test_what_saw_test_images_never_stands_beside_a_published_number(paper, changes) -> None:
    newer = whole(clean=10, **changes)
    assert line(newer)["ours"] is None
    assert line(whole() + newer)["ours"]["clean_accuracy"] == pytest.approx(0.6)
    assert "3 rows of ours left out" in render_against(newer, "p", "markdown")


def test_the_split_of_the_paper_goes_before_a_newer_one(paper) -> None:
    paper["tables"]["few"]["protocol"]["split"] = "CoOp"
    found = line(whole(slice={"split": "CoOp a.json"}) + whole(clean=10, slice={"split": "official"}))
    assert found["differs"] == [] and found["ours"]["clean_accuracy"] == pytest.approx(2.2 / 3)  # pcam has no CoOp file


def test_the_nearest_setting_counts(paper) -> None:
    near, far = make(clean=6), make(clean=1, recipe={"epochs": 1})
    assert line([near, far])["ours"]["clean_accuracy"] == line([far, near])["ours"]["clean_accuracy"] == 0.6
    for changes in ({"train": {"shots": 1}}, {"attack": {"eps": 8 / 255}}, {"attack": {"name": "noise"}},
                    {"backbone": {"name": "mini"}}, {"attack": {"steps": 5}},
                    {"train": {"attack": INNER | {"eps": 2 / 255}}}):  # fmt: skip
        assert line([make(clean=1, **changes), near])["ours"]["clean_accuracy"] == 0.6, changes
    assert line([*whole(clean=2), make(clean=1, slice={"limit": 5})])["ours"]["clean_accuracy"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "capt"},
        {"slice": {"subset": "new"}},
        {"slice": {"part": "val"}},
        {"threat": "transfer: images made on B, scored on this model"},
        {"threat": "white-box, behind the defence jpeg"},
        {"train": {"name": "imagenet"}},
        {"train": {"subset": "base"}},
    ],
    ids=str,
)
def test_what_is_something_else_is_not_put_beside(paper, changes) -> None:
    assert line([make(**changes)])["ours"] is None
    assert "| 50.0 | 30.0 | not run | not run | - |" in render_against([make(**changes)], "p", "markdown")


def test_transfer_is_not_mixed_with_tuning_on_the_test_set(paper) -> None:
    paper["tables"]["few"]["protocol"] |= {"train": "imagenet", "data": ["imagenet", "dtd", "pcam"]}
    away = [make(data, clean=4, train={"name": "imagenet", "spec": "imagenet"}) for data in ("imagenet", "dtd")]
    found = line([*away, make("pcam", clean=9)])
    assert found["ours"]["sets"] == ["imagenet", "dtd"] and found["ours"]["clean_accuracy"] == 0.4
    other = line([make("dtd", train={"name": "tinyimagenet"})])
    assert {"what": "tuned on", "ours": "tinyimagenet", "paper": "imagenet"} in other["differs"]


def test_base_and_new_stand_beside_their_own(paper) -> None:
    paper["tables"]["few"]["rows"] = [
        {"method": "tecoa", "subset": s, "clean": 1, "robust": 1} for s in ("base", "new")
    ]
    rows = [make(clean=k, slice={"subset": s}, train={"subset": "base"}) for s, k in (("new", 2), ("base", 7))]
    assert [each["ours"]["clean_accuracy"] for each in against(rows, "p")] == [0.7, 0.2]


def test_ours_stands_beside_the_nearest_shots_and_eps_only(paper) -> None:
    paper["tables"]["few"]["rows"] = [
        {"method": "tecoa", "shots": k, "attack": {"eps": eps}, "clean": 1, "robust": 1}
        for eps in ("1/255", "4/255") for k in (1, 4, 16, "all")
    ]  # fmt: skip
    rows = [make(clean=2, train={"shots": 4}), make(clean=5, train={"shots": None}, attack={"eps": 4 / 255})]
    ours = [each["ours"] and each["ours"]["clean_accuracy"] for each in against(rows, "p")]
    assert ours == [None, 0.2, None, None, None, None, None, 0.5]
    assert sum("not run" in each for each in render_against(rows, "p", "markdown").splitlines()) == 6


def test_untuned_rows_are_not_asked_how_they_were_tuned(paper) -> None:
    paper["tables"]["few"]["rows"] = [{"method": "zero-shot", "clean": 60.0, "robust": None}]
    found = line(whole(method="zero-shot", train=None))
    assert found["differs"] == [] and found["ours"]["clean_accuracy"] == 0.6 and found["ours"]["clean_sd"] is None


def test_rows_of_before_these_keys_and_clean_ones_are_read(paper) -> None:
    row = make()
    facts = {key: value for key, value in json.loads(row.to_json()).items() if key not in ("attack", "robust", "crc32")}
    facts |= {"flags": {"clean": row.flags["clean"]}, "data": {"name": "dtd"}, "backbone": {"name": "mini"}}
    facts["train"] = {"name": "dtd", "seed": 0}
    found = line([Row(**facts)])
    assert found["ours"]["robust_accuracy"] is None and found["ours"]["clean_accuracy"] == 0.6
    assert {"what": "attack", "ours": "none", "paper": "pgd"} in found["differs"]
    assert "60.0 \\[31.3, 83.2\\] | - | 10 |" in render_against([Row(**facts)], "p", "markdown")


def test_another_attack_is_named_in_the_cell_and_common_differences_come_first(paper) -> None:
    paper["tables"]["few"]["rows"].append({"method": "apd", "clean": 1.0, "robust": 1.0, "recipe": {"lr": 0.1}})
    rows = whole(attack={"eps": 4 / 255}) + whole(method="apd", attack={"eps": 4 / 255}, train={"shots": 1})
    assert render_against(rows, "p", "markdown").count("(4/255) |") == 2
    assert what_differs(against(rows, "p")) == [
        "All of ours: attack eps 4/255 (paper: 1/255).",
        "apd: shots 1 (paper: 16).",
    ]


def test_every_format_holds_both_numbers_and_names_do_no_harm(paper) -> None:
    paper["tables"]["few"]["rows"][0]["remark"] = "a|b & 50% $x$ <i> {z}"
    rows = whole(backbone={"name": "x/a|b & 50% $x$ <i>"})
    markdown, latex = render_against(rows, "p", "markdown"), render_against(rows, "p", "latex")
    for text in (markdown, latex):
        assert "30.0" in text and "60.0 " in text and "(paper: ViT-B/32)" in text
    bare = re.sub(r"\\.", "", markdown)
    assert "<i>" not in bare and "$" not in bare
    assert {line.count(" | ") for line in markdown.splitlines() if line.startswith("| ")} == {6}
    for special in "&%${}":
        assert f"\\{special}" in latex
    (record,) = csv.DictReader(io.StringIO(render_against(rows, "p", "csv")))
    assert float(record["robust"]) == 30.0 and float(record["ours.robust_accuracy"]) == pytest.approx(0.3)
    (found,) = json.loads(render_against(rows, "p", "json"))
    assert found["ours"]["n"] == 30 and found["attack"]["eps"] == pytest.approx(1 / 255)
    with pytest.raises(UserError, match="markdown, csv, latex, json"):
        render_against(rows, "p", "html")


def test_the_command(tmp_path, capsys) -> None:
    append(tmp_path / "run" / "results.jsonl", make("caltech101", clean=5, method="fap"))
    assert main(["report", "--against", "fap", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| fap | 16 shots | 65.32 | 34.61 | 50.0 \\[23.7, 76.3\\] | 30.0 \\[10.8, 60.3\\] | 10 |" in text
    assert "test sets 1 of 11: caltech101 (paper: average of 11)" in text
    assert main(["report", "--against", "agft", "--out", str(tmp_path / "t.md")]) == 0, "no rows of ours are needed"
    assert "| agft | under pgd 20 steps step 1/255 | 61.35 | 46.57 | not run" in (tmp_path / "t.md").read_text()
    for arguments, said in ((["--against", "x"], "'x'; known: agft, apd, apt"), ([], "--against fap")):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("name", papers())
def test_a_papers_entry_is_well_formed(name) -> None:
    entry = papers()[name]
    assert set(entry) == {"title", "arxiv", "note", "tables"}
    assert re.fullmatch(r"\d{4}\.\d{5}", entry["arxiv"]) and entry["title"] and entry["tables"]
    for table in entry["tables"].values():
        assert set(table) == {"title", "source", "protocol", "rows"} and set(table["protocol"]) <= FACTS
        assert table["rows"]
        for row in table["rows"]:
            assert set(row) <= FACTS | {"method", "clean", "robust", "recipe", "source", "remark"}
    for row in published(name):
        assert row["method"] in METHODS and row["source"]
        assert all(row[key] is None or 0 <= row[key] <= 100 for key in ("clean", "robust"))
        assert set(row["data"]) <= set(catalog.names()) and len(set(row["data"])) == len(row["data"])
        assert row["train"] in {*catalog.names()} | {"same"} and row["subset"] in ("all", "base", "new")
        assert row["shots"] == "all" or row["shots"] > 0
        for attack in (row["attack"], row["train_attack"]):
            assert set(attack) <= {"name", "eps", "steps", "step_size"}
            assert attack.get("name", "pgd") in ("pgd", "autoattack")
            assert 0 < attack.get("eps", 1 / 255) < 0.05
        assert "eps" in row["attack"]
        facts = {key: value for key, value in row.items() if key not in ("clean", "robust")}
        same = [each for each in published(name) if facts.items() <= each.items()]
        assert len(same) == 1, "a row is there twice"


def test_numbers_of_the_papers_are_where_they_belong() -> None:
    def robust(name: str, table: str, **facts: Any) -> list[float]:
        rows = [row for row in published(name) if row["table"] == table]
        return [row["robust"] for row in rows if all(row.get(key) == value for key, value in facts.items())]

    assert robust("fap", "few-shot", method="fap") == [7.88, 14.05, 19.59, 29.51, 34.61]
    assert robust("fap", "base-to-new", method="fap", subset="new")[0] == 21.86
    assert robust("tga-zsr", "autoattack", method="pmg-aft") == [30.78]
    assert robust("fare", "zero-shot", method="fare", attack={"eps": 4 / 255}) == [20.5, 32.4]
    assert robust("pmg-aft", "transfer") == [24.16, 29.15]
    for name in ("capt", "apd", "apt", "tecoa"):
        assert {row["robust"] for row in published(name)} == {None}, "no number of this paper has a source"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_plans_and_names_what_there_is(path) -> None:
    text, study = path.read_text(), from_facts(read(path), path.name)
    assert f"advtune study recipes/{path.name} --out" in text
    assert "# Hardware:" in text and "# Hours:" in text and "# Ours:" in text
    assert study.shots and study.attacks and plan(study)
    assert {*study.data, study.train_on or "dtd"} <= set(catalog.names())
    if not study.paper:  # no table of a paper: only of ours
        assert path not in FULL
        return
    assert f"advtune report --against {study.paper} runs/{path.stem}" in text
    assert study.paper in papers() and study.table in papers()[study.paper]["tables"]
    table = [row for row in published(study.paper) if row["table"] == study.table]
    wanted = {row["method"] for row in table}
    assert wanted & set(study.methods), "nothing of the table would be run"
    if path in FULL:
        printed = text.partition("# Printed:")[2].partition("# Ours:")[0]
        shown = sorted(PRINTED.findall(" ".join(printed.replace("#", " ").split())))
        known = [row for row in table if row["robust"] is not None]
        assert shown == sorted((row["method"], str(row["clean"] or "-"), str(row["robust"])) for row in known)
        assert shown or "no absolute number" in printed
        assert wanted <= set(study.methods)
        assert {each for row in table for each in row["data"]} <= {*study.data, study.train_on}


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_a_recipe_tunes_as_the_papers_rows_say(path) -> None:
    study = from_facts(read(path), path.name)
    for run in plan(study):
        rows = [row for row in published(study.paper) if (row["table"], row["method"]) == (study.table, run.method)]
        ours, want = run.settings(), [row["recipe"] for row in rows]
        if want and ours["method"] != "zero-shot":
            assert any(recipe.items() <= ours["recipe"].items() for recipe in want), (run.method, ours["recipe"], want)
            told = [(row["train_attack"]["eps"], row["train_attack"]["steps"]) for row in rows]
            assert (ours["attack"]["eps"], ours["attack"]["steps"]) in [pytest.approx(each) for each in told], (
                run.method
            )


def test_there_is_a_recipe_for_each_paper() -> None:
    studies = [from_facts(read(path), path.name) for path in RECIPES]
    assert {study.paper for study in studies if study.paper} == set(papers()) - {"tecoa"}
    for study in (each for each in studies if each.backbone == "mini"):
        assert set(study.data) <= set(catalog.names()), "an offline recipe needs what is here"


def test_what_is_re_printed_says_so() -> None:
    for source in {row["source"] for name in papers() for row in published(name)}:
        assert ("re-printed" not in source and "not at hand" not in source) or source.endswith("not checked by us")
