"""Where images come from: folders and CSV files here, Parquet files and the Hugging Face hub in parquet.py.

Every source gives its class names and its parts: "train" and "test", only "test", or "all" (no split).
A part named val, valid or validation is taken as "test" when there is no test part, and else left out.
Nothing is decoded here: a Part reads encoded bytes, one image at a time.
"""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from advtune.errors import UserError
from advtune.untrusted import IMAGE_BYTES, expanded, is_there, read_bytes, visible

VAL_NAMES = ("validation", "valid", "val")
NO_LABEL = re.compile(r"-\d+|[+-]?\d*\.\d+|[+-]?\d+\.\d*", re.ASCII)  # a number, but no whole one from 0
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(eq=False)
class Part:
    """Labelled records, read lazily: `read(i)` gives the encoded bytes of image i (b"" if there are none)."""

    labels: list[int]
    ids: list[str]
    read: Callable[[int], bytes]
    _hashes: list[str] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def hashes(self, track: Callable[[Iterable[int]], Iterable[int]] = iter) -> list[str]:
        """SHA-256 (hex) of each image's encoded bytes, read once. `track` wraps the loop to show progress."""
        if not self._hashes:
            self._hashes = [hashlib.sha256(self.read(i)).hexdigest() for i in track(range(len(self)))]
        return self._hashes

    def subset(self, indices: Sequence[int]) -> "Part":
        """The records at `indices`, in that order; hashes that are known go along."""
        labels, ids = [self.labels[i] for i in indices], [self.ids[i] for i in indices]
        hashes = [self._hashes[i] for i in indices] if self._hashes else []
        return Part(labels, ids, lambda i: self.read(indices[i]), hashes)


@dataclass
class Source:
    """What a source holds: `name` for tables, `classes` in label order, `parts`, and in words the `split` they are."""

    name: str
    classes: list[str]
    parts: dict[str, Part]
    split: str = "as given"


def concat(first: Part, second: Part) -> Part:
    """The records of `first`, then those of `second`."""
    n = len(first)
    return Part(
        first.labels + second.labels,
        first.ids + second.ids,
        lambda i: first.read(i) if i < n else second.read(i - n),
        first.hashes() + second.hashes(),
    )


def part_names(found: Iterable[str]) -> dict[str, str]:
    """{"train" and "test", or "all" for a single split that is not a test split: the source's own name}."""
    found = list(found)
    val = [name for name in VAL_NAMES if name in found]
    names = {"train": "train"} if "train" in found else {}
    if "test" in found or val:
        names["test"] = "test" if "test" in found else val[0]
    if list(names) == ["train"] or (not names and len(found) == 1):
        return {"all": "train" if names else found[0]}
    return names


def split_of(used: Mapping[str, str]) -> str:
    """In words, the split that `part_names` gives: "as given", or which part stands in as the test part."""
    own = used.get("test", "test")
    return "as given" if own == "test" else f"as given, {own} as test"


def existing(path: str, kind: str) -> Path:
    """The path of a spec. Raises UserError if there is none."""
    found = expanded(path)
    if path and is_there(found):
        return found
    raise UserError(f"{kind}:{path}: there is no such path; check the spelling")


def normal(name: str) -> str:
    """A class name as it is compared: underscores and hyphens are spaces, case does not count."""
    return " ".join(name.replace("_", " ").replace("-", " ").split()).casefold()


def read_file(paths: Sequence[Path], i: int) -> bytes:
    """The bytes of file i. Raises UserError when it cannot be read."""
    try:
        return read_bytes(paths[i], IMAGE_BYTES)
    except OSError as error:
        raise UserError(f"cannot read the image {paths[i]}: {error.strerror}; mend or remove it") from None


def open_folder(path: str) -> Source:
    """PATH/train/<class>/* with PATH/test/<class>/*, or PATH/<class>/*. Folder names are class names."""
    root = existing(path, "folder")
    if not root.is_dir():
        raise UserError(f"folder:{path} is a file; give the folder that holds one folder a class")
    try:
        return _listed(root, path)
    except OSError as error:  # not ours to read, or gone meanwhile
        raise UserError(f"folder:{path} cannot be read: {error.filename}: {error.strerror}") from None


def _listed(root: Path, path: str) -> Source:
    below = {d.name: d for d in sorted(root.iterdir()) if d.is_dir() and not d.name.startswith(".")}
    known = {"train", "test", *VAL_NAMES}
    if ("train" in below and known & (set(below) - {"train"})) or (below and set(below) <= known):
        used = part_names(below)
        roots = {part: below[name] for part, name in used.items()}
    else:  # a lone class called "train" among others is a class
        used, roots = {"all": root.name}, {"all": root}
    folders = {part: _class_folders(top) for part, top in roots.items()}
    classes = sorted({name for found in folders.values() for name in found})
    for part, found in folders.items():
        if missing := sorted(set(classes) - set(found)):
            raise UserError(f"folder:{path}: class {missing[0]!r} is missing from the {part} part; add it")
    parts = {part: _folder_part(root, [found[c] for c in classes]) for part, found in folders.items()}
    texts = [name.replace("_", " ").replace("-", " ") for name in classes]
    return Source(root.resolve().name, texts, parts, split_of(used))


def _class_folders(top: Path) -> dict[str, Path]:
    return {d.name: d for d in sorted(top.iterdir()) if d.is_dir() and not d.name.startswith(".")}


def _folder_part(root: Path, folders: Sequence[Path]) -> Part:
    labels: list[int] = []
    paths: list[Path] = []
    for label, folder in enumerate(folders):
        images = sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
        labels += [label] * len(images)
        paths += images
    return Part(labels, [p.relative_to(root).as_posix() for p in paths], partial(read_file, paths))


def open_csv(path: str) -> Source:
    """A CSV with header: image (path relative to the file), label (name or integer), perhaps split or part.

    A file without a split column is a single split. Paths may be absolute or leave the folder: the list is the user's.
    Errors name the line of the file.
    """
    file = existing(path, "csv")
    columns, rows = _csv_rows(file, path)
    split = next((c for c in ("split", "part") if c in columns), None)
    groups: dict[str, list[tuple[Path, str, str]]] = {}
    for line, row in rows:
        image, label = (row["image"] or "").strip(), (row["label"] or "").strip()
        name = (row[split] or "").strip().lower() if split else "all"
        if not image or label in ("", "-1"):
            raise UserError(f"csv:{path} line {line}: needs an image and a label")
        if NO_LABEL.fullmatch(label):
            raise UserError(
                f"csv:{path} line {line}: the label {label[:40]} is no whole number from 0; write the class"
            )
        if split and name not in {"train", "test", *VAL_NAMES}:
            raise UserError(f"csv:{path} line {line}: {split} must be train, val or test, not {name[:40]!r}")
        if not is_there(file.parent / image, Path.is_file):
            raise UserError(f"csv:{path} line {line}: there is no file {image[:200]!r} beside the CSV")
        groups.setdefault(name, []).append((file.parent / image, image, label))
    names = part_names(groups)
    used = {part: groups[name] for part, name in names.items()}
    labels, classes = number({part: [label for *_, label in group] for part, group in used.items()})
    parts = {
        part: Part(labels[part], [name for _, name, _ in group], partial(read_file, [p for p, *_ in group]))
        for part, group in used.items()
    }
    return Source(file.stem, classes, parts, split_of(names))


def _csv_rows(file: Path, path: str) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """The columns and, with the number of its line, each row. Raises UserError without the columns that are needed."""
    try:
        text = read_bytes(file).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise UserError(f"csv:{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"csv:{path} cannot be read as UTF-8 CSV: {error}") from None
    columns = [c for c in reader.fieldnames or () if c]
    for needed in ("image", "label"):
        if needed in columns:
            continue
        first = ", ".join(columns)[:200]
        if other := next((sign for sign in ";\t|" if len(columns) == 1 and sign in first), ""):
            raise UserError(f"csv:{path}: the columns are divided by {visible(other)!r}; divide them by commas")
        raise UserError(f"csv:{path} has no column {needed!r} (its first line: {first}); begin it with image,label")
    if twice := next((c for c in columns if columns.count(c) > 1), ""):
        raise UserError(f"csv:{path} has two columns {twice[:40]!r}; remove one")
    return columns, rows


def number(raw: dict[str, list[Any]]) -> tuple[dict[str, list[int]], list[str]]:
    """Labels of any kind -> integers and class names: names in alphabetic order, numbers in order of size."""
    values = {str(v).strip() for part in raw.values() for v in part}
    numeric = all(v.isdecimal() and len(v) < 20 for v in values)  # Python refuses numbers of thousands of digits
    order = sorted(values, key=lambda v: (int(v), v)) if numeric else sorted(values)
    index = {value: i for i, value in enumerate(order)}
    return {part: [index[str(v).strip()] for v in vs] for part, vs in raw.items()}, order
