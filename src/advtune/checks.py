"""Is this evaluation to be believed? Findings are data in the result row and sentences in the report.

What each looks for is a way in which published robust accuracies came out too high: see Carlini et al.,
arXiv:1902.06705, and Croce et al., arXiv:2010.09670. A finding that raises no alarm proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from advtune.attacks import APGD, PGD, Attack, Noise, Square, Transfer
from advtune.attacks.ball import FAR
from advtune.attacks.gradients import Function, gradient
from advtune.losses import cross_entropy
from advtune.report.table import BLIND

IMAGES = 48  # looked at, of those classified correctly
LARGE = 64 / 255  # of every pixel: a change that nothing withstands
SMALL_BATCH = 7
WEAK, FEW, SAME = 0.1, 0.02, 0.03  # shares of the images: a stronger attack gains, leave to chance, rounding
CHANCE = 3  # images fewer than which are no finding


@dataclass(frozen=True)
class Finding:
    """value: what was measured, a share unless the text says otherwise; limit: what it is held against."""

    name: str
    alarm: bool
    value: float
    limit: float
    n: int
    text: str


@dataclass(frozen=True)
class Sample:
    """What the checks look at: f, correctly classified images x [B, 3, S, S], labels y [B], and which of them stood
    [B] under `attack`. `exact`: the same function in fp32, if it is not; `fresh`: made anew from the model;
    `source`: another model, to transfer from; `fell_blind`: of `total` images that were attacked, those that only the
    black-box stage of an ensemble broke (none: the checks look for themselves). size: images at a time. zero: the share
    of exactly-zero input gradients, of the first zero_n images."""

    f: Function
    x: Tensor
    y: Tensor
    stood: Tensor
    attack: Attack
    zero: float
    exact: Function | None = None
    fresh: Function | None = None
    source: Function | None = None
    fell_blind: int | None = None
    total: int = 0
    size: int = IMAGES
    zero_n: int = 0

    @property
    def n(self) -> int:
        return len(self.y)

    @property
    def way(self) -> dict[str, Any]:
        """How the attack gets its gradient: the checks' own attacks must not be blinder than it."""
        attack = getattr(self.attack, "attack", self.attack)  # what a transfer carries over
        return {"norm": attack.norm, "eot": getattr(attack, "eot", 1), "bpda": getattr(attack, "bpda", False)}

    @cached_property
    def under_pgd10(self) -> Tensor:
        """Which images [B] stand under PGD-10, which several checks ask."""
        return stands(self.f, self, self.pgd(10))

    @cached_property
    def under_pgd20(self) -> Tensor:
        """Which images [B] stand under PGD-20."""
        return stands(self.f, self, self.pgd(20))

    def pgd(self, steps: int, eps: float | None = None) -> PGD:
        """PGD that gets its gradient as the attack does."""
        return PGD(self.attack.eps if eps is None else eps, steps, **self.way)


def check(sample: Sample, advance: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """All findings, JSON-ready; what does not apply is left out. What cannot be computed is an alarm, not an error:
    the evaluation that it would judge is done."""
    if sample.n == 0 or sample.attack.eps == 0:
        return []
    found, random = [], False
    for each in CHECKS:
        if not (random and each in REPEATED):
            found.append(made(each, sample))
        random = random or (each is random_forward and found[-1].value > found[-1].limit)
        advance()
    return [asdict(finding) for finding in found if finding is not None]


def made(one: Callable[[Sample], Finding | None], sample: Sample) -> Any:
    """A finding; an alarm where it could not be computed, for want of memory say."""
    try:
        return one(sample)
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        name = one.__name__.removesuffix("_forward").replace("_", "-")
        return Finding(name, True, 0.0, 0.0, sample.n, f"the check could not be made: {reason}")


def many(count: int, n: int, share: float) -> bool:
    """Whether so many of n images are more than a share, and than chance."""
    return count >= CHANCE and count > share * n


def scores(f: Function, sample: Sample) -> Tensor:
    """Logits [B, C] of the sample."""
    with torch.no_grad():
        return torch.cat([f(x) for x in sample.x.split(sample.size)])


def stands(f: Function, sample: Sample, attack: Attack, size: int | None = None) -> Tensor:
    """Which images [B] of the sample stand under an attack, in batches of `size`."""
    size = size or sample.size
    parts = []
    for x, y in zip(sample.x.split(size), sample.y.split(size), strict=True):
        x_adv = attack(f, x, y)
        with torch.no_grad():
            parts.append(f(x_adv).argmax(1) == y)
    return torch.cat(parts)


def gap(sample: Sample) -> Finding | None:
    """PGD beside AutoAttack; for another attack, a targeted APGD on what it left standing."""
    if isinstance(sample.attack, Transfer):
        return None
    if sample.attack.name == "autoattack":
        count = int((sample.under_pgd20 & ~sample.stood).sum())
        gained = count / sample.n
        text = f"PGD-20 leaves {100 * gained:.1f} % of the sample standing that AutoAttack breaks"
    else:
        strong = APGD(sample.attack.eps, 30, loss="dlr-targeted", targets=3, **sample.way)
        count = broken(sample, strong)
        gained = count / sample.n
        text = f"targeted APGD breaks {100 * gained:.1f} % of the sample that {sample.attack.name} left standing"
    weak = "PGD" if sample.attack.name == "autoattack" else sample.attack.name
    alarm = many(count, sample.n, WEAK)
    hint = f"; {weak} numbers of this model are too high" if alarm else ""
    return Finding("gap", alarm, gained, WEAK, sample.n, text + hint)


def black_box(sample: Sample) -> Finding | None:
    """Square breaks what attacks with gradients did not."""
    if sample.attack.name == "square" or isinstance(sample.attack, Transfer):
        return None
    if sample.fell_blind is not None:
        count, n = sample.fell_blind, sample.total
    else:
        count, n = broken(sample, Square(sample.attack.eps, 200, norm=sample.attack.norm)), sample.n
    alarm = many(count, n, FEW)
    text = f"Square, without gradients, breaks {count} of {n} images that withstood gradients"
    hint = "; the gradients may be masked" if alarm else ""
    return Finding("black-box", alarm, count / n, FEW, n, text + hint)


def transfer(sample: Sample) -> Finding | None:
    """Adversarial images of another model break what the white-box attack did not."""
    if sample.source is None or isinstance(sample.attack, Transfer):
        return None
    count = broken(sample, Transfer(sample.pgd(20), sample.source))
    alarm = many(count, sample.n, FEW)
    text = f"images made on another model break {count} of {sample.n} that withstood the attack on this one"
    hint = "; the gradients may be masked" if alarm else ""
    return Finding("transfer", alarm, count / sample.n, FEW, sample.n, text + hint)


def zero_gradient(sample: Sample) -> Finding:
    """Input gradients that are exactly zero."""
    share, limit = sample.zero, BLIND
    hint = "; the attack may have seen nothing" if share > limit else ""
    text = f"{100 * share:.1f} % of the input gradients are exactly zero{hint}"
    return Finding("zero-gradient", share > limit, share, limit, sample.zero_n or sample.n, text)


def batch_size(sample: Sample) -> Finding:
    """The same attack, from the same starts, in small batches."""
    large, small = sample.under_pgd10, stands(sample.f, sample, sample.pgd(10), SMALL_BATCH)
    gained = float((large & ~small).sum()) / sample.n
    count = int((large != small).sum())
    changed, alarm = count / sample.n, many(count, sample.n, SAME)
    hint = "; robust accuracy depends on the batch" if alarm else ""
    text = f"PGD-10 in batches of {SMALL_BATCH} changes {100 * changed:.1f} % of the answers, {100 * gained:.1f} % fall"
    return Finding("batch-size", alarm, changed, SAME, sample.n, text + hint)


def precision(sample: Sample) -> Finding | None:
    """bf16 beside fp32: low precision can weaken the attack."""
    if sample.exact is None:
        return None
    counts = [int(stood.sum()) for stood in (sample.under_pgd10, stands(sample.exact, sample, sample.pgd(10)))]
    low, high = (count / sample.n for count in counts)
    alarm = many(counts[0] - counts[1], sample.n, SAME)
    hint = "; bf16 hides what fp32 finds: use --precision fp32" if alarm else ""
    text = f"PGD-10 leaves {100 * low:.1f} % standing in bf16 and {100 * high:.1f} % in fp32{hint}"
    return Finding("precision", alarm, low - high, SAME, sample.n, text)


def large_eps(sample: Sample) -> Finding:
    """Nothing withstands a change that may paint any picture."""
    norm = sample.attack.norm
    eps = LARGE if norm == "linf" else min(LARGE * sample.x[0].numel() ** 0.5, FAR - 1)
    left = float(stands(sample.f, sample, sample.pgd(20, eps)).sum()) / sample.n
    radius = "64/255" if norm == "linf" else f"{eps:.3g} in l2"
    hint = "; a working attack leaves none: it is weak or blind" if left > 0 else ""
    return Finding("large-eps", left > 0, left, 0.0, sample.n, f"{100 * left:.1f} % stand at eps {radius}{hint}")


def noise(sample: Sample) -> Finding:
    """Random points of the ball are as strong as PGD."""
    fell = sample.n - int(stands(sample.f, sample, Noise(sample.attack.eps, norm=sample.attack.norm)).sum())
    by_pgd = sample.n - int(sample.under_pgd20.sum())
    alarm = by_pgd < sample.n and (fell > by_pgd or fell == by_pgd >= CHANCE)
    hint = "; the gradients lead nowhere" if alarm else ""
    text = f"ten draws of noise break {fell} images of {sample.n}, PGD-20 {by_pgd}{hint}"
    return Finding("noise", alarm, fell / sample.n, by_pgd / sample.n, sample.n, text)


def outputs(sample: Sample) -> Finding:
    """Probabilities or bare cosines where logits should be: the attack's softmax is then nearly flat."""
    z = scores(sample.f, sample)
    widest = float(z.abs().max())
    sums = bool(((z.sum(1) - 1).abs() < 1e-3).all()) and float(z.min()) >= -1e-6
    alarm = sums or widest <= 1 + 1e-4
    what = "probabilities" if sums else "cosines without a logit scale"
    hint = f": they look like {what}; attack the logits" if alarm else ""
    return Finding("outputs", alarm, widest, 1.0, sample.n, f"outputs reach {widest:.3g} in size{hint}")


def random_forward(sample: Sample) -> Finding:
    """Two forwards of the same images differ."""
    first, second = scores(sample.f, sample), scores(sample.f, sample)
    far = float((first - second).abs().max() / (first.abs().max() + 1e-12))
    alarm = far > 1e-4 and sample.way["eot"] == 1
    hint = "; the model is random: attack it with autoattack -a version=rand, or -a eot=20" if alarm else ""
    return Finding("random", alarm, far, 1e-4, sample.n, f"two forwards differ by {far:.2g} of the logits{hint}")


def stale(sample: Sample) -> Finding | None:
    """The function that was attacked is no longer the model's, or no longer answers as before the attack."""
    if sample.fresh is None:
        return None
    old, new = scores(sample.f, sample), scores(sample.fresh, sample)
    far = float((old - new).abs().max() / (old.abs().max() + 1e-12))
    changed = int((old.argmax(1) != sample.y).sum())  # the sample was classified correctly
    alarm = far > 1e-2 or many(changed, sample.n, SAME)
    hint = "; its prompts or weights changed after the attack's function was made" if alarm else ""
    text = f"the attacked function and the model differ by {far:.2g} of the logits, {changed} answers changed{hint}"
    return Finding("stale", alarm, far, 1e-2, sample.n, text)


def broken(sample: Sample, attack: Attack) -> int:
    """How many of the images that stood fall to another attack."""
    if not bool(sample.stood.any()):
        return 0
    left = replace(sample, x=sample.x[sample.stood], y=sample.y[sample.stood])
    return int((~stands(sample.f, left, attack)).sum())


def zero_share(f: Function, x: Tensor, y: Tensor, bpda: bool = False) -> float:
    """The share of input gradients of the cross-entropy that are exactly zero."""
    return float((gradient(f, x, y, cross_entropy, bpda=bpda)[0] == 0).float().mean())


# random_forward first: REPEATED asks the same twice, which says nothing of a model that answers at random
CHECKS: tuple[Callable[[Sample], Finding | None], ...] = (
    random_forward, stale, outputs, zero_gradient, batch_size, precision, noise, large_eps, gap, black_box, transfer,
)  # fmt: skip
REPEATED = (stale, batch_size, precision)
