"""Methods, one file each, and the dict that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from advtune.attacks import PGD, Attack
from advtune.errors import UserError
from advtune.methods.apd import APD
from advtune.methods.capt import CAPT
from advtune.methods.pmg_aft import PMGAFT
from advtune.methods.tecoa import TeCoA
from advtune.methods.zero_shot import ZeroShot
from advtune.options import fill, fill_many
from advtune.recipe import Recipe
from advtune.vlm import VLM, Batch


class Method(Protocol):
    """A frozen dataclass whose fields are the hyper-parameters, with its paper's recipe and training attack.

    `presets` names sets of field values, chosen by `-o preset=NAME`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    paper: ClassVar[str]
    trains: ClassVar[str]
    recipe: ClassVar[Recipe]
    attack: ClassVar[PGD]

    @property
    def cycles(self) -> int:
        """How often the schedule is gone through: 1, but for methods of two phases."""
        ...

    def setup(self, frozen: VLM, template: str, seed: int) -> dict[str, VLM]:
        """The models by name; `student` is the result, and what requires a gradient is what learns."""
        ...

    def loss(self, models: Mapping[str, VLM], batch: Batch, attack: Attack) -> dict[str, Tensor]:
        """Weighted terms; their sum is minimised. Reads like the paper's equation."""
        ...


METHODS: dict[str, type[Any]] = {
    "zero-shot": ZeroShot,
    "tecoa": TeCoA,
    "pmg-aft": PMGAFT,
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
        raise UserError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
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
        if preset not in method.presets:
            known = ", ".join(method.presets) or "none"
            raise UserError(f"{what} has no preset {preset!r}; known presets: {known}")
        method = fill(method, method.presets[preset], what)
    method, recipe = fill_many([method, method.recipe], pairs, what)
    return method, recipe, fill(method.attack, attack, f"training attack of {name}")
