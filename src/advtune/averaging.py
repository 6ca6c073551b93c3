"""Weights between weights: the average over a run, and the way from the original tower to the tuned one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from advtune.errors import UserError
from advtune.low_rank import merge
from advtune.recipe import Recipe
from advtune.vlm import VLM, shell

AVERAGE = "average"  # its name among a method's models


def with_average(models: dict[str, VLM], recipe: Recipe) -> dict[str, VLM]:
    """The models with `average` among them, a frozen copy of what learns in the student, when the recipe asks for one;
    of low-rank updates A and B are averaged, not their product.
    Raises UserError for a student of prompts that is to be interpolated: prompts begin nowhere."""
    student = models["student"]
    if recipe.interpolate < 1 and student.learned == ("prompts.",):
        raise UserError("interpolate: between the original image tower and the tuned one; prompts have no original")
    if not recipe.average:
        return models
    clip = shell(student.clip)
    if student.learned == ("clip.image.",):  # else the tower is everybody's
        clip.image = copy.deepcopy(clip.image)
    return {**models, AVERAGE: student.like(clip, copy.deepcopy(student.prompts)).requires_grad_(False)}


def averaged(models: Mapping[str, VLM]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each parameter that learns in the student, by name: its average, and itself; none where none is kept."""
    if AVERAGE not in models:
        return {}
    kept = dict(models[AVERAGE].named_parameters())
    return {n: (kept[n], p) for n, p in models["student"].named_parameters() if p.requires_grad}


@torch.no_grad()
def follow(pairs: Iterable[tuple[Tensor, Tensor]], decay: float, step: int) -> None:
    """average <- d average + (1 - d) parameter after step 0, 1, ... of a cycle, with d = min(decay, (1 + step) / (10 +
    step)), so that the first steps do not stay in it (Polyak averaging with TensorFlow's warm-up)."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    for average, parameter in pairs:
        average.lerp_(parameter, share)


def result(models: Mapping[str, VLM], original: VLM, recipe: Recipe) -> VLM:
    """What a run learned: the student or its average, low-rank updates merged, as far from the original as the recipe
    says."""
    tuned = models.get(AVERAGE, models["student"])
    if merge(tuned.clip.image):
        tuned = tuned.like(tuned.clip, tuned.prompts)  # without the program that was compiled of what is merged now
    if recipe.interpolate < 1:
        interpolate(original, tuned, recipe.interpolate)
    return tuned


@torch.no_grad()
def interpolate(original: VLM, tuned: VLM, share: float) -> None:
    """The image tower of `tuned` becomes original + share * (tuned - original), in place (WiSE-FT, arXiv:2109.01903):
    share 0 is the original, 1 the tuned tower."""
    start = dict(original.clip.image.named_parameters())
    for name, value in tuned.clip.image.named_parameters():
        value.copy_(torch.lerp(start[name], value, share))
