"""open_clip's format against transformers on the same weights, converted by the test, and against transformers' layers
put together as open_clip puts them."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from advtune import load
from advtune.errors import UserError
from advtune.formats import timm
from advtune.preprocess import Preprocess
from advtune.pretrained import read_pretrained
from backbones import open_clip_siglip_tensors, unigram, write_open_clip, write_siglip
from conftest import write_clip

TEXTS = ["a photo of a red dog", "blue", "Of Photo, 42!"]
KINDS = {
    "laion": {},
    "dfn": {"activation": "quick_gelu"},
    "custom text": {"custom": True},
    "pickled, in module.": {"pickled": True},
    "a context of its own": {"text": {"max_position_embeddings": 20}},
    "big heads": {"image": {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 196}},
}


def images(side=16):
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()


def normalised(x):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    return (x - mean) / std


def check(vlm, tokens, x, theirs):
    """Logits within 1e-4, and the gradient by the pixels."""
    ours = vlm.logits(x, vlm.text_features(tokens))
    assert float(theirs.detach().std()) > 0.01
    assert float((ours - theirs).detach().abs().max()) < 1e-4
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    mine, other = (torch.autograd.grad((v * weight).sum(), x)[0] for v in (ours, theirs))
    assert float((mine - other).abs().max()) < 1e-4 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("name", KINDS)
def test_equals_transformers(name, tmp_path):
    model = write_open_clip(tmp_path, **KINDS[name])
    vlm, x = load(str(tmp_path), "cpu", "fp32"), images()
    tokens = vlm.tokenizer(TEXTS)
    check(vlm, tokens, x, model(input_ids=tokens, pixel_values=normalised(x)).logits_per_image)


def test_the_quick_gelu_flag_decides(tmp_path):
    write_open_clip(tmp_path / "a", activation="quick_gelu")
    write_open_clip(tmp_path / "b", activation="gelu")
    a, b = (read_pretrained(str(tmp_path / name)).clip for name in "ab")
    assert (a.config.image.activation, a.config.text.activation) == ("quick_gelu", "quick_gelu")
    assert (b.config.image.activation, b.config.text.activation) == ("gelu", "gelu")


def test_the_approximate_gelu_of_a_text_tower(tmp_path):
    def edit(config, tensors):
        config["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}

    model = write_open_clip(tmp_path, text={"hidden_act": "gelu_pytorch_tanh"}, edit=edit)
    read = read_pretrained(str(tmp_path))
    assert (read.clip.config.image.activation, read.clip.config.text.activation) == ("gelu", "gelu_pytorch_tanh")
    tokens = read.tokenizer(TEXTS)
    theirs = model.get_text_features(input_ids=tokens).pooler_output
    torch.testing.assert_close(read.clip.encode_text(tokens), theirs, rtol=1e-5, atol=1e-6)


def test_a_text_that_sees_all_is_not_cut_at_the_end_token_where_it_is_read(tmp_path):
    """no_causal_mask with the end token read: what fills the row, zeros here, is seen to the last place."""

    def edit(config, tensors):
        config["text_cfg"]["no_causal_mask"] = True

    model = write_open_clip(tmp_path, edit=edit)
    read = read_pretrained(str(tmp_path))
    tokens = read.tokenizer(TEXTS)
    assert tokens.shape == (3, 77)
    assert tokens[:, -20:].eq(0).all()
    ends = (tokens == read.tokenizer.end).int().argmax(1)
    h = model.text_model.embeddings(tokens)
    for layer in model.text_model.encoder.layers:
        h = layer(h, None)
    text = model.text_projection(model.text_model.final_layer_norm(h[torch.arange(3), ends]))
    torch.testing.assert_close(read.clip.encode_text(tokens), text, rtol=1e-4, atol=1e-5)


def image_by_layers(model, pixels, pre_norm, pool, late):
    """transformers' layers with or without the first norm; the mean of the patches before or after the last."""
    tower = model.vision_model
    h = tower.embeddings(pixels)
    h = tower.pre_layrnorm(h) if pre_norm else h
    for layer in tower.encoder.layers:
        h = layer(h, None)
    if pool == "tok":
        h = tower.post_layernorm(h[:, 0])
    else:
        h = tower.post_layernorm(h[:, 1:].mean(1)) if late else tower.post_layernorm(h[:, 1:]).mean(1)
    return F.normalize(model.visual_projection(h), dim=1)


@pytest.mark.parametrize(
    ("pre_norm", "pool", "late"), [(False, "tok", False), (True, "avg", False), (False, "avg", True)]
)
def test_image_towers_read_otherwise_equal_transformers_layers(pre_norm, pool, late, tmp_path):
    def edit(config, tensors):
        config["vision_cfg"] |= {"no_ln_pre": not pre_norm, "pool_type": pool, "final_ln_after_pool": late}
        for name in () if pre_norm else ("visual.ln_pre.weight", "visual.ln_pre.bias"):
            del tensors[name]

    model = write_open_clip(tmp_path, edit=edit)
    vlm, x = load(str(tmp_path), "cpu", "fp32"), images()
    tokens = vlm.tokenizer(TEXTS)
    text = model(input_ids=tokens, pixel_values=normalised(x)).text_embeds
    image = image_by_layers(model, normalised(x), pre_norm, pool, late)
    check(vlm, tokens, x, model.logit_scale.exp() * image @ text.T)
    dense = vlm.dense_embeddings(x)
    assert dense.shape == (3, 17, 24)
    torch.testing.assert_close(F.normalize(dense[:, 0], dim=1), vlm.image_features(x))
    if pool == "avg" and not late:  # the last norm is before the mean, so the parts of the whole are to be seen
        torch.testing.assert_close(dense[:, 1:].mean(1), vlm.image_embeddings(x), rtol=1e-4, atol=1e-5)


def test_a_text_tower_that_sees_all_and_reads_the_last_place(tmp_path):
    """CLIPA: a BERT vocabulary whose separator becomes padding, no causal mask, a context of 32."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    def edit(config, tensors):
        config["text_cfg"] |= {
            "hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True},
            "no_causal_mask": True, "pool_type": "last",
        }  # fmt: skip

    model = write_open_clip(tmp_path, text={"max_position_embeddings": 32}, edit=edit)
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "photo", "of", "red", "dog", "blue", ","]
    bert = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    bert.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    vlm, x = load(str(tmp_path), "cpu", "fp32"), images()
    tokens = vlm.tokenizer(["a photo of a red dog", "Blue"])
    assert tokens[:, :8].tolist() == [[1, 4, 5, 6, 4, 7, 8, 0], [1, 9, 0, 0, 0, 0, 0, 0]]
    assert tokens.shape == (2, 32)
    h = model.text_model.embeddings(tokens)
    for layer in model.text_model.encoder.layers:
        h = layer(h, None)
    text = F.normalize(model.text_projection(model.text_model.final_layer_norm(h)[:, -1]), dim=1)
    image = model(input_ids=torch.tensor([[0, 1]]), pixel_values=normalised(x)).image_embeds
    check(vlm, tokens, x, model.logit_scale.exp() * image @ text.T)


def test_zeros_fill_a_row_of_clip_s_own_tokenizer_whatever_pad_id_says(tmp_path):
    def edit(config, tensors):
        config["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last", "pad_id": 1}

    write_open_clip(tmp_path, edit=edit)
    assert read_pretrained(str(tmp_path)).tokenizer(TEXTS)[:, -20:].eq(0).all()


def test_what_happens_to_a_text_before_clip_s_own_tokenizer(tmp_path):
    def edit(config, tensors):
        config["text_cfg"]["tokenizer_kwargs"] = {"clean": clean}

    for clean, same in (("lower", False), ("canonicalize", True)):
        write_open_clip(tmp_path / clean, edit=edit)
        dotted, plain = read_pretrained(str(tmp_path / clean)).tokenizer(["a Red_dog.", "a red dog"])
        assert torch.equal(dotted, plain) == same
    clean = "whitespace"  # which keeps capitals, that the tokenizer here lowers
    write_open_clip(tmp_path / clean, edit=edit)
    with pytest.raises(UserError, match="clean is 'whitespace', which is not one of canonicalize, lower"):
        read_pretrained(str(tmp_path / clean))


@pytest.mark.parametrize("facts", [{}, {"preprocess_cfg": None}, {"preprocess_cfg": {"mean": None}}], ids=str)
def test_pixels_that_nothing_is_said_of_are_openai_s(facts, tmp_path):
    write_open_clip(tmp_path)
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": json.loads(file.read_text())["model_cfg"]} | facts))
    assert read_pretrained(str(tmp_path)).clip.config.preprocess == Preprocess(16, 16)


def test_a_checkpoint_of_its_training_is_read_by_the_configuration_beside_it(tmp_path):
    """Not as OpenAI's, whose activation is another; without its configuration a file called as on the hub is none."""
    from safetensors.torch import load_file

    write_open_clip(tmp_path / "hub")
    shutil.copytree(tmp_path / "hub", tmp_path / "own")
    weights = load_file(tmp_path / "own" / "open_clip_model.safetensors")
    (tmp_path / "own" / "open_clip_model.safetensors").unlink()
    named = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": named, "optimizer": {}}, tmp_path / "own" / "epoch_3.pt")
    read = read_pretrained(str(tmp_path / "own" / "epoch_3.pt"))
    hub = read_pretrained(str(tmp_path / "hub" / "open_clip_model.safetensors"))
    assert read.clip.config == hub.clip.config
    assert read.clip.config.image.activation == "gelu"
    assert all(torch.equal(value, hub.clip.state_dict()[name]) for name, value in read.clip.state_dict().items())
    assert read.sha256 != hub.sha256 == read_pretrained(str(tmp_path / "hub")).sha256
    (tmp_path / "hub" / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match=r"needs its open_clip_config.json beside it"):
        read_pretrained(str(tmp_path / "hub" / "open_clip_model.safetensors"))
    with pytest.raises(UserError, match=r"own: no weights \(.*; or name the file itself"):
        read_pretrained(str(tmp_path / "own"))


def test_timm_s_files_beside_open_clip_s(tmp_path):
    """timm's repositories hold a config.json of timm's own, and weights of the image tower alone."""
    write_open_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_clip_224"}))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "open_clip_model.safetensors").read_bytes())
    assert read_pretrained(str(tmp_path)).clip.config.image.activation == "gelu"
    (tmp_path / "open_clip_model.safetensors").unlink()  # as a plain hub id downloads it
    with pytest.raises(
        UserError, match=r"model_type None.*; its open_clip_config.json is read under hf-hub:OWNER/NAME"
    ):
        read_pretrained(str(tmp_path))


def test_the_highest_id_is_read_where_another_tokenizer_ends_with_a_lower_one(tmp_path):
    """pool_type argmax with a tokenizer whose end token is not its last word; eos reads the end token."""

    def edit(config, tensors):
        config["text_cfg"] |= {"hf_tokenizer_name": "some/t5", "pool_type": "argmax"}

    def at_end(config, tensors):
        config["text_cfg"] |= {"hf_tokenizer_name": "some/t5", "pool_type": "eos", "eos_id": 1}

    for name, change in (("argmax", edit), ("eos", at_end)):
        model = write_open_clip(tmp_path / name, edit=change)
        unigram(tmp_path / name)
        read = read_pretrained(str(tmp_path / name))
        tokens = read.tokenizer(["a red", "a photo of blue x"])
        h = model.text_model.embeddings(tokens)
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
        for layer in model.text_model.encoder.layers:
            h = layer(h, mask[None, None])
        places = tokens.argmax(1) if name == "argmax" else (tokens == 1).int().argmax(1)
        assert (places.tolist() == (tokens == 1).int().argmax(1).tolist()) == (name == "eos")
        text = model.text_projection(model.text_model.final_layer_norm(h[torch.arange(2), places]))
        torch.testing.assert_close(read.clip.encode_text(tokens), text, rtol=1e-4, atol=1e-5)
        assert read.tokenizer.start is None  # so prompts stand at the beginning, with what follows as it is
        prompt = h.new_zeros(1, 2, 24)
        h = model.text_model.embeddings.token_embedding(tokens)
        h[:, :2] = 0
        h = h + model.text_model.embeddings.position_embedding.weight[: tokens.shape[1]]
        for layer in model.text_model.encoder.layers:
            h = layer(h, mask[None, None])
        text = model.text_projection(model.text_model.final_layer_norm(h[torch.arange(2), places]))
        for given in (prompt, prompt[:, None].expand(-1, 2, -1, -1)):
            torch.testing.assert_close(read.clip.encode_text(tokens, given), text, rtol=1e-4, atol=1e-5)


def write_timm(folder, monkeypatch):
    """A SigLIP in open_clip's format, of a tower of timm's that is as small as the test wants it."""
    from safetensors.torch import save_file

    gelu = {"hidden_act": "gelu"}
    model = write_siglip(folder, image=gelu, text=gelu | {"intermediate_size": 48})
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (folder / name).unlink()
    monkeypatch.setitem(timm.SIZES, "base", (32, 3, 4, 48))
    config = {
        "embed_dim": 32, "init_logit_bias": -10, "custom_text": True,
        "vision_cfg": {"image_size": 16, "timm_model_name": "vit_base_patch4_siglip_16", "timm_pool": "map",
                       "timm_model_pretrained": False, "timm_proj": "none"},
        "text_cfg": {"context_length": 64, "vocab_size": model.config.text_config.vocab_size, "width": 24, "heads": 3,
                     "layers": 3, "mlp_ratio": 2.0, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "pool_type": "last",
                     "tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "proj_bias": True,
                     "norm_kwargs": {"eps": 1e-6}},
    }  # fmt: skip
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bicubic"}
    facts = {"model_cfg": config, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    save_file(open_clip_siglip_tensors(model), folder / "open_clip_model.safetensors")
    return model


def test_siglip_of_timm_equals_transformers(tmp_path, monkeypatch):
    model = write_timm(tmp_path, monkeypatch)
    vlm, x = load(str(tmp_path), "cpu", "fp32"), images()
    tokens = vlm.tokenizer(["a photo_of red!", "blue dog"])
    assert torch.equal(tokens, vlm.tokenizer(["a photo of red", "Blue dog."]))  # open_clip: _ is a space
    check(vlm, tokens, x, model(input_ids=tokens, pixel_values=x * 2 - 1).logits_per_image)
    assert vlm.clip.config.preprocess.resize == (16, 16)


def test_it_is_written_for_transformers(tmp_path, monkeypatch):
    """Both of open_clip's towers, as CLIPModel and SiglipModel."""
    from transformers import AutoModel, AutoTokenizer

    from advtune.export import export

    write_open_clip(tmp_path / "clip")
    write_timm(tmp_path / "siglip", monkeypatch)
    for name in ("clip", "siglip"):
        export(str(tmp_path / name), "huggingface", tmp_path / "out" / name)
        theirs = AutoModel.from_pretrained(tmp_path / "out" / name)
        vlm, x = load(str(tmp_path / name), "cpu", "fp32"), images()
        tokens = vlm.tokenizer(["a red dog", "blue"])
        pixels = vlm.clip.config.preprocess(x)
        check(vlm, tokens, x, theirs(input_ids=tokens, pixel_values=pixels).logits_per_image)
        assert torch.equal(load(str(tmp_path / "out" / name), "cpu", "fp32").tokenizer(["a red dog", "blue"]), tokens)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "clip").pad_token


def changed(part, **fields):
    return lambda config, tensors: (config[part] if part else config).update(fields)


REFUSED = {
    "layer scale": (changed("vision_cfg", ls_init_value=1e-5), "ls_init_value is 1e-05"),
    "CoCa": (changed("", multimodal_cfg={}), "CoCa"),
    "its class token": (changed("text_cfg", embed_cls=True), "embed_cls is True"),
    "attention pooling": (changed("vision_cfg", attentional_pool=True), "attentional_pool"),
    "a BERT": (changed("text_cfg", hf_model_name="roberta-base"), "hf_model_name is 'roberta-base'"),
    "EVA": (changed("vision_cfg", timm_model_name="eva02_base_patch16_clip_224"), "eva02_base_patch16_clip_224"),
    "NaFlex": (changed("vision_cfg", timm_model_name="naflexvit_base_patch16_siglip"), "naflexvit"),
    "an older mean": (changed("vision_cfg", global_average_pool=True), "global_average_pool is True, and such towers"),
    "what is new to us": (changed("text_cfg", reg_tokens=4), "reg_tokens is 4, and such towers are not read"),
    "first": (changed("text_cfg", pool_type="first"), "pool_type is 'first'"),
    "heads": (changed("vision_cfg", head_width=5), "heads do not divide"),
    "a missing tensor": (lambda config, tensors: tensors.pop("ln_final.weight"), "missing, first ln_final.weight"),
    "a shape": (
        lambda config, tensors: tensors.update(text_projection=torch.zeros(23, 24)),
        "text_projection has",
    ),
    "one too many": (lambda config, tensors: tensors.update({"visual.x": torch.zeros(1)}), "first visual.x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(name, tmp_path):
    edit, message = REFUSED[name]
    write_open_clip(tmp_path, edit=edit)
    with pytest.raises(UserError, match=message) as error:
        read_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_shape_that_is_asked_for_is_the_file_s_own(tmp_path):
    """A matrix that lies the other way round in the file is asked for as it lies there."""
    wrong = {"text_projection": torch.zeros(23, 20)}
    write_open_clip(tmp_path, edit=lambda config, tensors: tensors.update(wrong))
    with pytest.raises(UserError, match=r"text_projection has shape \(23, 20\), the configuration asks for \(24, 24\)"):
        read_pretrained(str(tmp_path))


def test_hub_ids_of_both_kinds(tmp_path, monkeypatch):
    """hf-hub:ID reads open_clip's files where a repository has both; a plain id those of Hugging Face; one that has
    only open_clip's is read under either name; a missing tokenizer is fetched under the name in the configuration."""
    import huggingface_hub

    both, alone, words = tmp_path / "both", tmp_path / "alone", tmp_path / "words"
    write_clip(both, seed=1)
    shutil.copytree(both, tmp_path / "keep")
    write_open_clip(alone)
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        shutil.copy(alone / name, both / name)
    words.mkdir()
    shutil.move(alone / "tokenizer.json", words / "tokenizer.json")
    asked, patterns = [], []

    def snapshot(repo, allow_patterns):
        asked.append(repo)
        patterns.append(allow_patterns[-1])
        return str({"some/both": both, "some/alone": alone, "openai/clip-vit-base-patch32": words}[repo])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    theirs, ours = (read_pretrained(name).clip.config for name in ("some/both", "hf-hub:some/both"))
    assert patterns == ["model*.safetensors", "open_clip_model.safetensors"]
    assert theirs.image.activation == "quick_gelu"
    assert ours.image.activation == "gelu"
    assert read_pretrained("some/alone").clip.config.image.activation == "gelu"
    assert asked[-1] == "openai/clip-vit-base-patch32"
    assert read_pretrained("hf-hub:some/alone").sha256 == read_pretrained("some/alone").sha256

    def offline(repo, allow_patterns):
        if repo.startswith("openai"):
            raise OSError("no network")
        return snapshot(repo, allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"no tokenizer there.*\(no network\); put tokenizer.json"):
        read_pretrained("some/alone")
