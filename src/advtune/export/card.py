"""The model card of an export: what it is, how to use it, what was measured, what it is not for, how it was made."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from advtune import __version__
from advtune.export.source import Source, dataset_ids
from advtune.methods import METHODS
from advtune.pretrained import EMBEDDED
from advtune.report import render
from advtune.report.formats import escape
from advtune.report.table import latest, pixels
from advtune.results import Row

LIBRARIES = {"huggingface": "transformers", "onnx": "onnx", "prompts": "advtune"}
TASKS = {"onnx": "image-classification"}
ZERO_SHOT = "zero-shot-image-classification"
SHOWN = 30  # class names

HUGGINGFACE = """\
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model={place})
classify("photo.jpg", candidate_labels={labels}, hypothesis_template={template})
```

`CLIPModel.from_pretrained` loads the two towers, `CLIPVisionModel.from_pretrained` the image tower alone, for a
vision-language model. Pixels are resized and normalised by `preprocessor_config.json`."""
ONNX = """\
import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

labels = json.load(open("classifier.json", encoding="utf-8"))["classes"]
session = onnxruntime.InferenceSession("model.onnx")
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
{resize}
pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
print(labels[session.run(None, {{"pixels": pixels}})[0].argmax()])
```

Input `pixels`: float32 [N, 3, {height}, {width}] in [0, 1], any N; normalisation is inside. Output `logits`: [N, C],
the classes of `classifier.json` in order. The classes are fixed.{where}"""
SQUARE = """\
scale = {side} / min(image.size)
image = image.resize([{side} if v == min(image.size) else int(v * scale) for v in image.size], Image.Resampling.BICUBIC)
left, top = (round((v - {side}) / 2) for v in image.size)
image = image.crop((left, top, left + {side}, top + {side}))"""
OTHER = "image = ImageOps.fit(image, ({width}, {height}), Image.Resampling.BICUBIC)"
PROMPTS = """\
import advtune
{load}
classifier = advtune.Classifier({folder})
print(classifier.predict("photo.jpg")[0].label)
```

The folder holds what was learned, not the backbone: that is `{backbone}`, sha256 `{sha}`, which is compared when the
folder is loaded.{where} `config.json`, under `prompts`, says for other programs how each tensor of `delta.safetensors`
enters the towers, with the token ids of the class texts."""


def card(source: Source, to: str, facts: dict[str, Any], place: str) -> str:
    """README.md of the exported folder: the hub's front matter, then Markdown. place: where users will have it."""
    blocks = [
        f"---\n{front_matter(source, to)}\n---",
        f"# {escape(place)}",
        introduction(source),
        "## How to use it",
        usage(source, to, facts, place),
        "## What was measured",
        results(source, to),
        "## Intended use and limits",
        limits(source),
        "## How it was made",
        "\n".join(f"- {line}" for line in making(source)),
        "## Licence and notices",
        licence(source),
    ]
    return "\n\n".join(blocks) + "\n"


def front_matter(source: Source, to: str) -> str:
    """The YAML that the hub reads: library, task, tags, backbone and data where they are on the hub, accuracies."""
    from huggingface_hub import EvalResult, ModelCardData

    task = TASKS.get(to, ZERO_SHOT)
    found: list[Any] = []
    for row in latest([row for row in source.rows if to != "onnx" or same_words(source, row)]):
        about = dict(task_type=task, dataset_type=row.data["name"], dataset_name=row.data["name"],
                     dataset_split=row.data["part"], metric_type="accuracy")  # fmt: skip
        measured = {"clean accuracy": row.clean}
        if row.attack and row.robust:
            attack, norm = row.attack["name"], row.attack.get("norm", "linf")
            measured[f"robust accuracy, {attack} {norm} eps {pixels(row.attack['eps'])}"] = row.robust
        for name, counts in measured.items():
            result = EvalResult(**about, metric_name=name, metric_value=round(counts["accuracy"], 4))
            found += [] if result in found else [result]
    tags = ["advtune", "clip", "adversarial-robustness", *([source.config["method"]] if source.config else [])]
    return ModelCardData(
        library_name=LIBRARIES[to], pipeline_tag=task, license="other", tags=tags, base_model=source.base or None,
        datasets=dataset_ids(source) or None, model_name=source.name, eval_results=found or None,
    ).to_yaml()  # fmt: skip


def introduction(source: Source) -> str:
    """One paragraph: what this is."""
    if not source.config:
        return f"The CLIP-style backbone `{source.name}` as it is, not tuned, written by advtune {__version__}."
    method, run = source.config["method"], source.config
    paper = getattr(METHODS.get(method), "paper", "")
    trains = getattr(METHODS.get(method), "trains", "")
    return (
        f"The CLIP-style backbone `{run['backbone']['name']}`, tuned with {method}{f' ({paper})' if paper else ''} "
        f"by advtune {__version__}{f'; what was tuned: {trains}' if trains else ''}."
    )


def usage(source: Source, to: str, facts: dict[str, Any], place: str) -> str:
    """A program that runs, and what goes in and out."""
    labels = list(source.classes[:SHOWN]) or ["cat", "dog"]
    if to == "huggingface":
        text = HUGGINGFACE.format(place=quoted(place), labels=quoted(labels), template=quoted(source.template))
        if source.model.clip.config.sigmoid:  # the same classes under another name
            text = re.sub(r"CLIP(Vision)?Model", r"Siglip\1Model", text)
    elif to == "onnx":
        _, _, height, width = facts["input"]
        resize = SQUARE.format(side=height) if height == width else OTHER.format(height=height, width=width)
        where = f" Run it where the files are: `hf download {place} --local-dir .`" if "/" in place else ""
        text = ONNX.format(height=height, width=width, resize=resize, where=where)
    else:
        backbone = source.config["backbone"]
        tuned = backbone["tuned"]
        where = f" It is itself tuned, with {tuned['method']}: give its run folder along." if tuned else ""
        if not source.base and backbone["name"] not in EMBEDDED:
            where += " If it is a folder, write its path, from here, to `backbone.path` in `config.json`."
        load, folder = "", quoted(place)
        if "/" in place:  # on the hub
            load, folder = (
                f"from huggingface_hub import snapshot_download\n\nfolder = snapshot_download({folder})",
                "folder",
            )
        text = PROMPTS.format(load=load, folder=folder, backbone=backbone["name"], sha=backbone["sha256"], where=where)
    return f"```python\n{text}"


def quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def same_words(source: Source, row: Row) -> bool:
    """Whether a row was measured with the class texts of this export."""
    texts = "\n".join(source.template.replace("{}", name) for name in source.classes)
    return row.data.get("texts_sha256") == hashlib.sha256(texts.encode()).hexdigest()


def results(source: Source, to: str) -> str:
    """The tables of `advtune report`, with what the checks found, or that there is nothing."""
    if not source.rows:
        return "Nothing was measured on this model. Do not take it for robust before an attack was tried on it."
    text = re.sub(r"\n*<details>.*?</details>", "", render(latest(source.rows), "markdown"), flags=re.DOTALL).strip()
    if to == "onnx" and not all(same_words(source, row) for row in source.rows):
        text = "Not all of this was measured with the class texts of this file, but with those of its set.\n\n" + text
    return text + "\n\n" + (
        "A robust accuracy is the share of images that stay right under that attack, at that eps; a stronger attack "
        "finds less. PGD's numbers are upper bounds, AutoAttack's with its checks are the ones to compare."
    )  # fmt: skip


def limits(source: Source) -> str:
    """What it is for and what nobody should expect of it."""
    attacked = any(row.attack and row.robust for row in source.rows)
    if source.config and source.config["attack"]["eps"]:
        lines = [
            "For research on robustness, and as a classifier of images into the named classes where small changes of "
            "pixels must not change the answer. Measure it on your own images first.",
            f"Robust means: against the perturbations {'above' if attacked else 'that it was tuned with'}, at most eps "
            "in every pixel (linf) or in length (l2). Nothing is claimed of larger ones, patches, rotations, weather, "
            "other cameras or other classes.",
            "Tuning against attacks usually costs clean accuracy, most on images and classes that it was not tuned on.",
        ]
    else:
        lines = [
            "To compare with, in research on robustness. It has no defence: no attack was part of its training, and a "
            "change of the pixels that nobody sees can turn its answers.",
        ]
    lines += [
        "Probabilities are not calibrated.",
        "What the backbone learned of people and of the web is still there. Not for decisions about people, nor where "
        "a wrong answer harms somebody and nobody looks.",
    ]
    if precisions := sorted({row.precision for row in source.rows}):
        lines.append(f"The numbers above were measured by advtune in {' and '.join(precisions)}; this export is fp32.")
    return "\n".join(f"- {line}" for line in lines)


def making(source: Source) -> list[str]:
    """The facts of backbone, data, attack and options, one a line."""
    if not source.config:
        return [f"Backbone: `{source.name}`, sha256 `{source.model.origin.sha256}`"]
    run = source.config
    train, backbone, attack = run["train"], run["backbone"], run["attack"]
    tuned = backbone["tuned"]
    before = f", itself tuned with {tuned['method']} on {escape(tuned['on'])}" if tuned else ""
    shots = f"{train['shots']} a class, " if train["shots"] else ""
    lines = [
        f"Backbone: `{backbone['name']}`{before}, sha256 `{backbone['sha256']}`",
        f"Tuned on: {escape(train['name'])}, part {train['part']}, {train['n']} images ({shots}seed {train['seed']}), "
        f"sha256 `{train['sha256']}`",
        f"Classes {some(train['classes'])}",
        f"Template: {escape(train['template'])}",
        f"Attack while tuning: {attack['name']}, eps {pixels(attack['eps'])}, {attack['steps']} steps"
        if attack["eps"]
        else "Tuned on clean images",
        f"Recipe: {escape(listed(run['recipe']))}",
    ]
    if run["options"]:
        lines.append(f"Options of {run['method']}: {escape(listed(run['options']))}")
    if run["reconstructed"]:
        lines.append(f"No public source gives these options; they are reconstructed: {', '.join(run['reconstructed'])}")
    if list(source.classes) != train["classes"] or source.template != train["template"]:
        lines.append(f"In this export: template {escape(source.template)}, classes {some(source.classes)}")
    lines += [escape(note) for note in run.get("notes", [])]
    return [*lines, f"Versions: {listed(run['versions'])}; weights sha256 `{source.model.origin.sha256}`"]


def some(names: Sequence[str]) -> str:
    return escape(f"({len(names)}): " + ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else ""))


def listed(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in facts.items())


def licence(source: Source) -> str:
    """What the backbone asks for; advtune gives no rights that it does not have."""
    notice = source.model.origin.notice
    lines = [
        "The weights stand under the terms of their backbone and of the images they were tuned on; what was added by "
        "tuning gives no further rights.",
        f"Backbone: {escape(notice)}." if notice else "",
        "Licence and notice files of the backbone, where it has them, lie beside this card.",
    ]
    return " ".join(line for line in lines if line)
