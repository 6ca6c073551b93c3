"""Is this evaluation to be believed? Findings are data in the result row and sentences in the report.

What each looks for is a way in which published robust accuracies came out too high: see Carlini et al.,
arXiv:1902.06705, and Croce et al., arXiv:2010.09670. A finding that raises no alarm proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from advtune.attacks import APGD, PGD, Attack, Noise, Square, Transfer
from advtune.attacks.gradients import Function, gradient
from advtune.losses import cross_entropy

IMAGES = 48  # looked at, of those classified correctly
LARGE = {"linf": 64 / 255, "l2": 10.0}  # a change that nothing withstands
SMALL_BATCH = 7
WEAK, FEW, SAME = 0.05, 0.02, 0.03  # shares of the images: a stronger attack gains, leave to chance, rounding


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
    `source`: another model, to transfer from; `fell_blind`: of `total` images of the set, those that only the
    black-box stage of an ensemble broke (none: the checks look for themselves)."""

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

    @property
    def n(self) -> int:
        return len(self.y)

    @property
    def way(self) -> dict[str, Any]:
        """How the attack gets its gradient: the checks' own attacks must not be blinder than it."""
        attack = getattr(self.attack, "attack", self.attack)  # what a transfer carries over
        return {"norm": attack.norm, "eot": getattr(attack, "eot", 1), "bpda": getattr(attack, "bpda", False)}

    def pgd(self, steps: int, eps: float | None = None) -> PGD:
        return PGD(self.attack.eps if eps is None else eps, steps, **self.way)


def check(sample: Sample) -> list[dict[str, Any]]:
    """All findings, JSON-ready; what does not apply is left out."""
    if sample.n == 0 or sample.attack.eps == 0:
        return []
    first = random_forward(sample)
    rest = [each(sample) for each in CHECKS if first.value <= first.limit or each not in REPEATED]
    return [asdict(finding) for finding in [first, *rest] if finding is not None]


def stands(f: Function, sample: Sample, attack: Attack, size: int | None = None) -> Tensor:
    """Which images [B] of the sample stand under an attack, in batches of `size`."""
    size = size or sample.n
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
        gained = float((stands(sample.f, sample, sample.pgd(20)) & ~sample.stood).sum()) / sample.n
        text = f"PGD-20 leaves {100 * gained:.1f} % of the sample standing that AutoAttack breaks"
    else:
        strong = APGD(sample.attack.eps, 30, loss="dlr-targeted", targets=3, **sample.way)
        rows = sample.stood.nonzero().squeeze(1)
        left = standing_part(sample, rows, strong)
        gained = (len(rows) - left) / sample.n
        text = f"targeted APGD breaks {100 * gained:.1f} % of the sample that {sample.attack.name} left standing"
    weak = "PGD" if sample.attack.name == "autoattack" else sample.attack.name
    hint = f"; {weak} numbers of this model are too high" if gained > WEAK else ""
    return Finding("gap", gained > WEAK, gained, WEAK, sample.n, text + hint)


def black_box(sample: Sample) -> Finding | None:
    """Square breaks what attacks with gradients did not."""
    if sample.attack.name == "square" or isinstance(sample.attack, Transfer):
        return None
    if sample.fell_blind is not None:
        gained, n = sample.fell_blind / max(1, sample.total), sample.total
    else:
        rows = sample.stood.nonzero().squeeze(1)
        square = Square(sample.attack.eps, 200, norm=sample.attack.norm)
        gained, n = (len(rows) - standing_part(sample, rows, square)) / sample.n, sample.n
    text = f"Square, without gradients, breaks {100 * gained:.1f} % that withstood gradients"
    hint = "; the gradients may be masked" if gained > FEW else ""
    return Finding("black-box", gained > FEW, gained, FEW, n, text + hint)


def transfer(sample: Sample) -> Finding | None:
    """Adversarial images of another model break what the white-box attack did not."""
    if sample.source is None or isinstance(sample.attack, Transfer):
        return None
    rows = sample.stood.nonzero().squeeze(1)
    gained = (len(rows) - standing_part(sample, rows, Transfer(sample.pgd(20), sample.source))) / sample.n
    text = f"images made on another model break {100 * gained:.1f} % that withstood the attack on this one"
    hint = "; the gradients may be masked" if gained > FEW else ""
    return Finding("transfer", gained > FEW, gained, FEW, sample.n, text + hint)


def zero_gradient(sample: Sample) -> Finding:
    """Input gradients that are exactly zero."""
    share, limit = sample.zero, 0.1
    hint = "; the attack may have seen nothing" if share > limit else ""
    text = f"{100 * share:.1f} % of the input gradients are exactly zero{hint}"
    return Finding("zero-gradient", share > limit, share, limit, sample.n, text)


def batch_size(sample: Sample) -> Finding:
    """The same attack, from the same starts, in small batches."""
    attack = sample.pgd(10)
    large, small = stands(sample.f, sample, attack), stands(sample.f, sample, attack, SMALL_BATCH)
    gained = float((large & ~small).sum()) / sample.n
    changed = float((large != small).sum()) / sample.n
    alarm = changed > SAME
    hint = "; robust accuracy depends on the batch" if alarm else ""
    text = f"PGD-10 in batches of {SMALL_BATCH} changes {100 * changed:.1f} % of the answers, {100 * gained:.1f} % fall"
    return Finding("batch-size", alarm, changed, SAME, sample.n, text + hint)


def precision(sample: Sample) -> Finding | None:
    """bf16 beside fp32: low precision can weaken the attack."""
    if sample.exact is None:
        return None
    attack = sample.pgd(10)
    low, high = (float(stands(f, sample, attack).sum()) / sample.n for f in (sample.f, sample.exact))
    alarm = low - high > SAME
    hint = "; bf16 hides what fp32 finds: use --precision fp32" if alarm else ""
    text = f"PGD-10 leaves {100 * low:.1f} % standing in bf16 and {100 * high:.1f} % in fp32{hint}"
    return Finding("precision", alarm, low - high, SAME, sample.n, text)


def large_eps(sample: Sample) -> Finding:
    """Nothing withstands a change that may paint any picture."""
    norm = sample.attack.norm
    left = float(stands(sample.f, sample, sample.pgd(20, LARGE[norm])).sum()) / sample.n
    radius = "64/255" if norm == "linf" else f"{LARGE[norm]:g} in l2"
    hint = "; a working attack leaves none: it is weak or blind" if left > 0 else ""
    return Finding("large-eps", left > 0, left, 0.0, sample.n, f"{100 * left:.1f} % stand at eps {radius}{hint}")


def noise(sample: Sample) -> Finding:
    """Random points of the ball are as strong as PGD."""
    fell = sample.n - int(stands(sample.f, sample, Noise(sample.attack.eps, norm=sample.attack.norm)).sum())
    by_pgd = sample.n - int(stands(sample.f, sample, sample.pgd(20)).sum())
    alarm = by_pgd < sample.n and (fell > by_pgd or fell == by_pgd >= 3)
    hint = "; the gradients lead nowhere" if alarm else ""
    text = f"ten draws of noise break {fell} images of {sample.n}, PGD-20 {by_pgd}{hint}"
    return Finding("noise", alarm, fell / sample.n, by_pgd / sample.n, sample.n, text)


def outputs(sample: Sample) -> Finding:
    """Probabilities or bare cosines where logits should be: the attack's softmax is then nearly flat."""
    with torch.no_grad():
        z = sample.f(sample.x)
    widest = float(z.abs().max())
    sums = bool(((z.sum(1) - 1).abs() < 1e-3).all()) and float(z.min()) >= -1e-6
    alarm = sums or widest <= 1 + 1e-4
    what = "probabilities" if sums else "cosines without a logit scale"
    hint = f": they look like {what}; attack the logits" if alarm else ""
    return Finding("outputs", alarm, widest, 1.0, sample.n, f"outputs reach {widest:.3g} in size{hint}")


def random_forward(sample: Sample) -> Finding:
    """Two forwards of the same images differ."""
    with torch.no_grad():
        first, second = sample.f(sample.x), sample.f(sample.x)
    far = float((first - second).abs().max() / (first.abs().max() + 1e-12))
    averaged = getattr(sample.attack, "version", "") == "rand" or sample.way["eot"] > 1
    alarm = far > 1e-4 and not averaged
    hint = "; the model is random: attack it with autoattack -a version=rand, or -a eot=20" if alarm else ""
    return Finding("random", alarm, far, 1e-4, sample.n, f"two forwards differ by {far:.2g} of the logits{hint}")


def stale(sample: Sample) -> Finding | None:
    """The function that was attacked is no longer the model's, in its prompts or weights."""
    if sample.fresh is None:
        return None
    with torch.no_grad():
        old, new = sample.f(sample.x), sample.fresh(sample.x)
    far = float((old - new).abs().max() / (old.abs().max() + 1e-12))
    hint = "; its prompts or weights changed after the attack's function was made" if far > 1e-2 else ""
    text = f"the attacked function and the model differ by {far:.2g} of the logits{hint}"
    return Finding("stale", far > 1e-2, far, 1e-2, sample.n, text)


def standing_part(sample: Sample, rows: Tensor, attack: Attack) -> int:
    """How many of the sample's images `rows` stand under an attack."""
    if len(rows) == 0:
        return 0
    return int(stands(sample.f, replace(sample, x=sample.x[rows], y=sample.y[rows]), attack).sum())


def zero_share(f: Function, x: Tensor, y: Tensor, bpda: bool = False) -> float:
    """The share of input gradients of the cross-entropy that are exactly zero."""
    return float((gradient(f, x, y, cross_entropy, bpda=bpda)[0] == 0).float().mean())


# after random_forward; REPEATED asks the same twice, which says nothing of a model that answers at random
CHECKS: tuple[Callable[[Sample], Finding | None], ...] = (
    stale, outputs, zero_gradient, batch_size, precision, noise, large_eps, gap, black_box, transfer,
)  # fmt: skip
REPEATED = (stale, batch_size, precision)
