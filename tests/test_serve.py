"""What is behind the page: limits in sentences, honest answers, escaped HTML, the models and pictures to begin with."""

import base64
import io
import re
import socket
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from advtune import runs
from advtune.cli import main
from advtune.data import load_task
from advtune.data.templates import read_templates
from advtune.demo import Entry
from advtune.errors import UserError
from advtune.serve import models, panels, play, server
from advtune.train import tune
from conftest import write_images

CLASSES = ("red", "green", "blue")
TEMPLATE = "a photo of a {}."


def encoded(width=16, height=16, seed=0, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def decoded(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def made(vlm, eps=4, name="pgd", target=None, seed=0):
    x = play.read_picture(encoded(seed=seed), 16)
    return play.play(vlm, x, CLASSES, TEMPLATE, play.make_attack(name, eps, 10), target)


def answer(before, after, rounded, target=0, classes=CLASSES, moved=1.0, png_moved=1.0):
    pictures = [encoded(2, 2, seed) for seed in range(3)]
    return play.Answer(classes, before, after, rounded, target, *pictures, 128.0, moved, png_moved)


def test_a_picture_is_read_as_in_evaluation():
    from advtune.data.images import decode

    data = encoded(40, 24)
    x = play.read_picture(data, 16)
    assert torch.equal((x[0] * 255).round().to(torch.uint8), torch.from_numpy(decode(data, 16).copy()))
    for kind in ("JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        assert play.read_picture(encoded(kind=kind), 8).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a picture"),
        (b"GIF89a" + bytes(20), "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encoded()[:-300], r"cannot be read \(image file is truncated"),
        (encoded(210, 10), "too narrow"),
        (bytes(play.MEGABYTES * 1_000_000 + 1), "10.0 MB"),
    ],
)
def test_a_bad_upload_gets_a_sentence(data, words):
    with pytest.raises(UserError, match=words):
        play.read_picture(data, 16)


@pytest.mark.parametrize(("side", "words"), [(8000, "64 million"), (20000, "too many pixels")])
def test_a_bomb_is_not_decoded(side, words, monkeypatch):
    small, size = encoded(), side.to_bytes(4, "big") * 2
    head = b"IHDR" + size + small[24:29]
    monkeypatch.setattr(play, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match=words):
        play.read_picture(small[:12] + head + zlib.crc32(head).to_bytes(4, "big") + small[33:], 16)


def test_class_names():
    assert play.read_classes(" cat,  big  dog ,,") == ("cat", "big dog")
    assert play.read_classes("tench, Tinca tinca\n\ngoldfish\n") == ("tench, Tinca tinca", "goldfish")
    many = ",".join(map(str, range(play.CLASSES + 1)))
    bad = ("", "cat", "cat, Cat", "cat, do{}g", "cat, " + "d" * (play.LETTERS + 1), many)
    for text in bad:
        with pytest.raises(UserError):
            play.read_classes(text)
    for text in ("a photo", "{} {}", "{} {", "{}" + "x" * play.TEMPLATE_LETTERS):
        with pytest.raises(UserError, match="once"):
            play.check_template(text)
    assert play.check_template(" a  {}. ") == "a {}."
    assert play.check_template("a {}  |  the {}") == "a {} | the {}"
    for text in ("a {} | the {} {}", " | ".join(f"{i} {{}}" for i in range(play.TEMPLATES + 1))):
        with pytest.raises(UserError, match=r"once|at most 10\."):
            play.check_template(text)


def test_the_attacks_on_offer():
    for name, offer in play.OFFERS.items():
        attack = play.make_attack(name, 2, 7)
        assert (attack.name, attack.eps, attack.norm) == (name, 2 / 255, "linf")
        assert not getattr(attack, "early_stop", False)
        assert not offer.field or getattr(attack, offer.field) == 7
    nan = float("nan")
    for given in (
        ("autoattack", 1, 1), ("pgd", 17, 10), ("pgd", -1, 10), ("pgd", 1, 0), ("pgd", 1, 10**6), ("pgd", None, 10),
        ("pgd", nan, 10), ("pgd", 1, None), ("pgd", 1, nan), ("pgd", "1", 10),
    ):  # fmt: skip
        with pytest.raises(UserError, match="choose"):
            play.make_attack(*given)
    assert play.make_attack("fgsm", 1, None).eps == 1 / 255


@pytest.mark.parametrize("name", play.OFFERS)
def test_an_answer_is_what_the_model_says(vlm, name):
    first = made(vlm, name=name)
    torch.manual_seed(5)
    assert made(vlm, name=name) == first, "the same every time"
    f = vlm.classifier(vlm.tokens(CLASSES, TEMPLATE))
    clean, png = (torch.from_numpy(decoded(data)).permute(2, 0, 1)[None] for data in (first.picture, first.png))
    torch.testing.assert_close(f(clean / 255).softmax(1)[0], torch.tensor(first.before))
    torch.testing.assert_close(f(png / 255).softmax(1)[0], torch.tensor(first.rounded))
    assert first.target == first.says[0]
    assert 0 < first.distance <= 4.001
    assert first.png_distance == (png - clean).abs().max() <= 4
    assert first.after[first.target] <= first.before[first.target]
    shift = (decoded(first.difference) - 127.5) / 127.5 * 4  # grey is no change; black and white are eps
    assert abs(shift - (decoded(first.png) - decoded(first.picture))).max() < 0.6


def test_led_away_from_a_class_that_is_not_said(vlm):
    said = made(vlm).says[0]
    other = made(vlm, target=(said + 1) % 3)
    assert other.wrong_before
    assert not other.fooled
    assert not other.png_fools


def test_no_radius_no_change(vlm):
    still = made(vlm, eps=0)
    assert still.png == still.picture
    assert still.before == pytest.approx(still.after)
    assert set(decoded(still.difference).flat) == {128}
    assert panels.eight_bits(still).startswith("No pixel moved: the PNG is the picture itself")
    assert "undid every change" in panels.eight_bits(made(vlm, eps=0.3))


def test_a_half_level_may_leave_the_radius(vlm):
    beyond, within = made(vlm, eps=2.5), made(vlm, eps=2)
    assert (beyond.png_distance, within.png_distance) == (3, 2)
    moved = "No pixel moved by more than 2.5/255; in the PNG, by 3/255, more than that: rounding goes up"
    assert panels.eight_bits(beyond).startswith(moved)
    assert panels.eight_bits(within).startswith("No pixel moved by more than 2/255; in the PNG, by 2/255. ")
    a = (0.6, 0.3, 0.1)
    assert "more than 10.5/255; in the PNG, by 10/255. " in panels.eight_bits(answer(a, a, a, moved=10.5, png_moved=10))


def test_the_words_for_what_happened():
    a, b = (0.6, 0.3, 0.1), (0.2, 0.7, 0.1)
    for found, state, eight in (
        (answer(a, b, b), "fooled", "it still fools the model, which says green"),
        (answer(a, b, a), "fooled", "undid the attack: the model says red"),
        (answer(a, a, a), "stood", "no more than before: red"),
        (answer(a, a, b), "stood", "The attack failed, but rounded"),
        (answer(b, b, b), "wrong", "the model says green"),
    ):
        assert f'data-state="{state}"' in panels.render({"m": found}, "", "pgd")
        assert eight in panels.eight_bits(found)
    assert "It said <b>red</b> (right), now it says <b>green</b>" in panels.said("m", answer(a, b, b), "red")
    assert "It said <b>red</b> (wrong), and still does" in panels.said("m", answer(a, a, a), "blue")
    assert "said <b>green</b>, not red, before any attack" in panels.said("m", answer(b, b, b), "red")
    assert "(" not in panels.said("m", answer(a, b, b), "a class of its own")


def test_every_name_is_escaped_and_the_png_is_in_the_page():
    bad = '<img src=x onerror="alert(1)">'
    found = answer((0.6, 0.3, 0.1), (0.2, 0.7, 0.1), (0.2, 0.7, 0.1), classes=(bad, bad + "2", bad + "3"))
    page = panels.render({bad: found}, bad, "pgd") + panels.chosen(found.picture, bad) + panels.sentence(bad)
    assert "<img src=x" not in page
    assert 'onerror="' not in page
    assert page.count("&lt;img src=x") > 8
    link = re.search(r'download="adversarial-pgd-1.png" href="data:image/png;base64,([^"]*)"', page)
    assert base64.b64decode(link[1]) == found.png
    assert 'src="http' not in page


@pytest.fixture
def tuned(clip_folder, image_folder, tmp_path):
    out = tmp_path / "runs" / "first"
    tune("tecoa", str(clip_folder), f"folder:{image_folder}", shots=2, epochs=1, out=out, show=False)
    return out


def test_the_backbone_below_a_run_of_a_run(tuned, clip_folder, image_folder, tmp_path):
    second = tmp_path / "runs" / "second"
    tune("capt", str(tuned), f"folder:{image_folder}", shots=2, epochs=1, out=second, show=False)
    assert runs.load(models.undefended(second)).origin.sha256 == runs.load(str(clip_folder)).origin.sha256
    shelf = models.open_shelf(str(tmp_path / "runs"))
    assert list(shelf.tuned) == ["first", "second"]
    plain, hardened = shelf.pair("second").values()
    assert (plain.run, hardened.run["method"]) == ({}, "capt")
    assert list(shelf.pair("second"))[1] == "Tuned with capt (second)", "two runs of one method are told apart"
    assert shelf.pair("first")[f"Undefended {clip_folder.name}"] is plain, "read once"
    with pytest.raises(UserError, match="choose one of first, second"):
        shelf.pair("third")
    assert list(models.open_shelf(str(clip_folder)).pair(None)) == [f"Undefended {clip_folder.name}"]


def test_templates_that_a_run_was_tuned_with_are_those_of_the_page(vlm, image_folder, tmp_path):
    task = load_task(f"folder:{image_folder}", template=read_templates(["ensemble"]))
    tune("tecoa", vlm, task, shots=1, epochs=1, out=tmp_path / "run", show=False)
    shelf = models.open_shelf(str(tmp_path / "run"))
    task = models.open_task(shelf)
    assert play.check_template(models.around(task)) == models.around(task) == task.template
    assert models.begin(shelf, task, models.examples(task)) >= 0
    many = replace(task, template=" | ".join(f"{i} {{}}" for i in range(99)))
    assert play.check_template(models.around(many)) == " | ".join(f"{i} {{}}" for i in range(play.TEMPLATES))


def test_it_begins_with_pictures_of_the_run_that_it_names_rightly(tuned, image_folder):
    shelf = models.open_shelf(str(tuned))
    task = models.open_task(shelf)
    assert task.spec == f"folder:{image_folder}"
    shown = models.examples(task)
    assert [each.label for each in shown] == [name for name in task.classes for _ in range(models.EACH)]
    model = runs.load(str(tuned))
    f = model.classifier(model.tokens(task.classes, task.template))
    said = [task.classes[int(f(play.read_picture(each.data, model.side)).argmax())] for each in shown]
    right = [i for i, each in enumerate(shown) if said[i] == each.label]
    assert models.begin(shelf, task, shown) == (right or [0])[0]
    one = models.Example(shown[0].data, next(name for name in task.classes if name != said[0]))
    assert models.begin(shelf, task, [one, *(shown[i] for i in right)]) == min(1, len(right))


def test_pictures_that_are_gone_give_way_to_the_embedded_ones(clip_folder, tmp_path, recwarn):
    images = write_images(tmp_path / "gone")
    out = tmp_path / "run"
    tune("tecoa", str(clip_folder), f"folder:{images}", shots=2, epochs=1, out=out, show=False)
    images.rename(tmp_path / "elsewhere")
    assert models.open_task(models.open_shelf(str(out))).spec == models.DATA
    assert "the pictures are those of" in str(recwarn.pop(UserWarning).message)
    with pytest.raises(UserError, match="gone"):
        models.open_task(models.open_shelf(str(out)), f"folder:{images}")


def test_without_a_name_a_run_is_made_once(clip_folder, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "BACKBONE", str(clip_folder))
    monkeypatch.setattr(models, "DATA", f"folder:{image_folder}")
    monkeypatch.setattr(models, "SHOTS", 2)
    monkeypatch.setattr(models, "ENTRIES", (Entry("tecoa", 1, {"lr": 1e-3}),))
    first = models.open_shelf(None).tuned["tecoa"]
    assert runs.is_run(first)
    assert "tuning tecoa once" in capsys.readouterr().err
    assert models.open_shelf(None).tuned["tecoa"] == first
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(models, "ENTRIES", (Entry("tecoa", 1, {"lr": 2e-3}),))
    assert models.open_shelf(None).tuned["tecoa"] != first, "other options, another run"
    (tmp_path / "runs").mkdir()
    first.rename(tmp_path / "runs" / "demo")
    (tmp_path / "runs" / "demo").rename(tmp_path / "runs" / "tecoa")
    (tmp_path / "runs" / "demo").mkdir()
    (tmp_path / "runs" / "tecoa").rename(tmp_path / "runs" / "demo" / "own")
    assert list(models.open_shelf(None).tuned) == ["own"], "the demo's runs go before"


def test_what_cannot_be_served_is_one_line(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(server, "find_spec", lambda name: object())
        assert main(["serve", "--port", port, "--no-browser"]) == 2
        assert f"port {port}" in capsys.readouterr().err
    assert main(["serve", "--port", "70000"]) == 2
    assert main(["serve", "nowhere", "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert "70000" in error
    assert "nowhere" in error
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert main(["serve", "--port", "70000"]) == 2
    assert capsys.readouterr().err == "advtune: error: the web page needs Gradio: pip install 'advtune[serve]'\n"


def test_every_answer_forbids_the_network():
    import asyncio

    sent = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b""})

    async def keep(message):
        sent.append(message)

    asyncio.run(server.with_headers(page)({"type": "http"}, None, keep))
    headers = dict(sent[0]["headers"])
    assert headers[b"a"] == b"b"
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert b"http" not in headers[b"content-security-policy"]
    assert sent[1] == {"type": "http.response.body", "body": b""}
