"""The shared pieces of guided tuning: what of a model learns, what it answers, how far two answers are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from advtune.losses import kl, relations, squared_l2
from advtune.vlm import VLM, Batch

Answers = Callable[[Tensor], dict[str, Tensor]]
Distance = Callable[[Tensor, Tensor], Tensor]

TRAINABLE = ("text-prompts", "image-prompts", "prompts", "low-rank", "image-tower")
GUIDES, IMAGES = ("none", "frozen", "online", "average"), ("none", "clean", "adversarial", "both")
RAISED: dict[str, tuple[str, Distance | None] | None] = {  # by x': which part of an answer, how far from a target
    "ce": ("logits", None), "kl": ("logits", kl), "features": ("features", squared_l2), "guide": None
}  # fmt: skip
RAISES = tuple(RAISED)
CHOSEN = {"trainable": "low-rank", "rank": 8, "ce": "adversarial", "consistency": 0,
          "optimizer": "adamw", "lr": 3e-3, "augment": False}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "tecoa": {"trainable": "image-tower", "guide": "none", "consistency": 0},
    "pmg-aft": {"trainable": "image-tower", "sees": "adversarial"},
    "capt": {"trainable": "prompts", "coupling": "text-to-image", "ce": "clean", "lam": 6, "consistency": 6,
             "weight": "confidence"},
    "apd": {"trainable": "prompts", "guide": "online", "ce": "none", "consistency": 0},
    # What docs/guided.md chose on validation images, with its recipe.
    "few-shot": {**CHOSEN, "guide": "none", "adversary": "ce", "batch_size": 8, "epochs": 5},
    "transfer": {**CHOSEN, "guide": "frozen", "sees": "clean", "match": "features", "lam": 30, "adversary": "guide",
                 "batch_size": 32, "epochs": 1},
}  # fmt: skip
SEEN = {"logits": "logits", "features": "features", "relations": "logits"}  # what of an answer is matched


def learner(
    frozen: VLM, trainable: str, template: str, seed: int, rank: int, length: int, depth: int, coupling: str
) -> VLM:
    """A model of the frozen one's weights of which one of TRAINABLE learns. Raises UserError as `VLM.with_prompts` and
    `VLM.with_image_tower`."""
    if trainable in ("low-rank", "image-tower"):
        return frozen.with_image_tower(rank if trainable == "low-rank" else 0, seed)
    text, image = length * (trainable != "image-prompts"), length * (trainable != "text-prompts")
    return frozen.with_prompts(template, text, image, depth, coupling if text and image else "independent", seed)


def answers(models: Mapping[str, VLM], batch: Batch, name: str) -> Answers:
    """images -> unit `features` [B, D] and `logits` [B, C] of a model, its text encoded once."""
    encode, compare = models[name].towers(batch.tokens[name])

    def both(x: Tensor) -> dict[str, Tensor]:
        features = encode(x)
        return {"features": features, "logits": compare(features)}

    return both


def distance(match: str, direction: str, temperature: float) -> Distance:
    """D(target, answer) -> [B]: the KL of logits [B, C] in a direction at a temperature, the squared distance of unit
    features [B, D], or 1 - correlation of logits over the classes."""
    if match == "features":
        return squared_l2
    if match == "relations":
        return relations
    if direction == "target-first":
        return lambda target, answer: kl(target, answer, temperature)
    return lambda target, answer: kl(answer, target, temperature)
