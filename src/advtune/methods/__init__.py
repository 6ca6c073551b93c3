"""Methods, one file each, and the dict that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from advtune.attacks import PGD
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
from advtune.methods.ivlp import IVLP
from advtune.methods.maple import MaPLe
from advtune.methods.pmg_aft import PMGAFT
from advtune.methods.tecoa import TeCoA
from advtune.methods.tga_zsr import TGAZSR
from advtune.methods.vpt import VPT
from advtune.methods.zero_shot import ZeroShot
from advtune.options import fill, fill_many
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


class Method(Protocol):
    """A frozen dataclass whose fields are the hyper-parameters, with its paper's recipe and training attack.

    Clean training has an attack of eps 0. What only some have: `presets`, named sets of field values, chosen by
    `-o preset=NAME`; `cycles`, how often the schedule is gone through (1; 2 with two phases);
    `prepare(models, batch, attack) -> {name: Tensor [B, ...]}`, what never changes in a run: see `Batch.kept`.
    """

    paper: ClassVar[str]
    trains: ClassVar[str]
    recipe: ClassVar[Recipe]
    attack: ClassVar[PGD]

    def setup(self, frozen: VLM, task: Task, seed: int) -> dict[str, VLM]:
        """The models by name; `student` is the result, and what requires a gradient is what learns."""
        ...

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: PGD) -> dict[str, Tensor]:
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
}


def configure(
    name: str, options: Sequence[str] | Mapping[str, Any] = (), attack: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[Method, Recipe, PGD]:
    """A method with its recipe and training attack, from `key=value` options (or a mapping).

    Options fill the method's fields first, then the recipe's. A preset is applied before the other options.
    Raises UserError for an unknown method, key or value.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; {near(name, METHODS)}")
    what, method = f"method {name}", METHODS[name]()
    options = [options] if isinstance(options, str) else options
    if isinstance(options, Mapping):
        pairs: Any = dict(options)
        preset = pairs.pop("preset", None)
    else:
        named = [p for p in options if p.partition("=")[0].strip() == "preset"]
        pairs = [p for p in options if p not in named]
        preset = named[-1].partition("=")[2].strip() if named else None
    if preset is not None:
        presets: Mapping[str, Mapping[str, Any]] = getattr(method, "presets", {})
        if not isinstance(preset, str) or preset not in presets:
            raise UserError(f"{what} has no preset {preset!r}; {near(preset, presets)}")
        method = fill(method, presets[preset], what)
    method, recipe = fill_many([method, method.recipe], pairs, what)
    if attack and not method.attack.eps:
        raise UserError(f"{what} tunes on clean images; it takes no training attack (-a)")
    return method, recipe, fill(method.attack, attack, f"training attack of {name}")
