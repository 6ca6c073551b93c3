"""What an audit says in words: a verdict, the price of the fix, the classes that fall first, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from advtune.comparison import ALPHA, compare
from advtune.methods import METHODS
from advtune.report.classes import ClassLine, per_class
from advtune.report.table import BLIND, pixels
from advtune.results import Row, wilson

if TYPE_CHECKING:
    from advtune.audit import Audit, Side

SHOWN = 10  # fragile classes
FEW = 10  # images a class, below which their order is mostly chance
MOST, NEARLY = 0.5, 0.9  # shares of the right answers
TEMPLATES = ("a photo of a {}.", "an image of a {}.")


@dataclass(frozen=True)
class Fragile:
    """A class of n images: right as they are and under AutoAttack, for each side."""

    name: str
    n: int
    right: list[tuple[int, int]]

    @property
    def lost(self) -> int:
        """Images that AutoAttack takes, of all sides."""
        return sum(clean - robust for clean, robust in self.right)


def percent(counts: dict[str, Any]) -> str:
    """`47.6 % [43.3, 52.0]`."""
    return f"{100 * counts['accuracy']:.1f} % [{100 * counts['low']:.1f}, {100 * counts['high']:.1f}]"


def name_of(side: Side) -> str:
    """What the audited or fixed model is called."""
    return side.model.origin.name


def verdict(found: Audit) -> list[tuple[str, str]]:
    """(title, sentences): of the model as it came, and of what the fix changed."""
    before = found.sides[0]
    told = [(title(before, len(found.task.classes)), described(found, before)), *alarm(before, "")]
    return told if len(found.sides) == 1 else [*told, changed(found), *alarm(found.sides[1], " after the fix")]


def alarm(side: Side, when: str) -> list[tuple[str, str]]:
    """A paragraph of its own for what the checks found."""
    found = doubts(side.auto)
    return [(f"Alarm: a robust accuracy{when} may be too high", found)] if found else []


def trust(side: Side) -> str:
    """That the checks found nothing, where they were made and did."""
    n = len(side.auto.checks)
    if doubts(side.auto) or not n:
        return ""
    return f" {n} check{'s' if n > 1 else ''} for masked gradients raised no alarm, which proves nothing."


def guessing(row: Row, classes: int) -> bool:
    """Whether the clean accuracy cannot be told from that of a guess."""
    return bool(row.clean["correct"] == 0 or row.clean["low"] <= 1 / classes)


def title(side: Side, classes: int) -> str:
    """The verdict in a few words. `Most` is said when the 95 % interval of the share that stands is clear of half."""
    row = side.auto
    clean, robust = row.clean, row.robust or {}
    if guessing(row, classes):
        return "Not shown to be better than guessing"
    low, high = wilson(robust["correct"], clean["correct"])
    if high < 1 - NEARLY:
        return "Not robust: almost every right answer can be turned into a wrong one"
    if high < MOST:
        return "Not robust: most right answers can be turned into wrong ones"
    if low > NEARLY:
        return "Robust at this strength: almost every right answer stands"
    if low > MOST:
        return "Partly robust: most right answers stand"
    return "Undecided: these images cannot say whether most right answers stand"


def described(found: Audit, side: Side) -> str:
    """The numbers behind the title, with intervals and n."""
    clean, robust = side.auto.clean, side.auto.robust or {}
    n, fell, classes = clean["n"], clean["correct"] - robust["correct"], len(found.task.classes)
    size = f"{n} of the {found.total}" if n < found.total else f"all {n}"
    text = (
        f"{name_of(side)} is right on {percent(clean)} of {size} images of the {found.task.name} {found.part} part as "
        f"they are, and on {percent(robust)} when an attacker may change every pixel by {strength(side.auto)} "
        f"(AutoAttack, n = {n}): {fell} of its {clean['correct']} right answers can be turned into wrong ones."
    )
    text += trust(side)
    if guessing(side.auto, classes):
        return f"{text} With {classes} classes, that accuracy cannot be told from guessing: robustness comes later."
    return f"{text} {half(side)}".strip()


def strength(row: Row) -> str:
    """eps in words."""
    eps = (row.attack or {})["eps"]
    steps = eps * 255
    plural = "" if abs(steps - 1) < 1e-6 else "s"
    return f"at most {pixels(eps)}, {steps:g} step{plural} of the 255 between black and white"


def half(side: Side) -> str:
    """From which eps on less than half of the right answers is left."""
    whole = side.curve[0].clean["correct"]
    for row in side.curve if whole else ():
        if row.attack and row.robust and row.robust["correct"] < MOST * whole:
            return f"Under PGD less than half of its right answers is left from eps {pixels(row.attack['eps'])} on."
    return "Under PGD more than half of its right answers is left at every eps that was tried." if whole else ""


def doubts(row: Row) -> str:
    """What the checks found, or nothing."""
    found = [f"{each['name']}: {each['text']} (n = {each['n']})." for each in row.checks if each["alarm"]]
    share = (row.zero_gradient or {}).get("share", 0)
    if share > BLIND and not any(each["name"] == "zero-gradient" and each["alarm"] for each in row.checks):
        found.append(f"{100 * share:.0f} % of the input gradients are exactly zero: the attack may have seen nothing.")
    return " ".join(found)


def paired(found: Audit) -> dict[str, dict[str, Any]]:
    """Before and after on the same images under AutoAttack: the comparison of `clean` and of `robust`."""
    before, after = (side.auto for side in found.sides)
    rows = [replace(before, train=None)], [after]  # as it came, with whatever seed it was made
    return {each["which"]: each for each in compare(*rows)}


def changed(found: Audit) -> tuple[str, str]:
    """What the fix gave and what it cost, paired image by image."""
    pair, side = paired(found), found.sides[1]
    clean, robust = side.auto.clean, side.auto.robust or {}
    gain, price = (real(pair[which]) for which in ("robust", "clean"))
    if not gain:
        shown = {1: "helps on clean images alone", 0: "is not told from no fix",
                 -1: "is not shown to help, and costs clean accuracy"}[price]  # fmt: skip
        head = f"The fix ({found.fix}) {shown}"
    elif gain < 0:
        head = f"The fix ({found.fix}) makes it less robust"
    else:
        cost = {1: "with clean images, too", 0: "at no clean price that shows", -1: "at a clean price"}[price]
        head = f"The fix ({found.fix}) helps, {cost}"
    train = side.auto.train or {}
    text = (
        f"Tuned on {train.get('n')} training images, it is right on {percent(clean)} as they are "
        f"({points(pair['clean'])}) and on {percent(robust)} under the same attack ({points(pair['robust'])}), "
        f"n = {clean['n']}.{trust(side)} {half(side)}"
    )
    return head, text.strip()


def real(each: dict[str, Any]) -> int:
    """1 or -1 when the difference is real (p < ALPHA), else 0."""
    return 0 if each["p"] >= ALPHA else (1 if each["difference"] > 0 else -1)


def points(each: dict[str, Any]) -> str:
    p = "p < 0.001" if each["p"] < 0.001 else f"p = {each['p']:.3f}"
    return f"{100 * each['difference']:+.1f} points [{100 * each['low']:.1f}, {100 * each['high']:.1f}], {p}"


def columns(found: Audit, names: Sequence[str]) -> list[tuple[str, list[ClassLine]]]:
    """The class lines of each side under AutoAttack, by the side's name."""
    labels = found.images.y.tolist()
    lines = [per_class([side.auto], labels, found.task.classes) for side in found.sides]
    return list(zip(names, lines, strict=True))


def fragile(found: Audit) -> list[Fragile]:
    """The classes that lose images to AutoAttack; those first that lose the largest share, over the sides."""
    sides = [lines for _, lines in columns(found, [name_of(side) for side in found.sides])]
    classes = []
    for lines in zip(*sides, strict=True):
        n = lines[0].n
        right = [(round(each.clean * n), round((each.robust or 0) * n)) for each in lines]
        classes.append(Fragile(lines[0].name, n, right))
    return sorted([each for each in classes if each.lost], key=lambda each: (-each.lost / each.n, -each.lost))


def following(found: Audit) -> list[tuple[str, str]]:
    """What to do next: (why, command)."""
    last, again = found.sides[-1], found.again
    steps: list[tuple[str, list[str]]] = []
    if guessing(last.auto, len(found.task.classes)):
        other = next(text for text in TEMPLATES if text != found.task.template)
        steps.append(("Put the classes in other words (here the template; --classes gives other names), until it is "
                      "right more often than a guess:", [*evaluated(last, found), "--template", other]))  # fmt: skip
    if doubts(last.auto):
        steps.append(("What each check means is in docs/evaluation.md; an attack without gradients is not fooled by "
                      "masked ones:", [*evaluated(last, found), "--attack", "square"]))  # fmt: skip
    if len(found.sides) == 1:
        steps.append(("Tune it, and see before and after:", [*again, "--fix"]))
    elif real(paired(found)["robust"]) > 0:
        steps += shipped(found)
    else:
        steps.append(("Tune longer and at another rate; other methods: advtune list methods:",
                      [*again, "--epochs", "30", "-o", "lr=1e-4", "--overwrite"]))  # fmt: skip
    if last.auto.clean["n"] < found.total:
        steps.append((f"Tighter intervals, from all {found.total} images:", [*again, "--limit", "all"]))
    return [(why, shlex.join(words)) for why, words in steps]


def evaluated(side: Side, found: Audit) -> list[str]:
    """The command that evaluates one side."""
    who = [side.auto.run] if side.auto.run else ["zero-shot", "--backbone", name_of(side)]
    return ["advtune", "evaluate", *who, "--data", found.task.spec, "--limit", str(side.auto.clean["n"])]


def shipped(found: Audit) -> list[tuple[str, list[str]]]:
    """What to do with a fix that helps."""
    folder, out, tower = str(found.out / found.fix), str(found.out / "exported"), "image tower"
    kind = "huggingface" if METHODS[found.fix].trains == tower else "onnx"
    eps = pixels((found.sides[-1].auto.attack or {})["eps"])
    cross = [
        "advtune",
        "evaluate",
        folder,
        "--data",
        "cifar10",
        "--limit",
        "200",
        "--attack",
        "pgd",
        "-a",
        f"eps={eps}",
    ]
    return [
        ("Ship it (docs/ship.md):", ["advtune", "export", folder, "--to", kind, "--out", out]),
        ("See what is left on data it was not tuned on (advtune list data):", cross),
    ]
