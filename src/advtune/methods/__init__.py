"""Methods, one file each, and the dict that names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from advtune.attacks import PGD, TRAINING, Attack, Free
from advtune.data import Task
from advtune.errors import UserError, near
from advtune.methods.advmaple import AdvMaPLe
from advtune.methods.advpt import AdvPT
from advtune.methods.advvlp import AdvVLP
from advtune.methods.advvp import AdvVP
from advtune.methods.agft import AGFT
from advtune.methods.apd import APD
from advtune.methods.apt import APT
from advtune.methods.capt import CAPT
from advtune.methods.coop import CoOp
from advtune.methods.fap import FAP
from advtune.methods.fare import FARE
from advtune.methods.guided import Guided
from advtune.methods.ivlp import IVLP
from advtune.methods.maple import MaPLe
from advtune.methods.pmg_aft import PMGAFT
from advtune.methods.tecoa import TeCoA
from advtune.methods.tga_zsr import TGAZSR
from advtune.methods.vpt import VPT
from advtune.methods.zero_shot import ZeroShot
from advtune.options import fill, fill_many, pairs
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


class Method(Protocol):
    """A frozen dataclass whose fields are the hyper-parameters, with its paper's recipe and training attack.

    Clean training has an attack of eps 0. What only some have: `presets`, named sets of values, the recipe's
    too, chosen by `-o preset=NAME`; `cycles`, how often the schedule is gone through (1; 2 with two phases);
    `prepare(models, batch, attack) -> {name: Tensor [B, ...]}`, what never changes in a run: see `Batch.kept`.

    A batch may go through in portions, whose terms, means over a portion, are weighted by its share: see `Batch`. A
    loss that needs more of the batch than its images one by one has `means(models, batch, attack) -> {name: Tensor
    []}`, means over a portion, of which it gets those over the batch as `batch.means`; or `uncut`, why it cannot.
    """

    paper: ClassVar[str]
    trains: ClassVar[str]
    recipe: ClassVar[Recipe]
    attack: ClassVar[PGD]

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        """The models by name; `student` is the result, and what requires a gradient is what learns."""
        ...

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        """Weighted terms; their sum is minimised. Reads like the paper's equation."""
        ...


METHODS: dict[str, type[Any]] = {
    "zero-shot": ZeroShot,
    "tecoa": TeCoA,
    "fare": FARE,
    "pmg-aft": PMGAFT,
    "agft": AGFT,
    "tga-zsr": TGAZSR,
    "coop": CoOp,
    "vpt": VPT,
    "ivlp": IVLP,
    "maple": MaPLe,
    "apt": APT,
    "advpt": AdvPT,
    "advvp": AdvVP,
    "advvlp": AdvVLP,
    "advmaple": AdvMaPLe,
    "fap": FAP,
    "capt": CAPT,
    "apd": APD,
    "guided": Guided,
}


def configure(
    name: str, options: Sequence[str] | Mapping[str, Any] = (), attack: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[Method, Recipe, Attack]:
    """A method with its recipe and training attack, from `key=value` options (or a mapping).

    Options fill the method's fields first, then the recipe's. A preset is applied before the other options. The
    attack's `name` chooses among TRAINING (default: the paper's PGD). Raises UserError for an unknown method, key or
    value, and for what does not go together.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; {near(name, METHODS)}")
    what, method = f"method {name}", METHODS[name]()
    recipe = method.recipe
    options = [options] if isinstance(options, str) or not isinstance(options, Iterable) else options
    if isinstance(options, Mapping):
        given: Any = dict(options)
        preset = given.pop("preset", None)
    else:
        named = [p for p in options if isinstance(p, str) and p.partition("=")[0].strip() == "preset"]
        given = [p for p in options if p not in named]
        preset = named[-1].partition("=")[2].strip() if named else None
    if preset is not None:
        presets: Mapping[str, Mapping[str, Any]] = getattr(method, "presets", {})
        if not isinstance(preset, str) or preset not in presets:
            raise UserError(f"{what} has no preset {preset!r}; {near(preset, presets)}")
        method, recipe = fill_many([method, recipe], presets[preset], what)
    method, recipe = fill_many([method, recipe], given, what)
    if attack and not method.attack.eps:
        raise UserError(f"{what} tunes on clean images; it takes no training attack (-a)")
    chosen = training_attack(name, method, attack)
    check_together(name, method, recipe, chosen)
    return method, recipe, chosen


def training_attack(name: str, method: Method, given: Sequence[str] | Mapping[str, Any]) -> Attack:
    """The paper's PGD with the given fields, or the attack that `name` among them chooses, at the paper's eps."""
    what = f"training attack of {name}"
    fields = pairs(given, what)
    kind = fields.pop("name", "pgd")
    if not isinstance(kind, str) or kind not in TRAINING:
        raise UserError(f"{what}: unknown name {kind!r}; {near(kind, TRAINING)}")
    start = method.attack if kind == "pgd" else TRAINING[kind](eps=method.attack.eps)
    filled: Attack = fill(start, fields, what)
    return filled


def check_together(name: str, method: Method, recipe: Recipe, attack: Attack) -> None:
    """Raises UserError for a training attack that a method or its recipe leaves no room for, and for a method that
    needs another recipe."""
    if getattr(method, "guide", "") == "average" and not recipe.average:
        raise UserError(f"method {name}: guide=average needs the weights' average: add -o average=0.99")
    adversary = getattr(method, "adversary", "ce")
    starts = getattr(attack, "random_start", True) and getattr(attack, "noise", True)
    if adversary in ("kl", "features") and not starts:
        raise UserError(f"method {name}: adversary={adversary} has no slope at x; leave the attack its random start")
    if isinstance(attack, PGD):
        return
    attacker = getattr(method, "attacker", "")
    if attacker == "perturbed":
        raise UserError(f"method {name}: attacker=perturbed takes steps of its own; tune with -a name=pgd")
    if not isinstance(attack, Free):
        return
    reason = ""
    if name == "advpt":
        reason = "its adversarial images are made once, before tuning"
    elif attacker == "constant":
        reason = f"attacker={attacker} attacks another function than the one that is tuned"
    elif adversary != "ce":
        reason = f"adversary={adversary} raises another loss than the one that is trained"
    elif getattr(method, "cycles", 1) > 1:
        reason = "it has a phase without adversarial images"
    if reason:
        raise UserError(f"method {name}: {reason}: there is nothing to replay; tune with -a name=pgd")
    if recipe.epochs < attack.replay:
        raise UserError(
            f"method {name}: epochs={recipe.epochs} / replay={attack.replay} leaves images unseen; "
            f"write epochs={attack.replay} or more"
        )
