"""What was tuned, as others load it: the same logits in transformers and onnxruntime, a card, the hub."""

import base64
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import advtune
from advtune import Classifier, runs
from advtune.cli import main
from advtune.errors import UserError
from advtune.export import export, graph
from advtune.export.hub import STATUS
from advtune.preprocess import Preprocess
from advtune.prompts import Learned
from conftest import write_clip, write_images

COLOURS = ("blue", "green", "red")
TEMPLATE = "a photo of a {}."
LARGE = ["epochs=1", "lr=0.1"]  # so that what is learned shows


def tuned(method, backbone, images, out, *options):
    model = advtune.load(str(backbone), "cpu", "fp32")
    advtune.tune(method, model, f"folder:{images}", options=[*LARGE, *options], shots=2, out=out, show=False)
    return out


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="session")
def tower(place, clip_folder, image_folder):
    """A run that tuned the image tower, attacked and clean."""
    out = tuned("tecoa", clip_folder, image_folder, place / "tecoa")
    (clip_folder / "NOTICE").write_text("by somebody")
    advtune.evaluate(str(out), f"folder:{image_folder}", advtune.PGD(eps=1 / 255, steps=2), out=out, show=False)
    return out


@pytest.fixture(scope="session")
def prompts(place, clip_folder, image_folder):
    return tuned("capt", clip_folder, image_folder, place / "capt", "prompt_length=2", "depth=3")


def noise(n=5, side=16):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def session_logits(source, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])


# --- transformers ----------------------------------------------------------------------------------------


def test_transformers_gives_the_same_logits(tower, tmp_path, image_folder):
    from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

    export(tower, "huggingface", tmp_path / "out")
    theirs = CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    files = sorted(image_folder.rglob("*.png"))[:3]
    texts = [TEMPLATE.replace("{}", name) for name in COLOURS]
    inputs = processor(text=texts, images=[Image.open(f) for f in files], return_tensors="pt", padding=True)
    ours = Classifier(str(tower), precision="fp32")
    frozen = Classifier(runs.read_config(tower)["backbone"]["name"], COLOURS)
    x = torch.stack([torch.from_numpy(advtune.data.images.decode(f.read_bytes(), 16).copy()) for f in files]) / 255
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits_per_image, ours.logits(x), rtol=0, atol=1e-4)
        image = CLIPVisionModel.from_pretrained(tmp_path / "out")(inputs["pixel_values"]).pooler_output
        whole = theirs.vision_model(inputs["pixel_values"]).pooler_output
    assert torch.equal(image, whole)
    assert (ours.logits(x) - frozen.logits(x)).abs().max() > 0.1  # something was tuned


def test_a_zero_shot_pipeline_gives_the_same_probabilities(tower, tmp_path, image_folder):
    from transformers import pipeline

    export(tower, "huggingface", tmp_path / "out")
    file = image_folder / "test" / "red" / "0.png"
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "out"))
    found = classify(str(file), candidate_labels=list(COLOURS), hypothesis_template=TEMPLATE)
    expected = Classifier(str(tower), precision="fp32").predict(file)[0]
    assert {each["label"]: each["score"] for each in found} == pytest.approx(expected.probabilities, abs=1e-4)


@pytest.mark.parametrize(
    "shape",
    [
        dict(image=dict(num_attention_heads=2, patch_size=5, image_size=17, hidden_act="gelu"), embed=12),
        dict(text=dict(num_attention_heads=2, hidden_act="gelu", num_hidden_layers=1), image=dict(num_hidden_layers=2)),
    ],
    ids=["heads, stride, remainder", "layers"],
)
def test_other_backbones_come_back_as_they_were(tmp_path, shape):
    write_clip(tmp_path / "clip", **shape)
    facts = json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(facts | {"size": {"shortest_edge": 24}}))
    (tmp_path / "clip" / "card.json").write_text(json.dumps({"notice": "not for sale"}))
    export(tmp_path / "clip", "huggingface", tmp_path / "out")
    before, after = (advtune.load(str(tmp_path / name), "cpu", "fp32") for name in ("clip", "out"))
    assert after.clip.config == before.clip.config
    assert after.origin.notice == "not for sale"
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))
    tokens = before.tokens(COLOURS, TEMPLATE)
    assert torch.equal(after.tokens(COLOURS, TEMPLATE), tokens)
    x = noise(2, 30)
    assert torch.equal(after.classifier(tokens)(x), before.classifier(tokens)(x))


def test_learned_prompts_have_no_place_in_transformers(prompts, tmp_path):
    with pytest.raises(UserError, match=r"capt: capt learned prompts.*use --to onnx .* or --to prompts"):
        export(prompts, "huggingface", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- ONNX ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tower", "prompts"])
def test_onnxruntime_gives_the_same_logits(which, request, tmp_path):
    run = request.getfixturevalue(which)
    made = export(run, "onnx", tmp_path / "out")
    assert made["facts"]["difference"] < 1e-4
    facts = json.loads((tmp_path / "out" / "classifier.json").read_text())
    assert facts["classes"] == list(COLOURS)
    assert facts["input"]["shape"] == ["n", 3, 16, 16]
    ours = Classifier(str(run), precision="fp32")
    for n in (1, 5):
        found = session_logits(tmp_path / "out" / "model.onnx", noise(n))
        torch.testing.assert_close(found, ours.logits(noise(n)), rtol=0, atol=1e-4)


VARIANTS = {
    "zero-shot": lambda m: m,
    "deep prompts": lambda m: m.with_prompts(TEMPLATE, 2, 3, 3),
    "shallow image prompt": lambda m: m.with_prompts(TEMPLATE, 0, 1, 1),
    "frame": lambda m: m.with_fixed(Learned(None, None, torch.randn(3, 16, 16))),
    "class-specific": lambda m: m.with_context(3, COLOURS),
    "crop": lambda m: m.with_preprocess(Preprocess(resize=21, crop=16)),
    "stretched": lambda m: m.with_preprocess(Preprocess(resize=(20, 18), crop=16, mode="bilinear")),
    "as it is": lambda m: m.with_preprocess(Preprocess(resize=None, crop=None)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_in_onnx(vlm, variant):
    model = VARIANTS[variant](vlm)
    with torch.no_grad():
        f = model.classifier(model.tokens(COLOURS, TEMPLATE))
        text = (model.logit_scale * model.text_features(model.tokens(COLOURS, TEMPLATE))).T
        size = graph.input_size(model)
        x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        found = session_logits(graph.build(model, text, size).SerializeToString(), x)
        torch.testing.assert_close(found, f(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_every_activation_in_onnx(vlm, activation):
    config = vlm.clip.config
    tower = dataclasses.replace(config.image, activation=activation)
    clip = advtune.clip.CLIP(dataclasses.replace(config, image=tower))
    clip.load_state_dict(vlm.clip.state_dict())
    model = advtune.VLM(clip, vlm.tokenizer, vlm.origin)
    with torch.no_grad():
        text = model.text_features(model.tokens(COLOURS, TEMPLATE)).T * 100
        found = session_logits(graph.build(model, text, (16, 16)).SerializeToString(), noise())
        torch.testing.assert_close(found, model.image_features(noise()) @ text, rtol=0, atol=1e-4)


def test_large_weights_lie_beside(vlm, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "WHOLE", 1000)
    made = export(clip_folder, "onnx", tmp_path / "out", classes=COLOURS)
    assert set(made["files"]) >= {"model.onnx", "model.onnx.data"}
    ours = Classifier(vlm, COLOURS).logits(noise())
    torch.testing.assert_close(session_logits(tmp_path / "out" / "model.onnx", noise()), ours, rtol=0, atol=1e-4)


def test_a_graph_that_is_not_the_model_is_not_written(clip_folder, tmp_path, monkeypatch):
    norm = graph.Graph.norm
    monkeypatch.setattr(graph.Graph, "norm", lambda g, x, layer: norm(g, g("Neg", x), layer))
    with pytest.raises(UserError, match="the ONNX model's logits are off by"):
        export(clip_folder, "onnx", tmp_path / "out", classes=COLOURS)
    assert not list(tmp_path.iterdir())


def test_what_onnx_needs(clip_folder, vlm, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="was tuned on no classes"):
        export(clip_folder, "onnx", tmp_path / "out")
    with pytest.raises(UserError, match="a crop of 16 is larger than the image of 12x12"):
        graph.build(vlm.with_preprocess(Preprocess(resize=12, crop=16)), torch.zeros(24, 2), (12, 12))
    monkeypatch.setattr(graph, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'advtune\[export\]'"):
        export(clip_folder, "onnx", tmp_path / "out", classes=COLOURS)


# --- the prompts alone -----------------------------------------------------------------------------------


def test_exported_prompts_are_a_run_folder(prompts, tmp_path, image_folder):
    export(prompts, "prompts", tmp_path / "deep" / "out")
    before, after = (advtune.load(str(folder), "cpu", "fp32") for folder in (prompts, tmp_path / "deep" / "out"))
    assert after.origin.sha256 == before.origin.sha256
    assert (after.seen, after.run["train"]["classes"]) == (before.seen, list(COLOURS))
    assert torch.equal(Classifier(after).logits(noise()), Classifier(before).logits(noise()))
    assert sum(file.stat().st_size for file in (tmp_path / "deep" / "out").iterdir()) < 50_000


def test_the_prompt_file_says_enough_to_use_it_elsewhere(prompts, clip_folder, tmp_path):
    """Laid on transformers' CLIP by hooks, with nothing but the two files and the backbone."""
    from transformers import CLIPModel

    export(prompts, "prompts", tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["prompts"]
    learned = load_file(tmp_path / "out" / "delta.safetensors")
    assert {name: list(value.shape) for name, value in learned.items()} == {
        name: each["shape"] for name, each in block["tensors"].items()
    }
    words, patches = learned["prompts.text"], learned["prompts.image"]
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    count, position = words.shape[1], clip.text_model.embeddings.position_embedding.weight

    def first_words(module, inputs, hidden):
        return put(hidden, 1, words[0] + position[1 : 1 + count])

    def put(hidden, start, rows):
        rows = rows.expand(len(hidden), -1, -1)
        return torch.cat([hidden[:, :start], rows, hidden[:, start + rows.shape[1] :]], 1)

    def before_layer(layer, rows, start):
        layer.register_forward_pre_hook(lambda module, inputs: (put(inputs[0], start, rows), *inputs[1:]))

    clip.text_model.embeddings.register_forward_hook(first_words)
    clip.vision_model.embeddings.register_forward_hook(
        lambda module, inputs, hidden: torch.cat([hidden, patches[0].expand(len(hidden), -1, -1)], 1)
    )
    plain = len(clip.vision_model.embeddings.position_embedding.weight)
    for k in range(1, len(words)):
        before_layer(clip.text_model.encoder.layers[k], words[k], 1)
    for k in range(1, len(patches)):
        before_layer(clip.vision_model.encoder.layers[k], patches[k], plain)
    mean, std = (torch.tensor(block["pixels"][name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        theirs = clip(input_ids=torch.tensor(block["tokens"]), pixel_values=(noise() - mean) / std).logits_per_image
    torch.testing.assert_close(theirs, Classifier(str(prompts), precision="fp32").logits(noise()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("which", "learned"), [("tower", "tecoa learned the image tower"), ("clip_folder", "nothing")])
def test_no_prompts_no_file(which, learned, request, tmp_path):
    with pytest.raises(UserError, match=f"{learned}.* no prompts; use --to huggingface or --to onnx"):
        export(request.getfixturevalue(which), "prompts", tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


# --- the card --------------------------------------------------------------------------------------------


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_was_measured(tower, tmp_path, image_folder):
    export(tower, "huggingface", tmp_path / "out")
    front, body = card_of(tmp_path / "out")
    row = advtune.results.read(tower / "results.jsonl")[0]
    assert (front["library_name"], front["license"]) == ("transformers", "other")
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert "tecoa" in front["tags"]
    assert not {"base_model", "datasets"} & set(front)  # neither is on the hub
    (result,) = front["model-index"][0]["results"]
    found = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert found == {
        "clean accuracy": round(row.clean["accuracy"], 4),
        "robust accuracy, pgd linf eps 1/255": round(row.robust["accuracy"], 4),
    }
    low, high = (f"{100 * row.robust[name]:.1f}" for name in ("low", "high"))
    assert rf"{100 * row.robust['accuracy']:.1f} \[{low}, {high}\]" in body
    for part in ("## Intended use and limits", "n = 12", "Classes (3): blue, green, red", "2212.07016", "fp32"):
        assert part in body
    assert (tmp_path / "out" / "NOTICE").read_text() == "by somebody"


def test_a_card_without_numbers_and_rows_of_other_weights(tower, prompts, tmp_path, place):
    export(prompts, "onnx", tmp_path / "none")
    assert "Nothing was measured on this model" in card_of(tmp_path / "none")[1]
    foreign = place / "capt" / "results.jsonl"
    foreign.write_text((tower / "results.jsonl").read_text())
    try:
        export(prompts, "onnx", tmp_path / "other")
    finally:
        foreign.unlink()
    assert "Nothing was measured on this model" in card_of(tmp_path / "other")[1]


def test_a_card_claims_no_accuracy_of_classes_that_were_not_measured(tower, tmp_path):
    export(tower, "onnx", tmp_path / "same")
    export(tower, "onnx", tmp_path / "other", classes="cat,dog")
    (same, own), (other, body) = card_of(tmp_path / "same"), card_of(tmp_path / "other")
    assert (len(same["model-index"][0]["results"][0]["metrics"]), "model-index" in other) == (2, False)
    told = "Not all of this was measured with the class texts of this file"
    assert (told in own, told in body) == (False, True)
    assert "- Classes (3): blue, green, red\n" in body
    assert "- In this export: template a photo of a {}., classes (2): cat, dog\n" in body
    assert "In this export" not in own


def test_a_card_calls_nothing_robust_that_was_not_defended(tower, prompts, clip_folder, image_folder, tmp_path):
    clean = tuned("vpt", clip_folder, image_folder, tmp_path / "clean")
    made = dict(tower="huggingface", prompts="onnx", clean="onnx", clip_folder="huggingface")
    runs_of = dict(tower=tower, prompts=prompts, clean=clean, clip_folder=clip_folder)
    bodies = {}
    for name, to in made.items():
        export(runs_of[name], to, tmp_path / name / "out")
        bodies[name] = card_of(tmp_path / name / "out")[1]
    assert "against the perturbations above" in bodies["tower"]
    assert "against the perturbations that it was tuned with" in bodies["prompts"]  # nothing is above
    for name in ("clean", "clip_folder"):
        assert "It has no defence" in bodies[name]
        assert "Robust means" not in bodies[name]
        assert "must not change the answer" not in bodies[name]


def test_findings_of_the_checks_are_in_the_card(tower, tmp_path):
    rows = (tower / "results.jsonl").read_text()
    row = json.loads(rows)
    row["checks"] = [dict(name="gap", alarm=True, value=1, limit=0, n=12, text="PGD finds too little")]
    del row["crc32"]
    (tower / "results.jsonl").write_text(json.dumps(row) + "\n")
    try:
        export(tower, "huggingface", tmp_path / "out")
    finally:
        (tower / "results.jsonl").write_text(rows)
    assert "Alarm, tecoa: PGD finds too little (n = 12)" in card_of(tmp_path / "out")[1]


def test_no_path_of_this_machine_is_told(tower, prompts, tmp_path, monkeypatch):
    above = tuned("apt", tower, write_images(tmp_path / "set", train=2, test=1), tmp_path / "apt", "tokens=2")
    rows = (tower / "results.jsonl").read_text()
    row = json.loads(rows)
    del row["crc32"]
    row |= {
        "attack": {**row["attack"], "source": str(prompts)},
        "threat": f"transfer: images made on {prompts}, or not",
    }
    (above / "results.jsonl").write_text(json.dumps(row | {"model": ""}) + "\n")
    monkeypatch.setattr("advtune.export.check_push", lambda repo: None)
    monkeypatch.setattr("advtune.export.upload", lambda *given: "there")
    made = [export(prompts, to, tmp_path / to, push="me/it") for to in ("prompts", "onnx")]
    made += [export(above, to, tmp_path / f"{to}2", push="me/it") for to in ("prompts", "onnx")]
    made += [export(tower, "huggingface", tmp_path / "hf", push="me/it")]
    assert all(each["url"] == "there" for each in made)
    for each in made:
        for file in Path(each["out"]).iterdir():
            assert str(tmp_path.parents[1]).encode() not in file.read_bytes(), file
    body = card_of(tmp_path / "prompts2")[1]
    assert "itself tuned, with tecoa" in body
    assert "Threat: transfer: images made on capt, or not" in body
    assert "source=capt" in body


def test_hub_ids_of_backbone_and_data_are_in_the_card(tower, tmp_path):
    from advtune.export import source
    from advtune.export.card import front_matter

    found = source.open_source(str(tower), None, None, tmp_path / "out", False)
    train = {**found.config["train"], "spec": "hf:who/what:small"}
    there = dataclasses.replace(found, base="openai/clip", config={**found.config, "train": train})
    front = yaml.safe_load(front_matter(there, "onnx"))
    assert (front["base_model"], front["datasets"]) == ("openai/clip", ["who/what"])
    named = dataclasses.replace(there, config={**found.config, "train": {**train, "spec": "cifar10"}})
    assert source.dataset_ids(named) == ["uoft-cs/cifar10"]


@pytest.mark.parametrize(("which", "to"), [("tower", "huggingface"), ("prompts", "onnx"), ("prompts", "prompts")])
def test_the_program_in_the_card_runs(which, to, request, tmp_path, monkeypatch, capsys, image_folder):
    run = request.getfixturevalue(which)
    export(run, to, tmp_path / "out")
    program = card_of(tmp_path / "out")[1].partition("```python")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / ("out" if to == "onnx" else ""))
    Image.open(image_folder / "test" / "red" / "1.png").resize((37, 30)).save("photo.jpg", quality=95)
    names = {}
    exec(program.replace("\nclassify(", "\nfound = classify("), names)
    label = names["found"][0]["label"] if to == "huggingface" else capsys.readouterr().out.strip()
    best = Classifier(str(run), precision="fp32").predict("photo.jpg")[0]
    assert label == best.label
    if to == "onnx":
        image = Image.open("photo.jpg").convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save("photo.jpg", "PNG")  # half transparent, whatever its name is
        exec(program, names)
        best = Classifier(str(run), precision="fp32").predict("photo.jpg")[0]
        logits = Classifier(str(run), precision="fp32").logits(torch.from_numpy(names["pixels"]))
        assert logits.softmax(1).max() == pytest.approx(best.probability, abs=1e-6)


def test_names_cannot_break_the_card(clip_folder, tmp_path):
    names = ["a | b", "<b>c</b>", '"quoted"', "---"]
    export(clip_folder, "huggingface", tmp_path / "out", classes=names)
    front, body = card_of(tmp_path / "out")
    assert front["library_name"] == "transformers"
    code = body[body.index("```python") + 9 : body.index("```\n\n`CLIPModel")]
    compile(code, "card", "exec")
    assert json.dumps(names) in code


# --- the folder ------------------------------------------------------------------------------------------


def test_a_folder_is_new_and_whole(tower, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    export(tower, "huggingface", tmp_path / "taken")  # empty, so free
    before = {file.name: file.read_bytes() for file in (tmp_path / "taken").iterdir()}
    with pytest.raises(UserError, match="taken exists; choose another --out"):
        export(tower, "onnx", tmp_path / "taken")
    assert {file.name: file.read_bytes() for file in (tmp_path / "taken").iterdir()} == before
    monkeypatch.setattr("advtune.export.card", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(tower, "huggingface", tmp_path / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "taken").iterdir()} == {0o644}


def test_the_command(tower, prompts, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", str(prompts), "--to", "onnx", "--out", out, "--json", "--classes", "cat,dog"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made["files"]) == {"README.md", "NOTICE", "model.onnx", "classifier.json"}
    assert main(["export", str(tower), "--to", "huggingface", "--out", str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'hf'}: 7 files (model.safetensors 0.")
    assert main(["export", str(tower), "--to", "prompts", "--out", str(tmp_path / "no")]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)


# --- the hub ---------------------------------------------------------------------------------------------


class FakeHub(BaseHTTPRequestHandler):
    """What create_repo and upload_folder ask of the hub; every file may come inline."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.server.refusal in STATUS:
            self.answer({"error": "no"}, self.server.refusal)
            return
        self.answer({"id": "me/it", "sha": "0" * 40, "siblings": [], "private": self.server.private})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        hub.tokens.add(self.headers["Authorization"])
        here = f"http://127.0.0.1:{hub.server_port}/me/it"
        if hub.refusal:
            self.answer({"error": "no"}, hub.refusal)
        elif self.path == "/api/repos/create":
            hub.asked.append(json.loads(body))
            self.answer({"url": here})
        elif "/preupload/" in self.path and hub.busy:
            hub.busy -= 1
            self.answer({"error": "busy"}, 503)
        elif "/preupload/" in self.path:
            files = [
                dict(path=each["path"], uploadMode="regular", shouldIgnore=False) for each in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{here}/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})

    def answer(self, facts, code=200):
        body = json.dumps(facts).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.files, server.asked, server.tokens, server.refusal, server.busy, server.private = {}, [], set(), 0, 0, None
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_everything_arrives_at_the_hub(prompts, tmp_path, fake_hub, capsys):
    arguments = ["export", str(prompts), "--to", "prompts", "--out", str(tmp_path / "out"), "--push", "me/it"]
    assert main([*arguments, "--private"]) == 0
    assert fake_hub.files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert (fake_hub.asked[0]["name"], fake_hub.asked[0]["organization"]) == ("it", "me")
    assert fake_hub.asked[0].get("private") or fake_hub.asked[0].get("visibility") == "private"
    assert fake_hub.tokens == {"Bearer hf_test"}
    assert 'snapshot_download("me/it")' in fake_hub.files["README.md"].decode()
    assert f"uploaded: http://127.0.0.1:{fake_hub.server_port}/me/it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (401, "the hub refuses the token"),
        (403, "the token may not write there"),
        (404, "no such owner or repository"),
        (507, "507"),
        ("away", "http://127.0.0.1:PORT: [Errno "),
    ],
)
def test_an_upload_that_fails_leaves_the_folder_and_says_how_to_go_on(
    prompts, tmp_path, fake_hub, capsys, trouble, words
):
    fake_hub.refusal = trouble
    if trouble == "away":
        fake_hub.shutdown()
        fake_hub.server_close()
    out = tmp_path / "out"
    assert main(["export", str(prompts), "--to", "prompts", "--out", str(out), "--push", "me/it", "--private"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    words = words.replace("PORT", str(fake_hub.server_port))
    assert error.startswith(f"advtune: error: {out} is written, but not uploaded to me/it (")
    assert words in error
    assert error.endswith(f"try again: hf upload me/it {out} --private"), "what is private stays private"
    assert load_file(out / "delta.safetensors").keys() == load_file(prompts / "delta.safetensors").keys()
    assert "## Licence" in (out / "README.md").read_text()


def test_nothing_goes_to_a_public_place_when_it_is_to_be_private(prompts, tmp_path, fake_hub):
    fake_hub.private = False  # the repository is there already
    with pytest.raises(UserError, match="not uploaded to me/it, which is there and public"):
        export(prompts, "prompts", tmp_path / "out", push="me/it", private=True)
    assert not fake_hub.files
    export(prompts, "prompts", tmp_path / "two", push="me/it")
    assert "README.md" in fake_hub.files


def test_a_busy_hub_is_asked_again_in_silence(prompts, tmp_path, fake_hub, monkeypatch):
    import logging

    lines, client = [], logging.getLogger("huggingface_hub")
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())
    client.addHandler(listener)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    fake_hub.busy = 2
    level = client.level
    export(prompts, "prompts", tmp_path / "out", push="me/it")
    client.removeHandler(listener)
    assert "README.md" in fake_hub.files
    assert (fake_hub.busy, lines) == (0, [])
    assert client.level == level


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [("me/it", "", "no Hugging Face token"), ("it", "x", "give OWNER/NAME"), ("me/it it", "x", "--push me/it it: ")],
)
def test_what_a_push_needs_is_asked_before_anything_is_written(
    prompts, tmp_path, fake_hub, monkeypatch, repo, token, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message):
        export(prompts, "prompts", tmp_path / "out", push=repo)
    assert not list(tmp_path.iterdir())
    assert not fake_hub.asked
