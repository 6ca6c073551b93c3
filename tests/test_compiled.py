"""torch.compile of the image tower: few programs, the same answers and gradients."""

import pytest
import torch

import advtune
from advtune import cli
from advtune import vlm as vlm_module
from advtune.attacks import PGD
from advtune.compiled import Compiled, check_compiler, pixels_only
from advtune.errors import UserError
from advtune.preprocess import Preprocess

BACKEND = "eager"  # traces as inductor does, and needs no C++ compiler


@pytest.fixture
def f(vlm):
    def build(compiled):
        vlm.compiled, vlm._program = compiled, None
        return vlm.classifier(vlm.tokens(["red", "green", "blue"], "a photo of a {}."))

    return build


def test_an_attack_on_the_compiled_tower_finds_the_same(f, vlm):
    """With images that leave, so that batches are filled up; the filling has no part in the answer."""
    x = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = f("")
    y = plain(x).argmax(1)
    attack, found, logits = PGD(eps=1 / 255, steps=6), [], []
    for g in (plain, f(BACKEND)):
        torch.manual_seed(0)
        found.append(attack(g, x, y))
        with torch.no_grad():
            logits.append(g(x[:5]))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    fell = plain(found[0]).argmax(1) != y
    assert 0 < int(fell.sum()) < 12  # some left
    assert vlm._program is not None and vlm._program.widest == 12


class Doubled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.tensor(2.0)), []

    def forward(self, x):
        self.seen.append(len(x))
        return x.flatten(1)[:, :2] * self.weight


def test_batches_of_any_size_need_three_programs():
    program = Compiled(Doubled(), "eager", graphs=False)
    program.learning = program.still = tower = Doubled()  # what is compiled is called with these sizes
    x = torch.rand(30, 3, 2, 2)
    for n in (20, 19, 11, 10, 9, 6, 5, 4, 1, 30, 15, 8, 7):
        torch.testing.assert_close(program(x[:n]), x[:n].flatten(1)[:, :2] * 2, rtol=0, atol=0)
    assert tower.seen == [20, 20, 20, 10, 10, 10, 5, 5, 5, 30, 15, 8, 8]


def test_what_graphs_would_write_over_is_copied():
    """The answer and the gradient by the pixels are not memory that the program writes again; what learns sees no
    graph."""
    program = Compiled(Doubled(), "eager", graphs=True)
    program.still, program.learning = (lambda x: x.view(len(x), -1)), None
    x = torch.rand(4, 3, 2, 2)
    with torch.no_grad():
        assert program(x).data_ptr() != x.data_ptr()
    with pixels_only():
        assert program(x).data_ptr() != x.data_ptr()
    with pytest.raises(TypeError):  # the program of what learns
        program(x)
    seen = []
    z = x.clone().requires_grad_()
    normalised = Preprocess(resize=None, crop=None)(z)
    normalised.register_hook(lambda slope: seen.append(slope.data_ptr()))
    assert torch.autograd.grad(normalised.square().sum(), z)[0].data_ptr() not in seen


def test_an_attack_on_a_compiled_tower_that_learns_takes_no_gradient_of_its_weights():
    """Its weights are constants there, in the same memory: they are seen to learn."""
    tower = Doubled()
    program = Compiled(tower, "aot_eager", graphs=False)
    x = torch.rand(4, 3, 2, 2, requires_grad=True)
    with pixels_only():
        out = program(x)
    assert torch.autograd.grad(out.sum(), tower.weight, allow_unused=True) == (None,)
    slope = torch.autograd.grad(program(x).sum(), tower.weight)[0]
    torch.testing.assert_close(slope, x.detach().flatten(1)[:, :2].sum())
    with torch.no_grad():
        tower.weight.mul_(3)
    with pixels_only():
        torch.testing.assert_close(program(x), x.flatten(1)[:, :2] * 6)


@pytest.mark.parametrize("method", ["fap", "tecoa"])
def test_training_compiled_is_training(method, image_folder, clip_folder):
    deltas = []
    for compiled in ("", BACKEND):
        model = advtune.load(str(clip_folder), device="cpu", precision="fp32")
        model.compiled = compiled
        tuned = advtune.tune(method, model, f"folder:{image_folder}", epochs=1, options=["batch_size=5"], show=False)
        deltas.append(tuned.delta())
        assert tuned.compiled == compiled and tuned.run["compiled"] is bool(compiled)
    for name, value in deltas[0].items():
        torch.testing.assert_close(value, deltas[1][name], rtol=0, atol=1e-5)
        assert value.abs().sum() > 0


def test_the_row_says_so_and_the_flag_reaches_the_tower(clip_folder, image_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vlm_module, "check_compiler", lambda: None)
    used = []
    monkeypatch.setattr(torch, "compile", lambda encode, **how: used.append(how) or encode)
    args = ["--data", f"folder:{image_folder}", "--backbone", str(clip_folder), "--device", "cpu"]
    assert cli.main(["evaluate", "zero-shot", *args, "--compile"]) == 0
    assert used[0]["backend"] == "inductor" and used[0]["dynamic"] is False
    assert "torch.compile" in capsys.readouterr().out
    few = ["study", "few-shot", "--methods", "zero-shot", *args[:4], "--attack", "none", "--out", str(tmp_path / "out")]
    assert cli.main([*few, "--compile"]) == 0
    assert "torch.compile" in (tmp_path / "out").rglob("results.jsonl").__next__().read_text() and len(used) == 4
    capsys.readouterr()
    assert cli.main(["evaluate", "zero-shot", *args]) == 0
    assert "torch.compile" not in capsys.readouterr().out and len(used) == 4


def test_without_a_compiler_it_says_what_to_install(monkeypatch, clip_folder):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="install g\\+\\+"):
        advtune.load(str(clip_folder), device="cpu", compile=True)
    monkeypatch.undo()
    check_compiler()


@pytest.mark.slow
def test_the_real_compiler_gives_the_same(vlm):
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens, found = vlm.tokens(["red", "green"], "a photo of a {}."), []
    for compiled in ("", "inductor"):
        vlm.compiled = compiled
        logits = vlm.classifier(tokens)(x)
        found.append((logits.detach(), torch.autograd.grad(logits[:, 0].sum(), x)[0]))
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
