"""The page, its figures and its gallery: numbers are the rows', nothing is escaped badly or asked of the network."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import advtune
from advtune.cli import main
from advtune.data import Split, load_images
from advtune.errors import UserError
from advtune.evaluation import evaluate_all
from advtune.report import figures, table
from advtune.report.classes import labelled, per_class
from advtune.report.found import gather, headline, log_of, measured, terms_of
from advtune.report.gallery import choose, examples, gallery
from advtune.report.html import SIDE, _why, page, tensor_uri
from advtune.report.plot import COLOURS, pareto, scatter_panels
from advtune.report.summary import tiles, words
from advtune.results import accuracy, wilson
from conftest import write_images
from test_report import ATTACK, NASTY, N, clean_only, finding, make

SCRIPT = "<script>alert(1)"
VOID = {"meta", "img", "col", "br", "rect"}
SECTIONS = {"summary", "tables", "scatter", "eps", "classes", "training", "reading"}


class Read(HTMLParser):
    """A page as a browser takes it: tags with their attributes, the text inside each section, and of table cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.stack, self.sections, self.cells, self.text = [], [], {}, [], ""
        self.feed(text)
        assert not self.stack, "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.stack.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        inside = [name for name, _ in self.stack]
        if "style" in inside:
            return
        self.text += data
        for name, place in self.stack:
            if name == "section":
                self.sections[place] = self.sections.get(place, "") + data
        if "td" in inside or "th" in inside:
            self.cells[-1] = self.cells[-1].lstrip() + data.rstrip("\n")

    def pictures(self, section=""):
        return [attrs for tag, attrs in self.tags if tag == "img" and section in attrs["alt"]]


def eps(value, **changes):
    return make(attack=ATTACK | {"eps": value / 255, "step_size": value / 4 / 255}, **changes)


def test_the_pareto_front_of_known_points():
    points = [(1, 5), (3, 4), (2, 4), (3, 3), (5, 1), (5, 1), (0, 5), (4, 0)]
    assert [points[i] for i in pareto(points)] == [(1, 5), (3, 4), (5, 1), (5, 1)]
    assert pareto([]) == []


def test_an_eps_curve_is_all_rows_that_differ_in_eps_step_and_seed():
    rows = [eps(4, robust=2), eps(1, robust=4), eps(1, robust=5, seed=1), eps(4, robust=1, seed=1)]
    rows += [eps(1, method="zero-shot", seed=None, clean=8, robust=1), make("capt"), clean_only()]
    ((title, curves),) = figures.eps_curves(rows)
    assert title == "pets test, n = 10, 224 px · pgd, 20 steps · tiny"
    (curve,) = curves  # the others have one eps alone
    assert curve.name == "tecoa"
    assert [point[0] * 255 for point in curve.points] == pytest.approx([0, 1, 4])
    assert [point[1] for point in curve.points] == pytest.approx([0.6, 0.45, 0.15])
    assert [point[2:] for point in curve.points] == [(*wilson(k, N), N) for k in (6, 4, 2)]
    assert len(figures.eps_panels(rows)) == 1


def test_two_attacks_at_one_eps_are_no_curve():
    other = make(attack=ATTACK | {"eps": 1 / 255, "step_size": 1 / 255})
    assert figures.eps_curves([eps(1), eps(4), other]) == [] and figures.eps_curves([eps(1), other]) == []
    assert figures.eps_panels([clean_only()]) == []


def test_curves_are_named_by_what_tells_them_apart():
    rows = [eps(value, options={"alpha": alpha}) for alpha in (1.0, 2.0) for value in (1, 4)]
    rows += [eps(value, method="zero-shot", seed=None, robust=1) for value in (1, 4)]
    ((_, curves),) = figures.eps_curves(rows)
    found = [(curve.name, curve.points[-1][1]) for curve in curves]
    assert found == [("zero-shot", 0.1), ("tecoa (alpha 1)", 0.3), ("tecoa (alpha 2)", 0.3)]


def test_classes_by_hand():
    labels = [0, 0, 1, 1, 1, 2]
    flags = [{"clean": "101101", "robust": "100100"}, {"clean": "111101", "robust": "110000"}]
    counts = [{name: accuracy(text) for name, text in each.items()} for each in flags]
    rows = [replace(make(seed=i), flags=each, **counts[i]) for i, each in enumerate(flags)]
    lines = per_class(rows, labels, ["a", "b", "c", "no image"])
    assert [(line.name, line.n) for line in lines] == [("a", 2), ("b", 3), ("c", 1)]
    assert [line.clean for line in lines] == pytest.approx([1.5 / 2, 2 / 3, 1])
    assert [line.robust for line in lines] == pytest.approx([1.5 / 2, 0.5 / 3, 0])
    assert (lines[0].low, lines[0].high) == wilson(2, 2) and (lines[2].low, lines[2].high) == wilson(0, 1)
    assert figures.fragile([lines]) == ["c", "b", "a"] and figures.fragile([lines], 1) == ["c"]
    with pytest.raises(ValueError):
        per_class(rows, labels[:-1], ["a", "b", "c"])


def test_the_numbers_of_the_page_are_the_rows():
    rows = [make("zero-shot", 8, 0, seed=None), make("tecoa", 6, 3), make("tecoa", 5, 4, seed=1), make("capt", 7, 2)]
    read = Read(page(rows, {}, gallery=False))
    assert set(read.sections) == SECTIONS
    for line in table(rows):
        for name in ("clean", "robust"):
            mean, sd, low, high = (line[f"{name}_{key}"] for key in ("accuracy", "sd", "low", "high"))
            spread = "" if sd is None else f" ± {100 * sd:.1f}"
            assert f"{100 * mean:.1f}{spread} [{100 * low:.1f},\u00a0{100 * high:.1f}]" in read.cells
    assert [cell for cell in read.cells if "Pareto front" in cell] == [
        "zero-shot Pareto front", "tecoa Pareto front", "capt Pareto front",
    ]  # fmt: skip
    bars = [float(attrs["width"]) for tag, attrs in read.tags if attrs.get("class") == "span"]
    assert bars[2] == pytest.approx(100 * (wilson(6, N)[1] - wilson(6, N)[0]), abs=0.02)  # 5.5 of 10 rounds to 6
    assert len(read.pictures("Clean against robust")) == 1 and not read.pictures("eps:")
    assert "one eps alone" in read.sections["eps"] and "train.jsonl" in read.sections["training"]
    assert "do not say where their data" not in read.sections["classes"] and "Not to be had" in read.sections["classes"]


def test_findings_stand_in_the_line_they_are_of():
    rows = [make("tecoa", checks=[finding("noise", False), finding()]), make("capt", checks=[finding("noise", False)])]
    rows += [make("apd", zero_gradient={"share": 0.4, "n": N})]
    read = Read(page(rows, {}, gallery=False))
    checks = [read.cells[i + 1] for i, cell in enumerate(read.cells) if re.match(r"30\.0 \[", cell)]
    assert checks == [
        "ALARMgap: gap takes 25.0 points & more (n = 40)", "1 made, no alarm",
        f"ALARM40.0 % of the input gradients (n = {N}) were exactly zero: the attack may have seen nothing",
    ]  # fmt: skip
    assert "2 alarms, on tecoa and apd" in read.sections["summary"]
    assert ("alarms", "2", "2 of 3 lines were checked") in tiles(measured(rows, {}))


def test_the_summary_in_words():
    own = {"backbone": {"notice": "a stand-in, not OpenAI CLIP"}}
    rows = [make("zero-shot", 8, 0, seed=None, **own), make("capt", 5, 4, reconstructed=["lam"], **own)]
    rows += [make("tecoa", 7, 3, **own)]
    told = dict(words(measured(rows, {})))
    low, high = (f"{100 * each:.1f}" for each in wilson(4, N))
    assert told["Most robust"].startswith(f"capt, 40.0 % [{low}, {high}] robust and 50.0 %")
    assert "overlaps with that of zero-shot and tecoa" in told["Most robust"]
    assert "Also on the Pareto front of clean and robust: tecoa and zero-shot" in told["Most robust"]
    assert told["Measured"].startswith(
        "zero-shot, capt and tecoa on pets test (10 images), attacked with pgd eps 4/255"
    )
    assert "No line was checked" in told["Trust"] and "upper bound" in told["Trust"]
    assert "(capt: lam)" in told["Reconstructed"]
    read = Read(page(rows, {}, gallery=False))
    assert read.sections["summary"].count("tiny: a stand-in, not OpenAI CLIP") == 1
    plain = dict(words(measured([clean_only()], {})))
    assert "say nothing of robustness" in plain["Trust"] and not {"Reconstructed", "Most robust"} & set(plain)


def test_pictures_show_the_largest_section_and_the_best_setting_of_each_method():
    auto = ATTACK | {"name": "autoattack"}
    rows = [make("zero-shot", seed=None), make("tecoa", robust=2), make("tecoa", robust=4, options={"alpha": 2.0})]
    rows += [make("zero-shot", seed=None, attack=auto), make("capt", attack=auto), clean_only()]
    assert [each.name for each in headline(measured(rows, {}))] == ["zero-shot", "tecoa (alpha 2)"]
    assert {each.line["attack"] for each in headline(measured(rows[1:], {}))} == {"autoattack"}
    assert headline(measured([clean_only()], {}))[0].line["attack"] is None


def test_names_from_rows_are_text():
    names = [NASTY, SCRIPT, '"><img src=x onerror=alert(1)>', "{{ 7*7 }}"]
    rows = [make(name, notes=[name], reconstructed=[name], checks=[finding(text=name)],
                 data={"name": NASTY}, backbone={"name": SCRIPT, "notice": SCRIPT}) for name in names]  # fmt: skip
    text = page(rows, {}, gallery=False, title=SCRIPT)
    read = Read(text)
    for name in names:
        assert [cell for cell in read.cells if cell.startswith(f"{name} †")] and f"gap: {name} (n = 40)" in read.text
        assert name in read.sections["summary"] and f"{name}: {name}" in read.sections["tables"]
    _self_contained(read, text)


def _self_contained(read, text):
    """Nothing that a browser would fetch or run, but pictures in the page; those are whole and hold no script."""
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & {tag for tag, _ in read.tags}
    for tag, attrs in read.tags:
        assert not any(key.startswith("on") for key in attrs), (tag, attrs)
        assert attrs.get("href", "#").startswith("#") and attrs.get("src", "data:image/").startswith("data:image/")
    assert "url(" not in text and "@import" not in text
    for attrs in read.pictures():
        kind, _, content = attrs["src"].removeprefix("data:image/").partition(";base64,")
        content = base64.b64decode(content, validate=True)
        if kind == "svg+xml":
            drawn = ElementTree.fromstring(content)
            assert not [each for each in drawn.iter() if each.tag.endswith(("script", "foreignObject", "}image"))]
        else:
            assert content.startswith({"png": b"\x89PNG", "jpeg": b"\xff\xd8"}[kind])
    assert len(text) < 2_000_000


def test_a_log_that_was_cut(tmp_path):
    lines = [{"step": i, "epoch": i // 2, "lr": 0.1, "ce": float(i), "pull": 0.0} for i in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "ce"')
    assert log_of(tmp_path) == lines and terms_of(log_of(tmp_path)) == ["ce", "pull"]
    assert log_of(tmp_path / "none") == []
    steps, values = figures.thinned([(float(i), 2.0 * i) for i in range(figures.POINTS + 2)])
    assert len(steps) <= figures.POINTS and (steps[0], values[0]) == (0.5, 1.0)


def test_gallery_images_are_chosen_by_flags():
    zero = make()
    before = replace(zero, clean=accuracy("1111110011"), flags=zero.flags | {"clean": "1111110011"})
    tuned = replace(
        make(), clean=accuracy("1111011100"), robust=accuracy("0110010000"),
        flags={"clean": "1111011100", "robust": "0110010000"},
    )  # fmt: skip
    labels = [0, 1, 1, 2, 0, 0, 1, 2, 0, 1]
    assert choose(before, tuned, labels, 5) == [1, 5, 2, 0, 3]  # three that stand, new classes first, two that fall
    assert choose(None, tuned, labels, 10)[5:] == [
        6,
        7,
        4,
        9,
        8,
    ]  # then the right one, then the rest, new classes first


def test_an_attacked_image_stays_in_its_ball_and_its_classes_add_up(vlm, task):
    images = load_images(task, Split(resolution=16), progress=False)
    x, y = images.batch(torch.arange(6), torch.device("cpu"))
    attack = advtune.PGD(eps=3 / 255, steps=4)
    shown = examples({"a": vlm, "b": vlm}, task, x, y, attack)
    f = vlm.classifier(vlm.tokens(task.classes, task.template))
    for i, each in enumerate(shown):
        assert torch.equal(each.x, x[i]) and each.truth == task.classes[int(y[i])]
        assert [view.model for view in each.views] == ["a", "b"]
        for view in each.views:
            assert 0 < float((view.x_adv - x[i]).abs().max()) <= 3 / 255 + 1e-6
            p = f(view.x_adv[None]).softmax(1)[0]
            assert dict(view.after) == pytest.approx(dict(zip(task.classes, p.tolist(), strict=True)), abs=1e-5)
            assert view.before[0][0] == task.classes[int(f(x[i][None]).argmax())]


def test_a_picture_is_the_image_and_a_large_one_is_made_small():
    import io

    from PIL import Image

    def opened(uri):
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    x = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    image = opened(tensor_uri(x))
    assert image.format == "PNG" and image.size == (7, 5)
    assert image.getpixel((2, 3)) == tuple((255 * x[:, 3, 2]).round().int().tolist())
    large = opened(tensor_uri(torch.rand(3, 2 * SIDE, 4 * SIDE)))
    assert large.format == "JPEG" and large.size == (SIDE, SIDE // 2)


@pytest.fixture
def run(clip_folder, tmp_path):
    """A tuned run on classes with hostile names, evaluated beside zero-shot at two eps."""
    classes = (SCRIPT, "a & b", '"><img src=x>')
    data = f"folder:{write_images(tmp_path / 'set', classes=classes)}"
    vlm = advtune.load(str(clip_folder), device="cpu", precision="fp32")
    task = advtune.load_task(data)
    model = advtune.tune("tecoa", vlm, task, shots=2, epochs=2, out=tmp_path / "runs" / "run")
    attacks = [advtune.PGD(eps=k / 255, steps=3) for k in (2, 6)]
    for each, out in ((vlm, "zero"), (model, "run")):
        evaluate_all(each, task, attacks, out=tmp_path / "runs" / out, show=False)
    return tmp_path / "runs"


def test_the_page_of_a_run_folder(run, tmp_path, capsys):
    out, drawn = tmp_path / "page.html", tmp_path / "figures"
    assert main(["report", str(run), "--format", "html", "--out", str(out), "--figures", str(drawn)]) == 0
    assert capsys.readouterr().out == ""
    assert {file.name for file in drawn.iterdir()} == {
        f"{name}.{kind}" for name in ("scatter", "eps", "classes", "training") for kind in ("pdf", "png")
    }
    starts = {file.name: file.read_bytes()[:4] for file in drawn.iterdir()}
    fonts = (drawn / "classes.pdf").read_bytes()
    assert b"/Type0" in fonts and b"/Type3" not in fonts
    wide = int.from_bytes((drawn / "classes.png").read_bytes()[16:20])
    assert wide == pytest.approx(2 * 5.2 * 300, abs=1)
    assert all(start == (b"%PDF" if name.endswith("pdf") else b"\x89PNG") for name, start in starts.items())
    text = out.read_text()
    read = Read(text)
    _self_contained(read, text)
    assert set(read.sections) == SECTIONS | {"gallery"}
    assert len(read.pictures("of each class")) == 2 and len(read.pictures("Loss terms")) == 1
    assert len(read.pictures("Clean against")) == 2 and len(read.pictures("over eps")) == 1
    assert len(read.pictures("clean image: ")) == 5 and len(read.pictures("adversarial image for zero-shot")) == 5
    assert SCRIPT in read.sections["gallery"] and "pgd, eps 2/255, 20 steps" in read.sections["gallery"]
    assert "as they are" in read.sections["reading"]


def test_class_counts_of_a_run_are_those_of_its_images(run):
    rows, folders = gather(sorted(run.rglob("results.jsonl")))
    lines = headline(measured(rows, folders))
    columns, why = figures.class_columns(lines)
    assert not why and [name for name, _ in columns] == ["zero-shot", "tecoa"]
    task = advtune.load_task(rows[0].data["spec"])
    images = load_images(task, Split(resolution=16), progress=False)
    model = advtune.load(str(run / "run"), device="cpu", precision="fp32")
    f = model.classifier(model.tokens(task.classes, task.template))
    right = f(images.batch(torch.arange(12), torch.device("cpu"))[0]).argmax(1) == images.y
    for i, line in enumerate(columns[1][1]):
        assert (line.name, line.n) == (task.classes[i], 4)
        assert line.clean == int(right[images.y == i].sum()) / 4
    assert sum(4 * line.robust for line in columns[1][1]) == lines[1].rows[0].robust["correct"]


def test_a_gallery_of_a_run_is_within_eps_and_of_the_models_measured(run):
    rows, folders = gather(sorted(run.rglob("results.jsonl")))
    found = gallery(headline(measured(rows, folders)), device="cpu")
    assert found.attack.eps == 2 / 255 and len(found.examples) == 5
    for each in found.examples:
        assert [view.model for view in each.views] == ["zero-shot", "tecoa"]
        assert all(float((view.x_adv - each.x).abs().max()) <= 2 / 255 + 1e-6 for view in each.views)


def test_what_cannot_be_had_is_said_in_its_place(run, capsys, monkeypatch):
    files = sorted(run.rglob("results.jsonl"))
    rows, folders = gather(files)
    changed = [replace(row, data=row.data | {"sha256": "other"}) for row in rows]
    with pytest.raises(UserError, match="other images"):
        labelled(changed[0])
    monkeypatch.setattr("advtune.report.html._drawn", lambda panel: {"alt": panel.title, "uri": "data:image/png"})
    moved = Read(page([replace(row, data=row.data | {"spec": "folder:/gone"}) for row in rows], folders))
    assert "/gone" in moved.sections["classes"] and "No gallery: " in moved.sections["gallery"]
    alone = Read(page(rows, {}))
    assert "no run folder of a tuned model is here" in alone.sections["gallery"]
    assert main(["report", str(run), "--format", "html", "--no-gallery"]) == 0
    assert "gallery" not in Read(capsys.readouterr().out).sections
    assert main(["report", "--against", "fap", str(run), "--format", "html"]) == 2
    assert "--against has no page" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["report", str(run), "--format", "html"]) == 2
    assert "--out report.html" in capsys.readouterr().err


def test_a_figure_that_has_no_data_is_named(tmp_path):
    files, missing = figures.write_figures([make(), make("capt")], {}, tmp_path)
    assert [file.name for file in files] == ["scatter.pdf", "scatter.png"]
    assert [each.split(":")[0] for each in missing] == ["no eps figure", "no classes figure", "no training figure"]
    with pytest.raises(UserError, match="nothing to draw: no scatter figure"):
        figures.write_figures([clean_only()], {}, tmp_path)


def drawn(panel):
    """The axes of a panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=panel.size)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    panel.draw(axis)
    return axis


@pytest.fixture
def panels(monkeypatch):
    """The panels of a page, in its order; they are not drawn."""
    seen = []
    shown = {"alt": "", "uri": "data:image/png"}
    monkeypatch.setattr("advtune.report.html._drawn", lambda panel: seen.append(panel) or shown)
    return seen


def test_eps_0_is_no_attack_to_be_proud_of(panels):
    rows = [eps(value, method=name, robust=k) for name, k in (("tecoa", 6), ("capt", 5)) for value in (0, 1, 4)]
    lines = measured(rows, {})
    assert {each.line["eps"] for each in headline(lines)} == {1 / 255}
    told = words(lines)
    assert len([text for subject, text in told if subject == "Most robust"]) == 2
    assert not any("eps 0" in text for _, text in told)
    assert [panel.title.split("\n")[1] for panel in scatter_panels(rows)] == ["pgd eps 1/255, 20 steps",
                                                                             "pgd eps 4/255, 20 steps"]  # fmt: skip
    assert "eps 0" in Read(page(rows, {}, gallery=False)).sections["tables"]


def test_a_page_without_an_attack_says_so_and_has_intervals():
    rows = [clean_only(), replace(clean_only(), method="capt")]
    columns = [("tecoa", per_class([rows[0]], [0] * 5 + [1] * 5, ["a", "b"]))]
    (panel,) = figures.class_panels(columns)
    axis = drawn(panel)
    bars = next(each for each in axis.containers if hasattr(each, "patches"))
    reach = [segment[1][0] for segment in bars.errorbar.lines[2][0].get_segments()]
    assert reach == pytest.approx([100 * line.high for line in sorted(columns[0][1], key=lambda line: line.clean)])
    assert axis.get_legend().get_texts()[0].get_text() == "clean, 95 % interval"
    read = Read(page(rows, {}, gallery=False))
    assert read.sections["eps"].count("No row has a robust accuracy") == 1 and "one eps alone" not in read.text
    assert "weakest" in read.sections["classes"]


def test_every_number_of_the_class_table_has_its_interval(monkeypatch, panels):
    line = per_class([make()], [0] * N, ["a"])[0]
    monkeypatch.setattr("advtune.report.html.class_columns", lambda best: ([("tecoa", [line])], ""))
    cells = Read(page([make()], {}, gallery=False)).cells
    low, high = wilson(6, N)
    robust = wilson(3, N)
    assert (f"60.0 [{100 * low:.1f}, {100 * high:.1f}] / 30.0 [{100 * robust[0]:.1f}, {100 * robust[1]:.1f}]") in cells


def test_a_long_legend_leaves_the_curves_free_and_names_whole():
    rows = [eps(value, options={"alpha": alpha, "direction": "adversarial-first", "weight": "confidence"})
            for alpha in (1.0, 2.0) for value in (1, 4)]  # fmt: skip
    rows += [eps(value, options={"alpha": 3.0, "direction": "target-first", "weight": "loss"}) for value in (1, 4)]
    (panel,) = figures.eps_panels(rows)
    legend = drawn(panel).get_legend()
    names = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
    assert names == [curve.name for curve in figures.eps_curves(rows)[0][1]] and len(set(names)) == 3
    assert legend.get_bbox_to_anchor().y1 <= 0.01 * legend.figure.bbox.height + legend.axes.bbox.y0
    short = figures.eps_panels([eps(1), eps(4)])[0]
    assert short.size[1] < panel.size[1]


def test_a_method_has_one_colour_in_all_figures_and_its_marker_stands_in_the_legend(panels):
    rows = [eps(value, method=name, seed=None if name == "zero-shot" else 0, options={"alpha": alpha})
            for name, alpha in (("zero-shot", 1.0), ("capt", 1.0), ("capt", 2.0), ("tecoa", 1.0))
            for value in (1, 4)]  # fmt: skip
    page(rows, {}, gallery=False)
    scattered, axis = drawn(panels[0]), drawn(panels[2])  # between them, at 4/255
    found = {each.get_label(): (each[0].get_color(), each[0].get_marker()) for each in axis.containers}
    assert found == {each.get_label(): (each[0].get_color(), each[0].get_marker()) for each in scattered.containers}
    assert len(found) == 4 and len(set(found.values())) == 4
    handles = axis.get_legend().legend_handles
    assert [(each.get_color(), each.get_marker()) for each in handles] == list(found.values())  # lines, no whiskers


def lightness_and_hue(colour, sees):
    """CIE Lab of a colour as it is seen through a 3 x 3 matrix on linear sRGB."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    rgb = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.maximum(np.array(to_xyz) @ np.clip(np.array(sees) @ rgb, 0, 1) / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira, Fernandes 2009: dichromats, on linear sRGB
EYES = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("eyes", EYES)
def test_colours_are_told_apart_by_any_eyes_and_stand_out_from_white(eyes):
    seen = [lightness_and_hue(colour, EYES[eyes]) for colour in COLOURS]
    distance = [np.linalg.norm(a - b) for a, b in combinations(seen, 2)]
    assert min(distance) > 15 and max(each[0] for each in seen) < 75  # white is 100
    clean, robust = (lightness_and_hue(colour, EYES[eyes]) for colour in (figures.CLEAN, figures.ROBUST))
    assert np.linalg.norm(clean - robust) > 60


def test_a_reason_that_is_not_the_network_does_not_speak_of_it():
    read = Read(page([make()], {}))
    assert "no run folder of a tuned model is here." in read.sections["gallery"]
    assert "HF_HUB_OFFLINE" not in read.sections["gallery"]
    assert "HF_HUB_OFFLINE" in _why("be online")
