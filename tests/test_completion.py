"""Shell completion: the scripts are sound, know every name, and bash completes with them."""

import shutil
import subprocess
import sys

import pytest

from advtune.attacks import ATTACKS
from advtune.cli import VERBS, main
from advtune.data.catalog import names
from advtune.methods import METHODS

TRY = """
source "$0"
function=$(complete -p advtune | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
$function advtune "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$COMP_CWORD - 1]}"
echo "${COMPREPLY[*]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    from advtune.completion import script

    folder, found = tmp_path_factory.mktemp("scripts"), {}
    for shell in ("bash", "zsh", "fish"):
        found[shell] = folder / shell
        found[shell].write_text(script(shell))
    return found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_sound_and_knows_every_name(shell, scripts):
    text = scripts[shell].read_text()
    known = {*VERBS, *METHODS, *ATTACKS, *names(), "base-to-new", "jpeg", "fap"}
    assert {name for name in known if name not in text} == set()
    assert "tensorboard" in text and "train-limit" in text
    if shutil.which(shell):
        done = subprocess.run([shell, "-n", str(scripts[shell])], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["tr"], "train"),
        (["train", "ca"], "capt"),
        (["audit", "--fix", "teco"], "tecoa"),
        (["train", "capt", "--da"], "--data"),
        (["train", "capt", "--data", "cifar"], "cifar10 cifar100"),
        (["evaluate", "zero-shot", "--attack", "apgd-"], "apgd-ce apgd-dlr apgd-t"),
        (["study", "few-shot", "--methods", "tecoa", "cap"], "capt"),
        (["report", "--format", ""], "markdown csv latex json html"),
        (["list", "b"], "backbones"),
        (["backbone", "i"], "inspect"),
        (["backbone", "inspect", "facebook/metaclip-h"], "facebook/metaclip-h14-fullcc2.5b"),
        (["evaluate", "zer"], "zero-shot"),
        (["evaluate", "ru"], "runs"),
        (["train", "capt", "--backbone", "mi"], "mini"),
        (["train", "capt", "--backbone", "runs/te"], "runs/tecoa"),
        (["predict", "runs/tecoa", "runs/tecoa/del"], "runs/tecoa/delta"),
        (["study", "eps"], "eps-curve"),
        (["study", "runs/tecoa/stu"], "runs/tecoa/study.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_completes(typed, offered, scripts, tmp_path):
    (tmp_path / "runs" / "tecoa").mkdir(parents=True)
    for name in ("delta", "study.toml"):
        (tmp_path / "runs" / "tecoa" / name).touch()
    command = ["bash", "-c", TRY, str(scripts["bash"]), "advtune", *typed]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == offered


def test_the_verb_prints_it(scripts, capsys, monkeypatch):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == scripts["bash"].read_text()
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "advtune: error: completion needs its package: pip install 'advtune[completion]'\n"
    )
