"""Encoded images -> uint8 pixels, decoded once and kept under a hash of everything that decides them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError

from advtune.data.cache import Arrays, cache_dir, create, in_memory, load, replacing
from advtune.data.fewshot import Split, select
from advtune.data.sources import Part
from advtune.data.task import Task
from advtune.errors import UserError
from advtune.memory import room
from advtune.progress import track
from advtune.untrusted import visible

DECODER = f"2, Pillow {PIL.__version__}"  # the number goes up with every change to `decode`
Decoded = tuple[torch.Tensor, torch.Tensor, dict[int, str]]  # x uint8 [N, 3, S, S], good bool [N], why bad
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow's others are rare, and EPS runs a program
PIXELS = 89_478_485  # Pillow warns of a decompression bomb beyond these
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ORIENTATION = 0x0112  # of EXIF's tags
_warned: set[str] = set()


@dataclass
class Images:
    """The pixels of a Split, in its fixed order.

    x: uint8 [N, 3, S, S] ("native": [N, 3, height, width]). y: int64 [N]. ids: where each came from.
    sha256: of the content hashes and labels, in order. hashes: of each image's encoded bytes.
    skipped: ids of images that could not be decoded.
    """

    x: torch.Tensor
    y: torch.Tensor
    ids: list[str]
    sha256: str
    skipped: list[str]
    hashes: list[str]

    def batch(self, rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 3, S, S] in [0, 1] and labels [B] of these rows [B], on a device."""
        x = self.x[rows.to(self.x.device)].to(device, non_blocking=True)
        return x.float() / 255, self.y[rows].to(device, non_blocking=True)

    def on(self, device: torch.device) -> Images:
        """These images with their pixels on the device where they are needed, if they fit in it."""
        return replace(self, x=self.x.to(device)) if self.x.nbytes <= room(device) else self


def load_images(task: Task, split: Split, *, cache: Path | None = None, progress: bool = True) -> Images:
    """Choose, read and decode the images of `split`. `cache` is a folder, by default `cache_dir()`.

    Raises UserError if the part cannot be had, a class has too few images, or an image cannot be decoded
    (with on_bad="fail"; with "skip" it is named in `skipped`).
    """
    records = select(task, split, partial(track, label="reading", show=progress))
    hashes, y = records.hashes(), torch.tensor(records.labels, dtype=torch.int64)
    file = (cache or cache_dir()) / f"{cache_key(hashes, split.resolution)}.safetensors"
    stored = load(file, len(records))
    x, good, reasons = (*stored, {}) if stored else decode_into(file, records, split.resolution, progress)
    bad = [i for i, ok in enumerate(good.tolist()) if not ok]
    if bad and (split.on_bad == "fail" or len(bad) == len(records)):
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        why = reasons.get(bad[0]) or _why(records.read(bad[0]), split.resolution)  # the cache keeps no reasons
        raise UserError(f"cannot decode {records.ids[bad[0]]}{more} ({why}); mend it, or use on_bad=skip")
    if bad:
        x, y = x[good], y[good]
    kept = [i for i, ok in enumerate(good.tolist()) if ok]
    content = "".join(f"{hashes[i]}:{records.labels[i]}\n" for i in kept)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Images(
        x, y, [records.ids[i] for i in kept], digest, [records.ids[i] for i in bad], [hashes[i] for i in kept]
    )


def decode(data: bytes, resolution: int | str) -> np.ndarray:
    """Encoded bytes -> uint8 [3, S, S]: upright, RGB, short side to S (bicubic), centre crop; of an animation the first
    picture.

    "native" keeps the size. Transparent pixels are laid on white. 16-bit grey keeps its upper 8 bits. Raises what
    Pillow raises, and ValueError for a format that is not in FORMATS and as `fit`.
    """
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"none of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"more than {PIXELS / 1e6:.0f} million pixels") from None
    with opened:
        return fit(opened, resolution)


def fit(image: Image.Image, resolution: int | str) -> np.ndarray:
    """A picture -> uint8 [3, S, S], as `decode` says. Raises ValueError, before a pixel is decoded, for none and for
    more than PIXELS."""
    if min(image.size) < 1:
        raise ValueError("no pixels")
    if image.width * image.height > PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {PIXELS / 1e6:.0f} million")
    image.load()
    image = to_rgb(upright(image))
    if resolution != "native":
        image = square(image, int(resolution))
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def square(image: Image.Image, side: int) -> Image.Image:
    """Short side to `side`, then the centre. Of a very narrow picture, whose long side would fill the memory, the
    centre alone is computed."""
    scale = side / min(image.size)
    width, height = (side if v == min(image.size) else int(v * scale) for v in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    if width * height > PIXELS:
        across, down = image.width / width, image.height / height
        right, bottom = min(image.width, (left + side) * across), min(image.height, (top + side) * down)
        box = (left * across, top * down, right, bottom)
        return image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    if scale != 1:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + side, top + side))


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; as it lies where that is damaged or not there."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow raises nearly anything on hostile bytes
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB. Raises ValueError for floating-point and 32-bit pictures, whose range is unknown."""
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits to white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit pixels, whose range is not known")
        wide = image.mode.startswith("I;16") or values.max() > 255  # "I" is what 16 bits were before Pillow 11
        return Image.fromarray((values >> 8 if wide else values).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode_into(file: Path, records: Part, resolution: int | str, progress: bool) -> Decoded:
    """`decode_all` by way of `file`, so that x need not fit into memory; without it, with a warning, if it cannot
    be written."""
    try:
        with replacing(file) as beside:
            reasons = decode_all(records, resolution, progress, partial(create, beside))[2]
    except OSError as error:
        if str(file.parent) not in _warned:
            _warned.add(str(file.parent))
            reason = error.strerror or str(error).splitlines()[0]
            warnings.warn(f"images are not cached: {file.parent}: {reason}; set ADVTUNE_CACHE", stacklevel=3)
    else:
        if stored := load(file, len(records)):
            return *stored, reasons
    return decode_all(records, resolution, progress, in_memory)


def decode_all(
    records: Part, resolution: int | str, progress: bool, room: Callable[[tuple[int, ...]], Arrays]
) -> Decoded:
    """Decode into what `room` gives for a shape of x, zeroed. Raises UserError on mixed native sizes."""
    n, reasons, failed = len(records), dict[int, str](), dict[int, tuple[int, ...]]()
    lock = threading.Lock()
    arrays: Arrays | None = None

    def one(i: int) -> None:
        nonlocal arrays
        try:
            pixels = decode(records.read(i), resolution)
        except UserError:
            raise
        except Exception as error:  # Pillow raises nearly anything on hostile bytes
            reasons[i] = _reason(error)
            return
        with lock:
            if arrays is None:
                arrays = room((n, *pixels.shape))
        x, good = arrays
        if pixels.shape != x.shape[1:]:
            failed[i] = pixels.shape
        else:
            x[i], good[i] = pixels, True

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in track(pool.map(one, range(n)), "decoding", total=n, show=progress):
            pass
    x, good = arrays or room((n, 3, 1, 1))
    if failed:
        (i, (_, h, w)), (_, _, height, width) = min(failed.items()), x.shape
        sizes = f"{width}x{height} and {w}x{h} ({records.ids[i]})"
        raise UserError(f"native resolution needs one size, but there are {sizes}; give a side such as 224")
    return torch.from_numpy(x), torch.from_numpy(good), reasons


def _reason(error: Exception) -> str:
    return visible((str(error).splitlines() or [type(error).__name__])[0])[:120]


def _why(data: bytes, resolution: int | str) -> str:
    try:
        decode(data, resolution)
    except Exception as error:
        return _reason(error)
    return "not a readable image"


def cache_key(hashes: list[str], resolution: int | str) -> str:
    """SHA-256 of the decoder, the resolution and the content hashes in order; names play no part."""
    return hashlib.sha256(json.dumps([DECODER, resolution, hashes]).encode()).hexdigest()
