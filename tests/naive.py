"""The dual encoder once more, written for clarity from Hugging Face tensors: no fused kernel, no stacked q/k/v,
no cut of the text, explicit softmax. What the package computes is compared with this."""

from __future__ import annotations

import torch


def norm(x, t, name, eps):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(var + eps) * t[f"{name}.weight"] + t[f"{name}.bias"]


def linear(x, t, name):
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def activation(x, kind):
    if kind == "quick_gelu":
        return x / (1 + torch.exp(-1.702 * x))
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def layer(x, t, name, config, mask):
    heads, eps = config.heads, config.eps
    h = norm(x, t, f"{name}.layer_norm1", eps)
    q, k, v = (linear(h, t, f"{name}.self_attn.{c}_proj") for c in "qkv")
    size = x.shape[-1] // heads
    out = []
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5 + mask
        out.append(torch.softmax(scores, -1) @ v[..., part])
    x = x + linear(torch.cat(out, -1), t, f"{name}.self_attn.out_proj")
    h = norm(x, t, f"{name}.layer_norm2", eps)
    return x + linear(activation(linear(h, t, f"{name}.mlp.fc1"), config.activation), t, f"{name}.mlp.fc2")


def image(t, config, pixels, prompts=None):
    """Normalised pixels [B, 3, S, S] -> [B, D]; prompts [K, P, W] appended before the pre-norm."""
    tower, p = config.image, config.patch
    side = pixels.shape[-1] // p
    weight = t["vision_model.embeddings.patch_embedding.weight"]
    patches = [
        torch.einsum("bcij,wcij->bw", pixels[:, :, r * p : r * p + p, c * p : c * p + p], weight)
        for r in range(side)
        for c in range(side)
    ]
    first = t["vision_model.embeddings.class_embedding"].expand(len(pixels), -1)
    x = torch.stack([first, *patches], 1) + t["vision_model.embeddings.position_embedding.weight"]
    n = x.shape[1]
    if prompts is not None:
        x = torch.cat([x, torch.stack([prompts[0]] * len(x))], 1)
    x = norm(x, t, "vision_model.pre_layrnorm", tower.eps)
    for i in range(tower.layers):
        if prompts is not None and 0 < i < len(prompts):
            x = torch.cat([x[:, :n], torch.stack([prompts[i]] * len(x))], 1)
        x = layer(x, t, f"vision_model.encoder.layers.{i}", tower, 0.0)
    return norm(x[:, 0], t, "vision_model.post_layernorm", tower.eps) @ t["visual_projection.weight"].T


def text(t, config, tokens, prompts=None):
    """Token ids [C, any] padded to the whole context -> [C, D]; prompts [K, P, W], or each text's own
    [K, C, P, W], overwrite the places after the start."""
    tower, length = config.text, config.context
    padded = torch.full((len(tokens), length), config.end_token)
    padded[:, : tokens.shape[1]] = tokens
    x = t["text_model.embeddings.token_embedding.weight"][padded]
    position = t["text_model.embeddings.position_embedding.weight"]
    mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)
    for i in range(tower.layers):
        if prompts is not None and i < len(prompts):
            own = prompts[i] if prompts[i].dim() == 3 else torch.stack([prompts[i]] * len(x))
            size = own.shape[1]
            rows = own + position[1 : 1 + size] if i == 0 else own
            x = x + position if i == 0 else x
            x = torch.cat([x[:, :1], rows, x[:, 1 + size :]], 1)
        elif i == 0:
            x = x + position
        x = layer(x, t, f"text_model.encoder.layers.{i}", tower, mask)
    ends = [row.tolist().index(config.end_token) for row in padded]
    last = torch.stack([x[row, end] for row, end in enumerate(ends)])
    return norm(last, t, "text_model.final_layer_norm", tower.eps) @ t["text_projection.weight"].T


def check_text_gradients(ours, theirs, embed, tensors, prompts, random):
    """Features of one set of texts have the same gradients by the token embeddings and, where given, by prompts."""
    weight = torch.randn(ours.shape, generator=random, dtype=torch.float64)
    leaves = [embed, *([prompts] if prompts is not None else [])]
    others = [tensors["text_model.embeddings.token_embedding.weight"], *leaves[1:]]
    mine = torch.autograd.grad((ours * weight).sum(), leaves)
    for own, other in zip(mine, torch.autograd.grad((theirs * weight).sum(), others), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)
