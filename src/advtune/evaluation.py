"""Clean and robust accuracy, image by image."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtune import distributed, runs
from advtune.attacks import Attack, Defended, Transfer, check_measures
from advtune.attacks.gradients import Function
from advtune.checks import CHECKS, IMAGES, Sample, check, zero_share
from advtune.data import Split, Task, load_images, load_task
from advtune.data.images import DECODER, cache_dir
from advtune.defences import DEFENCES
from advtune.draws import seeded
from advtune.edits import TextEdits, check_textual, withstand_edits
from advtune.errors import UserError
from advtune.progress import progress
from advtune.results import Row, append, read
from advtune.rows import Setting, attack_facts, row, threat_model
from advtune.train import check_seed
from advtune.vlm import VLM
from advtune.withstand import Journal, Outcome, withstand

GRADIENT_SAMPLE = 128  # images whose input gradients are looked at for exact zeros


def evaluate(
    model: VLM | str,
    data: Task | str,
    attack: Attack | TextEdits | None = None,
    *,
    part: str = "test",
    limit: int | None = None,
    resolution: int | str | None = None,
    on_bad: str = "fail",
    batch_size: int = 64,
    seed: int = 0,
    checks: bool | None = None,
    source: VLM | str | None = None,
    defence: Function | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    show: bool = True,
) -> Row:
    """Clean accuracy and, with an attack, robust accuracy of a model on a data set; one result row.

    An image counts as robust when it is classified correctly both clean and attacked. Class names and template
    come from the data set, so a tuned model on another set is a cross-dataset evaluation. checks: look for signs
    that the number is too high (default: with AutoAttack). source: make the adversarial images on this other model
    (transfer). defence: a step on the images before the model, attacked through. out: folder whose results.jsonl
    gets the row. resume: keep a journal in the cache folder, and go on from it; only for models read from disk. With
    `TextEdits` the class texts are attacked, not the images: no source, defence or checks, and no journal.
    Raises UserError on bad input.
    """
    return evaluate_all(
        model, data, [attack], part=part, limit=limit, resolution=resolution, on_bad=on_bad, batch_size=batch_size,
        seed=seed, checks=checks, source=source, defence=defence, out=out, resume=resume, show=show,
    )[0]  # fmt: skip


def evaluate_curve(model: VLM | str, data: Task | str, attack: Attack, eps: Sequence[float], **how: Any) -> list[Row]:
    """Robust accuracy over eps: a row for each, ascending. What fell at a smaller eps is not attacked again: it lies
    in the larger ball, too. `how`: the keyword arguments of `evaluate`. Raises UserError on bad input."""
    if not eps or len(set(eps)) < len(eps):
        raise UserError("a curve needs different values of eps: eps=0,1/255,2/255")
    attacks: Any = [dataclasses.replace(attack, eps=value) for value in sorted(eps)]  # type: ignore[type-var]
    return evaluate_all(model, data, attacks, **how)


def evaluate_all(
    model: VLM | str, data: Task | str, attacks: Sequence[Attack | TextEdits | None], *, part: str = "test",
    limit: int | None = None, resolution: int | str | None = None, on_bad: str = "fail", batch_size: int = 64,
    seed: int = 0, checks: bool | None = None, source: VLM | str | None = None, defence: Function | None = None,
    out: str | Path | None = None, resume: bool = False, show: bool = True,
) -> list[Row]:  # fmt: skip
    """A row for each attack; the balls of later ones hold those of earlier ones. Arguments: see `evaluate`."""
    begin = time.monotonic()
    check_seed(seed)
    bpda = check_asked(attacks, batch_size, source, defence, checks)
    model = runs.load(model) if isinstance(model, str) else model
    source = runs.load(source, str(model.device), compile=bool(model.compiled)) if isinstance(source, str) else source
    training = any(each is not None and each.learned and not each.run for each in (model, source))
    if resume and (training or defence not in (None, *DEFENCES.values())):
        raise UserError("resume: a model in training, or a defence of your own, is not known again after a kill")
    task = task_for(model, data) if isinstance(data, str) else data
    side = model.side if resolution is None else resolution
    split = Split(part=part, limit=limit, resolution=side, on_bad=on_bad)
    show = show and distributed.leader()
    with distributed.in_turn():
        images = load_images(task, split, progress=show).on(model.device)
    distributed.agree([images.sha256, model.origin.sha256, batch_size, seed], "what is evaluated")
    textual = attacks[0] if isinstance(attacks[0], TextEdits) else None
    threat = textual.threat if textual else threat_model(source, defence, attacks[-1])
    s = Setting(model, task, split, images, batch_size, seed, show, threat, source, defence)
    if textual:
        return keep([text_row(s, textual, begin)], out)
    clean = predict(s) == images.y
    if attacks[0] is None:
        return keep([row(s, None, clean, None, None, [], time.monotonic() - begin)], out)
    zero = zero_gradients(s, bpda)
    journal = Journal(journal_path(s, attacks) if resume and distributed.leader() else None)
    looked = checks if checks is not None else attacks[0].name == "autoattack"
    made_on = None if source is None else s.function(source)
    other = other_model(s) if looked else None
    stands, rows = clean, []
    for number, attack in enumerate(attacks):
        assert attack is not None and not isinstance(attack, TextEdits)
        if made_on is not None:
            attack = Transfer(attack, made_on)
        label = f"eps {attack.eps * 255:g}/255 " if len(attacks) > 1 else ""
        outcome = withstand(s.f, images, stands, attack, batch_size, model.device, seed, show, journal, label)
        stands = outcome.stands
        findings = []
        if looked:
            with progress(f"{label}checks", len(CHECKS), "check", show) as advance, seeded(seed, model.device):
                findings = check(sample(s, attack, clean, outcome, zero, other), advance)
        made = row(s, attack, clean, outcome, zero, findings, time.monotonic() - begin, number > 0)
        rows += keep([made], out, journal.found)
        begin = time.monotonic()
    journal.close()
    return rows


def check_asked(
    attacks: Sequence[Any], batch_size: int, source: Any, defence: Function | None, checks: bool | None
) -> bool:
    """Whether an attack pretends that the step before the model does nothing. Raises UserError for what does not go
    together."""
    for attack in attacks:
        check_measures("" if attack is None else attack.name)
    check_textual(attacks, source=source, defence=defence, checks=checks)
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: at least 1 image is needed")
    if source is not None and attacks[0] is None:
        raise UserError("source: transfer needs an attack to make the images with")
    bpda = any(getattr(attack, "bpda", False) for attack in attacks)
    if bpda and defence is None:
        raise UserError("bpda=true stands in for a step before the model; name the step with --defence jpeg")
    return bpda


def text_row(s: Setting, attack: TextEdits, begin: float) -> Row:
    """The row of an attack on the class texts: every image goes through its tower once."""
    with torch.no_grad():
        encode, compare = s.model.towers(s.model.tokens(s.task.classes, s.task.template))
    clean, outcome = withstand_edits(s, attack, of_images(s, encode), compare)
    return row(s, attack, clean, outcome, None, [], time.monotonic() - begin)


def keep(rows: Sequence[Row], out: str | Path | None, again: bool = False) -> list[Row]:
    """The rows, added to the results of the folder `out` if one is given; `again`: unless an earlier sitting did."""
    path = Path(str(out)) / runs.RESULTS
    have = [timeless(each) for each in read(path)] if again and out is not None and path.exists() else []
    for each in rows if out is not None and distributed.leader() else ():
        if timeless(each) not in have:
            append(path, each)
    return list(rows)


def timeless(row: Row) -> Row:
    """A row without what two sittings of one evaluation differ in; as JSON has it."""
    stages = [{**stage, "seconds": 0} for stage in row.stages]
    return Row.from_json(dataclasses.replace(row, time="", seconds=0, stages=stages).to_json())


def task_for(
    model: VLM, data: str, classes: str | Mapping[str, str] | None = None, template: str | None = None,
    subset: str = "all",
) -> Task:  # fmt: skip
    """The task of a data spec and subset, with the words that the model was tuned with when it was tuned on this
    data, on whichever subset, and no others are given."""
    tuned = model.run.get("train")
    return load_task(data, classes=classes, template=template, subset=subset, tuned=tuned)


def predict(s: Setting) -> Tensor:
    """Predicted labels [N] of clean images."""
    return of_images(s, s.f, labels=True)


def of_images(s: Setting, f: Function, labels: bool = False) -> Tensor:
    """What f makes of all images, [N, K], or with `labels` its greatest's place [N]. Several processes take the batches
    in turn; behind a defence, which may be random from batch to batch, each takes all."""
    found, batches = dict[int, Tensor](), torch.arange(len(s.images.y)).split(s.size)
    step, first = (distributed.world(), distributed.rank()) if s.defence is None else (1, 0)

    def work() -> dict[int, Tensor]:
        with progress("clean", len(s.images.y), "image", s.show) as advance, torch.no_grad():
            for number in range(first, len(batches), step):
                made = f(s.images.batch(batches[number], s.model.device)[0])
                if not bool(made.isfinite().all()):
                    raise UserError(
                        "the model's logits are not finite; it diverged in tuning, or its weights are damaged"
                    )
                found[number] = (made.argmax(1) if labels else made).cpu()
                advance(sum(map(len, batches[number : number + step])))
        return found

    with seeded(s.seed, s.model.device):
        done = {number: each for share in distributed.attempt(work) for number, each in share.items()}
    return torch.cat([done[number] for number in range(len(batches))])


def zero_gradients(s: Setting, bpda: bool = False) -> dict[str, float]:
    """The share of input gradients that are exactly zero, over the first images: a high share means that the
    attack is blind, not that the model is robust."""
    n = min(GRADIENT_SAMPLE, len(s.images.y))
    total = 0.0
    with seeded(s.seed, s.model.device):
        for rows in torch.arange(n).split(s.size):
            x, y = s.images.batch(rows, s.model.device)
            total += zero_share(s.f, x, y, bpda) * len(rows)
    return {"share": total / n, "n": n}


def sample(
    s: Setting, attack: Attack, clean: Tensor, outcome: Outcome, zero: dict[str, float], other: VLM | None
) -> Sample:
    """What the checks look at: some of the images that are classified correctly, over the whole set."""
    rows = clean.nonzero().squeeze(1)
    rows = rows[torch.linspace(0, len(rows) - 1, min(IMAGES, len(rows))).round().long()] if len(rows) else rows
    x, y = s.images.batch(rows, s.model.device)
    blind = next((stage["fell"] for stage in outcome.stages[1:] if stage["attack"] == "square"), None)
    return Sample(
        s.f, x, y, outcome.stands[rows].to(y.device), attack, zero["share"],
        exact=in_fp32(s) if s.model.precision == "bf16" else None, fresh=s.function(s.model),
        source=None if other is None else s.function(other), fell_blind=blind, total=int(clean.sum()),
        size=s.size, zero_n=int(zero["n"]),
    )  # fmt: skip


def in_fp32(s: Setting) -> Function:
    """The scored function without bf16."""
    f = s.function(s.model)
    head = f.head if isinstance(f, Defended) else f

    def exact(x: Tensor) -> Tensor:
        s.model.precision = "fp32"
        try:
            return head(x)
        finally:
            s.model.precision = "bf16"

    return dataclasses.replace(f, head=exact) if isinstance(f, Defended) else exact


def other_model(s: Setting) -> VLM | None:
    """A model to transfer from: the one given, else the backbone before it was tuned, else the embedded one."""
    if s.source is not None:
        return None  # the row is a transfer already
    facts, folder = s.model.run.get("backbone"), s.model.run.get("folder", "")
    name = "mini" if s.model.origin.name != "mini" else ""
    if facts is not None:
        name = str(Path(folder) / facts["path"]) if facts["path"] and folder else facts["name"]
    try:
        other = runs.load(name, str(s.model.device), s.model.precision) if name else None
        if other is not None:
            other.tokens(s.task.classes, s.task.template)
        return other
    except UserError:  # a backbone that was tuned in memory, or is gone; or texts longer than it reads
        return None


def journal_path(s: Setting, attacks: Sequence[Any]) -> Path:
    """A file for what is done of this evaluation, named by all that decides its bits."""
    models = [s.model] if s.source is None else [s.model, s.source]
    facts = [
        [attack_facts(attack) for attack in attacks], s.threat, s.images.sha256, s.split.resolution, DECODER,
        [(model.origin.sha256, repr(model.clip.config), model.precision + model.compiled) for model in models],
        s.task.texts(), s.size, s.seed, runs.device_name(s.model.device), runs.versions(),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return cache_dir() / "evaluations" / f"{key}.jsonl"
