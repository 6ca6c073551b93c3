"""A tuned run in a form that others load: a Hugging Face folder, an ONNX classifier, the prompts alone; with a card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from advtune.data.task import Words
from advtune.disk import naming
from advtune.errors import UserError, near
from advtune.export.card import card
from advtune.export.folder import write_folder
from advtune.export.graph import check_installed, write_onnx
from advtune.export.hub import check_push, upload
from advtune.export.learned import write_learned
from advtune.export.source import Source, open_source

WRITERS: dict[str, Callable[[Source, Path], dict[str, Any]]] = {
    "huggingface": write_folder,
    "onnx": write_onnx,
    "prompts": write_learned,
}


def export(
    name: str | Path, to: str, out: str | Path, *, classes: Words | None = None, template: str | None = None,
    push: str | None = None, private: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a run folder or a backbone to the folder `out`, which is new or empty and is whole or not there.

    to: "huggingface" (tuned towers, for transformers), "onnx" (any model, with fixed classes) or "prompts" (what was
    learned, with how it enters the towers). classes and template: by default those the run was tuned on. push:
    OWNER/NAME on the Hugging Face hub, to upload the folder to. Returns what was written: out, to, files with their
    sizes in bytes, the writer's facts, url, and `lines` for a person. Raises UserError for what cannot be written so,
    and when it cannot be uploaded; the folder stays then.
    """
    out = Path(out)
    if to not in WRITERS:
        raise UserError(f"--to {to}: {near(to, WRITERS)}")
    if not out.name:
        raise UserError(f"--out {out}: give the folder a name")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; choose another --out, or remove it")
    if to == "onnx":
        check_installed()
    if push:
        check_push(push)
    source = open_source(str(name), classes, template, out, bool(push))
    with building(out) as folder:
        facts = WRITERS[to](source, folder)
        keep_notices(source.root, folder)
        (folder / "README.md").write_text(card(source, to, facts, push or out.name), encoding="utf-8")
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    made = {
        "out": str(out),
        "to": to,
        "files": files,
        "facts": facts,
        "url": upload(out, push, private) if push else "",
    }
    return {**made, "lines": told(made)}


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to; it becomes `out` when the block ends well, and goes when not."""
    beside = out.with_name(f".{out.name}.{token_hex(4)}.tmp")
    beside.mkdir(parents=True)
    try:
        with naming(out):
            yield beside
        for file in beside.iterdir():
            file.chmod(0o644)  # some writers keep them to themselves
        if out.exists():
            out.rmdir()
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def keep_notices(root: Path, folder: Path) -> None:
    """The licence and notice files of the backbone go along."""
    for file in root.iterdir():
        if file.is_file() and file.name.upper().startswith(("NOTICE", "LICENSE", "LICENCE")):
            shutil.copyfile(file, folder / file.name)


def told(made: dict[str, Any]) -> list[str]:
    """What was written, for a person."""
    sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in made["files"].items() if size >= 10_000)
    lines = [f"{made['out']}: {len(made['files'])} files ({sizes or 'all small'}); how to use them: README.md there"]
    if "difference" in made["facts"]:
        lines.append(f"checked in onnxruntime: logits differ by at most {made['facts']['difference']:.1e}")
    return lines + ([f"uploaded: {made['url']}"] if made["url"] else [])
