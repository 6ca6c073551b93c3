"""What a person sees on a terminal, what a pipe gets, what a program reads, and hints for what was misspelt."""

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys

import pytest

from advtune import demo, terminal
from advtune.arguments import build
from advtune.cli import VERBS, main
from advtune.comparison import compare
from advtune.comparison import render as words
from advtune.errors import near, suggest
from advtune.listing import listing
from advtune.parsing import parse
from advtune.report import render
from advtune.results import append, read
from test_comparison import ATTACK, capt, make

BACKBONES = """\
Name                                       Size   px   Robust      Licence
mini                                       6.5M   64               NC research
openai/clip-vit-base-patch32               151M   224              ?
openai/clip-vit-base-patch16               150M   224              ?
openai/clip-vit-large-patch14              428M   224              ?
openai/clip-vit-large-patch14-336          428M   336              ?
RN50.pt                                    102M   224              ?
RN101.pt                                   120M   224              ?
laion/CLIP-ViT-B-32-laion2B-s34B-b79K      151M   224              MIT
laion/CLIP-ViT-B-16-laion2B-s34B-b88K      150M   224              MIT
laion/CLIP-ViT-L-14-laion2B-s32B-b82K      428M   224              MIT
laion/CLIP-ViT-H-14-laion2B-s32B-b79K      986M   224              MIT
laion/CLIP-ViT-bigG-14-laion2B-39B-b160k   2.54B  224              MIT
laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K  151M   224              MIT
laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K  150M   224              MIT
laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K  428M   224              MIT
hf-hub:apple/DFN2B-CLIP-ViT-B-16           150M   224              Apple AMLR
hf-hub:apple/DFN2B-CLIP-ViT-L-14           428M   224              Apple AMLR
hf-hub:apple/DFN5B-CLIP-ViT-H-14           986M   224              Apple AMLR
hf-hub:apple/DFN5B-CLIP-ViT-H-14-378       987M   378              Apple AMLR
facebook/metaclip-b32-400m                 151M   224              CC BY-NC 4.0
facebook/metaclip-b32-fullcc2.5b           151M   224              CC BY-NC 4.0
facebook/metaclip-b16-400m                 150M   224              CC BY-NC 4.0
facebook/metaclip-b16-fullcc2.5b           150M   224              CC BY-NC 4.0
facebook/metaclip-l14-400m                 428M   224              CC BY-NC 4.0
facebook/metaclip-l14-fullcc2.5b           428M   224              CC BY-NC 4.0
facebook/metaclip-h14-fullcc2.5b           986M   224              CC BY-NC 4.0
google/siglip-base-patch16-224             203M   224              Apache-2.0
google/siglip-base-patch16-384             203M   384              Apache-2.0
google/siglip-large-patch16-256            652M   256              Apache-2.0
google/siglip-large-patch16-384            652M   384              Apache-2.0
google/siglip-so400m-patch14-384           878M   384              Apache-2.0
google/siglip2-base-patch16-224            375M   224              Apache-2.0
google/siglip2-large-patch16-256           882M   256              Apache-2.0
google/siglip2-so400m-patch14-224          1.14B  224              Apache-2.0
google/siglip2-so400m-patch14-384          1.14B  384              Apache-2.0
hf-hub:chs20/fare2-clip                    428M   224  linf 2/255  MIT
hf-hub:chs20/fare4-clip                    428M   224  linf 4/255  MIT
hf-hub:chs20/tecoa2-clip                   428M   224  linf 2/255  MIT
hf-hub:chs20/tecoa4-clip                   428M   224  linf 4/255  MIT
hf-hub:chs20/FARE4-ViT-B-32-laion2B-s34B-b79K  151M   224  linf 4/255  ?
hf-hub:chs20/FARE4-ViT-B-16-laion2B-s34B-b88K  150M   224  linf 4/255  MIT
hf-hub:chs20/TeCoA4-ViT-B-32-laion2B-s34B-b79K  151M   224  linf 4/255  MIT
hf-hub:chs20/TeCoA4-ViT-B-16-laion2B-s34B-b88K  150M   224  linf 4/255  MIT
LEAF-CLIP/CLIP-ViT-L-FARE2                 428M   224  linf 2/255  MIT
LEAF-CLIP/CLIP-ViT-L-rho50-k1-constrained-FARE2  428M   224  linf 2/255  ?
LEAF-CLIP/OpenCLIP-ViT-H-FARE2             986M   224  linf 2/255  MIT
LEAF-CLIP/OpenCLIP-ViT-H-rho50-k1-constrained-FARE2  986M   224  linf 2/255  ?
Size: parameters of both towers. px: side of its images. Robust: what its image
tower was tuned to withstand; with k1 in the name its text tower, too, edits of
one character. ?: not known. Source: the hub, from the owner before the slash;
mini is embedded, a small stand-in, not OpenAI CLIP, for non-commercial
research; a .pt is OpenAI's file, given by its path.
On trust: none of the others could be downloaded by us. Sizes are counted from
the published shapes, licences are those that the cards were seen to state.
Also folders, other files and run folders (docs/backbones.md). What one is, and
whether it can be used: advtune backbone inspect NAME
"""
USUAL = {"data": {"subset": "all", "name": "cats|dogs"}, "attack": ATTACK | {"norm": "linf"}}


class Screen(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self):
        return True


def screen_of(monkeypatch):
    """Within a test: pytest's own stdout takes its place again between a fixture and its test."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    shown = Screen()
    monkeypatch.setattr(sys, "stdout", shown)
    return shown


@pytest.fixture
def folders(tmp_path):
    """Two run folders with a row each; the second's checks raised an alarm."""
    alarm = {"name": "gap", "value": 0.0, "n": 10, "text": "no [red]gap[/red]", "alarm": True}
    for name, row in (("tecoa", make(**USUAL)), ("capt", capt(**USUAL, checks=[alarm]))):
        (tmp_path / name).mkdir()
        append(tmp_path / name / "results.jsonl", row)
    return [str(tmp_path / "tecoa"), str(tmp_path / "capt")]


def no_colour(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# --- tables on a terminal, the same bytes as ever in a pipe -------------------------------------------------


def test_a_pipe_gets_the_plain_text(folders, capsys):
    rows = [row for folder in folders for row in read(f"{folder}/results.jsonl")]
    expected = {
        ("report", *folders): render(rows, "markdown"),
        ("report", *folders, "--format", "markdown"): render(rows, "markdown"),
        ("compare", *folders): words(compare(rows[:1], rows[1:])),
        ("list", "backbones"): BACKBONES,
    }
    for arguments, text in expected.items():
        assert main(arguments) == 0
        assert capsys.readouterr().out == text
    terminal.evaluated(rows)
    assert capsys.readouterr().out == (
        "tecoa on cats|dogs (test): clean   60.0 %  [31.3, 83.2]  n=10\n"
        "robust under pgd linf eps=4/255 steps=20:  50.0 %  [23.7, 76.3]  n=10\n"
        "capt on cats|dogs (test): clean   70.0 %  [39.7, 89.2]  n=10\n"
        "robust under pgd linf eps=4/255 steps=20:  40.0 %  [16.8, 68.7]  n=10\n"
        "checks: 1 made, 1 alarm\n"
        "  ALARM gap: no [red]gap[/red] (n=10)\n"
    )


def test_a_terminal_gets_tables(folders, monkeypatch):
    screen = screen_of(monkeypatch)
    assert main(["report", *folders]) == 0
    text = no_colour(screen.getvalue())
    lines = text.splitlines()
    assert lines[0] == "cats|dogs test, n = 10, 224 px · pgd eps 4/255, 20 steps · tiny"
    assert [line.split()[0] for line in lines if "[" in line and "16 shots" in line] == ["tecoa", "capt"]
    assert any(line.split()[-3:] == ["40.0", "[16.8,", "68.7]"] for line in lines)
    assert "\\" not in text and "| " not in text and "details" not in text and "---" not in text
    assert "\x1b[1;31mAlarm, capt: no [red]gap[/red] (n = 10).\x1b[0m" in screen.getvalue()
    assert max(map(len, lines)) <= 100


def test_what_was_asked_for_is_not_drawn(folders, monkeypatch, tmp_path):
    screen = screen_of(monkeypatch)
    rows = [row for folder in folders for row in read(f"{folder}/results.jsonl")]
    assert main(["report", *folders, "--format", "markdown"]) == 0
    assert screen.getvalue() == render(rows, "markdown")
    assert main(["report", *folders, "--out", str(tmp_path / "report.md")]) == 0
    assert (tmp_path / "report.md").read_text() == render(rows, "markdown")


def test_comparison_and_evaluation_on_a_terminal(folders, monkeypatch):
    screen = screen_of(monkeypatch)
    assert main(["compare", *folders]) == 0
    text = no_colour(screen.getvalue())
    assert text.startswith("A: tecoa. B: capt.\n")
    assert re.search(r"cats\|dogs test,.* pgd eps 4/255,.* 10 +robust +50\.0 +40\.0", text)
    rows = [row for folder in folders for row in read(f"{folder}/results.jsonl")]
    terminal.evaluated(rows)
    text = no_colour(screen.getvalue())
    assert re.search(r"capt\s+cats\|dogs \(test\)\s+pgd linf.* 10\s+70\.0 \[39\.7, 89\.2\]\s+40\.0", text)
    assert "\x1b[1;31m  ALARM gap: no [red]gap[/red] (n=10)\x1b[0m" in screen.getvalue()
    assert "robust under" not in text


@pytest.mark.parametrize("what", ["methods", "attacks", "data", "backbones"])
def test_listings_on_a_terminal(what, monkeypatch):
    screen = screen_of(monkeypatch)
    assert main(["list", what]) == 0
    text = no_colour(screen.getvalue())
    names = {line.split()[0] for line in text.splitlines() if line.strip()}
    facts = listing(what)
    assert {fact["name"] for fact in facts} <= names
    assert {option["name"] for fact in facts for option in fact.get("options", ())} <= {n.rstrip("†") for n in names}
    assert what != "methods" or {"n-fgsm", "free"} < names
    assert " ".join(terminal.END[what].split()) in " ".join(text.split())


def test_a_narrow_terminal_loses_no_digit_and_a_name_is_no_markup():
    rows = [["Method", "n", "Clean %"], ["[red]t[/]", "500", "57.8 ± 0.9 [53.4, 62.1]"]]
    for width in (24, 100):
        console = terminal.Console(file=io.StringIO(), width=width)
        console.print(terminal.grid(rows, [False, True, True], width))
        found = "".join(console.file.getvalue().split())
        assert all(each in found for each in ("500", "57.8", "53.4,", "62.1]"))
    assert "[red]t[/]" in found


def test_a_real_terminal_and_no_colour():
    """In a process of its own, on a pseudo-terminal; in a pipe there is no escape sequence."""
    command = [sys.executable, "-m", "advtune.cli", "list", "backbones"]
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    shown = {}
    for name, more in (("colour", {}), ("none", {"NO_COLOR": "1"})):
        master, slave = pty.openpty()
        process = subprocess.Popen(command, stdout=slave, env={**plain, "TERM": "xterm", **more})
        os.close(slave)
        text = b""
        try:
            while part := os.read(master, 65536):
                text += part
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(master)
        assert process.wait() == 0
        shown[name] = text.decode()
    assert "\x1b[36mmini" in shown["colour"]
    assert "Licence" in shown["none"] and "\x1b[3" not in shown["none"]
    piped = subprocess.run(command, capture_output=True, text=True, env={**plain, "TERM": "xterm"})
    assert piped.stdout == BACKBONES


# --- JSON of every verb ---------------------------------------------------------------------------------


def test_every_verb_prints_json_and_nothing_else(
    clip_folder, image_folder, tmp_path, capsys, monkeypatch, short_square
):
    data, run, zero = f"folder:{image_folder}", str(tmp_path / "run"), str(tmp_path / "zero")
    tower = str(tmp_path / "tower")
    base = ["--backbone", str(clip_folder), "--data", data]
    monkeypatch.setattr(demo, "BACKBONE", str(clip_folder))
    monkeypatch.setattr(demo, "DATA", data)
    monkeypatch.setattr(demo, "ENTRIES", ())
    monkeypatch.setattr("advtune.evaluation.other_model", lambda s: None)  # mini is slow to load for a check
    quick = ["--attack", "pgd", "-a", "steps=1", "--limit", "3"]
    calls = [
        ["train", "capt", *base, "--shots", "1", "--epochs", "1", "--out", run],
        ["evaluate", run, "--data", data, *quick],
        ["evaluate", "zero-shot", *base, *quick, "--out", zero],
        ["study", "few-shot", "--methods", "zero-shot", *base, *quick, "--out", str(tmp_path / "study")],
        ["report", run, zero],
        ["compare", zero, run],
        ["predict", run, str(next(image_folder.rglob("*.png")))],
        ["export", run, "--to", "prompts", "--out", str(tmp_path / "prompts")],
        ["train", "tecoa", *base, "--shots", "1", "--epochs", "1", "--out", tower],
        ["interpolate", tower, "--share", "0.5", "--out", str(tmp_path / "half")],
        *(["list", what] for what in ("methods", "attacks", "data", "backbones")),
        ["backbone", "inspect", str(clip_folder)],
        ["audit", *base, "--limit", "1", "--out", str(tmp_path / "audit")],
        ["demo", "--out", str(tmp_path / "demo")],
    ]
    found = []
    for arguments in calls:
        assert main([*arguments, "--json"]) == 0
        text = capsys.readouterr().out
        assert text and not text.startswith("\n") and text.endswith("\n")
        lines = text.splitlines() if arguments[0] == "audit" else [text]  # the others print one value here
        found.append([json.loads(line) for line in lines][-1])
    assert {arguments[0] for arguments in calls} == set(VERBS) - {"completion", "serve"}  # a script, a page
    trained, evaluated = found[:2]
    assert (trained["run"], trained["config"]["method"], trained["last"]["step"]) == (run, "capt", 0)
    assert parse(build(), shlex.split(trained["next"])[1:]).model == run
    assert [row["method"] for row in (evaluated, *found[2:4], *found[-2:])] == ["capt", *["zero-shot"] * 4]
    assert [line["method"] for line in found[4]] == ["zero-shot", "capt"]


def test_a_study_of_which_nothing_came_prints_no_line(clip_folder, tmp_path, capsys):
    arguments = ["--backbone", str(clip_folder), "--data", f"folder:{tmp_path}/none", "--out", str(tmp_path / "study")]
    assert main(["study", "few-shot", "--methods", "zero-shot", *arguments, "--json"]) == 1
    assert capsys.readouterr().out == ""


# --- the first error teaches ----------------------------------------------------------------------------


def test_nothing_but_the_name_shows_how_to_begin(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "evaluation that can be believed." in " ".join(text.split())
    assert f"verbs: {', '.join(VERBS)} what" in " ".join(text.split())
    commands = re.findall(r"^  (advtune .*)$", text.replace("\\\n", ""), flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert parse(build(), shlex.split(command)[1:]).verb in VERBS
    assert max(map(len, text.splitlines())) < 80


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_a_terminal_of_80_columns(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = (build().verbs()[verb] if verb else build()).format_help()
    assert [line for line in text.splitlines() if len(line) > 79] == []
    assert "advtune" in text.partition("options:")[2] or verb in ("serve", "demo")  # which run as they are


MISSING = {
    "train": "missing: METHOD, --out, --data; for example: advtune train capt --data",
    "evaluate": "missing: DIR|METHOD, --data; for example: advtune evaluate runs/capt --data",
    "audit": "missing: --data; for example: advtune audit --backbone mini",
    "study": "missing: PROTOCOL|FILE; for example: advtune study few-shot",
    "report": "report: name run folders",
    "compare": "missing: DIR, DIR; for example: advtune compare",
    "interpolate": "missing: DIR, --share, --out; for example: advtune interpolate runs/tecoa",
    "predict": "missing: DIR|B, IMAGE; for example: advtune predict",
    "export": "missing: DIR|B, --to, --out; for example: advtune export",
    "list": "missing: one of methods, attacks, data, backbones; for example: advtune list methods",
    "backbone": "missing: one of inspect, ID|DIR; for example: advtune backbone inspect mini",
    "completion": "missing: one of bash, zsh, fish; for example: advtune completion bash",
}


@pytest.mark.parametrize("verb", MISSING)
def test_a_verb_alone_is_answered_with_a_command_to_copy(verb, capsys):
    try:
        code = main([verb])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert MISSING[verb] in line
    example = re.search(r"for example: (advtune .*); see: ", line)
    assert verb == "report" or parse(build(), shlex.split(example[1])[1:]).verb == verb


def test_every_verb_that_takes_something_is_in_that_table():
    assert set(MISSING) == set(VERBS) - {"serve", "demo"}


OUT = ["--data", "fashion-mnist-mini", "--out", "OUT"]
MISSPELT = {
    "verb": (["trian"], "unknown verb 'trian'; did you mean train? known: train, evaluate"),
    "flag": (["train", "capt", "--dta", "x"], "no option --dta; did you mean --data? see: advtune train --help"),
    "flag with its value": (["report", "--fromat=csv"], "no option --fromat; did you mean --format?"),
    "flag like no other": (["report", "--zzz"], "no option --zzz; see: advtune report --help"),
    "a field of the recipe": (["train", "capt", "--lr", "1", *OUT], "no option --lr; write -o lr=VALUE; see"),
    "a field with a dash": (["train", "capt", "--batch-size=4", *OUT], "no option --batch-size; write -o batch_size="),
    "a field of the attack": (["train", "capt", "--eps", "1", *OUT], "no option --eps; write -a eps=1/255; see"),
    "the attack's name": (["train", "capt", "--attack", "free", *OUT], "no option --attack; write -a name=VALUE; see"),
    "a field in testing": (["evaluate", "zero-shot", "--steps", "1"], "no option --steps; write -a steps=VALUE; see"),
    "option before the verb": (["--josn", "list"], "no option --josn before the verb; write advtune VERB --josn"),
    "too much": (["list", "data", "more"], "advtune list: error: nothing takes more; see: advtune list --help"),
    "choice": (["report", "--format", "markdwn"], "--format: unknown 'markdwn'; did you mean markdown?"),
    "what to list": (["list", "method"], "unknown 'method'; did you mean methods?"),
    "shell": (["completion", "bsh"], "unknown 'bsh'; did you mean bash?"),
    "method": (["train", "Te_CoA", *OUT], "unknown method 'Te_CoA'; did you mean tecoa?"),
    "underscore": (["train", "PMG_AFT", *OUT], "did you mean pmg-aft?"),
    "option": (["train", "capt", "-o", "momntum=0", *OUT], "method capt: no option momntum; did you mean momentum?"),
    "value": (["train", "capt", "-o", "ce=adversaril", *OUT], "clean, adversarial, both; did you mean adversarial?"),
    "preset": (["train", "advpt", "-o", "preset=x", *OUT], "no preset 'x'; known: none"),
    "attack": (["evaluate", "zero-shot", *OUT, "--attack", "autoatack"], "did you mean autoattack?"),
    "attack's option": (["evaluate", "zero-shot", *OUT, "--attack", "pgd", "-a", "step=3"], "did you mean steps?"),
    "defence": (["evaluate", "zero-shot", *OUT, "--defence", "jpg"], "unknown defence 'jpg'; did you mean jpeg?"),
    "data": (["train", "capt", "--data", "fashion_mnist_mni", "--out", "OUT"], "did you mean fashion-mnist-mini"),
    "form of data": (["train", "capt", "--data", "flder:x", "--out", "OUT"], "did you mean folder:x"),
    "backbone": (["train", "capt", "--backbone", "minni", *OUT], "(embedded: mini); did you mean mini?"),
    "methods": (["study", "few-shot"], "few-shot: the methods are missing; write --methods zero-shot tecoa"),
    "paper": (["report", "--against", "fpa"], "no published numbers of 'fpa'; did you mean fap?"),
    "protocol": (["study", "fewshot", "--methods", "tecoa"], "did you mean few-shot?"),
    "zero-shot": (["evaluate", "zeroshot", "--data", "fashion-mnist-mini"], "did you mean zero-shot?"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_near_name_is_suggested(name, tmp_path, capsys):
    arguments, expected = MISSPELT[name]
    try:
        code = main([str(tmp_path / "run") if each == "OUT" else each for each in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert line.startswith("advtune") and expected in line
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_is_suggested(tmp_path, capsys):
    (tmp_path / "tecoa").mkdir()
    for name in ("config.json", "delta.safetensors"):
        (tmp_path / "tecoa" / name).touch()
    assert main(["evaluate", str(tmp_path / "tecao"), "--data", "fashion-mnist-mini"]) == 2
    assert f"did you mean {tmp_path / 'tecoa'}?" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "tecao")]) == 2
    assert f"tecao: there is no such file or folder; did you mean {tmp_path / 'tecoa'}?" in capsys.readouterr().err


def test_a_backbone_of_the_hub_is_suggested(monkeypatch, capsys):
    import huggingface_hub

    def offline(name, **_):
        raise OSError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name, hint in (("bas", "did you mean openai/clip-vit-base-patch32?"), ("base", "give a local folder")):
        backbone = f"openai/clip-vit-{name}-patch32"
        assert main(["evaluate", "zero-shot", "--data", "fashion-mnist-mini", "--backbone", backbone]) == 2
        assert f"{backbone}' cannot be downloaded (not there); {hint}" in capsys.readouterr().err


def test_hints():
    assert suggest("zzz", ["tecoa"]) == ""
    assert suggest("cifar11", ["cifar10", "cifar100", "dtd"], 2) == "did you mean cifar10 or cifar100?"
    assert near("x", ["b", "a", "b"]) == "known: b, a"
    assert near("x", []) == "known: none"


def test_an_option_s_beginning_and_a_value_like_one_are_left_to_argparse():
    args = parse(build(), ["train", "capt", "--da", "x", "--out", "o", "--template", "--a b {}"])
    assert (args.data, args.template) == ("x", ["--a b {}"])
