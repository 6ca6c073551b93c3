"""What is on these images? Labels and probabilities for files, for a table, for a service."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advtune import runs
from advtune.data.cache import replacing
from advtune.data.images import decode, fit
from advtune.data.sources import SUFFIXES
from advtune.data.task import TEMPLATE, Words, check_words, read_classes, rename
from advtune.errors import UserError
from advtune.preprocess import NARROW
from advtune.progress import track
from advtune.untrusted import IMAGE_BYTES, cell, is_there, read_bytes, visible
from advtune.vlm import VLM

Picture: TypeAlias = str | Path | bytes | Image.Image | np.ndarray | Tensor
KINDS = "a path, bytes, a PIL image, a numpy uint8 array [H, W(, 3)] or a float tensor [3, H, W] in [0, 1]"


@dataclass(frozen=True)
class Prediction:
    """The most probable class of an image, and the probability of every class, most probable first."""

    label: str
    probability: float
    probabilities: dict[str, float]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k most probable classes with their probabilities."""
        return list(self.probabilities.items())[:k]


class Classifier:
    """A tuned run or a backbone as a classifier with fixed classes.

    Threads may share one: nothing of it changes after it is made. A picture is brought to the model's side as an
    evaluation brings it there, so that both give the same answer; a tensor enters as it is.
    """

    def __init__(
        self, model: VLM | str | Path, classes: Words | None = None, template: str | None = None, *,
        device: str = "auto", precision: str = "auto", batch_size: int = 64,
    ):  # fmt: skip
        """model: a run folder, a backbone (`mini`, a folder, a hub id) or a loaded model. classes: names, a JSON file
        or names with commas, {old: new} to rename those of a run; by default those the run was tuned on. Raises
        UserError when the model cannot be had or there are no classes."""
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: at least 1 image is needed")
        self.model = model if isinstance(model, VLM) else runs.load(str(model), device, precision)
        self.classes, self.template = words(self.model, classes, template)
        self.batch_size = batch_size
        with torch.no_grad():
            self._f = self.model.classifier(self.model.tokens(self.classes, self.template))

    def logits(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, any, any] in [0, 1] -> logits [B, C]."""
        with torch.no_grad():  # not inference_mode: its tensors would stay in caches that gradients go through
            return self._f(x.to(self.model.device))

    def predict(self, images: Picture | Sequence[Picture]) -> list[Prediction]:
        """A prediction for each image, in order. images: one or several, each a path, encoded bytes, a PIL image, a
        numpy uint8 array [H, W], [H, W, 3 or 4] or a float tensor [3, H, W] in [0, 1]; or one array or tensor with a
        batch axis in front. Raises UserError naming the first that cannot be used."""
        found = []
        for each in self.stream(listed(images)):
            if isinstance(each, UserError):
                raise each
            found.append(each)
        return found

    def stream(self, images: Iterable[Picture]) -> Iterator[Prediction | UserError]:
        """As `predict`, a batch at a time; in the place of an image that cannot be used, the error that names it."""
        numbered = enumerate(images)
        with ThreadPoolExecutor(8) as pool:
            while batch := list(islice(numbered, self.batch_size)):
                read = pool.map(lambda pair: self._read(*pair), batch)
                for shape, same in groupby(read, lambda x: None if isinstance(x, UserError) else x.shape):
                    together = list(same)
                    tensors = [x for x in together if isinstance(x, Tensor)]
                    errors = [x for x in together if isinstance(x, UserError)]
                    yield from errors if shape is None else self._predictions(torch.stack(tensors))

    def _read(self, place: int, image: Picture) -> Tensor | UserError:
        name = str(image) if isinstance(image, str | Path) else f"image {place}"
        try:
            return pixels(image, self.model.side)
        except UserError as error:
            return UserError(f"{name}: {error}")
        except OSError as error:
            return UserError(f"{name}: {error.strerror or 'not a readable image'}; give another file")
        except Exception as error:  # Pillow raises nearly anything on hostile bytes
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            return UserError(f"{name}: not a readable image ({reason}); give another file")

    def _predictions(self, x: Tensor) -> Iterator[Prediction]:
        probabilities = self.logits(x).cpu().double().softmax(1)
        for values, order in zip(
            *(t.tolist() for t in probabilities.sort(dim=1, descending=True, stable=True)), strict=True
        ):
            each = {self.classes[c]: value for c, value in zip(order, values, strict=True)}
            yield Prediction(self.classes[order[0]], values[0], each)


def words(model: VLM, classes: Words | None, template: str | None) -> tuple[tuple[str, ...], str]:
    """Class names and template: those given, else those the model was tuned on. Raises UserError if there are none."""
    train = model.run.get("train", {})
    own = train.get("classes", [])
    given = read_classes(classes) if isinstance(classes, str) else classes
    if not own and (given is None or isinstance(given, Mapping)):
        raise UserError(f"{model.origin.name} was tuned on no classes; name them: --classes cat,dog or a JSON file")
    if given is None or isinstance(given, Mapping):
        names = rename(own, given or {})
    elif isinstance(given, Sequence) and all(isinstance(name, str) for name in given):
        names = [" ".join(name.split()) for name in given]
    else:
        raise UserError("classes must be names, or a mapping {old: new}")
    template = template or train.get("template", TEMPLATE)
    check_words(names, template, "the list of classes")
    return tuple(names), template


def listed(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    """One image or several -> several."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Tensor):
        return list(images) if images.dim() == 4 else [images]
    return [images] if isinstance(images, str | Path | bytes | Image.Image) else images


def pixels(image: Picture, side: int) -> Tensor:
    """One image -> float [3, S, S] in [0, 1], upright, RGB; a float tensor keeps its size. Raises UserError for what
    is no image or has other units, and what Pillow and the disk raise."""
    if isinstance(image, Tensor):
        return checked(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,), (4,)):
            raise UserError(f"an array of {image.dtype} {list(image.shape)} is not an image; give {KINDS}")
        array = fit(Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image), side)
    elif isinstance(image, Image.Image):
        array = fit(image, side)
    elif isinstance(image, str | Path | bytes):
        array = decode(image if isinstance(image, bytes) else read_bytes(Path(image), IMAGE_BYTES), side)
    else:
        raise UserError(f"{type(image).__name__} is not an image; give {KINDS}")
    return torch.from_numpy(array.copy()).float() / 255


def checked(x: Tensor) -> Tensor:
    """A float tensor [3, H, W] in [0, 1]. Raises UserError for any other."""
    if not x.is_floating_point() or x.dim() != 3 or x.shape[0] != 3 or x.numel() == 0:
        raise UserError(f"a tensor of {x.dtype} {list(x.shape)} is not an image; give {KINDS}")
    if max(x.shape) > NARROW * min(x.shape[1:]):
        raise UserError(f"a tensor of {list(x.shape)} is too narrow; cut it nearer to a square")
    if not bool(((x >= 0) & (x <= 1)).all()):  # false for nan as well
        low, high = float(x.min()), float(x.max())
        raise UserError(f"pixels from {low:g} to {high:g} are not in [0, 1]; divide by 255, do not normalise")
    return x.detach().float()


def find(paths: Sequence[str]) -> list[Path]:
    """Image files: those named, and all below the folders named, in the order of their names. Raises UserError for a
    path that is not there and a folder without images."""
    found: list[Path] = []
    for path in map(Path, paths):
        if is_there(path, Path.is_dir):
            inside = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"{path}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
            found += inside
        elif is_there(path):
            found.append(path)
        else:
            raise UserError(f"{path}: there is no such file or folder")
    return found


def table(classifier: Classifier, files: Sequence[Path], top: int = 5, show: bool = True) -> Iterator[dict[str, Any]]:
    """A record for each file: path, label, probability, top [{label, probability}]; or path and error."""
    for file, each in zip(track(files, "predicting", show=show), classifier.stream(files), strict=True):
        if isinstance(each, UserError):
            yield {"path": str(file), "error": str(each)}
            continue
        best = [{"label": label, "probability": round(p, 6)} for label, p in each.top(top)]
        yield {"path": str(file), **best[0], "top": best}


def write_csv(records: Iterable[dict[str, Any]], file: Path, top: int) -> Iterator[dict[str, Any]]:
    """Pass the records on and write them to a file, which is there when all are: path, label, probability, label_2,
    probability_2, ..., error; texts as no spreadsheet computes them."""
    columns = [f"{name}_{k}" if k > 1 else name for k in range(1, top + 1) for name in ("label", "probability")]
    with replacing(file) as beside, beside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["path", *columns, "error"])
        for record in records:
            values = [value for each in record.get("top", ()) for value in each.values()]
            blank = [""] * (len(columns) - len(values))
            writer.writerow(map(cell, [record["path"], *values, *blank, record.get("error", "")]))
            yield record


def run(
    classifier: Classifier, files: Sequence[Path], top: int = 5, csv_file: str | None = None, as_json: bool = False
) -> int:
    """Predict files and print a line for each, or write a CSV and print a summary (with as_json: both); the number of
    images that could not be read, each with a line on stderr."""
    if top < 1:
        raise UserError(f"--top {top}: at least 1 class is needed")
    top = min(top, len(classifier.classes))
    records: Iterable[dict[str, Any]] = table(classifier, files, top, show=csv_file is not None)
    records = write_csv(records, Path(csv_file), top) if csv_file else records
    bad = 0
    for record in records:
        if "error" in record:
            bad += 1
            print(f"advtune: {visible(record['error'])}", file=sys.stderr)
        if as_json or ("error" not in record and not csv_file):
            print(line(record, as_json))
    if csv_file and not as_json:
        print(f"{csv_file}: {len(files) - bad} images" + (f", {bad} could not be read" if bad else ""))
    return bad


def line(record: dict[str, Any], as_json: bool) -> str:
    """A record as a line for a person or for a program."""
    if as_json:
        return json.dumps(record)
    first, *others = (f"{each['label']} {100 * each['probability']:.1f} %" for each in record["top"])
    return visible(f"{record['path']}: {first}" + (f" ({', '.join(others)})" if others else ""))
