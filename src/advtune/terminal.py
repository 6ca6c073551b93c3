"""What a verb says to a person: tables and colour on a terminal; plain lines and Markdown, as ever, elsewhere."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from advtune.listing import COLUMNS, END, FASTER, backbone_row, recipes, show, shown, source, training
from advtune.untrusted import visible

LOUD = ("alarm", "warning")  # how a line begins that must not be overlooked
NAMED = 6  # edits shown of an attack on texts
ROOM = 30  # columns that the words beside the numbers need


def on_terminal() -> bool:
    """Whether a person looks at stdout; NO_COLOR is heeded where colours are chosen, by rich."""
    return sys.stdout.isatty()


def page(markdown: str) -> None:
    """Print Markdown as the reports write it: on a terminal drawn, without the folded settings; else as it is."""
    if not on_terminal():
        print(markdown, end="" if markdown.endswith("\n") else "\n")
        return
    console = Console(highlight=False)
    text = re.sub(r"<details>.*?</details>", "", markdown, flags=re.DOTALL)
    words = True
    for i, block in enumerate(re.split(r"\n{2,}", text.strip())):
        words, before = block[0] not in "|#", words
        if i and not (words and before):
            console.print()
        if block.startswith("|"):
            rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
            right = [cell.strip().endswith(":") for cell in rows.pop(1)]
            console.print(grid([[plain(cell) for cell in row] for row in rows], right, console.width))
        elif block.startswith("#"):
            console.print(Text(plain(block.lstrip("#")), style="bold"))
        else:
            say(console, [plain(line) for line in block.splitlines()])


def evaluated(rows: Sequence[Any]) -> None:
    """Print result rows: on a terminal as one table with what must be known below it, else as sentences."""
    notes = remarks(rows)
    if not on_terminal():
        print("\n".join(visible(line) for text in [sentence(row) for row in rows] + notes for line in text.split("\n")))
        return
    console, table = Console(highlight=False), [["Method", "Data", "Attack", "n", "Clean %", "Robust %"]]
    for row in rows:
        n = " / ".join(dict.fromkeys(str(counts["n"]) for counts in (row.clean, row.robust) if counts))
        accuracies = [_accuracy(counts) if counts else "-" for counts in (row.clean, row.robust)]
        table.append([row.method, _where(row), _attack(row) or "none", n, *accuracies])
    console.print(grid(table, [False] * 3 + [True] * 3, console.width))
    for row in rows:
        which = f"{_attack(row)}: " if len(rows) > 1 else ""
        say(console, [(line if loud(line) else which + line.strip()) for line in particulars(row)])
    say(console, notes)


def listed(what: str, facts: list[dict[str, Any]]) -> None:
    """Print a listing: as tables on a terminal, else in its plain lines."""
    if not on_terminal():
        show(what, facts)
        return
    console = Console(highlight=False)
    if what == "data":
        rows = [[fact["name"], fact["title"], str(len(fact["classes"])), source(fact)] for fact in facts]
        console.print(grid([["Name", "Title", "Classes", "From"], *rows], [False, False, True, False], console.width))
    elif what == "backbones":
        rows = [COLUMNS, *map(backbone_row, facts)]
        console.print(grid(rows, [False, True, True, False, False], console.width))
    else:
        for fact in facts:
            _options(console, fact)
    if what == "methods":
        say(console, [FASTER, ""])
        for fact in training():
            _options(console, fact)
    if what in END:
        say(console, END[what].split("\n"))


def _options(console: Console, fact: dict[str, Any]) -> None:
    trains = f"  trains {fact['trains']}" if "trains" in fact else ""
    console.print(Text(fact["name"], style="bold cyan").append(trains, style="not bold dim"))
    say(console, [fact["about"]])
    rows = []
    for option in fact["options"]:
        choices = f" ({' | '.join(map(str, option['choices']))})" if option["choices"] else ""
        mark = "†" if option["reconstructed"] else ""
        rows.append([option["name"] + mark, shown(option["name"], option["default"]), option["help"] + choices])
    for preset, fields in fact.get("presets", {}).items():
        values = ", ".join(f"{key}={value}" for key, value in fields.items()) or "the defaults"
        rows.append(["preset", preset, values])
    rows += [[title, "", values] for title, values in recipes(fact)]
    if rows:
        console.print(grid([["Option", "Default", "What it does"], *rows], [False] * 3, console.width))
    console.print()


def grid(rows: Sequence[Sequence[str]], right: Sequence[bool], width: int) -> Table:
    """A table of plain texts, its header first. `right`: the columns of numbers, whole where `width` has the room."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    longest = [max([*map(len, column), min(len(name), 12)]) for name, *column in zip(*rows, strict=True)]
    numbers = sum(length + 2 for length, number in zip(longest, right, strict=True) if number)
    for i, (name, number) in enumerate(zip(rows[0], right, strict=True)):
        title = "\n".join(textwrap.wrap(name, longest[i])) if number else name
        table.add_column(Text(title), justify="right" if number else "left", overflow="fold",
                         no_wrap=number and numbers + ROOM <= width, style="" if i else "cyan")  # fmt: skip
    for row in rows[1:]:
        table.add_row(*(Text(visible(text)) for text in row))
    return table


def say(console: Console, lines: Sequence[str]) -> None:
    """Print lines, the loud ones in red."""
    for line in lines:
        console.print(Text(visible(line), style="bold red" if loud(line) else ""))


def loud(line: str) -> bool:
    return line.strip(" -").casefold().startswith(LOUD)


def plain(text: str) -> str:
    """The text of a cell or line of our Markdown."""
    return re.sub(r"\\(.)", r"\1", text).strip()


def sentence(row: Any) -> str:
    """A row as a few lines for a person."""
    lines = [f"{row.method} on {_where(row)}: clean  {_percent(row.clean)}"]
    if row.robust is not None:
        lines.append(f"robust under {_attack(row)}: {_percent(row.robust)}")
    return "\n".join(lines + particulars(row))


def particulars(row: Any) -> list[str]:
    """What must be known of a row's numbers: its threat if not the usual one, its stages, what the checks found."""
    from advtune.report.table import BLIND
    from advtune.rows import WHITE_BOX

    lines = []
    if row.threat and row.threat != WHITE_BOX:
        lines.append(f"  {row.threat}")
    if len(row.stages) > 1:
        lines.append("  " + ", ".join(f"{s['attack']}: {s['fell']} of {s['attacked']} fell" for s in row.stages))
    for stage in row.stages:
        changes = [f"{name!r} -> {text!r}" for name, text in stage.get("edits", {}).items()]
        lines += [f"  {', '.join(changes[:NAMED])}" + (" ..." if len(changes) > NAMED else "")] if changes else []
        lines += [f"  {stage['tried']:,} texts tried"] if "tried" in stage else []
    if row.checks:
        alarms = [each for each in row.checks if each["alarm"]]
        lines.append(f"checks: {len(row.checks)} made, {len(alarms) or 'no'} alarm{'s' if len(alarms) != 1 else ''}")
        lines += [f"  ALARM {each['name']}: {each['text']} (n={each['n']})" for each in alarms]
    elif row.zero_gradient and row.zero_gradient["share"] > BLIND:
        share = 100 * row.zero_gradient["share"]
        lines.append(
            f"WARNING: {share:.0f} % of the input gradients are exactly zero: the attack may have seen nothing"
        )
    return lines


def remarks(rows: Sequence[Any]) -> list[str]:
    """What a reader of these rows should know, each once."""
    notes = [note for row in rows for note in [*row.notes, row.backbone.get("notice")] if note]
    return [f"note: {note}" for note in dict.fromkeys(notes)]


def _where(row: Any) -> str:
    subset = "" if row.data["subset"] == "all" else f"{row.data['subset']} classes, "
    return f"{row.data['name']} ({subset}{row.data['part']})"


def _attack(row: Any) -> str:
    from advtune.report.table import pixels

    if row.attack is None:
        return ""
    if "distance" in row.attack:
        return f"{row.attack['name']} {row.attack['norm']} distance={row.attack['distance']}"
    steps = f" steps={row.attack['steps']}" if "steps" in row.attack else ""
    return f"{row.attack['name']} {row.attack['norm']} eps={pixels(row.attack['eps'])}{steps}"


def _percent(counts: dict[str, Any]) -> str:
    return (
        f"{100 * counts['accuracy']:5.1f} %  [{100 * counts['low']:.1f}, {100 * counts['high']:.1f}]  n={counts['n']}"
    )


def _accuracy(counts: dict[str, Any]) -> str:
    return f"{100 * counts['accuracy']:.1f} [{100 * counts['low']:.1f}, {100 * counts['high']:.1f}]"
