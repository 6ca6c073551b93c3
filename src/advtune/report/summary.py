"""What a report says in words, before its tables: what was measured, who is best, what to be careful with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from advtune.report.formats import heading, label
from advtune.report.found import Measured, headline, score
from advtune.report.plot import front
from advtune.report.table import BLIND, attacks, pixels, sections, slice_name

Line = dict[str, Any]
MOST = 6  # names or settings in a sentence


def percent(line: Line, name: str) -> str:
    """`47.6 % [43.3, 52.0]`: mean and 95 % interval of `clean` or `robust`."""
    mean, low, high = (100 * line[f"{name}_{key}"] for key in ("accuracy", "low", "high"))
    spread = "" if line[f"{name}_sd"] is None else f" ± {100 * line[f'{name}_sd']:.1f}"
    return f"{mean:.1f}{spread} % [{low:.1f}, {high:.1f}]"


def tiles(lines: Sequence[Measured]) -> list[tuple[str, str, str]]:
    """The numbers to see at first: (what, number, detail)."""
    shown = headline(lines)
    best = max(shown, key=lambda each: score(each.line))
    kind = "clean" if best.line["robust_accuracy"] is None else "robust"
    found = [(f"best {kind} accuracy", _short(best.line, kind), f"{best.name}, {_interval(best.line, kind)}")]
    if kind == "robust":
        found.append(("its clean accuracy", _short(best.line, "clean"), _interval(best.line, "clean")))
    zero = next((each.line for each in shown if each.line["method"] == "zero-shot"), None)
    if zero is not None and zero is not best.line:
        detail = _interval(zero, kind)
        detail += f"; clean {_short(zero, 'clean')}" if kind == "robust" else ""
        found.append((f"zero-shot, {kind}", _short(zero, kind), detail))
    alarms, checked = alarm_count(lines), sum(bool(each.line["checks"]) for each in lines)
    detail = f"{checked} of {len(lines)} lines were checked" if checked else "no line was checked for masked gradients"
    found.append(("alarms", str(alarms) if checked or alarms else "-", detail))
    return found


def alarm_count(lines: Sequence[Measured]) -> int:
    """Findings of the checks that are alarms, and lines whose gradients were zero too often."""
    return sum(len(each.line["alarms"]) + bool(blind(each.line)) for each in lines)


def blind(line: Line) -> bool:
    """Whether an attack may have seen nothing, which no check of the line has said."""
    told = any(each["name"] == "zero-gradient" for each in line["alarms"])
    return (line["zero_gradient_share"] or 0) > BLIND and not told


def words(lines: Sequence[Measured]) -> list[tuple[str, str]]:
    """The summary as (subject, sentences): what was measured, who is best, what to trust, what is reconstructed."""
    told = [("Measured", _measured(lines)), *(("Most robust", text) for text in _best(lines))]
    return [*told, ("Trust", " ".join(_trust(lines))), *(("Reconstructed", text) for text in _reconstructed(lines))]


def notices(lines: Sequence[Measured]) -> list[str]:
    """What a backbone says of itself: that it is a stand-in."""
    found = [f"{each.line['backbone']}: {each.line['notice']}" for each in lines if each.line["notice"]]
    return list(dict.fromkeys(found))


def _measured(lines: Sequence[Measured]) -> str:
    facts = [each.line for each in lines]
    methods = list(dict.fromkeys(line["method"] for line in facts))
    data = list(dict.fromkeys(slice_name(line["dataset"], line["subset"], line["part"]) for line in facts))
    made = list(dict.fromkeys(_attack(line) for line in facts if attacks(line)))
    backbones = list(dict.fromkeys(str(line["backbone"]) for line in facts))
    n = sorted({line["n"] for line in facts})
    images = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
    under = f", attacked with {_list(made)}" if made else ", without an attack"
    rows = sum(len(each.rows) for each in lines)
    return (
        f"{_list(methods)} on {_list(data)} ({images} images{' each' if len(data) > 1 else ''}){under}. "
        f"Backbone{'s' if len(backbones) > 1 else ''}: {_list(backbones)}. "
        f"{rows} result row{'s' if rows != 1 else ''} in {len(lines)} table line{'s' if len(lines) != 1 else ''}."
    )


def _attack(line: Line) -> str:
    eps = "" if line["eps"] is None else f" eps {pixels(line['eps'])}"
    if "distance" in line["attack_options"]:
        eps = f" distance {line['attack_options']['distance']}"
    norm = "" if line["norm"] == "linf" else f" {line['norm']}"
    return f"{line['attack']}{norm}{eps}" + (f" ({line['steps']} steps)" if line["steps"] else "")


def _best(lines: Sequence[Measured]) -> list[str]:
    """The most robust line of each section, with what it is not told apart from."""
    found = []
    attacked = [section for section in sections([each.line for each in lines]) if attacks(section[0])]
    attacked = [section for section in attacked if len(section) > 1] or attacked
    for section in attacked[:MOST]:
        best = max(section, key=score)
        text = f"{label(best)}, {percent(best, 'robust')} robust and {percent(best, 'clean')} clean"
        text += f" ({heading(section)})."
        near = [label(line) for line in section if line is not best and line["robust_high"] > best["robust_low"]]
        if near:
            text += f" Its interval overlaps with that of {_list(near, 3)}: see advtune compare."
        rest = [label(line) for line in front(section) if line is not best]
        if rest:
            text += f" Also on the Pareto front of clean and robust: {_list(rest, 3)}."
        found.append(text)
    if len(attacked) > MOST:
        found.append(f"In {len(attacked) - MOST} more settings: see the tables.")
    return found


def _trust(lines: Sequence[Measured]) -> list[str]:
    attacked = [each for each in lines if attacks(each.line)]
    if not attacked:
        return ["No attack was made: these numbers say nothing of robustness."]
    checked = [each for each in attacked if each.line["checks"]]
    alarms, told = alarm_count(lines), []
    if alarms:
        bad = [each.name for each in lines if each.line["alarms"] or blind(each.line)]
        told.append(f"{alarms} alarm{'s' if alarms > 1 else ''}, on {_list(list(dict.fromkeys(bad)))}: read the "
                    "findings in the tables before these numbers.")  # fmt: skip
    elif checked:
        told.append(f"The checks of {len(checked)} of {len(attacked)} attacked lines raised no alarm. They look for "
                    "masked gradients; they prove nothing.")  # fmt: skip
    if not checked:
        told.append("No line was checked for masked gradients: add --checks, or evaluate with autoattack.")
    if any(each.line["attack"] != "autoattack" for each in attacked):
        told.append("Robust accuracy under one attack is an upper bound: a stronger attack can only lower it.")
    return told


def _reconstructed(lines: Sequence[Measured]) -> list[str]:
    found = {each.line["method"]: each.line["reconstructed"] for each in lines if each.line["reconstructed"]}
    if not found:
        return []
    told = "; ".join(f"{method}: {', '.join(names)}" for method, names in found.items())
    return [f"No public source gives these options, they are reconstructed by us and marked † ({told})."]


def _short(line: Line, name: str) -> str:
    return f"{100 * line[f'{name}_accuracy']:.1f} %"


def _interval(line: Line, name: str) -> str:
    return f"95 % interval {100 * line[f'{name}_low']:.1f} to {100 * line[f'{name}_high']:.1f}, n = {line[f'{name}_n']}"


def _list(names: Sequence[str], most: int = MOST) -> str:
    some = list(names[:most])
    if len(names) > most:
        return f"{', '.join(some)} and {len(names) - most} more"
    return " and ".join(filter(None, (", ".join(some[:-1]), some[-1])))
