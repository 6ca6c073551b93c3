"""The attack on class texts: what it may change, that it finds the worst of all, that it is scored as it was found."""

import hashlib
import itertools
import json

import pytest
import torch

import advtune
from advtune import evaluation, train
from advtune.cli import main
from advtune.data import Split, load_images
from advtune.edits import TextEdits, edits, logits_of, one_class, rule, search
from advtune.errors import UserError
from advtune.results import Row
from backbones import write_siglip
from conftest import write_clip

FEW = "ab -"  # characters: few, so that all can be tried


def levenshtein(a, b):
    """By the table, not by what makes the edits."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def near(text, alphabet):
    """Every text at distance 1: among all that are as long, one longer or one shorter."""
    letters = sorted({*text, *alphabet})
    lengths = range(max(0, len(text) - 1), len(text) + 2)
    found = {"".join(each) for n in lengths for each in itertools.product(letters, repeat=n)}
    new = {each for each in found if levenshtein(text, each) == 1}
    # an inserted or replaced character is of the alphabet
    return {t for t in new if all(t.count(c) <= text.count(c) for c in set(t) - set(alphabet))}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    write_siglip(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tuned(clip_folder, image_folder, tmp_path_factory):
    """A model that knows the colours, so that there is something to break."""
    vlm, task = advtune.load(str(clip_folder), "cpu", "fp32"), advtune.load_task(f"folder:{image_folder}")
    options = {"lr": 0.05, "warmup": 0, "batch_size": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADVTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return train.tune("tecoa", vlm, task, epochs=30, options=options, attack={"eps": "0"}, show=False)


def found(row):
    return row.stages[0]["edits"]


def labels(task):
    """The class name of every test image."""
    images = load_images(task, Split(part="test", resolution=16))
    return [task.classes[c] for c in images.y.tolist()]


def accuracy_with(model, task, texts):
    """Flags [N] when only the true class's text is the edited one, by the whole classifier."""
    images = load_images(task, Split(part="test", resolution=model.side))
    flags = torch.zeros(len(images.y), dtype=torch.bool)
    for c, name in enumerate(task.classes):
        names = [texts.get(name, name) if i == c else each for i, each in enumerate(task.classes)]
        f = model.classifier(model.tokens(names, task.template))
        own = (images.y == c).nonzero().squeeze(1)
        with torch.no_grad():
            flags[own] = f(images.batch(own, model.device)[0]).argmax(1) == c
    return flags


@pytest.mark.parametrize("text", ["a", "dab", "b ad"])
def test_edits_are_all_texts_at_distance_one(text):
    made = edits(text, FEW)
    assert len(made) == len(set(made))
    assert set(made) == near(text, FEW)
    assert "" not in edits("da", FEW) and "" in edits("a", FEW)


def test_it_is_as_strong_as_brute_force(tuned, task):
    row = evaluation.evaluate(tuned, task, TextEdits(alphabet=FEW), show=False)
    clean = accuracy_with(tuned, task, {})
    assert clean.tolist() == [flag == "1" for flag in row.flags["clean"]]
    assert row.clean["accuracy"] > 0.7
    least = 0
    images = load_images(task, Split(part="test", resolution=tuned.side))
    for c, name in enumerate(task.classes):
        own = (images.y == c) & clean
        least += min(int((accuracy_with(tuned, task, {name: each}) & own).sum()) for each in [name, *near_few(name)])
    assert row.robust["correct"] == least < row.clean["correct"]
    attacked = accuracy_with(tuned, task, found(row)) & clean
    assert attacked.tolist() == [flag == "1" for flag in row.flags["robust"]]


def near_few(name):
    return [each for each in edits(name, FEW) if each.strip()]


@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_the_other_losses_find_their_least(tuned, task, loss):
    row = evaluation.evaluate(tuned, task, TextEdits(alphabet=FEW, loss=loss), show=False)
    images = load_images(task, Split(part="test", resolution=tuned.side))
    for c, name in enumerate(task.classes):
        own = (images.y == c).nonzero().squeeze(1)
        x, y = images.batch(own, tuned.device)

        def value(text, c=c, x=x, y=y):
            names = [text if i == c else each for i, each in enumerate(task.classes)]
            with torch.no_grad():
                z = tuned.classifier(tuned.tokens(names, task.template))(x).double()
            others = torch.cat([z[:, :c], z[:, c + 1 :]], 1).amax(1)
            return float((z[:, c] - others if loss == "margin" else z.log_softmax(1)[:, c]).sum())

        least = min(value(each) for each in [name, *near_few(name)])
        assert value(found(row).get(name, name)) == pytest.approx(least, abs=1e-3)


def test_distance_is_kept_and_two_is_as_strong_as_one(tuned, task):
    rows = [evaluation.evaluate(tuned, task, TextEdits(distance=k, alphabet="ab"), show=False) for k in (1, 2)]
    again = evaluation.evaluate(tuned, task, TextEdits(distance=2, alphabet="ab"), batch_size=5, seed=3, show=False)
    assert (again.flags, found(again)) == (rows[1].flags, found(rows[1]))
    for k, row in enumerate(rows, 1):
        assert found(row) and all(1 <= levenshtein(*pair) <= k for pair in found(row).items())
        assert all(c == "1" for c, r in zip(*(row.flags[x] for x in ("clean", "robust")), strict=True) if r == "1")
        assert row.attack["distance"] == k and row.attack["norm"] == "levenshtein" and "eps" not in row.attack
        assert row.stages[0]["attacked"] - row.stages[0]["fell"] == row.robust["correct"]
        attacked = {name for name, flag in zip(labels(task), row.flags["clean"], strict=True) if flag == "1"}
        once = sum(1 + len(edits(name, "ab")) for name in attacked)
        assert row.stages[0]["tried"] == once or (k == 2 and row.stages[0]["tried"] > once)
        assert Row.from_json(row.to_json()) == row
    one, two = (row.robust["correct"] for row in rows)
    assert two <= one <= rows[0].clean["correct"]
    assert max(levenshtein(*pair) for pair in found(rows[1]).items()) == 2 or two == one == 0


def test_the_second_edit_reaches_further():
    """By a judge of which the least lies at distance 2, over a first step that is among the best five."""

    def judge(texts):
        return [((float(levenshtein(text, "bbd")) + 1, 0.0), text) for text in texts]

    def free(text):
        return True

    assert search(TextEdits(distance=1, alphabet="ab"), "aad", free, judge) in ("abd", "bad")
    assert search(TextEdits(distance=2, alphabet="ab"), "aad", free, judge) == "bbd"
    # what is not allowed is no answer, but a way
    assert search(TextEdits(distance=2, alphabet="ab"), "aad", lambda t: t not in ("abd", "bad"), judge) == "bbd"
    assert search(TextEdits(distance=2, alphabet="ab"), "aad", lambda t: t != "bbd", judge) in ("abd", "bad")


def test_a_wide_beam_finds_the_least_of_all_at_distance_two():
    """Against every text within two edits, by keys that say nothing of the way."""
    name, letters = "aba", "ab"

    def key(text):
        return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")), 0.0

    whole = ["".join(t) for n in range(6) for t in itertools.product(letters, repeat=n)]
    for k in (1, 2):
        ball = [text for text in whole if levenshtein(name, text) <= k]
        asked = []

        def judge(texts, asked=asked):
            asked.extend(texts)
            return [(key(text), text) for text in texts]

        found = search(TextEdits(distance=k, alphabet=letters, beam=1000, tries=10**6), name, bool, judge)
        allowed = [text for text in ball if text]
        assert found == min(allowed, key=key)
        assert sorted(asked) == sorted(ball)  # each once, and none beyond


def test_few_tries_go_where_a_probe_hurts_most():
    asked = []

    def judge(texts):
        asked.append(len(texts))
        return [((float(levenshtein(text, "abcdxf")), 0.0), text) for text in texts]

    attack = TextEdits(alphabet=" xyz", tries=20)  # of 13 places with 5 texts each, four
    assert search(attack, "abcdef", lambda text: True, judge) == "abcdxf"
    assert asked[1] == 13 and asked[2] <= 20
    asked.clear()
    assert search(TextEdits(alphabet=" xyz"), "abcdef", lambda text: True, judge) == "abcdxf"
    assert len(asked) == 2


def test_it_never_takes_another_class_s_name(clip_folder, siglip, tmp_path):
    names = ("red cat", "bed cat", "sea", "a d")
    for place in (str(clip_folder), siglip):
        model = advtune.load(place, "cpu", "fp32")
        free, strict = (rule(TextEdits(new_words=new), model, names, 0) for new in (True, False))
        assert not any(map(free, ["bed cat", "BED  cat", " bed cat", "sea", "", " "]))
        assert free("red sea") and not strict("red sea") and not strict("d cat")
        assert strict("red ca") and strict("red") and strict("rod cat")
        assert free("be'd cat") == (place != siglip)  # SigLIP's drops punctuation


@pytest.mark.parametrize("kind", ["context", "own contexts", "prompts", "sigmoid", "sigmoid context"])
def test_learned_words_and_sigmoid_models(kind, vlm, siglip, task):
    model = advtune.load(siglip, "cpu", "fp32") if "sigmoid" in kind else vlm
    if "context" in kind:
        model = model.with_context(3, task.classes if kind == "own contexts" else ())
    elif kind == "prompts":
        model = model.with_prompts(task.template, 2, 2, 2)
    model = model.requires_grad_(False).eval()
    attack = TextEdits(alphabet=FEW)
    row = evaluation.evaluate(model, task, attack, show=False)
    assert row.robust["correct"] < row.clean["correct"] or row.clean["correct"] == 0
    view = [name if kind == "own contexts" else found(row).get(name, name) for name in task.classes]
    if kind != "own contexts":  # whose model takes no other names
        flags = accuracy_with(model, task, dict(zip(task.classes, view, strict=True))) & accuracy_with(model, task, {})
        assert flags.tolist() == [flag == "1" for flag in row.flags["robust"]]


def test_each_class_keeps_its_own_context(vlm, task):
    """A context for every class, all of them equal, is attacked as the one for all."""
    shared = vlm.with_context(3, seed=1)
    own = vlm.with_context(3, task.classes)
    with torch.no_grad():
        own.prompts.text.copy_(shared.prompts.text[:, None].expand_as(own.prompts.text))
    rows = [
        evaluation.evaluate(m.requires_grad_(False), task, TextEdits(alphabet=FEW), show=False) for m in (shared, own)
    ]
    assert (rows[0].flags, found(rows[0])) == (rows[1].flags, found(rows[1]))
    with torch.no_grad():
        own.prompts.text[:, 1:] += 3 * torch.randn(
            own.prompts.text[:, 1:].shape, generator=torch.Generator().manual_seed(0)
        )
    tokens = vlm.with_context(3).tokens(task.classes, "")
    features = own.text_features(tokens)
    for c in range(3):
        assert torch.allclose(one_class(own, c).text_features(tokens)[c], features[c], atol=1e-5)


def test_a_text_that_the_context_does_not_hold_is_no_edit(tmp_path, task):
    write_clip(tmp_path, text=dict(max_position_embeddings=11))
    model = advtune.load(str(tmp_path), "cpu", "fp32")
    length = max(len(model.tokenizer.pieces(task.template.replace("{}", name))) for name in task.classes) + 2
    assert length == 11  # full: a character more is a token more
    features = torch.nn.functional.normalize(torch.rand(5, 24), dim=1)
    with torch.no_grad():
        kept, logits = logits_of(model, task.template, features, ["green", "greeen", "red", "ggreen"])
        alone = model.towers(model.tokens(["green", "red"], task.template))[1](features)
        assert kept == ["green", "red"] and torch.allclose(logits, alone, atol=1e-5)
        assert logits_of(model, task.template, features, ["greeen"])[0] == []


def test_what_does_not_go_together(vlm, task, image_folder, tmp_path, capsys):
    for how in (dict(source="mini"), dict(defence=lambda x: x), dict(checks=True)):
        with pytest.raises(UserError, match=f"leave {next(iter(how))} out"):
            evaluation.evaluate(vlm, task, TextEdits(), show=False, **how)
    with pytest.raises(UserError, match="one at a time"):
        evaluation.evaluate_all(vlm, task, [TextEdits(), TextEdits(distance=2)], show=False)
    for wrong in (dict(distance=0), dict(distance=9), dict(alphabet=""), dict(alphabet="a{"), dict(loss="dlr")):
        with pytest.raises(UserError, match="attack text"):
            TextEdits(**wrong)
    given = ["evaluate", "zero-shot", "--data", f"folder:{image_folder}", "--attack"]
    for more, said in (
        (["text", "-a", "eps=1/255"], "eps"),
        (["text", "--defence", "jpeg"], "defence"),
        (["txt"], "text"),
    ):
        assert main([*given, *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error


def test_from_the_command_line_to_the_report(clip_folder, image_folder, tmp_path, capsys):
    for name, k in (("a", 1), ("b", 1), ("b", 2)):
        given = ["evaluate", "zero-shot", "--backbone", str(clip_folder), "--data", f"folder:{image_folder}"]
        given += ["--attack", "text", "-a", f"distance={k}", "-a", "alphabet=ab", "--out", str(tmp_path / name)]
        assert main(given) == 0
        shown = capsys.readouterr().out
        assert f"robust under text levenshtein distance={k}: " in shown and " texts tried\n" in shown
    assert main(["report", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "text distance 1 ·" in shown and "text distance 2 ·" in shown
    assert main(["report", str(tmp_path), "--format", "html", "--out", str(tmp_path / "page.html")]) == 0
    assert "text levenshtein distance 2" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)
    assert {(each["attack"], each["which"]) for each in pairs} == {("text", "clean"), ("text", "robust")}
