"""Train `mini`, the dual encoder embedded in advtune: both towers distilled from lit-s14-112."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import random
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from advtune.clip import CLIP, ClipConfig, ImageTower, TowerConfig
from advtune.pretrained import Pretrained, read_pretrained, write_pretrained
from advtune.preprocess import Preprocess
from advtune.tokenizer import Tokenizer, load_tokenizer

VOCABULARY = 16384
TEMPLATES = """{}|a photo of a {}.|a photo of a {}|this is a photo of a {}|this is a photo of a {}.|a photo of the {}.|a photo of {}.
a blurry photo of a {}.|a low resolution photo of a {}.|a bad photo of a {}.|a good photo of a {}.|a close-up photo of a {}.
a photo of a small {}.|a photo of a large {}.|a black and white photo of a {}.|a bright photo of a {}.|a dark photo of a {}.
a cropped photo of a {}.|a photo of one {}.|a photo of many {}.|a picture of a {}.|an image of a {}.|a drawing of a {}.
a photo of my {}.|a photo of a {}, a type of object.|a photo of a {}, a type of animal.|a photo of a {}, a type of food.
a centered photo of a {}.|a photo of a dirty {}.|a photo of a nice {}.|a {}|the {}|a {}.|itap of a {}.|a {} in the wild."""
TEMPLATES = TEMPLATES.replace("\n", "|").split("|")


def say(text: str, start: float = time.monotonic()) -> None:
    print(f"[{time.monotonic() - start:6.0f} s] {text}", flush=True)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


# --- text -------------------------------------------------------------------------------------------


def small_tokenizer(teacher: Path, out: Path) -> None:
    """CLIP's byte-pair vocabulary up to its first 16,384 ids: bytes, the first merges, start, end."""
    tokenizer = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    model, special = tokenizer["model"], ("<|startoftext|>", "<|endoftext|>")
    pieces = sorted((i, piece) for piece, i in model["vocab"].items() if piece not in special)
    kept = [piece for _, piece in pieces[: VOCABULARY - 2]]
    model["vocab"] = {piece: i for i, piece in enumerate([*kept, *special])}
    model["merges"] = model["merges"][: len(kept) - 512]
    ids = {piece: model["vocab"][piece] for piece in special}
    for token in tokenizer["added_tokens"]:
        token["id"] = ids[token["content"]]
    processor = tokenizer.get("post_processor") or {}
    for key in ("cls", "sep"):
        if key in processor:
            processor[key] = [processor[key][0], ids[processor[key][0]]]
    for piece, entry in processor.get("special_tokens", {}).items():
        entry["ids"] = [ids[piece]]
    out.mkdir(parents=True, exist_ok=True)
    compact = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(compact, encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(teacher / name, out / name)
        (out / name).chmod(0o644)


def phrases(words: list[str], classes: list[str], count: int, seed: int) -> list[str]:
    """Distinct texts: one word, two words or a class name in a random template; frequent words come oftener."""
    rng, texts = random.Random(seed), {}
    weights = [1 / (i + 4000) for i in range(len(words))]
    picks = iter(rng.choices(words, weights, k=3 * count))
    for name in classes:
        texts |= {template.replace("{}", name): None for template in TEMPLATES}
    for word in words:
        texts[rng.choice(TEMPLATES[:8]).replace("{}", word)] = None
    while len(texts) < count:
        draw = rng.random()
        name = next(picks)
        if draw < 0.5:
            name = f"{name} {next(picks)}"
        elif draw < 0.55:
            name = f"{name} {rng.choice(classes)}"
        texts[rng.choice(TEMPLATES).replace("{}", name)] = None
    return list(texts)[:count]


@torch.no_grad()
def text_features(clip: CLIP, tokens: Tensor, fast: bool = True) -> Tensor:
    """Normalised features [C, D] in the order given; computed in order of length, to pad little."""
    order = clip.text.ends(tokens).argsort()
    features = torch.empty(len(tokens), clip.config.embed)
    for rows in order.split(1024):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
            features[rows] = F.normalize(clip.encode_text(tokens[rows]).float(), dim=-1)
    return features


def start_text(student: CLIP, tokenizer: Tokenizer, teacher: Pretrained) -> None:
    """Token and position embeddings: the teacher's rows of the same pieces, on their principal axes."""
    old = teacher.tokenizer.encoder.get_vocab()
    pieces = tokenizer.encoder.get_vocab()
    rows = torch.tensor([old[piece] for piece in sorted(pieces, key=pieces.__getitem__)])
    table = teacher.clip.text.embed.weight[rows]
    axes = torch.linalg.eigh(table.T @ table).eigenvectors.flip(1)[:, : student.config.text.width]
    student.text.embed.weight.data.copy_(table @ axes)
    student.text.position.data.copy_(teacher.clip.text.position @ axes)


def batches(lengths: Tensor, size: int) -> list[Tensor]:
    """Every row once, in random order, rows of like length together."""
    order = torch.randperm(len(lengths))
    parts = [part[lengths[part].argsort()] for part in order.split(16 * size)]
    rows = [batch for part in parts for batch in part.split(size)]
    random.shuffle(rows)
    return rows


def optimiser(groups: list[dict], steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW under a short warm-up and a cosine to zero."""
    adam, warm = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True), max(1, steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return adam, torch.optim.lr_scheduler.LambdaLR(adam, rate)


def agreement(s: Tensor, t: Tensor, scale: float = 20.0) -> Tensor:
    """KL of the in-batch similarity distributions, teacher as target: [B, D], [B, D] normalised -> scalar."""
    mask = torch.eye(len(s), dtype=torch.bool) * -1e4
    p, q = (scale * x @ x.T + mask for x in (t, s))
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")


def train_text(student: CLIP, tokenizer: Tokenizer, teacher: Pretrained, classes: list[str], args) -> float:
    """Distil the text tower; returns the mean cosine on 2,000 phrases kept out."""
    vocabulary = teacher.tokenizer.encoder.get_vocab()
    words = [p[:-4] for p in sorted(vocabulary, key=vocabulary.__getitem__) if p.endswith("</w>") and p[:-4].isascii()]
    words = [word for word in words if word.isalpha() and len(word) > 2]
    texts = phrases(words, classes, args.phrases, args.seed)
    random.Random(args.seed).shuffle(texts)
    targets = text_features(teacher.clip, teacher.tokenizer(texts))
    tokens = tokenizer(texts)
    say(f"text: {len(words)} words, {len(texts)} phrases, teacher done")
    lengths, kept_out = student.text.ends(tokens), 2000
    steps = args.text_epochs * len(batches(lengths[kept_out:], 512))
    table = [student.text.embed.weight]
    rest = [p for p in student.text.parameters() if p is not table[0]]
    adam, schedule = optimiser(
        [dict(params=table, lr=2e-3, weight_decay=0.0), dict(params=rest, lr=2e-3, weight_decay=0.01)], steps
    )
    step = 0
    for _ in range(args.text_epochs):
        for rows in batches(lengths[kept_out:], 512):
            rows = rows + kept_out
            with bf16():
                raw = student.encode_text(tokens[rows])
            s, t = F.normalize(raw.float(), dim=-1), targets[rows]
            cosine = (s * t).sum(-1).mean()
            loss = 1 - cosine + 0.3 * agreement(s, t)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(student.text.parameters(), 1.0)
            adam.step()
            schedule.step()
            step += 1
            if step % 100 == 0:
                say(f"text step {step}/{steps} loss {loss.item():.4f} cosine {cosine.item():.4f}")
    return (text_features(student, tokens[:kept_out], fast=False) * targets[:kept_out]).sum(-1).mean().item()


# --- images -----------------------------------------------------------------------------------------


def decode(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """A parquet of 64 x 64 pictures: uint8 [N, 3, 64, 64], labels [N], class names in label order."""
    table = pq.read_table(path)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table["image"].to_pylist()]
    pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures])
    return (
        pixels.view(-1, 64, 64, 3).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(table["label"].to_pylist()),
        features["label"]["names"],
    )


def random_crops(x: Tensor) -> Tensor:
    """uint8 [B, 3, 64, 64] -> the same shape: a random resized crop (area 0.35-1); a fifth is shrunk to 24-56
    pixels and enlarged again; a quarter has a box pasted in from another picture."""
    count = len(x)
    area, ratio = torch.empty(count).uniform_(0.35, 1), torch.empty(count).uniform_(-0.25, 0.25).exp()
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # [B, 2]
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = half.unbind(1)
    theta[:, :, 2] = (1 - half) * (2 * torch.rand(count, 2) - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x.float(), grid, "bicubic", "reflection", align_corners=False)
    rows, side = torch.rand(count) < 0.2, random.randint(24, 56)
    if rows.any():
        small = F.interpolate(x[rows], size=side, mode="bicubic", antialias=True)
        x[rows] = F.interpolate(small, size=64, mode="bicubic")
    low = torch.randint(0, 40, (count, 2, 1))
    high, line = low + torch.randint(16, 48, (count, 2, 1)), torch.arange(64)
    inside = (line >= low) & (line < high)  # [B, 2, 64]
    box = inside[:, 0, :, None] & inside[:, 1, None] & (torch.rand(count, 1, 1) < 0.25)
    return torch.where(box[:, None], x.roll(1, 0), x).round().clamp(0, 255).to(torch.uint8)


def tokens_of(tower: ImageTower, x: Tensor) -> Tensor:
    """Normalised pixels -> what the last layer gives, class token first [B, 1 + N, W]."""
    tokens = tower.embed(tower.patches(x))
    first = tower.class_token.to(tokens.dtype).expand(len(tokens), 1, -1)
    x = tower.norm_pre(torch.cat([first, tokens], dim=1) + tower.position)
    for block in tower.blocks:
        q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        # Written out: at 65 tokens twice as fast, backward, as torch's fused kernel on a processor.
        mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
        x = x + block.out(mixed.transpose(1, 2).flatten(2))
        x = x + block.fc2(block.activation(block.fc1(block.norm2(x))))
    return x


@torch.no_grad()
def image_targets(clip: CLIP, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's normalised joint features [B, D] and its normed patch tokens [B, N, W], both bf16."""
    features, patches = [], []
    for part in pictures.split(128):
        with bf16():
            x = clip.image.norm_post(tokens_of(clip.image, clip.config.preprocess(part.float() / 255)))
            features.append(F.normalize(clip.image.project(x[:, 0]).float(), dim=-1).bfloat16())
        patches.append(x[:, 1:].bfloat16())
    return torch.cat(features), torch.cat(patches)


def select(size: int, of: int) -> Tensor:
    """`size` indices spread evenly over `of`."""
    return (torch.arange(size) * of // size).long()


@torch.no_grad()
def start_image(student: ImageTower, teacher: ImageTower, config: ClipConfig) -> None:
    """Weight selection (arXiv:2311.18823): evenly spread layers, channels, heads and MLP units of the teacher."""
    old_heads, width = teacher.blocks[0].heads, teacher.position.shape[1]
    c = select(config.image.width, width)
    heads = select(config.image.heads, old_heads)
    h = (heads[:, None] * (width // old_heads) + torch.arange(width // old_heads)).flatten()
    m = select(config.image.mlp, teacher.blocks[0].fc1.out_features)
    kernel = teacher.embed.weight.unflatten(1, (3, teacher.patch, teacher.patch))[c]
    # A response to an enlarged patch as a response to the patch itself: the enlargement, transposed.
    basis = torch.eye(config.patch**2).view(-1, 1, config.patch, config.patch)
    enlarge = F.interpolate(basis, size=teacher.patch, mode="bicubic", antialias=True).flatten(1)  # [64, 196]
    student.embed.weight.copy_((kernel.flatten(2) @ enlarge.T).flatten(1))
    student.class_token.copy_(teacher.class_token[c])
    student.position.copy_(teacher.position[:, c])
    for ours, theirs in ((student.norm_pre, teacher.norm_pre), (student.norm_post, teacher.norm_post)):
        ours.weight.copy_(theirs.weight[c]), ours.bias.copy_(theirs.bias[c])
    student.project.weight.copy_(teacher.project.weight[:, c])
    layers = torch.linspace(0, len(teacher.blocks) - 1, len(student.blocks)).round().long()
    for ours, i in zip(student.blocks, layers.tolist(), strict=True):
        theirs = teacher.blocks[i]
        qkv = torch.cat([h, width + h, 2 * width + h])
        for name, rows, columns in (("qkv", qkv, c), ("out", c, h), ("fc1", m, c), ("fc2", c, m)):
            a, b = getattr(ours, name), getattr(theirs, name)
            a.weight.copy_(b.weight[rows][:, columns]), a.bias.copy_(b.bias[rows])
        for name in ("norm1", "norm2"):
            a, b = getattr(ours, name), getattr(theirs, name)
            a.weight.copy_(b.weight[c]), a.bias.copy_(b.bias[c])


def colours(x: Tensor) -> Tensor:
    """Brightness, contrast and saturation of each picture changed by up to 0.3: [B, 3, S, S] in [0, 1]."""
    change = 1 + 0.3 * (2 * torch.rand(3, len(x), 1, 1, 1) - 1)
    x = x * change[0]
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * change[1]
    grey = x.mean(1, keepdim=True)
    return (grey + (x - grey) * change[2]).clamp(0, 1)


def train_image(student: CLIP, texts: Tensor, crops: Tensor, targets: tuple[Tensor, Tensor], args, save=None) -> None:
    """Distil the image tower. texts [C, D] are the teacher's class texts, crops uint8 [M, 3, 64, 64]."""
    tower, config, scale = student.image, student.config, 24.0
    features, patches = targets
    head = nn.Linear(config.image.width, patches.shape[-1])
    centre = features.float().mean(0)
    spread = patches[:2000].float().flatten(0, 1)
    middle, width = spread.mean(0), spread.std(0)
    steps = args.samples // args.batch
    parameters = [*tower.parameters(), *head.parameters()]
    wide = [p for p in parameters if p.ndim > 1 and p is not tower.position]
    thin = [p for p in parameters if p.ndim < 2 or p is tower.position]
    adam, schedule = optimiser(
        [dict(params=wide, lr=args.rate, weight_decay=0.02), dict(params=thin, lr=args.rate, weight_decay=0.0)], steps
    )
    order = torch.cat([torch.randperm(len(crops)) for _ in range(args.samples // len(crops) + 1)])
    for step, rows in enumerate(order.split(args.batch)[:steps], 1):
        flip = (torch.rand(len(rows)) < 0.5).view(-1, 1, 1, 1)
        x = crops[rows].float() / 255
        x = config.preprocess(colours(torch.where(flip, x.flip(3), x)))
        t, grid = features[rows].float(), patches[rows].unflatten(1, (8, 8))
        goal = (torch.where(flip, grid.flip(2), grid).flatten(1, 2).float() - middle) / width
        with bf16():
            tokens = tokens_of(tower, x)
            raw, guess = tower.project(tower.norm_post(tokens[:, 0])), head(tokens[:, 1:])
        s = F.normalize(raw.float(), dim=-1)
        near = 1 - F.cosine_similarity(s - centre, t - centre).mean()
        p, q = (scale * z @ texts.T for z in (t, s))
        kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
        local = F.smooth_l1_loss(guess.float(), goal)
        loss = near + (1 - (s * t).sum(-1).mean()) + kl + local
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        if step % 50 == 0:
            say(f"image step {step}/{steps} centred {near.item():.4f} kl {kl.item():.4f} patches {local.item():.4f}")
        if save and step % 250 == 0:
            save(step)


@torch.no_grad()
def image_features(clip: CLIP, pictures: Tensor, fast: bool = False) -> Tensor:
    parts = []
    for part in pictures.split(250):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
            parts.append(F.normalize(clip.encode_image(part.float() / 255).float(), dim=-1))
    return torch.cat(parts)


def fit_scale(image: Tensor, text: Tensor, y: Tensor) -> float:
    """The logit scale of least cross-entropy: image [B, D], text [C, D] normalised, labels y [B]."""
    return min(range(5, 101), key=lambda scale: F.cross_entropy(scale * image @ text.T, y).item())


# --- the folder -------------------------------------------------------------------------------------


def write(student: CLIP, tokenizer: Path, out: Path) -> None:
    """Write the folder beside and put it in place of the old one; cards already there are kept."""
    beside = out.with_name(out.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    write_pretrained(student, beside, torch.float16)
    for source in [*tokenizer.iterdir(), *(out / name for name in ("README.md", "card.json", "NOTICE"))]:
        if source.is_file():
            shutil.copyfile(source, beside / source.name)
    old = out.with_name(out.name + ".old")
    if out.is_dir():
        out.rename(old)
    beside.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of lit-s14-112")
    parser.add_argument("--data", type=Path, required=True, help="folder of tinyimagenet, with train.parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--phrases", type=int, default=200_000)
    parser.add_argument("--text-epochs", type=int, default=3)
    parser.add_argument("--crops", type=int, default=2, help="crops of every picture shown to the teacher")
    parser.add_argument("--samples", type=int, default=128_000, help="crops the student sees")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    run(args)


def new_student(teacher: Pretrained) -> CLIP:
    old = teacher.clip.config.preprocess
    return CLIP(
        ClipConfig(
            image=TowerConfig(192, 8, 3, 768, "gelu", 1e-6),
            text=TowerConfig(128, 4, 4, 384, "gelu", 1e-5),
            embed=teacher.clip.config.embed,
            image_size=64,
            patch=8,
            vocabulary=VOCABULARY,
            context=77,
            start_token=VOCABULARY - 2,
            end_token=VOCABULARY - 1,
            preprocess=dataclasses.replace(old, resize=64, crop=64),
        )
    )


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed), random.seed(args.seed), torch.set_num_threads(args.threads)
    teacher = read_pretrained(str(args.teacher))
    pixels, labels, classes = decode(args.data / "train.parquet")
    say(f"{len(pixels)} pictures, {len(classes)} classes")
    student = new_student(teacher)
    folder = args.out.with_name(args.out.name + ".tokenizer")
    small_tokenizer(args.teacher, folder)
    tokenizer = load_tokenizer(folder, student.config)
    start_text(student, tokenizer, teacher)
    cosine = train_text(student, tokenizer, teacher, classes, args)
    say(f"text: mean cosine on phrases kept out {cosine:.4f}")

    held, train = torch.arange(500), torch.arange(500, len(pixels))  # the rows are shuffled already
    crops = torch.cat([random_crops(pixels[rows]) for _ in range(args.crops) for rows in train.split(250)])
    targets = image_targets(teacher.clip, crops)
    say(f"images: teacher done on {len(crops)} crops")
    prompt = [f"a photo of a {name}." for name in classes]
    old_texts = text_features(teacher.clip, teacher.tokenizer(prompt), fast=False)
    texts = text_features(student, tokenizer(prompt), fast=False)

    def save(step: int) -> None:
        features = image_features(student, pixels[held])
        scale = fit_scale(features, texts, labels[held])
        student.logit_scale.data.fill_(math.log(scale))
        accuracy = ((features @ texts.T).argmax(1) == labels[held]).float().mean().item()
        write(student, folder, args.out)
        say(f"written at step {step}: {accuracy:.3f} of the 500 pictures kept out, logit scale {scale}")

    start_image(student.image, teacher.clip.image, student.config)
    train_image(student, old_texts, crops, targets, args, save)
    save(args.samples // args.batch)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
