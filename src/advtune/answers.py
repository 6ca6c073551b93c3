"""Which rows answer a run, and what they are of: how a study knows what is done without loading a model or an image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advtune import runs
from advtune.data.catalog import entry, names
from advtune.data.task import TEMPLATE
from advtune.errors import UserError
from advtune.options import as_options
from advtune.protocols import ZERO_SHOT, Run, Slice
from advtune.results import Row, read
from advtune.rows import WHITE_BOX, attack_facts

Todo = list[tuple[Slice, list[Any]]]


def rows_of(run: Run, folder: Path) -> list[Row]:
    """The rows that answer a run, in its order, one an evaluation; others in its folder are left out. Raises UserError
    when the folder holds rows of a model that was tuned otherwise: a name proves nothing."""
    path = folder / runs.RESULTS
    have = read(path) if path.is_file() else []
    if not all(tuned_as(row, run) for row in have):
        raise UserError(f"{folder}: its rows were made with other settings; remove it or choose another --out")
    wanted = [(test, attack) for test in run.tests for attack in run.attacks]
    found = [next((row for row in have if answers(row, run, *each)), None) for each in wanted]
    return [row for row in found if row is not None]


def missing(run: Run, have: Sequence[Row]) -> Todo:
    """The evaluations that no row answers, as (slice, attacks in turn); a curve is gone through as a whole."""
    todo: Todo = []
    for test in run.tests:
        lacks = [a for a in run.attacks if not any(answers(row, run, test, a) for row in have)]
        if lacks and run.curve:
            todo.append((test, list(run.attacks)))
        else:
            todo += [(test, [attack]) for attack in lacks]
    return todo


def answers(row: Row, run: Run, test: Slice, attack: Any) -> bool:
    """Whether a row is this evaluation: the whole slice and every field of the attack, its seed included."""
    facts = None if attack is None else plain({**attack_facts(attack), "seed": run.attack_seed})
    same = plain(row.attack) == facts and row.threat == ("" if attack is None else getattr(attack, "threat", WHITE_BOX))
    return same and is_slice(
        row.data, row, run.template, spec=test.data, subset=test.subset, part=test.part, limit=test.limit
    )


def tuned_as(row: Row, run: Run) -> bool:
    """Whether a row's model was tuned as the run says; zero-shot says nothing of its backbone's tuning."""
    if run.method == ZERO_SHOT:
        return True
    method, recipe, attack = run.configured()
    facts, train = (run.method, as_options(method), as_options(recipe)), row.train or {}
    same = facts == (row.method, row.options, row.recipe) and plain(attack_facts(attack)) == plain(train.get("attack"))
    return same and train["seed"] == run.seed and is_slice(
        train, row, run.template, spec=run.data, subset=run.subset, part=run.part, shots=run.shots, limit=run.limit
    )  # fmt: skip


def is_slice(
    facts: Mapping[str, Any], row: Row, template: str, *, spec: str, shots: int | None = None, **wanted: Any
) -> bool:
    """Whether a row's facts are of this slice as a study takes it: the template, or the set's own, the model's
    resolution, every image."""
    own = entry(spec)["template"] if spec in names() else TEMPLATE
    wanted |= {"spec": spec, "shots": shots, "template": template or own}
    wanted |= {"resolution": row.backbone["image_size"], "skipped": []}
    return wanted == {key: facts.get(key, "all" if key == "subset" else None) for key in wanted}


def identity(run: Run, row: Row) -> dict[str, str]:
    """What a row is of, by content: weights, images, class texts, precision. Where two rows of a study name the same
    thing, it has the same value; an old row does not say all."""
    data, train = ({"subset": "all"} | dict(facts or {}) for facts in (row.data, row.train))
    tower = run.method == ZERO_SHOT and train.get("sha256")  # the backbone is a run itself
    found = {
        f"backbone {run.backbone}": row.model if tower else row.backbone["sha256"],
        f"model of {run.key}": row.model,
        "images of {spec} ({subset} classes, {part}, limit {limit})".format(**data): data["sha256"],
        "class texts of {spec} ({subset} classes)".format(**data): data.get("texts_sha256", ""),
        "precision": row.precision,
    }
    if run.method != ZERO_SHOT:
        where = "images of {spec} ({subset} classes, {part}, limit {limit}, {shots} shots, seed {seed})"
        found[where.format(**train)] = train["sha256"]
    return {what: value for what, value in found.items() if value}


def plain(facts: Any) -> Any:
    """As JSON has it: tuples are lists."""
    return json.loads(json.dumps(facts))
