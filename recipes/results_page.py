"""The tables of docs/results.md, from the rows in docs/results: what stands between two marks there is written anew.

Command:  python recipes/results_page.py --take runs/offline-few-shot   (--check: do page and rows agree?)
--take copies the rows of a study's folder to docs/results, under the folder's name, before the page is written.
A mark is a line `<!-- table FILE -->`, FILE one of docs/results/*.jsonl; the table ends at `<!-- end -->`. All else is
written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from advtune.methods import METHODS
from advtune.report.table import group_by, pixels, table
from advtune.results import read, write_atomic

ROOT = Path(__file__).parents[1]
PAGE, ROWS = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
MARK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Line = dict[str, Any]


def tables(name: str) -> str:
    """One table for each data set and size, as Markdown: a line a method, a column for clean and for each attack."""
    lines = table(read(ROWS / name))
    texts = []
    for lines_of in group_by(lines, lambda line: (line["backbone"], line["dataset"], subset(line), line["n"])).values():
        first = lines_of[0]
        kind = "" if subset(first) == "all" else f", {subset(first)} classes"
        backbone = first["backbone"].rpartition("/")[2]
        texts.append(f"**{first['dataset']}{kind}**, {backbone}, n = {first['n']}\n\n{grid(lines_of)}")
    return "\n\n".join(texts)


def grid(lines: list[Line]) -> str:
    attacks = list(group_by([line for line in lines if line["attack"]], attack))
    attacks.sort(key=lambda name: (name[0] == "autoattack", name[1]))
    head = ["Method", "Tuned on", "Seeds", "Clean", *(f"{name} {pixels(eps)}" for name, eps, _ in attacks)]
    out = [head, ["---", "---", "---:", *(["---:"] * (len(attacks) + 1))]]
    order = list(METHODS)
    lines = sorted(lines, key=lambda line: (order.index(line["method"]), line["train_shots"] or 0))
    for (method, where), own in group_by(lines, lambda line: (mark(line), tuned_on(line))).items():
        most = max(own, key=lambda line: len(line["seeds"]))
        cells = [method, where, str(len(most["seeds"])) if most["train"] else "-", shown(most, "clean")]
        by_attack = {attack(line): line for line in own if line["attack"]}
        if len(by_attack) < len([line for line in own if line["attack"]]):
            raise SystemExit(f"{method}, {where}: two settings in one line; keep variants out of these rows")
        cells += [shown(by_attack[each], "robust", most) if each in by_attack else "-" for each in attacks]
        out.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in out)


def attack(line: Line) -> tuple[str, float, int | None]:
    steps = f"-{line['steps']}" if line["steps"] else ""
    return f"{line['attack']}{steps}", line["eps"], line["steps"]


def subset(line: Line) -> str:
    return str(line["settings"].get("data", {}).get("subset", "all"))


def tuned_on(line: Line) -> str:
    if line["train"] is None:
        return "-"
    limit = (line["settings"].get("train") or {}).get("limit")
    shots = f"{limit} images" if limit else "all"
    if line["train_shots"]:
        shots = f"{line['train_shots']} shot{'s' if line['train_shots'] != 1 else ''}"
    return shots if line["train"] == line["dataset"] else f"{line['train']}, {shots}"


def mark(line: Line) -> str:
    return line["method"] + (" †" if line["reconstructed"] else "")


def shown(line: Line, kind: str, most: Line | None = None) -> str:
    """Mean ± spread over seeds, or, of one seed, with the 95 % Wilson interval over the images."""
    value, sd = line[f"{kind}_accuracy"], line[f"{kind}_sd"]
    if sd is not None:
        return f"{100 * value:.1f} ± {100 * sd:.1f}"
    few = f" ({len(line['seeds'])} seed)" if most is not None and len(most["seeds"]) > len(line["seeds"]) else ""
    return f"{100 * value:.1f} \\[{100 * line[f'{kind}_low']:.1f}, {100 * line[f'{kind}_high']:.1f}\\]{few}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--take", nargs="+", type=Path, default=[], metavar="DIR")
    args = parser.parse_args()
    for folder in args.take:
        rows = [row.to_json() for row in read(*sorted(folder.rglob("results.jsonl")))]
        write_atomic(ROWS / f"{folder.name}.jsonl", "".join(f"{row}\n" for row in rows))
    old = PAGE.read_text()
    new = MARK.sub(lambda found: f"{found[1]}\n{tables(found[2])}\n\n{found[3]}", old)
    if args.check:
        sys.exit(0 if new == old else f"{PAGE} is not what the rows give; run: python {sys.argv[0]}")
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
