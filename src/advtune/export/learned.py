"""Learned prompts alone: a run folder of kilobytes, whose config.json says how they enter a plain CLIP."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from advtune import runs
from advtune.errors import UserError
from advtune.export.folder import write_json
from advtune.export.source import Source

ENTERS = {
    "text": "[K, P, W], or [K, C, P, W] with one for each class. [0] replaces the token embeddings at places {first} "
    "to {last} of every text, before position embeddings are added; [k] replaces the hidden states there before layer "
    "k.",
    "image": "[K, P, W]. [0] is appended after the class token, if there is one, and the patches, which have their "
    "position embeddings, before the first layer norm; it gets no position embedding and is not read at the end. [k] "
    "replaces the hidden states there before layer k.",
    "pad": "[3, S, S]. Added to the normalised pixels.",
}
LOGITS = "exp(logit_scale) * normalised(image embedding) @ normalised(text embedding).T{bias}; layers count from 0"


def write_learned(source: Source, folder: Path) -> dict[str, Any]:
    """delta.safetensors, config.json and images.json: a run folder that advtune loads where the backbone is, with a
    block "prompts" for those who lay the prompts on a CLIP of their own. Raises UserError when there are none."""
    model = source.model
    delta = {name: value for name, value in model.delta().items() if name.startswith("prompts.")}
    if not delta:
        learned = f"{source.config['method']} learned the image tower" if source.config else "nothing was learned"
        raise UserError(f"{source.name}: {learned}, no prompts; use --to huggingface or --to onnx")
    tokens, first = model.tokens(source.classes, source.template), model.clip.config.first
    block = {
        "format": 1,
        "tensors": {
            name: {
                "shape": list(value.shape),
                "enters": ENTERS[name.removeprefix("prompts.")].format(
                    first=f"{first}", last="P" if first else "P - 1"
                ),
            }
            for name, value in delta.items()
        },
        "classes": list(source.classes),
        "template": model.template or source.template,
        "tokens": tokens.tolist(),
        "pixels": {"range": [0, 1], **asdict(model.clip.config.preprocess)},
        "logits": LOGITS.format(bias="" if model.clip.logit_bias is None else " + logit_bias"),
    }
    save_file(delta, folder / runs.DELTA, metadata={"format": "pt"})
    write_json(folder / runs.CONFIG, {**source.config, "prompts": block})
    shutil.copyfile(Path(source.model.run["folder"]) / runs.IMAGES, folder / runs.IMAGES)
    return {"tensors": {name: list(value.shape) for name, value in delta.items()}}
