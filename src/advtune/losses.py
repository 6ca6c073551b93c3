"""The shared losses. Every one takes logits and returns one number an image, [B]: an attack sums them, so that
its gradient does not shrink with the batch, and a method averages them over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advtune.errors import UserError


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)[y] of each image: logits [B, C], labels y [B] -> [B]."""
    return F.cross_entropy(logits, y, reduction="none")


def soft_cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """-sum_c p_c log softmax(logits)_c of each image: logits [B, C], probabilities p [B, C] -> [B]."""
    return -(p * logits.log_softmax(-1)).sum(-1)


def squared_l2(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||^2 of each image: embeddings [B, D] -> [B]."""
    return (a - b).square().sum(-1)


def kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c) of each image: logits p, q [B, C] -> [B].

    Both arguments are logits, divided by `temperature` and put through a softmax. By custom p is the target;
    nothing is detached here: the caller detaches what its equation treats as a constant. torch's
    `kl_div(q.log_softmax(), p.softmax())` has its arguments the other way round.
    """
    log_p, log_q = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def relations(p: Tensor, q: Tensor) -> Tensor:
    """1 - correlation of the logits over the classes, in [0, 2]: logits p, q [B, C] -> [B].

    Which classes an image is nearer to, whatever the scale and the shift of the logits: the relation between classes
    of DIST (Huang et al., arXiv:2205.10536), on logits. Raises UserError for fewer than three classes: the correlation
    of two is 1 or -1 and has no slope.
    """
    if p.shape[-1] < 3:
        raise UserError(f"relations among {p.shape[-1]} classes say nothing; compare logits, or give three classes")
    return 1 - F.cosine_similarity(p - p.mean(-1, keepdim=True), q - q.mean(-1, keepdim=True), dim=-1)


def confidence(clean: Tensor, frozen: Tensor, y: Tensor) -> Tensor:
    """p0(y) / (p0(y) + p(y)) of each image, how far to lean on the frozen model: logits [B, C] of the tuned model and
    of the frozen one, labels y [B] -> [B]. CAPT's adaptive balance, reconstructed."""
    return torch.sigmoid(cross_entropy(clean, y) - cross_entropy(frozen, y))  # with p = exp(-ce)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{c != y} z_c - z_y of each image, above 0 when it is misclassified: logits [B, C], labels y [B] -> [B].

    Carlini and Wagner's f_6 without its bound (arXiv:1608.04644); papers call PGD on it CW.
    """
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, (max_{c != y} z_c - z_y) / (z_1st - z_3rd) (Croce and Hein, arXiv:2003.01690):
    it does not change with the logit scale. With two classes there is no third: the margin alone.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, to: Tensor) -> Tensor:
    """(z_to - z_y) / (z_1st - (z_3rd + z_4th) / 2), to be raised: logits [B, C], labels y, targets `to` [B] -> [B].

    Croce and Hein, arXiv:2003.01690. With two or three classes there is no fourth: z_to - z_y alone.
    """
    z_to, z_y = (logits.gather(1, c[:, None]).squeeze(1) for c in (to, y))
    if logits.shape[1] < 4:
        return z_to - z_y
    top = logits.topk(4, dim=1).values
    return (z_to - z_y) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)
