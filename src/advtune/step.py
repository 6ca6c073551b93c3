"""One step of the loop: this process's share of a batch, in portions as small as memory asks for, and the gradient of
the whole batch."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advtune import distributed, draws
from advtune.attacks import Free, Replay
from advtune.augment import crop_and_flip
from advtune.data import Images
from advtune.errors import UserError
from advtune.progress import progress
from advtune.vlm import VLM, Batch

if TYPE_CHECKING:
    from advtune.train import Plan

KEEP = 2**31  # bytes of prepared answers that are kept
Values = dict[str, float]


class NoRoom(UserError):
    """Memory does not hold a single image, or a batch that must not be cut."""


@dataclass
class Portions:
    """How many images go through the models at once, none for all of this process's; halved where memory runs out.
    uncut: why the method's batches must go through whole, if they must. notes: what a reader of the run should know."""

    size: int | None = None
    uncut: str = ""
    notes: list[str] = field(default_factory=list)

    def of(self, n: int) -> list[slice]:
        """n images in portions; none for none."""
        size = self.size or max(1, n)
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    def halve(self, n: int) -> None:
        """Go on with half as many at once, and say so. Raises UserError when that is less than one."""
        before = min(self.size or n, n)
        if self.uncut:
            raise NoRoom(f"out of memory with {n} images, and {self.uncut}: lower batch_size (-o batch_size=...)")
        if before <= 1:
            raise NoRoom("out of memory with a single image; try --checkpoint-activations, or another device")
        self.size = before // 2
        self.notes.append(f"out of memory with {before} images at once: {self.size} from then on, the same gradient")
        warnings.warn(self.notes[-1], stacklevel=2)


@contextmanager
def recomputing(models: Iterable[VLM], on: bool) -> Iterator[None]:
    """A block in which models keep few activations and compute the others twice, if `on`; then as before."""
    before = [(model, model.recompute) for model in models]
    for model, was in before:
        model.recompute = on or was
    try:
        yield
    finally:
        for model, was in before:
            model.recompute = was


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch says that memory ran out."""
    signs = ("not enough memory", "can't allocate memory", "CUDA out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def in_portions(portions: Portions, n: int, device: torch.device, through: Callable[[list[slice]], None]) -> None:
    """through(n images in portions); where memory runs out, from the beginning in smaller ones, with the same random
    numbers. Raises UserError when one image is too many."""
    state = draws.state(device)
    while True:
        try:
            return through(portions.of(n))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        gc.collect()  # only here: the error held the frames that held the tensors
        if device.type == "cuda":
            torch.cuda.empty_cache()
        portions.halve(n)
        draws.back_to(state, device)


def own_share(
    plan: Plan, images: Images, rows: Tensor, tokens: Mapping[str, Tensor], kept: Mapping[str, Tensor], cycle: int
) -> Batch:
    """This process's share of the batch of the images `rows`, augmented as it is in the whole batch."""
    own = distributed.share(len(rows))
    with draws.portion(len(rows), own):
        x, y = images.batch(rows[own], plan.backbone.device)
        if plan.recipe.augment and len(y):
            x = crop_and_flip(x)
    here = rows[own].to(plan.backbone.device)
    return Batch(x, y, tokens, cycle, {name: value[here] for name, value in kept.items()}, own.start, len(rows))


def update(
    plan: Plan, models: Mapping[str, VLM], batch: Batch, optimiser: torch.optim.Optimizer, rate: float, step: int,
    d: Tensor, portions: Portions | None = None,
) -> Values:  # fmt: skip
    """One optimiser step; the loss terms as numbers. batch: this process's share. d [B, 3, S, S]: the perturbation that
    free replay keeps, of the whole batch, moved in place. Raises UserError naming the term that is not finite."""
    values = gradient(plan, models, batch, optimiser, d, portions or Portions())
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{plan.name}: the loss term {name!r} is {value} at step {step}; lower lr (now {rate:g})")
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    return values


def gradient(
    plan: Plan, models: Mapping[str, VLM], batch: Batch, optimiser: torch.optim.Optimizer, d: Tensor,
    portions: Portions,
) -> Values:  # fmt: skip
    """Leaves the whole batch's gradient at the parameters and moves d; the loss terms of the whole batch.

    The terms of a portion, means over its images, are weighted by its share. What a process cannot do (a UserError)
    ends all. A gradient that no process has stays away: the optimiser leaves such a parameter alone.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]

    def work() -> tuple[Values, list[bool]]:
        return own(plan, models, batch, optimiser, d, portions, means), [p.grad is not None for p in parameters]

    means = means_of_all(plan, models, batch, portions) if distributed.world() > 1 else {}
    said = distributed.attempt(work)
    if distributed.world() == 1:
        return said[0][0]
    learning = [p for p, *has in zip(parameters, *(has for _, has in said), strict=True) if any(has)]
    for p in learning:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    distributed.total([p.grad for p in learning])
    if isinstance(plan.attack, Free):  # everyone has moved the rows of its share
        d[: batch.begin], d[batch.begin + len(batch.y) :] = 0, 0
        distributed.total([d])
    return {name: sum(values.get(name, 0.0) for values, _ in said) for name in said[0][0]}


def own(
    plan: Plan, models: Mapping[str, VLM], batch: Batch, optimiser: torch.optim.Optimizer, d: Tensor,
    portions: Portions, means: Mapping[str, Tensor],
) -> Values:  # fmt: skip
    """This process's part of `gradient`; nothing, where a batch has fewer images than there are processes."""
    state, names, heights, replays = draws.state(batch.x.device), list[str](), list[Tensor](), list[Replay]()

    def through(parts: list[slice]) -> None:
        optimiser.zero_grad(set_to_none=True)
        heights.clear()
        replays.clear()
        known = means if means or len(parts) < 2 else means_of(plan, models, batch, parts)
        for part in parts:
            draws.back_to(state, batch.x.device)
            some = cut(batch, part, known)
            attack = Replay(plan.attack, d[batch.begin :][part]) if isinstance(plan.attack, Free) else plan.attack
            with draws.portion(some.size, slice(some.begin, some.begin + len(some.y))):
                terms = plan.method.loss(models, some, attack)
            each = torch.stack(list(terms.values()))
            each = each if some.share == 1 else each * some.share
            each.sum().backward()
            heights.append(each.detach())
            names[:] = terms
            if isinstance(attack, Replay):
                replays.append(attack)

    in_portions(portions, len(batch.y), batch.x.device, through)
    for replay in replays:
        replay.climb()
    if not heights:
        return {}
    summed = torch.stack(heights).sum(0) if len(heights) > 1 else heights[0]
    return dict(zip(names, summed.tolist(), strict=True))  # asked for once, with all else of the step under way


def cut(batch: Batch, part: slice, means: Mapping[str, Tensor]) -> Batch:
    """The images `part` of this process's share."""
    if not means and part == slice(0, len(batch.y)):
        return batch
    kept = {name: value[part] for name, value in batch.kept.items()}
    return replace(
        batch, x=batch.x[part], y=batch.y[part], kept=kept, begin=batch.begin + part.start, whole=batch.size,
        means=means,
    )  # fmt: skip


def means_of(plan: Plan, models: Mapping[str, VLM], batch: Batch, parts: list[slice]) -> dict[str, Tensor]:
    """This process's part of what the method asks of the whole batch before its loss is known for a portion."""
    found = dict[str, Tensor]()
    for part in parts if hasattr(plan.method, "means") else ():
        some = cut(batch, part, {})
        with torch.no_grad():
            for name, value in plan.method.means(models, some, plan.attack).items():  # type: ignore[attr-defined]
                found[name] = found.get(name, 0) + value * some.share
    return found


def means_of_all(plan: Plan, models: Mapping[str, VLM], batch: Batch, portions: Portions) -> dict[str, Tensor]:
    """What the method asks of the whole batch, summed over the processes."""
    if not hasattr(plan.method, "means"):
        return {}
    found = dict[str, float]()

    def through(parts: list[slice]) -> None:
        found.update({name: float(value) for name, value in means_of(plan, models, batch, parts).items()})

    def work() -> dict[str, float]:
        in_portions(portions, len(batch.y), batch.x.device, through)
        return found

    said = distributed.attempt(work)
    return {name: batch.x.new_tensor(sum(each.get(name, 0.0) for each in said)) for name in said[0]}


def prepare(
    plan: Plan, models: Mapping[str, VLM], tokens: Mapping[str, Tensor], images: Images, show: bool,
    portions: Portions | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What the method computes once for every training image, [N, ...] by name; the same bits in every sitting.

    Nothing when images are augmented, so that they differ from epoch to epoch, or when it would fill KEEP bytes. Each
    process computes its share of every batch, and all get all.
    """
    n, found = len(images.y), dict[str, Tensor]()
    if not hasattr(plan.method, "prepare") or plan.recipe.augment:
        return {}
    device = plan.backbone.device
    with progress(f"{plan.name}: preparing", n, "image", show) as advance, draws.seeded(plan.seed, device):
        for rows in torch.arange(n).split(plan.recipe.batch_size):
            made = prepared(plan, models, tokens, images, rows, portions or Portions())
            if not 0 < n * sum(value[0].nbytes for value in made.values()) <= KEEP:
                return {}
            for name, value in made.items():
                if name not in found:
                    found[name] = value.new_zeros(n, *value.shape[1:])
                found[name][rows[distributed.share(len(rows))]] = value
            advance(len(rows))
    distributed.total(list(found.values()))
    return found


def prepared(
    plan: Plan, models: Mapping[str, VLM], tokens: Mapping[str, Tensor], images: Images, rows: Tensor,
    portions: Portions,
) -> dict[str, Tensor]:  # fmt: skip
    """`prepare` for this process's share of a batch, the images `rows`; for one of them where the share is empty, which
    draws the numbers that the others draw."""
    device, share, found = plan.backbone.device, distributed.share(len(rows)), dict[str, list[Tensor]]()
    begin, end = (share.start, share.stop) if share.start < share.stop else (0, 1)

    def through(parts: list[slice]) -> None:
        found.clear()
        state = draws.state(device)
        for part in parts:
            draws.back_to(state, device)
            here = slice(begin + part.start, begin + part.stop)
            x, y = images.batch(rows[here], device)
            with draws.portion(len(rows), here):
                made = plan.method.prepare(models, Batch(x, y, tokens), plan.attack)  # type: ignore[attr-defined]
            for name, value in made.items():
                found.setdefault(name, []).append(value.detach())

    in_portions(portions, end - begin, device, through)
    return {name: torch.cat(values) for name, values in found.items()}
