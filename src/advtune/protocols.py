"""Protocols: what a table of a paper is made of, as a list of runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from advtune.attacks import ATTACKS, Attack, check_measures
from advtune.data.task import OPENERS
from advtune.data.templates import BETWEEN, parts
from advtune.edits import TEXTUAL
from advtune.errors import UserError, near
from advtune.methods import METHODS, configure
from advtune.options import as_options, fill
from advtune.recipe import Recipe
from advtune.results import LAST

if TYPE_CHECKING:
    from advtune.study import Study

ZERO_SHOT, NONE = "zero-shot", "none"  # a method that trains nothing; the attack that is clean accuracy alone
CURVE = ["1/255", "2/255", "4/255", "8/255"]
FEW = (1, 2, 4, 8, 16, None)  # None: all images
USUAL = (16,)
TEXTS = ("text context", "prompts in both towers")  # what methods train where they learn a text prompt
# What prompts tuned on ImageNet are tested on (Zhou et al., arXiv:2203.05557).
CROSS = ("caltech101", "oxford-pets", "stanford-cars", "flowers102", "food101", "fgvc-aircraft", "sun397", "dtd",
         "eurosat", "ucf101")  # fmt: skip
SHIFTED = ("imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch")
# What towers tuned on one set are tested on (Mao et al., arXiv:2212.07016, and those after it).
TRANSFER = ("cifar10", "cifar100", "stl10", "imagenet", "caltech101", "caltech256", "oxford-pets", "stanford-cars",
            "food101", "flowers102", "fgvc-aircraft", "sun397", "dtd", "eurosat", "pcam")  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A slice that is tested on: data spec, all/base/new classes, part of the data, so many images."""

    data: str
    subset: str = "all"
    part: str = "test"
    limit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", local(self.data))


@dataclass(frozen=True)
class Run:
    """A method tuned once (zero-shot: not at all), on a slice of `data`, and what it is then evaluated on.

    shots: images a class, none for all. options: fields of the method and its recipe; train_attack: of the training
    attack. curve: the attacks differ in eps alone and run as one, so that what fell at a smaller eps stays fallen.
    seed is the training's, attack_seed the evaluation's. label names the folder in the method's
    place: equal settings under two labels are two runs. template: in the place of every set's own.
    """

    method: str
    data: str
    tests: tuple[Slice, ...]
    attacks: tuple[Any, ...] = (None,)  # None: clean accuracy alone
    subset: str = "all"
    part: str = "train"
    shots: int | None = None
    seed: int = 0
    epochs: int | None = None
    limit: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    train_attack: Mapping[str, Any] = field(default_factory=dict)
    backbone: str = "mini"
    curve: bool = False
    attack_seed: int = 0
    label: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        for name in ("data", "backbone"):
            object.__setattr__(self, name, local(getattr(self, name)))

    def settings(self) -> dict[str, Any]:
        """All that decides the tuned model, defaults filled in, JSON-ready. Raises UserError for options that do
        not exist or do not fit."""
        facts: dict[str, Any] = {"method": self.method, "backbone": self.backbone, "data": self.data}
        facts |= {"template": self.template} if self.template else {}  # older folders' keys have none
        if self.method == ZERO_SHOT:
            return facts | {"subset": self.subset}  # where it stands; nothing is tuned
        method, recipe, attack = self.configured()
        facts |= {"subset": self.subset, "part": self.part, "shots": self.shots, "seed": self.seed}
        # Older folders' keys have no name of PGD, and of the weights nothing where nothing is done with them.
        plain = {key: value for key, value in as_options(recipe).items() if LAST.get(key) != value}
        facts |= {"limit": self.limit, "options": as_options(method), "recipe": plain}
        named = {} if attack.name in ("pgd", "cw-pgd") else {"name": attack.name}
        return facts | {"attack": named | as_options(attack)}

    def configured(self) -> tuple[Any, Recipe, Attack]:
        """The method, its recipe and its training attack. Raises UserError as `configure`."""
        epochs = {} if self.epochs is None else {"epochs": self.epochs}
        return configure(self.method, {**self.options, **epochs}, self.train_attack)

    @property
    def key(self) -> str:
        """The run's folder: words for people, then a hash of `settings`. What is evaluated does not count: an
        evaluation is known by its row, and another one does not tune again."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:10]
        place = slug(self.data) + ("" if self.subset == "all" else f"-{self.subset}")
        amount = "all" if self.shots is None else f"{self.shots}shots"
        detail = "" if self.method == ZERO_SHOT else f"{amount}-seed{self.seed}-"
        return f"{place}/{slug(self.label or self.method)}/{detail}{digest}"


def place_of(run: str, wanted: list[Run]) -> int:
    """Where a run, by its key or its number, stands in a plan. Raises UserError when it does not."""
    keys = [each.key for each in wanted]
    place = keys.index(run) if run in keys else int(run) if run.isdecimal() else len(keys)
    if place >= len(keys):
        raise UserError(f"study: no run {run}; its runs are 0 to {len(keys) - 1}, --dry-run names them")
    return place


def local(spec: str) -> str:
    """A data spec or a backbone with its path written in one way: folder:./photos/ is folder:photos."""
    kind, colon, where = spec.rpartition(":") if spec.startswith(tuple(OPENERS)) else ("", "", spec)
    return f"{kind}{colon}{PurePath(where).as_posix()}" if where else spec


def slug(text: str) -> str:
    """A text as a folder's name: the last part of a path, and of that what every file system takes."""
    last = PurePath(text.partition(":")[2] or text).name
    return re.sub(r"[^A-Za-z0-9.=]+", "-", last).strip("-.")[:60] or "run"


def attacks_of(facts: Mapping[str, Any], curve: bool = False) -> list[Any]:
    """The attacks of one entry of a study: {"name": "pgd", "eps": ["1/255", "4/255"], "steps": 100}, ascending; what
    it does not say is the attack's default, and a curve's eps CURVE. One on class texts has no eps. Raises UserError
    for what does not fit."""
    name, what = facts["name"], f"attack {facts['name']}"
    if name == NONE:
        if len(facts) > 1:
            raise UserError("study: the attack none is clean accuracy alone and has no options; leave them out")
        return [None]
    check_measures(name)
    known = ATTACKS | TEXTUAL
    if name not in known:
        raise UserError(f"study: unknown attack {name!r}; {near(name, known)}")
    if name in TEXTUAL:
        return [fill(known[name], {key: value for key, value in facts.items() if key != "name"}, what)]
    one = fill(known[name], {key: value for key, value in facts.items() if key not in ("name", "eps")}, what)
    if curve and "eps" not in facts and one.norm != "linf":
        raise UserError(f"study: {what}: a curve in {one.norm} has no usual eps; give several, as 0.25 0.5 1")
    radii = facts.get("eps", CURVE if curve else one.eps)
    found = [fill(one, {"eps": eps}, what) for eps in (radii if isinstance(radii, (list, tuple)) else [radii])]
    if not found:
        raise UserError(f"study: {what}: eps has no value; give one, as 1/255")
    return sorted(found, key=lambda attack: attack.eps)


def few_shot(study: Study) -> list[Run]:
    """Tuned and tested on the same set, with 1, 2, 4, 8, 16 images a class and all."""
    return [run for data in study.data for run in runs(study, data, [data], FEW)]


def base_to_new(study: Study) -> list[Run]:
    """Tuned on the first half of the classes, 16 images each; tested on that half and on the other."""
    found = []
    for data in study.data:
        tests = [Slice(data, subset, limit=study.limit) for subset in ("base", "new")]
        found += runs(study, data, tests, USUAL, subset="base")
    return found


def cross_dataset(study: Study) -> list[Run]:
    """Tuned on one set (default ImageNet) with 16 images a class; tested on it and, as it is, on others."""
    return away(study, "imagenet", CROSS, USUAL)


def domain_shift(study: Study) -> list[Run]:
    """Tuned on ImageNet with 16 images a class; tested on it and on its variants."""
    return away(study, "imagenet", SHIFTED, USUAL)


def transfer(study: Study) -> list[Run]:
    """Tuned on all images of one set (default TinyImageNet); tested on it and, zero-shot, on many others."""
    return away(study, "tinyimagenet", TRANSFER, (None,))


def eps_curve(study: Study) -> list[Run]:
    """Tuned once a set, with 16 images a class; tested on it at every eps of an attack, ascending."""
    return [run for data in study.data for run in runs(study, data, [data], USUAL, curve=True)]


def away(study: Study, train_on: str, data: Sequence[str], shots: Sequence[int | None]) -> list[Run]:
    """Tuned on one set, tested on it and on others; what the study does not say is filled in."""
    home = study.train_on or train_on
    return runs(study, home, list(dict.fromkeys([home, *(study.data or data)])), shots)


def runs(study: Study, data: str, tests: Sequence[str | Slice], shots: Sequence[int | None], **how: Any) -> list[Run]:
    """A run for each method, number of shots and seed of a study, on one set; zero-shot once."""
    found = []
    where = tuple(Slice(test, limit=study.limit) if isinstance(test, str) else test for test in tests)
    shots = [None if k == "all" else k for k in study.shots] or shots  # type: ignore[misc]
    for method in study.methods:
        tuned = method != ZERO_SHOT
        for k, seed in product(shots, study.seeds) if tuned else [(None, 0)]:
            options = {**study.options, **study.method.get(method, {})}
            what: dict[str, Any] = {
                "shots": k, "seed": seed, "epochs": None if "epochs" in options else study.epochs,
                "limit": study.train_limit, "options": options,
                "train_attack": study.train_attack if attacks_in_training(method) else {},
            }  # fmt: skip
            common = {"backbone": study.backbone, "attack_seed": study.attack_seed, **how}
            common |= {"template": BETWEEN.join(study.template)}
            found.append(Run(method, data, where, study.evaluation(), **common, **(what if tuned else {})))
            check_template(found[-1])
    return found


def check_template(run: Run) -> None:
    """Raises UserError for several templates where a text prompt or context is learned."""
    learns = METHODS[run.method].trains.startswith(TEXTS) and run.settings()["options"].get("text_tokens", 1)
    if learns and len(parts(run.template)) > 1:
        raise UserError(f"study: {run.method} learns a text prompt, which goes with one template; give one")


def attacks_in_training(method: str) -> bool:
    """Whether a method tunes on adversarial images; an unknown one is refused where its options are filled in."""
    return method in METHODS and METHODS[method].attack.eps > 0


PROTOCOLS: dict[str, Callable[[Study], list[Run]]] = {
    "few-shot": few_shot,
    "base-to-new": base_to_new,
    "cross-dataset": cross_dataset,
    "domain-shift": domain_shift,
    "transfer": transfer,
    "eps-curve": eps_curve,
}
# What needs `data`; the others have a usual list.
NEEDS_DATA = ("few-shot", "base-to-new", "eps-curve")
