"""Several processes at one job: the same weights and flags as one process, every image once, one of them speaks."""

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch

import ranks
from advtune import distributed, ending, evaluation, withstand
from advtune.arguments import build
from advtune.attacks import PGD
from advtune.cli import main
from advtune.data import Images
from advtune.errors import UserError
from advtune.methods import configure
from advtune.results import read
from advtune.withstand import Journal

APART = 1e-4  # of the way that the weights went, in fp32: rounding, over up to 12 steps
ROOT = Path(__file__).parents[1]
LONG = 900  # seconds that a hang may take; nothing waits for it where all goes well


def free_port():
    """None that the system gives by itself, to whoever connects or asks for any: it is taken a little later."""
    port = 10_000 + 10 * (os.getpid() % 2_000)  # another worker of pytest begins elsewhere
    while True:
        with socket.socket() as place, suppress(OSError):
            place.bind(("127.0.0.1", port))
            return port
        port += 1


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in distributed.VARIABLES}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        fixed["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would ask for the machine's name, which not every machine knows
    return kept | fixed | {name: str(value) for name, value in more.items()}


def two(command, **more):
    """What each of two processes of one job prints and complains of."""
    where = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), **more)
    with ExitStack() as stack:
        processes = []
        for rank in range(2):
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            env = environment(RANK=rank, LOCAL_RANK=rank, **where)
            processes.append(stack.enter_context(subprocess.Popen(command, env=env, **pipes)))
        return [each.communicate(timeout=LONG) for each in processes]


@pytest.fixture(scope="module")
def both(clip_folder, image_folder, tmp_path_factory):
    """What two gloo processes found, where they wrote, and what each said."""
    out = tmp_path_factory.mktemp("both")
    command = [sys.executable, ranks.__file__, str(clip_folder), str(image_folder), str(out)]
    said = two(command, ADVTUNE_CACHE=out / "cache", ADVTUNE_TIMEOUT=LONG)
    assert all((out / f"{rank}.pt").is_file() for rank in range(2)), said[0][1] + said[1][1]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)], out, said


@pytest.mark.parametrize("name", ranks.TUNED)
def test_two_processes_tune_to_the_weights_of_one(name, both, vlm, task, tmp_path):
    """Twelve steps, or eight, or both phases of eight; batches that two do not divide, a last one of a single image."""
    (one, two), out, _ = both
    alone = ranks.tune(name, vlm, task, tmp_path / "run").delta()
    for key in alone:
        assert torch.equal(one["deltas"][name][key], two["deltas"][name][key])
    start = configure(*ranks.TUNED[name])[0].setup(vlm, task, 0)["student"].delta()
    fields = ranks.TUNED[name][1]
    lines, others = ([json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
                     for place in (tmp_path / "run", out / name))  # fmt: skip
    assert len(lines) == len(others) == 4 * -(-9 // fields["batch_size"]) * (2 if name == "teacher first" else 1)
    for line, other in zip(lines, others, strict=True):
        assert list(line) == list(other)
        assert other == pytest.approx(line, rel=1e-3, abs=1e-5)
    assert "tuned by 2 processes" in json.loads((out / name / "config.json").read_text())["notes"]
    for key, value in alone.items():
        assert (one["deltas"][name][key] - value).norm() <= APART * (value - start[key]).norm() + 1e-6, key
    assert sum(float((value - start[key]).norm()) for key, value in alone.items()) > 1e-3


def test_portions_of_several_processes_a_finished_and_an_interrupted_run(both):
    (one, two), out, _ = both
    for key, value in one["deltas"]["tower"].items():
        torch.testing.assert_close(one["parted"][key], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(one["parted"][key], two["parted"][key])
        assert torch.equal(one["again"][key], value) and torch.equal(two["again"][key], value)
    assert one["said"] == two["said"] == "6 steps: after step 6, which is saved"
    for key, value in one["deltas"]["replay"].items():  # stopped and gone on with, to the same bits
        assert torch.equal(one["cut"][key], value) and torch.equal(two["cut"][key], value)
    assert "batches went through 1 images at a time" in (out / "parted" / "config.json").read_text()


@pytest.mark.parametrize("name", ranks.EVALUATED)
def test_two_processes_find_the_flags_of_one(name, both, vlm, task, tmp_path):
    (one, two), _, _ = both
    alone = ranks.flags(vlm, task, tmp_path / "rows", [name])[name]
    assert one["flags"][name] == two["flags"][name] == alone
    assert len(alone["clean"]) == 12
    assert name == "none" or {"0", "1"} <= {*alone["clean"], *alone["robust"]}
    assert name != "class names" or json.loads(alone["text"])["edits"]


def test_only_the_first_process_writes_and_prints(both):
    (one, two), out, said = both
    assert len(read(out / "rows" / "results.jsonl")) == len(ranks.EVALUATED)
    assert not list((out / "cache").rglob("evaluations/*")), "journals are gone when their rows are there"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(
        [*ranks.TUNED, "parted", "cut", "rows", "cache"]
    )
    assert [text for text, _ in said] == ["", ""]
    assert "numbers: not the same in process 1 as in process 0" in one["differ"] == two["differ"]
    assert [[i for part in each for i in part] for each in one["shares"]] == [[*range(n)] for n in range(6)]


def test_an_error_of_one_process_ends_all_with_one_line(both):
    """What only the second process cannot do, and then a process that is gone without a word."""
    _, out, said = both
    lines = [line for _, text in said for line in text.splitlines()]
    assert sorted(lines) == [
        "advtune: error: another process has ended; tuning goes on with --resume, evaluation by the same command",
        "advtune: error: only the second process knows why",
    ]
    assert json.loads((out / "status.json").read_text()) == [2, 2]
    assert not list(out.glob("failed*"))  # nothing to go on with


# --- without processes --------------------------------------------------------------------------------------


class World:
    """The processes of a job, one after another in this one: `gather` waits for nobody, it asks what each would say."""

    def __init__(self, monkeypatch, k):
        self.patch, self.k = monkeypatch, k

    def each(self, work):
        """work() in the place of every process, with gather giving what the process itself has, in its place."""
        found = []
        for rank in range(self.k):
            self.patch.setattr(distributed, "_here", distributed.Place(rank, self.k))
            self.patch.setattr(
                distributed, "gather", lambda value, r=rank: [None] * r + [value] + [None] * (self.k - r - 1)
            )
            self.patch.setattr(distributed, "told", lambda value: value)
            found.append(work())
        return found


def test_shares_are_all_of_it_once():
    for n in range(40):
        for k in range(1, 12):
            shares = [distributed.share(n, k, rank) for rank in range(k)]
            assert [i for each in shares for i in range(n)[each]] == [*range(n)]
            sizes = [each.stop - each.start for each in shares]
            assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)
    assert distributed.share(7) == slice(0, 7)


def test_no_image_is_counted_twice_or_lost_for_any_size_and_world(monkeypatch):
    """What each process attacks, for sets, batches, numbers of processes and journals of any size."""
    random_ = random.Random(0)
    for _ in range(150):
        n, size, k = random_.randint(0, 40), random_.randint(1, 12), random_.randint(1, 9)
        rows = torch.tensor(sorted(random_.sample(range(60), n)), dtype=torch.int64)
        batches = [some for some in rows.split(size) if len(some)]
        known = random_.randint(0, len(batches))
        journal, seen = Journal(), []
        journal.known = lambda key, batches, known=known: [
            torch.ones(len(b), dtype=torch.bool) for b in batches[:known]
        ]
        monkeypatch.setattr(
            withstand, "attacked", lambda f, images, rows, *_, seen=seen: seen.append(rows) or rows % 2 == 0
        )
        args = (None, None, batches, PGD(), torch.device("cpu"), 0, journal, "pgd")
        told = World(monkeypatch, k).each(lambda args=args: [*withstand.answers(*args)])
        attacked = torch.cat(seen) if seen else torch.empty(0)
        assert sorted(attacked.tolist()) == torch.cat(batches[known:]).tolist() if known < len(batches) else not seen
        for some, stands in (pair for each in told for pair in each[known:]):
            assert torch.equal(stands, some % 2 == 0)
        assert sorted(i for each in told for some, _ in each[known:] for i in some.tolist()) == sorted(
            attacked.tolist()
        )


def test_every_batch_of_clean_images_is_predicted_once(monkeypatch):
    random_ = random.Random(1)
    for _ in range(50):
        n, size, k = random_.randint(1, 40), random_.randint(1, 12), random_.randint(1, 9)
        x = torch.arange(n).view(n, 1, 1, 1).expand(n, 3, 1, 1).to(torch.uint8)
        images = Images(x, torch.zeros(n, dtype=torch.int64), [], "", [], [])
        found = {}

        class Setting:
            model = type("Model", (), {"device": torch.device("cpu")})
            f = staticmethod(lambda x: torch.nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long(), 40).float())
            defence = None

        s = Setting()
        s.images, s.size, s.seed, s.show = images, size, 0, False
        seen = []
        monkeypatch.setattr(distributed, "attempt", lambda work, seen=seen: seen.append(work()) or [*seen])
        for rank in range(k):
            monkeypatch.setattr(distributed, "_here", distributed.Place(rank, k))
            try:
                found = evaluation.predict(s)
            except KeyError:  # a batch of a process that has not had its turn here
                assert rank < k - 1
        assert found.tolist() == [*range(n)]
        assert sum(len(each) for each in seen) == -(-n // size)


def test_sums_go_in_buckets(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 10)
    tensors = [torch.zeros(4), torch.zeros(2, 3), torch.zeros(30), torch.zeros(1), torch.zeros(1, dtype=torch.float64)]
    assert [[len(each.flatten()) for each in bucket] for bucket in distributed.buckets(tensors)] == [
        [4, 6],
        [30],
        [1],
        [1],
    ]


GOOD = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"RANK": None}, "WORLD_SIZE is set in the environment, but not RANK; start with torchrun, or unset"),
        ({"LOCAL_RANK": None, "MASTER_PORT": None}, "but not LOCAL_RANK, MASTER_PORT"),
        ({"WORLD_SIZE": None}, "RANK is set in the environment, but not WORLD_SIZE"),
        ({"RANK": "one"}, "are whole numbers"),
        ({"RANK": "2"}, "no such process"),
        ({"LOCAL_RANK": "-1"}, "no such process"),
        ({"MASTER_PORT": "99999"}, "no such process"),
        ({"ADVTUNE_TIMEOUT": "soon"}, "ADVTUNE_TIMEOUT='soon' is not a number of seconds"),
        ({"ADVTUNE_TIMEOUT": "0"}, "is not a number of seconds"),
    ],
)
def test_an_environment_that_says_half_is_one_line(change, says, monkeypatch, tmp_path, capsys):
    for name, value in {**GOOD, **change}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    command = ["train", "tecoa", "--data", "fashion-mnist-mini", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not list(tmp_path.glob("run*")) and distributed.world() == 1


def test_one_process_needs_no_environment_and_nothing_of_it_is_imported(monkeypatch):
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not distributed.wanted()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "somewhere")  # some machines set it for all
    assert not distributed.wanted()
    value = torch.ones(3)
    distributed.total([value])
    assert value.tolist() == [1, 1, 1]
    assert distributed.gather(5) == [5] and distributed.told(5) == 5 and distributed.attempt(lambda: 5) == [5]
    text = Path(distributed.__file__).read_text()
    assert not [line for line in text.splitlines() if line.startswith(("import torch", "from torch"))]


@pytest.mark.parametrize("verb", ["study", "audit", "predict", "demo"])
def test_other_verbs_are_done_by_one_process(verb, monkeypatch, capsys, tmp_path):
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    more = {"study": ["few-shot"], "audit": ["--data", "fashion-mnist-mini"], "predict": ["mini", "x.png"], "demo": []}
    assert main([verb, *more[verb]]) == 2
    assert f"{verb} is done by one process; torchrun is for train and evaluate" in capsys.readouterr().err


def test_a_gpu_for_each_process():
    place = distributed.Place(3, 4, 3)
    distributed.check_gpu("auto", place, 4)
    with pytest.raises(UserError, match="process 3 of this machine, which has 2 GPUs; --nproc-per-node 2"):
        distributed.check_gpu("cuda", place, 2)
    with pytest.raises(UserError, match="--device cuda:1 is one for 4 processes"):
        distributed.check_gpu("cuda:1", place, 4)


def test_a_process_goes_in_its_turn_and_does_not_wait_for_one_that_has_ended(monkeypatch):
    class Store(dict):
        def check(self, keys):
            return all(key in self for key in keys)

        def set(self, key, value):
            self[key] = value

    store, done = Store(), []
    for local in (0, 1):  # the second finds that the first has been
        monkeypatch.setattr(distributed, "_here", distributed.Place(local, 2, local, store=store))
        with distributed.in_turn():
            done.append(local)
    assert done == [0, 1] and list(store) == ["turn 1 on 0"]
    store["ended"] = "1"
    with pytest.raises(UserError, match="another process has ended"), distributed.in_turn():
        done.append(2)
    assert done == [0, 1]


LEFT = """
import time
from pathlib import Path
from advtune import distributed
distributed.start("cpu")
import torch._dynamo
distributed.gather(distributed.rank())
distributed.stop()
def threads():
    return [place.read_text().strip() for place in Path("/proc/self/task").glob("*/comm")]
end = time.monotonic() + 20  # the system lists a thread a little longer than it lives
while any("gloo" in name or "tcpstore" in name for name in threads()) and time.monotonic() < end:
    time.sleep(0.1)
print(threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_the_group_is_left_when_it_has_stopped():
    """One that is left when Python ends aborts the process, now and then: whoever holds the group keeps it."""
    for text, wrong in two([sys.executable, "-c", LEFT]):
        assert "python" in text and "gloo" not in text and "tcpstore" not in text, text + wrong


@pytest.mark.slow
def test_torchrun(clip_folder, image_folder, tmp_path):
    """The command line of docs/scale.md: train, evaluate, refuse, and a process that is killed."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    how = ["--device", "cpu", "--precision", "fp32"]
    data = ["--backbone", str(clip_folder), "--data", f"folder:{image_folder}", *how]
    out, env = str(tmp_path / "run"), environment(ADVTUNE_CACHE=tmp_path / "cache")

    def do(*arguments):
        given = [*run, "-m", "advtune", *arguments]
        return subprocess.run(given, env=env, capture_output=True, text=True, timeout=LONG)

    train = ["train", "tecoa", *data, "--epochs", "2", "-o", "batch_size=4", "--out", out]
    done = do(*train)
    assert done.returncode == 0 and done.stdout.count("tuned; next:") == 1, done.stderr
    again = do(*train)
    assert again.returncode != 0 and again.stderr.count("advtune: error:") == 1
    assert f"{out} exists; go on with --resume" in again.stderr
    done = do("evaluate", out, *data[2:], "--attack", "pgd", "-a", "eps=1/255", "--batch-size", "5", "--json")
    assert done.returncode == 0 and done.stdout.count('"schema"') == 1, done.stderr
    row = read(tmp_path / "run" / "results.jsonl")[0]
    assert json.loads(done.stdout)["flags"] == row.flags and len(row.flags["robust"]) == 12
    alone = subprocess.run(
        [sys.executable, "-m", "advtune", "evaluate", out, *data[2:], "--attack", "pgd", "-a", "eps=1/255",
         "--batch-size", "5", "--json"], env=env, capture_output=True, text=True, timeout=LONG,
    )  # fmt: skip
    assert json.loads(alone.stdout)["flags"] == row.flags


@pytest.mark.parametrize(
    ("here", "begins"),
    [
        (None, "advtune train tecoa"),
        ("2", "torchrun --nproc-per-node 2 -m advtune train tecoa"),
        (
            "1",
            "torchrun ... -m advtune train tecoa",
        ),  # of two machines, whose flags nobody here knows
    ],
)
def test_the_command_that_goes_on_is_the_one_that_was_given(here, begins, monkeypatch, tmp_path):
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value) if here else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here or "1")
    words = ["train", "tecoa", "--data", "cifar10", "--out", str(tmp_path / "run")]
    args = build().parse_args(words)
    before = ending.state(args)
    assert ending.again(args, words, before) == f"{begins} --data cifar10 --out {tmp_path / 'run'}"
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "train.jsonl").write_text("{}\n")
    assert ending.again(args, words, before).endswith(" --resume")
