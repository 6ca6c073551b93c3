"""The known backbones, and what `advtune backbone inspect` says of one: whole, spoilt, of every format."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import advtune
from advtune.cli import main
from advtune.clip import CLIP
from advtune.formats import siglip
from advtune.inspecting import inspect, lines
from advtune.listing import BACKBONES, COLUMNS, backbone_row, listing
from advtune.pretrained import EMBEDDED, read_pretrained
from advtune.shapes import ClipConfig, ImageShape, TowerConfig
from backbones import open_clip_tensors, write_open_clip, write_siglip
from conftest import write_clip
from test_towers import resnet

TOWERS = {  # width, layers, heads, MLP of the image tower; of the text tower; embedding
    "ViT-B": ((768, 12, 12, 3072), (512, 12, 8, 2048), 512),
    "ViT-L": ((1024, 24, 16, 4096), (768, 12, 12, 3072), 768),
    "ViT-H": ((1280, 32, 16, 5120), (1024, 24, 16, 4096), 1024),
    "ViT-bigG": ((1664, 48, 16, 8192), (1280, 32, 20, 5120), 1280),
    "RN50": ((64, 16, 32, 0), (512, 12, 8, 2048), 1024),
    "RN101": ((64, 33, 32, 0), (512, 12, 8, 2048), 512),
    "B": ((768, 12, 12, 3072), (768, 12, 12, 3072), 768),
    "L": ((1024, 24, 16, 4096), (1024, 24, 16, 4096), 1024),
    "so400m": ((1152, 27, 16, 4304), (1152, 27, 16, 4304), 1152),
}
STAGES = {"RN50": (3, 4, 6, 3), "RN101": (3, 4, 23, 3)}


def counted(facts):
    """Parameters of the published shape: with one layer in each tower, and what more add."""
    family, _, patch = facts["model"].partition("/")
    kind = family.split()[-1]
    image, text, embed = TOWERS[kind]
    sigmoid = family.startswith("SigLIP")
    more = dict(vision=siglip.VISION, words=siglip.WORDS, sigmoid=True) if sigmoid else {}
    more |= {"vision": ImageShape(STAGES[kind])} if kind in STAGES else {}
    vocabulary = 49408 if not sigmoid else 256000 if "SigLIP 2" in family else 32000

    def of(*layers):
        towers = [TowerConfig(t[0], n, *t[2:]) for t, n in zip((image, text), layers, strict=True)]
        config = ClipConfig(
            *towers, embed, facts["resolution"], int(patch or 32), vocabulary, 64 if sigmoid else 77, None, 1, **more
        )
        with torch.device("meta"):
            return sum(p.numel() for p in CLIP(config).parameters())

    one = of(1, 1)
    return one + (image[1] - 1) * (of(2, 1) - one) + (text[1] - 1) * (of(1, 2) - one)


# --- the list -------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_shapes():
    known = {}
    for name, facts in BACKBONES.items():
        if name != "mini":
            key = (facts["model"], facts["resolution"])
            known[key] = known.get(key) or counted(facts)
            assert facts["parameters"] == known[key], name
    mini = read_pretrained("mini").clip
    assert BACKBONES["mini"]["parameters"] == sum(p.numel() for p in mini.parameters())
    assert BACKBONES["mini"]["resolution"] == mini.config.image_size
    assert len(known) == 18


def test_every_entry_says_the_same_things():
    facts = listing("backbones")
    assert {tuple(fact) for fact in facts} == {
        ("name", "model", "parameters", "resolution", "licence", "source", "where", "robust", "note")
    }
    assert {fact["where"] for fact in facts} == {"embedded", "hub", "file"}
    assert [fact["name"] for fact in facts if fact["where"] == "embedded"] == list(EMBEDDED)
    robust = {fact["name"]: fact["robust"] for fact in facts if fact["robust"]}
    assert len(robust) == 12
    for name, each in robust.items():  # a name says the method and n of n/255
        said = re.search(r"(fare|tecoa)(\d)", name.lower())
        assert (said[1], "linf", f"{said[2]}/255") == (
            each["method"].lower()[: len(said[1])],
            each["norm"],
            each["eps"],
        )
        assert ("LEAF" in each["method"]) == ("-k1-" in name)
    assert {name for name in BACKBONES if re.search("fare|tecoa", name.lower())} == set(robust)
    assert all(set(each) == {"method", "norm", "eps", "paper"} for each in robust.values())
    unknown = [fact for fact in facts if fact["licence"] is None]
    assert unknown and all(fact["note"] for fact in unknown)  # why it is not known


def test_the_list_fits_80_columns_and_marks_what_is_not_known(capsys):
    assert main(["list", "backbones"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) < 80
    assert shown[0].split() == COLUMNS
    rows = {line.split()[0]: line.split()[1:] for line in shown}
    assert rows["openai/clip-vit-base-patch32"] == ["151M", "224", "?"]
    assert rows["hf-hub:chs20/fare2-clip"] == ["428M", "224", "linf", "2/255", "MIT"]
    longest = max(BACKBONES, key=len)
    assert rows[longest] == ["986M", "224", "linf", "2/255", "?"]  # a name that its column does not hold
    assert "On trust: none of the others could be downloaded by us." in " ".join(shown)
    blank = {"name": "x", "parameters": None, "resolution": None, "robust": None, "licence": None}
    assert backbone_row(blank) == ["x", "?", "?", "", "?"]


# --- a backbone that can be used ------------------------------------------------------------------------


def siglip_folder(folder):
    write_siglip(folder)
    return folder


def open_clip_folder(folder):
    write_open_clip(folder, pickled=True)
    return folder


def with_tower(folder):
    torch.save({"state_dict": open_clip_tensors(write_clip(folder / "base"))}, folder / "tower.pt")
    return f"{folder / 'base'}+{folder / 'tower.pt'}@32"


WHOLE = {
    "OpenAI's file": (resnet, "ResNet, [1, 1, 1, 1] blocks, width 8", "not vpt, ivlp, maple, advvp"),
    "Hugging Face SigLIP": (siglip_folder, "(sigmoid)", "methods     all can be used"),
    "open_clip": (open_clip_folder, "fit         every tensor fits", "open_clip_pytorch_model.bin ("),
    "Hugging Face CLIP": (with_tower, "32 px, stored for 16", "every tensor of the image tower fits"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_said_is_what_is_loaded(kind, tmp_path, capsys):
    write, *said = WHOLE[kind]
    name = str(write(tmp_path))
    assert main(["backbone", "inspect", name]) == 0
    text = capsys.readouterr().out
    assert all(each in text for each in (f"format      {kind}\n", *said, "usable      yes\n"))
    assert main(["backbone", "inspect", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = advtune.load(name, "cpu", "fp32")
    config = model.clip.config
    assert facts["sha256"] == model.origin.sha256
    assert facts["parameters"] == sum(p.numel() for p in model.clip.parameters())
    assert abs(facts["logit_scale"] - float(model.logit_scale)) < 1e-3
    assert (facts["embedding"], facts["text"]["context"]) == (config.embed, config.context)
    assert (facts["image"]["width"], facts["image"]["layers"]) == (config.image.width, config.image.layers)
    assert facts["tokenizer"]["end"] == config.end_token
    assert sum(facts["stored"]["dtypes"].values()) == facts["stored"]["tensors"]
    assert (facts["usable"], facts["error"]) == (True, None)


def test_looking_changes_no_random_number(clip_folder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    inspect(str(clip_folder))
    assert torch.equal(torch.rand(2), expected)


def test_a_run_says_what_was_learned_and_on_what(clip_folder, image_folder, tmp_path, capsys):
    run, data = str(tmp_path / "run"), f"folder:{image_folder}"
    tune = ["--shots", "1", "--epochs", "1", "--out", run]
    assert main(["train", "coop", "--backbone", str(clip_folder), "--data", data, *tune]) == 0
    capsys.readouterr()
    facts = inspect(run)
    assert (facts["usable"], facts["method"], list(facts["learned"])) == (True, "coop", ["prompts.text"])
    assert facts["base"]["fit"] == {"missing": [], "unknown": [], "shapes": [], "numbers": []}
    assert "capt" in facts["refused"] and "tecoa" not in facts["refused"]  # a tower under prompts may still learn
    assert facts["sha256"] == advtune.load(run, "cpu").origin.sha256
    assert "  format      Hugging Face CLIP" in lines(facts)
    (tmp_path / "run" / "delta.safetensors").write_bytes(b"")
    assert main(["backbone", "inspect", run]) == 2
    printed = capsys.readouterr()
    assert "method      coop\n" in printed.out and "usable      no\n" in printed.out
    assert printed.err.count("\n") == 1


# --- one that cannot ------------------------------------------------------------------------------------


def edited(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def gaps(folder):
    def edit(tensors):
        for name in [n for n in tensors if ".layers.2." in n and n.startswith("text_model")]:
            del tensors[name]
        tensors["extra.\x1b[31m"] = torch.zeros(1)
        tensors["logit_scale"] = torch.tensor(float("nan"))
        tensors["visual_projection.weight"] = torch.zeros(5, 32)

    edited(folder, edit)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def half_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def no_configuration(folder):
    (folder / "config.json").unlink()


def another_kind(folder):
    (folder / "config.json").write_text('{"model_type": "siglip2"}')


SPOILT = {
    gaps: ["misfit      missing, 16: text_model.encoder.layers.2.layer_norm1.bias, ", ", and 6 more\n",
           "misfit      unknown, 1: extra.\\x1b[31m\n", "of another shape, 1: visual_projection.weight (5, 32), asked for (24, 32)\n",  # noqa: E501
           "misfit      no finite numbers, 1: logit_scale\n", "image       ViT, 3 layers", "parameters  "],
    no_weights: ["image       ViT, 3 layers, width 32", "tokenizer   BPE, "],
    half_weights: ["image       ViT, 3 layers, width 32", "files       config.json (", "tokenizer   BPE, "],
    no_tokenizer: ["text        3 layers, width 24", "fit         every tensor fits\n", "tensors     "],
    no_configuration: ["tokenizer   BPE, ", "tensors     ", "format      none that is known\n"],
    another_kind: ["tokenizer   BPE, ", "files       config.json (25 B)"],
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
def test_all_is_said_that_can_be_and_then_why_it_cannot_be_used(spoil, clip_folder, tmp_path, capsys):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    spoil(folder)
    with pytest.raises(advtune.UserError) as error:
        read_pretrained(str(folder))
    assert main(["backbone", "inspect", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"advtune: error: {error.value}\n"  # as it would be refused
    assert [each for each in [*SPOILT[spoil], "usable      no\n"] if each not in printed.out] == []
    assert "\x1b" not in printed.out
    assert main(["backbone", "inspect", str(folder), "--json"]) == 2
    facts = json.loads(capsys.readouterr().out)
    assert (facts["usable"], facts["error"], "refused" in facts) == (False, str(error.value), False)


LACKING = {  # without a tokenizer: what is said of the rest
    resnet: ({"format": "OpenAI's file", "embedding": 24}, "fit"),
    siglip_folder: (
        {"format": "Hugging Face SigLIP", "stored": {"tensors": 120, "dtypes": {"float32": 120}}},
        "stored",
    ),
    open_clip_folder: ({"format": "open_clip", "stored": {"tensors": 86, "dtypes": {"float32": 86}}}, "stored"),
}


@pytest.mark.parametrize("write", LACKING, ids=lambda f: f.__name__)
def test_without_a_tokenizer_the_weights_are_still_looked_at(write, tmp_path, monkeypatch):
    def offline(repo, place):
        raise advtune.UserError(f"{place}: no tokenizer there")

    monkeypatch.setattr("advtune.pretrained.download_tokenizer", offline)
    name = str(write(tmp_path))
    for file in tmp_path.rglob("tokenizer.json"):
        file.unlink()
    facts, (said, last) = inspect(name), LACKING[write]
    assert {key: facts[key] for key in said} == said and facts[last]
    assert (facts["usable"], facts["tokenizer"]) == (False, None)
    assert "no tokenizer" in facts["error"]


def test_a_tower_that_is_not_of_its_base(clip_folder, tmp_path, capsys):
    wide = write_clip(tmp_path / "wide", image={"hidden_size": 40})
    torch.save(open_clip_tensors(wide), tmp_path / "tower.pt")
    capsys.readouterr()
    for file, said in (("tower.pt", "of another shape of the image tower, "), ("none.pt", "every tensor fits")):
        assert main(["backbone", "inspect", f"{clip_folder}+{tmp_path / file}"]) == 2
        printed = capsys.readouterr()
        assert said in printed.out and "usable      no\n" in printed.out
        assert file in printed.err and printed.err.count("\n") == 1


def test_a_name_that_is_nothing(tmp_path, capsys):
    assert main(["backbone", "inspect", str(tmp_path / "none")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "no such folder" in printed.err
