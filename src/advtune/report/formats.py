"""Table lines as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from advtune.errors import UserError
from advtune.report.harmonic import harmonic_means, harmonic_table
from advtune.report.table import BLIND, flat, group_by, pixels, sections, shown, slice_name, table
from advtune.results import Row
from advtune.untrusted import cell, visible

Line = dict[str, Any]
CAPTION = (
    "Accuracy in %. [low, high]: 95 % Wilson interval over the n images, at the mean where seeds are merged. "
    "±: sample standard deviation over the seeds."
)
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",  # \textquotedbl needs T1 fonts, which a bare article does not load
    "[": "{[}",  # after a line's end these two are read as its argument
    "*": "{*}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "·": r"$\cdot$",
    "\n": " ",
    "\r": " ",
    "\t": " ",
} | {special: "\\" + special for special in "&%_#${}"}
# A table on a bare article's page: letters of a line in footnotesize, and lines. In wider ones text columns with cells
# of more than LONG letters are broken, each to a share of the width, which has FOLD letters.
ROOM, PAGE, LONG, BROKEN, FOLD = 72, 50, 20, (0.2, 0.14, 0.1), 95
LETTERS = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿ"  # those of Latin-1 that OT1 fonts have


def render(rows: Sequence[Row], format: str) -> str:
    """The report as text: "markdown", "latex" (tabular for a bare article), "csv" or "json" (full precision).

    Raises UserError for no rows and for another format.
    """
    writers = {"markdown": _markdown, "csv": csv_text, "latex": _latex, "json": json_text}
    if format not in writers:
        raise UserError(f"no report format {format!r}; choose from {', '.join(writers)}")
    return writers[format](table(rows)) + _harmonic(rows, format)


def heading(section: Sequence[Line]) -> str:
    """What all numbers of a section share: data, n, resolution, attack with eps and steps, backbone."""
    line = section[0]
    n = f"n = {line['n']}"
    if line["robust_n"] not in (None, line["n"]):
        n = f"n = {line['n']} clean, {line['robust_n']} robust"
    data = slice_name(line["dataset"], line["subset"], line["part"])
    size = f", {_size(line['resolution'])} px" if line["resolution"] else ""
    attack = line["attack"] or "no attack"
    if line["eps"] is not None:
        attack += f"{'' if line['norm'] == 'linf' else ' ' + line['norm']} eps {pixels(line['eps'])}"
    if "distance" in line["attack_options"]:
        attack += f" distance {line['attack_options']['distance']}"
    if line["steps"] is not None:
        attack += f", {line['steps']} steps"
    return f"{data}, {n}{size} · {attack} · {line['backbone']}"


def label(line: Line) -> str:
    """The method and what tells this line from the others of its section."""
    texts = {key: shown(key, value) for key, value in line["differs"].items()}
    differs = ", ".join(f"{key} {text if len(text) <= 40 else text[:37] + '...'}" for key, text in texts.items())
    return line["method"] + (f" ({differs})" if differs else "")


def subheading(section: Sequence[Line]) -> str:
    """The rest of what the numbers share: the attack's other options, the threat model, the weights."""
    line = section[0]
    parts = []
    if line["attack_options"]:
        options = (f"{key}={shown(key, value)}" for key, value in flat(line["attack_options"]).items())
        parts.append(f"Attack: {', '.join(options)}")
    threats = {each["settings"]["threat"] for each in section}
    if len(threats) == 1 and line["attack"] and line["settings"]["threat"]:
        parts.append(f"Threat: {line['settings']['threat']}")
    if line["backbone_sha256"]:
        parts.append(f"Backbone sha256: {line['backbone_sha256'][:12]}")
    return ". ".join(parts)


def footnotes(section: Sequence[Line]) -> list[str]:
    """What a reader must know before believing the numbers of a section; one sentence each."""
    notes = []
    for line in section:
        if line["reconstructed"]:
            names = ", ".join(line["reconstructed"])
            notes.append(f"† {line['method']}: no public source gives {names}; reconstructed by us.")
    for line in section:
        share = line["zero_gradient_share"]
        if share is not None and share > BLIND and not any(each["name"] == "zero-gradient" for each in line["alarms"]):
            notes.append(
                f"Warning, {label(line)}: {100 * share:.1f} % of the input gradients "
                f"(n = {line['zero_gradient_n']}) were exactly zero; the attack may have seen nothing, "
                "so the robust accuracy may be too high."
            )
    for line in section:
        if len(line["stages"]) > 1:
            counts = (f"{each['attack']} broke {each['fell']} of {each['attacked']}" for each in line["stages"])
            notes.append(f"{label(line)}: {', '.join(counts)}.")
        notes += [f"Alarm, {label(line)}: {each['text']} (n = {each['n']})." for each in line["alarms"]]
    checked = [line for line in section if line["checks"]]
    if checked and not any(line["alarms"] for line in checked):
        where = "" if len(checked) == len(section) else f" on {len(checked)} of {len(section)} lines"
        looked = ", ".join(sorted({name for line in checked for name in line["checks"]}))
        notes.append(f"Checks without an alarm{where}: {looked}. They prove nothing; they look for masking.")
    notes += [f"Backbone {line['backbone']}: {line['notice']}" for line in section if line["notice"]]
    if len({sha for line in section for sha in line["data_sha256"]}) > 1:
        notes.append("Not all numbers here come from the same images (the sha256 of the data differ).")
    if len({sha for line in section for sha in line["texts_sha256"]}) > 1:
        notes.append("Not all numbers here use the same class texts.")
    for line in section:
        if any(line["skipped"]):
            notes.append(f"{label(line)}: images that could not be read and were skipped: {max(line['skipped'])}.")
    shared = group_by([(note, label(line)) for line in section for note in line["notes"]], lambda each: each[0])
    notes += [f"{note}: {_whose([name for _, name in pairs], section)}" for note, pairs in shared.items()]
    return list(dict.fromkeys(notes))


def _whose(names: Sequence[str], section: Sequence[Line]) -> str:
    """The lines by name; more than three of them by method and number."""
    if len(names) <= 3:
        return ", ".join(names)
    methods = Counter(line["method"] for line in section if label(line) in names)
    return ", ".join(method if k == 1 else f"{method} ({k} lines)" for method, k in methods.items())


def _size(resolution: Any) -> str:
    return "x".join(map(str, resolution)) if isinstance(resolution, (list, tuple)) else str(resolution)


def _number(line: Line, name: str) -> str:
    mean, sd = line[f"{name}_accuracy"], line[f"{name}_sd"]
    if mean is None:
        return "-"
    spread = "" if sd is None else f" ± {100 * sd:.1f}"
    return f"{100 * mean:.1f}{spread} [{100 * line[f'{name}_low']:.1f}, {100 * line[f'{name}_high']:.1f}]"


def cells(section: Sequence[Line]) -> list[list[str]]:
    """The header and the lines of one section, as plain text."""
    names = ["clean", "robust"] if section[0]["attack"] else ["clean"]
    grid = [["Method", "Trained on", "Seeds", "n", *(f"{name.capitalize()} %" for name in names)]]
    for line in section:
        trained = slice_name(line["train"], line["train_subset"], line["train_part"]) or "-"
        if line["train_shots"]:
            trained += f", {line['train_shots']} shots"
        seeds = ", ".join(str(seed) for seed in line["seeds"])
        if len(line["seeds"]) == 1 and not line["settings"]["train"]:
            seeds = "-"  # nothing was trained; the seed of the slice is in the settings of the row
        sizes = dict.fromkeys(str(line[f"{name}_n"]) for name in names)
        marker = " †" if line["reconstructed"] else ""
        numbers = [_number(line, name) for name in names]
        grid.append([label(line) + marker, trained, seeds, " / ".join(sizes), *numbers])
    return grid


def _markdown(lines: Sequence[Line]) -> str:
    blocks = []
    for section in sections(lines):
        blocks.append(f"### {escape(heading(section))}")
        if below := subheading(section):
            blocks.append(escape(below))
        header, *body = cells(section)
        rule = ["---"] * 3 + ["---:"] * (len(header) - 3)
        table_lines = [[escape(cell) for cell in header], rule, *([escape(cell) for cell in line] for line in body)]
        blocks.append("\n".join(f"| {' | '.join(each)} |" for each in table_lines))
        blocks += [escape(note) for note in footnotes(section)]
        blocks.append(_settings(section))
    return "\n\n".join([*blocks, escape(CAPTION)]) + "\n"


def _harmonic(rows: Sequence[Row], format: str) -> str:
    """Where base and new classes of a run were evaluated: their harmonic means, below the tables for people."""
    lines = harmonic_means(rows)
    if not lines or format not in ("markdown", "latex"):
        return ""
    header, *body = harmonic_table(lines)
    title = "Harmonic means of base and new classes"
    note = "H = 2ab / (a + b) in %, for each seed, then averaged; ±: sample standard deviation over the seeds."
    if format == "markdown":
        rule = ["---"] * 6 + ["---:"] * (len(header) - 6)
        grid = [[escape(cell) for cell in header], rule, *([escape(cell) for cell in line] for line in body)]
        rest = "\n".join(f"| {' | '.join(each)} |" for each in grid)
        return f"\n### {title}\n\n{rest}\n\n{note}\n"
    rows_ = [" & ".join(map(tex, line)) + r" \\" for line in (header, *body)]
    top = [rf"\noindent\textbf{{{title}}}\par", rf"\noindent\begin{{tabular}}{{{'l' * 6 + 'r' * (len(header) - 6)}}}"]
    foot = [r"\end{tabular}\par", rf"\noindent{{\footnotesize {tex(note)}\par}}"]
    return "\n" + "\n".join([*top, r"\hline", rows_[0], r"\hline", *rows_[1:], r"\hline", *foot]) + "\n"


def _settings(section: Sequence[Line]) -> str:
    """Every setting of every line, folded away; GitHub renders it."""
    items = []
    for line in section:
        facts = (f"{key}={shown(key, value)}" for key, value in flat(line["settings"]).items() if value != {})
        items.append(f"- {escape(', '.join(facts))}")
    return "\n".join(["<details><summary>Settings</summary>", "", *items, "", "</details>"])


def _latex(lines: Sequence[Line]) -> str:
    blocks = []
    for section in sections(lines):
        top = rf"\noindent{{\raggedright\textbf{{{tex(heading(section))}}}\par}}\nopagebreak"
        notes = [below] if (below := subheading(section)) else []
        foot = [_small(note) for note in [*notes, *footnotes(section)]]
        blocks.append("\n".join([top, *_tabulars(cells(section)), *foot]))
    return "\n\n".join([*blocks, _small(CAPTION)]) + "\n"


def _small(text: str) -> str:
    return rf"\noindent{{\footnotesize\raggedright {tex(text)}\par}}"


def _tabulars(grid: Sequence[Sequence[str]]) -> Iterator[str]:
    """The cells as tables of at most a page: a bare article breaks none. What is too wide is set smaller, and long
    cells of text are broken into lines."""
    header, *body = grid
    widest = [max(map(len, column)) for column in zip(*grid, strict=True)]
    wide = sum(widest) > ROOM
    size = "scriptsize" if wide else "footnotesize"
    share = [BROKEN[i] if wide and i < 3 and width > LONG else 0 for i, width in enumerate(widest)]
    align = [rf"p{{{part}\textwidth}}" if part else "l" if i < 3 else "r" for i, part in enumerate(share)]
    tall = [
        max(math.ceil(len(cell) / FOLD / part) if part else 1 for cell, part in zip(line, share, strict=True))
        for line in body
    ]
    page = sum(tall) / math.ceil(sum(tall) / PAGE)
    pages = group_by(range(len(body)), lambda i: sum(tall[:i]) // page)
    for lines in pages.values():
        yield rf"\begingroup\{size}\tabcolsep 3pt\noindent\begin{{tabular}}{{{''.join(align)}}}"
        yield r"\hline"
        yield " & ".join(map(tex, header)) + r" \\"
        yield r"\hline"
        for i in lines:
            own = [rf"\raggedright {tex(cell)}" if part else tex(cell)
                   for cell, part in zip(body[i], share, strict=True)]  # fmt: skip
            yield " & ".join(own) + r" \\"
        yield r"\hline"
        yield r"\end{tabular}\par\endgroup"


def csv_text(lines: Sequence[Line]) -> str:
    """One record a line; nested facts as dotted columns, lists as JSON, texts as no spreadsheet computes them."""
    records = [flat(line) for line in lines]
    columns = list(dict.fromkeys(key for record in records for key in record))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        writer.writerow([cell(_field(record.get(key))) for key in columns])
    return out.getvalue()


def _field(value: Any) -> Any:
    if value is None or value == {}:
        return ""
    return json.dumps(value) if isinstance(value, (list, bool)) else value


def json_text(lines: Sequence[Line]) -> str:
    return json.dumps(lines, indent=2, allow_nan=False) + "\n"


def escape(text: str) -> str:
    """Plain text for GitHub: no table bar, emphasis, link, HTML or formula comes out of a name."""
    text = re.sub(r"([\\`*\[\]<>|~$&])", r"\\\1", visible(" ".join(text.split())))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def tex(text: str) -> str:
    """Plain text for LaTeX; a letter that a bare article cannot set is written as its code point."""
    return "".join(
        LATEX.get(c) or (c if (c.isascii() and c.isprintable()) or c in LETTERS else f"{{[}}U+{ord(c):04X}]")
        for c in text
    )
