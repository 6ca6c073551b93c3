"""Labels for images: the same as an evaluation's, for every kind of picture, from Python and from the shell."""

import csv
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import advtune
from advtune import Classifier
from advtune.attacks import PGD
from advtune.cli import main
from advtune.data import Split, load_images
from advtune.errors import UserError
from conftest import write_images

COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="session")
def tuned(clip_folder, tmp_path_factory):
    """A run folder, and the folder of images it was tuned on, which are not of the model's size."""
    place = tmp_path_factory.mktemp("predict")
    images = write_images(place / "colours", classes=("blue", "green", "red"), side=22)
    task = advtune.load_task(f"folder:{images}", template="a {} thing.")
    backbone = advtune.load(str(clip_folder), "cpu", "fp32")
    advtune.tune("capt", backbone, task, shots=2, epochs=1, out=place / "run", show=False)
    return place / "run", images


@pytest.fixture
def classifier(vlm):
    return Classifier(vlm, COLOURS)


@pytest.fixture
def picture():
    """Upright, not square, of the size that the model wants on its short side."""
    return np.random.default_rng(0).integers(0, 255, (16, 20, 3)).astype(np.uint8)


def probabilities(predictions):
    return [each.probabilities for each in predictions]


def test_predictions_are_those_of_an_evaluation(tuned):
    run, images = tuned
    model = advtune.load(str(run), "cpu", "fp32")
    task = advtune.load_task(f"folder:{images}", template="a {} thing.")
    flags = advtune.evaluate(model, task, show=False).flags["clean"]
    shown = load_images(task, Split(part="test", resolution=16), progress=False)
    found = Classifier(model).predict([images / name for name in shown.ids])
    right = [task.classes[label] for label in shown.y]
    assert "".join(str(int(a.label == b)) for a, b in zip(found, right, strict=True)) == flags
    assert "01" in flags or "10" in flags
    expected = model.classifier(model.tokens(task.classes, task.template))(shown.x / 255).double().softmax(1)
    for each, row in zip(found, expected.tolist(), strict=True):
        assert [each.probabilities[name] for name in task.classes] == pytest.approx(row, abs=1e-6)


def test_a_run_brings_its_words(tuned):
    assert (Classifier(tuned[0]).classes, Classifier(tuned[0]).template) == (("blue", "green", "red"), "a {} thing.")
    renamed = Classifier(tuned[0], {"red": "dark red"}, "one {}")
    assert (renamed.classes, renamed.template) == (("blue", "green", "dark red"), "one {}")
    assert Classifier(tuned[0], "cat,  dog").classes == ("cat", "dog")


def test_probabilities_are_the_softmax_of_the_logits(vlm, classifier):
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = vlm.classifier(vlm.tokens(COLOURS, "a photo of a {}."))(x).double().softmax(1)
    found = classifier.predict(x)
    for each, row in zip(found, expected.tolist(), strict=True):
        assert [each.probabilities[name] for name in COLOURS] == pytest.approx(row, abs=1e-6)
        assert (each.label, each.probability) == max(each.probabilities.items(), key=lambda pair: pair[1])
        assert each.top(2) == sorted(each.probabilities.items(), key=lambda pair: -pair[1])[:2]


def test_every_kind_of_picture_is_the_same_picture(classifier, picture, tmp_path):
    image = Image.fromarray(picture)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    tensor = torch.from_numpy(picture[:, 2:18].copy()).permute(2, 0, 1) / 255
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), data, image, picture, tensor]
    expected = classifier.predict(image)[0].probabilities
    for each in [
        *probabilities(classifier.predict(kinds)),
        *(classifier.predict(kind)[0].probabilities for kind in kinds),
    ]:
        assert each == pytest.approx(expected, abs=1e-6)
    for batch in (np.stack([picture] * 2), torch.stack([tensor] * 2)):
        assert len(classifier.predict(batch)) == 2


def test_orientation_transparency_and_grey(classifier, picture):
    upright = Image.fromarray(picture)
    turned, file = upright.transpose(Image.Transpose.ROTATE_90), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees to see it upright
    turned.save(file, "PNG", exif=exif)
    white = np.full((16, 20, 4), 77, np.uint8)
    white[..., 3] = 0
    grey = np.linspace(0, 255, 16 * 20).reshape(16, 20).astype(np.uint8)
    pairs = [
        (file.getvalue(), upright),
        (white, np.full((16, 20, 3), 255, np.uint8)),
        (grey, np.stack([grey] * 3, -1)),
        (grey[..., None], Image.fromarray(grey)),
        (Image.fromarray(grey.astype(np.uint16) * 257), grey),
    ]
    for one, other in pairs:
        a, b = probabilities(classifier.predict([one, other]))
        assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"junk", "image 1: not a readable image"),
        ("nowhere.png", "nowhere.png: No such file"),
        (np.zeros((4, 4, 3)), r"image 1: an array of float64 \[4, 4, 3\]"),
        (np.zeros((4, 4, 5), np.uint8), r"\[4, 4, 5\] is not an image"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "a tensor of torch.uint8"),
        (torch.full((3, 4, 4), 1.5), "pixels from 1.5 to 1.5 are not in"),
        (torch.full((3, 4, 4), torch.nan), "are not in"),
        (torch.rand(1, 4, 4), r"\[1, 4, 4\] is not an image"),
        (7, "int is not an image"),
    ],
)
def test_a_bad_image_is_named(classifier, picture, bad, message):
    with pytest.raises(UserError, match=message) as caught:
        classifier.predict([picture, bad])
    assert "\n" not in str(caught.value)
    first, second, third = classifier.stream([picture, bad, picture])
    assert (first, type(second)) == (third, UserError)


def test_batches_and_sizes_do_not_matter(vlm):
    random = torch.Generator().manual_seed(0)
    x = [torch.rand(3, side, 16, generator=random) for side in (16, 16, 24, 16, 40, 40, 16)]
    one, two = (Classifier(vlm, COLOURS, batch_size=size).predict(x) for size in (64, 2))
    for a, b in zip(probabilities(one), probabilities(two), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert len({each.probability for each in one}) == len(x)


def test_threads_share_one(classifier):
    x = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [classifier.predict(each)[0].probability for each in x]
    found, begin = {}, threading.Barrier(8)

    def ask(i):
        begin.wait()
        found[i] = {classifier.predict(x[i])[0].probability for _ in range(5)}

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(8)] == [{each} for each in expected]


def test_gradients_still_go_through_the_model(vlm, classifier):
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    classifier.predict(x)
    f = vlm.classifier(vlm.tokens(COLOURS, "a photo of a {}."))
    assert not torch.equal(PGD(eps=1 / 255, steps=1)(f, x, f(x).argmax(1)), x)


@pytest.mark.parametrize(
    ("classes", "template", "message"),
    [
        (None, None, "was tuned on no classes; name them"),
        ({"a": "b"}, None, "was tuned on no classes; name them"),
        ("cat", None, "has 1 class"),
        (["cat", "Cat"], None, "are one text"),
        (["cat", 3], None, "classes must be names"),
        (["cat", "dog"], "no place", "exactly one {}"),
        ("nowhere.json", None, "cannot read nowhere.json"),
    ],
)
def test_words_that_are_none(vlm, classes, template, message):
    with pytest.raises(UserError, match=message):
        Classifier(vlm, classes, template)


def test_a_folder_to_a_table(tuned, tmp_path, capsys):
    run, images = tuned
    bad = images / "test" / "red" / "x.png"
    bad.write_bytes(b"junk")
    try:
        code = main(["predict", str(run), str(images / "test"), "--csv", str(tmp_path / "a.csv"), "--top", "2"])
    finally:
        bad.unlink()
    printed = capsys.readouterr()
    assert code == 1
    formats = "PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM"
    assert printed.err == f"advtune: {bad}: not a readable image (none of {formats}); give another file\n"
    assert printed.out == f"{tmp_path / 'a.csv'}: 12 images, 1 could not be read\n"
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["path"] for row in rows] == sorted([*map(str, (images / "test").rglob("*.png")), str(bad)])
    expected = Classifier(run).predict(images / "test" / "blue" / "0.png")[0].top(2)
    assert (rows[0]["label"], rows[0]["label_2"]) == (expected[0][0], expected[1][0])
    assert float(rows[0]["probability_2"]) == pytest.approx(expected[1][1], abs=1e-6)
    assert list(rows[0])[1:] == ["label", "probability", "label_2", "probability_2", "error"]
    assert [row["label"] == "" for row in rows] == [bool(row["error"]) for row in rows] == [False] * 12 + [True]


def test_lines_for_people_and_programs(tuned, capsys):
    run, images = tuned
    paths = [str(images / "test" / "red" / "0.png"), str(images / "test" / "blue")]
    assert main(["predict", str(run), *paths, "--json", "--classes", "cat,dog"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["path"] for record in records] == [paths[0], *(f"{paths[1]}/{i}.png" for i in range(4))]
    assert all(record["top"][0]["label"] == record["label"] in ("cat", "dog") for record in records)
    assert main(["predict", str(run), paths[0]]) == 0
    expected = Classifier(run).predict(paths[0])[0].top()
    first, *others = (f"{label} {100 * value:.1f} %" for label, value in expected)
    assert capsys.readouterr().out == f"{paths[0]}: {first} ({', '.join(others)})\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "nowhere.png"], "nowhere.png: there is no such file or folder"),
        (["RUN", "EMPTY"], "no images in this folder"),
        (["mini", "IMAGE"], "mini was tuned on no classes; name them: --classes cat,dog or a JSON file"),
        (["RUN", "IMAGE", "--top", "0"], "--top 0"),
        (["RUN", "IMAGE", "--batch-size", "0"], "batch size 0"),
    ],
)
def test_a_refusal_is_one_line(tuned, tmp_path, capsys, arguments, message):
    names = {"RUN": tuned[0], "IMAGE": tuned[1] / "test" / "red" / "0.png", "EMPTY": tmp_path}
    assert main(["predict", *(str(names.get(each, each)) for each in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_a_table_that_was_not_finished_is_not_there(tuned, tmp_path, monkeypatch):
    run, images = tuned

    def stop(self, x):
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "logits", stop)
    assert main(["predict", str(run), str(images / "test"), "--csv", str(tmp_path / "a.csv")]) == 130
    assert not list(tmp_path.iterdir())
