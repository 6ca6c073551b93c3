"""Parquet files and hub sets, both through the `datasets` library: from a DatasetDict to a Source."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from advtune.data.sources import VAL_NAMES, Part, Source, existing, number, part_names, read_file, split_of
from advtune.errors import UserError
from advtune.untrusted import HUB_ID, visible

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category", "target", "cls")


def open_parquet(path: str, label: str = "") -> Source:
    """One file, or a folder with train.parquet and test.parquet (or train-*.parquet; or these in data/).

    label: the column of labels, found by its usual names when it is not there.
    """
    root = existing(path, "parquet")
    found = shards(root)
    if not found:
        raise UserError(f"parquet:{path} (and its data/) has no train.parquet or test.parquet; add them")
    files = {name: [str(file) for file in paths] for name, paths in found.items()}
    name = root.stem if root.is_file() else root.resolve().name
    spec = f"parquet:{path}"
    splits = _load("parquet", spec, data_files=files, cache_dir=_cache_of(files, spec))
    _one_numbering([file for paths in found.values() for file in paths], spec)
    return to_source(splits, name, spec, label)


def shards(root: Path) -> dict[str, list[Path]]:
    """The parquet files of a file or folder by part, {} if there are none."""
    if root.is_file():
        return {"train": [root]}  # the library reserves the word "all"
    for folder in (root, root / "data"):
        found = {
            name: [*folder.glob(f"{name}.parquet"), *sorted(folder.glob(f"{name}-*.parquet"))]
            for name in ("train", "test", *VAL_NAMES)
        }
        if any(found.values()):
            return {name: files for name, files in found.items() if files}
    lone = list(root.glob("*.parquet"))
    return {"train": lone} if len(lone) == 1 else {}


def _one_numbering(files: list[Path], spec: str) -> None:
    """Raises UserError if a column's class names differ between files: the library takes the first file's for all."""
    import datasets
    from pyarrow.parquet import read_schema

    first: dict[str, tuple[Path, list[str]]] = {}
    for file in files:
        for column, kind in datasets.Features.from_arrow_schema(read_schema(file)).items():
            names = getattr(kind, "names", None)
            if names and first.setdefault(column, (file, names))[1] != names:
                other = f"other class names in {column!r} than {first[column][0].name}, or in another order"
                raise UserError(f"{spec}: {file.name} has {other}; write both with the same names")


def _cache_of(files: dict[str, list[str]], spec: str) -> str:
    import datasets

    content = hashlib.sha256()  # the library's own key is path and time of change: stale after some copies
    try:
        for name in (file for found in files.values() for file in found):
            with open(name, "rb") as stream:
                content.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise UserError(f"{spec} cannot be read: {error.strerror}") from None
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"advtune-{content.hexdigest()[:32]}")


def open_hub(where: str, label: str = "") -> Source:
    """`OWNER/NAME` or `OWNER/NAME:CONFIG` on the Hugging Face hub; needs the network or the hub's cache."""
    repo, _, config = where.partition(":")
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"hf:{where} is not hf:OWNER/NAME or hf:OWNER/NAME:CONFIG")
    return to_source(_load(repo, f"hf:{where}", name=config or None), repo.split("/")[1], f"hf:{where}", label)


def _load(what: str, spec: str, **options: Any) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    # six lines of retries; the failure below says it once
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return dict(datasets.load_dataset(what, **options))
    except PermissionError as error:
        raise UserError(f"{spec}: cannot write {error.filename}; set HF_HOME to a writable folder") from None
    except Exception as error:  # the library raises a dozen kinds, none of them shared
        reason = visible((str(error).strip() or type(error).__name__).splitlines()[0])[:200]
        if spec.startswith("parquet:"):
            raise UserError(f"{spec} cannot be read: {reason}") from None
        raise UserError(
            f"cannot get {spec}: {reason}; be online, or download it elsewhere and give parquet:PATH"
        ) from None


def to_source(splits: dict[str, Any], name: str, spec: str, label: str = "") -> Source:
    """A DatasetDict -> Source. A test split without labels (all negative) counts as absent."""
    first = next(iter(splits.values()))
    image = _image_column(first, spec)
    label = label if label in first.features else _label_column(first, spec)
    raw = {key: _column(split, label).to_pylist() for key, split in splits.items()}
    _check_kind(raw, label, spec)
    used = part_names(key for key, values in raw.items() if not values or any(map(_is_label, values)))
    if not used:
        raise UserError(f"{spec} has no labelled train or test split (it has: {', '.join(splits)})")
    for part, key in used.items():
        if bad := [i for i, value in enumerate(raw[key]) if not _is_label(value)]:
            raise UserError(f"{spec}: row {bad[0]} of the {part} part has no label; remove or label it")
    labels = {part: raw[key] for part, key in used.items()}
    classes = list(getattr(first.features[label], "names", None) or [])
    if not classes:
        labels, classes = number(labels)
    if beyond := [label for values in labels.values() for label in values if label >= len(classes)]:
        raise UserError(f"{spec}: the label {beyond[0]} has no name, as there are {len(classes)}; name every class")
    parts = {part: _part(splits[key], image, labels[part], part, spec) for part, key in used.items()}
    return Source(name, classes, parts, split_of(used))


def _is_label(value: Any) -> bool:
    return value not in (None, "") and not (isinstance(value, int) and value < 0)


def _check_kind(raw: dict[str, list[Any]], label: str, spec: str) -> None:
    """Raises UserError for labels that are neither texts nor whole numbers: lists, times, 0.5."""
    for values in raw.values():
        for i, value in enumerate(values):
            if value is not None and not isinstance(value, int | str):
                kind = type(value).__name__
                raise UserError(
                    f"{spec}: column {label!r}, row {i}: a {kind} is no label; write texts or whole numbers"
                )


def _column(split: Any, name: str) -> Any:
    return split.select_columns([name]).with_format("arrow")[:].column(name)


def _image_column(split: Any, spec: str) -> str:
    import datasets

    images = [c for c, kind in split.features.items() if isinstance(kind, datasets.Image)]
    images = images or [c for c in IMAGE_COLUMNS if "binary" in str(split.features.get(c))]
    if not images:
        raise UserError(f"{spec} has no image column (it has: {', '.join(split.features)})")
    return images[0]


def _label_column(split: Any, spec: str) -> str:
    import datasets

    named = [c for c, kind in split.features.items() if isinstance(kind, datasets.ClassLabel)]
    for candidates in (named, list(split.features)):
        for column in LABEL_COLUMNS:
            if column in candidates:
                return column
    if len(named) == 1:
        return named[0]
    raise UserError(f"{spec} has no label column (it has: {', '.join(split.features)}); call one 'label'")


def _part(split: Any, image: str, labels: list[int], name: str, spec: str) -> Part:
    import datasets

    records = split.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    paths = [p for chunk in _column(records, image).chunks for p in chunk.field("path").to_pylist()]
    own = spec.startswith("hf:")  # there a path is of what the library downloaded

    def read(i: int) -> bytes:
        cell = records[i][image] or {}
        if cell.get("bytes") is None and cell.get("path"):
            if not own:
                raise UserError(f"{spec}: row {i} of the {name} part names a file but holds no picture; write it "
                                "into the parquet file, or give csv:PATH")  # fmt: skip
            return read_file([Path(cell["path"])], 0)
        return cell.get("bytes") or b""

    return Part(labels, [path or f"{name}[{i}]" for i, path in enumerate(paths)], read)
