"""Sources, class names, decoding and the decoded cache."""

import csv
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from advtune import progress
from advtune.data import Split, images, load_images, load_task
from advtune.data.cache import create, load
from advtune.data.catalog import catalog
from advtune.data.sources import number
from advtune.errors import UserError

CLASSES = ["barn_owl", "cat", "red-fox"]
TEXTS = ("barn owl", "cat", "red fox")


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    monkeypatch.setenv("ADVTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("ADVTUNE_DATA", raising=False)


def png(seed: int, size=(9, 8), mode="RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).convert(mode))


def encode(image: Image.Image, kind="PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


ROWS = [
    (part, y, png(100 * y + i + 1000 * (part == "test")))
    for part, n in (("train", 6), ("test", 4))
    for y in range(3)
    for i in range(n)
]


def write_folder(root: Path, rows=ROWS, rename=lambda i: f"{i}.png", split=True) -> str:
    for i, (part, y, data) in enumerate(rows):
        file = root / (part if split else "") / CLASSES[y] / rename(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return f"folder:{root}"


def write_csv(root: Path, rows=ROWS, label=lambda y: TEXTS[y], column="split") -> str:
    (root / "pics").mkdir(parents=True, exist_ok=True)
    with (root / "list.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label", column])
        for i, (part, y, data) in enumerate(rows):
            (root / "pics" / f"{i}.png").write_bytes(data)
            writer.writerow([f"pics/{i}.png", label(y), part])
    return f"csv:{root / 'list.csv'}"


def table(rows, labels="class") -> datasets.Dataset:
    """labels: "class" for a ClassLabel called label, "string" or "integer" for a plain fine_label."""
    column = "label" if labels == "class" else "fine_label"
    kind = {
        "class": datasets.ClassLabel(names=list(TEXTS)),
        "string": datasets.Value("string"),
        "integer": datasets.Value("int64"),
    }[labels]
    values = [TEXTS[y] if labels == "string" else y for _, y, _ in rows]
    features = datasets.Features({"pic": datasets.Image(), column: kind})
    cells = [{"bytes": data, "path": None} for *_, data in rows]
    return datasets.Dataset.from_dict({"pic": cells, column: values}, features=features)


def write_parquet(root: Path, rows=ROWS, labels="class", pattern="{}.parquet") -> str:
    for part in dict.fromkeys(part for part, *_ in rows):
        file = root / pattern.format(part)
        file.parent.mkdir(parents=True, exist_ok=True)
        table([row for row in rows if row[0] == part], labels).to_parquet(file)
    return f"parquet:{root}"


def fails(match: str, spec: str, **options) -> str:
    with pytest.raises(UserError, match=match) as error:
        load_task(spec, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# sources


def test_every_source_gives_the_same_images(tmp_path):
    backwards = ROWS[::-1]
    specs = [
        write_folder(tmp_path / "one"),
        write_folder(tmp_path / "two", backwards, rename=lambda i: f"x{i * 7 % 31}.PNG"),
        write_csv(tmp_path / "three", backwards),
        write_csv(tmp_path / "four", column="part"),
        write_parquet(tmp_path / "five"),
        write_parquet(tmp_path / "six", backwards, "string", "data/{}-00000-of-00001.parquet"),
    ]
    for split in (Split("test", resolution=8), Split("fit", shots=2, seed=0, resolution=8)):
        found = [load_images(task, split) for task in map(load_task, specs)]
        assert len({f.sha256 for f in found}) == 1
        assert all(torch.equal(f.x, found[0].x) and torch.equal(f.y, found[0].y) for f in found)
        assert found[0].x.dtype == torch.uint8 and found[0].x.shape[1:] == (3, 8, 8)
    assert {load_task(spec).classes for spec in specs} == {TEXTS}
    other = load_images(load_task(specs[0]), Split("fit", shots=2, seed=1, resolution=8))
    assert other.sha256 != found[0].sha256


def test_single_split_sources(tmp_path):
    rows = [("", y, data) for _, y, data in ROWS]
    write_parquet(tmp_path / "parquet", rows, pattern="{}one.parquet")
    specs = [
        write_folder(tmp_path / "folder", rows, split=False),
        f"parquet:{tmp_path / 'parquet' / 'one.parquet'}",
    ]
    specs.append(f"parquet:{tmp_path / 'parquet'}")
    write_csv(tmp_path / "csv", rows)
    lines = (tmp_path / "csv/list.csv").read_text().splitlines()
    (tmp_path / "csv/list.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in lines))
    specs.append(f"csv:{tmp_path / 'csv/list.csv'}")
    for part, n in (("train", 24), ("test", 6), ("all", 30)):
        found = [load_images(load_task(spec), Split(part, resolution=4)) for spec in specs]
        assert {len(f.x) for f in found} == {n} and len({f.sha256 for f in found}) == 1


def test_sharded_parquet_is_read_whole(tmp_path):
    train = [row for row in ROWS if row[0] == "train"]
    for i in range(2):
        table(train[i::2]).to_parquet(tmp_path / f"train-0000{i}-of-00002.parquet")
    table(ROWS[18:]).to_parquet(tmp_path / "validation.parquet")
    task = load_task(f"parquet:{tmp_path}")
    assert {name: len(part) for name, part in task.parts.items()} == {"train": 18, "test": 12}


def test_rewritten_parquet_is_not_stale(tmp_path):
    spec = write_parquet(tmp_path)
    file = tmp_path / "test.parquet"
    before, stamp = load_images(load_task(spec), Split(resolution=4)), file.stat()
    table([("test", y, png(50 + i)) for i in range(4) for y in range(3)]).to_parquet(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load_images(load_task(spec), Split(resolution=4)).sha256 != before.sha256


def test_integer_labels(tmp_path):
    specs = [write_csv(tmp_path / "csv", label=str), write_parquet(tmp_path / "parquet", labels="integer")]
    for spec in specs:
        with pytest.warns(UserWarning, match="give classes="):
            assert load_task(spec).classes == ("0", "1", "2")
        assert load_task(spec, classes=TEXTS).classes == TEXTS


def test_integer_labels_are_in_order_of_size(tmp_path):
    spec = write_csv(tmp_path, label=lambda y: (2, 10, 9)[y])
    with pytest.warns(UserWarning):
        assert load_task(spec).classes == ("2", "9", "10")


def test_test_only_source_and_class_called_train(tmp_path):
    task = load_task(write_folder(tmp_path / "a", [row for row in ROWS if row[0] == "test"]))
    assert list(task.parts) == ["test"]
    root = tmp_path / "vehicles"
    for i, name in enumerate(("bus", "train")):
        (root / name).mkdir(parents=True)
        (root / name / "x.png").write_bytes(png(i))
    assert load_task(f"folder:{root}").classes == ("bus", "train")


def test_names_and_texts(tmp_path):
    task = load_task(write_folder(tmp_path / "pets"), template="a drawing of the {}")
    assert task.name == "pets" and task.texts()[0] == "a drawing of the barn owl"


# the hub


def test_hub(tmp_path, monkeypatch):
    real, asked = datasets.load_dataset, []
    write_parquet(tmp_path)

    def fake(repo, name=None):
        asked.append((repo, name))
        files = {"train": str(tmp_path / "train.parquet"), "valid": str(tmp_path / "test.parquet")}
        return real("parquet", data_files=files)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    task = load_task("hf:owner/birds:small")
    assert asked == [("owner/birds", "small")] and task.name == "birds" and task.classes == TEXTS
    monkeypatch.undo()
    parquet = load_task(f"parquet:{tmp_path}")
    split = Split(resolution=8)
    assert load_images(task, split).sha256 == load_images(parquet, split).sha256


def test_parquet_files_must_number_their_classes_alike(tmp_path):
    """The library takes the first file's class names for all: labels of another order would be swapped unseen."""

    def write(part, names, labels):
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        cells = {"image": [{"bytes": png(i, (2, 2)), "path": None} for i in labels], "label": labels}
        datasets.Dataset.from_dict(cells, features=kinds).to_parquet(tmp_path / f"{part}.parquet")

    write("train", ["cat", "dog"], [0, 1])
    for names in (["dog", "cat"], ["cat", "dog", "eel"]):
        write("test", names, [0, 1])
        fails("test.parquet has other class names in 'label' than train.parquet", f"parquet:{tmp_path}")
    write("test", ["cat", "dog"], [1, 0])
    assert load_task(f"parquet:{tmp_path}").classes == ("cat", "dog")
    cells = {"image": [{"bytes": png(1, (2, 2)), "path": None}] * 2, "label": [0, 2]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(cells, features=kinds).to_parquet(tmp_path / "test.parquet")
    fails("the label 2 has no name", f"parquet:{tmp_path}")


def test_numbers_of_one_size_have_one_order():
    """A set's own order changes from process to process."""
    assert number({"test": ["2", "1", "001", "01", "0001"]})[1] == ["0001", "001", "01", "1", "2"]


def test_hub_is_mapped_to_the_catalog_by_name(monkeypatch):
    """Caltech-101 on the hub has one split, other spellings, and Faces_easy, which the catalog leaves out."""
    entry = catalog()["caltech101"]
    names = sorted([*entry["hub_classes"], "faces_easy"], reverse=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    data = [png(1000 * y + i, (2, 2)) for y in range(101) for i in range(2)]
    cells = {"image": [{"bytes": b, "path": None} for b in data], "label": [i // 2 for i in range(202)]}
    made = datasets.DatasetDict(train=datasets.Dataset.from_dict(cells, features=features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    task = load_task("caltech101")
    assert task.classes == tuple(entry["classes"]) and len(task.parts["all"]) == 200
    part = task.parts["all"]
    for i in (0, 77, 199):
        source = names[data.index(part.read(i)) // 2]
        assert entry["hub_classes"][part.labels[i]] == source


def test_offline_is_one_line(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nMaxRetryError(...)\n  many lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert "parquet:PATH" in fails("cannot get hf:owner/name: Couldn't reach", "hf:owner/name")
    message = fails("set ADVTUNE_DATA", "cifar10")
    assert "cifar10/train.parquet" in message and "hf:uoft-cs/cifar10" in message
    fails("grocery is not on the hub", "grocery")
    fails("OWNER/NAME", "hf:name")


def test_unlabelled_test_split_gives_way_to_validation(monkeypatch):
    train, val = table(ROWS[:18]), table(ROWS[18:])
    hidden = val.map(lambda _: {"label": -1})
    made = {"train": train, "test": hidden, "validation": val}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(made))
    assert load_task("hf:a/b").parts["test"].labels == [y for _, y, _ in ROWS[18:]]
    made["train"] = train.map(lambda row, i: {"label": -1 if i == 4 else row["label"]}, with_indices=True)
    fails("row 4 of the train part has no label", "hf:a/b")


# the catalog


def test_catalog_needs_neither_torch_nor_datasets():
    code = "import sys, advtune.data.catalog as c; c.catalog(); print({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_advtune_data_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVTUNE_DATA", str(tmp_path))
    embedded = load_task("fashion-mnist-mini")
    assert len(embedded.parts["test"]) == 500
    shutil.copytree(Path(images.__file__).parents[1] / "assets/fashion-mnist", tmp_path / "fashion-mnist")
    task = load_task("fashion-mnist")
    assert task.name == "fashion-mnist" and task.classes == tuple(catalog()["fashion-mnist"]["classes"])
    assert task.texts()[9] == "a photo of a ankle boot, a type of clothing."


def test_other_classes_than_the_catalog_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVTUNE_DATA", str(tmp_path))
    write_parquet(tmp_path / "cifar10")
    with pytest.warns(UserWarning, match="not the catalog's classes"):
        assert load_task("cifar10").classes == TEXTS


def test_unknown_names_get_near_ones():
    assert "folder:PATH" in fails("did you mean caltech101", "caltech-101")
    fails("known sets: caltech101", "zzzz")
    fails("unknown set", "s3:bucket")


# class names and templates


def test_classes_from_json_comma_and_mapping(tmp_path):
    spec = write_folder(tmp_path / "set")
    (tmp_path / "list.json").write_text('["owl", "house cat", "fox"]')
    (tmp_path / "map.json").write_text('{"barn_owl": "owl", "RED FOX": "fox"}')
    assert load_task(spec, classes=str(tmp_path / "list.json")).classes == ("owl", "house cat", "fox")
    assert load_task(spec, classes=str(tmp_path / "map.json")).classes == ("owl", "cat", "fox")
    assert load_task(spec, classes="owl, house  cat,fox").classes == ("owl", "house cat", "fox")
    assert load_task(spec, classes={"cat": "lion"}).classes == ("barn owl", "lion", "red fox")


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        ("owl,cat", "2 names for 3 labels"),
        ("cat,barn owl,red fox", "'cat' is number 0 but 1 in the source"),
        ({"cow": "bull"}, "no class 'cow'"),
        ("owl,Fox,fox ", "are one text"),
        ("owl,{},fox", "brace"),
        ("owl,,fox", "empty"),
        ("nowhere.json", "cannot read nowhere.json"),
        ([1, 2, 3], "classes must be names"),
    ],
    ids=str,
)
def test_bad_classes(tmp_path, classes, match):
    fails(match, write_folder(tmp_path), classes=classes)


@pytest.mark.parametrize("text", ["[1, 2", '"owl"', "[1, 2, 3]", '{"cat": 1}'])
def test_bad_classes_file(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    fails("classes", write_folder(tmp_path / "set"), classes=str(tmp_path / "c.json"))


@pytest.mark.parametrize("template", ["", "a photo", "{} and {}", "a {name} {}", "a {} }", "{{}}", "{0}"])
def test_bad_templates(tmp_path, template):
    fails("exactly one {}", write_folder(tmp_path), template=template)


# bad sources


@pytest.mark.parametrize("kind", ["folder", "csv", "parquet"])
def test_missing_path(kind, tmp_path):
    fails("no such path", f"{kind}:{tmp_path / 'nowhere'}")
    fails("no such path", f"{kind}:")


def test_bad_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    fails("is a file", f"folder:{tmp_path / 'file'}")
    (tmp_path / "empty").mkdir()
    fails("no images", f"folder:{tmp_path / 'empty'}")
    fails("1 class;", write_folder(tmp_path / "one", [("", 0, png(i)) for i in range(3)], split=False))
    fails("'cat' is missing from the test part", write_folder(tmp_path / "uneven", ROWS[:22]))
    twins = tmp_path / "twins"
    for i, name in enumerate(("red_fox", "Red-Fox")):
        (twins / name).mkdir(parents=True)
        (twins / name / "x.png").write_bytes(png(i))
    fails("are one text", f"folder:{twins}")


def test_bad_csv(tmp_path):
    good = write_csv(tmp_path)
    file = tmp_path / "list.csv"
    lines = file.read_text().splitlines()
    cases = {
        "no column 'label'": ["image,klass", *lines[1:]],
        "line 3: there is no file 'pics/none.png'": [*lines[:2], "pics/none.png,cat,train"],
        "line 2: needs an image and a label": [lines[0], "pics/1.png,,train"],
        "line 2: split must be train, val or test, not 'dev'": [lines[0], "pics/1.png,cat,dev"],
        "0 class": lines[:1],
    }
    for match, text in cases.items():
        file.write_text("\n".join(text))
        fails(match, good)
    file.write_bytes(b"image,label\n\xff\xfe,1")
    fails("cannot be read as UTF-8 CSV", good)


def test_bad_parquet(tmp_path):
    fails("no train.parquet or test.parquet", f"parquet:{tmp_path}")
    (tmp_path / "train.parquet").write_bytes(b"not parquet at all")
    fails("cannot be read", f"parquet:{tmp_path}")
    for columns, match in (
        ({"label": [0, 1]}, "no image column"),
        ({"image": [b"a", b"b"]}, "no label column"),
    ):
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
        fails(match, f"parquet:{tmp_path}")


# corrupt images


def test_corrupt_images_are_named(tmp_path):
    spec = write_folder(tmp_path)
    whole = tmp_path / "test/cat/22.png"
    whole.write_bytes(whole.read_bytes()[:40])
    (tmp_path / "test/red-fox/27.png").write_bytes(b"")
    task, split = load_task(spec), Split(resolution=8)
    for _ in range(2):
        with pytest.raises(UserError, match=r"test/\S+\.png and 1 more .*on_bad=skip"):
            load_images(task, split)
        found = load_images(task, replace(split, on_bad="skip"))  # the second time from the cache
        assert sorted(found.skipped) == ["test/cat/22.png", "test/red-fox/27.png"]
        assert len(found.x) == len(found.y) == len(found.ids) == 10
        assert not set(found.skipped) & set(found.ids)
    (tmp_path / "test/cat/22.png").unlink()
    (tmp_path / "test/red-fox/27.png").unlink()
    clean = load_images(load_task(spec), split)
    assert sorted(clean.ids) == sorted(found.ids)
    by_id = dict(zip(clean.ids, clean.x, strict=True))
    assert all(torch.equal(by_id[name], x) for name, x in zip(found.ids, found.x, strict=True))


def test_nothing_but_corrupt_images(tmp_path):
    spec = write_folder(tmp_path, [(part, y, b"%d" % i) for i, (part, y, _) in enumerate(ROWS)])
    with pytest.raises(UserError, match="cannot decode"):
        load_images(load_task(spec), Split(resolution=8, on_bad="skip"))


def test_vanished_file(tmp_path):
    task = load_task(write_folder(tmp_path))
    (tmp_path / "test/cat/22.png").unlink()
    with pytest.raises(UserError, match="cannot read the image"):
        load_images(task, Split(resolution=8))


# decoding


def grey(values) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=np.uint8))


def test_modes_become_rgb():
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    wanted = np.stack([ramp] * 3)
    assert np.array_equal(images.decode(encode(grey(ramp)), "native"), wanted)
    wide = Image.fromarray(ramp.astype(np.uint16) * 256 + 7)
    assert np.array_equal(images.decode(encode(wide), "native"), wanted)
    dark = Image.fromarray((ramp // 4).astype(np.uint16))  # 16 bits stay 16 bits, however dark
    assert images.decode(encode(dark), "native").max() == 0
    colour = Image.open(io.BytesIO(png(3)))
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE, colors=72)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(images.decode(encode(palette), "native"), expected)
    assert len({*map(tuple, expected.reshape(3, -1).T)}) > 8
    cmyk = images.decode(encode(colour.convert("CMYK"), "TIFF"), "native")
    assert np.abs(cmyk.astype(int) - np.asarray(colour).transpose(2, 0, 1)).max() <= 1


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    found = images.decode(encode(image), "native")
    assert found[:, 0, 1].tolist() == [255] * 3 and found[:, 0, 0].tolist() == [10, 20, 30]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    found = images.decode(encode(palette, transparency=0), "native")
    assert found[0, 0].tolist() == [255, 9]


def test_exif_orientation_is_applied():
    image = grey(np.repeat([[0] * 16, [255] * 16], 8, axis=0))  # dark above, bright below
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    found = images.decode(encode(image, "JPEG", exif=exif), "native")
    assert found[0, 0].mean() > 200 and found[0, -1].mean() < 50


@pytest.mark.parametrize("size", [(12, 8), (8, 12), (31, 17), (5, 9), (8, 8)])
def test_resize_is_clips(size):
    """Short side to S with Pillow's bicubic filter, long side cut evenly, as CLIP's preprocessing does."""
    data = png(1, size)
    found = images.decode(data, 8)
    width, height = size
    small = (8, int(8 * height / width)) if width <= height else (int(8 * width / height), 8)
    resized = np.asarray(Image.open(io.BytesIO(data)).resize(small, Image.Resampling.BICUBIC))
    left, top = round((small[0] - 8) / 2), round((small[1] - 8) / 2)
    assert np.array_equal(found, resized[top : top + 8, left : left + 8].transpose(2, 0, 1))


def test_native_keeps_the_size_and_refuses_a_mixture(tmp_path):
    task = load_task(write_folder(tmp_path))
    assert load_images(task, Split(resolution="native")).x.shape == (12, 3, 8, 9)
    (tmp_path / "test/cat/22.png").write_bytes(png(7, (9, 9)))
    with pytest.raises(UserError, match=r"9x8|9x9.*test/.*a side such as 224"):
        load_images(load_task(f"folder:{tmp_path}"), Split(resolution="native"))


# the cache


@pytest.fixture
def decodes(monkeypatch):
    count = []
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda *args: count.append(1) or real(*args))
    return count


def test_cache_is_used_and_keyed_by_content_and_resolution(tmp_path, decodes):
    spec, cache, split = write_folder(tmp_path / "set"), tmp_path / "cache", Split(resolution=8)
    first = load_images(load_task(spec), split, cache=cache)
    assert len(decodes) == 12
    again = load_images(load_task(spec), split, cache=cache)
    assert len(decodes) == 12 and torch.equal(first.x, again.x) and first.sha256 == again.sha256
    load_images(load_task(write_folder(tmp_path / "other", rename=lambda i: f"z{i}.png")), split, cache=cache)
    assert len(decodes) == 12, "the same images under other names are the same images"
    assert load_images(load_task(spec), Split(resolution=7), cache=cache).x.shape[-1] == 7
    assert len(decodes) == 24
    (tmp_path / "set/test/cat/22.png").write_bytes(png(12345))
    changed = load_images(load_task(spec), split, cache=cache)
    assert len(decodes) == 36 and changed.sha256 != first.sha256


def test_another_decoder_is_another_key(tmp_path, decodes, monkeypatch):
    task = load_task(write_folder(tmp_path))
    load_images(task, Split(resolution=8))
    monkeypatch.setattr(images, "DECODER", "2, Pillow 99")
    load_images(task, Split(resolution=8))
    assert len(decodes) == 24


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-10],
        lambda data: data + b"0",
        lambda data: data[:3],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b'"x"', b'"y"'),
    ],
)
def test_damaged_cache_is_remade(tmp_path, decodes, damage):
    task, split, cache = load_task(write_folder(tmp_path / "set")), Split(resolution=8), tmp_path / "cache"
    wanted = load_images(task, split, cache=cache).x.clone()  # the pixels themselves are mapped from the file
    (file,) = cache.iterdir()
    data = file.read_bytes()
    file.write_bytes(damage(data))
    assert torch.equal(load_images(task, split, cache=cache).x, wanted)
    assert len(decodes) == 24 and file.read_bytes() == data and list(cache.iterdir()) == [file]


def test_changing_the_pixels_does_not_reach_the_cache(tmp_path):
    task, split, cache = load_task(write_folder(tmp_path / "set")), Split(resolution=8), tmp_path / "cache"
    first = load_images(task, split, cache=cache)
    wanted = first.x.clone()
    for found in (first, load_images(task, split, cache=cache)):
        found.x.zero_()
        assert torch.equal(load_images(task, split, cache=cache).x, wanted)


def test_unwritable_cache_warns_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    task = load_task(write_folder(tmp_path / "set"))
    with pytest.warns(UserWarning, match="not cached") as caught:
        for _ in range(2):
            found = load_images(task, Split(resolution=8), cache=tmp_path / "file")
    assert len(found.x) == 12 and len(caught) == 1


def test_the_cache_is_a_safetensors_file(tmp_path):
    spec, cache = write_folder(tmp_path / "set"), tmp_path / "cache"
    (tmp_path / "set/test/cat/22.png").write_bytes(b"")
    found = load_images(load_task(spec), Split(resolution=5, on_bad="skip"), cache=cache)
    (file,) = cache.iterdir()
    stored = safetensors.torch.load_file(file)
    assert set(stored) == {"x", "good"} and stored["good"].dtype == torch.bool and stored["good"].sum() == 11
    assert stored["x"].shape == (12, 3, 5, 5) and torch.equal(stored["x"][stored["good"]], found.x)
    safetensors.torch.save_file(stored, tmp_path / "theirs")  # what earlier versions wrote is still a cache
    theirs = load(tmp_path / "theirs", 12)
    assert torch.equal(theirs[0], stored["x"]) and torch.equal(theirs[1], stored["good"])
    assert load(tmp_path / "theirs", 11) is None


MEASURE = r"""
import re, sys
from pathlib import Path
from advtune.data import Split, load_images, load_task

def anonymous():
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

task = load_task(sys.argv[1])
load_images(task, Split("all", resolution=1))  # so that torch, Pillow and the threads are there
before = anonymous()
found = load_images(task, Split("all", resolution=224))
assert found.x.numel() > 60e6 and found.x.amax() == 200
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_set(tmp_path):
    data = encode(Image.new("RGB", (8, 8), (200, 100, 0)))
    spec = write_folder(tmp_path, [("", i % 2, data) for i in range(400)], split=False)
    for _ in ("decoded", "from the cache"):
        done = subprocess.run([sys.executable, "-c", MEASURE, spec], capture_output=True, text=True, check=True)
        assert int(done.stdout) < 25e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cache_larger_than_memory_is_mapped(tmp_path, monkeypatch):
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("here, no memory is promised that is not there")
    sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory = sum(int(sizes[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    n = 2 * memory // (3 * 224 * 224)
    monkeypatch.delattr(os, "posix_fallocate")  # the file is nothing but a hole
    create(tmp_path / "hole", (n, 3, 224, 224))
    x, good = load(tmp_path / "hole", n)
    assert x.nbytes > 1.9 * memory and not x[-1].any() and not good[-1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EOPNOTSUPP, None], ids=["full", "unsupported", "absent"])
def test_space_is_reserved(tmp_path, monkeypatch, code, decodes):
    """A full disk costs the cache, not the run; where space cannot be reserved, it is not."""
    task, split, cache = load_task(write_folder(tmp_path / "set")), Split(resolution=8), tmp_path / "cache"
    wanted = load_images(task, split).x

    def reserve(*_):
        raise OSError(code, os.strerror(code))

    if code:
        monkeypatch.setattr(os, "posix_fallocate", reserve, raising=False)
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load_images(task, split, cache=cache)
    assert torch.equal(found.x, wanted)
    if code == errno.ENOSPC:
        assert [f"images are not cached: {cache}: No space left" in str(w.message) for w in caught] == [True]
        assert list(cache.iterdir()) == [] and caught[0].filename == __file__
    else:
        assert not caught and [file.suffix for file in cache.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_what_stops_decoding_leaves_no_file(tmp_path, monkeypatch, error):
    task, cache, real = load_task(write_folder(tmp_path / "set")), tmp_path / "cache", images.decode
    calls, seen = [], []

    def decode(*args):
        calls.append(1)
        if len(calls) == 12:
            seen.extend(cache.glob("*.tmp"))
            raise error("stop")
        return real(*args)

    monkeypatch.setattr(images, "decode", decode)
    with pytest.raises(error, match="stop"):
        load_images(task, Split(resolution=8), cache=cache)
    assert len(seen) == 1 and list(cache.iterdir()) == []


def test_cache_place(monkeypatch, tmp_path):
    monkeypatch.setenv("ADVTUNE_CACHE", str(tmp_path / "mine"))
    assert images.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("ADVTUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert images.cache_dir() == tmp_path / ".cache/advtune"


def test_loading_is_quiet_off_a_terminal(tmp_path, capsys):
    spec = write_parquet(tmp_path)
    capsys.readouterr()  # writing the file may have talked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_images(load_task(spec), Split(resolution=8))
    assert capsys.readouterr() == ("", "")


def test_long_work_prints_plain_lines(monkeypatch, capsys):
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    assert list(progress.track(range(6), "decoding")) == list(range(6))
    assert "decoding: 3/6 images" in capsys.readouterr().err


def test_split_goes_into_a_row_as_it_is():
    from dataclasses import asdict

    row = json.loads(json.dumps(asdict(Split("fit", shots=4, seed=0))))
    assert Split(**row) == Split("fit", shots=4)


def test_pixels_go_to_the_device_if_they_fit_there(image_folder, monkeypatch):
    found = load_images(load_task(f"folder:{image_folder}"), Split(part="train", resolution=16), progress=False)
    rows, meta = torch.tensor([3, 0]), torch.device("meta")
    assert found.on(meta).x.device == meta and found.on(meta).y.device == torch.device("cpu")
    assert found.on(meta).batch(rows, meta)[0].shape == (2, 3, 16, 16)
    x, y = found.batch(rows, torch.device("cpu"))
    assert torch.equal(x, found.x[rows].float() / 255) and torch.equal(y, found.y[rows])
    monkeypatch.setattr(images, "room", lambda device: found.x.nbytes - 1)
    assert found.on(meta) is found
