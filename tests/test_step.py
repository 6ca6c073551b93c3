"""A batch in portions, of one process or of several, is the whole batch: the same gradient, the same random numbers."""

import weakref

import pytest
import torch

from advtune import distributed, draws, runs, step, train
from advtune.attacks import NFGSM, PGD
from advtune.augment import crop_and_flip
from advtune.cli import main
from advtune.data import Split, load_images
from advtune.errors import UserError
from advtune.methods import METHODS, configure
from advtune.step import Portions
from toys import Net, images

EPS = 16 / 255  # where rounding decides about few signs
APART = 1e-4  # of the gradient's length: rounding, in fp32
WAYS = {
    **{name: (name, {}, {"eps": EPS}) for name, kind in METHODS.items() if name != "zero-shot" and kind.attack.eps},
    **{name: (name, {}, {}) for name, kind in METHODS.items() if not kind.attack.eps},
    "pmg-aft, KL summed": ("pmg-aft", {"preset": "released"}, {"eps": EPS}),
    "capt, a of the batch": ("capt", {"weight": "loss", "augment": False}, {"eps": EPS}),
    "apd, feedback": ("apd", {"feedback": 0.5, "ce": 0.5}, {"eps": EPS}),
    "apd, teacher alone": ("apd", {"teacher": "offline"}, {"eps": EPS}),
    "tga-zsr, norm over tokens": ("tga-zsr", {"preset": "released"}, {"eps": EPS}),
    "apt, another attacker": ("apt", {"attacker": "constant"}, {"eps": EPS}),
    "advpt, cross-entropy": ("advpt", {"raised": "ce"}, {"eps": EPS}),
    "free replay": ("tecoa", {}, {"name": "free", "replay": 2, "eps": EPS}),
    "n-fgsm": ("tecoa", {}, {"name": "n-fgsm", "eps": EPS}),
    "early stopping": ("tecoa", {}, {"early_stop": True, "eps": EPS}),
    "best iterate": ("tecoa", {}, {"keep": "best", "eps": EPS}),
    "l2": ("tecoa", {}, {"norm": "l2", "eps": 0.5}),
}
B = 5


@pytest.fixture
def loaded(task):
    return load_images(task, Split(part="train", shots=2, resolution=16), progress=False)


class Run:
    """A run that has moved a little, whose batch is the first five images."""

    def __init__(self, way, vlm, task, loaded):
        self.images = loaded
        method, recipe, attack = configure(*WAYS[way])
        self.plan = train.Plan(way, method, recipe, attack, vlm.requires_grad_(False), task, Split("train"), 3)
        self.models = method.setup(vlm, task, 0)
        self.tokens = {name: each.tokens(task.classes, task.template) for name, each in self.models.items()}
        self.learning = [p for model in self.models.values() for p in model.parameters() if p.requires_grad]
        random = torch.Generator().manual_seed(5)
        for p in self.learning:  # from its start, where TGA-ZSR's distance from the original has no gradient
            p.data += 0.02 * torch.randn(p.shape, generator=random)
        self.optimiser = torch.optim.SGD(self.learning, 0.1)
        self.kept = step.prepare(self.plan, self.models, self.tokens, loaded, False)
        self.start = torch.rand(B, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * EPS

    def batch(self):
        torch.manual_seed(11)
        return step.own_share(self.plan, self.images, torch.arange(B), self.tokens, self.kept, 0)

    def gradient(self, portions, monkeypatch, world=1):
        """The gradient summed over the processes, the loss terms, and d; the processes one after another."""
        total, terms, d, means = [torch.zeros_like(p) for p in self.learning], {}, self.start.clone(), {}
        for collect in (True, False) if world > 1 else (False,):
            for rank in range(world):
                with monkeypatch.context() as patch:
                    patch.setattr(distributed, "share", lambda n, r=rank: distributed_share(n, world, r))
                    batch = self.batch()
                if collect:
                    for name, value in step.means_of(self.plan, self.models, batch, portions.of(len(batch.y))).items():
                        means[name] = means.get(name, 0) + value
                    continue
                self.optimiser.zero_grad(set_to_none=True)
                found = step.own(self.plan, self.models, batch, self.optimiser, d, portions, means)
                for name, value in found.items():
                    terms[name] = terms.get(name, 0.0) + value
                for sum_, p in zip(total, self.learning, strict=True):
                    sum_ += 0 if p.grad is None else p.grad
        return torch.cat([each.flatten() for each in total]), terms, d


distributed_share = distributed.share


@pytest.mark.parametrize("way", WAYS)
def test_portions_of_any_kind_have_the_gradient_of_the_whole(way, vlm, task, loaded, monkeypatch):
    """Portions of 2, 2 and 1; two processes with 3 and 2 images; seven processes, two of which have nothing."""
    run = Run(way, vlm, task, loaded)
    whole, terms, d = run.gradient(Portions(), monkeypatch)
    assert whole.norm() > 0
    if way == "free replay":
        assert not torch.equal(d, run.start)
    for portions, world in ((Portions(2), 1), (Portions(), 2), (Portions(2), 2), (Portions(), 7)):
        found, values, moved = run.gradient(portions, monkeypatch, world)
        assert (found - whole).norm() < APART * whole.norm()
        assert values == pytest.approx(terms, rel=1e-4, abs=1e-6)
        assert list(values) == list(terms)
        assert (moved - d).abs().gt(1e-6).float().mean() < 0.01  # a sign of next to nothing


@pytest.mark.parametrize("name", ["advpt", "fare"])
def test_what_is_prepared_is_the_same_in_portions(name, vlm, task, loaded):
    run = Run(name, vlm, task, loaded)
    cut = step.prepare(run.plan, run.models, run.tokens, loaded, False, Portions(2))
    assert cut.keys() == run.kept.keys() and cut
    for key, value in cut.items():
        torch.testing.assert_close(value, run.kept[key], rtol=1e-4, atol=1e-5)


def test_a_portion_has_its_rows_of_the_whole_batchs_numbers():
    x, y, f = images(7, 8), torch.arange(7) % 4, Net()
    drawn = {
        "crops": lambda part: crop_and_flip(x[part]),
        "pgd": lambda part: PGD(EPS, 2, keep="last", early_stop=False)(f, x[part], y[part]),
        "pgd that stops": lambda part: PGD(EPS, 2, keep="last")(f, x[part], y[part]),
        "pgd, best": lambda part: PGD(EPS, 2)(f, x[part], y[part]),
        "n-fgsm": lambda part: NFGSM(EPS)(f, x[part], y[part]),
    }
    for name, draw in drawn.items():
        torch.manual_seed(5)
        state, whole = draws.state(x.device), draw(slice(0, 7))
        after = draws.state(x.device)
        for part in (slice(0, 3), slice(3, 7), slice(6, 7)):
            draws.back_to(state, x.device)
            with draws.portion(7, part):
                torch.testing.assert_close(draw(part), whole[part], rtol=0, atol=1e-6, msg=name)
            assert torch.equal(draws.state(x.device)[0], after[0]), name  # what is drawn next is the same, too
    with draws.portion(7, slice(0, 3)), pytest.raises(RuntimeError, match="4 images in a portion of 3"):
        draws.like(x[:4])


def test_a_whole_batch_is_not_touched():
    """With one process and no limit, nothing is multiplied, sliced or drawn otherwise than ever."""
    x = images(4, 8)
    torch.manual_seed(1)
    usual = torch.rand_like(x)
    torch.manual_seed(1)
    with draws.portion(4, slice(0, 4)):
        assert torch.equal(draws.like(x), usual)
    batch = step.Batch(x, torch.arange(4), {})
    assert step.cut(batch, slice(0, 4), {}) is batch and batch.share == 1
    assert step.cut(batch, slice(1, 3), {}).share == 0.5


# --- memory that runs out -----------------------------------------------------------------------------------


def narrow(monkeypatch, most, error=torch.OutOfMemoryError, says="CUDA out of memory"):
    """TeCoA on a device that holds `most` images; the sizes that are tried."""
    real, tried, held = METHODS["tecoa"].loss, [], []

    def loss(self, models, batch, attack):
        tried.append(len(batch.y))
        if len(batch.y) > most:
            large = torch.zeros(10)
            held.append(weakref.ref(large))
            raise error(says)
        assert not any(each() is not None for each in held)  # what the failure held is free
        return real(self, models, batch, attack)

    monkeypatch.setattr(METHODS["tecoa"], "loss", loss)
    return tried


def test_how_torch_says_that_memory_ran_out():
    allocator = "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: "
    signs = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(allocator + "not enough memory: you tried to allocate 9 bytes."),
        RuntimeError(allocator + "can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    )
    assert all(step.out_of_memory(error) for error in signs)
    assert not any(step.out_of_memory(error) for error in (RuntimeError("shapes"), ValueError("not enough memory")))
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert step.out_of_memory(found.value)


HOW = dict(shots=4, options={"batch_size": 6, "epochs": 2, "lr": 0.01, "warmup": 0, "augment": True}, show=False)


def test_memory_that_runs_out_halves_the_portions_and_changes_nothing_else(vlm, task, tmp_path, monkeypatch):
    whole = train.tune("tecoa", vlm, task, **HOW)
    with monkeypatch.context() as patch:
        tried = narrow(patch, 2)
        with pytest.warns(UserWarning, match="out of memory with") as said:
            cut = train.tune("tecoa", vlm, task, out=tmp_path / "run", **HOW)
    assert tried == [6, 3, *[1] * 6, *[1] * 18]  # once found, the size is kept
    notes = [f"out of memory with {n} images at once: {n // 2} from then on, the same gradient" for n in (6, 3)]
    assert [str(each.message) for each in said] == notes
    assert [note for note in runs.read_config(tmp_path / "run")["notes"] if "memory" in note] == notes
    start = vlm.delta() | vlm.with_image_tower().delta()
    for name, value in whole.delta().items():
        assert (cut.delta()[name] - value).norm() <= APART * (value - start[name]).norm() + 1e-7


def test_memory_that_runs_out_in_the_middle_of_a_batch_begins_it_anew(vlm, task, loaded, monkeypatch):
    """The gradient of portions that went well is dropped; free replay's d is not moved twice."""
    run = Run("free replay", vlm, task, loaded)
    whole, terms, d = run.gradient(Portions(), monkeypatch)
    real, calls = type(run.plan.method).loss, []

    def loss(self, models, batch, attack):
        calls.append(len(batch.y))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, models, batch, attack)

    monkeypatch.setattr(type(run.plan.method), "loss", loss)
    with pytest.warns(UserWarning, match="2 images at once: 1 from then on"):
        found, values, moved = run.gradient(Portions(2), monkeypatch)
    assert calls == [2, 2, *[1] * 5]
    assert (found - whole).norm() < APART * whole.norm() and values == pytest.approx(terms, rel=1e-4)
    assert (moved - d).abs().gt(1e-6).float().mean() < 0.01


def test_a_single_image_that_does_not_fit_is_one_line_and_the_run_can_go_on(
    image_folder, clip_folder, tmp_path, monkeypatch, capsys
):
    command = ["train", "tecoa", "--backbone", str(clip_folder), "--data", f"folder:{image_folder}", "--shots", "2",
               "--epochs", "1", "--out", str(tmp_path / "run")]  # fmt: skip
    with monkeypatch.context() as patch:
        narrow(patch, 0)
        assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("advtune: error: out of memory with a single image; try --checkpoint-activations")
    assert main([*command, "--resume", "--micro-batch", "4"]) == 0
    assert "batches went through 4 images at a time" in " ".join(runs.read_config(tmp_path / "run")["notes"])


def test_other_errors_are_not_taken_for_it(vlm, task, monkeypatch):
    tried = narrow(monkeypatch, 0, RuntimeError, "mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        train.tune("tecoa", vlm, task, **HOW)
    assert tried == [6]


def test_what_cannot_be_cut_is_refused(vlm, task, monkeypatch):
    how = dict(shots=2, epochs=1, options={"attacker": "perturbed"}, show=False)
    for size, says in ((2, "moves one context by all images: its batches go through whole"), (0, "at least 1 image")):
        with pytest.raises(UserError, match=says):
            train.tune("apt", vlm, task, micro_batch=size, **how)

    def loss(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(METHODS["apt"], "loss", loss)
    with pytest.raises(UserError, match=r"out of memory with 6 images, and .*one context.*: lower batch_size"):
        train.tune("apt", vlm, task, **how)


# --- activations that are computed twice --------------------------------------------------------------------


class Keeping:
    """Counts the numbers that autograd keeps: the most at any one time."""

    def __init__(self):
        self.now = self.most = 0
        counts = self

        class Kept:
            def __init__(self, value):
                self.value = value
                counts.now += value.numel()
                counts.most = max(counts.most, counts.now)

            def __del__(self):
                counts.now -= self.value.numel()

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value)


@pytest.mark.parametrize("method", ["tecoa", "capt", "tga-zsr", "apt"])
def test_activations_computed_twice_give_the_same_bits_and_are_fewer(method, vlm, task, loaded, monkeypatch):
    """Towers, prompts in both, dense embeddings, a text context."""
    run, found, most = Run(method, vlm, task, loaded), [], []
    for on in (False, True):
        keeping = Keeping()
        with step.recomputing(run.models.values(), on), keeping.hooks:
            found.append(run.gradient(Portions(), monkeypatch))
        most.append(keeping.most)
    (plain, terms, _), (twice, values, _) = found
    assert torch.equal(plain, twice) and terms == values
    assert most[1] < 0.6 * most[0], most
    assert not any(model.recompute for model in run.models.values())


@pytest.mark.parametrize("tower", ["image", "text"])
def test_each_tower_keeps_fewer_activations(tower, vlm, task):
    model, most = vlm.with_prompts(task.template, 2, 2, 3), []
    tokens = model.tokens(task.classes, task.template)
    for on in (False, True):
        keeping = Keeping()
        with step.recomputing([model], on), keeping.hooks:
            out = model.text_features(tokens) if tower == "text" else model.image_features(images(5, 16))
            most.append(keeping.now)
            out.sum().backward()
    assert most[1] < 0.4 * most[0], most


def test_a_run_with_activations_computed_twice(vlm, task):
    one = train.tune("capt", vlm, task, **HOW)
    two = train.tune("capt", vlm, task, checkpoint_activations=True, **HOW)
    assert all(torch.equal(value, two.delta()[name]) for name, value in one.delta().items())
    assert not two.recompute and not vlm.recompute
    vlm.compiled = "eager"
    with pytest.raises(UserError, match="--compile do not go together"):
        train.tune("capt", vlm, task, checkpoint_activations=True, **HOW)
