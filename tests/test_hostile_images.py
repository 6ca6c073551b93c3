"""Pictures that are broken, huge, narrow or none at all: read right, or refused in one line, in bounded memory."""

import io
import os
import resource
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advtune import Classifier
from advtune.cli import main
from advtune.data import Split, images, load_images, load_task
from advtune.errors import UserError
from advtune.preprocess import Preprocess
from advtune.serve import models, page, play
from advtune.untrusted import read_bytes
from conftest import write_images


def encode(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(width=9, height=8, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def claims(width, height):
    """A PNG of a few bytes whose header says that it is so large."""
    small = encode(picture(4, 4))
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + small[24:29]
    return small[:12] + head + zlib.crc32(head).to_bytes(4, "big") + small[33:]


def cut(data, share=0.6):
    return data[: int(len(data) * share)]


BOMBS = {"large": claims(10_000, 10_000), "huge": claims(2**31 - 1, 2**31 - 1)}
BROKEN = {
    "truncated png": cut(encode(picture(40, 40))),
    "truncated jpeg": cut(encode(picture(40, 40), "JPEG"), 0.3),
    "empty": b"",
    "a text": b"hello",
    "an svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n",
    "no width": claims(0, 4),
    "no height": b"P6 4 0 255\n",
    "floats": encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "32 bits": encode(Image.fromarray(np.full((4, 4), 2**30, np.int32)), "TIFF"),
    "below zero": encode(Image.fromarray(np.full((4, 4), -1, np.int32)), "TIFF"),
    **BOMBS,
}


@pytest.fixture
def classifier(vlm):
    return Classifier(vlm, ("red", "green", "blue"))


def one_line(error):
    assert "\n" not in str(error.value)
    assert "object at" not in str(error.value)
    return str(error.value)


# what is refused, wherever it comes from


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_with_it_is_refused_by_name_or_goes_on_without_it(name, tmp_path):
    root = write_images(tmp_path / "set", train=2, test=2)
    (root / "test" / "red" / "bad.png").write_bytes(BROKEN[name])
    task = load_task(f"folder:{root}")
    with pytest.raises(UserError, match=r"cannot decode test/red/bad.png \(.+\); mend it, or use on_bad=skip") as error:
        load_images(task, Split(resolution=8), progress=False)
    one_line(error)
    found = load_images(task, Split(resolution=8, on_bad="skip"), progress=False)
    assert (found.skipped, len(found.y)) == (["test/red/bad.png"], 6)


@pytest.mark.parametrize("name", BROKEN)
def test_predict_and_the_page_refuse_it(name, classifier, tmp_path):
    file = tmp_path / "bad.png"
    file.write_bytes(BROKEN[name])
    for given in (file, str(file)):
        with pytest.raises(UserError, match=r"bad.png: .*; give another file$") as error:
            classifier.predict(given)
        one_line(error)
    with pytest.raises(UserError, match=r"^image 0: "):
        classifier.predict(BROKEN[name])
    with pytest.raises(UserError, match="give"):
        play.read_picture(BROKEN[name], 16)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_from_csv_and_parquet_by_its_header(name, tmp_path, monkeypatch):
    from datasets import Dataset, Features, Value
    from datasets import Image as Cells

    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    lines = ["image,label"]
    for i, label in enumerate(("cat", "dog")):
        (tmp_path / f"{i}.png").write_bytes(BOMBS[name])
        lines.append(f"{i}.png,{label}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    cells = {"image": [{"bytes": BOMBS[name], "path": None}] * 2, "label": ["cat", "dog"]}
    Dataset.from_dict(cells, Features(image=Cells(), label=Value("string"))).to_parquet(tmp_path / "set.parquet")
    for spec in (f"csv:{tmp_path / 'list.csv'}", f"parquet:{tmp_path / 'set.parquet'}"):
        with pytest.raises(UserError, match="million"):
            load_images(load_task(spec), Split(part="all", resolution=8), progress=False)


def test_the_limit_is_that_of_pillow_and_stands_when_that_is_lifted(monkeypatch):
    assert images.PIXELS == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for data in BOMBS.values():
        with pytest.raises(ValueError, match="million"):
            images.decode(data, 8)
    with pytest.raises(ValueError, match="million"):
        images.fit(Image.new("1", (10_000, 10_000)), 8)


def test_the_command_says_one_line_of_a_bomb(clip_folder, tmp_path, capsys):
    root = write_images(tmp_path / "set", train=1, test=1)
    (root / "test" / "red" / "0.png").write_bytes(BOMBS["large"])
    assert main(["evaluate", "zero-shot", "--backbone", str(clip_folder), "--data", f"folder:{root}"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in printed] == ["advtune: error: cannot decode test/red/0.png"]
    assert main(["predict", str(clip_folder), str(root / "test" / "red" / "0.png"), "--classes", "a,b"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_file_format_that_runs_a_program_is_opened(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(ValueError, match="none of PNG"):
        images.decode(BROKEN["eps"], 8)


# what is read, and how


def levels(data, size="native"):
    return images.decode(data, size).transpose(1, 2, 0).astype(int)


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def test_sixteen_bits_keep_their_upper_half():
    for wide in (RAMP.astype(np.uint16) * 256 + 255, RAMP.astype(np.uint16) * 256):
        for kind in ("PNG", "TIFF"):
            assert (levels(encode(Image.fromarray(wide), kind))[..., 0] == RAMP).all()
    big = Image.frombytes("I;16B", (8, 8), (RAMP.astype(np.uint16) * 256).astype(">u2").tobytes())
    assert (images.fit(big, "native")[0] == RAMP).all()
    as_before_pillow_11 = Image.fromarray(RAMP.astype(np.int32) * 256)
    assert (images.fit(as_before_pillow_11, "native")[0] == RAMP).all()


def test_cmyk_and_inverted_cmyk_jpegs():
    image = picture(16, 16).resize((64, 64))
    data = encode(image.convert("CMYK"), "JPEG", quality=95)
    assert abs(levels(data) - np.asarray(image)).mean() < 4


def test_of_an_animation_the_first_picture():
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (250, 100, 30)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert abs(levels(data)[..., 0] - 250).max() <= 3, kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation):
    upright = np.asarray(picture(6, 4))
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1], 7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
        assert (levels(data) == upright).all(), kind


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0", b"Exif\0\0II*\0\xff"]
)
def test_damaged_exif_costs_no_picture(exif):
    image = picture()
    for kind in ("PNG", "JPEG", "WEBP"):
        options = {} if kind == "PNG" else {"quality": 90}
        assert (levels(encode(image, kind, exif=exif, **options)) == levels(encode(image, kind, **options))).all()


@pytest.mark.filterwarnings("ignore:Palette images")
def test_what_is_transparent_is_white():
    grey = Image.merge("LA", (Image.fromarray(RAMP), Image.fromarray(np.where(RAMP < 100, 0, 255).astype(np.uint8))))
    assert (levels(encode(grey))[..., 1] == np.where(RAMP < 100, 255, RAMP)).all()
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert levels(encode(palette, transparency=1))[0].tolist() == [[10, 20, 30], [255] * 3, [70, 80, 90]]
    assert levels(encode(palette, transparency=bytes([255, 255, 0])))[0, 2].tolist() == [255] * 3
    assert levels(encode(Image.new("L", (2, 1), 7), transparency=7)).min() == 255


def test_the_content_decides_and_not_the_suffix(tmp_path):
    root = write_images(tmp_path / "set", train=2, test=2)
    (root / "test" / "red" / "0.png").write_bytes(encode(picture(), "JPEG"))
    (root / "test" / "red" / "1.png").rename(root / "test" / "red" / "1.JPG")
    assert len(load_images(load_task(f"folder:{root}"), Split(resolution=8), progress=False).y) == 6


# memory


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (3, 30_000)])
def test_a_very_narrow_picture_takes_no_more_memory_than_its_pixels(size, monkeypatch):
    values = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    made, real = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *a, **k: made.append(to) or real(self, to, *a, **k))
    assert images.decode(encode(Image.fromarray(values)), 224).shape == (3, 224, 224)
    assert all(width * height <= images.PIXELS for width, height in made)


@pytest.mark.parametrize("size", [(9, 40), (40, 9), (17, 31), (7, 300)])
def test_the_centre_alone_is_the_centre_of_the_whole(size, monkeypatch):
    data = encode(picture(*size))
    whole = levels(data, 16)
    monkeypatch.setattr(images, "PIXELS", 15 * 16)
    monkeypatch.setattr(images, "fit", lambda image, side: np.asarray(images.square(image, side)).transpose(2, 0, 1))
    assert abs(levels(data, 16) - whole).max() <= 1


def test_a_narrow_tensor_is_refused(classifier):
    with pytest.raises(UserError, match="too narrow"):
        classifier.predict(torch.zeros(3, 1, 10_000))
    with pytest.raises(UserError, match="1 x 10000 pixels is too narrow"):
        Preprocess(16, 16)(torch.zeros(1, 3, 1, 10_000))
    assert Preprocess(16, 16)(torch.zeros(1, 3, 10, 1000)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("array", [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0), np.uint8)])
def test_an_array_without_pixels_is_refused(classifier, array):
    with pytest.raises(UserError, match="image 0: "):
        classifier.predict(array)
    with pytest.raises(UserError, match="no pixels"):
        classifier.predict(Image.new("RGB", (0, 5)))


# names and kinds of files


def test_a_folder_with_odd_entries(tmp_path):
    root = write_images(tmp_path / "set", train=2, test=2)
    red = root / "test" / "red"
    (red / "folder.png").mkdir()
    (red / "folder.png" / "inside.png").write_bytes(encode(picture(seed=5)))
    (red / "up").symlink_to(root)  # a loop of folders is not gone into
    odd = os.fsencode(red) + b"/caf\xe9\n\x1b[31m.png"
    with open(odd, "wb") as stream:
        stream.write(encode(picture(seed=6)))
    found = load_images(load_task(f"folder:{root}"), Split(resolution=8), progress=False)
    assert len(found.ids) == 8
    assert {"test/red/folder.png/inside.png", "test/red/caf\udce9\n\x1b[31m.png"} <= set(found.ids)
    (red / "loop.png").symlink_to("loop.png")
    with pytest.raises(UserError, match=r"cannot read the image .*loop.png: .*symbolic links; mend or remove it"):
        load_images(load_task(f"folder:{root}"), Split(resolution=8), progress=False)


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_a_pipe_or_device_is_not_waited_for(target, tmp_path, classifier):
    root = write_images(tmp_path / "set", train=2, test=2)
    file = root / "test" / "red" / "x.png"
    if target == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(target)
    with pytest.raises(UserError, match=r"x.png: not a plain file"):
        load_images(load_task(f"folder:{root}"), Split(resolution=8), progress=False)
    with pytest.raises(UserError, match=r"x.png: not a plain file"):
        classifier.predict(file)


def test_a_file_is_read_up_to_a_size(tmp_path, monkeypatch):
    with (tmp_path / "hole.png").open("wb") as stream:
        stream.truncate(1 << 33)
    with pytest.raises(OSError, match="larger than 1073 MB"):
        read_bytes(tmp_path / "hole.png", 1 << 30)
    root = write_images(tmp_path / "set", train=2, test=2)
    (tmp_path / "hole.png").rename(root / "test" / "red" / "hole.png")
    with pytest.raises(UserError, match=r"hole.png: larger than 1073 MB"):
        load_images(load_task(f"folder:{root}"), Split(resolution=8), progress=False)


def test_predict_prints_any_name_on_one_line_and_keeps_it_in_json(clip_folder, tmp_path, capsys):
    for name in (b"caf\xe9.png", b"a\nb\x1b]0;x\x07.png", b"=1+1.png"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as stream:
            stream.write(encode(picture()))
    given = ["predict", str(clip_folder), ".", "--classes", "red,green"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(given) == 0
        lines = capsys.readouterr().out.encode("utf-8").splitlines()
        assert [line.partition(b":")[0] for line in lines] == [b"=1+1.png", rb"a\nb\x1b]0;x\x07.png", rb"caf\udce9.png"]
        assert main([*given, "--csv", "out.csv"]) == 0
        assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith("'=1+1.png,")
        capsys.readouterr()
        assert main([*given, "--json"]) == 0
        assert r"caf\udce9.png" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.filterwarnings("ignore:Image size")
def test_bombs_of_every_kind_in_bounded_memory():
    side, whole = (1 << 20).to_bytes(4, "little"), encode(picture())
    bombs = {
        "png": claims(60_000, 60_000),
        "gif": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x4c\x01\0;",
        "bmp": b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + side * 2 + b"\1\0\x18\0" + bytes(24),
        "ppm": b"P6 999999 999999 255\n",
        "png with text": whole[:33] + text_chunk(80 << 20) + whole[33:],
    }
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
    try:
        for data in bombs.values():
            with pytest.raises(ValueError):
                images.decode(data, 224)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def text_chunk(size):
    """A compressed comment of a PNG that unfolds to so many bytes."""
    body = b"zTXtc\0\0" + zlib.compress(bytes(size))
    return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


# the page


def test_uploads_of_the_wrong_kind_get_a_sentence(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(models.runs, "load", lambda *_: vlm)
    shelf, before = models.Shelf("mini"), models.Example(encode(picture()), "red")
    for i, data in enumerate([*BROKEN.values(), b"MZ\x90\0", b"PK\x03\x04", b"%PDF-1.7", b"<html>"]):
        (tmp_path / f"{i}").write_bytes(data)
        kept, preview, said = page.received(shelf, str(tmp_path / f"{i}"), before)
        assert kept is before
        assert "at-chosen" in preview
        assert said and "<html>" not in said
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(1 << 30)
    for path in (tmp_path / "large", tmp_path, tmp_path / "gone", "/dev/zero", "a\0b"):
        kept, _, said = page.received(shelf, str(path), before)
        assert kept is before
        assert "cannot be read" in said
    good = page.received(shelf, str(write_images(tmp_path / "set") / "test" / "red" / "0.png"), before)
    assert good[0] is not before
    assert good[2] == ""


@pytest.mark.parametrize(
    "change",
    [
        dict(names=None), dict(names="a"), dict(names="a\x07, b"), dict(names="é, e\u0301"),
        dict(names="a, " + "b" * 10**6),
        dict(eps=None), dict(eps=float("nan")), dict(eps="1"), dict(eps=-1), dict(budget=None), dict(budget=1e9),
        dict(budget=float("nan")), dict(attack="nonsense"), dict(template=None), dict(template="{"),
        dict(template="{}\x1b"), dict(tuned="nobody"),
    ],
    ids=lambda change: str(change)[:30],
)  # fmt: skip
def test_fields_of_the_wrong_kind_get_a_sentence(change, vlm, monkeypatch):
    monkeypatch.setattr(models.runs, "load", lambda *_: vlm)
    shelf = models.Shelf("mini", {"one": None} if "tuned" in change else {})
    fields = (
        dict(names="red, green", attack="pgd", eps=1, budget=2, tuned=None, away=page.OWN, template="a {}.") | change
    )
    said = page.answered(shelf, models.Example(encode(picture()), ""), *fields.values())
    assert 'role="alert"' in said


def test_a_bad_picture_of_the_set_is_not_shown(tmp_path):
    root = write_images(tmp_path / "set", train=2, test=3)
    (root / "test" / "red" / "0.png").write_bytes(b"junk")
    (root / "test" / "red" / "1.png").write_bytes(BOMBS["huge"])
    shown = models.examples(load_task(f"folder:{root}"))
    assert [each.label for each in shown] == ["blue", "blue", "green", "green", "red"]
    assert all(page.thumb(each.data).mode == "RGB" for each in shown)
    for file in root.glob("test/*/*.png"):
        file.write_bytes(b"junk")
    with pytest.raises(UserError, match="none of its pictures can be shown"):
        models.examples(load_task(f"folder:{root}"))


def test_an_upload_goes_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "KEPT", 100)
    old, new = tmp_path / "a" / "old.png", tmp_path / "b" / "new.png"
    for each in (old, new):
        each.parent.mkdir()
        each.write_bytes(b"x")
    (tmp_path / "link").symlink_to(new)
    for each in (old, old.parent):
        os.utime(each, (0, 0))
    page.forget(None)
    assert old.exists()
    page.forget(str(tmp_path))
    assert not old.exists()
    assert new.exists() and (tmp_path / "link").is_symlink(), "what came just now stays"
    os.utime(tmp_path / "a", (0, 0))
    page.forget(str(tmp_path))
    assert not (tmp_path / "a").exists()
