"""Several templates: the mean of the texts' unit vectors, wherever no text prompt is learned."""

import json

import pytest
import torch

import advtune
from advtune import evaluation, train
from advtune.cli import main
from advtune.data.templates import ENSEMBLE, filled, parts, read_templates
from advtune.edits import TextEdits
from advtune.errors import UserError
from backbones import bytepairs, unigram, write_siglip
from conftest import write_clip

TWO = ["a photo of a {}.", "one {} of many"]
BOTH = " | ".join(TWO)


def naive(model, classes, templates):
    """Text by text, one at a time."""
    found = []
    for name in classes:
        each = [model.text_features(model.tokenizer([t.replace("{}", name)]))[0].double() for t in templates]
        mean = sum(e / e.norm() for e in each) / len(each)
        found.append(mean / mean.norm())
    return torch.stack(found).float()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_equals_the_naive_mean(kind, vlm, tmp_path):
    if kind == "siglip":
        write_siglip(tmp_path)
        vlm = advtune.load(str(tmp_path), "cpu", "fp32")
    classes = ("red", "green dog", "blue")
    for templates in (TWO, ENSEMBLE):
        text = vlm.text_features(vlm.tokens(classes, " | ".join(templates)))
        assert torch.allclose(text, naive(vlm, classes, templates), atol=1e-5)
        assert torch.allclose(text.norm(dim=1), torch.ones(3), atol=1e-5)
    assert not torch.allclose(text, vlm.text_features(vlm.tokens(classes, TWO[0])), atol=1e-2)


def test_what_template_takes(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text(f"{TWO[0]}\n\n  {TWO[1]}\n")
    for given in (TWO, [BOTH], [str(file)]):
        assert read_templates(given) == BOTH
    assert parts(read_templates(["ensemble"])) == list(ENSEMBLE)
    assert len(set(ENSEMBLE)) == len(ENSEMBLE) > 4
    assert parts(read_templates([*TWO[1:], "ensemble"])) == [TWO[1], *ENSEMBLE]
    assert read_templates(None) is read_templates([]) is None
    assert parts("a {} | b") == ["a {} | b"]  # a bar within one template
    assert filled(("x", "y"), "{} | a {}") == ["x", "y", "a x", "a y"]
    (tmp_path / "odd.txt").write_text("a photo\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff{}")
    wrong = {"no.txt": "cannot read", "odd.txt": "exactly one", "empty.txt": "no template", "bytes.txt": "no text file"}
    for name, said in wrong.items():
        with pytest.raises(UserError, match=said):
            read_templates([str(tmp_path / name)])
    for given, said in (([TWO[0], TWO[0]], "twice"), ([TWO[0], "a photo"], "exactly one")):
        with pytest.raises(UserError, match=said):
            read_templates(given)


def test_from_training_to_a_prediction(vlm, clip_folder, image_folder, tmp_path, capsys):
    """An image-tower method is tuned on the mean, its run keeps the templates, and the row says which."""
    data, out = f"folder:{image_folder}", str(tmp_path / "run")
    several = [word for each in TWO for word in ("--template", each)]
    given = [
        "train",
        "tecoa",
        "--backbone",
        str(clip_folder),
        "--data",
        data,
        *several,
        "--shots",
        "1",
        "--epochs",
        "1",
    ]
    assert main([*given, "--out", out]) == 0
    capsys.readouterr()
    assert main(["evaluate", out, "--data", data, "--attack", "pgd", "-a", "steps=2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    single = evaluation.evaluate(vlm, advtune.load_task(data, template=TWO[0]), show=False)
    assert row["data"]["template"] == row["train"]["template"] == BOTH
    assert row["data"]["texts_sha256"] != single.data["texts_sha256"]
    picture = next((image_folder / "test" / "red").iterdir())
    assert main(["predict", out, str(picture), "--precision", "fp32", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["probability"]
    model = advtune.load(out, "cpu", "fp32")
    same, other = (advtune.Classifier(model, template=each).predict(picture)[0].probability for each in (BOTH, TWO[0]))
    assert same == pytest.approx(shown, abs=1e-3) and other != pytest.approx(same, abs=1e-3)
    assert main(["export", out, "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 2
    assert "give one --template" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["capt", "coop"])
def test_a_learned_text_takes_one(method, vlm, image_folder, tmp_path, capsys):
    task = advtune.load_task(f"folder:{image_folder}", template=BOTH)
    with pytest.raises(UserError, match="give one --template"):
        train.tune(method, vlm, task, shots=1, epochs=1, out=tmp_path / "run", show=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_text_edits_go_into_every_template(vlm, image_folder):
    task = advtune.load_task(f"folder:{image_folder}", template=BOTH)
    row = evaluation.evaluate(vlm, task, TextEdits(alphabet="ab"), show=False)
    edits = row.stages[0]["edits"]
    names = [edits.get(name, name) for name in task.classes]
    assert edits and row.robust["correct"] < row.clean["correct"]
    assert len(vlm.tokens(names, BOTH)) == 2


@pytest.mark.parametrize("kind", ["CLIP", "CLIP, context 128", "SigLIP", "SigLIP 2"])
def test_a_context_is_learned_with_every_tokenizer(kind, tmp_path, task):
    """16 learned words, and 100 where the context holds 128."""
    if kind.startswith("CLIP"):
        write_clip(tmp_path, text=dict(max_position_embeddings=128) if "128" in kind else None)
    else:
        write_siglip(tmp_path, words=unigram if kind == "SigLIP" else bytepairs)
    model, words = advtune.load(str(tmp_path), "cpu", "fp32"), 100 if "128" in kind else 16
    tuned = train.tune("coop", model, task, shots=1, epochs=1, options={"tokens": words, "lr": 0.1}, show=False)
    assert tuned.delta()["prompts.text"].shape[-2] == words
    tokens = tuned.tokens(task.classes, task.template)
    moved = tuned.with_fixed(tuned.prompts()._replace(text=-tuned.prompts().text)).text_features(tokens)
    assert not torch.allclose(moved, tuned.text_features(tokens), atol=1e-3)
    names = model.tokens(("red", "green", "blue"), "{}")
    assert len({tuple(each) for each in tuned.tokens(("red", "green", "blue"), "").tolist()}) == len(names)
    assert evaluation.evaluate(tuned, task, show=False).clean["n"] == 12
