"""The page of what accelerators gave: Markdown and plots from gpu.json files alone.

Command:  python benchmarks/gpu_page.py benchmarks/results/*/gpu.json [--out docs/performance-gpu.md]
Writes:   the page, and its plots into figures/ beside it. Files of one device are one section: of a part that several
          hold, the last file's is taken.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito: told apart with any colour vision
MARKERS, HATCHES = ("o", "s", "^", "D", "v"), ("", "///", "...")
GOAL = 40  # per cent of the measured peak, for PMG-AFT at ViT-B/16 on an H200
STEP = {"what": "", "batch": "images", "per_s": "calls/s", "images_per_s": "images/s", "tflop": "TFLOP",
        "tflops": "TFLOP/s", "share_of_peak": "share of peak", "peak_gb": "GB"}  # fmt: skip
TABLES: dict[str, tuple[str, str, dict[str, str]]] = {  # part: heading, what it says, columns
    "targets": ("Targets", "", {"target": "", "wanted": "wanted", "measured": "measured"}),
    "peak": (
        "The hardware's own peak",
        "The best of square matrix products of n x n random numbers, and a copy, in the same run as all else here.",
        {"what": "", "n": "n", "rate": "rate", "unit": ""},
    ),
    "speed": (
        "Speed",
        "A training step with its attack, loss, backward and optimiser, 100 classes; an attack step (an image's "
        "gradient) and a forward of the frozen model. Weights are random. TFLOP: counted of matrix products.",
        {"shape": "shape", **STEP},
    ),
    "memory": (
        "Memory",
        "Peak of a training step, weights included.",
        {"shape": "shape", "classes": "classes", **STEP},
    ),
    "precision": (
        "Precision",
        "Images that stand under PGD-20 at 1/255 and those decided otherwise than in fp32, the share of input "
        "gradients that are exactly 0, and how far logits move from those of fp32 on the processor.",
        {"model": "model", "images": "images", "n": "n", "device": "on", "precision": "precision", "clean": "clean",
         "robust": "robust", "decided_otherwise": "otherwise", "zero_gradients": "zero gradients",
         "logits_moved": "logits moved"},
    ),
    "classes": ("Classes", "A training step at ViT-B/32.", {"classes": "classes", **STEP}),
    "images": ("Images", "Calls at ViT-B/16 with 100 classes.", STEP),
    "syncs": (
        "Waiting for the device",
        "Calls under torch's sync debug mode, which sees most waits. The loop asks for the loss once a step besides.",
        {"what": "", "synchronises": "waits", "where": "first at"},
    ),
    "compile": (
        "torch.compile",
        "The image tower compiled with CUDA graphs; the first call holds the compilation.",
        {"compile": "compiled", **STEP, "first_s": "first call, s"},
    ),
    "runs": (
        "A tuning run",
        "",
        {"model": "model", "backbone": "backbone", "data": "data", "tuned_on": "tuned on", "tuning_s": "tuning, s",
         "attack": "attack", "eps_255": "eps x 255", "n": "n", "clean": "clean", "robust": "robust", "s": "s"},
    ),
    "autoattack": (
        "AutoAttack",
        "",
        {"model": "model", "data": "data", "eps_255": "eps x 255", "n": "n", "clean": "clean", "robust": "robust",
         "s": "s"},
    ),
}  # fmt: skip


def cell(row: Row, key: str) -> str:
    """A number as it is read: shares in per cent, three digits that count, the batch beside the one asked for."""
    value = row.get(key)
    if value is None:
        return "–"
    if key == "batch" and "asked" in row:
        return f"{value} (of {row['asked']}: memory)"
    if key == "share_of_peak":
        return f"{100 * value:.1f} %"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(cell(row, key) for key in columns) + " |" for row in rows)])


def merged(files: Sequence[Row]) -> dict[str, Row]:
    """What each device gave, parts of later files over those of earlier ones; `sources` says whose they are."""
    devices: dict[str, Row] = {}
    for found in files:
        device = devices.setdefault(found["hardware"]["device"], {"sources": []})
        device["sources"].append({key: found[key] for key in ("time", "commit", "small", "versions", "hardware")})
        parts = [part for part in TABLES if found.get(part)]
        device["sources"][-1]["parts"] = [part for part in parts if part != "targets"]
        targets = {row["target"]: row for row in [*device.get("targets", []), *found.get("targets", [])]}
        device |= {part: found[part] for part in parts} | {"targets": list(targets.values())}
        devices[found["hardware"]["device"]] = device
    return devices


def section(device: str, found: Row, pictures: Mapping[str, str]) -> str:
    """A device's part of the page."""
    lines = [f"## {device}", ""]
    for source in found["sources"]:
        what = ", ".join(f"{name} {v}" for name, v in source["versions"].items() if v)
        hardware = ", ".join(f"{name} {v}" for name, v in source["hardware"].items() if name != "device")
        lines.append(
            f"- {source['time']}, commit {source['commit']}: {', '.join(source['parts'])} ({hardware}; {what})"
        )
    if any(source["small"] for source in found["sources"]):
        lines += ["", "**A trial of the script with tiny shapes: the numbers mean nothing.**"]
    for part, (heading, words, columns) in TABLES.items():
        if not found.get(part):
            continue
        lines += ["", f"### {heading}", ""] + ([words, ""] if words else [])
        if part in pictures:
            lines += [f"![{heading}]({pictures[part]})", ""]
        lines.append(table(found[part], columns))
    return "\n".join(lines) + "\n"


def share_plot(rows: Sequence[Row], path: Path) -> None:
    """Bars: a method's share of the measured matrix peak, one bar a shape."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["what"] for row in rows))
    share = {(row["what"], row["shape"]): 100 * (row.get("share_of_peak") or 0) for row in rows}
    figure, (axis,) = canvas(1, (8, 0.36 * len(names) + 1.4))
    thick = 0.8 / len(shapes)
    for i, shape in enumerate(shapes):
        places = [k + (i - (len(shapes) - 1) / 2) * thick for k in range(len(names))]
        values = [share.get((name, shape), 0) for name in names]
        axis.barh(places, values, thick, color=COLOURS[i], hatch=HATCHES[i], edgecolor="white", label=shape)
    top = max(share.values(), default=0)
    if top > GOAL / 4:
        axis.axvline(GOAL, color="#555555", linestyle="--", linewidth=1, label=f"{GOAL} %")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("share of the measured matrix-product peak (%)")
    axis.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axis.margins(y=0.01)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(shapes) + 1)
    figure.savefig(path)


def curves(rows: Sequence[Row], x: str, panels: Mapping[str, str], path: Path) -> None:
    """Lines over x, both axes logarithmic, one panel for each key of `panels` that was measured."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in rows if row.get("batch")]
    kept = {key: words for key, words in panels.items() if any(row.get(key) for row in rows)}
    figure, axes = canvas(len(kept), (4.6 * len(kept), 3.6))
    for axis, (key, words) in zip(axes, kept.items(), strict=True):
        for i, name in enumerate(dict.fromkeys(row["what"] for row in rows)):
            points = [(row[x], row[key]) for row in rows if row["what"] == name and row.get(key)]
            axis.plot(*zip(*points, strict=True), marker=MARKERS[i], color=COLOURS[i], label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.yaxis.set_minor_locator(NullLocator())
        places = sorted({row.get("asked", row[x]) if x == "batch" else row[x] for row in rows})
        axis.set_xticks(places, [f"{place:,}" for place in places])
        axis.tick_params(axis="x", which="minor", bottom=False)
        axis.set_xlabel({"classes": "classes", "batch": "images a batch"}[x])
        axis.set_ylabel(words)
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.legend(frameon=False)
    figure.savefig(path)


def canvas(panels: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False).flatten())
    for axis in axes:
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plots(device: str, found: Row, folder: Path) -> dict[str, str]:
    """Draws what was measured; the pictures' places relative to the page, by part."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    drawn = {}
    for part in ("speed", "classes", "images"):
        if not any(row.get("batch") for row in found.get(part, [])):
            continue
        name = f"gpu-{slug}-{part}.png"
        folder.mkdir(parents=True, exist_ok=True)
        if part == "speed":
            share_plot(found[part], folder / name)
        elif part == "classes":
            curves(found[part], "classes", {"ms": "a step (ms)", "peak_gb": "peak memory (GB)"}, folder / name)
        else:
            curves(found[part], "batch", {"images_per_s": "images a second"}, folder / name)
        drawn[part] = f"{folder.name}/{name}"
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "performance-gpu.md")
    args = parser.parse_args()
    devices = merged([json.loads(path.read_text()) for path in args.results])
    page = [
        "# What an accelerator gives",
        "",
        "Made by `benchmarks/gpu_page.py` from what `benchmarks/gpu.py` wrote.",
        "",
    ]
    for device, found in devices.items():
        page.append(section(device, found, plots(device, found, args.out.parent / "figures")))
    args.out.write_text("\n".join(page))


if __name__ == "__main__":
    main()
