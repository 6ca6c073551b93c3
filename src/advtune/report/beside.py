"""Published rows with ours beside them, as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from advtune.errors import UserError
from advtune.report.against import against, left_out
from advtune.report.formats import csv_text, escape, json_text, tex
from advtune.report.published import papers
from advtune.report.table import canonical, flat, group_by, shown
from advtune.results import Row

Line = dict[str, Any]
HEADER = ("Method", "Setting", "Paper clean %", "Paper robust %", "Ours clean %", "Ours robust %", "n")
UNTUNED = "zero-shot"
OWN = ("method", "clean", "robust", "source", "remark", "recipe", "ours", "differs")  # of a row, never of its table
CAPTION = (
    "Ours: mean over the seeds and the sets named; ±: sample standard deviation over the seeds; [low, high]: 95 % "
    "interval over the images. -: not at hand, or without an attack. A difference in protocol can be larger than one "
    "between methods."
)


def render_against(rows: Sequence[Row], name: str, format: str) -> str:
    """Each published row of a paper with ours beside it, as "markdown", "latex", "csv" or "json" (full precision).

    Raises UserError for an unknown paper and for another format.
    """
    writers = {"markdown": _markdown, "csv": csv_text, "latex": _latex, "json": json_text}
    if format not in writers:
        raise UserError(f"no report format {format!r}; choose from {', '.join(writers)}")
    lines = against(rows, name)
    if format in ("csv", "json"):
        return writers[format](lines)
    dropped = left_out(rows)
    why = f"{dropped} rows of ours left out: not on test images, tuned on them, or not white-box."
    notes = [why, CAPTION] if dropped else [CAPTION]
    return writers[format](lines) + _end(notes, format)


def protocol(section: Sequence[Line]) -> str:
    """What all published rows of a table share, as one sentence."""
    varies = _varying(section)
    tuned = [line for line in section if line["method"] != UNTUNED]
    return "; ".join(_texts((tuned or section)[0], lambda key: key not in varies))


def what_differs(section: Sequence[Line]) -> list[str]:
    """The differences in protocol, one sentence each: first those of all of ours, then those of single rows."""
    mine = [line for line in section if line["ours"]]
    if not mine:
        return []
    common = [fact for fact in mine[0]["differs"] if all(fact in line["differs"] for line in mine)]
    told = [f"All of ours: {_told(common)}."] if common else []
    for line in mine:
        if rest := [fact for fact in line["differs"] if fact not in common]:
            told.append(f"{_name(line, section)}: {_told(rest)}.")
    return told


def sources(section: Sequence[Line]) -> list[str]:
    """Who printed the numbers, and what must be known of single ones."""
    told = []
    for source, lines in group_by([line for line in section if _known(line)], lambda line: line["source"]).items():
        whose = "" if len(lines) == len(section) else f" ({'; '.join(_name(line, section) for line in lines)})"
        told.append(f"Published numbers: {source}{whose}.")
    told += [f"{_name(line, section)}: {line['remark']}." for line in section if line["remark"]]
    return told or ["No published numbers are at hand; only the protocol is."]


def _known(line: Line) -> bool:
    return line["clean"] is not None or line["robust"] is not None


def _told(facts: Sequence[Mapping[str, str]]) -> str:
    return "; ".join(f"{each['what']} {each['ours']} (paper: {each['paper']})" for each in facts)


def _texts(line: Line, chosen: Callable[[str], bool]) -> list[str]:
    """The chosen facts of a published row, in words."""
    sets, shots, train = line.get("data", []), line.get("shots"), line.get("train")
    texts = {
        "backbone": line.get("backbone"),
        "resolution": f"{line['resolution']} px" if "resolution" in line else None,
        "tower.method": f"on a tower tuned with {line['tower']['method']}" if line["tower"] else None,
        "train": "tuned on each test set" if train == "same" else train and f"tuned on {train}",
        "shots": "all images" if shots == "all" else shots and f"{shots} shot{'s' if shots > 1 else ''}",
        "subset": f"{line['subset']} classes" if line["subset"] != "all" else None,
    }
    found = [text for key, text in texts.items() if text and chosen(key)]
    tuned = [] if line["method"] == UNTUNED else [_attack(line, "train_attack", "tuned with", chosen)]
    found += [text for text in (*tuned, _attack(line, "attack", "under", chosen)) if text]
    if sets and chosen("data"):
        found.append(sets[0] if len(sets) == 1 else f"{len(sets)} sets")
    return found


def _attack(line: Line, which: str, verb: str, chosen: Callable[[str], bool]) -> str:
    facts = {key: value for key, value in line[which].items() if chosen(f"{which}.{key}")}
    words = {"name": "{}", "eps": "eps {}", "steps": "{} steps", "step_size": "step {}"}
    texts = [word.format(shown(key, facts[key])) for key, word in words.items() if key in facts]
    return f"{verb} {' '.join(texts)}" if texts else ""


def _varying(section: Sequence[Line]) -> set[str]:
    """The facts in which the published rows of a table differ."""
    told = [flat({key: value for key, value in line.items() if key not in OWN}) for line in section]
    keys = {key for each in told for key in each}
    return {key for key in keys if len({canonical(each.get(key)) for each in told}) > 1}


def _setting(line: Line, section: Sequence[Line]) -> str:
    varies = _varying(section)
    return ", ".join(_texts(line, lambda key: key in varies))


def _name(line: Line, section: Sequence[Line]) -> str:
    setting = _setting(line, section)
    return line["method"] + (f", {setting}" if setting else "")


def _ours(line: Line, name: str) -> str:
    ours = line["ours"]
    if ours is None:
        return "not run"
    if ours[f"{name}_accuracy"] is None:
        return "-"
    mean, low, high = (100 * ours[f"{name}_{key}"] for key in ("accuracy", "low", "high"))
    spread = "" if ours[f"{name}_sd"] is None else f" ± {100 * ours[f'{name}_sd']:.1f}"
    other = [fact["ours"] for fact in line["differs"] if name == "robust" and fact["what"] in ("attack", "attack eps")]
    return f"{mean:.1f}{spread} [{low:.1f}, {high:.1f}]" + (f" ({' '.join(other)})" if other else "")


def _cells(section: Sequence[Line]) -> list[list[str]]:
    cells = []
    for line in section:
        printed = ["-" if line[name] is None else str(line[name]) for name in ("clean", "robust")]
        ours = [_ours(line, name) for name in ("clean", "robust")]
        n = str(line["ours"]["n"]) if line["ours"] else "-"
        cells.append([line["method"], _setting(line, section) or "-", *printed, *ours, n])
    return cells


def _tables(lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    found = group_by(lines, lambda line: line["table"]).items()
    return [(f"{name}: {section[0]['title']}", section) for name, section in found]


def _markdown(lines: Sequence[Line]) -> str:
    paper = papers()[lines[0]["paper"]]
    blocks = [f"## {escape(paper['title'])} (arXiv:{paper['arxiv']})", escape(paper["note"])]
    for title, section in _tables(lines):
        rule = ["---"] * 2 + ["---:"] * (len(HEADER) - 2)
        body = [[escape(cell) for cell in cells] for cells in _cells(section)]
        blocks += [f"### {escape(title)}", f"The paper's: {escape(protocol(section))}."]
        blocks.append("\n".join(f"| {' | '.join(cells)} |" for cells in [list(HEADER), rule, *body]))
        blocks.append("\n".join(f"- {escape(each)}" for each in [*sources(section), *what_differs(section)]))
    return "\n\n".join(blocks) + "\n"


def _latex(lines: Sequence[Line]) -> str:
    paper = papers()[lines[0]["paper"]]
    small = r"\noindent{{\footnotesize {}\par}}"
    blocks = [
        rf"\noindent\textbf{{{tex(paper['title'])} (arXiv:{paper['arxiv']})}}\par",
        small.format(tex(paper["note"])),
    ]
    for title, section in _tables(lines):
        align = "ll" + "r" * (len(HEADER) - 2)
        body = [" & ".join(map(tex, cells)) + r" \\" for cells in [HEADER, *_cells(section)]]
        top = rf"\noindent\textbf{{{tex(title)}}}\par"
        head = [top, small.format(tex(f"The paper's: {protocol(section)}.")), rf"\noindent\begin{{tabular}}{{{align}}}"]
        notes = [small.format(tex(each)) for each in [*sources(section), *what_differs(section)]]
        rows = [r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}\par"]
        blocks.append("\n".join([*head, *rows, *notes]))
    return "\n\n".join(blocks) + "\n"


def _end(notes: Sequence[str], format: str) -> str:
    if format == "markdown":
        return "\n" + "\n\n".join(map(escape, notes)) + "\n"
    return "\n" + "\n".join(rf"\noindent{{\footnotesize {tex(each)}\par}}" for each in notes) + "\n"
