"""Answers as HTML: a verdict in words, and for each model its pictures, its probabilities and the PNG to take away."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

from advtune.serve.play import Answer

SHOWN = 5  # classes with bars: the likeliest before and after
TIP = "Choose a picture and press Attack."


def sentence(text: str) -> str:
    """One line for the reader, in place of an answer."""
    return f'<div class="at-note" role="alert">{escape(text)}</div>'


def chosen(picture: bytes, label: str) -> str:
    """The chosen picture as the models get it."""
    known = f"its class: <b>{escape(label)}</b>" if label else "your own"
    return f'<div class="at-chosen">{image(picture, "the chosen picture")}<span>{known}</span></div>'


def render(answers: Mapping[str, Answer], label: str, attack: str) -> str:
    """The answers of all models, by title. label: the class of the picture, if it is known."""
    verdict = "".join(f"<p>{said(title, each, label)}</p>" for title, each in answers.items())
    cards = "".join(card(title, each, attack, number) for number, (title, each) in enumerate(answers.items()))
    return f'<div class="at-verdict" role="status">{verdict}</div><div class="at-cards">{cards}</div>'


def said(title: str, answer: Answer, label: str) -> str:
    """What happened, in a sentence."""
    before, after, _ = (f"<b>{escape(answer.classes[i])}</b>" for i in answer.says)
    name = escape(title)
    right = f" ({'right' if answer.classes[answer.says[0]] == label else 'wrong'})" if label in answer.classes else ""
    if answer.wrong_before:
        target = escape(answer.classes[answer.target])
        return f"{name}: said {before}, not {target}, before any attack. There was nothing to lead it away from."
    if answer.fooled:
        return f"{name}: <em>fooled</em>. It said {before}{right}, now it says {after}."
    return f"{name}: <em>withstood</em>. It said {before}{right}, and still does."


def card(title: str, answer: Answer, attack: str, number: int) -> str:
    """One model: badge, three pictures, bars, what 8 bits did, download."""
    state = "fooled" if answer.fooled else "wrong" if answer.wrong_before else "stood"
    badge = {"fooled": "✗ fooled", "wrong": "wrong before", "stood": "✓ withstood"}[state]
    pictures = "".join(
        f"<figure>{image(data, alt)}<figcaption>{caption}</figcaption></figure>"
        for data, alt, caption in (
            (answer.picture, "the picture", "picture"),
            (answer.difference, "the amplified perturbation", f"+ change, {answer.gain:.0f}×"),
            (answer.png, "the adversarial picture", "= attacked"),
        )
    )
    before, after, _ = (escape(answer.classes[i]) for i in answer.says)
    name = f"adversarial-{attack}-{number + 1}.png"
    return (
        f'<section class="at-card at-{state}" data-state="{state}" data-before="{before}" data-after="{after}">'
        f"<h3><span>{escape(title)}</span>"
        f'<span class="at-badge">{badge}</span></h3><div class="at-pictures">{pictures}</div>{bars(answer)}'
        f'<p class="at-small">{eight_bits(answer)}</p>'
        f'<a class="at-get" download="{name}" href="{source(answer.png)}">Download the attacked picture (PNG)</a>'
        "</section>"
    )


def bars(answer: Answer) -> str:
    """Probabilities before and after, of the likeliest classes."""
    ranked = sorted(range(len(answer.classes)), key=lambda i: -max(answer.before[i], answer.after[i]))[:SHOWN]
    rows = "".join(
        f'<tr><th scope="row">{escape(answer.classes[i])}</th><td>{bar(answer.before[i], "before")}'
        f"{bar(answer.after[i], 'after')}</td></tr>"
        for i in ranked
    )
    key = '<div class="at-key"><i class="at-before"></i> before <i class="at-after"></i> after the attack</div>'
    return f'{key}<table class="at-bars">{rows}</table>'


def bar(share: float, when: str) -> str:
    percent = f"{100 * share:.0f} %"
    style = f"width:{max(0.5, 78 * share):.1f}%"
    return f'<div><i class="at-{when}" style="{style}" title="{when}: {percent}"></i><small>{percent}</small></div>'


def eight_bits(answer: Answer) -> str:
    """What rounding to whole levels did to the attack."""
    now = f"{escape(answer.classes[answer.says[2]])}, {100 * answer.rounded[answer.says[2]]:.0f} %"
    if answer.distance == 0 == answer.png_distance:
        return f"No pixel moved: the PNG is the picture itself, with its 8 bits a channel. The model says {now}."
    moved = f"No pixel moved by more than {answer.distance:.3g}/255; in the PNG, by {answer.png_distance:.0f}/255."
    if answer.png_distance > answer.distance + 0.1:
        moved = f"{moved[:-1]}, more than that: rounding goes up as well as down."
    if answer.wrong_before:
        return f"{moved} Of the PNG, with its 8 bits a channel, the model says {now}."
    if answer.png_distance == 0:
        return f"{moved} Rounding to the PNG's 8 bits a channel undid every change: the model says {now}."
    if answer.fooled and not answer.png_fools:
        return f"{moved} Rounding to the PNG's 8 bits a channel undid the attack: the model says {now} again."
    if answer.fooled:
        return f"{moved} Rounded to the PNG's 8 bits a channel it still fools the model, which says {now}."
    if answer.png_fools:
        return f"{moved} The attack failed, but rounded to the PNG's 8 bits a channel it fools the model: {now}."
    return f"{moved} Rounded to the PNG's 8 bits a channel it fools the model no more than before: {now}."


def image(png: bytes, alt: str) -> str:
    return f'<img src="{source(png)}" alt="{escape(alt)}">'


def source(png: bytes) -> str:
    """A picture in the page itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
