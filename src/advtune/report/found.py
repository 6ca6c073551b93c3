"""What a report is made of: rows with the run folders they came from, and the setting that its pictures show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advtune.report.formats import label
from advtune.report.table import lines_with_rows, sections
from advtune.results import Row, read
from advtune.untrusted import parse_json, read_json

CONFIG, DELTA, LOG = "config.json", "delta.safetensors", "train.jsonl"  # of a run folder, see advtune.runs
NO_TERMS = ("step", "epoch", "cycle", "lr")  # of a line of the log: where it stands


@dataclass(frozen=True)
class Measured:
    """A table line with its rows and, for each, the run folder if it is here."""

    line: dict[str, Any]
    rows: list[Row]
    folders: list[Path | None]

    @property
    def name(self) -> str:
        return label(self.line)


def gather(files: Sequence[Path]) -> tuple[list[Row], dict[str, Path]]:
    """The rows of result files, and the folder of each run that is here by the name that its rows have for it.

    Raises UserError when a file cannot be read.
    """
    rows: list[Row] = []
    folders: dict[str, Path] = {}
    for file in files:
        for row in read(file):
            rows.append(row)
            for place in (file.parent, Path(row.run)) if row.run else ():  # a moved run is where its rows are
                if row.run not in folders and _is_run_of(place, row):
                    folders[row.run] = place
    return rows, folders


def _is_run_of(place: Path, row: Row) -> bool:
    try:
        config = read_json(place / CONFIG)
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict):
        return False
    return (place / DELTA).is_file() and (config.get("method"), config.get("options")) == (row.method, row.options)


def measured(rows: Sequence[Row], folders: dict[str, Path]) -> list[Measured]:
    """Every table line with what it was made of. Raises UserError when there is no row."""
    return [Measured(line, group, [folders.get(row.run) for row in group]) for line, group in lines_with_rows(rows)]


def headline(lines: Sequence[Measured]) -> list[Measured]:
    """The section that pictures show: with an attack, the most lines, AutoAttack before others, the first. The best
    setting alone of each method, by robust accuracy (without an attack by clean), zero-shot first."""
    by_section = [[each for each in lines if each.line["section"] == section[0]["section"]]
                  for section in sections([each.line for each in lines])]  # fmt: skip
    attacked = [each for each in by_section if each[0].line["robust_accuracy"] is not None] or by_section
    chosen = max(attacked, key=lambda each: (len(each), each[0].line["attack"] == "autoattack"))
    best: dict[str, Measured] = {}
    for each in chosen:
        method = each.line["method"]
        if method not in best or score(each.line) > score(best[method].line):
            best[method] = each
    return list(best.values())


def score(line: dict[str, Any]) -> float:
    """Robust accuracy, or without an attack the clean one."""
    robust = line["robust_accuracy"]
    return float(line["clean_accuracy"] if robust is None else robust)


def log_of(folder: Path) -> list[dict[str, float]]:
    """The lines of train.jsonl, whole ones alone; [] when there is none."""
    lines = []
    try:
        text = (folder / LOG).read_text(errors="replace")
    except OSError:
        return []
    for each in text.splitlines():
        try:
            facts = parse_json(each)
        except ValueError:
            continue
        if isinstance(facts, dict) and "step" in facts:
            lines.append({key: value for key, value in facts.items() if isinstance(value, (int, float))})
    return lines


def terms_of(log: Sequence[dict[str, float]]) -> list[str]:
    """The loss terms that a log has, in order."""
    return list(dict.fromkeys(key for line in log for key in line if key not in NO_TERMS))
