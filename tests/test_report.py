"""Reports: what is merged, what must never be, and that every format reads back."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from advtune.cli import main
from advtune.errors import UserError
from advtune.report import render, scatter, table
from advtune.report.table import pixels
from advtune.results import Row, accuracy, wilson

N = 10
NASTY = r"a|b & 50% _x_ #1 $y$ {z} ~ ^ \ <i> *s* `c` [l](u) é ± 中 **b** \| " + '"q"'
ATTACK = {"name": "pgd", "eps": 4 / 255, "steps": 20, "step_size": 1 / 255, "seed": 0}


def make(method: str = "tecoa", clean: int = 6, robust: int = 3, seed: int | None = 0, **changes: Any) -> Row:
    """A row with so many right of N; `seed` None is zero-shot; dicts are added to."""
    flags = {name: "1" * k + "0" * (N - k) for name, k in (("clean", clean), ("robust", robust))}
    train: dict[str, Any] | None = {"name": "imagenet", "part": "all", "shots": 16, "attack": {"name": "pgd"}}
    train = None if seed is None else train | {"seed": seed, "n": 160, "sha256": f"t{seed}"}  # type: ignore[operator]
    if train is not None:
        train |= changes.pop("train", {})
    data = {
        "spec": "pets",
        "name": "pets",
        "part": "test",
        "n": N,
        "resolution": 224,
        "sha256": "d",
        "seed": 0,
    }
    data |= {"template": "a photo of a {}.", "texts_sha256": "e", "skipped": 0} | changes.pop("data", {})
    facts: dict[str, Any] = {
        "method": method,
        "options": {"alpha": 1.0},
        "recipe": {} if seed is None else {"epochs": 5},
        "train": train,
        "backbone": {"name": "tiny", "sha256": "b" * 64, "notice": ""} | changes.pop("backbone", {}),
        "data": data,
        "attack": ATTACK,
        "threat": "white-box",
        "clean": accuracy(flags["clean"]),
        "robust": accuracy(flags["robust"]),
        "flags": flags,
        "zero_gradient": {"share": 0.0, "n": N},
    }
    return Row(**(facts | changes))


def clean_only() -> Row:
    row = make()
    return replace(row, attack=None, robust=None, zero_gradient=None, flags={"clean": row.flags["clean"]})


def cells(markdown: str) -> list[list[list[str]]]:
    """Tables -> lines -> cells, as a reader of the rendered page sees them."""
    tables: list[list[list[str]]] = []
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)
    for before, token in pairwise(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif before.type in ("th_open", "td_open"):
            assert all(child.type in ("text", "text_special") for child in token.children or [])
            tables[-1][-1].append("".join(child.content for child in token.children or []))
    return tables


def test_no_rows() -> None:
    for call in (table, lambda rows: render(rows, "csv"), lambda rows: scatter(rows, "x.png")):
        with pytest.raises(UserError, match="no result rows"):
            call([])
    with pytest.raises(UserError, match="choose from markdown"):
        render([make()], "html")


def test_single_seed_has_its_wilson_interval() -> None:
    (line,) = table([make(clean=6, robust=3)])
    assert (line["clean_accuracy"], line["clean_sd"], line["clean_n"]) == (0.6, None, N)
    assert (line["robust_low"], line["robust_high"]) == wilson(3, N)
    low, high = (f"{100 * each:.1f}" for each in wilson(3, N))
    assert rf"30.0 \[{low}, {high}\]" in render([make()], "markdown")


def test_seeds_merge_into_mean_and_spread() -> None:
    rows = [make(seed=seed, robust=k) for seed, k in ((0, 2), (1, 3), (2, 4))]
    (line,) = table(rows)
    assert line["seeds"] == [0, 1, 2] and line["robust_values"] == [0.2, 0.3, 0.4]
    assert line["robust_accuracy"] == pytest.approx(0.3) and line["robust_sd"] == pytest.approx(0.1)
    assert (line["robust_low"], line["robust_high"]) == wilson(3, N)
    assert "30.0 ± 10.0" in render(rows, "markdown") and "0, 1, 2" in render(rows, "markdown")


@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"alpha": 2.0}},
        {"recipe": {"epochs": 9}},
        {"train": {"shots": 4}},
        {"train": {"spec": "other"}},
        {"train": {"attack": {"name": "fgsm"}}},
        {"data": {"template": "{}"}},
        {"data": {"texts_sha256": "other"}},
        {"threat": "transfer"},
        {"precision": "bf16"},
    ],
)
def test_what_is_not_a_seed_is_a_line_with_its_own_label(changes: dict[str, Any]) -> None:
    rows = [make(), make(seed=1), make(**changes)]
    assert [line["seeds"] for line in table(rows)] == [[0, 1], [0]]
    ((_, one, two),) = cells(render(rows, "markdown"))
    assert one[:2] != two[:2]


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"name": "dtd"}},
        {"data": {"part": "new"}},
        {"data": {"resolution": 32}},
        {"attack": ATTACK | {"eps": 1 / 255}},
        {"attack": ATTACK | {"steps": 3}},
        {"attack": ATTACK | {"step_size": 2 / 255}},
        {"backbone": {"sha256": "other"}},
    ],
)
def test_what_cannot_be_compared_is_another_section(changes: dict[str, Any]) -> None:
    rows = [make(), make(seed=1), make(**changes)]
    assert [line["section"] for line in table(rows)] == [0, 1]
    assert len(cells(render(rows, "markdown"))) == 2


def test_another_template_says_so_without_the_hash_of_its_texts() -> None:
    line = table([make(), make(data={"template": "{}", "texts_sha256": "other"})])[1]
    assert line["differs"] == {"template": "{}"}


def test_clean_only_is_another_section_without_a_robust_column() -> None:
    with_attack, without = cells(render([make(), clean_only()], "markdown"))
    assert with_attack[0][-1] == "Robust %" and without[0][-1] == "Clean %"
    assert "no attack" in render([clean_only()], "markdown")


def test_the_latest_of_a_repeated_evaluation_counts() -> None:
    old = make(robust=1, time="2025-01-01T00:00:00+00:00", device="cpu", run="a")
    new = make(robust=4, time="2025-01-02T00:00:00+00:00", device="cuda", run="b", seconds=9.0)
    for rows in ([old, new], [new, old]):
        (line,) = table(rows)
        assert line["robust_values"] == [0.4] and line["runs"] == ["b"]


def test_zero_shot_first_then_as_first_seen() -> None:
    rows = [make("tecoa"), make("apd"), make("zero-shot", seed=None), make("capt")]
    assert [line["method"] for line in table(rows)] == ["zero-shot", "tecoa", "apd", "capt"]


def test_zero_shot_shows_no_false_difference() -> None:
    rows = [make("zero-shot", seed=None), make("tecoa")]
    ((_, one, two),) = cells(render(rows, "markdown"))
    assert one[:3] == ["zero-shot", "-", "-"] and two[:3] == ["tecoa", "imagenet all, 16 shots", "0"]


def test_heading_carries_attack_eps_steps_and_n() -> None:
    text = render([make()], "markdown")
    assert "### pets test, n = 10, 224 px · pgd eps 4/255, 20 steps · tiny" in text
    assert "step_size=1/255" in text and "Threat: white-box" in text


def test_pixels() -> None:
    values = (4 / 255, 1 / 255, 0, 0.0, 0.5, 0.01, 1.0, 0.25 / 255, 2.5 / 255, 128.5 / 255)
    assert [pixels(value) for value in values] == [
        *("4/255", "1/255", "0", "0", "0.5", "0.01", "1", "0.25/255", "2.5/255", "0.503922"),
    ]


def test_footnotes() -> None:
    rows = [
        make("capt", reconstructed=["alpha", "beta"], backbone={"notice": "stand-in, not OpenAI CLIP"}),
        make("tecoa", zero_gradient={"share": 0.101, "n": N}, backbone={"notice": "stand-in, not OpenAI CLIP"}),
        make("apd", zero_gradient={"share": 0.1, "n": N}, data={"sha256": "other", "skipped": 2}, notes=["odd"]),
    ]
    text = render(rows, "markdown")
    assert "| capt † |" in text and "† capt: no public source gives alpha, beta" in text
    assert text.count("Backbone tiny: stand-in, not OpenAI CLIP") == 1
    assert "Warning, tecoa: 10.1 %" in text and "Warning, apd" not in text
    assert "Not all numbers here come from the same images" in text and "same class texts" not in text
    assert "skipped: 2" in text and "odd: apd" in text
    plain = render([make()], "markdown")
    assert "†" not in plain and "Warning" not in plain and "Not all" not in plain


@pytest.mark.parametrize("name", ["plain", NASTY, "a\nb", "__init__", "~~x~~", "&lt;"])
def test_markdown_shows_names_as_they_are(name: str) -> None:
    rows = [make(name), make(name, options={"alpha": 2.0}), make(data={"name": name}, reconstructed=["a|b"])]
    found = cells(render(rows, "markdown"))
    assert len(found) == 2 and {len(line) for each in found for line in each} == {6}
    assert found[0][1][0] == f"{' '.join(name.split())} (alpha 1)"
    raw = [re.split(r"(?<!\\)\|", line) for line in render(rows, "markdown").splitlines() if line.startswith("|")]
    assert {len(line) for line in raw} == {8}


def test_csv_reads_back_at_full_precision() -> None:
    rows = [make("zero-shot", seed=None), make(NASTY, seed=0, robust=1), make(NASTY, seed=1), clean_only()]
    found = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [line["method"] for line in found] == ["zero-shot", NASTY, "tecoa"]
    assert float(found[1]["eps"]) == 4 / 255 and float(found[1]["robust_low"]) == wilson(2, N)[0]
    assert json.loads(found[1]["robust_values"]) == [0.1, 0.3] and json.loads(found[1]["seeds"]) == [0, 1]
    assert found[2]["robust_accuracy"] == "" and found[1]["settings.options.alpha"] == "1.0"
    assert all(None not in line and None not in line.values() for line in found)


def test_json_reads_back() -> None:
    rows = [make(), make(seed=1), make(NASTY, run="r1")]
    assert json.loads(render(rows, "json")) == table(rows)
    assert table(rows)[1]["runs"] == ["r1"] and table(rows)[0]["train_sha256"] == ["t0", "t1"]


def test_latex_escapes() -> None:
    text = render([make(NASTY), make(data={"name": NASTY}, notes=[NASTY])], "latex")
    assert (
        r"a\textbar{}b \& 50\% \_x\_ \#1 \$y\$ \{z\} \textasciitilde{} \textasciicircum{} \textbackslash{} "
        r"\textless{}i\textgreater{} {*}s{*}"
    ) in text
    assert r"é $\pm$ {[}U+4E2D]" in text and "中" not in text
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == 5
        bare = re.sub(r"\\[&%_#${}\\]", "", line)
        assert not set(bare) & set('%_#~^"|<>') and bare.count("{") == bare.count("}")
        assert bare.count("$") % 2 == 0
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2


def test_scatter_writes_a_picture(tmp_path: Path) -> None:
    rows = [make("zero-shot", 8, 0, seed=None), make("tecoa $x$", 6, 3), make("capt", 10, 10), clean_only()]
    scatter(rows, tmp_path / "one.png", title="Pets $y$")
    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000
    assert struct.unpack(">II", content[16:24]) == (624, 528)
    scatter([*rows, make(data={"name": "dtd"})], tmp_path / "two.png")
    assert struct.unpack(">II", (tmp_path / "two.png").read_bytes()[16:24]) == (1248, 528)
    scatter(rows, tmp_path / "one.svg")
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()


def test_scatter_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="robust accuracy"):
        scatter([clean_only()], tmp_path / "x.png")
    with pytest.raises(UserError, match=r"end the name in \.png"):
        scatter([make()], tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())


STAGES = [
    {"attack": "apgd-ce", "attacked": 6, "fell": 2, "seconds": 1.0},
    {"attack": "square", "attacked": 4, "fell": 1, "seconds": 2.0},
]
AUTO = {
    "name": "autoattack",
    "eps": 4 / 255,
    "norm": "linf",
    "version": "standard",
    "seed": 0,
    "stages": [{"name": "x"}],
}


def finding(name: str = "gap", alarm: bool = True, **changes: Any) -> dict[str, Any]:
    facts = {"name": name, "alarm": alarm, "value": 0.25, "limit": 0.05, "n": 40}
    return facts | {"text": f"{name} takes 25.0 points & more"} | changes


def test_alarms_are_footnotes() -> None:
    fine, bad = finding("noise", False), finding()
    rows = [make("tecoa", checks=[fine, bad]), make("capt", checks=[fine])]
    text = render(rows, "markdown")
    assert r"Alarm, tecoa: gap takes 25.0 points \& more (n = " in text
    assert text.count("Alarm") == 1 and "Checks without an alarm" not in text
    assert r"Alarm, tecoa: gap takes 25.0 points \& more (n = " in render(rows, "latex")
    one, two = json.loads(render(rows, "json"))
    assert one["checks"] == ["noise", "gap"] and two["checks"] == ["noise"]
    assert one["alarms"] == [{"name": "gap", "value": 0.25, "n": 40, "text": bad["text"]}] and two["alarms"] == []
    first = next(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert json.loads(first["alarms"]) == one["alarms"] and json.loads(first["checks"]) == ["noise", "gap"]


def test_checks_without_an_alarm_are_named_and_prove_nothing() -> None:
    rows = [make("tecoa", checks=[finding("noise", False), finding("gap", False)]), make("capt")]
    for kind in ("markdown", "latex"):
        text = render(rows, kind)
        assert "Checks without an alarm on 1 of 2 lines: gap, noise. They prove nothing" in text
        assert "Alarm," not in text
    assert "Checks" not in render([make()], "markdown")


def test_an_alarm_of_one_seed_is_an_alarm_of_the_line() -> None:
    rows = [make(seed=0, checks=[finding("gap", False)]), make(seed=1, checks=[finding("gap")])]
    (line,) = table(rows)
    assert line["checks"] == ["gap"] and [each["name"] for each in line["alarms"]] == ["gap"]
    assert "Alarm, tecoa: gap" in render(rows, "markdown")
    other = make(data={"name": "dtd"}, checks=[finding("noise", False)])
    assert "Checks without an alarm: noise" in render([*rows, other], "markdown")  # another section


def test_stage_counts_are_footnotes_summed_over_seeds() -> None:
    rows = [make(attack=AUTO, stages=STAGES, seed=seed) for seed in (0, 1)]
    text = render(rows, "markdown")
    assert "tecoa: apgd-ce broke 4 of 12, square broke 2 of 8." in text
    assert "tecoa: apgd-ce broke 4 of 12, square broke 2 of 8." in render(rows, "latex")
    (line,) = json.loads(render(rows, "json"))
    assert line["stages"] == [
        {"attack": "apgd-ce", "attacked": 12, "fell": 4}, {"attack": "square", "attacked": 8, "fell": 2},
    ]  # fmt: skip
    assert "stages" not in line["attack_options"]  # they follow from the attack
    assert "autoattack eps 4/255 ·" in text and "version=standard" in text
    single = render([make(stages=STAGES[:1])], "markdown")
    assert "broke" not in single  # the row says it already


def test_an_ensembles_stages_tell_sections_apart() -> None:
    rows = [make(attack=AUTO), make(attack=AUTO | {"stages": [{"name": "y"}]})]
    assert [line["section"] for line in table(rows)] == [0, 1]


def test_the_norm_is_in_the_heading_when_it_is_not_linf() -> None:
    l2 = render([make(attack=ATTACK | {"norm": "l2", "eps": 0.5})], "markdown")
    assert "pgd l2 eps 0.5, 20 steps" in l2 and "linf" not in l2
    assert "pgd l2 eps 128/255, 20" in render([make(attack=ATTACK | {"norm": "l2", "eps": 128 / 255})], "latex")
    linf = render([make(attack=ATTACK | {"norm": "linf"})], "markdown")
    assert "pgd eps 4/255, 20 steps" in linf and "linf" not in linf
    rows = [make(attack=ATTACK | {"norm": norm}) for norm in ("linf", "l2")]
    assert [line["norm"] for line in json.loads(render(rows, "json"))] == ["linf", "l2"]


def test_a_curve_is_a_section_for_each_eps() -> None:
    note = "images that fell at a smaller eps were not attacked again"
    rows = [make(robust=4), make(robust=2, attack=ATTACK | {"eps": 8 / 255}, notes=[note])]
    text = render(rows, "markdown")
    assert text.count("### ") == 2 and text.count(f"{note}: tecoa") == 1


def test_another_threat_in_a_section_is_in_the_label() -> None:
    rows = [make(), make(threat="transfer: images made on B, scored on this model")]
    text = render(rows, "markdown")
    assert "tecoa (threat transfer: images made on B" in text
    behind = replace(clean_only(), threat="behind the defence jpeg")
    found = table([clean_only(), behind])
    assert [line["differs"] for line in found] == [{"threat": "white-box"}, {"threat": "behind the defence jpeg"}]


def test_subsets_and_splits_are_told_apart_and_older_rows_are_over_all():
    old, named = make(seed=0), make(seed=1, data={"subset": "all", "split": "as given"}, train={"subset": "all"})
    new, base = make(seed=0, data={"subset": "new"}), make(seed=0, data={"subset": "base"})
    other = make(seed=2, data={"split": "CoOp split_zhou_Pets.json"})
    lines = table([old, named, new, base, other])
    assert [(line["subset"], line["seeds"]) for line in lines] == [
        ("all", [0, 1]), ("all", [2]), ("new", [0]), ("base", [0]),
    ]  # fmt: skip
    assert lines[1]["differs"] == {"split": "CoOp split_zhou_Pets.json"}
    assert "pets new test" in render([new], "markdown")
    tuned = [make(seed=seed, train={"subset": subset}) for seed, subset in ((0, "all"), (1, "base"))]
    assert len(table(tuned)) == 2
    assert "imagenet base all" in render(tuned, "markdown")


def test_rows_that_do_not_name_a_later_field_of_an_attack_are_of_the_same_setting():
    now = {"loss": "ce", "eot": 1, "bpda": False, "norm": "linf"}
    stages = [{"name": "apgd-ce", "eps": 4 / 255}, {"name": "square", "eps": 4 / 255}]
    old = ATTACK | {"stages": stages}
    new = ATTACK | now | {"stages": [stage | {"bpda": False} for stage in stages]}
    lines = table([make("tecoa", attack=old), make("capt", attack=new)])
    assert len({line["section"] for line in lines}) == 1
    tuned = [make(seed=i, train={"attack": {"name": "pgd"} | more}) for i, more in enumerate(({}, now))]
    assert [line["seeds"] for line in table(tuned)] == [[0, 1]]
    again = [make("tecoa", attack=old), make("tecoa", robust=5, attack=new)]
    assert [line["robust_accuracy"] for line in table(again)] == [0.5]
    for other in ({"bpda": True}, {"eot": 2}, {"loss": "dlr"}, {"norm": "l2"}):
        assert len(table([make("tecoa", attack=old), make("tecoa", attack=new | other)])) == 2


def test_latex_tables_stay_on_the_page():
    short = render([make("tecoa"), make("capt")], "latex")
    assert r"\footnotesize\tabcolsep" in short and "scriptsize" not in short
    assert short.count(r"\begin{tabular}{lllrrr}") == 1
    rows = [make("tecoa", options={"alpha": a, "a_rather_long_option": f"value {a}"}) for a in range(60)]
    wide = render(rows, "latex")
    parts = wide.count(r"\begin{tabular}")
    assert parts > 1 and wide.count("Method & ") == parts and r"\scriptsize" in wide
    assert r"{p{0.2\textwidth}" in wide and wide.count(r"\raggedright tecoa (") == len(rows)
    assert max(len(part.splitlines()) for part in wide.split(r"\begin{tabular}")[1:-1]) < 50


def test_a_note_of_several_lines_stands_once():
    rows = [make(name, notes=["warm-up cut", f"only {name}"]) for name in ("tecoa", "capt")]
    rows += [make("apd", options={"alpha": alpha}, notes=["depth cut"]) for alpha in (1.0, 2.0, 3.0, 4.0)]
    for kind in ("markdown", "latex"):
        text = render(rows, kind)
        assert "warm-up cut: tecoa, capt" in text and "only capt: capt" in text and "depth cut: apd (4 lines)" in text


def test_a_place_without_rows(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    for name, said in (("rums", f"no such file or folder; did you mean {tmp_path}/runs?"),
                       ("else/where", "no such file or folder; name a run folder"),
                       ("runs", "no results.jsonl; evaluate first: advtune evaluate DIR")):  # fmt: skip
        assert main(["report", str(tmp_path / name), "--out", str(tmp_path / "out.md")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not (tmp_path / "out.md").exists()
