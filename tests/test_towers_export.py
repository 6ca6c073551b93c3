"""What every kind of tower can be exported to; its activations forgotten and computed again."""

import json

import onnxruntime
import pytest
import torch

from advtune import Classifier
from advtune.errors import UserError
from advtune.export import export, graph
from advtune.vlm import VLM
from test_towers import KINDS, TASK, backbone

NAMES = list(KINDS)


def session(model, text):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = graph.build(model, text, graph.input_size(model)).SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", NAMES[1:3])
@pytest.mark.parametrize("prompts", [False, True])
def test_onnxruntime_gives_the_same_logits(kind, prompts):
    """Attention head, mean of the patches, a patch bias, no class token, a logit bias; deep prompts beside them."""
    model = backbone(kind)
    model = model.with_prompts(TASK.template, 2, 3, 2, pad=20) if prompts else model
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.tokens(TASK.classes, TASK.template)
        text = (model.logit_scale * model.text_features(tokens)).T
        found = session(model, text).run(None, {"pixels": x.numpy()})[0]
        ours = model.classifier(tokens)(x)
    assert float(ours.std()) > 0.01
    torch.testing.assert_close(torch.from_numpy(found), ours, rtol=0, atol=1e-4)


def test_a_resnet_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="its image tower is a ResNet, which is not written to ONNX") as error:
        session(backbone(NAMES[3]), torch.zeros(24, 3))
    assert "\n" not in str(error.value)
    from advtune.formats.writing import write_pretrained

    for kind, message in ((NAMES[3], "is a ResNet, and transformers has no model"), (NAMES[2], "of other towers than")):
        with pytest.raises(UserError, match=message):
            write_pretrained(backbone(kind).clip, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_alone_say_where_they_enter_a_tower_without_start_token(tmp_path):
    """Text prompts of a SigLIP stand at places 0 to P - 1; its logits have a bias."""
    from advtune import load, load_task, tune
    from backbones import write_siglip
    from conftest import write_images

    write_siglip(tmp_path / "siglip")
    task = load_task(f"folder:{write_images(tmp_path / 'images')}")
    model = load(str(tmp_path / "siglip"), "cpu", "fp32")
    assert isinstance(model, VLM)
    tune("maple", model, task, shots=1, epochs=1, out=str(tmp_path / "run"))
    export(str(tmp_path / "run"), "prompts", tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["prompts"]
    assert "places 0 to P - 1 of" in block["tensors"]["prompts.text"]["enters"]
    assert block["logits"].endswith(".T + logit_bias; layers count from 0")
    assert len(block["tokens"][0]) == 64
    ours, theirs = (Classifier(str(tmp_path / name), precision="fp32") for name in ("run", "out"))
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ours.logits(x), theirs.logits(x))


@pytest.mark.parametrize("kind", NAMES)
def test_activations_computed_again_give_the_same_gradients(kind):
    """Of the pixels and of the weights of both towers; each block's, or a ResNet's stage's, forward runs twice."""
    model = backbone(kind)
    tokens = model.tokens(TASK.classes, TASK.template)
    parts = [model.clip.image, model.clip.text]
    leaves = [p for part in parts for p in part.parameters()]
    x, found, ran = torch.rand(2, 3, model.side, model.side).requires_grad_(), [], []
    block = parts[0].layer4 if kind == NAMES[3] else parts[0].blocks[0]
    hook = block.register_forward_pre_hook(lambda module, args: ran.append(1))
    for p in leaves:
        p.requires_grad_(True)
    for again in (False, True):
        out = model.clip.encode_image(x, again=again) @ model.clip.encode_text(tokens, again=again).T
        grads = torch.autograd.grad(out.square().mean(), [x, *leaves], allow_unused=True)
        found.append([out.detach(), *(g for g in grads if g is not None)])
    for p in leaves:
        p.requires_grad_(False)
    hook.remove()
    assert len(ran) == 3
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
