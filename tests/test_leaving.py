"""Images that leave an attack's batch: at once on a processor, a step late on an accelerator, which is never asked
to wait."""

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advtune.attacks import ATTACKS, leaving, square
from advtune.attacks.ball import image_seeds
from advtune.losses import cross_entropy
from toys import Net, Recorded, images, stands

WAITS = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "unique", "masked_select")
LEAVERS = ("pgd", "cw-pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")
CPU = torch.device("cpu")


class NoQuestions(TorchDispatchMode):
    """What a device would be asked for by the host is an error: values, and shapes that hang on values. (Tensors are
    not turned into lists either: see `quiet`.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} with a mask"
        return func(*args, **(kwargs or {}))


@contextmanager
def quiet():
    """NoQuestions, and no tensor leaves torch but by `Late`."""
    way, send = leaving.Late.__call__, pytest.MonkeyPatch()

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor is read by the host")

    def read(self, value):
        with pytest.MonkeyPatch.context() as allowed:
            for name, kept in ways.items():
                allowed.setattr(torch.Tensor, name, kept)
            return way(self, value)

    ways = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy", "__array__")}
    for name in ways:
        send.setattr(torch.Tensor, name, refuse)
    send.setattr(leaving.Late, "__call__", read)
    try:
        with NoQuestions():
            yield
    finally:
        send.undo()


@pytest.fixture
def late(monkeypatch):
    """The accelerator's way, on a processor."""
    monkeypatch.setattr(leaving.Late.__init__, "__defaults__", (True,))
    monkeypatch.setattr(leaving.Leaving.__init__, "__defaults__", (True,))


def attack_of(name):
    changes = {"queries": 60} if name == "square" else {"steps": 6}
    return dataclasses.replace(ATTACKS[name], eps=0.03, **changes)


def test_what_is_read_late_is_what_was_given_before():
    read = leaving.Late(CPU, late=True)
    values = [torch.arange(3) + i for i in range(3)]
    assert read(values[0]) is None
    assert read(values[1]).tolist() == values[0].tolist() and read(values[2]).tolist() == values[1].tolist()
    assert leaving.Late(CPU)(values[0]).tolist() == values[0].tolist()


def test_a_late_answer_is_about_those_that_are_still_there():
    """Against the plain way: at step i, leave out all that were done before it."""
    random = np.random.default_rng(0)
    done_at = random.integers(0, 8, 40)
    stays, here = leaving.Leaving(CPU, late=True), np.arange(40)
    for step in range(10):
        stay = stays(torch.from_numpy(done_at[here] <= step))
        here = here if stay is None else here[stay.numpy()]
        assert here.tolist() == np.flatnonzero(done_at > step - 1).tolist()
    assert len(here) == 0


@pytest.mark.parametrize("name", LEAVERS)
def test_the_same_images_stand_and_the_same_is_found(name, late, monkeypatch):
    """Some fall at once, some late, some never; what is found first is kept."""
    f, x = Net(), images(48)
    y = f(x).argmax(1)
    y[:4] = (y[:4] + 1) % 4  # misclassified from the beginning
    torch.manual_seed(0)
    found = attack_of(name)(f, x, y)
    monkeypatch.undo()
    torch.manual_seed(0)
    recorded = Recorded(f)
    at_once = attack_of(name)(recorded, x, y)
    assert torch.equal(stands(f, found, y), stands(f, at_once, y))
    assert 4 < int((~stands(f, at_once, y)).sum()) < 48
    torch.testing.assert_close(found, at_once)  # of those that fell, too
    assert len(set(recorded.sizes)) > 2  # they do leave


@pytest.mark.parametrize("name, keep", [("pgd", "best"), ("pgd", "last"), ("apgd-ce", ""), ("square", "")])
def test_what_fooled_is_kept_whatever_comes_after(name, keep, late):
    """A function that is wrong at its fourth call only: the images of that call come back."""
    f = Net()

    def flicker(z):
        seen.append(z.detach().clone())
        return f(z).roll(int(len(seen) == 4), dims=1)

    x, seen = images(6), []
    y = f(x).argmax(1)
    attack = dataclasses.replace(attack_of(name), eps=1e-4, **({"keep": keep} if keep else {}))
    torch.testing.assert_close(attack(flicker, x, y), seen[3], rtol=0, atol=0)


RUNS = {"fab-t": "_run", "square": "__call__"}  # what holds the loop; _climb in the others


@pytest.mark.parametrize("name", LEAVERS)
def test_the_device_is_never_asked_in_the_loop(name, late, monkeypatch):
    """Everything that is launched in a run of an attack is known without an answer from before."""
    f, x = Recorded(Net()), images(12)
    y = f(x).argmax(1)
    attack, seeds = attack_of(name), image_seeds(x)  # of the images' content, before the loop
    monkeypatch.setattr(square, "image_seeds", lambda x: seeds)
    loop = getattr(type(attack), RUNS.get(name, "_climb"))

    def quietly(*args, **kwargs):
        with quiet():
            return loop(*args, **kwargs)

    monkeypatch.setattr(type(attack), RUNS.get(name, "_climb"), quietly)
    attack(f, x, y)
    assert len(f.seen) > 4


def test_a_training_attack_asks_nothing_of_the_device():
    from advtune.attacks import PGD

    f, x = Recorded(Net()), images(8)
    y = f(x).argmax(1)
    with quiet():
        PGD(eps=0.1, steps=3, keep="last", early_stop=False)(f, x, y, cross_entropy)
    assert f.sizes == [8] * 4  # the labels, then a gradient a step
