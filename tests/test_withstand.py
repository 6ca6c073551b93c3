"""Which images stand: stage after stage, in full batches, and after a kill to the same flags."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, replace

import pytest
import torch

from advtune import evaluation, withstand
from advtune.attacks import APGD, CWL2, FAB, FGSM, PGD, Noise, Square, Transfer
from advtune.cli import main
from advtune.data import Images
from advtune.data.images import cache_dir
from advtune.disk import with_crc
from advtune.results import Row
from advtune.withstand import Journal, check_budget

N, SIZE, CPU = 23, 4, torch.device("cpu")


def brightness(x):
    return x.mean((1, 2, 3))


def dark(x):
    """Class 0 for images darker than the middle."""
    return torch.stack([0.5 - brightness(x), brightness(x) - 0.5], 1)


@dataclass(frozen=True)
class Lift:
    """Adds eps, and writes down whom it met."""

    eps: float
    name: str
    met: list
    norm = "linf"

    def __call__(self, f, x, y, loss=None):
        self.met.append((self.name, (brightness(x) * 255).round().int().tolist()))
        return (x + self.eps).clamp(0, 1)


@dataclass(frozen=True)
class Ensemble:
    met: list
    eps: float = 80 / 255
    name, norm = "ensemble", "linf"

    def stages(self):
        return [Lift(eps / 255, f"lift {eps}", self.met) for eps in (20, 10, 50, 80)]


@pytest.fixture
def shades():
    """Images of 23 shades of grey, all of label 0: up to 127 they are right, and 127 - eps is what withstands."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    values = (7 * order + 1).to(torch.uint8)  # 1, 8, ..., 155
    x = values[:, None, None, None].expand(N, 3, 4, 4).contiguous()
    return Images(x, torch.zeros(N, dtype=torch.long), [], "s", [], [])


def run(images, attack, journal=None, size=SIZE, start=None, seed=0, label=""):
    with torch.no_grad():
        start = dark(images.x.float() / 255).argmax(1) == images.y if start is None else start
    return withstand.withstand(dark, images, start, attack, size, CPU, seed, False, journal, label)


# --- stages -------------------------------------------------------------------------------------------------


def test_each_stage_meets_what_still_stands_in_full_batches(shades):
    met, shade = [], shades.x[:, 0, 0, 0].int()
    outcome = run(shades, Ensemble(met))
    still = shade <= 127
    for stage, line in zip(Ensemble([]).stages(), outcome.stages, strict=True):
        batches = [batch for name, batch in met if name == stage.name]
        assert list(itertools.chain(*batches)) == shade[still].tolist()  # all, once, in order
        assert [len(batch) for batch in batches[:-1]] == [SIZE] * (len(batches) - 1)
        assert 0 < len(batches[-1]) <= SIZE
        before, still = still, still & (shade + round(stage.eps * 255) <= 127)
        fell = int(before.sum()) - int(still.sum())
        assert {**line, "seconds": 0} == {
            "attack": stage.name, "attacked": int(before.sum()), "fell": fell, "seconds": 0,
        }  # fmt: skip
        assert torch.equal(outcome.after[stage.name], still)
    assert [line["fell"] for line in outcome.stages] == [3, 0, 5, 4]
    assert torch.equal(outcome.stands, still)
    flags = [shade <= 127, *outcome.after.values()]
    assert all(bool((one | ~two).all()) for one, two in itertools.pairwise(flags))  # who fell does not rise
    assert int(still.sum()) == 7


def test_a_single_attack_is_its_own_stage(shades):
    met = []
    outcome = run(shades, Lift(50 / 255, "lift", met))
    assert list(outcome.after) == ["lift"]
    assert torch.equal(outcome.after["lift"], outcome.stands)
    assert [line["attack"] for line in outcome.stages] == ["lift"]


def test_what_is_wrong_or_left_out_is_never_attacked(shades):
    shade = shades.x[:, 0, 0, 0].int()
    met = []
    run(shades, Ensemble(met))
    assert max(itertools.chain(*(batch for _, batch in met))) <= 127
    start = shade < 40
    met.clear()
    outcome = run(shades, Ensemble(met), start=start)
    assert set(itertools.chain(*(batch for _, batch in met))) == set(shade[start].tolist())
    assert torch.equal(outcome.stands, start) and torch.equal(start, shade < 40)
    met.clear()
    assert int(run(shades, Ensemble(met), start=shade < 0).stands.sum()) == 0
    assert met == []


def test_a_stage_that_leaves_its_own_ball_is_refused(shades):
    @dataclass(frozen=True)
    class Cheat(Lift):
        def __call__(self, f, x, y, loss=None):
            return x + 2 * self.eps

    with pytest.raises(RuntimeError, match="cheat left its budget"):
        run(shades, Cheat(10 / 255, "cheat", []))
    far = torch.full((2, 3, 4, 4), 0.5)
    check_budget(far, far + 0.1, replace(CWL2(), eps=0.1 * 48**0.5))
    with pytest.raises(RuntimeError, match="cw-l2 left its budget"):
        check_budget(far, far + 0.1, replace(CWL2(), eps=0.1 * 48**0.5 - 0.01))


def test_every_batch_is_seeded(shades):
    @dataclass(frozen=True)
    class Look(Lift):
        def __call__(self, f, x, y, loss=None):
            self.met.append((torch.initial_seed(), float(torch.rand(()))))
            return x

    state = torch.random.get_rng_state()
    run(shades, Look(0.0, "look", met := []), seed=5)
    assert len(met) == 5 and len(set(met)) == 1 and met[0][0] == 5
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the journal --------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.fixture
def calls(monkeypatch):
    """How often a batch is attacked; after `most` of them the process is killed."""
    real, count = withstand.attacked, {"calls": 0, "most": 10**9}

    def attacked(*arguments):
        if count["calls"] == count["most"]:
            raise Killed
        count["calls"] += 1
        return real(*arguments)

    monkeypatch.setattr(withstand, "attacked", attacked)
    return count


def killed_after(k, calls, call):
    calls |= {"calls": 0, "most": k}
    with pytest.raises(Killed):
        call()
    calls |= {"calls": 0, "most": 10**9}


def test_killed_after_any_batch_it_goes_on_to_the_same_flags(shades, calls, tmp_path):
    whole, total = run(shades, Ensemble([])), calls["calls"]
    assert total == 5 + 4 + 4 + 3
    for k in range(total):
        file = tmp_path / f"{k}.jsonl"
        killed_after(k, calls, lambda file=file: run(shades, Ensemble([]), Journal(file)))
        assert len(file.read_text().splitlines() if file.exists() else []) == k
        journal = Journal(file)
        again = run(shades, Ensemble([]), journal)
        assert calls["calls"] == total - k  # what was done is not done again
        assert torch.equal(again.stands, whole.stands)
        assert all(torch.equal(again.after[name], whole.after[name]) for name in whole.after)
        facts = [[{**line, "seconds": 0} for line in each.stages] for each in (again, whole)]
        assert facts[0] == facts[1]
        assert len(file.read_text().splitlines()) == total
        journal.close()
        assert not file.exists()


def test_killed_again_and_again_it_comes_to_an_end(shades, calls, tmp_path):
    whole, total, file = run(shades, Ensemble([])), calls["calls"], tmp_path / "journal"
    for done in range(3, total, 3):
        killed_after(3, calls, lambda: run(shades, Ensemble([]), Journal(file)))
        assert len(file.read_text().splitlines()) == done
    assert torch.equal(run(shades, Ensemble([]), Journal(file)).stands, whole.stands)
    assert calls["calls"] == 1 == total - done


def test_cut_at_any_byte_it_goes_on_to_the_same_flags(shades, calls, tmp_path):
    """Also at the end of a line, before its newline; and with what a lost block of the disk reads as."""
    whole, file = run(shades, Ensemble([])), tmp_path / "journal"
    run(shades, Ensemble([]), Journal(file))
    content = file.read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    for line in (0, 1, 6, 14, 15):
        begin, end = content.index(b"{", ends[line - 1] if line else 0), ends[line]
        for at, tail in itertools.product((begin, begin + 1, begin + 30, end - 1, end), (b"", b"\0" * 9)):
            file.write_bytes(content[:at] + tail)
            calls["calls"] = 0
            assert torch.equal(run(shades, Ensemble([]), Journal(file)).stands, whole.stands)
            assert calls["calls"] == len(ends) - line
            assert file.read_bytes() == content


@pytest.mark.parametrize("change", ["rows", "stage", "order"])
def test_a_journal_of_other_images_is_not_believed(change, shades, calls, tmp_path):
    """From the first line that does not fit on it is written anew, so that a second kill costs nothing."""
    whole, file = run(shades, Ensemble([])), tmp_path / "journal"
    run(shades, Ensemble([]), Journal(file))
    total, lines = calls["calls"] // 2, [json.loads(line) for line in file.read_text().splitlines()]
    if change == "rows":
        lines[2]["rows"][0] += 1
    elif change == "stage":
        lines[2]["stage"] = "lift 11"
    else:
        lines[2], lines[3] = lines[3], lines[2]
    for line in lines[2:]:
        line["stands"] = [not each for each in line["stands"]]
    for line in lines:
        line.pop("crc32")
    file.write_text("".join(with_crc(line) + "\n" for line in lines))
    killed_after(4, calls, lambda: run(shades, Ensemble([]), Journal(file)))
    assert len(file.read_text().splitlines()) == 6
    again = run(shades, Ensemble([]), Journal(file))
    assert calls["calls"] == total - 6
    assert all(torch.equal(again.after[name], whole.after[name]) for name in whole.after)


def test_a_label_tells_the_points_of_a_curve_apart(shades, calls, tmp_path):
    file = tmp_path / "journal"
    lift = Lift(1 / 255, "lift", [])
    run(shades, lift, Journal(file), label="eps 1/255 ")
    calls["calls"] = 0
    run(shades, lift, Journal(file), label="eps 2/255 ")
    assert calls["calls"] == 5


def test_without_a_path_nothing_is_kept(shades, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal()
    run(shades, Ensemble([]), journal)
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_it_says_from_where_it_goes_on(shades, calls, tmp_path):
    file = tmp_path / "journal"
    killed_after(7, calls, lambda: run(shades, Ensemble([]), Journal(file)))
    with redirect_stderr(io.StringIO()) as said:
        run(shades, Ensemble([]), Journal(file))
    assert said.getvalue() == "advtune: lift 10: 8 images were done before an interruption; going on\n"


# --- in an evaluation ---------------------------------------------------------------------------------------


def facts(row):
    """All of a row that does not depend on the clock."""
    told = json.loads(row.to_json())
    for stage in told["stages"]:
        stage.pop("seconds")
    return {key: value for key, value in told.items() if key not in ("time", "seconds", "crc32")}


def test_an_evaluation_goes_on_after_a_kill(vlm, task, calls):
    """A curve, so with labels; and the journal is gone once the row is there."""
    attack, eps = PGD(steps=3, restarts=2), (1 / 255, 4 / 255, 8 / 255)

    def curve(**how):
        return evaluation.evaluate_curve(vlm, task, attack, eps, part="all", batch_size=2, show=False, **how)

    whole, total = curve(), calls["calls"]
    assert total > 10
    for k in (0, 1, total // 2, total - 1):
        killed_after(k, calls, lambda: curve(resume=True))
        files = list((cache_dir() / "evaluations").glob("*"))
        assert [len(file.read_text().splitlines()) for file in files] == [k] * (k > 0)
        again = curve(resume=True)
        assert calls["calls"] == total - k
        assert [facts(row) for row in again] == [facts(row) for row in whole]
        assert list((cache_dir() / "evaluations").glob("*")) == []
    killed_after(5, calls, lambda: curve(resume=True))
    curve()
    assert calls["calls"] == total  # nobody asked for the journal


def test_a_journal_is_named_by_all_that_decides_the_flags(vlm, task, image_folder, monkeypatch):
    import advtune
    from advtune.defences import jpeg, noise

    seen = []

    class Seen(Journal):
        def __init__(self, path=None):
            seen.append(path.name)
            super().__init__(path)

    monkeypatch.setattr(evaluation, "Journal", Seen)
    base = dict(attack=PGD(steps=1), part="test", limit=3, batch_size=3, resume=True, show=False)
    other = vlm.with_image_tower()
    other.origin, other.run = replace(other.origin, sha256="other"), {}
    other.learned = ()
    for changes in (
        {}, dict(attack=PGD(steps=2)), dict(attack=PGD(steps=1, eps=2 / 255)), dict(limit=2), dict(batch_size=2),
        dict(seed=1), dict(resolution=20), dict(source=vlm), dict(source=other), dict(defence=jpeg),
        dict(defence=noise), dict(defence=jpeg, attack=PGD(steps=1, bpda=True)), dict(model=other),
        dict(data=advtune.load_task(f"folder:{image_folder}", template="a {}")),
        dict(attack=FGSM()), dict(attack=Noise()), dict(part="train"),
    ):  # fmt: skip
        evaluation.evaluate(**({"model": vlm, "data": task} | base | changes))
    vlm.precision = "bf16"
    evaluation.evaluate(vlm, task, **base)
    assert len(set(seen)) == len(seen) == 18
    vlm.precision = "fp32"
    evaluation.evaluate(vlm, task, **base)
    assert seen[-1] == seen[0]


def test_what_would_not_be_known_again_has_no_journal(vlm, task):
    learner = vlm.with_image_tower()
    for changes in (dict(model=learner), dict(defence=lambda x: x)):
        with pytest.raises(evaluation.UserError, match="resume: "):
            evaluation.evaluate(**({"model": vlm, "data": task, "attack": PGD()} | changes), resume=True, show=False)
        evaluation.evaluate(**({"model": vlm, "data": task, "attack": PGD(steps=1)} | changes), show=False)


STOPS = """
import signal
import sys
from functools import partial
from advtune.attacks import autoattack
from advtune.cli import main
from advtune.withstand import Journal
autoattack.Square = partial(autoattack.Square, queries=60)
add = Journal.add
def add_and_wait(journal, *line):
    add(journal, *line)
    signal.pause()
Journal.add = add_and_wait
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_process_goes_on(clip_folder, image_folder, tmp_path, capsys, short_square):
    """SIGKILL when the first image is done (the child waits for it there: a fast machine would be through);
    the same command again gives the row of one run."""
    out = tmp_path / "out"
    arguments = [
        "evaluate", "zero-shot", "--backbone", str(clip_folder), "--data", f"folder:{image_folder}", "--device", "cpu",
        "--precision", "fp32", "--batch-size", "1", "--attack", "autoattack", "-a", "eps=6/255", "--limit", "8",
    ]  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", STOPS, *arguments, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # fmt: skip

    def lines():
        return sum(len(file.read_text().splitlines()) for file in (cache_dir() / "evaluations").glob("*.jsonl"))

    until = time.monotonic() + 600  # a hang; it takes seconds
    while lines() < 1 and child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    said = child.communicate()[0].decode()
    assert child.returncode == -signal.SIGKILL, said
    assert lines() == 1
    assert not out.exists()  # half a row is no row

    assert main([*arguments, "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    assert "advtune: apgd-ce: 1 images were done before an interruption; going on\n" in printed.err
    row = Row.from_json(printed.out)
    assert (out / "results.jsonl").read_text() == printed.out
    assert lines() == 0
    assert main([*arguments, "--json"]) == 0
    whole = Row.from_json(capsys.readouterr().out)
    assert facts(row) == facts(whole)
    assert row.stages[0]["fell"] > 0 and len(row.stages) == 4


# --- rule 4 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        PGD(4 / 255, 3, restarts=2), PGD(0.3, 3, restarts=2, norm="l2"), APGD(4 / 255, 8, restarts=2),
        APGD(4 / 255, 6, loss="dlr-targeted"), FAB(4 / 255, 4), Square(24 / 255, 40), Square(4.0, 40, norm="l2"),
        CWL2(0.3, 8, searches=2), Noise(64 / 255), Transfer(PGD(6 / 255, 2), dark),
    ],
    ids=lambda attack: f"{attack.name} {attack.norm}",
)  # fmt: skip
def test_random_streams_do_not_depend_on_the_batch_size(attack, vlm, task):
    """What an image meets is drawn for it, not for its place in a batch."""
    how = dict(part="all", show=False)
    if isinstance(attack, Transfer):
        how["source"] = other = vlm.with_image_tower()
        with torch.no_grad():
            other.clip.image.position.mul_(1.5)
        attack = attack.attack
    rows = [evaluation.evaluate(vlm, task, attack, batch_size=size, **how) for size in (64, 7, 1)]
    assert rows[0].flags == rows[1].flags == rows[2].flags
    assert 0 < rows[0].robust["correct"] < rows[0].clean["correct"]


def test_a_cache_that_cannot_be_written_ends_nothing(tmp_path):
    """Without a journal a kill costs the work done; the evaluation itself goes on."""
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "below" / "journal.jsonl")
    with pytest.warns(UserWarning, match="no journal"):
        journal.add("pgd", torch.arange(2), torch.ones(2) > 0)
    journal.add("pgd", torch.arange(2), torch.ones(2) > 0)
    journal.close()
    assert journal.path is None
    assert (tmp_path / "file").read_text() == ""
