"""Clean and robust accuracy of each class: the flags of the rows beside the labels of the data, in one order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from advtune.errors import UserError
from advtune.results import Row, wilson

FRAGILE = 20  # classes that are drawn


@dataclass(frozen=True)
class Labelled:
    """The data of a row, opened again: the task, and a label for each of its flags."""

    task: Any  # advtune.data.Task
    labels: list[int]


@dataclass(frozen=True)
class ClassLine:
    """One class of one table line. Accuracies are fractions, the mean over the seeds; n images."""

    name: str
    n: int
    clean: float
    robust: float | None
    low: float  # 95 % Wilson interval of the robust accuracy, or without an attack of the clean one
    high: float

    @property
    def clean_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the clean accuracy."""
        return wilson(round(self.clean * self.n), self.n)


def labelled(row: Row, folder: Path | None = None) -> Labelled:
    """The data that a row was measured on, from its spec; rows hold flags, but no labels.

    Raises UserError when the data cannot be had here, or are not the same (by content).
    """
    from advtune.data import Split, load_task
    from advtune.data.fewshot import select
    from advtune.runs import read_config

    tuned = read_config(folder).get("train") if folder else None
    if not row.data.get("spec"):
        raise UserError("the rows do not say where their data came from")
    subset = row.data.get("subset", "all")
    task = load_task(row.data["spec"], template=row.data.get("template"), subset=subset, tuned=tuned)
    known = {each.name for each in fields(Split)}
    records = select(task, Split(**{key: value for key, value in row.data.items() if key in known}))
    skipped = row.data.get("skipped")
    lost = set(skipped if isinstance(skipped, list) else [])
    kept = [i for i, name in enumerate(records.ids) if name not in lost]
    hashes, labels = records.hashes(), records.labels
    content = "".join(f"{hashes[i]}:{labels[i]}\n" for i in kept)
    if hashlib.sha256(content.encode()).hexdigest() != row.data["sha256"]:
        raise UserError(f"{row.data['spec']} holds other images here than the rows were measured on")
    return Labelled(task, [labels[i] for i in kept])


def per_class(rows: Sequence[Row], labels: Sequence[int], classes: Sequence[str]) -> list[ClassLine]:
    """A line for each class that has images, in label order, of rows that differ in seeds alone.

    Raises ValueError when a row has not one flag for each label.
    """
    n = Counter(labels)
    counts = {name: [_right(row.flags[name], labels) for row in rows if name in row.flags] for name in _names(rows)}
    lines = []
    for label, name in enumerate(classes):
        if not n[label]:
            continue
        means = {key: sum(each[label] for each in seeds) / len(seeds) for key, seeds in counts.items()}
        low, high = wilson(round(means.get("robust", means["clean"])), n[label])
        robust = means["robust"] / n[label] if "robust" in means else None
        lines.append(ClassLine(name, n[label], means["clean"] / n[label], robust, low, high))
    return lines


def _names(rows: Sequence[Row]) -> list[str]:
    return [name for name in ("clean", "robust") if all(name in row.flags for row in rows)]


def _right(flags: str, labels: Sequence[int]) -> Counter[int]:
    return Counter(label for flag, label in zip(flags, labels, strict=True) if flag == "1")


def fragile(columns: Sequence[Sequence[ClassLine]], most: int = FRAGILE) -> list[str]:
    """Class names from the least robust to the most, by the mean over the columns; at most `most` of them."""
    total: dict[str, float] = {}
    for column in columns:
        for line in column:
            total[line.name] = total.get(line.name, 0.0) + (line.clean if line.robust is None else line.robust)
    return sorted(total, key=lambda name: total[name])[:most]
