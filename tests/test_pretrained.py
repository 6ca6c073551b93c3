"""Reading and writing weights: formats, and what must be refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import advtune
from advtune.errors import UserError
from advtune.formats.writing import write_pretrained
from advtune.pretrained import fingerprint, read_pretrained
from conftest import write_clip

WORDS = "text_model.embeddings.token_embedding.weight"


@pytest.fixture
def folder(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "copy")


def features(folder):
    read = read_pretrained(str(folder))
    return read.clip.encode_image(torch.full((1, 3, 16, 16), 0.3))


def test_sharded_pickled_and_half_precision_are_the_same_model(tmp_path):
    model = write_clip(tmp_path / "whole")
    expected = features(tmp_path / "whole")
    sharded, pickled, half = (shutil.copytree(tmp_path / "whole", tmp_path / n) for n in ("s", "p", "h"))
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert torch.equal(features(sharded), expected)
    tensors = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(
        {**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]},
        pickled / "pytorch_model.bin",
    )
    assert torch.equal(features(pickled), expected)
    save_file({k: v.half() for k, v in tensors.items()}, half / "model.safetensors")
    torch.testing.assert_close(features(half), expected, atol=2e-2, rtol=2e-2)
    assert features(half).dtype == torch.float32


def test_a_folder_we_write_is_read_by_transformers(folder, tmp_path):
    from transformers import CLIPModel

    read = read_pretrained(str(folder))
    write_pretrained(read.clip, tmp_path / "out")
    ours, theirs = (CLIPModel.from_pretrained(f).state_dict() for f in (tmp_path / "out", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    shutil.copy(folder / "tokenizer.json", tmp_path / "out")
    assert read_pretrained(str(tmp_path / "out")).clip.config == read.clip.config


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("logit_scale"), "missing, first logit_scale"),
        (lambda t: t.update(extra=torch.zeros(1)), "not of a CLIP model, first extra"),
        (lambda t: t.update({"visual_projection.weight": torch.zeros(24, 31)}), "has shape"),
    ],
)
def test_every_tensor_is_used_and_every_parameter_filled(folder, edit, message):
    change(folder, edit)
    with pytest.raises(UserError, match=message):
        read_pretrained(str(folder))


def test_truncated_and_missing_files(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated or damaged"):
        read_pretrained(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        read_pretrained(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 not a pickle")
    with pytest.raises(UserError, match="truncated or damaged"):
        read_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    for heads in ("many", 5):
        config["vision_config"]["num_attention_heads"] = heads
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="makes no sense"):
            read_pretrained(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_pretrained(str(folder))


def test_a_missing_shard_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00001-of-00001"):
        read_pretrained(str(folder))


def test_a_strangers_pickle_is_not_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError):
        read_pretrained(str(folder))
    assert not (tmp_path / "ran").exists()


def test_other_model_types_and_unknown_names(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "blip-2"}))
    with pytest.raises(UserError, match="blip-2"):
        read_pretrained(str(folder))
    for name in ("nonsense", "./not-there", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            read_pretrained(name)


def test_legacy_end_token_is_the_last_id(folder):
    config = json.loads((folder / "config.json").read_text())
    size = config["text_config"]["vocab_size"]
    config["text_config"] |= {"eos_token_id": 2, "bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    read = read_pretrained(str(folder))
    assert (read.tokenizer.start, read.tokenizer.end) == (size - 2, size - 1)


def test_texts_begin_as_the_tokenizer_says_and_end_where_they_are_read(folder):
    """transformers never asks config.json for the start; of a vocabulary with words behind the end token the last id
    is none."""
    config = json.loads((folder / "config.json").read_text())
    size = config["text_config"]["vocab_size"]
    config["text_config"]["bos_token_id"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    read = read_pretrained(str(folder))
    assert (read.tokenizer.start, read.tokenizer.end) == (size - 2, size - 1)
    change(folder, lambda t: t.update({WORDS: torch.cat([t[WORDS], torch.zeros(3, 24)])}))
    config["text_config"] |= {"eos_token_id": 2, "vocab_size": size + 3}
    (folder / "config.json").write_text(json.dumps(config))
    read = read_pretrained(str(folder))
    assert (read.tokenizer.start, read.tokenizer.end, read.clip.text.end_token) == (size - 2, size - 1, size - 1)
    config["text_config"]["eos_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"end with id 7 by config.json, with {size - 1} by the tokenizer; is it this"):
        read_pretrained(str(folder))


@pytest.mark.parametrize("side", ["", "-1", "abc", "336px", "24x24", "16.5", "123456", "8@16"])
def test_what_is_no_side_is_said_to_be_none(side, folder, tmp_path):
    with pytest.raises(
        UserError, match=f"@{side}': nothing of that name is there, .* one side is meant: a whole number"
    ):
        read_pretrained(f"{folder}@{side}")
    with pytest.raises(UserError, match="no such folder"):
        read_pretrained(f"{tmp_path}/a@b/clip")


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B-32"])
def test_an_architecture_is_no_model_but_says_which_is_meant(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"did you mean openai/clip-vit-base-patch32\?"):
        read_pretrained(name)


def test_a_tower_without_a_base_and_a_base_without_a_tower(folder, tmp_path):
    for name in (f"{folder}+", f"+{folder / 'model.safetensors'}"):
        with pytest.raises(
            UserError, match=r"BASE\+FILE lays the image tower in FILE over BASE; one of them is missing"
        ):
            read_pretrained(name)
    with pytest.raises(UserError, match=r"a folder; name the file of weights in it, as .*model.safetensors"):
        read_pretrained(f"{folder}+{folder}")
    plus = tmp_path / "a+b"
    shutil.copytree(folder, plus / "c+d")
    name = f"{plus / 'c+d'}+{plus / 'c+d' / 'model.safetensors'}"
    assert read_pretrained(name).name == name
    assert read_pretrained(f"{name}@8").clip.config.image_size == 8


def test_a_folder_without_a_model_says_where_one_may_be(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    with pytest.raises(UserError, match=r"is an image tower alone; lay its weights over .*: BASE\+FILE"):
        read_pretrained(str(folder))
    (folder / "config.json").unlink()
    (folder / "ViT-B-32.pt").touch()
    with pytest.raises(UserError, match=r"to read a file in it, name that: .*ViT-B-32.pt"):
        read_pretrained(str(folder))


def test_a_hub_id_is_downloaded_and_its_failure_is_one_line(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert read_pretrained("someone/clip").name == "someone/clip"
    assert asked[0][0] == "someone/clip"
    assert len(asked) == 1  # the safetensors were there: no pickles are asked for

    def offline(repo, allow_patterns):
        raise OSError("no network. For more see the documentation\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no network\); give a local folder") as error:
        read_pretrained("someone/clip")
    assert "\n" not in str(error.value)
    for name in ("openai/clip-vit-base-patch32", "hf-hub:chs20/fare2-clip"):  # that are known already
        with pytest.raises(UserError, match=r"\(no network\); give a local folder"):
            read_pretrained(name)
    with pytest.raises(UserError, match="did you mean hf-hub:chs20/fare2-clip"):
        read_pretrained("chs20/fare2")


def test_the_fingerprint_is_of_content(folder, tmp_path):
    before = read_pretrained(str(folder)).sha256
    other = shutil.copytree(folder, tmp_path / "renamed")
    assert read_pretrained(str(other)).sha256 == before
    preprocessor = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**preprocessor, "image_mean": [0.5, 0.5, 0.5]}))
    assert read_pretrained(str(other)).sha256 != before
    other = shutil.copytree(folder, tmp_path / "again")
    change(other, lambda t: t["logit_scale"].add_(1))
    assert read_pretrained(str(other)).sha256 != before
    assert fingerprint([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_damaged_tokenizer_is_one_line(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="truncated or damaged"):
        read_pretrained(str(folder))


def test_a_clip_of_openai_s_ids_without_a_tokenizer_takes_openai_s(tmp_path, monkeypatch):
    """As the LEAF releases come: config.json and weights alone, to be read with the processor of their base."""
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    write_clip(whole, text=dict(vocab_size=49408))
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(whole / name, bare / name)
    asked = []
    monkeypatch.setattr("advtune.pretrained.download_tokenizer", lambda repo, place: asked.append(repo) or whole)
    first, second = (advtune.load(str(place), "cpu", "fp32") for place in (whole, bare))
    assert asked == ["openai/clip-vit-base-patch32"]
    tokens = [model.tokens(("red", "green"), "a photo of a {}.") for model in (first, second)]
    assert torch.equal(*tokens)
    assert torch.equal(first.text_features(tokens[0]), second.text_features(tokens[1]))
    digest = second.origin.sha256
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    with (other / "tokenizer.json").open("a") as file:  # another tokenizer is another backbone
        file.write("\n")
    monkeypatch.setattr("advtune.pretrained.download_tokenizer", lambda repo, place: other)
    assert advtune.load(str(bare), "cpu", "fp32").origin.sha256 != digest
    with pytest.raises(UserError, match="no tokenizer"):  # of other ids: nobody knows whose
        write_clip(tmp_path / "tiny")
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            (tmp_path / "tiny" / name).unlink(missing_ok=True)
        advtune.load(str(tmp_path / "tiny"), "cpu", "fp32")
