"""Small backbones in every format that is read, made from a random model of transformers' or of torch's own layers.
The conversions are written out here, apart from the package's."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = [
    "▁a",
    "▁photo",
    "▁of",
    "▁red",
    "▁green",
    "▁blue",
    "▁x",
    "▁dog",
    "▁",
    "s",
    *"abcdefghijklmnopqrstuvwxyz0123456789",
]
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
)  # fmt: skip


def spread(model):
    """Random weights of which every part has a say: transformers' start is nearly silent."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=random)
            if value.dim() > 1:
                value.copy_(noise * (2 / value.shape[-1]) ** 0.5 if "embedd" not in name else noise * 0.3)
            elif "logit" not in name:
                value.add_(0.1 * noise)
    return model.eval()


def unigram(folder: Path, clean=True):
    """A sentencepiece vocabulary as tokenizer.json, as SigLIP's: </s> ends and fills, no start."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = [("<unk>", -20.0), ("</s>", 0.0), *((word, -2.0 - 0.01 * i) for i, word in enumerate(WORDS))]
    encoder = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    if clean:
        marks = Regex(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]")
        encoder.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(marks, "")])
    encoder.pre_tokenizer = pre_tokenizers.Metaspace()
    encoder.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    encoder.add_special_tokens(["</s>", "<unk>"])
    encoder.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "eos_token": "</s>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return len(vocabulary)


def bytepairs(folder: Path):
    """A byte-pair vocabulary as SigLIP 2's, saved by transformers' own tokenizer with an end token as on the hub."""
    from tokenizers import processors
    from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    pairs = [("▁", "r"), ("▁r", "e"), ("▁re", "d"), ("o", "f")]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.!,'"]
    words = [*special, *letters, *("".join(pair) for pair in pairs)]
    tokenizer = Siglip2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=pairs)
    end = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer._tokenizer.post_processor = end
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    return len(words)


def write_siglip(folder: Path, *, image=None, text=None, words=unigram, seed=0):
    """A random transformers SiglipModel, saved with tokenizer and preprocessor config; returns the model."""
    from transformers import SiglipConfig, SiglipModel

    folder.mkdir(parents=True, exist_ok=True)
    size = words(folder)
    torch.manual_seed(seed)
    inner = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, vocab_size=size,
        max_position_embeddings=64, projection_size=32,
    )  # fmt: skip
    config = SiglipConfig(vision_config=VISION | (image or {}), text_config=inner | (text or {}))
    model = spread(SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        model.logit_bias.fill_(-4.0)
    model.save_pretrained(folder)
    side = config.vision_config.image_size
    facts = {"size": {"height": side, "width": side}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**facts, "image_processor_type": "SiglipImageProcessor"})
    )
    return model
