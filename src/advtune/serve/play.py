"""What the page asks, as plain functions: picture, class names and attack -> what a model says before and after."""

from __future__ import annotations

import io
import unicodedata
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advtune.attacks import ATTACKS, Attack
from advtune.data.images import decode
from advtune.data.templates import BETWEEN, parts
from advtune.draws import seeded
from advtune.errors import UserError
from advtune.options import as_options, fill
from advtune.untrusted import UNSEEN
from advtune.vlm import VLM

MEGABYTES, MEGAPIXELS, ASPECT = 10, 40, 20  # of an upload: encoded size, pixels, longer side by shorter
CLASSES, LETTERS, TEMPLATE_LETTERS, TEMPLATES = 100, 80, 200, 10
EPS = 16  # the largest, in 255ths of a pixel's range
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
LEVELS = 255


@dataclass(frozen=True)
class Offer:
    """An attack on the page: its title, and the field that says how long it tries, with its default and its most."""

    title: str
    field: str = ""
    default: int = 1
    most: int = 1


OFFERS = {
    "pgd": Offer("PGD: many gradient steps", "steps", 20, 200),
    "apgd-ce": Offer("APGD: finds its own step length", "steps", 20, 200),
    "cw-pgd": Offer("CW-PGD: PGD on the margin", "steps", 20, 200),
    "fgsm": Offer("FGSM: one gradient step"),
    "square": Offer("Square: needs no gradient", "queries", 100, 1000),
    "noise": Offer("Noise: no attack, to compare", "draws", 10, 200),
}


@dataclass(frozen=True)
class Answer:
    """What a model says of a picture before and after an attack. Probabilities are over `classes`.

    before, after, rounded: of the picture, of the adversarial one, and of the PNG, whose pixels have 8 bits. target:
    the class that the attack led away from. picture, png, difference: PNG files; the difference is amplified, grey is
    no change. distance, png_distance: the largest change of a pixel, in 255ths.
    """

    classes: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    rounded: tuple[float, ...]
    target: int
    picture: bytes
    png: bytes
    difference: bytes
    gain: float
    distance: float
    png_distance: float

    @property
    def says(self) -> tuple[int, int, int]:
        """The likeliest class before, after, and of the PNG."""
        before, after, rounded = (max(range(len(p)), key=p.__getitem__) for p in self.stages)
        return before, after, rounded

    @property
    def stages(self) -> tuple[tuple[float, ...], ...]:
        return self.before, self.after, self.rounded

    @property
    def wrong_before(self) -> bool:
        """Whether the model did not say the target to begin with: there is nothing to lead it away from."""
        return self.says[0] != self.target

    @property
    def fooled(self) -> bool:
        return not self.wrong_before and self.says[1] != self.target

    @property
    def png_fools(self) -> bool:
        return not self.wrong_before and self.says[2] != self.target


def read_picture(data: bytes, side: int) -> Tensor:
    """An encoded picture -> [1, 3, side, side] in [0, 1]: upright, short side to `side`, cut from the centre, as in
    evaluation. Raises UserError, a sentence for the page, for what is too large or not a picture."""
    if len(data) > MEGABYTES * 1_000_000:
        raise UserError(f"The file has {len(data) / 1e6:.1f} MB; give one of at most {MEGABYTES} MB.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        raise UserError(f"The picture has too many pixels; give one of at most {MEGAPIXELS} million.") from None
    except Exception:  # Pillow raises nearly anything on hostile bytes
        raise UserError("This is not a picture that can be read; give a PNG, JPEG or WebP file.") from None
    if width * height > MEGAPIXELS * 1_000_000:
        raise UserError(f"The picture has {width * height / 1e6:.0f} million pixels; give one of at most {MEGAPIXELS}.")
    if max(width, height) > ASPECT * min(width, height):
        raise UserError(f"The picture is {width} by {height} pixels, too narrow; cut it nearer to a square.")
    try:
        pixels = decode(data, side)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise UserError(f"The picture cannot be read ({reason}); give another file.") from None
    return torch.from_numpy(pixels.copy()).float()[None] / LEVELS


def read_classes(text: str) -> tuple[str, ...]:
    """Names on lines of their own, or on one with commas between them. Raises UserError, a sentence for the page."""
    parts = (text := text or "").strip().splitlines()
    names = tuple(name for part in (parts if len(parts) > 1 else text.split(",")) if (name := " ".join(part.split())))
    if len(names) < 2:
        raise UserError("Type two or more class names with commas between them, such as: cat, dog.")
    if len(names) > CLASSES:
        raise UserError(f"{len(names)} class names are too many for the page; give at most {CLASSES}.")
    seen: dict[str, str] = {}
    for name in names:
        if len(name) > LETTERS:
            raise UserError(f"The class name “{name[:20]}…” is too long; give at most {LETTERS} letters.")
        if UNSEEN.search(name):
            raise UserError("A class name holds a control character; leave it out.")
        if set("{}") & set(name):
            raise UserError(f"The class name “{name}” holds a brace; leave it out.")
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            raise UserError(f"The class name “{name}” is given twice; give each once.")
        seen[folded] = name
    return names


def check_template(template: str) -> str:
    """The text around a class name, or several with " | " between them. Raises UserError unless each holds exactly one
    {} and no other brace."""
    found = parts(" ".join((template or "").split()))
    if len(found) > TEMPLATES:
        raise UserError(f"{len(found)} texts around the names are too many for the page; give at most {TEMPLATES}.")
    for each in found:
        braces = each.count("{}") == 1 and not set("{}") & set(each.replace("{}", ""))
        if not braces or UNSEEN.search(each) or len(each) > TEMPLATE_LETTERS:
            raise UserError("The text around the names must hold {} once, where the name goes: a photo of a {}.")
    return BETWEEN.join(found)


def make_attack(name: str, eps: float | None, budget: float | None) -> Attack:
    """An attack on offer, l_inf; eps in 255ths, `budget` its steps, queries or draws; None is an empty field. It does
    not stop at the first success, which is often only just one. Raises UserError for what is not offered."""
    if name not in OFFERS:
        raise UserError(f"The page has no attack {name}; choose one of {', '.join(OFFERS)}.")
    offer = OFFERS[name]
    radius = within("eps, in 255ths of a pixel's range,", eps, 0, EPS)
    known = as_options(ATTACKS[name])
    tries = {offer.field: int(within(f"The number of {offer.field}", budget, 1, offer.most))} if offer.field else {}
    options = {"eps": radius / LEVELS} | tries
    return fill(ATTACKS[name], options | ({"early_stop": False} if "early_stop" in known else {}), f"attack {name}")


def within(what: str, value: float | None, low: int, high: int) -> float:
    """The number that was typed. Raises UserError, a sentence for the page, when it is none or out of bounds."""
    if not isinstance(value, int | float):
        raise UserError(f"{what} is empty; choose one from {low} to {high}.")
    if not low <= value <= high:
        raise UserError(f"{what} is {value:g}; choose one from {low} to {high}.")
    return value


def play(
    model: VLM, x: Tensor, classes: tuple[str, ...], template: str, attack: Attack, target: int | None = None
) -> Answer:
    """Attack one picture x [1, 3, S, S] in [0, 1]; `target` is led away from, by default what the model says.

    The same every time. Raises UserError where the model knows only its own classes or a name is too long.
    """
    x = x.to(model.device)
    with torch.no_grad():
        f = model.classifier(model.tokens(classes, template))
        before = f(x).softmax(1)[0]
    target = int(before.argmax()) if target is None else target
    with seeded(0, model.device):
        found = attack(f, x, torch.tensor([target], device=model.device))
    png = (found * LEVELS).round()
    with torch.no_grad():
        after, rounded = f(torch.cat([found, png / LEVELS])).softmax(1)
    gain = 1 / (2 * attack.eps) if attack.eps else 1.0
    return Answer(
        classes, tuple(before.tolist()), tuple(after.tolist()), tuple(rounded.tolist()), target,
        picture=to_png(x * LEVELS), png=to_png(png), difference=to_png((0.5 + gain * (found - x)) * LEVELS), gain=gain,
        distance=LEVELS * float((found - x).abs().max()), png_distance=float((png - LEVELS * x).abs().max()),
    )  # fmt: skip


def to_png(levels: Tensor) -> bytes:
    """One image [1, 3, S, S] of levels 0 to 255 as a PNG file, which loses nothing but what is beyond 8 bits."""
    pixels = levels[0].detach().round().clamp(0, LEVELS).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
    return stream.getvalue()
