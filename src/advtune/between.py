"""New runs between the original image tower and a tuned one (WiSE-FT, arXiv:2109.01903)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advtune import runs
from advtune.averaging import interpolate
from advtune.checkpoint import claim, finish
from advtune.disk import alone
from advtune.errors import UserError
from advtune.options import parse_float
from advtune.results import said, write_atomic
from advtune.vlm import VLM


def between(run: str, shares: Sequence[str | float], out: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Write a run whose image tower is original + share * (tuned - original), 0 < share < 1, for each share: to `out`,
    or of several to out/SHARE. What the runs are called, and lines for people.

    Raises UserError for a folder that is no run or of no tuned image tower, for shares that are none or the same, and
    for folders that are there: of a run that is not finished, too.
    """
    found = sorted(map(check_share, shares))
    if len(set(found)) < len(found):
        raise UserError(f"--share {' '.join(map(str, shares))[:60]}: names a share twice, to six digits")
    folder = Path(run)
    if not runs.is_run(folder):
        raise UserError(f"{run}: not a finished run folder (config.json and delta.safetensors)")
    places = {share: Path(out) / f"{share:g}" if len(found) > 1 else Path(out) for share in found}
    partials = {share: claim(place, resume=False, overwrite=True) for share, place in places.items()}
    for place in (*places.values(), *partials.values()):
        if place.exists() and not overwrite:
            raise UserError(f"{place} exists; replace it with --overwrite, or choose another --out")
    config, tuned = runs.read_config(folder), runs.load(run, "cpu", "fp32")
    if any(str(place.resolve()) in tuned.folders for place in places.values()):
        raise UserError(f"--out {out}: is the run, or what it stands on; choose another")
    if not all(name.startswith("clip.image.") for name in tuned.delta()):
        raise UserError(f"{run}: {config['method']} learned prompts, which have no original to go back to")
    base = runs.load(runs.backbone_of(folder, config), "cpu", "fp32")
    for share, place in places.items():
        part = base.with_delta(tuned.delta())
        interpolate(base, part, share)
        write(folder, config, part, base, share, partials[share], place)
    lines = [f"{place}: {100 * share:g} % of the way from the original to {run}" for share, place in places.items()]
    data = config["train"]["spec"]
    last = shlex.join(["advtune", "evaluate", str(places[found[-1]]), "--data", data, "--attack", "pgd"])
    return {"runs": [str(place) for place in places.values()], "lines": [*lines, f"next: {last} -a eps=1/255"]}


def check_share(text: str | float) -> float:
    """A share as a number of six digits, as its folder is called. Raises UserError for what is not between 0 and 1."""
    try:
        share = float(f"{parse_float(str(text)):g}")
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"--share {str(text)[:40]}: a number between 0 (the original) and 1 (the run as it is), as 0.5")
    return share


def write(
    folder: Path, old: dict[str, Any], tuned: VLM, base: VLM, share: float, partial: Path, out: Path
) -> None:  # fmt: skip
    """The new run: the old run's files, but for the weights and what config.json, `old`, says of them."""
    recipe = said(old["recipe"])
    config = old | {"recipe": recipe | {"interpolate": recipe["interpolate"] * share}}
    config["backbone"] = old["backbone"] | {"path": runs.path_from(out, runs.backbone_of(folder, old))}
    hashes, log = runs.read_json(folder / runs.IMAGES), (folder / runs.LOG).read_bytes()
    with alone(partial):
        write_atomic(partial / runs.LOG, log)
        runs.write_run(partial, runs.settle(tuned, base, config, hashes, out), config, hashes)
        finish(partial, out)
