"""config.json and preprocessor_config.json of a CLIP folder, every number looked at before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from advtune.clip import ACTIVATIONS, ClipConfig, TowerConfig
from advtune.errors import UserError
from advtune.preprocess import SIDE, Preprocess, from_config
from advtune.untrusted import read_json, visible

TEXT_DEFAULTS = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8)
IMAGE_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
MOST = 1 << 24  # of any number that decides a shape; the weights then say whether it is so
LAYERS = 1000  # each is made, though without memory, before the weights are asked


def read_config(folder: Path) -> ClipConfig:
    """config.json and preprocessor_config.json of a CLIP folder. Raises UserError when they make no sense."""
    return checked(folder, lambda: _config(folder))


def checked(folder: Path, read: Callable[[], ClipConfig]) -> ClipConfig:
    """What a reader of configurations finds. Raises UserError in the place of whatever it raises."""
    try:
        return read()
    except UserError as error:
        raise UserError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
    except Exception as error:  # nearly anything, where a list or a text stands in the place of a table
        reason = visible(str(error))[:120]
        raise UserError(f"{folder}: config.json or preprocessor_config.json makes no sense ({reason})") from None


def _config(folder: Path) -> ClipConfig:
    raw = table_of(folder / "config.json")
    text = {**TEXT_DEFAULTS, **(raw.get("text_config") or {})}
    image = {**IMAGE_DEFAULTS, **(raw.get("vision_config") or {})}
    vocabulary = whole(text, "vocab_size", 49408, low=2)
    legacy = legacy_end(folder)
    size = whole(image, "image_size", 224, most=SIDE)
    preprocessor = folder / "preprocessor_config.json"
    preprocess = from_config(table_of(preprocessor)) if preprocessor.is_file() else Preprocess(size, size)
    if preprocess.side not in (size, None):
        raise ValueError(f"pictures of {preprocess.side} pixels for a model of {size}")
    return ClipConfig(
        image=tower(image),
        text=tower(text),
        embed=whole(raw, "projection_dim", 512),
        image_size=size,
        patch=whole(image, "patch_size", 32, most=size),
        vocabulary=vocabulary,
        context=whole(text, "max_position_embeddings", 77, low=3),
        start_token=vocabulary - 2 if legacy else whole(text, "bos_token_id", 49406, low=0, most=vocabulary - 1),
        end_token=vocabulary - 1 if legacy else whole(text, "eos_token_id", 49407, low=0, most=vocabulary - 1),
        preprocess=preprocess,
    )


def legacy_end(folder: Path) -> bool:
    """Whether config.json has the end token of OpenAI's uploads, 2, where none is: there it is the last id."""
    return (table_of(folder / "config.json").get("text_config") or {}).get("eos_token_id", 49407) == 2


def tower(raw: Mapping[str, Any]) -> TowerConfig:
    """One tower, as Hugging Face describes it. Raises UserError for an activation that is not known, ValueError for
    numbers that make no tower."""
    activation = raw.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    width, heads = whole(raw, "hidden_size"), whole(raw, "num_attention_heads")
    if width % heads:
        raise ValueError(f"{heads} heads do not divide width {width}")
    eps = raw.get("layer_norm_eps", 1e-5)
    if isinstance(eps, bool) or not 0 <= eps < 1:
        raise ValueError(f"layer_norm_eps is {eps!r}")
    layers, mlp = whole(raw, "num_hidden_layers", most=LAYERS), whole(raw, "intermediate_size")
    return TowerConfig(width, layers, heads, mlp, activation, float(eps))


def whole(raw: Mapping[str, Any], key: str, default: int | None = None, low: int = 1, most: int = MOST) -> int:
    """A whole number of a configuration; null is as if it were not there. Raises ValueError outside its bounds."""
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= most:
        raise ValueError(f"{key} is {value!r:.40}, not a whole number from {low} to {most}")
    return value


def table_of(path: Path) -> dict[str, Any]:
    """What a JSON file holds, which is a table. Raises UserError when it is missing or does not."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent}: {path.name} is missing; a Hugging Face CLIP folder is needed") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({visible(str(error))[:120]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no table of settings; fetch the file again")
    return found
