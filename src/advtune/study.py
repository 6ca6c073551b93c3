"""A study: methods, sets, shots and seeds of a protocol, from flags, a TOML file or Python; run, skipped, resumed."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advtune.attacks import ATTACKS
from advtune.data.catalog import names
from advtune.data.task import FORMS, OPENERS
from advtune.data.templates import listed
from advtune.edits import TEXTUAL
from advtune.errors import UserError, near
from advtune.formats.spec import parse
from advtune.grid import Bench, Engine, Outcome, alone, in_turn, through
from advtune.methods import METHODS
from advtune.options import as_options, pairs
from advtune.protocols import NEEDS_DATA, NONE, PROTOCOLS, Run, attacks_in_training, attacks_of, local, place_of
from advtune.report.published import papers
from advtune.results import write_atomic
from advtune.untrusted import read_bytes

FILE = "study.toml"
ATTACK: dict[str, Any] = {"name": "pgd", "steps": 100}
LISTS = {"methods": str, "data": str, "shots": int, "seeds": int, "template": str}
SINGLE = {
    "protocol": str, "train_on": str, "backbone": str, "paper": str, "table": str,
    "epochs": int, "limit": int, "train_limit": int, "attack_seed": int,
}  # fmt: skip
TABLES = ("options", "method", "train_attack")
LEAST = {"shots": 1, "seeds": 0, "epochs": 1, "limit": 1, "train_limit": 1, "attack_seed": 0}


@dataclass(frozen=True)
class Study:
    """What is to be tuned and tested, and how; empty means what the protocol or the method has as its default.

    methods, data: names of `advtune list`, or data specs. train_on: the set tuned on, where others are tested.
    shots: numbers of images a class, or "all". seeds: of the training. limit, train_limit: so many test and training
    images. template: in the place of every set's own, as --template; several are averaged. options: method and recipe
    fields for every method, `method[NAME]` for one; train_attack: fields of the training attack, and its name.
    attacks: a dict each, `name`, `eps` (one or several) and other fields; name none: clean alone. paper, table: what it
    reproduces, of `advtune report --against`. Raises UserError, one line, for what is unknown, missing or mistyped.
    """

    protocol: str
    methods: tuple[str, ...]
    data: tuple[str, ...] = ()
    shots: tuple[int | str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    train_on: str = ""
    backbone: str = "mini"
    epochs: int | None = None
    limit: int | None = None
    train_limit: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    train_attack: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[Mapping[str, Any], ...] = ()
    attack_seed: int = 0
    paper: str = ""
    table: str = ""
    template: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        typed(vars(self))
        for name in (*LISTS, "attacks"):  # a list from TOML or Python is kept as a tuple
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "template", listed(self.template))
        object.__setattr__(self, "data", tuple(map(local, self.data)))
        object.__setattr__(self, "train_on", local(self.train_on))
        attacks = tuple({**each, "name": NONE if each["name"] is None else each["name"]} for each in self.attacks)
        object.__setattr__(self, "attacks", attacks)
        check(self)

    def evaluation(self) -> tuple[Any, ...]:
        """The attacks that are evaluated, one for each eps, ascending within a name; (None,) is clean alone."""
        curve = self.protocol == "eps-curve"
        found = [attack for facts in self.attacks or (ATTACK,) for attack in attacks_of(facts, curve)]
        if len({repr(attack) for attack in found}) < len(found):
            raise UserError("study: the attacks name the same thing twice; give each eps once")
        return tuple(found)


def typed(facts: Mapping[str, Any]) -> None:
    """Raises UserError, one line, for a field of a study that is not of its kind."""
    for name in (each for each in facts if each in (*LISTS, "attacks")):
        if isinstance(facts[name], str) or not isinstance(facts[name], Sequence):
            raise UserError(f"study: {name} is a list: {name} = [{json.dumps(facts[name], default=str)}]")
    for name, kind in LISTS.items():
        for value in facts.get(name, ()):
            if not (name == "shots" and value == "all"):
                one_of_kind(value, kind, name)
    for name, kind in SINGLE.items():
        if facts.get(name) is not None or (kind is str and name in facts):
            one_of_kind(facts[name], kind, name)
    tables = {name: facts.get(name, {}) for name in TABLES}
    for name in tables["method"] if isinstance(tables["method"], Mapping) else ():
        tables[f"method.{name}"] = facts["method"][name]
    for name, value in tables.items():
        if not isinstance(value, Mapping):
            raise UserError(f"study: {name} is a table: [{name}]")
    for attack in facts.get("attacks", ()):
        if not isinstance(attack, Mapping) or not isinstance(attack.get("name", 0), (str, type(None))):
            raise UserError('study: an attack is a table with a name: [[attacks]] name = "pgd"')


def check(study: Study) -> None:
    """Raises UserError, one line, for what cannot be planned."""
    if study.protocol not in PROTOCOLS:
        raise UserError(f"study: unknown protocol {study.protocol!r}; {near(study.protocol, PROTOCOLS)}")
    for name in LISTS:
        values = getattr(study, name)
        if len(set(values)) < len(values):
            raise UserError(f"study: {name} names {max(values, key=values.count)} twice; give it once")
    if not study.methods:
        raise UserError('study: no method; give some: methods = ["zero-shot", "tecoa"]')
    if not study.seeds:
        raise UserError("study: no seed; give some: seeds = [0, 1, 2]")
    for method in (*study.methods, *study.method):
        if method not in METHODS:
            raise UserError(f"study: unknown method {method!r}; {near(method, METHODS)}")
    if idle := [method for method in study.method if method not in study.methods]:
        raise UserError(f"study: options for {idle[0]}, which is not among the methods; add it or remove them")
    for spec in (*study.data, *([study.train_on] if study.train_on else [])):
        if spec not in names() and spec.partition(":")[0] not in OPENERS:
            raise UserError(f"study: unknown set {spec!r}; {near(spec, names())}; of your own: {FORMS}")
    if study.table and not study.paper:
        raise UserError(f'study: table {study.table!r} is of no paper; name it: paper = "fap"')
    if study.paper and study.paper not in papers():
        raise UserError(f"study: no published numbers of {study.paper!r}; {near(study.paper, papers())}")
    if study.table and study.table not in (tables := papers()[study.paper]["tables"]):
        raise UserError(f"study: {study.paper} has no table {study.table!r}; {near(study.table, tables)}")
    if study.protocol in NEEDS_DATA and not study.data:
        raise UserError(f'study: {study.protocol} needs data: data = ["cifar10"]; see: advtune list data')
    if study.epochs is not None and "epochs" in study.options:
        raise UserError("study: epochs stands beside options.epochs; give it once")
    if study.protocol in NEEDS_DATA and study.train_on:
        raise UserError(f"study: {study.protocol} tunes on each set of data; leave train_on out")
    if study.protocol == "eps-curve" and len(study.attacks) > 1:
        raise UserError("study: eps-curve takes one attack with several eps; make a study for each attack")
    if study.protocol == "eps-curve" and not all(hasattr(attack, "eps") for attack in study.evaluation()):
        raise UserError('study: eps-curve needs an attack: [[attacks]] name = "pgd" eps = ["1/255", "4/255"]')


def one_of_kind(value: Any, kind: Any, name: str) -> None:
    """Raises UserError unless the value is a text or a whole number, as its field wants, and not too low."""
    if not isinstance(value, kind) or isinstance(value, bool):
        words = {str: "a text", int: 'a number from 1, or "all"' if name == "shots" else "a whole number"}[kind]
        raise UserError(f"study: {name}: {value!r} is not {words}")
    if name in LEAST and value < LEAST[name]:
        raise UserError(f"study: {name}: {value} is too low; write {LEAST[name]} or more")


def from_facts(facts: Mapping[str, Any], what: str = "study") -> Study:
    """A study from a mapping, as a TOML file has it. Raises UserError for unknown and missing keys."""
    known = [each.name for each in dataclasses.fields(Study)]
    for key in facts:
        if key not in known:
            raise UserError(f"{what}: no key {key!r}; {near(key, known)}")
    for key in ("protocol", "methods"):
        if key not in facts:
            example = 'protocol = "few-shot"' if key == "protocol" else 'methods = ["zero-shot", "tecoa"]'
            raise UserError(f"{what}: {key} is missing; write {example}")
    return Study(**facts)


def from_flags(flags: Mapping[str, Any]) -> Study:
    """A study from the command line: a protocol or a file (`study`), and the flags that lie over it."""
    place = flags["study"]
    facts: dict[str, Any] = {"protocol": place} if place in PROTOCOLS else read(place)
    typed(facts)
    left = {*facts.get("methods", ())}.difference(flags.get("methods") or facts.get("methods", ()))  # out, by --methods
    options = dict(facts.get("options", {}))
    methods = {name: dict(table) for name, table in facts.get("method", {}).items() if name not in left}
    given = pairs(flags.get("options") or (), "study: -o")
    if flags.get("epochs") is not None and "epochs" in given:
        raise UserError("study: --epochs and -o epochs say the same; give one")
    for name in ("methods", "data", "train_on", "seeds", "epochs", "limit", "train_limit", "template", "backbone"):
        if flags.get(name) is not None:
            facts[name] = flags[name]
    if flags.get("image_size") is not None:
        facts["backbone"] = str(parse(f"{facts.get('backbone', Study.backbone)}@{flags['image_size']}"))
    if flags.get("shots"):
        facts["shots"] = [int(k) if k.isdecimal() else k for k in flags["shots"]]
    if flags.get("train_attack"):
        facts["train_attack"] = facts.get("train_attack", {}) | pairs(flags["train_attack"], "study: --train-attack")
    elif any(map(attacks_in_training, left)) and not any(map(attacks_in_training, facts["methods"])):
        facts.pop("train_attack", None)  # it was for those that are out
    for key in [*given, *(["epochs"] if flags.get("epochs") is not None else [])]:
        for table in (options, *methods.values()):
            table.pop(key, None)
    for key, value in given.items():
        method, dot, own = key.partition(".")
        (methods.setdefault(method, {}) if dot else options)[own or key] = value
    facts |= {"options": options, "method": {name: table for name, table in methods.items() if table}}
    attacks = flagged(flags, [dict(each) for each in facts.get("attacks", [])])
    if "methods" not in facts:
        raise UserError(f"{place}: the methods are missing; write --methods zero-shot tecoa")
    return from_facts(facts | ({"attacks": attacks} if attacks else {}), place)


def flagged(flags: Mapping[str, Any], kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluation attacks of --attack, --eps and -a; without --attack, the file's with the others over them."""
    names, radii, given = (flags.get(name) for name in ("attack", "eps", "attack_options"))
    if names:
        for name in names:
            if all(each["name"] != name for each in kept):
                kept.append(dict(ATTACK) if name == ATTACK["name"] else {"name": name})
        kept = [each for name in names for each in kept if each["name"] == name]
    elif radii or given:
        kept = kept or [dict(ATTACK)]
    flat = (NONE, *TEXTUAL)  # what has no eps
    if radii and all(attack["name"] in flat for attack in kept):
        raise UserError("study: --eps goes with an attack on images; name it with --attack pgd")
    options, used, known = pairs(given or (), "study: -a"), set(), ATTACKS | TEXTUAL
    for attack in kept:
        own = as_options(known[attack["name"]]) if attack["name"] in known else {}
        attack |= {key: value for key, value in options.items() if key in own}
        used |= set(own)
        if radii and attack["name"] not in flat:
            attack["eps"] = radii
    if unused := [key for key in options if key not in used]:
        names_ = ", ".join(attack["name"] for attack in kept)
        raise UserError(f"study: -a {unused[0]}: no attack of {names_} has it; {near(unused[0], sorted(used))}")
    return kept


def read(path: str | Path) -> dict[str, Any]:
    """The facts of a study file. Raises UserError when it is not there or not TOML."""
    try:
        return tomllib.loads(read_bytes(Path(path)).decode())
    except OSError as error:
        hint = near(path, PROTOCOLS)
        raise UserError(f"{path}: neither a protocol nor a file that can be read ({error.strerror}); {hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not TOML: {' '.join(str(error).split())}") from None


def write(study: Study) -> str:
    """The study as TOML that `read` and `from_facts` turn back into it; what is empty is left out."""
    facts = {each.name: getattr(study, each.name) for each in dataclasses.fields(Study)}
    return "".join(f"{key} = {toml(value)}\n" for key, value in facts.items() if value not in (None, "", (), {}))


def toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(str(k))} = {toml(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml(each) for each in value)}]"
    return json.dumps(value, ensure_ascii=False)


def plan(study: Study) -> list[Run]:
    """The runs of a study, in order. Raises UserError for options that do not exist or do not fit."""
    found = PROTOCOLS[study.protocol](study)
    for run in found:
        own = run.settings().get("options", {}).get("context") == "class-specific"
        if own and {(test.data, test.subset) for test in run.tests} != {(run.data, run.subset)}:
            raise UserError(f"study: {run.method}: class-specific contexts have no other classes; use context=unified")
    if study.train_attack and not any(attacks_in_training(method) for method in study.methods):
        raise UserError("study: train_attack: none of the methods tunes on adversarial images; leave it out")
    return found


def run_study(
    study: Study, out: str | Path, *, extend: bool = False, device: str = "auto", precision: str = "auto",
    batch_size: int = 64, show: bool = True, compile: bool = False, engine: Engine = in_turn, only: str | None = None,
) -> Outcome:  # fmt: skip
    """Do every run of a study that is not done, into OUT/<key>; what came of it, with the rows of the whole study.

    A run that fails is kept in OUT/failed.jsonl and does not stop the rest. OUT/study.toml says what the folder is:
    another study there is refused, unless `extend` puts this one in its place (what is done stays). engine: who does
    the runs, of `advtune.engines`. only: the key, or the place from 0, of the one run to do, beside processes that do
    others. Raises UserError for a study that cannot be planned; KeyboardInterrupt says how to go on.
    """
    out, wanted = Path(out), plan(study)
    if batch_size < 1:
        raise UserError(f"study: batch size {batch_size}: at least 1 image is needed")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give --out a folder")
    place = None if only is None else place_of(only, wanted)
    with alone(out, shared=place is not None):
        claim(study, wanted, out, extend)
        return through(wanted, Bench(out, device, precision, batch_size, show, compile), engine, place)


def claim(study: Study, wanted: list[Run], out: Path, extend: bool) -> None:
    """Write OUT/study.toml. Raises UserError when OUT holds another study and this is not to take its place."""
    kept = out / FILE
    if kept.is_file() and not extend:
        before = from_facts(read(kept), str(kept))
        if same(plan(before), wanted):
            return
        raise UserError(f"{out} holds another study; choose another --out, or put this one in its place with --extend")
    write_atomic(kept, write(study))


def same(some: list[Run], others: list[Run]) -> bool:
    """Whether two plans ask for the same, whatever the order and however the values were written."""
    first, second = (
        sorted(repr((run.key, run.tests, run.attacks, run.curve, run.attack_seed)) for run in plan)
        for plan in (some, others)
    )
    return first == second
