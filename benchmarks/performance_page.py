"""The tables of docs/performance.md, from the lines in benchmarks/results: what stands between two marks there is
written anew.

Command:  python benchmarks/performance_page.py   (--check: do page and lines agree?)
A mark is a line `<!-- bench PART -->`, PART one of bench.py's; the table ends at `<!-- end -->`. Of what was measured
more than once the last stands. All else is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from advtune.results import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PAGE, LINES = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results" / "bench.jsonl"
MARK = re.compile(r"(<!-- bench (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Line = dict[str, Any]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def percent(found: Line) -> str:
    """An accuracy with its 95 % Wilson interval."""
    return f"{100 * found['accuracy']:.1f} \\[{100 * found['low']:.1f}, {100 * found['high']:.1f}\\]"


def over_seeds(found: Line) -> str:
    """Mean, of several seeds their sample standard deviation, and the interval over the images, in percent."""
    spread = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
    return f"{100 * found['mean']:.1f}{spread} \\[{100 * found['low']:.1f}, {100 * found['high']:.1f}\\]"


def speed(line: Line) -> list[str]:
    cells = []
    for way in ("forward", "gradient"):
        cells += [number(line["rates"][f"{way} {name}"]) for name in ("fp32", "bf16")] + [ratio(line["ratio"][way])]
    return cells


Columns = tuple[Callable[[Line], bool], list[str], Callable[[Line], list[str]]]
# Of each part the tables: which lines, the head, the cells of a line.
TABLES: dict[str, list[Columns]] = {
    "operations": [(
        lambda line: True,
        ["Method", "Shape", "Classes", "Batch", "Released", "Plain", "Equation", "Ours", "Plain / ours"],
        lambda line: [
            line["method"], line["shape"], str(line["classes"]), str(line["batch"]), number(line["released"]),
            number(line["plain"]), number(line["equation"]), number(line["ours"]), ratio(line["ratio"]),
        ],
    )],
    "training": [(
        lambda line: True,
        ["Method", "Shape", "Classes", "Batch", "Plain, s", "Ours, s", "Ours in bf16, s", "Ratio", "Ratio, bf16",
         "Ratio of counts"],
        lambda line: [
            line["method"], line["shape"], str(line["classes"]), str(line["batch"]),
            *(number(line["seconds"][key]) for key in ("plain", "ours", "ours_bf16")), ratio(line["ratio"]),
            ratio(line["ratio_bf16"]), ratio(line["counted"]),
        ],
    )],
    "pgd": [(
        lambda line: True,
        ["Setting", "eps", "Images", "Stand: torchattacks", "ours", "torchattacks, s", "Ours, s", "Ratio"],
        lambda line: [
            line["case"], f"{line['eps'] * 255:g}/255", str(line["n"]), str(line["stand"]["torchattacks"]),
            str(line["stand"]["ours"]), number(line["seconds"]["torchattacks"]), number(line["seconds"]["ours"]),
            ratio(line["ratio"]),
        ],
    )],
    "autoattack": [(
        lambda line: True,
        ["Setting", "Images", "Clean", "Robust: pyautoattack", "ours", "Decided otherwise", "Images through the model: "
         "pyautoattack", "ours", "pyautoattack, s", "Ours, s", "Ratio"],
        lambda line: [
            line["case"], str(line["n"]), str(line["clean"]), str(line["pyautoattack"]["correct"]),
            str(line["ours"]["correct"]), str(line["decided_otherwise"]), f"{line['pyautoattack']['images']:,}",
            f"{line['ours']['images']:,}", number(line["pyautoattack"]["seconds"]), number(line["ours"]["seconds"]),
            ratio(line["ratio"]),
        ],
    )],
    "memory": [(
        lambda line: True,
        ["Method", "Formulation", "Classes", "Batch", "Before the step, GB", "Peak, GB", "s"],
        lambda line: [
            line["method"], line["kind"], str(line["classes"]), str(line["batch"]),
            *(number(line[key]) for key in ("before", "peak", "seconds")),
        ],
    )],
    "fast": [(
        lambda line: True,
        ["Method", "Training attack", "Image gradients", "s", "Seeds", "Clean", "PGD-20 1/255", "PGD-20 4/255"],
        lambda line: [
            line["method"], line["variant"], f"{line['gradients']:,}", number(line["seconds"]), str(line["seeds"]),
            *(over_seeds(each) for each in (line["clean"], *line["robust"])),
        ],
    )],
    "precision": [(
        lambda line: "rates" in line,
        ["Shape", "Forwards/s, fp32", "bf16", "Ratio", "Gradients/s, fp32", "bf16", "Ratio"],
        lambda line: [line["shape"], *speed(line)],
    ), (
        lambda line: "robust" in line,
        ["Precision", "n", "Clean", "Robust", "Zero gradients, share"],
        lambda line: [
            line["precision"], str(line["robust"]["n"]), percent(line["clean"]), percent(line["robust"]),
            number(line["zero_gradient"]["share"]),
        ],
    )],
}  # fmt: skip


def latest(lines: Sequence[Line], part: str) -> list[Line]:
    """The last line of each case of a part, in the order of their first."""
    return list({line["case"]: line for line in lines if line["part"] == part}.values())


def table(part: str, lines: Sequence[Line]) -> str:
    """The tables of a part as Markdown, and what they were measured on."""
    texts = []
    for wanted, head, cells in TABLES[part]:
        rows = [cells(line) for line in lines if wanted(line)]
        grid = [head, ["---" if i == 0 else "---:" for i in range(len(head))], *rows]
        texts.append("\n".join(f"| {' | '.join(row)} |" for row in grid))
    return "\n\n".join([*texts, *sorted({machine(line) for line in lines})])


def machine(line: Line) -> str:
    """A line's hardware, software and commit in words."""
    versions = ", ".join(f"{name} {found}" for name, found in line["versions"].items())
    threads = f"{line['threads']} thread{'s' if line['threads'] > 1 else ''}"
    commit = f"; commit {line['commit']}" if line.get("commit") else ""
    return f"Measured on {line.get('hardware') or line['device'].partition(',')[0]}, {threads}; {versions}{commit}."


def page(text: str, lines: Sequence[Line]) -> str:
    """The page with its tables written anew."""
    return MARK.sub(lambda found: f"{found[1]}\n{table(found[2], latest(lines, found[2]))}\n\n{found[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = PAGE.read_text()
    new = page(old, [json.loads(line) for line in LINES.read_text().splitlines()])
    if args.check:
        sys.exit(0 if new == old else f"{PAGE} is not what the lines give; run: python {sys.argv[0]}")
    write_atomic(PAGE, new)


if __name__ == "__main__":
    main()
