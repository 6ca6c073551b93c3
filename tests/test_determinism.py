"""The same command gives the same bits, with --deterministic and without; what torch is told; what it cannot do."""

import os

import pytest
import torch

from advtune import evaluation
from advtune.cli import main
from advtune.results import read

FLAGS = (
    (torch.backends.cudnn, "deterministic"),
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
)


@pytest.fixture(autouse=True)
def as_before():
    """What --deterministic sets is the process's: here it ends with the test."""
    before, precision = [getattr(*flag) for flag in FLAGS], torch.get_float32_matmul_precision()
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    yield
    for (place, name), value in zip(FLAGS, before, strict=True):
        setattr(place, name, value)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def made(clip_folder, image_folder, out, *flags):
    """The bits of a run and the flags of its evaluation."""
    data = ["--data", f"folder:{image_folder}", "--device", "cpu", *flags]
    fast = ["--shots", "2", "--epochs", "2", "-o", "batch_size=4", "-o", "augment=true", "-o", "lr=0.05"]
    backbone = ["--backbone", str(clip_folder)]
    assert main(["train", "capt", *backbone, *data, *fast, "--out", str(out)]) == 0
    attack = ["--attack", "pgd", "-a", "eps=4/255", "-a", "steps=2", "-a", "keep=last"]
    assert main(["evaluate", str(out), *data, *attack]) == 0
    row = read(out / "results.jsonl")[0]
    return (out / "delta.safetensors").read_bytes(), (out / "train.jsonl").read_text(), row.flags, row.notes


@pytest.mark.parametrize("flags", [(), ("--deterministic",)], ids=["usual", "deterministic"])
def test_two_runs_give_the_same_bits(flags, clip_folder, image_folder, tmp_path):
    one, two = (made(clip_folder, image_folder, tmp_path / name, *flags) for name in ("one", "two"))
    assert one == two
    other = made(clip_folder, image_folder, tmp_path / "other", *flags, "--seed", "1")
    assert other[0] != one[0]
    assert one[3].count("deterministic operations only") == len(flags)  # said once, by the run or by the evaluation
    assert torch.are_deterministic_algorithms_enabled() == bool(flags)


def test_what_torch_is_told(clip_folder, image_folder, monkeypatch, capsys):
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    seen = []

    def look(*_, **__):
        seen.append((
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(),
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        ))  # fmt: skip
        torch.arange(4.0).put_(torch.tensor([0, 0]), torch.ones(2))  # which of the two it keeps is left to chance

    monkeypatch.setattr(evaluation, "evaluate_all", look)
    command = ["evaluate", "zero-shot", "--backbone", str(clip_folder), "--data", f"folder:{image_folder}"]
    assert main([*command, "--deterministic"]) == 2
    assert seen == [(True, False, True, False, False, False, "highest", ":4096:8")]
    err = capsys.readouterr().err
    assert err.startswith("advtune: error: --deterministic: put_ has no form that gives the same bits")
    assert err.count("\n") == 1


def test_memory_that_runs_out_elsewhere_is_one_line(clip_folder, image_folder, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(evaluation, "evaluate_all", full)
    command = ["evaluate", "zero-shot", "--backbone", str(clip_folder), "--data", f"folder:{image_folder}"]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        "advtune: error: out of memory; lower --batch-size or --micro-batch, or choose another --device\n"
    )
