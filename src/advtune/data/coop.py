"""CoOp's split files (Zhou et al. 2022, arXiv 2109.01134): split_zhou_X.json beside the folder of images.

The file holds {"train": [[path, label, class name], ...], "val": [...], "test": [...]}, paths relative to the images.
Its few-shot choices are pickles, which are never read: shots are chosen by content here, as for every set.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from advtune.data.sources import Part, Source, read_file
from advtune.errors import UserError
from advtune.untrusted import read_json

PARTS = ("train", "val", "test")


def open_coop(root: Path, coop: Mapping[str, Any], name: str) -> Source:
    """The set in `root`, split as its file says: parts train, val and test; classes in the file's label order.

    coop: `split` (name of the file) and `images` (folder of the images in `root`, "" for `root` itself). Raises
    UserError for a file that is not of this form, an image in two parts or classes, and a path that leaves the folder.
    """
    file, images = root / coop["split"], root / coop["images"]
    if not images.is_dir():
        raise UserError(f"{name}: {file.name} is there but not the images: put them in {images}")
    try:
        found = read_json(file)
    except OSError as error:
        raise UserError(f"{name}: cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{name}: {file} is not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(part), list) for part in PARTS):
        raise UserError(f"{name}: {file} has no lists train, val and test; fetch it again")
    classes: dict[int, str] = {}
    seen: dict[str, tuple[str, int]] = {}
    parts = {part: _part(images, found[part], f"{name}: {file}, {part}", part, classes, seen) for part in PARTS}
    if sorted(classes) != list(range(len(classes))):
        raise UserError(f"{name}: {file}: the labels are not 0 to {len(classes) - 1} without gaps; fetch it again")
    texts = [classes[label].replace("_", " ") for label in range(len(classes))]
    return Source(name, texts, {part: records for part, records in parts.items() if len(records)}, f"CoOp {file.name}")


def _part(
    images: Path, records: list[Any], where: str, part: str, classes: dict[int, str], seen: dict[str, tuple[str, int]]
) -> Part:
    labels, ids = [], []
    for i, record in enumerate(records):
        match record:
            case [str(path), int(label), str(text)] if path and text and label >= 0 and not isinstance(label, bool):
                pass
            case _:
                raise UserError(f"{where} {i}: not [path, label, class name]; fetch the file again")
        if _leaves(path):
            raise UserError(f"{where} {i}: the path {path!r} leaves the folder of images; do not trust this file")
        path = PurePosixPath(path).as_posix()  # ./a/1.jpg is a/1.jpg
        if classes.setdefault(label, text) != text:
            raise UserError(f"{where} {i}: label {label} is both {classes[label]!r} and {text!r}; fetch the file again")
        if (was := seen.setdefault(path, (part, label))) != (part, label):
            raise UserError(f"{where} {i}: {path!r} is in the {was[0]} part, too, label {was[1]}; fetch the file again")
        labels.append(label)
        ids.append(path)
    return Part(labels, ids, partial(read_file, [images / path for path in ids]))


def _leaves(path: str) -> bool:
    pure = PurePosixPath(path)
    return not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path
