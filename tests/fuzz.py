"""Many inputs to every parser: random ones, and valid ones that were changed. None may end in a traceback.

`python tests/fuzz.py [SHARE]` feeds each parser its count of inputs, or a share of it, and prints how many it refused.
A parser may raise UserError, one line, or what its docstring names; anything else is a failure, printed with the input
that caused it. test_fuzz.py gives each some of what Hypothesis makes, and all of these in its slow test.
"""

from __future__ import annotations

import io
import json
import random
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from advtune import comparison
from advtune.arguments import build
from advtune.attacks import ATTACKS
from advtune.configuration import read_config
from advtune.data import images
from advtune.data.coop import open_coop
from advtune.data.sources import open_csv
from advtune.data.task import check_words, load_task, rename
from advtune.errors import UserError
from advtune.methods import configure
from advtune.options import fill, parse_eps, parse_float
from advtune.parsing import parse
from advtune.preprocess import from_config
from advtune.pretrained import locate, read_notice
from advtune.report import render, render_against
from advtune.results import Row, accuracy, read
from advtune.runs import read_config as read_run
from advtune.serve.play import check_template, make_attack, read_classes
from advtune.study import from_facts, from_flags, plan
from advtune.study import read as read_study
from advtune.tokenizer import load_encoder
from advtune.tokenizer import of_model as tokenizer_of
from advtune.untrusted import cell, expanded, is_there, visible
from advtune.weights import read_tensors, weight_files
from advtune.withstand import Journal

# What hostile input is made of.
PIECES = [
    "", " ", "\n", "\0", "\x1b[31m", "\u202e", "\udce9", "é", "e\u0301", "🐱", "=", "=1+1", ",", ";", ":", "/", "\\",
    "..", "~", "%", "{}", "{", "}", "[", "]", "[[[[", '"', "'", "<script>", "nan", "inf", "-inf", "NaN", "Infinity",
    "null", "none", "true", "1", "0", "-1", "1e999", "-0.0", "4/255", "1/0", "9" * 30, "9" * 5000, "0x10", "1_0", "٣",
    "½", "name", "eps=1/255", "steps=3", "x" * 300, "folder:", "csv:", "hf:a/b", "../../etc/passwd", "-a name=free",
    "1,2", "model_type", "clip", "image", "label",
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 224, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e300, float("nan"),
    float("inf"), "", "x", "1", "4/255", "\udce9", "\x1b", "9" * 5000, [], {}, [[]], [1], ["a"], {"a": 1}, [None],
    {"": {}}, "pgd", "all", [0, 1], "../x",
]  # fmt: skip


@dataclass
class Parser:
    """What is fed and with what: `valid` texts or values to be changed; the exceptions that its docstring names."""

    name: str
    parse: Callable[[Any], Any]
    valid: list[Any]
    count: int
    allowed: tuple[type[BaseException], ...] = (UserError,)
    quick: int = 200  # of the fast suite


@dataclass
class Told:
    """How many inputs a parser got, how many it refused, and what went wrong: (input, exception)."""

    inputs: int = 0
    refused: int = 0
    failures: list[tuple[str, BaseException]] = field(default_factory=list)


# --- changes -------------------------------------------------------------------------------------------------


def noise(rng: random.Random, longest: int = 6) -> str:
    """A random text of hostile pieces and letters."""
    return "".join(
        rng.choice(PIECES) if rng.random() < 0.7 else chr(rng.choice((rng.randrange(128), rng.randrange(0xD800))))
        for _ in range(rng.randrange(longest))
    )


def changed_text(rng: random.Random, text: str) -> str:
    """A text with a few cuts, doublings and pieces put in."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        match rng.randrange(5):
            case 0:
                text = text[:i] + text[j:]
            case 1:
                text = text[:i] + rng.choice(PIECES) + text[i:]
            case 2:
                text = text[:i] + text[i : min(j, i + 40)] * 2 + text[j:]
            case 3:
                text = text[:i] + rng.choice(PIECES) + text[j:]
            case _:
                text = text[:i] + chr(rng.randrange(256)) + text[i + 1 :]
    return text


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a few flips, cuts and numbers of all ones put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        i = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0:
                del out[i:]
            case 1:
                out[i : i + 4] = b"\xff" * 4
            case 2:
                out[i : i + 1] = bytes([rng.randrange(256)])
            case 3:
                out[i:i] = bytes(rng.randrange(256) for _ in range(rng.randrange(8)))
            case _:
                del out[i : i + rng.randrange(1, 9)]
    return bytes(out)


def changed_value(rng: random.Random, value: Any) -> Any:
    """A value of JSON with one place in it replaced, doubled, renamed or taken away."""
    if rng.random() < 0.08 or not isinstance(value, dict | list) or not value:
        if isinstance(value, str) and rng.random() < 0.5:
            return changed_text(rng, value)
        return rng.choice(VALUES) if rng.random() < 0.9 else noise(rng)
    copied = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copied)) if isinstance(copied, dict) else rng.randrange(len(copied))
    match rng.randrange(8):
        case 0:
            del copied[key]
        case 1 if isinstance(copied, dict):
            copied[noise(rng) or "x"] = copied.pop(key)
        case 2 if isinstance(copied, list):
            copied.append(copied[key])
        case 3 if isinstance(copied, dict):
            copied[key] = copied[rng.choice(list(copied))]
        case _:
            copied[key] = changed_value(rng, copied[key])
    return copied


def changed(rng: random.Random, value: Any) -> Any:
    """An input near a valid one, or, one time in eight, nothing like it."""
    if rng.random() < 1 / 8:
        wild = noise(rng, 12)
        return (
            wild.encode("utf-8", "surrogatepass")
            if isinstance(value, bytes)
            else wild
            if isinstance(value, str)
            else wild_value(rng)
        )
    if isinstance(value, bytes):
        return changed_bytes(rng, value)
    if isinstance(value, str):
        return changed_text(rng, value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = changed_value(rng, value)
    return value


def wild_value(rng: random.Random, depth: int = 3) -> Any:
    """A random value of JSON."""
    kind = rng.randrange(4) if depth else 0
    if kind == 1:
        return [wild_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 2:
        return {noise(rng, 3): wild_value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return rng.choice(VALUES)


# --- what is fed ---------------------------------------------------------------------------------------------


def config() -> dict[str, Any]:
    """A small CLIP."""
    tower = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-5,
    }
    text = {**tower, "vocab_size": 300, "max_position_embeddings": 77, "bos_token_id": 298, "eos_token_id": 299}
    image = {**tower, "image_size": 8, "patch_size": 4, "hidden_act": "gelu"}
    return {"model_type": "clip", "projection_dim": 8, "text_config": text, "vision_config": image}


PREPROCESSOR = {
    "size": {"shortest_edge": 8},
    "crop_size": {"height": 8, "width": 8},
    "resample": 3,
    "do_resize": True,
    "do_center_crop": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
    "do_normalize": True,
}
STUDY = """protocol = "few-shot"
methods = ["zero-shot", "tecoa"]
data = ["fashion-mnist-mini"]
shots = [1, 4, "all"]
seeds = [0, 1]
backbone = "mini"
epochs = 2
limit = 100
options = { lr = 1e-3 }
train_attack = { eps = "1/255", steps = 2 }
[method.tecoa]
batch_size = 16
[[attacks]]
name = "pgd"
eps = ["1/255", "2/255"]
steps = 10
"""
CURVE = {
    "protocol": "eps-curve",
    "methods": ["tecoa"],
    "data": ["cifar10"],
    "train_on": "",
    "seeds": [0],
    "paper": "fap",
    "table": "",
    "attacks": [{"name": "apgd-ce", "eps": ["1/255"], "steps": 5}],
    "attack_seed": 1,
    "train_limit": 5,
}
FLAGS = [
    "study few-shot --methods capt tecoa --data dtd --shots 1 all --seeds 0 1 -o lr=0.1 -o capt.lam=2 --limit 3",
    "study transfer --methods tecoa --data cifar10 --train-on dtd --attack pgd --eps 1/255 2/255 -a steps=3 --epochs 2",
]
SPLITS = {
    "train": [["a/1.jpg", 0, "cat"], ["b/1.jpg", 1, "dog"]],
    "val": [["a/2.jpg", 0, "cat"]],
    "test": [["a/3.jpg", 0, "cat"], ["b/3.jpg", 1, "dog"]],
}
CSV = 'image,label,split\na.png,cat,train\n"a.png", dog,test\na.png,cat,val\n'
RUN = {
    "method": "capt",
    "options": {},
    "backbone": {"name": "mini", "path": "", "sha256": "0", "tuned": None},
    "train": {"spec": "x", "classes": []},
    "recipe": {"lr": 0.1},
    "preprocess": {"resize": 8, "crop": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "mode": "bicubic"},
}


def row() -> dict[str, Any]:
    """A row with everything in it."""
    finding = {"name": "masking", "alarm": True, "value": 0.5, "limit": 0.1, "n": 4, "text": "odd"}
    stage = {"attack": "pgd", "attacked": 3, "fell": 1, "seconds": 0.1}
    made = Row(
        run="runs/x",
        method="capt",
        options={"lam": 2.0, "depth": 9},
        reconstructed=["lam"],
        recipe={"lr": 0.1},
        train={
            "spec": "a",
            "name": "a",
            "part": "train",
            "shots": 4,
            "seed": 0,
            "sha256": "1",
            "classes": 3,
            "attack": {"name": "pgd", "eps": 0.1},
        },
        backbone={"name": "mini", "sha256": "2", "image_size": 64, "logit_scale": 100.0, "notice": "n", "tuned": None},
        data={
            "spec": "a",
            "name": "a",
            "part": "test",
            "subset": "new",
            "resolution": 64,
            "n": 4,
            "seed": 0,
            "sha256": "3",
            "skipped": [],
        },
        attack={"name": "pgd", "eps": 0.1, "steps": 3, "norm": "linf", "seed": 0},
        clean=accuracy("1101"),
        robust=accuracy("1001"),
        zero_gradient={"share": 0.5, "n": 4},
        stages=[stage, stage],
        checks=[finding],
        notes=["x"],
        flags={"clean": "1101", "robust": "1001", "after pgd": "1001"},
    )
    return json.loads(made.to_json())


JOURNAL = [
    {"stage": "pgd", "rows": [0, 1, 2], "stands": [True, False, True]},
    {"stage": "pgd", "rows": [3], "stands": [True]},
]


@cache
def tokenizer() -> str:
    """A byte-pair tokenizer.json of 300 ids."""
    from tokenizers import pre_tokenizers

    from advtune.tokenizer import byte_pair_encoder

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:140]
    words = [*letters, *(letter + "</w>" for letter in letters), "ph", "<|startoftext|>", "<|endoftext|>"]
    return byte_pair_encoder({word: i for i, word in enumerate(words)}, [("p", "h")]).to_str()


def pictures() -> list[bytes]:
    """A few bytes of each format."""
    from PIL import Image

    made = []
    for kind, mode in (
        ("PNG", "RGBA"),
        ("PNG", "I;16"),
        ("JPEG", "CMYK"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("WEBP", "RGB"),
        ("TIFF", "RGB"),
        ("PPM", "L"),
    ):
        out = io.BytesIO()
        Image.new(mode, (5, 4), 9 if len(mode) == 1 or "I" in mode else None).save(out, kind)
        made.append(out.getvalue())
    return made


# --- the parsers ---------------------------------------------------------------------------------------------


def as_json(value: Any) -> str:
    """JSON, of a text as it is: it stands for a damaged file."""
    return value if isinstance(value, str) else json.dumps(value)


def parsers(place: Path) -> list[Parser]:
    """Every parser, over files below `place`."""
    model = place / "model"
    for name in ("cat", "dog"):
        (place / "pics" / name).mkdir(parents=True, exist_ok=True)
        (place / "pics" / name / "1.png").write_bytes(pictures()[0])
    (place / "a.png").write_bytes(pictures()[0])
    model.mkdir(exist_ok=True)

    def write(name: str, value: Any) -> Path:
        data = value if isinstance(value, bytes) else as_json(value).encode("utf-8", "surrogatepass")
        (place / name).write_bytes(data)
        return place / name

    def of_model(name: str, use: Callable[[], Any]) -> Callable[[Any], Any]:
        def parse(value: Any) -> Any:
            restored = {"config.json": config(), "preprocessor_config.json": PREPROCESSOR, "card.json": {"notice": "x"}}
            for other, facts in restored.items():
                if other != name and not (model / other).is_file():
                    write(f"model/{other}", facts)
            write(f"model/{name}", value)
            try:
                return use()
            finally:
                (model / name).unlink()

        return parse

    for name in ("model-1.safetensors", "model-2.safetensors"):
        (model / name).write_bytes(b"")
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    attack = ATTACKS["pgd"]
    journal_rows = [torch.tensor([0, 1, 2]), torch.tensor([3])]

    def options(given: Any) -> Any:
        return [configure(name, given) for name in ("capt", "tecoa")]

    def study(value: Any) -> Any:
        return plan(from_facts(read_study(write("study.toml", value))))

    def journal(value: Any) -> Any:
        lines = (
            value
            if isinstance(value, str)
            else "\n".join(map(json.dumps, value if isinstance(value, list) else [value])) + "\n"
        )
        kept = Journal(write("journal", lines))
        return [kept.next("pgd", rows) for rows in journal_rows]

    def rows(value: Any) -> Any:
        found = read(write("results.jsonl", as_json(value).replace("\n", " ") + "\n"))
        return found and [render(found, kind) for kind in ("markdown", "latex", "csv", "json")]

    whole = Row.from_json(json.dumps(row()))

    def others(value: Any) -> Any:
        found = read(write("results.jsonl", as_json(value).replace("\n", " ") + "\n"))
        with patch.object(comparison, "bootstrap", lambda *_: (0.0, 0.0)):  # ten thousand draws are no parser
            return found and [comparison.compare(found, [whole]), render_against(found, "fap", "markdown")]

    def names(value: Any) -> Any:
        file = write("names.json", value)
        found = rename(["cat", "dog", "eel"], str(file))
        check_words(found, "a {}", "x")
        return found

    def weights(value: Any) -> Any:
        return read_tensors([write("model.safetensors", value)])

    def pickled(value: Any) -> Any:
        return read_tensors([write("pytorch_model.bin", value)])

    saved, packed = saved_tensors()
    pairs = [["eps=4/255", "steps=10"], ["lam=2", "lr=1e-3"], ["preset=base-to-new"]]
    everything = (Exception,)  # `decode` raises what Pillow raises
    return [
        Parser(
            "options of an attack",
            lambda v: fill(attack, v, "attack"),
            [["eps=4/255", "steps=10", "norm=l2"], {"eps": 0.1, "steps": 3}],
            12_000,
        ),
        Parser("options of a method", options, [*pairs, {"lam": 2.0, "lr": "1e-3", "epochs": 3}], 12_000),
        Parser(
            "training attack",
            lambda v: configure("tecoa", (), v),
            [["name=free", "replay=2"], {"name": "n-fgsm", "eps": "1/255"}],
            6_000,
        ),
        Parser("eps", parse_eps, ["4/255", "0.5", "1e-3"], 10_000),
        Parser("number", parse_float, ["4/255", "0.5", "-1e-3"], 10_000, (ValueError,)),
        Parser(
            "data specs",
            lambda v: load_task(inside(place, no_network(v))),
            [f"folder:{place / 'pics'}", f"csv:{place / 'list.csv'}", "mini", "parquet:x"],
            4_000,
        ),
        Parser(
            "backbone names",
            lambda v: locate(no_network(v)),
            ["mini", "openai/clip-vit-base-patch32", "./x", "~/x", "C:\\x"],
            6_000,
        ),
        Parser("CSV", lambda v: open_csv(str(write("list.csv", v))), [CSV, CSV.encode()], 6_000),
        Parser(
            "class names", names, [json.dumps(["a", "b", "c"]), json.dumps({"cat": "lion"}), ["a", "b", "c"]], 6_000
        ),
        Parser(
            "split files",
            lambda v: open_coop(place, {"split": write("s.json", v).name, "images": "pics"}, "x"),
            [SPLITS, json.dumps(SPLITS)],
            6_000,
        ),
        Parser("rows and their tables", rows, [row(), json.dumps(row())], 8_000),
        Parser("rows beside others", others, [row()], 1_500, quick=40),
        Parser("journals", journal, [JOURNAL, "\n".join(map(json.dumps, JOURNAL)) + "\n"], 5_000, quick=80),
        Parser("study files", study, [STUDY], 8_000),
        Parser("study facts", lambda v: plan(from_facts(v)) if isinstance(v, dict) else None, [CURVE], 6_000),
        Parser("the command line of a study", command, FLAGS, 4_000, (UserError, SystemExit)),
        Parser(
            "config.json",
            of_model("config.json", lambda: read_config(model)),
            [config(), json.dumps(config())],
            6_000,
        ),
        Parser(
            "preprocessor_config.json",
            of_model("preprocessor_config.json", lambda: read_config(model)),
            [PREPROCESSOR],
            6_000,
        ),
        Parser("preprocessing", lambda v: from_config(v) if isinstance(v, dict) else None, [PREPROCESSOR], 4_000),
        Parser(
            "tokenizer.json",
            of_model("tokenizer.json", lambda: tokenizer_of(load_encoder(model), read_config(model), model)),
            [tokenizer(), json.loads(tokenizer())],
            2_500,
        ),
        Parser("card.json", of_model("card.json", lambda: read_notice(model)), [{"notice": "x"}], 1_500),
        Parser("shard index", of_model("model.safetensors.index.json", lambda: weight_files(model)), [shards], 2_500),
        Parser("safetensors", weights, [saved], 4_000),
        Parser("pickled weights", pickled, [packed], 1_500),
        Parser(
            "a run's config.json", lambda v: read_run(write("config.json", v).parent), [RUN, json.dumps(RUN)], 3_000
        ),
        Parser("pictures", lambda v: images.decode(v, 8), pictures(), 6_000, everything),
        Parser("the page's fields", fields, ["cat, dog", "a photo of a {}.", "pgd"], 4_000),
        Parser("texts to show", lambda v: shown(v), ["=1+1", "a\x1bb", "x"], 2_000, ()),
    ]


def saved_tensors() -> tuple[bytes, bytes]:
    """The same tensors as safetensors and as a pickle."""
    from safetensors.torch import save

    table = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.float16)}
    out = io.BytesIO()
    torch.save(table, out)
    return save(table), out.getvalue()


def no_network(text: Any) -> str:
    """A name that would be asked of the hub, or a set that would be fetched, is another one."""
    text = text if isinstance(text, str) else repr(text)
    if text == "mini":
        return text
    return "no set" if text.startswith("hf:") or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) else text


def inside(place: Path, spec: str) -> str:
    """A spec that names what is there beyond `place` is another one: the disk is large."""
    where = expanded(spec.partition(":")[2])
    return "no set" if is_there(where) and place.resolve() not in where.resolve().parents else spec


def fields(text: str) -> Any:
    """What is typed on the page, each field with its own refusal."""
    found = []
    for use in (
        read_classes,
        check_template,
        lambda t: make_attack(t, 1, 5),
        lambda t: make_attack("pgd", t, 5),
        lambda t: make_attack("pgd", 1, t),
    ):
        try:
            found.append(use(text))
        except UserError as error:
            assert "\n" not in str(error)
    if not found:
        raise UserError("nothing fits")
    return found


@cache
def grammar() -> Any:
    """The parser of the command line, made once."""
    return build()


def command(text: str) -> Any:
    """A command line as a shell would split it; argparse says its one line and leaves with 2."""
    try:
        given = shlex.split(text)
    except ValueError:
        given = text.split()
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            args = parse(grammar(), given)
    except SystemExit as stop:
        assert stop.code in (0, 2)
        raise
    return plan(from_flags(vars(args))) if args.verb == "study" else None


def shown(text: str) -> None:
    """What is shown obeys nothing, and no spreadsheet computes it."""
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", visible(text))
    assert not str(cell(text)).startswith(("=", "+", "-", "@"))


# --- feeding -------------------------------------------------------------------------------------------------


def inputs(parser: Parser, count: int, rng: random.Random) -> Iterator[Any]:
    """The valid inputs, then changed ones."""
    yield from parser.valid[:count]
    for _ in range(count - len(parser.valid[:count])):
        yield changed(rng, rng.choice(parser.valid))


def feed(parser: Parser, given: Any, told: Told) -> None:
    """One input; what it came to."""
    told.inputs += 1
    try:
        parser.parse(given)
    except MemoryError as error:
        told.failures.append((repr(given)[:400], error))
    except parser.allowed as error:
        told.refused += 1
        if isinstance(error, UserError) and ("\n" in str(error) or len(str(error)) > 4000):
            told.failures.append((repr(given)[:400], error))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        told.failures.append((repr(given)[:400], error))


def fuzz(share: float = 1.0, seed: int = 0) -> dict[str, Told]:
    """Every parser with its count times `share`; what came of it, by name."""
    told: dict[str, Told] = {}
    with tempfile.TemporaryDirectory() as place:
        for parser in parsers(Path(place)):
            rng, told[parser.name] = random.Random(f"{seed} {parser.name}"), Told()
            for given in inputs(parser, max(1, int(parser.count * share)), rng):
                feed(parser, given, told[parser.name])
    return told


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    begin = time.monotonic()
    found = fuzz(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
    for name, each in found.items():
        print(f"{name:28} {each.inputs:7} inputs, {each.refused:7} refused, {len(each.failures)} failures")
        kinds = {f"{type(error).__name__}: {str(error)[:160]}": text for text, error in each.failures}
        for kind, text in list(kinds.items())[:8]:
            print(f"    {kind}\n      {text}")
    total = sum(each.inputs for each in found.values())
    print(f"{total} inputs in {time.monotonic() - begin:.0f} s")
    sys.exit(any(each.failures for each in found.values()))
