"""Train `mini`, the dual encoder embedded in advtune: both towers distilled from lit-s14-112.

Command:  python recipes/train_mini.py --teacher ../shared/backbones/lit-s14-112 \\
              --data ../shared/data/tinyimagenet --out src/advtune/assets/mini
Hardware: two CPU cores with bf16, about 45 minutes (text 15, the teacher on 31,000 crops 5, image tower 25).
Text:     cosine distance and in-batch KL to the teacher's text tower, on phrases made of vocabulary words.
Image:    a closed-form start (every layer by ridge regression on the teacher's stream, first to last), then cosine,
          class KL and patch-token losses on crops of TinyImageNet's training pictures. Nothing else was seen.
Obtained: the card, src/advtune/assets/mini/README.md. The shipped weights were made by these functions run in
          pieces on a busy machine, not by one call of this script; another run will differ in the last digits.
"""

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
from advtune.formats.writing import write_pretrained
from advtune.pretrained import Pretrained, read_pretrained
from advtune.tokenizer import Tokenizer, load_tokenizer

VOCABULARY, KEPT_OUT, SCALE = 16384, 500, 24.0  # token ids; pictures never trained on; the teacher's logit scale
TEMPLATES = """{}|a photo of a {}.|a photo of a {}|this is a photo of a {}|this is a photo of a {}.|a photo of the {}.
a photo of {}.|a blurry photo of a {}.|a low resolution photo of a {}.|a bad photo of a {}.|a good photo of a {}.
a close-up photo of a {}.|a photo of a small {}.|a photo of a large {}.|a black and white photo of a {}.|a {}.
a bright photo of a {}.|a dark photo of a {}.|a cropped photo of a {}.|a photo of one {}.|a photo of many {}.|the {}
a picture of a {}.|an image of a {}.|a drawing of a {}.|a photo of my {}.|a photo of a {}, a type of object.|a {}
a photo of a {}, a type of animal.|a photo of a {}, a type of food.|a centered photo of a {}.|itap of a {}.
a photo of a dirty {}.|a photo of a nice {}.|a {} in the wild.""".replace("\n", "|").split("|")


def say(text: str, start: float = time.monotonic()) -> None:
    print(f"[{time.monotonic() - start:6.0f} s] {text}", flush=True)


def bf16(on: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)


def optimiser(wide: list, thin: list, rate: float, steps: int, decay: float):
    """AdamW under a short warm-up and a cosine to zero; no decay on the thin parameters."""
    groups = [dict(params=wide, weight_decay=decay), dict(params=thin, weight_decay=0.0)]
    adam, warm = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True), max(1, steps // 7)
    shape = lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))  # noqa: E731
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, shape)


def descend(loss: Tensor, parameters: list, adam, schedule) -> None:
    adam.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    adam.step()
    schedule.step()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p || softmax q), mean over rows; p is the teacher's."""
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")


# --- text


def small_tokenizer(teacher: Path, out: Path) -> None:
    """CLIP's byte-pair vocabulary up to its first 16,384 ids: bytes, the first merges, start, end."""
    tokenizer = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    model, special = tokenizer["model"], ("<|startoftext|>", "<|endoftext|>")
    pieces = sorted((i, piece) for piece, i in model["vocab"].items() if piece not in special)
    kept = [piece for _, piece in pieces[: VOCABULARY - 2]]
    model["vocab"] = ids = {piece: i for i, piece in enumerate([*kept, *special])}
    model["merges"] = model["merges"][: len(kept) - 512]
    for token in tokenizer["added_tokens"]:
        token["id"] = ids[token["content"]]
    for key in ("cls", "sep"):  # the frame that transformers puts around a text
        tokenizer["post_processor"][key][1] = ids[tokenizer["post_processor"][key][0]]
    out.mkdir(parents=True, exist_ok=True)
    compact = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(compact, encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (out / name).write_bytes((teacher / name).read_bytes())


def phrases(words: list[str], classes: list[str], count: int) -> list[str]:
    """Distinct texts: a class name, a word or two in a random template; frequent words come oftener."""
    picks = iter(random.choices(words, [1 / (i + 4000) for i in range(len(words))], k=3 * count))
    texts = {template.replace("{}", name): None for name in classes for template in TEMPLATES}
    texts |= {random.choice(TEMPLATES[:8]).replace("{}", word): None for word in words}
    while len(texts) < count:
        name, draw = next(picks), random.random()
        if draw < 0.55:
            name = f"{name} {next(picks) if draw < 0.5 else random.choice(classes)}"
        texts[random.choice(TEMPLATES).replace("{}", name)] = None
    texts = list(texts)[:count]
    random.shuffle(texts)
    return texts


@torch.no_grad()
def text_features(clip: CLIP, tokens: Tensor, fast: bool = False) -> Tensor:
    """Normalised features [C, D] in the order given; computed in order of length, to pad little."""
    features = torch.empty(len(tokens), clip.config.embed)
    for rows in clip.text.ends(tokens).argsort().split(1024):
        with bf16(fast):
            features[rows] = F.normalize(clip.encode_text(tokens[rows]).float(), dim=-1)
    return features


def start_text(student: CLIP, tokenizer: Tokenizer, teacher: Pretrained) -> None:
    """Token and position embeddings: the teacher's rows of the same pieces, on their principal axes."""
    old, new = (t.encoder.get_vocab() for t in (teacher.tokenizer, tokenizer))
    table = teacher.clip.text.embed.weight[[old[piece] for piece in sorted(new, key=new.__getitem__)]]
    axes = torch.linalg.eigh(table.T @ table).eigenvectors.flip(1)[:, : student.config.text.width]
    student.text.embed.weight.data.copy_(table @ axes)
    student.text.position.data.copy_(teacher.clip.text.position @ axes)


def batches(lengths: Tensor, size: int) -> list[Tensor]:
    """Every row once, in random order, rows of like length together."""
    parts = [part[lengths[part].argsort()] for part in torch.randperm(len(lengths)).split(16 * size)]
    rows = [batch for part in parts for batch in part.split(size)]
    random.shuffle(rows)
    return rows


def train_text(student: CLIP, tokenizer: Tokenizer, teacher: Pretrained, classes: list[str], args) -> float:
    """Distil the text tower: cosine + KL of the in-batch similarities. Returns the mean cosine on 2,000
    phrases kept out."""
    old = teacher.tokenizer.encoder.get_vocab()
    words = [p[:-4] for p in sorted(old, key=old.__getitem__) if p.endswith("</w>") and p.isascii()]
    texts = phrases([w for w in words if w.isalpha() and len(w) > 2], classes, args.phrases)
    targets = text_features(teacher.clip, teacher.tokenizer(texts), fast=True)
    tokens = tokenizer(texts)
    say(f"text: teacher done on {len(texts)} phrases")
    table, lengths = student.text.embed.weight, student.text.ends(tokens)[2000:]
    rest = [p for p in student.text.parameters() if p is not table]
    todo = [rows + 2000 for _ in range(args.text_epochs) for rows in batches(lengths, 512)]
    adam, schedule = optimiser(rest, [table], 2e-3, len(todo), 0.01)
    for step, rows in enumerate(todo, 1):
        with bf16():
            raw = student.encode_text(tokens[rows])
        s, t = F.normalize(raw.float(), dim=-1), targets[rows]
        cosine, itself = (s * t).sum(-1).mean(), -1e4 * torch.eye(len(rows))
        loss = 1 - cosine + 0.3 * divergence(20 * t @ t.T + itself, 20 * s @ s.T + itself)
        descend(loss, [table, *rest], adam, schedule)
        if step % 100 == 0:
            say(f"text step {step}/{len(todo)} loss {loss.item():.4f} cosine {cosine.item():.4f}")
    return (text_features(student, tokens[:2000]) * targets[:2000]).sum(-1).mean().item()


# --- images


def decode(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """A parquet of 64 x 64 pictures: uint8 [N, 3, 64, 64], labels [N], class names in label order."""
    table = pq.read_table(path)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table["image"].to_pylist()]
    pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures])
    pixels = pixels.view(-1, 64, 64, 3).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(table["label"].to_pylist()), features["label"]["names"]


def random_crops(x: Tensor) -> Tensor:
    """uint8 [B, 3, 64, 64] -> the same shape: a random resized crop (area 0.35-1); a fifth is shrunk to 24-56
    pixels and enlarged again; a quarter has a box pasted in from another picture."""
    count = len(x)
    area, ratio = torch.empty(count).uniform_(0.35, 1), torch.empty(count).uniform_(-0.25, 0.25).exp()
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # [B, 2]
    theta = torch.diag_embed(half)  # [B, 2, 2]
    theta = torch.cat([theta, ((1 - half) * (2 * torch.rand(count, 2) - 1))[..., None]], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x.float(), grid, "bicubic", "reflection", align_corners=False)
    rows, side = torch.rand(count) < 0.2, random.randint(24, 56)
    if rows.any():
        small = F.interpolate(x[rows], size=side, mode="bicubic", antialias=True)
        x[rows] = F.interpolate(small, size=64, mode="bicubic")
    low = torch.randint(0, 40, (count, 2, 1))
    line = torch.arange(64)
    inside = (line >= low) & (line < low + torch.randint(16, 48, (count, 2, 1)))  # [B, 2, 64]
    box = inside[:, 0, :, None] & inside[:, 1, None] & (torch.rand(count, 1, 1) < 0.25)
    return torch.where(box[:, None], x.roll(1, 0), x).round().clamp(0, 255).to(torch.uint8)


def attention(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, H, L, W/H] and what the heads mix [B, L, H, W/H]. Written out: at 65 tokens, with its
    backward, this is faster on a processor than the fused kernel."""
    q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    return q, k, v, mixed.transpose(1, 2)


def last_tokens(tower: ImageTower, x: Tensor) -> Tensor:
    """Normalised pixels -> what the last layer gives, class token first [B, 1 + N, W]."""
    tokens = tower.embed(tower.patches(x))
    first = tower.class_token.to(tokens.dtype).expand(len(tokens), 1, -1)
    x = tower.norm_pre(torch.cat([first, tokens], dim=1) + tower.position)
    for block in tower.blocks:
        mixed = attention(block, x)[3]
        x = x + block.out(mixed.flatten(2))
        x = x + block.fc2(block.activation(block.fc1(block.norm2(x))))
    return x


@torch.no_grad()
def image_targets(clip: CLIP, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's normalised joint features [B, D] and its normed patch tokens [B, N, W], both bf16."""
    features, patches = [], []
    for part in pictures.split(128):
        with bf16():
            x = clip.image.norm_post(last_tokens(clip.image, clip.config.preprocess(part.float() / 255)))
            features.append(F.normalize(clip.image.project(x[:, 0]).float(), dim=-1).bfloat16())
        patches.append(x[:, 1:].bfloat16())
    return torch.cat(features), torch.cat(patches)


def fit(linear: nn.Linear, a: Tensor, b: Tensor, ridge: float = 1e-2) -> None:
    """Set a layer by ridge regression from rows a [n, I] to rows b [n, O]."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    mean_a, mean_b = a.mean(0), b.mean(0)
    gram = (a - mean_a).T @ (a - mean_a)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    linear.weight.data.copy_(torch.linalg.solve(gram, (a - mean_a).T @ (b - mean_b)).T)
    if linear.bias is not None:
        linear.bias.data.copy_(mean_b - linear.weight @ mean_a)


def basis(streams: list[Tensor], width: int) -> Tensor:
    """[W, width]: the teacher's stream on its principal axes over all layers, each layer counted the same;
    turned so that a token's channel mean stays zero, which makes the narrow layer norm act like the wide one."""
    moment = torch.zeros(streams[0].shape[-1], streams[0].shape[-1])
    for x in streams:
        x = (x - x.mean(-1, keepdim=True)).flatten(0, 1)
        moment += x.T @ x / x.square().sum()
    axes = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, : width - 1]
    turn = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, width - 1)], 1)).Q[:, 1:]
    return axes @ turn.T


@torch.no_grad()
def start_image(student: CLIP, teacher: CLIP, pictures: Tensor, gain: float = 6.0) -> None:
    """Set every layer by regression, first to last, so that the student's stream follows the teacher's on its
    principal axes. One student layer stands for one or two of the teacher's: it takes over the heads and MLP
    units that move the stream most, and its outputs are fitted on what the student itself has so far."""
    ours, theirs, config = student.image, teacher.image, student.config.image
    streams, mixes, hidden = trace(theirs, teacher.config.preprocess(pictures.float() / 255))
    means = [x.mean((0, 1)) for x in streams]
    streams = [gain * (x - mean) for x, mean in zip(streams, means, strict=True)]
    axes = basis(streams, config.width)
    small = [(x - x.mean(-1, keepdim=True)) @ axes for x in streams]  # each [B, 1 + N, W of the student]
    pixels = ours.patches(student.config.preprocess(pictures.float() / 255))
    fit(ours.embed, pixels - pixels.mean(0), small[0][:, 1:] - small[0][:, 1:].mean(0))
    # The norm before the first layer is kept from acting by a large constant, as in the teacher.
    large = 8 * torch.ones(config.width)
    large[1::2] = -8
    ours.class_token.zero_()
    ours.position[0] = small[0][:, 0].mean(0) + large
    ours.position[1:] = (small[0][:, 1:] - ours.embed(pixels)).mean(0) + large
    ours.norm_pre.weight.fill_(8.0)
    ours.norm_pre.bias.copy_(-large)
    first = ours.class_token.expand(len(pixels), 1, -1)
    z = ours.norm_pre(torch.cat([first, ours.embed(pixels)], 1) + ours.position)
    deep, wide = len(theirs.blocks), len(ours.blocks)
    for i, block in enumerate(ours.blocks):
        span = range(i * deep // wide, (i + 1) * deep // wide)
        z = start_block(block, theirs, span, z, small[span.stop], mixes, hidden, axes, gain)
    last = ours.norm_post(z[:, 0])
    goal = theirs.project(theirs.norm_post(streams[-1][:, 0] / gain + means[-1]))
    fit(ours.project, last, goal, 3e-2)
    constant = (goal - ours.project(last)).mean(0)
    ours.norm_post.bias.copy_(torch.linalg.lstsq(ours.project.weight, constant).solution)


def trace(tower: ImageTower, x: Tensor) -> tuple[list[Tensor], list[tuple], list[Tensor]]:
    """The teacher's stream before every layer and at the end; (q, k, v, mixed) and MLP units of every layer."""
    first = tower.class_token.expand(len(x), 1, -1)
    x = tower.norm_pre(torch.cat([first, tower.embed(tower.patches(x))], 1) + tower.position)
    streams, mixes, hidden = [x], [], []
    for block in tower.blocks:
        mixes.append(attention(block, x))
        x = x + block.out(mixes[-1][3].flatten(2))
        hidden.append(block.fc1(block.norm2(x)))
        x = x + block.fc2(block.activation(hidden[-1]))
        streams.append(x)
    return streams, mixes, hidden


def start_block(block, theirs, span, z, goal, mixes, hidden, axes, gain) -> Tensor:
    """One layer of `start_image`: the stream z before it to the stream after it."""
    side, heads = mixes[0][3].shape[-1], []
    for layer in span:
        columns = theirs.blocks[layer].out.weight.split(side, 1)
        moved = [mixes[layer][3][:, :, h] @ (axes.T @ column).T for h, column in enumerate(columns)]
        heads += [((m - m.mean((0, 1))).square().mean().item(), layer, h) for h, m in enumerate(moved)]
    heads = sorted(heads, reverse=True)[: block.heads]
    chosen = [torch.cat([mixes[layer][j][:, h] for _, layer, h in heads], -1) for j in range(3)]
    fit(block.qkv, block.norm1(z), torch.cat(chosen, -1))
    blocks = [theirs.blocks[layer] for layer in span]
    acts = [F.gelu(hidden[layer]) for layer in span]
    later = gain * sum(b.fc2(act) for b, act in zip(blocks, acts, strict=True))
    later = (later - later.mean((0, 1)) - (later - later.mean((0, 1))).mean(-1, keepdim=True)) @ axes
    mixed = attention(block, z)[3].flatten(2)
    fit(block.out, mixed, goal - later - z)
    z = z + block.out(mixed)
    weight = [
        act.flatten(0, 1).std(0) * (axes.T @ b.fc2.weight).norm(dim=0) for b, act in zip(blocks, acts, strict=True)
    ]
    units = torch.cat(weight).topk(block.fc1.out_features).indices
    fit(block.fc1, block.norm2(z), torch.cat([hidden[layer] for layer in span], -1)[..., units])
    act = F.gelu(block.fc1(block.norm2(z)))
    fit(block.fc2, act, goal - z)
    return z + block.fc2(act)


def colours(x: Tensor) -> Tensor:
    """Brightness, contrast and saturation of each picture changed by up to 0.3: [B, 3, S, S] in [0, 1]."""
    change = 1 + 0.3 * (2 * torch.rand(3, len(x), 1, 1, 1) - 1)
    x = x * change[0]
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * change[1]
    grey = x.mean(1, keepdim=True)
    return (grey + (x - grey) * change[2]).clamp(0, 1)


def train_image(student: CLIP, texts: Tensor, crops: Tensor, targets: tuple[Tensor, Tensor], args, save) -> None:
    """Distil the image tower. texts [C, D] are the teacher's class texts, crops uint8 [M, 3, 64, 64], targets
    the teacher's answers to them; a flipped crop's answer is the same, with its patch tokens mirrored.
    Loss: cosine distance, as it is and less the mean feature, + KL over classes + smooth L1 on patch tokens."""
    tower, (features, patches), steps = student.image, targets, args.samples // args.batch
    head = nn.Linear(student.config.image.width, patches.shape[-1])
    centre, sample = features.float().mean(0), patches[:2000].float().flatten(0, 1)
    middle, spread = sample.mean(0), sample.std(0)
    with torch.no_grad():
        tokens = last_tokens(tower, student.config.preprocess(crops[:500].float() / 255))[:, 1:]
        fit(head, tokens, (patches[:500].float() - middle) / spread, 1e-3)
    parameters = [*tower.parameters(), *head.parameters()]
    thin = [p for p in parameters if p.ndim < 2 or p is tower.position]
    wide = [p for p in parameters if not any(p is q for q in thin)]
    adam, schedule = optimiser(wide, thin, args.rate, steps, 0.02)
    order = torch.cat([torch.randperm(len(crops)) for _ in range(args.samples // len(crops) + 1)])
    for step, rows in enumerate(order.split(args.batch)[:steps], 1):
        flip = (torch.rand(len(rows)) < 0.5).view(-1, 1, 1, 1)
        x, t = crops[rows].float() / 255, features[rows].float()
        grid = patches[rows].unflatten(1, (8, 8))  # [B, 8, 8, W]
        goal = (torch.where(flip, grid.flip(2), grid).flatten(1, 2).float() - middle) / spread
        with bf16():
            x = last_tokens(tower, student.config.preprocess(colours(torch.where(flip, x.flip(3), x))))
            raw, guess = tower.project(tower.norm_post(x[:, 0])), head(x[:, 1:])
        s = F.normalize(raw.float(), dim=-1)
        near = 1 - F.cosine_similarity(s - centre, t - centre).mean()
        kl = divergence(SCALE * t @ texts.T, SCALE * s @ texts.T)
        local = F.smooth_l1_loss(guess.float(), goal)
        descend(near + 1 - (s * t).sum(-1).mean() + kl + local, parameters, adam, schedule)
        if step % 50 == 0:
            say(f"image step {step}/{steps} centred {near.item():.3f} kl {kl.item():.3f} patches {local.item():.3f}")
        if step % 250 == 0 or step == steps:
            save(step)


# --- the folder


def write(student: CLIP, tokenizer: Path, out: Path) -> None:
    """Write the folder beside and put it in place of the old one; cards already there are kept."""
    beside, old = (out.with_name(f"{out.name}.{word}") for word in ("new", "old"))
    shutil.rmtree(beside, ignore_errors=True)
    write_pretrained(student, beside, torch.float16)
    for source in [*tokenizer.iterdir(), *(out / name for name in ("README.md", "card.json", "NOTICE"))]:
        if source.is_file():
            (beside / source.name).write_bytes(source.read_bytes())
    (beside / "model.safetensors").chmod(0o644)
    if out.is_dir():
        out.rename(old)
    beside.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def new_student(teacher: ClipConfig) -> CLIP:
    image, text = TowerConfig(192, 8, 3, 768, "gelu", 1e-6), TowerConfig(128, 4, 4, 384, "gelu", 1e-5)
    pixels = dataclasses.replace(teacher.preprocess, resize=64, crop=64)
    ids = dict(vocabulary=VOCABULARY, context=77, start_token=VOCABULARY - 2, end_token=VOCABULARY - 1)
    return CLIP(ClipConfig(image, text, teacher.embed, image_size=64, patch=8, preprocess=pixels, **ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of lit-s14-112")
    parser.add_argument("--data", type=Path, required=True, help="folder of tinyimagenet, with train.parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--phrases", type=int, default=150_000)
    parser.add_argument("--text-epochs", type=int, default=3)
    parser.add_argument("--crops", type=int, default=2, help="crops of every picture shown to the teacher")
    parser.add_argument("--samples", type=int, default=96_000, help="crops the student sees")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4e-4)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    torch.set_num_threads(args.threads)
    teacher, folder = read_pretrained(str(args.teacher)), args.out.with_name(args.out.name + ".tokenizer")
    pixels, labels, classes = decode(args.data / "train.parquet")
    student = new_student(teacher.clip.config)
    small_tokenizer(args.teacher, folder)
    tokenizer = load_tokenizer(folder, student.config)
    start_text(student, tokenizer, teacher)
    for _ in range(2):  # the second round draws new phrases
        say(f"text: cosine on phrases kept out {train_text(student, tokenizer, teacher, classes, args):.4f}")

    train = torch.arange(KEPT_OUT, len(pixels))  # the rows are shuffled already
    crops = torch.cat([random_crops(pixels[rows]) for _ in range(args.crops) for rows in train.split(250)])
    targets = image_targets(teacher.clip, crops)
    say(f"images: teacher done on {len(crops)} crops")
    prompts = [f"a photo of a {name}." for name in classes]
    texts, y = text_features(student, tokenizer(prompts)), labels[:KEPT_OUT]

    @torch.no_grad()
    def save(step: int) -> None:
        """Fit the logit scale on the pictures kept out, and write."""
        cosines = F.normalize(student.encode_image(pixels[:KEPT_OUT].float() / 255), dim=-1) @ texts.T
        scale = min(range(5, 101), key=lambda scale: F.cross_entropy(scale * cosines, y).item())
        student.logit_scale.fill_(math.log(scale))
        write(student, folder, args.out)
        right = (cosines.argmax(1) == y).float().mean().item()
        say(f"written at step {step}: {right:.1%} of the {KEPT_OUT} pictures kept out, logit scale {scale}")

    start_image(student, teacher.clip, crops[torch.randperm(len(crops))[:600]])
    train_image(student, text_features(teacher.clip, teacher.tokenizer(prompts)), crops, targets, args, save)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
