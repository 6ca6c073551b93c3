"""MkDocs hook: the pages that are made from the code. Nothing in them is kept by hand.

methods/NAME.md and attacks.md come from the registries, api/*.md from the docstrings, the notebook from its cells. A
page's link to a file of the repository leads to that file's page here, or, once mkdocs.yml has a `repo_url`, there.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from base64 import b64decode
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "harden.ipynb"
ARXIV = re.compile(r"(?:arXiv[: ])(\d{4}\.\d{4,5})")
AWAY = re.compile(r"\]\(\.\./([^)#\s]+)\)")  # a link out of docs/
EQUATION = re.compile(r"L = |\w+: .*\(")
LETTERS = (
    "f is the model that learns, f0 the one before, x an image, x' what the attack made of it, y its label. CE is the "
    "cross-entropy, KL the Kullback-Leibler divergence; both are means over the batch unless something else is said."
)
REQUEST = re.compile(
    r"<(?:script|img|iframe|source|audio|video|embed)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"'\s>]+"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|icon|preconnect|preload|modulepreload))[^>]*href=[\"']?(?:https?:)?//[^>]+"
    r"|url\([\"']?(?:https?:)?//[^)]+|@import\s+[\"'](?:https?:)?//[^\"']+"
)
API = {
    "python": (
        "From Python",
        "What `import advtune` has. Two dicts belong to it: `METHODS` (the pages under Methods) and `ATTACKS` "
        "([Attacks](../attacks.md)).",
        "load load_task tune evaluate evaluate_curve compare Classifier PGD AutoAttack VLM Row UserError",
    ),
    "attacks": (
        "Attacks",
        "Frozen dataclasses whose fields are the budget, called as `attack(f, x, y)`.",
        "attacks.Attack attacks.FGSM attacks.PGD attacks.APGD attacks.FAB attacks.Square attacks.CWL2 attacks.Noise "
        "attacks.AutoAttack attacks.Transfer attacks.Defended attacks.NFGSM attacks.Free",
    ),
    "methods": (
        "Methods and losses",
        "What a method is, how options fill it, and the divergences that all of them share. The methods themselves are "
        "under Methods.",
        "methods.Method methods.configure recipe.Recipe vlm.Batch losses.cross_entropy losses.kl options.option "
        "options.fill",
    ),
    "data": (
        "Data",
        "Sources, splits and pixels.",
        "data.Task data.Split data.Images data.load_images data.Part",
    ),
    "studies": (
        "Studies, rows, reports",
        "Grids of runs, what an evaluation leaves behind, and what is made of it.",
        "study.Study study.run_study study.plan protocols.Run protocols.Slice grid.work grid.Outcome engines.ray.Ray "
        "engines.slurm.Slurm results.read results.wilson report.render checks.Finding export.export",
    ),
}


def on_config(config: Any) -> None:
    """MkDocs: every method has its place in the contents."""
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = ["methods/index.md", *({name: f"methods/{name}.md"} for name in registry())]


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: add the pages that are made."""
    from mkdocs.structure.files import File

    made: dict[str, str | bytes] = {"methods/index.md": methods_page(), "attacks.md": attacks_page()}
    made |= {f"methods/{name}.md": method_page(name) for name in registry()}
    made |= {f"api/{key}.md": api_page(*facts) for key, facts in API.items()}
    made |= notebook_pages(NOTEBOOK)
    for file in [file for file in files if file.src_uri.endswith(".md") and "/" not in file.src_uri]:
        for path in AWAY.findall(file.content_string):
            if not config.repo_url and not method_of(path):
                made[f"code/{path}.md"] = code_page(path)
    for place, content in made.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """MkDocs: links to files of the repository, and to the notebook, which is a page here."""
    if "/" in page.file.src_uri:
        return markdown
    markdown = markdown.replace(".ipynb)", ".md)")
    return AWAY.sub(lambda match: f"]({home(match[1], page.file.src_uri, config.repo_url)})", markdown)


def on_post_build(config: Any) -> None:
    """MkDocs: no page may ask another machine for anything."""
    from mkdocs.exceptions import PluginError

    for file in sorted(p for p in Path(config.site_dir).rglob("*") if p.suffix in (".html", ".css")):
        if match := REQUEST.search(file.read_text(encoding="utf-8")):
            raise PluginError(f"{file.relative_to(config.site_dir)} asks another machine: {match.group()[:200]}")


def registry() -> dict[str, dict[str, Any]]:
    """The methods by name, with what `advtune list methods --json` knows of them."""
    from advtune.listing import listing

    return {fact["name"]: fact for fact in listing("methods")}


def method_of(path: str) -> str:
    """The method whose file this is; empty for other files."""
    from advtune.methods import METHODS

    return next((name for name, kind in METHODS.items() if source_of(kind) == path), "")


def source_of(kind: Any) -> str:
    """The file that defines a class, seen from the root of the repository."""
    return Path(inspect.getfile(kind)).resolve().relative_to(ROOT).as_posix()


def home(path: str, page: str, repo_url: str | None) -> str:
    """Where a link of `page` to the repository's `path` leads."""
    if repo_url:
        return f"{repo_url.rstrip('/')}/blob/main/{path}"
    name = method_of(path)
    return os.path.relpath(f"methods/{name}.md" if name else f"code/{path}.md", str(Path(page).parent))


def methods_page() -> str:
    """All methods, one row each."""
    lines = ["# Methods", "", "| method | trains | what it is |", "|---|---|---|"]
    for name, fact in registry().items():
        lines.append(f"| [`{name}`]({name}.md) | {fact['trains']} | {cell(cited(fact['about']))} |")
    lines += [
        "",
        "Adversarial methods meet their training attack in every step; `zero-shot` trains nothing, and those whose "
        "training attack is none are the clean counterparts. † marks options that no public source gives.",
    ]
    return "\n".join(lines) + "\n"


def method_page(name: str) -> str:
    """Equation, options, recipe, training attack and code of one method."""
    from advtune.listing import recipes
    from advtune.methods import METHODS

    fact, kind = registry()[name], METHODS[name]
    train = f"advtune train {name} --data fashion-mnist-mini --shots 16 --epochs 5"
    about, _, rest = inspect.getdoc(kind).partition("\n\n")  # type: ignore[union-attr]
    lines = [f"# {name}", "", cited(" ".join(about.split())), ""]
    if rest:
        lines += ["## Equation", ""]
        for part in rest.split("\n\n"):
            lines += ["```text", part, "```", ""] if EQUATION.match(part) else [cited(" ".join(part.split())), ""]
        lines += [LETTERS, ""]
    if fact["trains"] == "nothing":
        lines += ["## Use", "", "```", "advtune evaluate zero-shot --data fashion-mnist-mini --attack pgd", "```", ""]
    else:
        lines += ["## Use", "", "```", f"{train} --out runs/{name}", "```", ""]
        lines += ["A try, on what is in the package. Without `--epochs` it takes as many as the recipe below has.", ""]
    lines += [f"Trains: {fact['trains']}.", ""]
    if fact["options"]:
        lines += ["## Options", "", "`-o name=value`", "", *options_table(fact["options"]), ""]
    for preset, fields in fact["presets"].items():
        values = ", ".join(f"`{key}={value}`" for key, value in fields.items()) or "the defaults above"
        lines += [f"`-o preset={preset}`: {values}", ""]
    for title, values in recipes(fact):
        flag = {"recipe": "`-o name=value`", "training attack": "`-a name=value`"}[title]
        way = "" if values.startswith("none") else f" ({flag})"
        lines += [f"{title.capitalize()}{way}: {values}.", ""]
    if any(option["reconstructed"] for option in fact["options"]):
        lines += ["† reconstructed: no public source gives it; our choice, and every result says so.", ""]
    return "\n".join([*lines, "## Code", "", *source_block(source_of(kind), link=True)]) + "\n"


def attacks_page() -> str:
    """Every attack of `--attack`, and those only to tune on."""
    from advtune.listing import END, FASTER, listing, training

    lines = ["# Attacks", "", "`advtune evaluate DIR --data D --attack NAME -a eps=1/255`. "
             "Which one when: [An evaluation that can be believed](evaluation.md).", ""]  # fmt: skip
    for fact in listing("attacks"):
        lines += [f"## {fact['name']}", "", cited(fact["about"]), "", *options_table(fact["options"]), ""]
    lines += [END["attacks"].capitalize() + ".", "", "## Only to tune on", "", FASTER.capitalize() + ".", ""]
    for fact in training():
        lines += [f"### {fact['name']}", "", cited(fact["about"]), "", *options_table(fact["options"]), ""]
    return "\n".join(lines) + "\n"


def options_table(options: list[dict[str, Any]]) -> list[str]:
    """Name, default, choices and help of each option."""
    from advtune.listing import shown

    lines = ["| option | default | what it is |", "|---|---|---|"]
    for option in options:
        mark = " †" if option["reconstructed"] else ""
        choices = ", ".join(f"`{each}`" for each in option["choices"] or ())
        text = "; ".join(part for part in (cell(option["help"]), choices) if part)
        lines.append(f"| `{option['name']}`{mark} | `{shown(option['name'], option['default'])}` | {text} |")
    return lines


def api_page(title: str, about: str, names: str) -> str:
    """A heading and a directive of mkdocstrings for each name; what has options has them as a table."""
    import advtune
    from advtune.options import describe

    lines = [f"# {title}", "", about, ""]
    for name in names.split():
        place = name if "." in name else f"{advtune._HOME[name]}.{name}"
        lines += [f"::: advtune.{place}", "    options:", f"      heading: advtune.{name}"]
        module, _, own = place.rpartition(".")
        thing = getattr(import_module(f"advtune.{module}"), own)
        options = describe(thing) if is_dataclass(thing) else []
        if options and all(each["help"] for each in options):
            lines += ["      merge_init_into_class: false", "      members: []", "", *options_table(options)]
        lines.append("")
    return "\n".join(lines)


def notebook_pages(path: Path) -> dict[str, str | bytes]:
    """A notebook as a page: its text, its code, what it printed, and its pictures beside."""
    place, lines = f"notebooks/{path.stem}", []
    made: dict[str, str | bytes] = {}
    for number, each in enumerate(json.loads(path.read_text())["cells"]):
        text = "".join(each["source"])
        lines += [text, ""] if each["cell_type"] == "markdown" else ["```python", text, "```", ""]
        for output in each.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                made[f"{place}-{number}.png"] = b64decode(data["image/png"])
                lines += [f"![What the code above shows]({path.stem}-{number}.png)", ""]
            elif printed := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                lines += ["```text", printed, "```", ""]
    return made | {f"{place}.md": "\n".join(lines) + "\n"}


def code_page(path: str) -> str:
    """A file of the repository."""
    return "\n".join([f"# {Path(path).name}", "", *source_block(path)]) + "\n"


def source_block(path: str, link: bool = False) -> list[str]:
    """A file of the repository, whole; `link`: with its name above, which leads into the repository."""
    file = ROOT / path
    kind = {".py": "python", ".md": "markdown", ".toml": "toml", ".json": "json"}.get(file.suffix, "text")
    name = [repository_link(path), ""] if link else [f"`{path}`", ""]
    return [*name, f"```{kind}", file.read_text().rstrip(), "```"]


def repository_link(path: str) -> str:
    """A link into the repository where mkdocs.yml names one, else its path."""
    found = re.search(r"^repo_url: *(\S+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    return f"[`{path}`]({home(path, '', found[1])})" if found else f"`{path}` in the repository:"


def cited(text: str) -> str:
    """Text with a link at every arXiv number."""
    return ARXIV.sub(lambda match: f"[{match[0]}](https://arxiv.org/abs/{match[1]})", text)


def cell(text: str) -> str:
    """Text that a table's cell holds: bars and stars are meant as they are."""
    return re.sub(r"(?<!\\)([|*_])", r"\\\1", text) if "](" not in text else text.replace("|", "\\|")
