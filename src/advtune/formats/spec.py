"""How a backbone is named: BASE, BASE+FILE (an image tower laid over it), BASE@SIDE (images of another side)."""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

from advtune.clip import ClipConfig
from advtune.errors import UserError
from advtune.preprocess import SIDE
from advtune.untrusted import expanded, is_there

SIDE_OF = re.compile(r"(.+)@(\d{1,5})")
HUB = "hf-hub:"  # open_clip's way to name the hub: there its format is preferred


class Spec(NamedTuple):
    """`name` is a folder, a file or a hub id; `tower` the file of an image tower; `side` in pixels, or none."""

    name: str
    tower: str = ""
    side: int | None = None

    def __str__(self) -> str:
        return self.name + (f"+{self.tower}" if self.tower else "") + (f"@{self.side}" if self.side else "")


def parse(text: str) -> Spec:
    """A backbone's name in its parts; what is there under the whole name is that. Raises UserError for a side that no
    image has, and for a + with nothing on one of its sides."""
    if is_there(expanded(text)):
        return Spec(text)
    found = SIDE_OF.fullmatch(text)
    side = int(found[2]) if found else None
    name = found[1] if found else text
    if side is not None and not 1 <= side <= SIDE:
        raise UserError(f"backbone {text[:200]!r}: a side of {side} pixels; from 1 to {SIDE}")
    if is_there(expanded(name)):
        return Spec(name, "", side)
    base, plus, tower = split(name)
    for part in (base, tower):
        if "@" in part and "/" not in part.rpartition("@")[2] and not is_there(expanded(part)):
            raise UserError(
                f"backbone {text[:200]!r}: nothing of that name is there, and behind an @ one side is meant: a whole "
                f"number of pixels from 1 to {SIDE}, as in BASE@336"
            )
    if plus and not (base and tower):
        raise UserError(
            f"backbone {text[:200]!r}: BASE+FILE lays the image tower in FILE over BASE; one of them is missing"
        )
    return Spec(base, tower, side)


def split(name: str) -> tuple[str, str, str]:
    """BASE, +, FILE: at the first + behind which a file lies, as folders may be called what they like; else at the
    first."""
    places = [i for i, letter in enumerate(name) if letter == "+"]
    place = next((i for i in places if name[:i] and is_there(expanded(name[i + 1 :]))), (places or [len(name)])[0])
    return name[:place], name[place : place + 1], name[place + 1 :]


def at_side(config: ClipConfig, side: int) -> ClipConfig:
    """The configuration for images of another side: positions are interpolated, resize and crop keep their proportion.
    Raises UserError for a side that is smaller than a patch, or that a ResNet cannot halve five times."""
    step = config.patch
    if side < step or (config.vision.stages and side % step):
        many = "a multiple of" if config.vision.stages else "at least"
        raise UserError(f"images of {side} pixels for patches of {step}: take {many} {step}")
    pixels, own = config.preprocess, config.image_size
    resize = pixels.resize
    if isinstance(resize, tuple):
        resize = (side, side)
    elif resize is not None:
        resize = round(resize * side / own)
    crop = side if pixels.crop is not None or resize is None else None
    return dataclasses.replace(
        config,
        image_size=side,
        preprocess=dataclasses.replace(pixels, resize=resize, crop=crop),
        vision=dataclasses.replace(config.vision, native=config.vision.native or own),
    )
