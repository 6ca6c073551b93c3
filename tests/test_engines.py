"""Studies by other hands: a run alone, a Slurm array, a Ray cluster; the same rows, whatever dies."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from advtune import disk, grid
from advtune.cli import main
from advtune.engines import ENGINES, Local, Ray, Slurm
from advtune.engines.flags import again, command
from advtune.engines.ray import connect, room
from advtune.engines.slurm import array, collect
from advtune.errors import UserError
from advtune.results import files_in, read
from advtune.study import Study, plan, run_study, write
from conftest import write_images

SITTING = ("time", "seconds", "versions")  # what two makings of a row differ in
QUICK = {"name": "pgd", "eps": "2/255", "steps": 2}


@pytest.fixture
def study(clip_folder, tmp_path):
    """Zero-shot and a short TeCoA with two seeds on tiny images: three runs."""
    images = write_images(tmp_path / "four", ("red", "green", "blue", "grey"), train=3, test=2)
    return Study(
        "few-shot", ("zero-shot", "tecoa"), (f"folder:{images}",), shots=(2,), seeds=(0, 1), backbone=str(clip_folder),
        epochs=2, options={"batch_size": 4}, attacks=(QUICK,),
    )  # fmt: skip


@pytest.fixture
def file(study, tmp_path):
    path = tmp_path / "three.toml"
    path.write_text(write(study), encoding="utf-8")
    return str(path)


def facts(rows):
    """Rows without what two sittings differ in."""
    found = [asdict(row) for row in rows]
    for row in found:
        for name in SITTING:
            del row[name]
        for stage in row["stages"]:
            del stage["seconds"]
    return found


def in_folder(out):
    """Every row below a folder, by its run folder; where that folder lies is no part of it."""
    found = {str(path.parent.relative_to(out)): facts(read(path)) for path in files_in(out)}
    assert all(row.pop("run") in ("", str(out / key)) for key, rows in found.items() for row in rows)
    return found


def keys_in(out):
    return [json.loads(line)["key"] for line in (out / grid.FAILED).read_text().splitlines()]


def script(out, name="array"):
    return (out / "slurm" / f"{name}.sh").read_text()


def test_a_run_alone_is_the_study_s(study, file, tmp_path, capsys):
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    run_study(study, whole, show=False)
    wanted = plan(study)
    assert main(["study", file, "--out", str(apart), "--run", "2"]) == 0
    assert list(in_folder(apart)) == [wanted[2].key]
    assert "[1/1]" in capsys.readouterr().err
    assert main(["study", str(apart / "study.toml"), "--out", str(apart), "--run", wanted[0].key]) == 0
    assert main(["study", file, "--out", str(apart), "--run", "1", "--json"]) == 0
    assert [json.loads(line)["train"]["seed"] for line in capsys.readouterr().out.splitlines()[-1:]] == [0]
    assert in_folder(apart) == in_folder(whole)
    for wrong in ("3", "four/tecoa", "-1"):
        assert main(["study", file, "--out", str(apart), f"--run={wrong}"]) == 2
        assert f"no run {wrong}; its runs are 0 to 2" in capsys.readouterr().err


def test_a_task_minds_its_own_failure_and_leaves_the_others_lines(study, tmp_path, monkeypatch):
    out, tune, wanted = tmp_path / "out", grid.tune, plan(study)

    def broken(*args, **how):
        raise RuntimeError("no")

    monkeypatch.setattr(grid, "tune", broken)
    for only in ("1", "2", "1"):
        outcome = run_study(study, out, only=only, show=False)
        assert [each.error for each in outcome.failed] == ["RuntimeError: no"]
    assert sorted(keys_in(out)) == sorted(run.key for run in wanted[1:])
    monkeypatch.setattr(grid, "tune", tune)
    assert not run_study(study, out, only="1", show=False).failed
    assert keys_in(out) == [wanted[2].key]
    assert not run_study(study, out, show=False).failed
    assert not (out / grid.FAILED).exists()


def test_a_task_sees_that_the_study_s_other_rows_are_of_other_weights(study, tmp_path):
    out = tmp_path / "out"
    run_study(study, out, only="0", show=False)
    path = next(out.rglob("results.jsonl"))
    (row,) = read(path)
    path.write_text(replace(row, backbone={**row.backbone, "sha256": "0"}, model="0").to_json() + "\n")
    (failed,) = run_study(study, out, only="1", show=False).failed
    assert failed.error.startswith(f"backbone {study.backbone}: not the same as in {out / plan(study)[0].key}")


def test_tasks_share_a_folder_and_a_driver_has_it_alone(study, tmp_path):
    pytest.importorskip("fcntl")
    out, wanted = tmp_path / "out", plan(study)
    with disk.alone(out), pytest.raises(UserError, match="another process works here"):
        run_study(study, out, only="0", show=False)
    with disk.alone(out, shared=True):
        with pytest.raises(UserError, match="another process works here"):
            run_study(study, out, show=False)
        assert len(run_study(study, out, only="0", show=False).rows) == 1
        with grid.claimed(out, wanted[1]):
            (failed,) = run_study(study, out, only="1", show=False).failed
            assert failed.error == f"{out / wanted[1].key}: another task works on this run; wait for it"
            assert not (out / wanted[1].key).parent.exists()
            assert len(run_study(study, out, only="2", show=False).rows) == 1
    assert len(run_study(study, out, show=False).rows) == 3


def test_an_engine_gets_what_is_left_and_may_answer_in_any_order(study, tmp_path, capsys):
    out, seen = tmp_path / "out", []
    run_study(study, out, only="1", show=False)

    def backwards(todo, bench):
        seen.extend(todo)
        for place in reversed(todo):
            failed = [grid.failure(todo[place], "", UserError("no"), bench.out)] if place == 2 else []
            yield place, failed or grid.do(todo[place], bench), place

    outcome = run_study(study, out, engine=backwards)
    assert seen == [0, 2]
    assert [row.method for row in outcome.rows] == ["zero-shot", "tecoa"]
    assert [each.key for each in outcome.failed] == [plan(study)[2].key]
    told = re.findall(r"^\[(\d)/3\] \S+: (was done|done|failed: no) \((.*?;)?", capsys.readouterr().err, re.MULTILINE)
    assert told == [
        ("1", "was done", ""),
        ("2", "failed: no", "2 running, 1 failed;"),
        ("3", "done", "0 running, 1 failed;"),
    ]


def test_rows_that_tasks_made_of_different_things_are_told(study, tmp_path):
    """Two tasks at once cannot see each other's rows; who collects them can."""
    out = tmp_path / "out"

    def apart(todo, bench):
        for place, run in todo.items():
            failed = grid.do(run, replace(bench, contents={}))
            if place == 1:
                path = bench.out / run.key / "results.jsonl"
                path.write_text(replace(read(path)[0], precision="other").to_json() + "\n")
            yield place, failed, 0

    (failed,) = run_study(study, out, engine=apart, show=False).failed
    assert failed.key == plan(study)[1].key
    assert failed.error.startswith("precision: not the same as in")
    assert keys_in(out) == [failed.key]


WRONG = {
    "retries": (["--engine", "slurm", "--retries", "1"], "--retries goes with --engine ray"),
    "no engine": (["--submit"], "--submit goes with --engine slurm"),
    "both": (["--parallel", "2"], "--parallel goes with --engine ray or slurm"),
    "run": (["--engine", "ray", "--run", "1"], "leave out --engine ray"),
    "engine": (["--engine", "rai"], "did you mean ray?"),
    "cpus": (["--engine", "ray", "--cpus-per-run", "0"], "--cpus-per-run 0: give more than 0"),
    "nan": (["--engine", "ray", "--cpus-per-run", "nan"], "--cpus-per-run nan: give more than 0"),
    "gpus": (["--engine", "ray", "--gpus-per-run", "1.5"], "a fraction below 1, or a whole number"),
    "endless": (["--engine", "ray", "--gpus-per-run", "inf"], "--gpus-per-run inf: give 0 or more"),
    "no number": (["--engine", "ray", "--gpus-per-run", "nan"], "--gpus-per-run nan: give 0 or more"),
    "minus": (["--engine", "ray", "--retries", "-1"], "--retries -1: give 0 or more"),
    "address": (["--engine", "ray", "--ray-address", "cluster"], "--ray-address cluster: give auto or HOST:PORT"),
    "none": (["--engine", "ray", "--parallel", "0"], "--parallel 0: give 1 or more"),
    "half": (["--engine", "slurm", "--gpus-per-run", "0.5"], "Slurm takes whole numbers from 0"),
    "infinite": (["--engine", "slurm", "--cpus-per-run", "inf"], "Slurm takes whole numbers from 1"),
    "switch": (["--engine", "slurm", "--slurm", "=gpu"], "key=value: partition=gpu"),
    "line": (["--engine", "slurm", "--slurm", "comment=a\nrm x"], "key=value: partition=gpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_an_engine_cannot_do_is_refused_in_a_line(name, file, tmp_path, capsys):
    flags, message = WRONG[name]
    try:
        code = main(["study", file, "--out", str(tmp_path / "out"), *flags])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_ray_it_says_what_to_install(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["study", file, "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert capsys.readouterr().err == (
        "advtune: error: study: --engine ray needs its package: pip install 'advtune[ray]'\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_told_at_once(address):
    def init(**how):
        raise AssertionError("Ray would wait for minutes")

    with pytest.raises(UserError, match=re.escape(f"--ray-address {address}: no cluster (")) as told:
        connect(SimpleNamespace(init=init), address)
    assert "\n" not in str(told.value)


def test_so_many_runs_fit_on_machines_at_once(monkeypatch):
    def alive(**resources):
        return {"Alive": True, "Resources": resources}

    machines = [alive(CPU=4.0, GPU=1.0), alive(CPU=3.0), {"Alive": False, "Resources": {"CPU": 64.0}}, alive()]
    ray = SimpleNamespace(nodes=lambda: machines, cluster_resources=lambda: {"CPU": 7.0, "GPU": 1.0})
    assert [room(ray, *each) for each in ((1, 0), (2, 0), (5, 0), (1, 0.5), (1, 0.1), (1, 1), (1, 2))] == [
        7, 3, 0, 2, 4, 1, 0,
    ]  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    assert [Ray(gpus=gpus).share(ray, device) for gpus, device in ((None, "auto"), (None, "cpu"), (0.5, "cpu"))] == [
        1, 0, 0.5,
    ]  # fmt: skip
    assert Ray().share(SimpleNamespace(cluster_resources=lambda: {"CPU": 7.0}), "auto") == 0


def test_flags_fill_the_engine_s_fields_and_come_back_as_a_command(file, monkeypatch):
    from advtune.arguments import build
    from advtune.engines.flags import chosen

    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    given = ["study", file, "--out", "o", "--device", "cpu", "--batch-size", "8", "--compile"]
    ray = ["--engine", "ray", "--cpus-per-run", "2", "--gpus-per-run", "0.5", "--retries", "0"]
    ray += ["--parallel", "3", "--ray-address", "auto"]
    slurm = ["--engine", "slurm", "--slurm", "partition=gpu", "exclusive", "--submit"]
    for flags, engine in (
        ([], Local()),
        (ray, Ray("auto", 2, 0.5, 0, 3)),
        (slurm, Slurm(options=["partition=gpu", "exclusive"], submit=True)),
        (["--run", "a/b"], Local()),
    ):
        args = build().parse_args([*given, *flags])
        assert chosen(args) == engine
        back = build().parse_args(again(args))
        assert vars(back) == vars(args) | {"study": "o/study.toml"}
    assert set(ENGINES) == {"local", "ray", "slurm"}
    assert command(args) == ["study", "o/study.toml", "--out", "o", "--device", "cpu", "--batch-size", "8", "--compile"]


def test_the_array_has_a_task_for_each_run_that_is_left(study, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out, wanted = tmp_path / "a b" / "it's 5%", plan(study)
    run_study(study, out, only="0", show=False)
    flags = ["--engine", "slurm", "--parallel", "7", "--slurm", "partition=big gpu", "time=8:00:00", "exclusive"]
    assert main(["study", file, "--out", "a b/it's 5%", "--device", "cpu", "--gpus-per-run", "2", *flags]) == 0
    said = capsys.readouterr().err
    tasks, after = script(out), script(out, "collect")
    asked = re.findall(r"^#SBATCH --(.*)$", tasks, re.MULTILINE)
    assert {"array=0-1%7", "cpus-per-task=4", "gres=gpu:2", "partition='big gpu'", "exclusive", "requeue"} <= set(asked)
    assert shlex.split(next(each for each in asked if each.startswith("output="))) == [
        f"output={tmp_path}/a b/it's 5%%/slurm/logs/%A-%a.log"
    ]
    assert tasks.index("#SBATCH --requeue") < tasks.index("\nset -euo")  # after a command sbatch looks no further
    assert shlex.split(tasks[tasks.index("runs=(") + 6 : tasks.index("\n)")]) == [run.key for run in wanted[1:]]
    last = shlex.split(tasks.splitlines()[-1])
    assert last[:4] == ["exec", sys.executable, "-m", "advtune.cli"]
    assert last[4:] == ["study", "a b/it's 5%/study.toml", "--out", "a b/it's 5%", "--device", "cpu", "--run",
                        "${runs[SLURM_ARRAY_TASK_ID]}"]  # fmt: skip
    assert shlex.split(after.splitlines()[-1])[4:] == last[4:-2]
    assert "--array" not in after
    assert f"cd {shlex.quote(str(tmp_path))}\n" in tasks
    assert (out / "slurm" / "logs").is_dir()
    typed = said.partition("type: ")[2].strip()
    assert shlex.split(typed.replace("$(", "").replace(")", "")) == [
        "sbatch", "--dependency=afterany:sbatch", "--parsable", "a b/it's 5%/slurm/array.sh",
        "a b/it's 5%/slurm/collect.sh",
    ]  # fmt: skip
    for name in ("array", "collect"):
        path = out / "slurm" / f"{name}.sh"
        assert os.access(path, os.X_OK)
        done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, env=with_programs())
        assert done.returncode == 0, done.stdout


def with_programs(*folders):
    """The environment, with the programs of some folders and of this Python's packages first."""
    places = [*map(str, folders), str(Path(sys.executable).parent), os.environ["PATH"]]
    return os.environ | {"PATH": os.pathsep.join(places)}


def test_what_slurm_is_asked_for_by_itself(study, tmp_path):
    bench = grid.Bench(tmp_path / "my study")
    text = array(Slurm(), ["a/b/c"], bench)
    for line in ("--job-name=advtune-my-study", "--array=0-0%16", "--gres=gpu:1", "--cpus-per-task=4"):
        assert f"\n#SBATCH {line}\n" in text
    assert "gres" not in array(Slurm(), ["a/b/c"], replace(bench, device="cpu"))
    assert "gres" not in array(Slurm(gpus=0), ["a/b/c"], bench)
    own = Slurm(options=["array=3", "--gres=gpu:a100:1", "requeue="])
    assert "\n#SBATCH --array=3\n" in array(own, ["a/b/c"], bench)
    assert "--gres=gpu:a100:1\n" in array(own, ["a/b/c"], bench)
    assert "--array" not in collect(own, bench)


def test_a_study_larger_than_an_array_may_be_is_told(study, tmp_path, capsys):
    many = dict(enumerate([plan(study)[0]] * 1002))
    list(Slurm()(many, grid.Bench(tmp_path)))
    assert "arrays of 1002: scontrol show config" in capsys.readouterr().err
    list(Slurm()({0: many[0]}, grid.Bench(tmp_path)))
    assert "scontrol" not in capsys.readouterr().err


def test_nothing_is_written_for_a_study_that_is_done(study, tmp_path):
    study = replace(study, methods=("zero-shot",))
    for _ in range(2):
        outcome = run_study(study, tmp_path / "out", engine=Slurm() if (tmp_path / "out").exists() else Local())
    assert (len(outcome.rows), outcome.skipped) == (1, 1)
    assert not (tmp_path / "out" / "slurm").exists()


def test_a_task_of_a_run_that_is_no_longer_in_the_study_is_refused(study, tmp_path):
    out, key = tmp_path / "out", plan(study)[2].key
    run_study(study, out, engine=Slurm(), show=False)
    assert key in script(out)
    run_study(replace(study, seeds=(0,)), out, engine=Slurm(), extend=True, show=False)
    assert key not in script(out)
    assert main(["study", str(out / "study.toml"), "--out", str(out), "--run", key]) == 2


def test_submit_calls_sbatch_and_the_collecting_job_waits_for_the_tasks(file, tmp_path, monkeypatch, capsys):
    out, place = tmp_path / "out", tmp_path / "bin"
    arguments = ["study", file, "--out", str(out), "--engine", "slurm", "--submit"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments) == 0
    assert "no sbatch here; on the cluster, type: sbatch" in capsys.readouterr().err
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}/usr/bin:/bin")
    sbatch = place / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(tmp_path))}/called\necho "41;alpha"\n')
    sbatch.chmod(0o755)
    assert main(arguments) == 0
    assert "submitted: 41, and 41 after it" in capsys.readouterr().err
    assert (tmp_path / "called").read_text().splitlines() == [
        f"--parsable {out}/slurm/array.sh", f"--parsable --dependency=afterany:41 {out}/slurm/collect.sh",
    ]  # fmt: skip
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\necho more >&2\nexit 1\n")
    assert main(arguments) == 2
    assert f"sbatch refused {out}/slurm/array.sh: sbatch: error: invalid partition more\n" in capsys.readouterr().err


@pytest.mark.slow
def test_the_array_s_tasks_make_the_rows_that_the_local_engine_makes(study, file, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "array"
    run_study(study, whole, show=False)
    assert main(["study", file, "--out", str(out), "--engine", "slurm"]) == 0
    tasks = [
        subprocess.Popen(
            ["bash", str(out / "slurm" / "array.sh")], cwd=tmp_path.parent, stderr=subprocess.PIPE, text=True,
            env=with_programs() | {"SLURM_ARRAY_TASK_ID": str(i), "SLURM_CPUS_PER_TASK": "1"},
        ) for i in range(3)
    ]  # fmt: skip
    for task in tasks:
        said = task.communicate()[1]
        assert task.returncode == 0, said
    assert in_folder(out) == in_folder(whole)
    done = subprocess.run(
        ["bash", str(out / "slurm" / "collect.sh")], env=with_programs(), capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr.count("was done") == 3
    assert "tecoa" in done.stdout
    assert in_folder(out) == in_folder(whole)


@pytest.fixture(scope="module")
def markers(tmp_path_factory):
    """A folder whose files say what befalls Ray's workers: see `befalls`."""
    return tmp_path_factory.mktemp("markers")


@pytest.fixture(scope="module")
def cluster(markers):
    """A Ray cluster of two processors, whose workers watch for markers."""
    import ray

    def befalls():
        """In each worker, between two steps of training with a seed: `kill-SEED` kills it, once for each line; `wait`
        holds it until the file is gone, `wait-deaf` whatever it is told; `error-SEED` is an error."""
        import os
        import signal
        import time

        from advtune import train

        update = train.update

        def watched(plan, models, batch, optimiser, rate, step, *more):
            if step == 1:
                while (markers / "wait").exists() or (markers / "wait-deaf").exists():
                    (markers / f"waits-{plan.seed}").touch()
                    try:
                        time.sleep(0.05)
                    except KeyboardInterrupt:
                        if not (markers / "wait-deaf").exists():
                            raise
                kill = markers / f"kill-{plan.seed}"
                if kill.exists():
                    left = kill.read_text().splitlines()[1:]
                    kill.write_text("\n".join(left)) if left else kill.unlink()
                    with (markers / "killed").open("a") as file:
                        file.write(f"{plan.seed}\n")
                    os.kill(os.getpid(), signal.SIGKILL)
                if (markers / f"error-{plan.seed}").exists():
                    raise RuntimeError("out of memory")
            with (markers / "steps").open("a") as file:
                file.write(f"{plan.seed} {step}\n")
            return update(plan, models, batch, optimiser, rate, step, *more)

        train.update = watched

    ray.init(
        address="local", num_cpus=2, object_store_memory=10**8, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", runtime_env={"worker_process_setup_hook": befalls},
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.fixture
def ray(cluster, markers):
    for path in markers.iterdir():
        path.unlink()
    return cluster


def lines(path):
    return sorted(path.read_text().splitlines()) if path.exists() else []


@pytest.mark.slow
def test_ray_makes_the_rows_that_the_local_engine_makes(study, file, ray, markers, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "ray"
    run_study(study, whole, show=False)
    assert main(["study", file, "--out", str(out), "--engine", "ray", "--json"]) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [(row["method"], (row["train"] or {}).get("seed")) for row in rows] == [
        ("zero-shot", None), ("tecoa", 0), ("tecoa", 1),
    ]  # fmt: skip
    assert in_folder(out) == in_folder(whole)
    told = re.findall(r"\[(\d)/3\] \S+: done \((\d) running, 0 failed; \S+ (?:s|min) so far, about", printed.err)
    assert told[-1] == ("3", "0")
    assert ray.is_initialized()  # it is the test's
    assert main(["study", file, "--out", str(out), "--engine", "ray"]) == 0
    assert capsys.readouterr().err.count("was done") == 3
    assert lines(markers / "steps") == ["0 0", "0 1", "0 2", "0 3", "1 0", "1 1", "1 2", "1 3"]


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_costs_a_retry_and_no_row(study, ray, markers, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "ray"
    run_study(study, whole, show=False)
    (markers / "kill-0").write_text("once")
    outcome = run_study(study, out, engine=Ray())
    assert lines(markers / "killed") == ["0"]
    assert not outcome.failed
    assert in_folder(out) == in_folder(whole)
    # it went on from the checkpoint of its first step
    assert [line for line in lines(markers / "steps") if line.startswith("0")] == ["0 0", "0 1", "0 2", "0 3"]
    said = capsys.readouterr().err
    assert said.count("its worker died (WorkerCrashedError); it is tried again") == 1
    assert said.count(": done (") == 3


@pytest.mark.slow
def test_a_run_whose_workers_all_die_fails_and_the_others_do_not(study, ray, markers, tmp_path):
    out, dies = tmp_path / "ray", plan(study)[1].key
    (markers / "kill-0").write_text("once\ntwice\nthrice")
    outcome = run_study(study, out, engine=Ray(retries=1), show=False)
    assert lines(markers / "killed") == ["0", "0"]
    assert [each.key for each in outcome.failed] == [dies]
    assert outcome.failed[0].error.startswith("WorkerCrashedError: The worker died unexpectedly")
    assert keys_in(out) == [dies]
    assert [row.method for row in outcome.rows] == ["zero-shot", "tecoa"]
    outcome = run_study(study, out, engine=Ray(retries=1), show=False)
    assert lines(markers / "killed") == ["0", "0", "0"]
    assert (len(outcome.rows), outcome.failed, outcome.skipped) == (3, [], 2)
    assert not (out / grid.FAILED).exists()


@pytest.mark.slow
def test_an_error_is_a_failure_at_once_and_leaves_its_traceback(study, ray, markers, tmp_path):
    out = tmp_path / "ray"
    (markers / "error-1").touch()
    broken = replace(study, protocol="transfer", train_on=study.data[0], data=("folder:nowhere", *study.data))
    outcome = run_study(broken, out, engine=Ray(), show=False)
    found = {(each.key.split("/")[1], each.test, each.error.partition(": ")[0]) for each in outcome.failed}
    assert found == {
        ("zero-shot", "folder:nowhere", "folder:nowhere"), ("tecoa", "folder:nowhere", "folder:nowhere"),
        ("tecoa", "", "RuntimeError"),
    }  # fmt: skip
    assert len(keys_in(out)) == 3
    error = next(each for each in outcome.failed if each.error == "RuntimeError: out of memory")
    assert "in watched" in (out / error.traceback).read_text()
    assert [line for line in lines(markers / "steps") if line.startswith("1")] == ["1 0"]  # it was tried once
    assert [row.method for row in outcome.rows] == ["zero-shot", "tecoa"]


@pytest.mark.slow
def test_an_interrupt_cancels_the_tasks_and_says_how_to_go_on(study, ray, markers, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "ray"
    run_study(study, whole, show=False)
    (markers / "wait").touch()
    monkeypatch.setattr("advtune.engines.ray.GRACE", 60)
    wait, asked = ray.wait, []

    def interrupted(refs, **how):
        if asked:
            return wait(refs, **how)
        while len(list(markers.glob("waits-*"))) < 2:  # two are in the middle of their training, one is in the queue
            wait(refs, timeout=0.1)
        asked.append(len(refs))
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "wait", interrupted)
    later = replace(study, methods=("tecoa", "zero-shot"))
    with pytest.raises(KeyboardInterrupt, match="at run 1 of 3"):
        run_study(later, out, engine=Ray(parallel=3), show=False)
    assert asked == [3]
    for run in plan(study):
        with grid.claimed(out, run):  # nobody works on it any more
            pass
    (markers / "wait").unlink()
    outcome = run_study(study, out, engine=Ray(), show=False)
    assert len(outcome.rows) == 3
    assert in_folder(out) == in_folder(whole)
    assert lines(markers / "steps").count("0 0") == 1  # the checkpoint was gone on from


@pytest.mark.slow
def test_a_task_that_does_not_listen_is_ended(study, ray, markers, tmp_path, monkeypatch):
    (markers / "wait-deaf").touch()
    monkeypatch.setattr("advtune.engines.ray.GRACE", 10)
    wait, run = ray.wait, plan(study)[1]

    def interrupted(refs, **how):
        if how:
            return wait(refs, **how)
        while not list(markers.glob("waits-*")):
            wait(refs, timeout=0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(replace(study, methods=("tecoa",), seeds=(0,)), tmp_path / "ray", engine=Ray(), show=False)
    (markers / "wait-deaf").unlink()
    with grid.claimed(tmp_path / "ray", run):
        pass


@pytest.mark.slow
def test_a_run_that_no_machine_can_take_is_refused(study, ray, tmp_path):
    for engine in (Ray(cpus=3), Ray(gpus=0.5), Ray(gpus=0.5, parallel=2)):
        with pytest.raises(UserError, match=r"no machine has . CPUs and .* GPUs for a run; lower"):
            run_study(study, tmp_path / "out", engine=engine, show=False)


@pytest.mark.slow
def test_a_machine_that_does_not_see_the_folder_says_so(study, ray, tmp_path, monkeypatch):
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.setattr("advtune.engines.ray.os.getcwd", lambda: str(away))
    monkeypatch.chdir(tmp_path)
    outcome = run_study(replace(study, methods=("zero-shot",)), "out", engine=Ray(), show=False)
    assert outcome.failed[0].error.startswith("out is not seen by")
    assert "worker" in (tmp_path / "out" / outcome.failed[0].traceback).read_text()
