"""What a backbone is and whether every tensor fits: `advtune backbone inspect`. Nothing is tuned, run or kept; a model
is made on the meta device alone, and of one that cannot be used all is said that can be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from advtune import runs
from advtune.clip import CLIP
from advtune.configuration import read_config
from advtune.errors import UserError
from advtune.formats import KINDS, folder_of, kind_of, open_clip, openai, overlay, read, siglip
from advtune.formats.spec import HUB, Spec, at_side, parse
from advtune.huggingface import Layout, fits, gaps, layout, misshapen
from advtune.pretrained import EMBEDDED, content, locate, read_notice
from advtune.shapes import ClipConfig, TowerConfig
from advtune.tokenizer import Tokenizer, load_encoder
from advtune.untrusted import expanded, is_there, visible
from advtune.weights import check_floats, read_tensors, weight_files

MOST = 10  # names that are listed; of more the number is told
TASK: Any = SimpleNamespace(template="a photo of a {}.", classes=("red", "green"))


def inspect(name: str) -> dict[str, Any]:
    """All that can be said of a backbone or run folder, JSON-ready. `usable`; `error`: the line that says why not.
    Raises UserError when there is nothing under that name."""
    spec = parse(name)
    if name not in EMBEDDED and runs.is_run(name):
        return of_run(Path(name))
    if name not in EMBEDDED and (is_there(Path(f"{name}.partial"), Path.is_dir) or runs.is_run(spec.name)):
        runs.load(name, "cpu", "fp32")  # which says what is wrong with that
    place = locate(spec.name)
    facts: dict[str, Any] = {"name": name, "usable": False, "error": None, "format": None, "files": sizes(place)}
    first = "open_clip" if spec.name.startswith(HUB) else ""
    errors: list[str] = []
    kind = attempt(errors, lambda: kind_of(place, first))
    facts["format"] = KINDS.get(kind or "")
    found = attempt(errors, lambda: read(place, first)) if kind else None
    if found:
        config, tensors, how = found.config, found.tensors, found.how
        facts["files"] = sizes(place, found.files)
    else:
        config, tensors, how = pieces(place, kind)
    encoder = found.tokenizer.encoder if found else attempt([], lambda: load_encoder(folder_of(place)))
    facts |= {"tokenizer": words(encoder, config), "stored": stored(tensors)}
    if config and spec.side:
        config = attempt(errors, partial(at_side, config, spec.side)) or config
    if config:
        fit(facts, errors, config, tensors, how, place, spec)
    attempt(errors, lambda: read_notice(folder_of(place)))
    if found and (not spec.tower or is_there(expanded(spec.tower), Path.is_file)):
        facts["sha256"] = content(found, spec)
    if found and not errors:
        facts["refused"] = refused(config, found.tokenizer)
    return facts | {"usable": not errors, "error": errors[0] if errors else None}


def attempt(errors: list[str], work: Callable[[], Any]) -> Any:
    """What comes of the work, or nothing: then its line joins the errors."""
    try:
        return work()
    except UserError as error:
        errors.append(str(error))
        return None


def sizes(place: Path, files: list[Path] | None = None) -> dict[str, int]:
    """Bytes of the files that decide what a backbone is; of all that lie there, where these are not known."""
    if files is None:
        files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file())
    return {file.name: file.stat().st_size for file in files}


def pieces(place: Path, kind: str | None) -> tuple[ClipConfig | None, Mapping[str, Tensor] | None, Layout | None]:
    """Configuration, tensors and layout of what cannot be read whole, each if it can be had."""
    silent: list[str] = []
    if kind == "openai":
        tensors = attempt(silent, lambda: openai.tensors_of(place))
        config = attempt(silent, lambda: openai.checked(place, lambda: openai.configuration(tensors))) if tensors else None  # noqa: E501  # fmt: skip
        return config, tensors, openai.naming(config, tensors) if config else None
    if kind == "open_clip":  # without a tokenizer its configuration is not known
        file = place if place.is_file() else attempt(silent, lambda: open_clip.weights(place))
        return None, attempt(silent, lambda: openai.tensors_of(file)) if file else None, None
    tensors = attempt(silent, lambda: read_tensors(weight_files(place)))
    if kind == "siglip":
        encoder = attempt(silent, lambda: load_encoder(place))
        config = attempt(silent, lambda: siglip.checked(place, lambda: siglip.configuration(place, encoder))) if encoder else None  # noqa: E501  # fmt: skip
        return config, tensors, Layout(siglip.names(config), kind="a SigLIP model") if config else None
    config = attempt(silent, lambda: read_config(place)) if kind else None
    return config, tensors, Layout(layout(config)) if config else None


def fit(
    facts: dict[str, Any], errors: list[str], config: ClipConfig, tensors: Mapping[str, Tensor] | None,
    how: Layout | None, place: Path, spec: Spec,
) -> None:  # fmt: skip
    """Add the towers, the parameters and what does not fit; of BASE+FILE, of both."""
    with torch.device("meta"):
        clip = CLIP(config)
    facts |= towers(config) | {"parameters": sum(p.numel() for p in clip.parameters())}
    if tensors is not None and how is not None:
        shapes = {name: value.shape for name, value in clip.state_dict().items()}
        facts["fit"] = compared(errors, shapes, tensors, place, how)
        for ours in ("logit_scale", "logit_bias"):
            value = tensors.get(how.names.get(ours, ("",))[0])
            if value is not None and value.numel() == 1 and not facts["fit"]["numbers"]:
                facts[ours] = float(value.float().exp() if ours == "logit_scale" else value)
    if spec.tower:
        file = expanded(spec.tower)
        found = attempt(errors, lambda: overlay.laid(clip, file))
        facts["tower"] = {"file": spec.tower, "stored": stored(found[0] if found else None)}
        if found:
            facts["tower"]["fit"] = compared(errors, overlay.shapes_of(clip), found[0], file, found[1])


def compared(
    errors: list[str], shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], source: Path, how: Layout
) -> dict[str, list[str]]:  # fmt: skip
    """Names of tensors that are missing, unknown, of another shape, or that hold no plain finite numbers."""
    attempt(errors, lambda: fits(shapes, tensors, source, how))
    missing, unknown = gaps(tensors, how)
    others = [f"{name} {own}, asked for {asked}" for name, own, asked in misshapen(shapes, tensors, how)]
    numbers = []
    for name in sorted({name for group in how.names.values() for name in group} & set(tensors)):
        before = len(errors)
        attempt(errors, partial(check_floats, name, tensors[name], source))
        numbers += [name] if len(errors) > before else []
    return {"missing": missing, "unknown": unknown, "shapes": others, "numbers": numbers}


def of_run(folder: Path) -> dict[str, Any]:
    """A run folder: what was learned, and what it stands on. Whether it fits is asked by loading it."""
    errors: list[str] = []
    facts: dict[str, Any] = {"name": str(folder), "format": "run folder", "files": sizes(folder)}
    if attempt(errors, lambda: runs.below(str(folder))):
        config = runs.read_config(folder)
        base = runs.backbone_of(folder, config)
        facts |= {"method": visible(str(config.get("method"))), "base": attempt(errors, lambda: inspect(base))}
        learned = attempt(errors, lambda: read_tensors([folder / runs.DELTA])) or {}
        facts["learned"] = {name: list(value.shape) for name, value in learned.items()}
    model = None if errors else attempt(errors, lambda: runs.load(str(folder), "cpu", "fp32"))
    if model is not None:
        prompted = model.prompts is not None
        facts |= {"sha256": model.origin.sha256, "refused": refused(model.clip.config, model.tokenizer, prompted)}
        facts["base"].pop("refused", None)  # the run's own matter
    return facts | {"usable": not errors, "error": errors[0] if errors else None}


def towers(config: ClipConfig) -> dict[str, Any]:
    """What decides the shapes of both towers, and what they take."""
    vision, text = config.vision, config.words
    image = {"kind": "ResNet" if vision.stages else "ViT", **asdict(config.image), "patch": config.patch,
             "resolution": config.image_size, "stored": vision.native or config.image_size,
             "reads": "attention" if vision.stages else vision.reads, "stages": list(vision.stages)}  # fmt: skip
    words = {**asdict(config.text), "context": config.context, "vocabulary": config.vocabulary,
             "causal": text.causal, "reads": text.reads}  # fmt: skip
    pixels = asdict(config.preprocess)
    return {"image": image, "text": words, "embedding": config.embed, "pixels": pixels, "sigmoid": config.sigmoid}


def words(encoder: Any, config: ClipConfig | None) -> dict[str, Any] | None:
    """The tokenizer: its kind, how many texts it has an id for, and what frames a text."""
    if encoder is None:
        return None
    ends = {"start": config.start_token, "end": config.end_token} if config else {}
    return {"kind": type(encoder.model).__name__, "entries": encoder.get_vocab_size(), **ends}


def stored(tensors: Mapping[str, Tensor] | None) -> dict[str, Any] | None:
    """How many tensors a file has, and of which numbers."""
    if tensors is None:
        return None
    kinds = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    return {"tensors": len(tensors), "dtypes": dict(kinds.most_common())}


def refused(config: ClipConfig, tokenizer: Tokenizer, prompted: bool = False) -> dict[str, str]:
    """The methods that cannot be used on such towers, each with why: asked of small ones of the same kind, which have
    learned prompts already (prompted) or not."""
    from advtune.methods import METHODS, configure
    from advtune.vlm import VLM, Origin

    tower, narrow = TowerConfig(8, 1, 1, 8), config.vision
    if narrow.stages:
        narrow = replace(narrow, stages=(1, 1, 1, 1))
    small = replace(config, image=tower, text=tower, embed=8, vision=narrow)
    found = {}
    with torch.random.fork_rng(devices=[]):
        vlm = VLM(CLIP(small).eval().requires_grad_(False), tokenizer, Origin("", "", ""))
        vlm = vlm.with_context(1) if prompted else vlm
        for name in METHODS:
            try:
                for model in configure(name)[0].setup(vlm, TASK, 0).values():
                    model.tokens(TASK.classes, TASK.template)
            except UserError as error:
                found[name] = str(error)
    return found


def run(name: str, as_json: bool) -> None:
    """Print what `inspect` finds. Raises UserError at the end when it cannot be used."""
    facts = inspect(name)
    print(json.dumps(facts, indent=1) if as_json else "\n".join(map(visible, lines(facts))), flush=True)
    if facts["error"]:
        raise UserError(facts["error"])


def lines(facts: dict[str, Any]) -> list[str]:
    """What a person reads: a line for each thing that is known."""
    found = {"name": facts["name"], "format": facts["format"] or "none that is known"}
    found["files"] = ", ".join(f"{name} ({size(count)})" for name, count in facts["files"].items()) or "none"
    if facts["format"] == "run folder":
        learned = [f"{name} {shape}" for name, shape in facts.get("learned", {}).items()]
        found |= {"method": facts.get("method", "?"), "learned": some(learned)}
    found |= {"sha256": facts.get("sha256")} | (described(facts) if "image" in facts else {})
    if held := facts.get("stored"):
        found["tensors"] = f"{held['tensors']}: {', '.join(f'{n} {kind}' for kind, n in held['dtypes'].items())}"
    if known := facts.get("tokenizer"):
        ends = "".join(f", {end} {known[end]}" for end in ("start", "end") if known.get(end) is not None)
        found["tokenizer"] = f"{known['kind']}, {known['entries']} entries{ends}"
    if "refused" in facts:
        why = {reason: [n for n, r in facts["refused"].items() if r == reason] for reason in facts["refused"].values()}
        found["methods"] = "; ".join(f"not {', '.join(names)}: {r}" for r, names in why.items()) or "all can be used"
    said = [f"{label:<11} {text}" for label, text in found.items() if text]
    said += fitted(facts.get("fit"), "")
    if tower := facts.get("tower"):
        said += [f"{'tower':<11} {tower['file']}", *fitted(tower.get("fit"), " of the image tower")]
    if facts.get("base"):
        said += ["tuned on:", *(f"  {line}" for line in lines(facts["base"]))]
    return [*said, f"{'usable':<11} {'yes' if facts['usable'] else 'no'}"]


def described(facts: dict[str, Any]) -> dict[str, Any]:
    """Towers and what they take, in words."""
    image, text, pixels = facts["image"], facts["text"], facts["pixels"]
    way = "shortest side" if isinstance(pixels["resize"], int) else "height and width"
    other = f", stored for {image['stored']}" if image["stored"] != image["resolution"] else ""
    deep = f"{image['stages']} blocks" if image["stages"] else f"{image['layers']} layers"
    resize = f"{way} to {pixels['resize']}, {pixels['mode']}" if pixels["resize"] else "not resized"
    scale = f"scale {facts['logit_scale']:.4g}" if "logit_scale" in facts else None
    return {
        "image": f"{image['kind']}, {deep}, width {image['width']}, {image['heads']} heads, patch {image['patch']}, "
        f"{image['resolution']} px{other}, {image['activation']}, read by {image['reads']}",
        "text": f"{text['layers']} layers, width {text['width']}, {text['heads']} heads, context {text['context']}, "
        f"vocabulary {text['vocabulary']}, {'causal' if text['causal'] else 'tokens see all'}, read at {text['reads']}",
        "embedding": facts["embedding"],
        "parameters": f"{facts['parameters']:,}",
        "pixels": f"{resize}, crop {pixels['crop'] or 'none'}, mean {list(pixels['mean'])}, std {list(pixels['std'])}",
        "logits": scale and scale + (f", bias {facts['logit_bias']:.4g} (sigmoid)" if "logit_bias" in facts else ""),
    }


def fitted(fit: dict[str, list[str]] | None, where: str) -> list[str]:
    """What does not fit, a line for each kind of it."""
    if fit is None:
        return []
    said = {"missing": "missing", "unknown": "unknown", "shapes": "of another shape", "numbers": "no finite numbers"}
    bad = [f"{'misfit':<11} {said[kind]}{where}, {len(n)}: {some(n)}" for kind, n in fit.items() if n]
    return bad or [f"{'fit':<11} every tensor{where} fits"]


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:MOST]) + (f", and {len(names) - MOST} more" if len(names) > MOST else "")


def size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} {unit}"
