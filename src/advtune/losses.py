"""The shared losses. Every one takes logits and returns one number an image, [B]: an attack sums them, so that
its gradient does not shrink with the batch, and a method averages them over the batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)[y] of each image: logits [B, C], labels y [B] -> [B]."""
    return F.cross_entropy(logits, y, reduction="none")


def kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c) of each image: logits p, q [B, C] -> [B].

    Both arguments are logits, divided by `temperature` and put through a softmax. By custom p is the target;
    nothing is detached here: the caller detaches what its equation treats as a constant. torch's
    `kl_div(q.log_softmax(), p.softmax())` has its arguments the other way round.
    """
    log_p, log_q = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
