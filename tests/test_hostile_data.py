"""Class names, labels, tables, paths from outside: used as they are meant, or refused in one line that says where."""

import csv
import json
import os
from dataclasses import replace

import datasets
import pytest

from advtune import Classifier, untrusted
from advtune.cli import main
from advtune.data import Split, load_images, load_task, sources
from advtune.data.sources import number
from advtune.data.task import check_words, rename
from advtune.errors import UserError
from advtune.options import fill, parse_float
from advtune.recipe import Recipe
from advtune.report import render
from advtune.results import Row, accuracy
from advtune.study import from_facts
from advtune.terminal import evaluated
from conftest import write_images
from test_hostile_images import encode, picture

DATA = encode(picture())
GOOD_NAMES = [
    "🐱 cat",
    "كلب",
    "חתול",
    "<b>bold</b> & co",
    "=1+1",
    "naïve café",
    "a_b-c",
    "日本語",
    "👨‍👩‍👧 family",
    "100 %$#\\",
]
BAD_NAMES = {
    "empty": "is empty", "   ": "is empty", "a{}": "brace", "a\x1b[31m": "control", "nul\0": "control",
    "rtl \u202e override": "control", "half \udce9": "control", "bell\x07": "control",
}  # fmt: skip


def fails(match, spec, **options):
    with pytest.raises(UserError, match=match) as error:
        load_task(spec, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_csv(folder, text, images=4):
    folder.mkdir(exist_ok=True)
    for i in range(images):
        (folder / f"{i}.png").write_bytes(encode(picture(seed=i)))
    (folder / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"csv:{folder / 'list.csv'}"


def write_parquet(file, labels, kind=None, cells=None):
    columns = {"image": cells or [{"bytes": encode(picture(seed=i)), "path": None} for i in range(len(labels))]}
    made = datasets.Dataset.from_dict(columns, datasets.Features(image=datasets.Image()))
    made = made.add_column("label", labels)
    (made if kind is None else made.cast_column("label", kind)).to_parquet(file)
    return f"parquet:{file}"


@pytest.fixture(autouse=True)
def own_hub(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()


# class names


def test_odd_names_are_names(tmp_path, vlm):
    lines = ["image,label", *(f'{i % 4}.png,"{name}"' for i, name in enumerate(GOOD_NAMES))]
    task = load_task(write_csv(tmp_path / "set", "\n".join(lines)))
    assert sorted(task.classes) == sorted(GOOD_NAMES)
    found = Classifier(vlm, task.classes).predict(DATA)[0]
    assert set(found.probabilities) == set(GOOD_NAMES)
    assert task.texts()[0] == f"a photo of a {task.classes[0]}."


@pytest.mark.parametrize("name", [name if name != "empty" else "" for name in BAD_NAMES])
def test_names_that_are_refused(name, vlm):
    match = BAD_NAMES[name or "empty"]
    with pytest.raises(UserError, match=match) as error:
        Classifier(vlm, ("cat", name))
    assert str(error.value).isprintable()


def test_a_newline_in_a_name_is_a_space(vlm):
    assert Classifier(vlm, ("polar\nbear", " big\t cat ")).classes == ("polar bear", "big cat")


def test_two_ways_to_write_a_letter_are_one_name():
    """They would have the same tokens, and the first would win every image of both."""
    with pytest.raises(UserError, match="are one text"):
        check_words(("caf\u00e9", "cafe\u0301"), "a {}", "x")


def test_a_folder_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    root = write_images(tmp_path / "set", classes=("cat", "dog"), train=1, test=1)
    for part in ("train", "test"):
        os.rename(root / part / "cat", os.fsencode(root / part) + b"/c\xe9")
    assert "c\\udce9" in fails("control character", f"folder:{root}")


def test_a_name_longer_than_the_context_is_refused_not_cut(vlm):
    for name in ("word " * 100, "w" * 100_000):
        with pytest.raises(UserError, match="tokens is longer than the context of 77") as error:
            Classifier(vlm, ("cat", name))
        assert len(str(error.value)) < 200


def test_ten_thousand_classes(vlm, tmp_path):
    names = [f"thing {i}" for i in range(10_000)]
    assert rename(names, names) == names
    with pytest.raises(UserError, match="'thing 1' is number 0 but 1 in the source"):
        rename(names, [names[1], names[0], *names[2:]])
    (tmp_path / "names.json").write_text(json.dumps(names[:2000]))
    found = Classifier(vlm, str(tmp_path / "names.json"), "{}").predict(DATA)[0]
    assert len(found.probabilities) == 2000


@pytest.mark.parametrize("text", ["[" * 100_000, "\xff", "{", '{"a": {"b": 1}}', "null", "[[]]", '"' + "x" * 1000])
def test_class_files_that_are_none(text, tmp_path):
    file = tmp_path / "names.json"
    file.write_text(text, encoding="latin-1")
    fails("classes", f"folder:{write_images(tmp_path / 'set', train=1, test=1)}", classes=str(file))


def hostile_row(name):
    counts = accuracy("10")
    return Row(
        method="tecoa", data={"name": name, "part": "test", "spec": name, "subset": "all"}, clean=counts,
        backbone={"name": name, "sha256": "0" * 64, "notice": name}, flags={"clean": "10"}, notes=[name],
    )  # fmt: skip


@pytest.mark.parametrize("name", [*GOOD_NAMES, "a|b", "[x](http://y)", "esc\x1b]0;x\x07", "\u202eabc", "<script>"])
def test_tables_show_a_name_and_obey_none(name, capsys):
    row = hostile_row(name)
    markdown = render([row], "markdown")
    for text in (markdown, render([row], "latex")):
        assert not set("\x1b\x07\u202e") & set(text)
    assert "<script>" not in markdown and "<b>" not in markdown.replace(r"\<b", "")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in table}) == 1
    for line in csv.DictReader(render([row], "csv").splitlines()):
        assert line["dataset"].lstrip("'") == untrusted.visible(name)
        assert not line["dataset"].startswith(("=", "+", "-", "@"))
    evaluated([row])
    assert not set("\x1b\x07\u202e") & set(capsys.readouterr().out)


def test_html_reports_escape_names():
    from advtune.report.html import page

    text = page([hostile_row("<script>alert(1)</script>")], {}, gallery=False)
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_what_a_spreadsheet_would_compute_gets_an_apostrophe():
    for text in ("=1+1", "+1", "-2+3", "@SUM(A1)", "＝1", '=HYPERLINK("x")'):
        assert untrusted.cell(text) == "'" + text
    assert untrusted.cell("\t=1") == r"'\t=1"
    for value in (-0.5, 3, None, "", "a=1", "cat"):
        assert untrusted.cell(value) == value


# labels


@pytest.mark.parametrize(
    ("labels", "kind", "match"),
    [
        ([0, 5, 1], datasets.ClassLabel(names=["a", "b"]), "5"),
        ([0, -2, 1], None, "row 1 of the all part has no label"),
        ([0, None, 1], None, "row 1 of the all part has no label"),
        ([0.0, 1.5, 1.0], None, "row 0: a float is no label"),
        ([[0], [1], [1]], None, "row 0: a list is no label"),
        ([b"a", b"b", b"a"], None, "a bytes is no label"),
        (["a", "", "b"], None, "row 1 of the all part has no label"),
        (["9" * 5000, "eight", "7"], None, ""),
    ],
    ids=lambda each: str(each)[:20],
)  # fmt: skip
def test_labels_of_a_parquet_file(labels, kind, match, tmp_path):
    spec = ""
    try:
        spec = write_parquet(tmp_path / "set.parquet", labels, kind)
    except ValueError:  # the library refuses to write a label beyond its classes; write it as a stranger would
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        spec = write_parquet(tmp_path / "set.parquet", labels)
        rewrite_schema(tmp_path / "set.parquet", features | {"label": kind})
    if match:
        assert spec in fails(match, spec)
    else:
        assert len(load_task(spec).classes) == 3


def rewrite_schema(file, features):
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    facts = json.dumps({"info": {"features": datasets.Features(features).to_dict()}})
    pq.write_table(table.replace_schema_metadata({b"huggingface": facts.encode()}), file)


@pytest.mark.parametrize("label", ["-2", "1.5", ".5", "-0.1", "1.", "+2.5"])
def test_numbers_that_are_no_labels_are_named_with_their_line(label, tmp_path):
    text = f"image,label\n0.png,1\n1.png,{label}\n"
    assert "list.csv line 3" in fails("is no whole number from 0", write_csv(tmp_path / "set", text))


def test_numbers_of_thousands_of_digits_are_texts():
    assert number({"all": ["9" * 5000, "1"]})[1] == ["1", "9" * 5000]
    with pytest.raises(ValueError, match="is not a number"):
        parse_float("1" * 100_000 + "x")
    for text in ("9" * 5000, "1" * 100_000 + "x"):
        for field in ("epochs", "lr"):
            with pytest.raises(UserError, match=f"{field}=") as error:
                fill(Recipe(), {field: text}, "recipe")
            assert len(str(error.value)) < 200
    with pytest.raises(UserError, match="lr="):
        fill(Recipe(), {"lr": 10**400}, "recipe")


@pytest.mark.parametrize("field", ["train_on", "backbone", "paper", "table", "protocol"])
def test_a_study_with_nothing_where_a_text_stands(field):
    facts = {"protocol": "few-shot", "methods": ["tecoa"], "data": ["dtd"], field: None}
    with pytest.raises(UserError, match=f"study: {field}: None is not a text"):
        from_facts(facts)


# CSV


def test_csv_that_is_read(tmp_path):
    texts = {
        "bom": "\ufeffimage,label\r\n0.png,cat\r\n1.png,dog\r\n",
        "spaces and quotes": 'image, label\n"0.png", "cat"\n1.png, dog\n',
        "more columns": "id,label,image,note\n7,cat,0.png,\n8,dog,1.png,x,y,z\n",
        "blank lines": "image,label\n\n0.png,cat\n\n1.png,dog\n\n",
    }
    for name, text in texts.items():
        task = load_task(write_csv(tmp_path / name, text))
        assert (task.classes, len(task.parts["all"])) == (("cat", "dog"), 2), name


BAD_CSV = {
    "semicolons": ("image;label\n0.png;cat\n", "divided by ';'; divide them by commas"),
    "tabs": ("image\tlabel\n0.png\tcat\n", r"divided by '\\\\t'"),
    "no header": ("0.png,cat\n1.png,dog\n", "no column 'image' .*begin it with image,label"),
    "twice": ("image,label,label\n0.png,cat,dog\n", "two columns 'label'"),
    "empty": ("", "no column 'image'"),
    "utf-16": ("image,label\n0.png,cat\n".encode("utf-16"), "cannot be read as UTF-8 CSV"),
    "latin-1": ("image,label\n0.png,caf\xe9\n".encode("latin-1"), "cannot be read as UTF-8 CSV"),
    "a picture": (DATA, "cannot be read as UTF-8 CSV|no column"),
    "a field of a megabyte": (f"image,label\n0.png,{'x' * 10**6}\n", "field larger than field limit"),
    "a long path": (f"image,label\n{'x' * 5000}.png,cat\n", "line 2: there is no file"),
    "a zero byte": ("image,label\n0\0.png,cat\n", "line 2: there is no file|UTF-8 CSV"),
    "a cell that is missing": ("image,label\n0.png,cat\n1.png\n", "line 3: needs an image and a label"),
    "another part": ("image,label,split\n0.png,cat,\x1b[31m\n", "line 2: split must be train, val or test"),
    "a quote that does not end": ('image,label\n"0.png,cat\n1.png,dog\n', "line 3: "),
    "a folder": ("image,label\n.,cat\n", "line 2: there is no file '.'"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_csv_that_is_refused(name, tmp_path):
    text, match = BAD_CSV[name]
    assert len(fails(match, write_csv(tmp_path / "set", text))) < 600


def test_a_csv_may_name_files_anywhere_but_they_must_be_pictures(tmp_path):
    """The list is the user's: absolute paths and .. work. What is not a picture fails as one, and shows nothing."""
    (tmp_path / "secret.txt").write_text("password")
    (tmp_path / "out.png").write_bytes(encode(picture(seed=9)))
    spec = write_csv(
        tmp_path / "set", f"image,label\n../out.png,cat\n{tmp_path / 'set' / '0.png'},dog\n1.png,cat\n2.png,dog\n"
    )
    assert len(load_images(load_task(spec), Split(part="all", resolution=8), progress=False).y) == 4
    spec = write_csv(tmp_path / "set", "image,label\n../secret.txt,cat\n0.png,dog\n")
    with pytest.raises(UserError, match=r"cannot decode ../secret.txt \(none of PNG") as error:
        load_images(load_task(spec), Split(part="all", resolution=8), progress=False)
    assert "password" not in str(error.value)


def test_a_folder_that_goes_while_it_is_read(tmp_path, monkeypatch):
    root = write_images(tmp_path / "set", train=1, test=1)
    monkeypatch.setattr(sources, "_class_folders", lambda top: list((top / "gone").iterdir()))
    fails("cannot be read: .*gone: No such file", f"folder:{root}")


def test_a_pipe_or_folder_for_a_csv_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    fails("not a plain file", f"csv:{tmp_path / 'pipe'}")
    fails("Is a directory", f"csv:{tmp_path}")
    for spec in ("csv:/dev/zero", "csv:~nobody-of-this-name/x.csv", "folder:" + "x" * 5000, "parquet:a\0b"):
        fails("not a plain file|no such path", spec)


# Parquet


def test_parquet_with_other_columns(tmp_path):
    for columns, match in (
        ({"image": ["a.png", "b.png"], "label": [0, 1]}, "no image column"),
        ({"image": [1.0, 2.0], "label": [0, 1]}, "no image column"),
        ({"image": [DATA, DATA], "klass": [0, 1]}, "no label column"),
    ):
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "set.parquet")
        fails(match, f"parquet:{tmp_path / 'set.parquet'}")
    write_parquet(tmp_path / "train.parquet", ["a", "b"])
    datasets.Dataset.from_dict({"label": ["a", "b"], "x": [1, 2]}).to_parquet(tmp_path / "test.parquet")
    fails("cannot be read", f"parquet:{tmp_path}")


def test_parquet_cells_that_hold_no_picture(tmp_path):
    (tmp_path / "own.png").write_bytes(DATA)
    cells = [{"bytes": DATA, "path": "x"}, {"bytes": None, "path": str(tmp_path / "own.png")}]
    task = load_task(write_parquet(tmp_path / "named.parquet", ["a", "b"], cells=cells))
    with pytest.raises(UserError, match="row 1 of the all part names a file but holds no picture"):
        load_images(task, Split(part="all", resolution=8), progress=False)
    cells = [{"bytes": DATA, "path": None}, None]
    task = load_task(write_parquet(tmp_path / "null.parquet", ["a", "b"], cells=cells))
    with pytest.raises(UserError, match=r"cannot decode all\[1\]"):
        load_images(task, Split(part="all", resolution=8), progress=False)


@pytest.mark.parametrize(
    "facts", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"_type": "Nothing"}}}}', b"\xff"]
)
def test_parquet_whose_own_facts_are_garbage(facts, tmp_path):
    import pyarrow.parquet as pq

    spec = write_parquet(tmp_path / "set.parquet", ["a", "b"])
    table = pq.read_table(tmp_path / "set.parquet")
    pq.write_table(table.replace_schema_metadata({b"huggingface": facts}), tmp_path / "set.parquet")
    try:
        load_task(spec)
    except UserError as error:
        assert "\n" not in str(error) and spec in str(error)


@pytest.mark.parametrize(
    "damage",
    [lambda d: d[: len(d) // 2], lambda d: b"PAR1" + d[4:-8] + bytes(8), lambda d: d[:40] + bytes(99) + d[139:]],
)
def test_damaged_parquet(damage, tmp_path):
    spec = write_parquet(tmp_path / "set.parquet", ["a", "b"])
    (tmp_path / "set.parquet").write_bytes(damage((tmp_path / "set.parquet").read_bytes()))
    with pytest.raises(UserError) as error:
        load_images(load_task(spec), Split(part="all", resolution=8), progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "where", ["../x", "./x", "/etc/passwd", "~/x", "a/b/c", "C:\\x", "a/..", "a b/c", "own/na\0me", ""]
)
def test_a_hub_set_is_never_a_path(where, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked for"))
    fails("is not hf:OWNER/NAME", f"hf:{where}")


def test_hub_sets_run_no_code():
    """The library dropped loading scripts in version 4."""
    import tomllib
    from pathlib import Path

    facts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "datasets>=4" in facts["project"]["dependencies"]
    assert int(datasets.__version__.split(".")[0]) >= 4


# what the command prints


def test_an_error_shows_no_control_character(tmp_path, capsys):
    root = tmp_path / "x\x1b]0;title\x07\nadvtune: all is well"
    root.mkdir()
    assert main(["evaluate", "zero-shot", "--data", f"folder:{root}"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert r"x\x1b]0;title\x07\nadvtune: all is well" in printed


def test_a_row_that_is_not_of_its_kinds_is_refused(tmp_path):
    whole = json.loads(hostile_row("x").to_json())
    for field, value in (("notes", [1]), ("backbone", []), ("method", None), ("flags", {"clean": 1}), ("stages", [0])):
        (tmp_path / "results.jsonl").write_text(json.dumps(whole | {field: value}) + "\n{}\n")
        assert main(["report", str(tmp_path)]) == 2
    with pytest.raises(ValueError, match="nested too deep"):
        Row.from_json('{"schema": ' + "[" * 100_000)
    assert replace(hostile_row("x"), seconds=3).seconds == 3
