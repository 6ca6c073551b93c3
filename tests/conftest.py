"""Small backbones and image folders, written by the tests in the formats that users have."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # small tensors: threads cost more than they give
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so a shell starts what it leaves in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def tiny_tokenizer(folder: Path) -> int:
    """A byte-pair tokenizer.json over bytes and a few merges; the vocabulary's size."""
    from tokenizers import pre_tokenizers

    from advtune.tokenizer import byte_pair_encoder

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("p", "h"),
        ("ph", "o"),
        ("pho", "t"),
        ("phot", "o</w>"),
        ("o", "f</w>"),
        ("r", "e"),
        ("re", "d</w>"),
    ]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    byte_pair_encoder({word: i for i, word in enumerate(words)}, merges).save(str(folder / "tokenizer.json"))
    return len(words)


def write_clip(folder: Path, *, seed: int = 0, image: dict | None = None, text: dict | None = None, embed: int = 24):
    """A random transformers CLIPModel, saved with tokenizer and preprocessor config; returns the model."""
    import json

    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = tiny_tokenizer(folder)
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    words = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, vocab_size=vocabulary,
        max_position_embeddings=77, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = CLIPConfig(vision_config=vision | (image or {}), text_config=words | (text or {}), projection_dim=embed)
    model = CLIPModel(config).eval()
    with torch.no_grad():  # transformers' start is so small that every class looks alike
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.mul_(4)
            elif "norm" in name or "layrnorm" in name:
                value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    side = config.vision_config.image_size
    preprocessor = {
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "resample": 3,
        "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model


def write_images(folder: Path, classes=("red", "green", "blue"), train=6, test=4, side=16, seed=0) -> Path:
    """A train/test folder of PNGs, one folder a class; each class has its own colour, with noise."""
    random = np.random.default_rng(seed)
    for part, count in (("train", train), ("test", test)):
        for i, name in enumerate(classes):
            place = folder / part / name
            place.mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 120, (side, side, 3))
                pixels[..., i % 3] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{k}.png")
    return folder


def killed_at(step, monkeypatch):
    """Tuning is interrupted before the end of this step, counted from 1; the list grows with every step."""
    from advtune import train

    real, calls = train.update, []

    def killed(*args):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "update", killed)
    return calls


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache or data."""
    monkeypatch.setenv("ADVTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVTUNE_DATA", raising=False)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "clip"
    write_clip(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture
def vlm(clip_folder):
    import advtune

    return advtune.load(str(clip_folder), device="cpu", precision="fp32")


@pytest.fixture
def task(image_folder):
    import advtune

    return advtune.load_task(f"folder:{image_folder}")


@pytest.fixture
def short_square(monkeypatch):
    """AutoAttack's last stage with 60 queries instead of 5000."""
    from functools import partial

    from advtune.attacks import Square, autoattack

    monkeypatch.setattr(autoattack, "Square", partial(Square, queries=60))
