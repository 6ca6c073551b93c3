"""The tables of docs/guided.md, from the rows of the search and of the claims in docs/results.

Command:  python recipes/guided_page.py --take runs/design-space   (--check: do page and rows agree?)
--take adds the rows of that folder to docs/results/design-space.jsonl; of a run made again the new rows count.
A mark is a line `<!-- search STAGE -->` or `<!-- claim FILE OURS RIVAL ... -->`, FILE one of docs/results/*.jsonl, and
what it makes ends at `<!-- end -->`. All else is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import design_space
from claims import claim

from advtune.protocols import slug
from advtune.report.table import canonical, group_by
from advtune.results import Row, mean_and_spread, read, write_atomic

ROOT = Path(__file__).parents[1]
PAGE, ROWS = ROOT / "docs" / "guided.md", ROOT / "docs" / "results"
SEARCH = "design-space.jsonl"
MARK = re.compile(r"(<!-- (search|claim) ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def search(stage: str) -> str:
    """A line a candidate, in the order tried: clean and robust accuracy on each set, and the mean of all four."""
    rows = group_by(read(ROWS / SEARCH), lambda row: Path(row.run).parts[-2])
    sets = [design_space.TRANSFER, *design_space.UNSEEN] if stage == "transfer" else design_space.DATA
    out = [["Candidate", "Seeds", *sets, "Mean"]]
    for label in design_space.STAGES[stage]():
        own = rows.get(slug(f"{stage} {label}"), [])
        if len({canonical([row.options, row.recipe]) for row in own}) > 1:
            raise SystemExit(f"{stage}, {label}: rows of other options have this name")
        if of_sets := group_by(own, lambda row: row.data["name"]):
            pairs = {name: both(of) for name, of in of_sets.items()}
            cells = [f"{pairs[name][0]:.1f} / {pairs[name][1]:.1f}" if name in pairs else "-" for name in sets]
            whole = pairs.keys() >= set(sets)
            mean = f"{sum(map(sum, pairs.values())) / 2 / len(pairs):.1f}" if whole else "-"
            out.append([label, " to ".join(sorted({str(len(of)) for of in of_sets.values()})), *cells, mean])
    return "\n".join(f"| {' | '.join(line)} |" for line in [out[0], ["---", *["---:"] * (len(out[0]) - 1)], *out[1:]])


def both(rows: list[Row]) -> tuple[float, float]:
    """Clean and robust accuracy in percent, the mean over seeds."""
    robust = [100 * row.robust["accuracy"] for row in rows if row.robust]
    return mean_and_spread([100 * row.clean["accuracy"] for row in rows])[0], mean_and_spread(robust)[0]


def claimed(file: str, ours: str, *rivals: str) -> str:
    return claim(read(ROWS / file), ours, rivals)


def take(folder: Path) -> None:
    new = read(*sorted(folder.rglob("results.jsonl")))
    made = {row.run for row in new}
    kept = [row for row in read(ROWS / SEARCH) if row.run not in made]
    write_atomic(ROWS / SEARCH, "".join(f"{row.to_json()}\n" for row in [*kept, *new]))


KINDS = {"search": search, "claim": claimed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--take", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.take:
        take(args.take)
    old = PAGE.read_text()
    new = MARK.sub(lambda found: f"{found[1]}\n{KINDS[found[2]](*found[3].split())}\n\n{found[4]}", old)
    if args.check:
        sys.exit(0 if new == old else f"{PAGE} is not what the rows give; run: python {sys.argv[0]}")
    write_atomic(PAGE, new)


if __name__ == "__main__":
    main()
