"""An attack on the class texts instead of the images: edits of a few characters. No `Attack`: it sees the model."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advtune import distributed
from advtune.errors import UserError
from advtune.options import check, option
from advtune.progress import progress
from advtune.prompts import Learned
from advtune.rows import Setting
from advtune.untrusted import UNSEEN
from advtune.vlm import VLM, Classifier
from advtune.withstand import Outcome

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 -'"
AT_ONCE = 256  # texts in a batch
FURTHEST = 8  # edits, beyond which a name is simply another word
Key = tuple[float, float]  # how well a class holds; the attacker wants the least
Judge = Callable[[Sequence[str]], list[tuple[Key, str]]]  # the texts that the context holds, with their keys


@dataclass(frozen=True)
class TextEdits:
    """Characters of the true class's name inserted, removed or replaced (Charmer, arXiv:2405.04346; LEAF, 2506.03355).

    For each class the one edit that hurts most over all its images, found by forwards of the text tower; images,
    template and the other classes' texts stay. Never another class's name, never an empty one. All edits of one
    character are tried where `tries` allows, else all at the places where one probing character hurts most; from the
    best `beam` texts the search goes on. Nothing in it is random.
    """

    distance: int = option(1, "characters that may be inserted, removed or replaced", low=1, high=FURTHEST)
    alphabet: str = option(ALPHABET, "characters that are put in")
    loss: str = option(
        "accuracy", "lowered over the images of a class: how many are right, then their margin; or the margin, or "
        "minus the cross-entropy", choices=("accuracy", "margin", "ce"),
    )  # fmt: skip
    beam: int = option(5, "texts that the next edit starts from", low=1)
    tries: int = option(10000, "texts tried for a class and edit, at most", low=1)
    new_words: bool = option(True, "whether an edit may make a word that another class's name has")

    name = "text"
    norm = "levenshtein"

    def __post_init__(self) -> None:
        check(self, "attack text")
        if not self.alphabet or UNSEEN.search(self.alphabet) or set("{}") & set(self.alphabet):
            raise UserError("attack text: alphabet: give one or more characters, no brace and no control character")

    @property
    def threat(self) -> str:
        """What the attacker knows and changes, for the row."""
        most = "1 character" if self.distance == 1 else f"{self.distance} characters"
        return f"white-box on the text tower: the name of the true class, {most} at most, one edit for all its images"


# What `--attack` takes beside the attacks on images.
TEXTUAL: dict[str, Any] = {"text": TextEdits()}


def check_textual(attacks: Sequence[Any], **given: Any) -> None:
    """Raises UserError when a text attack is one of several or is given what goes with images alone."""
    if not any(isinstance(attack, TextEdits) for attack in attacks):
        return
    if len(attacks) > 1:
        raise UserError("attack text: one at a time; it has no eps to make a curve of")
    for name, value in given.items():
        if value:
            raise UserError(f"attack text changes no image: leave {name} out")


def edits(text: str, alphabet: str, places: Iterable[int] | None = None) -> list[str]:
    """Every other text at Levenshtein distance 1 with characters of the alphabet, once. places: only there, of the
    2 L + 1 of a text of L characters: before it, the first, between it and the second, ..."""
    found: dict[str, None] = {}
    for place in range(2 * len(text) + 1) if places is None else places:
        found |= dict.fromkeys(changed(text, place, letter) for letter in ("", *alphabet))
    found.pop(text, None)
    return list(found)


def changed(text: str, place: int, letter: str) -> str:
    """The text with a letter or nothing at a place, counted as in `edits`."""
    return text[: place // 2] + letter + text[place // 2 + place % 2 :]


def search(attack: TextEdits, name: str, allowed: Callable[[str], bool], judge: Judge) -> str:
    """The text within the attack's distance of the name, or the name itself, of the least key; of equals the first."""
    beam = judge([name])
    if not beam:
        return name
    best, seen = beam[0], {name}
    for _ in range(attack.distance):
        found: dict[str, None] = {}
        for _, text in beam:
            places = promising(attack, text, judge, attack.tries // len(beam))
            found |= dict.fromkeys(each for each in edits(text, attack.alphabet, places) if each not in seen)
        seen.update(found)
        ranked = sorted(judge(list(found)), key=lambda each: each[0])
        best = min(best, next((each for each in ranked if allowed(each[1])), best), key=lambda each: each[0])
        beam = ranked[: attack.beam]  # a text that is not allowed may lie on the way to one that is
        if not beam or (attack.loss == "accuracy" and best[0][0] == 0):
            break
    return best[1]


def promising(attack: TextEdits, text: str, judge: Judge, most: int) -> list[int] | None:
    """The places where a probing character hurts most, as many as `most` texts allow; none when all fit."""
    places, letters = range(2 * len(text) + 1), 1 + len(attack.alphabet)
    if len(places) * letters <= most:
        return None
    probe = " " if " " in attack.alphabet else attack.alphabet[0]
    keys = {each: key for key, each in judge([changed(text, place, probe) for place in places])}
    ranked = sorted(places, key=lambda place: keys.get(changed(text, place, probe), (torch.inf, 0.0)))
    return sorted(ranked[: max(1, most // letters)])


def rule(attack: TextEdits, model: VLM, classes: Sequence[str], own: int) -> Callable[[str], bool]:
    """Whether a text may stand for the class number `own`: a name that the tokenizer reads as no other class's."""
    pieces, others = model.tokenizer.pieces, [name for c, name in enumerate(classes) if c != own]
    taken = {tuple(pieces(name)) for name in others} | {()}
    names = {folded(name) for name in others}
    words = {word for name in others for word in folded(name).split()} - set(folded(classes[own]).split())

    def allowed(text: str) -> bool:
        same = tuple(pieces(" ".join(text.split()))) in taken or folded(text) in names
        return not same and (attack.new_words or words.isdisjoint(folded(text).split()))

    return allowed


def folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def one_class(model: VLM, c: int) -> VLM:
    """The model with the text context of class number c for whatever name, where each class has its own."""
    text = model._prompts().text
    if text is None or text.dim() < 4:
        return model
    alone = model.with_fixed(Learned(text[:, c]))
    alone.classes = ()
    return alone


def logits_of(model: VLM, template: str, features: Tensor, texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """Those of the texts that the context holds, K, and their logits [n, K] with the unit vectors [n, D]."""
    try:
        tokens = model.tokens(texts, template)
    except UserError:
        if len(texts) == 1:
            return [], features.new_empty(len(features), 0)
        found = [logits_of(model, template, features, [text]) for text in texts]
        return [text for kept, _ in found for text in kept], torch.cat([logits for _, logits in found], 1)
    return list(texts), model.towers(tokens)[1](features)


def keys_of(z: Tensor, others: Tensor, right: Tensor, loss: str) -> list[Key]:
    """The key of each text: its logits z [n, K], those of the other classes [n, C - 1], whether an image is right
    without an edit [n]."""
    margin = z - others.amax(1, keepdim=True)
    count = ((margin > 0) & right[:, None]).sum(0).double()
    if loss == "accuracy":
        return list(zip(count.tolist(), margin.double().sum(0).tolist(), strict=True))
    log_p = z - torch.logaddexp(z, others.logsumexp(1, keepdim=True))
    total = (margin if loss == "margin" else log_p).double().sum(0)
    return list(zip(total.tolist(), count.tolist(), strict=True))


def attack_class(
    s: Setting, attack: TextEdits, c: int, features: Tensor, z: Tensor
) -> tuple[str, Tensor, Tensor, int]:  # fmt: skip
    """The text found for class number c, whether its images are right as they are, and with it [n], and how many texts
    were tried: unit vectors [n, D], logits [n, C]."""
    name, template, model = s.task.classes[c], s.task.template, one_class(s.model, c)
    right = z.argmax(1) == c
    others, tried = torch.cat([z[:, :c], z[:, c + 1 :]], 1), 0

    def judge(texts: Sequence[str]) -> list[tuple[Key, str]]:
        nonlocal tried
        tried, found = tried + len(texts), []
        for begin in range(0, len(texts), AT_ONCE):
            kept, logits = logits_of(model, template, features, texts[begin : begin + AT_ONCE])
            found += list(zip(keys_of(logits, others, right, attack.loss), kept, strict=True))
        return found

    text = search(attack, name, rule(attack, s.model, s.task.classes, c), judge) if bool(right.any()) else name
    if text == name:
        return name, right, right, tried
    edited = logits_of(model, template, features, [text])[1].squeeze(1)
    return text, right, right & (edited > others.amax(1)), tried


@torch.no_grad()
def withstand_edits(s: Setting, attack: TextEdits, features: Tensor, compare: Classifier) -> tuple[Tensor, Outcome]:
    """Which images are right [N], and which stay so when the text of their class is edited: unit vectors [N, D] of
    all images and what makes logits of them. Several processes take the classes in turn."""
    begin, y, count = time.monotonic(), s.images.y, len(s.task.classes)

    def work() -> dict[int, tuple[str, Tensor, Tensor, int]]:
        found = {}
        with progress("texts", count, "name", s.show) as advance:
            for c in range(distributed.rank(), count, distributed.world()):
                own = features[y == c].to(s.model.device)
                if len(own):
                    text, right, still, tried = attack_class(s, attack, c, own, compare(own))
                    found[c] = (text, right.cpu(), still.cpu(), tried)
                advance(min(distributed.world(), count - c))
        return found

    clean, stands = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y, dtype=torch.bool)
    changes: dict[str, str] = {}
    done = {c: each for share in distributed.attempt(work) for c, each in share.items()}
    for c in sorted(done):
        text, clean[y == c], stands[y == c], _ = done[c]
        changes |= {} if text == s.task.classes[c] else {s.task.classes[c]: text}
    stage = {
        "attack": attack.name, "attacked": int(clean.sum()), "fell": int((clean & ~stands).sum()),
        "seconds": round(time.monotonic() - begin, 2), "tried": sum(tried for *_, tried in done.values()),
        "edits": changes,
    }  # fmt: skip
    return clean, Outcome(stands, {}, [stage])
