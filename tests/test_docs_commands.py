"""Every command and every block of code in README and docs, in the pages that the site makes and below --help, done in
a folder of small stand-ins.

The name of each test says what is done with the command:
run      - by `advtune.cli.main` (what torchrun starts: by one process), with its own verbs, flags, options, names and
           files. What stands in: a random CLIP with 16 px for every backbone that we name (24 for 336), 4 classes of
           18 images for every set of the catalog and for `photos`, one epoch of training, the first two runs of a
           study, short stages of AutoAttack, a hub that only listens, this process for Ray's workers. A name that
           does not exist fails.
parsed   - in the prose: the verb, its flags and the names of methods, attacks and data sets are known.
checked  - another program: a target of the Makefile, or a package of an extra.
"""

import importlib.util
import re
import shlex
import shutil
import textwrap
import tomllib
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from advtune import arguments, cli, examples
from advtune.examples import start
from backbones import open_clip_tensors, write_openai
from conftest import write_clip, write_images

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )?advtune\s[^`]+)`")
SHELL = ("", "bash", "sh", "console")
PROGRAMS = {
    "advtune": "run",
    "torchrun": "run",
    "make": "checked",
    "tensorboard": "checked",
    "hf": "checked",
    "pip": "checked",
}
STANDS_FOR = {"DIR": "runs/capt", "OTHER": "runs/tecoa", "D": "fashion-mnist-mini", "METHOD": "tecoa"}
CLASSES = ("ant", "bee", "cat", "dog")


@dataclass(frozen=True)
class Command:
    """A command line or a block of code; `shown` is what a page says that it prints on stderr."""

    page: str
    line: int
    text: str
    how: str
    shown: str = ""

    def __str__(self):
        return f"{self.page}:{self.line} {self.how}: {' '.join(self.text.split())[:90]}"


def commands_of(block, page, line):
    """The commands of a block, which has nothing else. After `$ ` lines, what they print."""
    lines = block.replace("\\\n", "").splitlines()
    prompts = lines[0].startswith("$ ")
    for i, text in enumerate(lines):
        if not text.strip() or (prompts and not text.startswith("$ ")):
            continue
        program = text.removeprefix("$ ").split(" ")[0]
        assert program in PROGRAMS, f"{page}: {text}: say in PROGRAMS how to test {program}, or call the block text"
        shown = [t for t in lines[i + 1 : i + 2] if prompts and not t.startswith("$ ")]
        yield Command(page, line + i, text.removeprefix("$ "), PROGRAMS[program], "".join(shown))


def pages():
    """The text of every page by name; a method's page without its code."""
    spec = importlib.util.spec_from_file_location("made_pages", ROOT / "docs" / "pages.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    yield from ((str(path.relative_to(ROOT)), path.read_text()) for path in PAGES)
    yield from ((f"site/{name}", made.method_page(name).partition("## Code")[0]) for name in made.registry())
    yield "site/attacks", made.attacks_page()
    notebook = made.notebook_pages(made.NOTEBOOK).values()
    yield from (("site/notebook", text) for text in notebook if isinstance(text, str))


def of_help():
    """The commands and the study file that the command line shows."""
    shown = {"": start([]) + examples.EPILOG}
    shown |= {verb: each.epilog or "" for verb, each in arguments.build().verbs().items()}
    for verb, text in shown.items():
        text = text.replace("\\\n", " ")
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("  advtune "):
                yield Command(f"advtune {verb} --help", number, line.strip(), "run")
        if file := text.partition("flags lie over what it says:\n")[2]:
            yield Command(f"advtune {verb} --help", 1, textwrap.dedent(file), "toml")
    yield from (Command(f"advtune {verb}", 1, text, "run") for verb, text in examples.EXAMPLES.items())


def found():
    seen = set()
    for each in (*of_pages(), *of_help()):  # what stands on a page need not be run again for --help
        text = " ".join(each.text.split())
        if each.page.endswith(".md") or text not in seen:
            yield each
        seen.add(text)


def of_pages():
    for page, text in pages():
        for match in FENCE.finditer(text):
            kind, block = match.groups()
            line = text.count("\n", 0, match.start()) + 2
            if kind in SHELL:
                yield from commands_of(block, page, line)
            elif page != "site/notebook":  # its cells are run in test_docs_site.py
                assert kind in ("python", "toml", "text", "json"), f"{page}:{line}: nothing tests blocks of {kind}"
                yield Command(page, line, block, kind)
        blanked = FENCE.sub(lambda m: "\n" * m.group().count("\n"), text)
        for match in INLINE.finditer(blanked):
            line = blanked.count("\n", 0, match.start()) + 1
            yield Command(page, line, " ".join(match.group(1).split()), "parsed")


FOUND = list(found())


def of(*how):
    return pytest.mark.parametrize("command", [each for each in FOUND if each.how in how], ids=str)


@pytest.fixture(scope="module")
def place(tmp_path_factory, clip_folder):
    """What the pages take as given: photos, runs of tecoa, capt and apd with a row each, files of others."""
    place = tmp_path_factory.mktemp("docs")
    write_images(place / "photos", classes=CLASSES, train=16, test=2)
    shutil.copy(next((place / "photos" / "test" / "cat").iterdir()), place / "photo.jpg")
    (place / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADVTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        stand_in(patch, clip_folder, place / "photos")
        patch.chdir(place)
        for name in ("tecoa", "capt", "apd"):
            assert cli.main(["train", name, "--data", "fashion-mnist-mini", "--out", f"runs/{name}"]) == 0
            attack = ["--attack", "pgd", "-a", "steps=2", "-a", "eps=1/255"]
            assert cli.main(["evaluate", f"runs/{name}", "--data", "fashion-mnist-mini", *attack]) == 0
    shutil.copytree(place / "runs" / "tecoa", place / "runs" / "fap-few-shot" / "tecoa")
    clip = CLIPModel.from_pretrained(clip_folder)
    torch.save({"state_dict": open_clip_tensors(clip)}, place / "tecoa.pth.tar")
    wide = dict(hidden_size=64, num_attention_heads=1)
    tensors = open_clip_tensors(write_clip(place / "clip", image=wide, text=wide))
    write_openai(place / "clip" / "ViT-B-32.pt", tensors)
    return place


@pytest.fixture
def world(place, clip_folder, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world")
    stand_in(monkeypatch, clip_folder, place / "photos")
    yield tmp_path / "world"
    torch.use_deterministic_algorithms(False)


def stand_in(patch, backbone, photos):
    """Small things in the place of large ones; what has no such name stays unknown."""
    from advtune import cost, demo, export, grid, methods, pretrained, protocols, study, train
    from advtune.attacks import ATTACKS, Free, autoattack
    from advtune.data import task
    from advtune.data.sources import open_folder
    from advtune.engines import Ray
    from advtune.formats.spec import at_side
    from advtune.listing import HUB_BACKBONES

    def quick(name, options=(), attack=(), configure=methods.configure):
        method, recipe, attack = configure(name, options, attack)
        return method, replace(recipe, epochs=attack.replay if isinstance(attack, Free) else 1), attack

    def known(name, kinds=()):
        listed = (name, f"hf-hub:{name}") if kinds else (name,)
        assert set(listed) & set(HUB_BACKBONES), f"{name} is not a backbone that advtune list names"
        return backbone

    for module in (methods, train, protocols):
        patch.setattr(module, "configure", quick)
    patch.setitem(pretrained.EMBEDDED, "mini", backbone)
    patch.setattr(pretrained, "download", known)
    patch.setattr(pretrained, "at_side", lambda config, side: at_side(config, side * 16 // 224))
    patch.setattr(task, "open_named", lambda name: open_folder(str(photos)))
    patch.setattr(study, "plan", lambda wanted, plan=study.plan: plan(wanted)[:2])
    patch.setattr(cost, "SECONDS", 0.01)
    patch.setattr(Ray, "__call__", lambda self, todo, bench: grid.in_turn(todo, bench))
    patch.setattr(autoattack, "APGD", partial(autoattack.APGD, steps=5))
    patch.setattr(autoattack, "FAB", partial(autoattack.FAB, steps=3))
    patch.setattr(autoattack, "Square", partial(autoattack.Square, queries=20))
    for name, attack in ATTACKS.items():
        if hasattr(attack, "steps"):
            patch.setitem(ATTACKS, name, replace(attack, steps=3))
    patch.setattr(demo, "ATTACK", replace(demo.ATTACK, steps=2))
    patch.setattr(export, "check_push", lambda repo: None)
    patch.setattr(export, "upload", lambda folder, repo, private: f"https://hub/{repo}")


def words(command):
    """The arguments of a command line; what it writes into a file is printed instead."""
    given = shlex.split(command.text, comments=True)
    given = given[: given.index(">")] if ">" in given else given
    given = given[given.index("advtune") + 1 :]  # torchrun --nproc-per-node 8 -m advtune train ...
    return [STANDS_FOR.get(word, word) for word in given]


def out_of(given):
    return given[given.index("--out") + 1] if "--out" in given else None


@of("run")
def test_is_run(command, world, capsys):
    from advtune.results import write_atomic
    from advtune.study import from_flags, write

    given = words(command)
    for earlier in (each for each in FOUND if each.how == "run" and each.page == command.page):
        tuned = words(earlier)
        if earlier.line < command.line and tuned[0] == "train" and not Path(tuned[tuned.index("--out") + 1]).exists():
            shutil.copytree("runs/tecoa", tuned[tuned.index("--out") + 1])
        if earlier.line < command.line and tuned[0] == "interpolate" and given[1].startswith(str(out_of(tuned))):
            assert exit_status(tuned) == 0
        if earlier.line < command.line and tuned[0] == "study" and given[1] == f"{out_of(tuned)}/study.toml":
            asked = from_flags(vars(arguments.build().parse_args(tuned)))
            write_atomic(given[1], write(asked))
    if "--out" in given and given[0] == "train":
        shutil.rmtree(given[given.index("--out") + 1], ignore_errors=True)
    before = set(Path().rglob("*"))
    code = exit_status(given)
    printed = capsys.readouterr()
    if command.shown:
        assert code == 2
        assert printed.err.startswith(command.shown.removesuffix("..."))
        return
    assert code == 0, printed.err
    assert printed.out or "--out" in given or "--csv" in given
    for flag in ("--out", "--csv", "--tensorboard", "--figures"):
        if flag in given and "--dry-run" not in given:
            written = Path(given[given.index(flag) + 1])
            assert written in before or written.exists(), f"{written} was not written"


def exit_status(given):
    try:
        return cli.main(given)
    except SystemExit as stop:  # --help and --version
        return stop.code


@of("python")
def test_block_of_code(command, world):
    scope = {"__name__": "block"}  # a class in it is a method: it joins the others, and tunes
    exec(compile(command.text, str(command), "exec"), scope)
    for name, kind in list(scope.items()):
        if isinstance(kind, type) and kind.__module__ == "block":
            from advtune.methods import METHODS

            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(METHODS, name.lower(), kind)
                arguments = ["train", name.lower(), "--data", "folder:photos", "--out", "runs/own"]
                assert cli.main(arguments) == 0


@of("toml")
def test_study_file(command):
    from advtune.study import from_facts, plan

    assert plan(from_facts(tomllib.loads(command.text)))


@of("parsed")
def test_named_in_the_prose(command):
    from advtune.attacks import ATTACKS, TRAINING
    from advtune.data.catalog import names
    from advtune.methods import METHODS

    given = shlex.split(command.text.replace("...", ""))
    given = given[given.index("advtune") + 1 :]
    verbs = arguments.build().verbs()
    if not given or given[0] in ("VERB", "--help", "--version"):
        return
    assert given[0] in verbs
    verb = verbs[given[0]]
    for flag in given[1:]:
        if flag.startswith("--"):
            assert flag == "--help" or verb.has(flag), flag
    for action in verb.arguments:
        words = {w for flag, w in pairwise(given) if flag in action.option_strings}
        words |= set(given[1:2]) if action.dest == "what" else set()
        assert not action.choices or words <= set(action.choices), words
    for flag, word in pairwise(given):
        if flag in ("-a", "-o"):
            assert word.partition("=")[0] in verb.fields()[flag], word
    following = {flag: word for flag, word in pairwise(given) if flag.startswith("-")}
    assert following.get("--attack", "D") in {*ATTACKS, *TRAINING, "none", "D", "NAME"}
    data = following.get("--data", "D")
    assert ":" in data or data in {*names(), "D", "SPEC"}
    if given[0] == "train" and len(given) > 1:
        assert given[1] in {*METHODS, "METHOD", "--help"} or given[1].startswith("-")
    if given[0] == "study" and len(given) > 1 and given[1].startswith("recipes/"):
        assert (ROOT / given[1]).is_file()


@of("checked")
def test_another_program(command):
    given = shlex.split(command.text, comments=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if given[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(given[1:]) <= set(targets)
    elif given[0] == "tensorboard":
        assert "tensorboard" in extras


def test_the_extras_that_pages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for page in PAGES for name in re.findall(r"advtune\[([a-z,]+)\]", page.read_text())}
    assert named
    assert {each for name in named for each in name.split(",")} <= set(extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    """In the repository; those of the site are looked at by `mkdocs build --strict`."""
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_nothing_is_left_out():
    """The pages are read: as many lines that begin with advtune stand in them as there are commands of it."""
    begin = re.compile(r"^(?:\$ )?advtune (?!\S+:).*", re.MULTILINE)
    lines = [line for page in PAGES for line in begin.findall(page.read_text())]
    run = [each for each in FOUND if each.how == "run" and each.page.endswith(".md")]
    run = [each for each in run if each.text.startswith("advtune")]
    prose = [line for line in lines if "`" in line]
    assert len(run) == len(lines) - len(prose)
    assert len(run) >= 35
