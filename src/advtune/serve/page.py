"""The page in Gradio: what is chosen on the left, what the models say on the right. No name is looked up elsewhere."""

from __future__ import annotations

import io
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from advtune.data import Task
from advtune.data.images import FORMATS, to_rgb, upright
from advtune.data.templates import BETWEEN
from advtune.errors import UserError
from advtune.serve import panels
from advtune.serve.models import Example, Shelf, around, words
from advtune.serve.play import (
    EPS,
    MEGABYTES,
    OFFERS,
    TEMPLATE_LETTERS,
    TEMPLATES,
    Offer,
    check_template,
    make_attack,
    play,
    read_classes,
    read_picture,
    to_png,
)
from advtune.untrusted import read_bytes

OWN = "what each model says"
INTRO = """# Fool the model
Pick a picture: a change too small to see is made to it, and you read what each model says before and after."""
CSS = Path(__file__).with_name("page.css")
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # names alone: nothing is fetched
THUMB = 96
KEPT = 600  # seconds that an upload lies on the disk
FIRST = "pgd"
SHOW = """() => {
    const answer = document.getElementById("answer");
    if (answer.getBoundingClientRect().top > 0.7 * innerHeight) answer.scrollIntoView();
}"""  # on a phone the answer is below


def build(shelf: Shelf, task: Task, shown: list[Example], start: int = 0, eps: float = 1) -> gr.Blocks:
    """The page over these models, words and pictures; picture `start` and eps (in 255ths) are there to begin with."""
    first = shown[start]
    with gr.Blocks(title="advtune: fool the model", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        picture, refused = gr.State(first), gr.State("")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                preview, gallery, upload = _picture(shown)
                with gr.Group():
                    names = gr.Textbox(words(task), label="Class names, with commas between them", lines=2, max_lines=5)
                    attack = gr.Dropdown([(o.title, key) for key, o in OFFERS.items()], value=FIRST, label="Attack")
                    radius = gr.Slider(
                        0, EPS, eps, step=0.5, label="eps: a pixel may change by so many 255ths", buttons=[],
                        elem_id="eps",
                    )  # fmt: skip
                    budget = _budget(OFFERS[FIRST])
                    tuned = gr.Dropdown(list(shelf.tuned), label="Tuned model", visible=len(shelf.tuned) > 1)
                go = gr.Button("Attack", variant="primary", size="lg", elem_id="attack")
                with gr.Accordion("More", open=False):
                    away = gr.Dropdown([OWN, *task.classes], value=OWN, label="Lead away from")
                    template = gr.Textbox(
                        around(task),
                        label="Text around a class name; several, with | between them, are averaged",
                        max_length=TEMPLATES * (TEMPLATE_LETTERS + len(BETWEEN)),
                        max_lines=1,
                    )
            with gr.Column(scale=5, min_width=320):
                out = gr.HTML(panels.sentence(panels.TIP), elem_id="answer")
        asked = [picture, names, attack, radius, budget, tuned, away, template]
        # What is sent comes as it is: what is out of bounds gets our sentence, not an error of Gradio's.
        plain: dict[str, Any] = {"api_visibility": "private", "preprocess": False}
        quiet = plain | {"show_progress": "hidden", "queue": False}
        loud = plain | {"concurrency_id": "model", "concurrency_limit": 1}

        def answer(*given: Any) -> str:
            return answered(shelf, *given)

        def pick(event: gr.SelectData) -> tuple[Example, str]:
            return shown[event.index], seen(shown[event.index], shelf)

        def receive(file: str | None, before: Example) -> tuple[Example, str, str, str]:
            return *received(shelf, file, before), ""  # what was said of another picture goes

        def answer_to(refusal: str, *given: Any) -> str:
            return panels.sentence(refusal) if refusal else answered(shelf, *given)

        picked = gallery.select(pick, None, [picture, preview], **quiet)
        for done in (picked.then(answer, asked, out, **loud), go.click(answer, asked, out, **loud)):
            done.then(None, js=SHOW)
        # Here Gradio must look first: it holds that the path is of a file that was uploaded.
        sent = upload.upload(receive, [upload, picture], [picture, preview, refused, out], api_visibility="private")
        sent.then(answer_to, [refused, *asked], out, **loud)
        attack.change(lambda name: _budget(OFFERS[name]), attack, budget, **quiet)
        gr.on([names.blur, names.submit], leads, [names, away], away, **quiet)
        page.load(lambda: seen(first, shelf), None, preview, **quiet)
        again = [names.submit, radius.release, budget.release, tuned.input, away.input, page.load]
        gr.on(again, answer, asked, out, trigger_mode="always_last", **loud)
    return page


def _picture(shown: list[Example]) -> tuple[gr.HTML, gr.Gallery, gr.UploadButton]:
    preview = gr.HTML(elem_id="chosen")
    gallery = gr.Gallery(
        [(thumb(each.data), None) for each in shown], label="Examples", show_label=False, columns=7, height="auto",
        allow_preview=False, buttons=[], object_fit="cover", interactive=False, elem_id="examples", format="png",
    )  # fmt: skip
    return preview, gallery, gr.UploadButton("Upload a picture", file_types=["image"], size="sm", elem_id="upload")


def _budget(offer: Offer) -> gr.Slider:
    return gr.Slider(
        1, max(2, offer.most), offer.default, step=1, label=offer.field.capitalize(), visible=bool(offer.field),
        buttons=[],
    )  # fmt: skip


def answered(
    shelf: Shelf, picture: Example, names: str, attack: str, eps: float | None, budget: float | None,
    tuned: str | None, away: str, template: str,
) -> str:  # fmt: skip
    """What the models say of the picture before and after the attack, or a sentence that says what to mend. `away`
    counts where it is among the names; else it goes back to OWN, as the page shows it (see `leads`)."""
    try:
        classes, template = read_classes(names), check_template(template)
        made = make_attack(attack, eps, budget)
        target = classes.index(away) if away in classes else None
        answers = {
            title: play(model, read_picture(picture.data, model.side), classes, template, made, target)
            for title, model in shelf.pair(tuned).items()
        }
    except UserError as error:
        return panels.sentence(str(error))
    return panels.render(answers, picture.label, attack)


def received(shelf: Shelf, file: str | None, before: Example) -> tuple[Example, str, str]:
    """The picture that was sent, how it is seen, and why it is refused: nothing, or a sentence with the one before."""
    try:
        if not file:
            raise UserError("No file came; choose a picture.")
        sent = Example(read_bytes(Path(file), MEGABYTES * 1_000_000), "")
        forget(os.environ.get("GRADIO_TEMP_DIR"))
        return sent, seen(sent, shelf), ""
    except UserError as error:
        return before, seen(before, shelf), str(error)
    except OSError as error:
        return before, seen(before, shelf), f"The file cannot be read: {error.strerror}."


def forget(uploads: str | None) -> None:
    """Remove what was sent long ago, so that a page that is up for days keeps little; two visitors who send the same
    picture share a file, which is therefore not removed when the first has been answered."""
    for path in sorted(Path(uploads).rglob("*"), reverse=True) if uploads else ():
        with suppress(OSError):  # another call was first, or a folder is not empty
            if time.time() - path.lstat().st_mtime > KEPT:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def seen(picture: Example, shelf: Shelf) -> str:
    """The picture as the models get it. Raises UserError when it cannot be read."""
    model = next(iter(shelf.pair(next(iter(shelf.tuned), None)).values()))
    return panels.chosen(to_png(255 * read_picture(picture.data, model.side)), picture.label)


def leads(names: str, before: str) -> gr.Dropdown:
    """What can be led away from, with these class names."""
    try:
        choices = [OWN, *read_classes(names)]
    except UserError:
        choices = [OWN]
    return gr.Dropdown(choices, value=before if before in choices else OWN)


def thumb(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        small = to_rgb(upright(opened))
    small.thumbnail((THUMB, THUMB))
    return small
