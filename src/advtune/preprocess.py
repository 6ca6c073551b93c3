"""From pixels in [0, 1] to what the image tower was trained on, inside the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from advtune.errors import UserError

SIDE = 4096  # of a picture that a model gets; more is a mistake
LARGEST = 1e4  # of a mean; and the inverse of a standard deviation
NARROW = 100  # longer side by shorter, beyond which a resized picture would fill the memory
INTERPOLATION = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as preprocessor configs store them


@dataclass(frozen=True)
class Preprocess:
    """Resize (antialiased), centre crop, normalise: [B, 3, any, any] in [0, 1] -> [B, 3, S, S].

    `resize` is the short side, or (height, width) for a resize that ignores the aspect ratio, or none;
    `crop` the side of the centre crop, or none. The defaults are OpenAI CLIP's statistics.
    """

    resize: int | tuple[int, int] | None = 224
    crop: int | None = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    mode: str = "bicubic"

    def __post_init__(self) -> None:
        """Raises UserError for sides that are not 1 to SIDE, and statistics that are not three finite numbers."""
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize,)
        for side in (*(() if self.resize is None else sides), *(() if self.crop is None else (self.crop,))):
            if not _is_side(side):
                raise UserError(f"preprocessing: a size is {side!r:.40}, not a side of 1 to {SIDE} pixels")
        for name, values, low in (("mean", self.mean, -LARGEST), ("std", self.std, 1 / LARGEST)):
            if not _are_numbers(values, low):
                raise UserError(f"preprocessing: {name} {values!r:.60} is not 3 numbers from {low:g} to {LARGEST:g}")
        if self.mode not in INTERPOLATION.values() or len(sides) > 2:
            raise UserError(f"preprocessing: to {self.resize!r:.40}, {self.mode!r:.40} is nothing that is known")

    @property
    def side(self) -> int | tuple[int, int] | None:
        """The side of what comes out, of a square picture; (height, width) if that is no square, none if it is as it
        goes in."""
        if self.crop is not None:
            return self.crop
        return self.resize[0] if isinstance(self.resize, tuple) and len(set(self.resize)) == 1 else self.resize

    def __call__(self, x: Tensor) -> Tensor:
        x = self.crop_centre(self.resized(x))
        mean, std = (channels(each, x.device, x.dtype) for each in (self.mean, self.std))
        return (x - mean) / std

    def resized(self, x: Tensor) -> Tensor:
        if self.resize is None:
            return x
        height, width = x.shape[-2:]
        if isinstance(self.resize, int):
            short = min(height, width)
            size = (max(1, self.resize * height // short), max(1, self.resize * width // short))
        else:
            size = self.resize
        if size == (height, width):
            return x
        if max(size) > NARROW * min(size):
            raise UserError(f"an image of {height} x {width} pixels is too narrow; cut it nearer to a square")
        # Bicubic interpolation overshoots; 8-bit pipelines clip there, and so do we.
        return F.interpolate(x, size=size, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)

    def crop_centre(self, x: Tensor) -> Tensor:
        if self.crop is None or x.shape[-2:] == (self.crop, self.crop):
            return x
        top, left = (x.shape[-2] - self.crop) // 2, (x.shape[-1] - self.crop) // 2
        if top < 0 or left < 0:
            pad = (max(0, -left), max(0, -left) + 1, max(0, -top), max(0, -top) + 1)
            return self.crop_centre(F.pad(x, pad))
        return x[..., top : top + self.crop, left : left + self.crop]


def channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number a channel, [3, 1, 1]; filled in on the device, which would wait for a copy from the host."""
    return torch.stack([torch.full((1, 1), value, device=device, dtype=dtype) for value in values])


def from_config(config: Mapping[str, Any]) -> Preprocess:
    """Read a Hugging Face preprocessor_config.json.

    Raises UserError on an interpolation other than bilinear or bicubic, a size that says nothing, and as Preprocess.
    """
    resample = config.get("resample", 3)
    if not isinstance(resample, int) or resample not in INTERPOLATION:
        raise UserError(f"preprocessor_config.json: resample {resample!r:.40} is not bilinear (2) or bicubic (3)")
    default = Preprocess()
    normalise = config.get("do_normalize", True)
    return Preprocess(
        resize=_resize(config.get("size", 224)) if config.get("do_resize", True) else None,
        crop=_crop(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None,
        mean=_values(config.get("image_mean", default.mean)) if normalise else (0.0, 0.0, 0.0),
        std=_values(config.get("image_std", default.std)) if normalise else (1.0, 1.0, 1.0),
        mode=INTERPOLATION[resample],
    )


def _values(numbers: Any) -> Any:
    return tuple(numbers) if isinstance(numbers, list) else numbers


def _resize(size: Any) -> Any:
    if isinstance(size, int):
        return size
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return size["shortest_edge"]
    if isinstance(size, Mapping) and "height" in size and "width" in size:
        return size["height"], size["width"]
    raise UserError(f"preprocessor_config.json: size {size!r:.60} has neither shortest_edge nor height and width")


def _crop(size: Any) -> Any:
    if isinstance(size, int):
        return size
    if not isinstance(size, Mapping) or "height" not in size or size["height"] != size.get("width"):
        raise UserError(f"preprocessor_config.json: crop_size {size!r:.60} is not square")
    return size["height"]


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= SIDE


def _are_numbers(values: Any, low: float) -> bool:
    """Whether there is one for each channel, none infinite and none below `low`."""
    kinds = isinstance(values, tuple) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return kinds and len(values) == 3 and all(low <= value <= LARGEST for value in values)
