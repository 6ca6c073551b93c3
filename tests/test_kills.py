"""SIGKILL at random moments of train, evaluate, AutoAttack and study, and two processes at once: tests/killing.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
KILLS = 32


@pytest.fixture
def killing(clip_folder, image_folder, tmp_path):
    """Runs the program on copies of the tiny backbone and images; what it found, and what the children said."""

    def call(verb, seed=0):
        place = tmp_path / "place"
        shutil.copytree(clip_folder, place / "clip")
        shutil.copytree(image_folder, place / "colours")
        words = [Path(__file__).with_name("killing.py"), verb, place, KILLS, seed]
        done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout), done.stderr

    return call


@pytest.mark.parametrize("verb", ["train", "evaluate", "autoattack", "study"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(verb, killing):
    found, _ = killing(verb)
    assert found["wrong"] == []
    assert found["hits"] >= KILLS and found["middle"] >= KILLS // 4
    assert found["files"] >= 3


def test_two_processes_at_once(killing):
    """Both evaluate, each with rows that are right; one tunes, and the other is told."""
    found, said = killing("together")
    assert found["evaluate codes"] == [0, 0] and found["evaluate the same"] and not found["other rows"]
    assert all(1 <= count <= 2 for count in found["rows"]) and len(found["rows"]) == 3
    assert found["train codes"] == [0, 2] and found["train the same"]
    lines = [line for line in said.splitlines() if line.startswith("advtune: error: ")]
    assert len(lines) == 1 and "place/out" in lines[0]
    assert "another process works here" in lines[0] or "exists; go on with --resume" in lines[0]
