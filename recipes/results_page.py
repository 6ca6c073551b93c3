"""The tables and the picture of docs/results.md, from the rows in docs/results: what stands between two marks there is
written anew.

Command:  python recipes/results_page.py --take runs/offline-few-shot   (--check: do page and rows agree?)
--take adds the rows of a study's folder to docs/results, under the folder's name, before the page is written; of an
evaluation that was made again, with whatever settings, the new one counts.
A mark is a line `<!-- KIND FILE ... -->`, FILE one of docs/results/*.jsonl, and what it makes ends at `<!-- end -->`:
table (a line a method), halves (base and new classes, harmonic means), curve (a line a method, a column an eps, and a
picture), rankings (what papers put first, tested on our images), survivors (what stood PGD and fell to AutoAttack). All
else is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marks import by, markdown, points, renew
from survivors import ORDER, survivors

from advtune.comparison import ALPHA, compare
from advtune.report.figures import eps_panels
from advtune.report.harmonic import harmonic_means, harmonic_table
from advtune.report.plot import pictures
from advtune.report.published import published
from advtune.report.table import group_by, latest, pixels, table
from advtune.results import Row, read, write_atomic

ROOT = Path(__file__).parents[1]
PAGE, ROWS, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "results", ROOT / "docs" / "assets"
CURVE = re.compile(r"<!-- curve ([^>]+) -->")
Line = dict[str, Any]

# What a paper puts first: its table, the two methods, and what of the published rows and of ours is compared.
RANKINGS: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("fap", "few-shot", "fap", "advmaple", {"shots": 16}),
    ("fap", "few-shot", "fap", "advvlp", {"shots": 16}),
    ("fap", "few-shot", "fap", "advvlp", {"shots": 4}),
    ("fap", "few-shot", "advvlp", "fap", {"shots": 1}),
    ("fap", "few-shot", "advmaple", "advvlp", {"shots": 16}),
    ("fap", "few-shot", "advvlp", "advvp", {"shots": 16}),
    ("fap", "few-shot", "advvp", "apt", {"shots": 16}),
    ("fap", "base-to-new", "fap", "advvlp", {"shots": 16, "subset": "base"}),
    ("fap", "base-to-new", "fap", "advvlp", {"shots": 16, "subset": "new"}),
    ("fap", "base-to-new", "fap", "advmaple", {"shots": 16, "subset": "base"}),
    ("fap", "base-to-new", "fap", "advmaple", {"shots": 16, "subset": "new"}),
    ("capt", "few-shot", "capt", "apt", {"shots": 16}),
    ("apd", "few-shot", "apd", "fap", {"shots": 16}),
    ("pmg-aft", "transfer", "pmg-aft", "tecoa", {}),
    ("tga-zsr", "transfer", "pmg-aft", "tecoa", {}),
    ("tga-zsr", "transfer", "tga-zsr", "tecoa", {}),
    ("tga-zsr", "transfer", "tga-zsr", "pmg-aft", {}),
    ("tga-zsr", "transfer", "tecoa", "fare", {}),
]


def tables(*names: str) -> str:
    """One table for each data set, size and amount of training images, as Markdown: a line a method, a column for clean
    and for each attack."""
    texts = []
    lines = table(rows_of(names))
    for (_, dataset, half, n), of_set in by(lines, "backbone", "dataset", subset, "n"):
        untuned = [line for line in of_set if line["train"] is None]
        amounts = group_by([line for line in of_set if line["train"]], tuned_on) or {"nothing": []}
        for amount, own in sorted(amounts.items(), key=lambda item: (item[1] or of_set)[0]["train_shots"] or 0):
            name = of_set[0]["backbone"].rpartition("/")[2]
            what = dataset if half == "all" else f"{dataset}, {half} classes"
            texts.append(f"**{what}**, tuned on {amount}, {name}, n = {n}\n\n{grid([*untuned, *own])}")
    return "\n\n".join(texts)


def grid(lines: list[Line]) -> str:
    attacks = list(group_by([line for line in lines if line["attack"]], attack))
    attacks.sort(key=lambda name: (name[0] == "autoattack", name[1]))
    out = [["Method", "Seeds", "Clean", *(f"{name} {pixels(eps)}" for name, eps, _ in attacks)]]
    lines = sorted(lines, key=lambda line: ORDER.index(line["method"]))
    for method, own in group_by(lines, mark).items():
        most = max(own, key=lambda line: len(line["seeds"]))
        cells = [method, str(len(most["seeds"])) if most["train"] else "-", shown(most, "clean")]
        by_attack = {attack(line): line for line in own if line["attack"]}
        if len(by_attack) < len([line for line in own if line["attack"]]):
            raise SystemExit(f"{method}: two settings in one line; keep variants out of these rows")
        cells += [shown(by_attack[each], "robust", most) if each in by_attack else "-" for each in attacks]
        out.append(cells)
    return markdown(out, words=1)


def halves(*names: str) -> str:
    """Base and new classes, and the harmonic mean of the two; methods in the registry's order."""
    found = sorted(harmonic_means(rows_of(names)), key=lambda line: ORDER.index(line["method"]))
    cells = harmonic_table(found)
    return markdown([[*line[:2], *line[3:4], *line[6:]] for line in cells], words=2)


def curve(*names: str) -> str:
    """A table with a column an eps, and a picture of it."""
    return f"{tables(*names)}\n\n![Robust accuracy over eps](assets/{picture(names).name})"


def picture(names: Sequence[str]) -> Path:
    return PICTURES / f"{Path(names[0]).stem}.svg"


def rankings(*names: str) -> str:
    """What papers put first, and whether our images tell it: the first less the second, in points."""
    rows = rows_of(names)
    head = ["Paper", "First > second", "Tuned on", "Published", "Ours on", "Seeds", "Robust, points", "Clean, points"]
    out = [[*head, "Robust: the ranking"]]
    for paper, name, first, second, facts in RANKINGS:
        printed = [value(paper, name, method, facts) for method in (first, second)]
        for pair in paired(rows, first, second, facts):
            robust, clean = pair["robust"], pair["clean"]
            half = "" if robust["subset"] == "all" else f" {robust['subset']}"
            where = (
                f"{robust['dataset']}{half}, {pair['backbone']}, {robust['attack']}-{robust['steps']}, n {robust['n']}"
            )
            gap = "claimed" if None in printed else f"{printed[0] - printed[1]:+.1f}"
            line = [paper, f"{first} > {second}", pair["train"], gap, where, str(len(robust["pairs"]))]
            out.append([*line, points(robust), points(clean), verdict(robust)])
    return markdown(out, words=5)


def paired(rows: Sequence[Row], first: str, second: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons of two methods under PGD at 1/255, first less second, on what `facts` asks for: on the set tuned
    on where it tells shots, else on others."""
    found = []
    for _, own in by([row for row in rows if asked(row, facts)], backbone, lambda row: row.data["name"], amount):
        sides = [[row for row in own if row.method == method] for method in (second, first)]
        if not all(sides):
            continue
        told = compare(*sides)
        two = {each["which"]: each for each in told}
        if len(told) != 2:
            raise SystemExit(f"{first}, {second}: attacked in several ways; keep one in these rows")
        found.append({**two, "backbone": backbone(own[0]), "train": trained(own[0])})
    return found


def asked(row: Row, facts: dict[str, Any]) -> bool:
    if not (row.attack and row.train) or (row.attack["name"], pixels(row.attack["eps"])) != ("pgd", "1/255"):
        return False
    home = row.train["name"] == row.data["name"]
    same = row.train["shots"] == facts.get("shots") and row.data.get("subset", "all") == facts.get("subset", "all")
    return row.data["part"] == "test" and same and home == ("shots" in facts)


def backbone(row: Row) -> str:
    return str(row.backbone["name"]).rpartition("/")[2]


def amount(row: Row) -> Any:
    return (row.clean["n"], (row.train or {}).get("limit"))


def trained(row: Row) -> str:
    train = row.train or {}
    shots = few(train["shots"]) if train["shots"] else f"{train['n']:,} images"
    return shots if train["name"] == row.data["name"] else f"{train['name']}, {shots}"


def value(paper: str, name: str, method: str, facts: dict[str, Any]) -> float | None:
    """The published robust accuracy: the average over the paper's sets where there is one. None where no number is at
    hand: that the paper puts one method first is then known from its abstract alone."""
    rows = [row for row in published(paper) if row["table"] == name and row["method"] == method]
    rows = [row for row in rows if all(row.get(key) == wanted for key, wanted in facts.items())]
    found: float | None = max(rows, key=lambda row: len(row["data"]))["robust"] if rows else None
    return found


def verdict(numbers: Line) -> str:
    """As `advtune compare` decides, and over seeds only if all point the same way."""
    up = numbers["difference"] > 0
    clear = numbers["low"] > 0 or numbers["high"] < 0 if numbers["p"] is None else numbers["p"] < ALPHA
    if not clear or any((each > 0) != up for each in numbers["differences"]):
        return "within noise"
    return "holds" if up else "the other way"


def rows_of(names: Sequence[str]) -> list[Row]:
    return read(*(ROWS / name for name in names))


def attack(line: Line) -> tuple[str, float, int | None]:
    steps = f"-{line['steps']}" if line["steps"] else ""
    return f"{line['attack']}{steps}", line["eps"], line["steps"]


def subset(line: Line) -> str:
    return str(line["settings"].get("data", {}).get("subset", "all"))


def tuned_on(line: Line) -> str:
    limit = (line["settings"].get("train") or {}).get("limit")
    shots = f"{limit:,} images" if limit else "all"
    if line["train_shots"]:
        shots = few(line["train_shots"])
    return shots if line["train"] == line["dataset"] else f"{line['train']}, {shots}"


def few(shots: int) -> str:
    return f"{shots} shot{'s' if shots != 1 else ''}"


def mark(line: Line) -> str:
    return line["method"] + (" †" if line["reconstructed"] else "")


def shown(line: Line, kind: str, most: Line | None = None) -> str:
    """Mean ± spread over seeds, or, of one seed, with the 95 % Wilson interval over the images."""
    value, sd = line[f"{kind}_accuracy"], line[f"{kind}_sd"]
    if sd is not None:
        return f"{100 * value:.1f} ± {100 * sd:.1f}"
    few = f" ({len(line['seeds'])} seed)" if most is not None and len(most["seeds"]) > len(line["seeds"]) else ""
    return f"{100 * value:.1f} \\[{100 * line[f'{kind}_low']:.1f}, {100 * line[f'{kind}_high']:.1f}\\]{few}"


def evaluated(row: Row) -> tuple[Any, ...]:
    """What of two evaluations is the same thing done again, with whatever settings."""
    train, attack = row.train or {}, row.attack or {}
    tuned = (train.get("name"), train.get("shots"), train.get("limit"), train.get("seed"))
    tested = (row.data["name"], row.data.get("subset", "all"), row.clean["n"], backbone(row))
    return (row.method, *tuned, *tested, attack.get("name"), attack.get("eps"), attack.get("steps"))


def drawings(page: str) -> dict[Path, Callable[[], bytes]]:
    """The pictures that a page shows, and how each is made."""
    curves = [names.split() for names in CURVE.findall(page)]
    return {
        picture(names): lambda names=names: pictures(eps_panels(rows_of(names)), ["svg"])["svg"] for names in curves
    }


KINDS = {
    "table": tables,
    "halves": halves,
    "curve": curve,
    "rankings": rankings,
    "survivors": lambda *names: survivors(rows_of(names)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--take", nargs="+", type=Path, default=[], metavar="DIR")
    args = parser.parse_args()
    for folder in args.take:
        path = ROWS / f"{folder.name}.jsonl"
        new = read(*sorted(folder.rglob("results.jsonl")))
        keys = {evaluated(row) for row in new}
        old = [row for row in (read(path) if path.is_file() else []) if evaluated(row) not in keys]
        write_atomic(path, "".join(f"{row.to_json()}\n" for row in latest([*old, *new])))
    for path, drawn in drawings(PAGE.read_text()).items():
        if args.check and not path.is_file():
            sys.exit(f"{path} is not there; run: python {sys.argv[0]}")
        if not args.check:
            write_atomic(path, drawn())
    renew(PAGE, KINDS, args.check)


if __name__ == "__main__":
    main()
