"""Backbones and runs from outside: nothing is executed, no memory is taken on a number's word, refused in one line."""

import json
import os
import pickle
import resource
import shutil
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from advtune import pretrained, runs, weights
from advtune.cli import main
from advtune.errors import UserError
from advtune.export.source import foundation
from advtune.preprocess import Preprocess, from_config
from advtune.pretrained import locate, read_pretrained
from advtune.serve import models
from advtune.train import tune

WEIGHTS, PICKLE, INDEX = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"


@pytest.fixture
def folder(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "copy")


def fails(folder, match):
    with pytest.raises(UserError, match=match) as error:
        read_pretrained(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 500 + len(str(folder))
    return str(error.value)


def change(file, edit):
    facts = json.loads(file.read_text())
    edit(facts)
    file.write_text(json.dumps(facts))


def tensors(folder, **changes):
    """The folder's weights with some replaced (None: left out), written over the old ones."""
    found = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in found.items() if value is not None}, folder / WEIGHTS)


# weights


class Payload:
    """What a pickle can do to whoever opens it: here, leave a file."""

    def __init__(self, place, kind):
        self.place, self.kind = str(place), kind

    def __reduce__(self):
        return {
            "open": (open, (self.place, "w")),
            "exec": (exec, (f"open({self.place!r}, 'w')",)),
            "system": (os.system, (f"touch {self.place}",)),
            "mkdir": (Path.mkdir, (Path(self.place),)),
        }[self.kind]


@pytest.mark.parametrize("kind", ["open", "exec", "system", "mkdir"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("way", ["torch.save", "legacy torch.save", "pickle", "in a tensor's place"])
def test_a_pickle_is_not_executed(folder, tmp_path, kind, way):
    (folder / WEIGHTS).unlink()
    file, payload = folder / PICKLE, Payload(tmp_path / "ran", kind)
    if way == "pickle":
        file.write_bytes(pickle.dumps(payload))
    else:
        table = {"x": torch.zeros(1), "logit_scale": payload} if "place" in way else payload
        torch.save(table, file, _use_new_zipfile_serialization="legacy" not in way)
    assert "get the model as safetensors" in fails(folder, "could run code")
    assert not (tmp_path / "ran").exists()
    with suppress(Exception):  # that the payload works is seen by opening it as it must not be
        pickle.loads(file.read_bytes()) if way == "pickle" else torch.serialization.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], torch.zeros(3), {1: torch.zeros(1)}, {"logit_scale": 3}, {"state_dict": {"x": torch.zeros(1)}}],
    ids=lambda each: str(each)[:20],
)  # fmt: skip
def test_a_pickle_of_something_else_is_refused(folder, content):
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / PICKLE)
    fails(folder, "no table of named tensors")


def test_a_packed_pickle_is_not_unpacked(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"x": torch.zeros(1 << 20)}, folder / "plain.bin")
    with zipfile.ZipFile(folder / "plain.bin") as plain, zipfile.ZipFile(folder / PICKLE, "w") as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    fails(folder, "is packed and would grow")


def test_a_pickled_view_that_claims_a_huge_shape_takes_no_memory(folder):
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(found | {"visual_projection.weight": torch.zeros(1).expand(10**7, 10**7)}, folder / PICKLE)
    with bounded():
        fails(folder, r"visual_projection.weight has shape \(10000000, 10000000\)")


def test_a_view_that_repeats_a_few_numbers_is_refused(folder):
    """Where the shapes are the file's own word, as in OpenAI's, such a view could ask for any memory."""
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(found | {"visual_projection.weight": torch.zeros(1).expand(24, 32)}, folder / PICKLE)
    fails(folder, "visual_projection.weight is larger than what the file holds of it")


HEADERS = {
    "2^60": (1 << 60).to_bytes(8, "little") + b"{}",
    "2^64 - 1": b"\xff" * 8 + b"{}",
    "99 MB": (99_000_000).to_bytes(8, "little") + b"{",
    "no JSON": (4).to_bytes(8, "little") + b"\xff\xff\xff\xff",
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "nothing": b"",
    "cut": b"\x08\0\0",
    "beyond the end": save({"x": torch.zeros(4)})[:-4],
    "overlap": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
    b'"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "huge shape": b'{"a":{"dtype":"F32","shape":[4611686018427387904,16],"data_offsets":[0,4]}}',
    "odd dtype": b'{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_with_a_lying_header(folder, name):
    data = HEADERS[name]
    if data.startswith(b"{"):
        data += b" " * (-len(data) % 8)
        data = len(data).to_bytes(8, "little") + data + bytes(4)
    (folder / WEIGHTS).write_bytes(data)
    with bounded():
        fails(folder, "weights are truncated or damaged")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_weights_that_are_no_floats_are_refused(folder, dtype):
    tensors(folder, visual_projection__weight=torch.zeros(24, 32).to(dtype))
    fails(folder, "visual_projection.weight holds .* numbers, not floating-point weights")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_read(folder, dtype):
    found = load_file(folder / WEIGHTS)
    save_file({name: value.to(dtype) for name, value in found.items()}, folder / WEIGHTS)
    read = dict(read_pretrained(str(folder)).clip.named_parameters())["image.project.weight"]
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, found["visual_projection.weight"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(folder, value):
    bad = torch.zeros(24, 32, dtype=torch.float64)
    bad[3, 5] = value
    tensors(folder, visual_projection__weight=bad)
    fails(folder, "visual_projection.weight holds nan or infinite weights")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(logit_scale=None), "1 tensor is missing, first logit_scale"),
        ({"extra\x1b[31m": torch.zeros(1)}, r"not of a CLIP model, first extra\\x1b"),
        (dict(logit_scale=torch.zeros(2)), r"logit_scale has shape \(2,\)"),
        (dict(visual_projection__weight=torch.zeros(0)), "has shape"),
        (dict(visual_projection__weight=torch.zeros(32, 24)), "has shape"),
        (dict(vision_model__embeddings__patch_embedding__weight=torch.zeros(32, 3, 4, 5)), "has shape"),
        (dict(vision_model__embeddings__patch_embedding__weight=torch.zeros(32)), "has shape"),
        (dict(vision_model__encoder__layers__0__self_attn__k_proj__bias=torch.zeros(31)), "k_proj.bias has shape"),
        (dict(vision_model__encoder__layers__0__self_attn__k_proj__bias=torch.zeros(())), "k_proj.bias has shape"),
    ],
    ids=str,
)  # fmt: skip
def test_missing_extra_and_misshapen_tensors(folder, changes, match):
    tensors(folder, **changes)
    fails(folder, match)


@pytest.mark.parametrize(
    "name", ["../../../../../../etc/passwd", "/etc/passwd", "..", "a/../model-1.safetensors", "a\\b.safetensors",
             "model.bin", "", "x\0.safetensors", "\x1b[31m.safetensors"],
)  # fmt: skip
def test_an_index_that_leaves_the_folder_is_refused(folder, name, monkeypatch):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"logit_scale": name}}))
    monkeypatch.setattr(weights, "load_file", lambda path: pytest.fail(f"opened {path}"))
    assert "\x1b" not in fails(folder, "not a .safetensors file beside it|but missing|has no weight_map")


def test_an_index_cannot_name_a_good_file_elsewhere(folder, tmp_path):
    (folder / WEIGHTS).rename(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"logit_scale": name}}))
        fails(folder, "not a .safetensors file beside it")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{", '{"weight_map": {}}']
)
def test_an_index_that_says_nothing(folder, text):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(text)
    fails(folder, "weight_map|not valid JSON|no table")


# configuration


HUGE = (10**9, 1 << 20, 10**30, -1, 0, 1.5, True, "32", [32], None, {}, float("nan"), float("inf"))
NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


class bounded:
    """No more address space than now, and 256 MB."""

    def __enter__(self):
        if sys.platform == "linux":
            self.before = resource.getrlimit(resource.RLIMIT_AS)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), self.before[1]))

    def __exit__(self, *_):
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, self.before)


FITS = [("layer_norm_eps", 0), ("bos_token_id", 0), ("eos_token_id", 0), ("max_position_embeddings", None)]


def numbers(*keys):
    return pytest.mark.parametrize(
        ("key", "value"), [(k, v) for k in keys for v in HUGE if (k, v) not in FITS], ids=str
    )


@numbers(*NUMBERS, "image_size", "patch_size", "layer_norm_eps", "hidden_act")
def test_a_number_of_the_image_tower(folder, key, value):
    change(folder / "config.json", lambda c: c["vision_config"].update({key: value}))
    with bounded():
        fails(folder, f"{key}|heads do not divide|has shape|missing|pictures of|makes no sense|not of a CLIP model")


@numbers("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")
def test_a_number_of_the_text_tower(folder, key, value):
    change(folder / "config.json", lambda c: c["text_config"].update({key: value}))
    with bounded():
        fails(folder, f"{key}|has shape")


@pytest.mark.parametrize("value", [[], 3, "x", {"hidden_size": []}, {"num_hidden_layers": 4}], ids=str)
@pytest.mark.parametrize("key", ["vision_config", "text_config", "projection_dim", "model_type"])
def test_a_table_of_another_kind(folder, key, value):
    change(folder / "config.json", lambda c: c.update({key: value}))
    fails(folder, "makes no sense|are known|missing|has shape|not of a CLIP model|by the tokenizer")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "card.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"a":' * 100_000, "\xff\xfe", '{"size": ' + "9" * 5000 + "}"]
)
def test_a_file_that_is_no_table(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    fails(folder, "not valid JSON|no table")


def test_missing_keys_have_the_defaults_of_transformers(folder):
    change(folder / "config.json", lambda c: c["vision_config"].pop("hidden_size"))
    fails(folder, r"asks for \(768")
    (folder / "config.json").unlink()
    fails(folder, r"neither config.json \(Hugging Face\) nor open_clip_config.json \(open_clip\) is there")
    os.mkfifo(folder / "config.json")
    fails(folder, "not a plain file")


def test_what_a_card_says_is_one_short_line(folder):
    (folder / "card.json").write_text(json.dumps({"notice": "a\n\x1b[31mb" + "x" * 10_000}))
    notice = read_pretrained(str(folder)).notice
    assert notice.startswith(r"a\n\x1b[31mbx") and len(notice) == pretrained.NOTICE
    (folder / "card.json").write_text('{"notice": [1]}')
    assert read_pretrained(str(folder)).notice == ""


# preprocessing


@pytest.mark.parametrize(
    "facts",
    [
        {"image_std": [0.2, 0, 0.3]}, {"image_std": [0.2, -0.2, 0.3]}, {"image_std": [1e-300] * 3},
        {"image_std": [0.2]}, {"image_std": "abc"}, {"image_std": None}, {"image_std": ["a", "b", "c"]},
        {"image_std": [True] * 3},
        {"image_mean": [float("nan")] * 3}, {"image_mean": [float("inf")] * 3}, {"image_mean": [10**400, 0, 0]},
        {"image_mean": {}}, {"image_mean": 3}, {"size": -1}, {"size": 0}, {"size": 10**9}, {"size": True},
        {"size": "224"},
        {"size": {"shortest_edge": -224}}, {"size": {"shortest_edge": [1]}}, {"size": {"height": 10**6, "width": 16}},
        {"size": {"height": 16}}, {"size": None}, {"size": []}, {"crop_size": 0}, {"crop_size": -16},
        {"crop_size": {"height": 10**12, "width": 10**12}}, {"crop_size": {"height": 16, "width": 8}},
        {"crop_size": {}},
        {"crop_size": 1.5}, {"resample": 0}, {"resample": "bicubic"}, {"resample": None}, {"resample": []},
        {"crop_size": 32}, {"size": 32, "do_center_crop": False}, {"do_resize": False, "crop_size": 4096},
    ],
    ids=str,
)  # fmt: skip
def test_preprocessing_that_makes_no_sense(folder, facts):
    change(folder / "preprocessor_config.json", lambda c: c.update(facts))
    fails(folder, "preprocess|makes no sense|pictures of")


def test_preprocessing_that_is_read():
    assert from_config({}) == Preprocess()
    assert from_config({"do_normalize": False}).std == (1.0, 1.0, 1.0)
    assert from_config({"size": {"height": 8, "width": 6}, "do_center_crop": False}).side == (8, 6)
    assert Preprocess((8, 8), None).side == 8
    assert Preprocess(None, None).side is None


# tokenizer


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"model": 3}', "[" * 100_000, '{"version": "1.0", "model": {"type": "BPE"}}',
     '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
     '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}', "\xff\xfe",
     '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "continuing_subword_prefix": "#"}}',
     '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "x"}}'],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_a_tokenizer_that_is_none(folder, text):
    (folder / "tokenizer.json").write_text(text, encoding="latin-1")
    fails(folder, "tokenizer.json: truncated or damaged")


def test_a_tokenizer_with_an_id_beyond_the_model(folder):
    change(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update({"zzz": 10**6}))
    fails(folder, "the tokenizer has 1000001 ids")


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [
        ("[]", ""),
        ("{", ""),
        ('{"a": "b"}', ""),
        ('{"a": -1}', ""),
        ('{"a": 1}', "x y"),
        ("[" * 100_000, ""),
        ("{}", "\xff"),
    ],
    ids=lambda text: text[:20],
)
def test_a_vocabulary_that_is_none(folder, vocabulary, merges):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(vocabulary)
    (folder / "merges.txt").write_text(merges, encoding="latin-1")
    fails(folder, "vocab.json: truncated or damaged")


# names


@pytest.mark.parametrize(
    "name", ["../x", "./x", "/abs/x", "~nobody-of-this-name/x", "C:\\x", "C:/x", "a/b/c", "a/..", "-a/b", "a/b\0",
             "a b/c", "a/b\n", "http://a/b", "hf://a/b", "a/", "", "x" * 5000, "a/" + "x" * 300, "a\x1b/b"],
    ids=lambda name: repr(name)[:20],
)  # fmt: skip
def test_a_name_like_a_path_is_never_asked_of_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "download", lambda name: pytest.fail("asked"))
    with pytest.raises(UserError, match="no such folder") as error:
        locate(name)
    assert str(error.value).isprintable()
    with pytest.raises(UserError):
        runs.load(name)


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "a/b", "A_1/b.c-d"])
def test_a_hub_id_is_asked(name, monkeypatch):
    monkeypatch.setattr(pretrained, "download", lambda name: f"asked for {name}")
    assert locate(name) == f"asked for {name}"


def test_the_command_says_one_line(folder, capsys):
    tensors(folder, logit_scale=torch.tensor(float("nan")))
    assert (
        main(["evaluate", "zero-shot", "--backbone", str(folder), "--data", "fashion-mnist-mini", "--limit", "2"]) == 2
    )
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "logit_scale holds nan" in printed


# run folders


@pytest.fixture(scope="module")
def capt(clip_folder, image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "capt"
    tune("capt", str(clip_folder), f"folder:{image_folder}", shots=1, epochs=1, out=out, show=False)
    return out


@pytest.fixture
def run(capt, tmp_path, clip_folder):
    copied = shutil.copytree(capt, tmp_path / "run")
    change(copied / "config.json", lambda c: c["backbone"].update(path=str(clip_folder)))
    (copied / "SHA256SUMS").unlink(missing_ok=True)  # whoever changes the files changes these
    return copied


def refused(run, match):
    with pytest.raises(UserError, match=match) as error:
        runs.load(str(run))
    assert "\n" not in str(error.value)


def test_the_run_is_one(run):
    assert runs.load(str(run)).run["method"] == "capt"


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.clear(), lambda c: c.pop("backbone"), lambda c: c.update(backbone=[]), lambda c: c.update(train=3),
        lambda c: c["backbone"].pop("sha256"), lambda c: c["backbone"].update(name=3), 
        lambda c: c.update(preprocess=[]),
        lambda c: c["backbone"].update(path=None),
    ],
)  # fmt: skip
def test_a_config_of_no_run(run, edit):
    change(run / "config.json", edit)
    refused(run, "is not of a run, or damaged; tune again")


@pytest.mark.parametrize(
    "facts",
    [{"std": [0, 0, 0]}, {"resize": -1}, {"resize": 10**9}, {"nonsense": 1}, {"mode": "magic"}, {"mean": None}],
    ids=str,
)
def test_a_run_with_hostile_preprocessing(run, facts):
    change(run / "config.json", lambda c: c["preprocess"].update(facts))
    refused(run, "preprocessing")


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "[]", "\0"])
def test_a_config_that_is_none(run, text):
    (run / "config.json").write_text(text)
    refused(run, "tune again")


@pytest.mark.parametrize(
    "delta",
    [
        {"prompts.text": torch.zeros(1, 4, 25)}, {"prompts.text": torch.zeros(9, 4, 24)},
        {"prompts.text": torch.zeros(24)},
        {"prompts.text": torch.zeros(1, 76, 24)}, {"prompts.image": torch.zeros(1, 2, 3, 32)},
        {"prompts.image": torch.zeros(1, 0, 32)}, {"prompts.pad": torch.zeros(3, 8, 8)},
        {"prompts.other": torch.zeros(1)},
        {"prompts.text": torch.full((1, 4, 24), float("nan"))},
        {"prompts.text": torch.zeros(1, 4, 24, dtype=torch.int8)},
        {"clip.image.project.weight": torch.zeros(3)}, {"clip.config": torch.zeros(1)}, {"x": torch.zeros(1)},
    ],
    ids=lambda delta: str({k: tuple(v.shape) for k, v in delta.items()}),
)  # fmt: skip
def test_learned_tensors_that_do_not_fit(run, delta):
    save_file(delta, run / "delta.safetensors")
    refused(run, "does not fit|nan or infinite|not floating-point")


def test_a_delta_with_a_lying_header(run):
    (run / "delta.safetensors").write_bytes(HEADERS["2^60"])
    refused(run, "truncated or damaged")


def test_a_run_that_stands_on_itself(run, tmp_path):
    change(run / "config.json", lambda c: c["backbone"].update(path="."))
    refused(run, "on itself")
    for walk in (foundation, lambda name: models.undefended(Path(name))):
        with pytest.raises(UserError, match="on itself"):
            walk(str(run))


def test_a_run_on_another_backbone_is_refused_by_content(run, tmp_path, clip_folder):
    other = shutil.copytree(clip_folder, tmp_path / "other")
    tensors(other, logit_scale=torch.tensor(1.0))
    change(run / "config.json", lambda c: c["backbone"].update(path=str(other)))
    refused(run, "has other content")
