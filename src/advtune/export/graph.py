"""An ONNX classifier with fixed classes, written node by node from the image tower; see clip.py for the same in torch.

torch's own exporter needs half a minute and two more packages for these ten kinds of nodes. Every export is held
against the model it was made from, in onnxruntime, so that the two cannot drift apart unseen.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advtune import __version__
from advtune.clip import Block, ImageTower
from advtune.errors import UserError
from advtune.export.folder import write_json
from advtune.export.source import Source
from advtune.pooling import AttentionPool
from advtune.vlm import VLM

OPSET = 20  # the first with Gelu
TOLERANCE = 1e-3  # of a logit; fp32 gives about 1e-5
WHOLE = 2**31 - 2**20  # bytes that one protobuf file may hold, with room for the graph
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def check_installed() -> None:
    """Raises UserError unless the packages of the extra are there."""
    if not (find_spec("onnx") and find_spec("onnxruntime")):
        raise UserError("--to onnx needs two more packages: pip install 'advtune[export]'")


def write_onnx(source: Source, folder: Path) -> dict[str, Any]:
    """model.onnx (pixels [N, 3, H, W] in [0, 1] -> logits [N, C]) and classifier.json with the classes in order.

    Raises UserError without classes, and when onnxruntime's logits are not the model's.
    """
    import onnx

    if not source.classes:
        raise UserError(f"{source.name} was tuned on no classes; name them: --classes cat,dog or a JSON file")
    model, file = source.model, folder / "model.onnx"
    size = input_size(model)
    with torch.no_grad():
        tokens = model.tokens(source.classes, source.template)
        built = build(model, (model.logit_scale * model.text_features(tokens)).T, size)
    facts = {
        "classes": list(source.classes),
        "template": model.template or source.template,
        "input": {"name": "pixels", "shape": ["n", 3, *size], "type": "float32", "range": [0, 1]},
        "output": {"name": "logits", "shape": ["n", len(source.classes)]},
    }
    onnx.helper.set_model_props(built, {"classes": "\n".join(source.classes), "template": facts["template"]})
    large = sum(len(weight.raw_data) for weight in built.graph.initializer) > WHOLE
    onnx.save_model(built, file, save_as_external_data=large, location="model.onnx.data" if large else None)
    write_json(folder / "classifier.json", facts)
    return {"input": ["n", 3, *size], "classes": len(source.classes), "difference": difference(source, file, size)}


def input_size(model: VLM) -> tuple[int, int]:
    """Height and width of the images that the model does not resize."""
    resize = model.clip.config.preprocess.resize
    return resize if isinstance(resize, tuple) else (model.side, model.side)


def difference(source: Source, file: Path, size: tuple[int, int]) -> float:
    """The largest difference of a logit to the model's, on three images of noise. Raises UserError when it is large."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    x = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = source.model.classifier(source.model.tokens(source.classes, source.template))(x)
    theirs = torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])
    found = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    if not found <= TOLERANCE:
        raise UserError(f"{source.name}: the ONNX model's logits are off by {found:.1e}; please report it")
    return found


class Graph:
    """Nodes and weights, as they are added; a value is known by its name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; its one output."""
        import onnx

        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def weight(self, value: Tensor | float | list[int]) -> str:
        """Add a constant: floats fp32, a list of whole numbers int64."""
        import onnx

        array = np.array(value, np.int64) if isinstance(value, list) else np.asarray(torch.as_tensor(value).float())
        name = f"weight_{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def linear(self, x: str, layer: torch.nn.Linear) -> str:
        y = self("MatMul", x, self.weight(layer.weight.T))
        return y if layer.bias is None else self("Add", y, self.weight(layer.bias))

    def norm(self, x: str, layer: torch.nn.LayerNorm) -> str:
        return self("LayerNormalization", x, self.weight(layer.weight), self.weight(layer.bias), epsilon=layer.eps)

    def part(self, x: str, starts: list[int], ends: list[int], axes: list[int]) -> str:
        return self("Slice", x, *map(self.weight, (starts, ends, axes)))

    def rows(self, value: Tensor) -> str:
        """value [P, W] for every image: [N, P, W]."""
        batch = self("Shape", "pixels", start=0, end=1)
        shape = self("Concat", batch, self.weight(list(value.shape)), axis=0)
        return self("Expand", self.weight(value), shape)


def build(model: VLM, text: Tensor, size: tuple[int, int]) -> Any:
    """The ONNX model of pixels -> logits; text [D, C]: the unit class texts, scaled. Raises UserError for a crop that
    is larger than the image."""
    import onnx

    g, clip, learned = Graph(), model.clip, model.prompts() if model.prompts is not None else None
    x = pixels(g, model, size)
    if learned is not None and learned.pad is not None:
        x = g("Add", x, g.weight(learned.pad))
    if not isinstance(clip.image, ImageTower):
        raise UserError(
            f"{model.origin.name}: its image tower is a ResNet, which is not written to ONNX; `advtune predict` and "
            "advtune.Classifier run it"
        )
    x = tower(g, clip.image, x, clip.config.image.activation, None if learned is None else learned.image)
    x = g("Div", x, g("ReduceL2", x, g.weight([-1]), keepdims=1))
    bias = torch.zeros(()) if clip.logit_bias is None else clip.logit_bias.detach()
    g.nodes.append(onnx.helper.make_node("Gemm", [x, g.weight(text), g.weight(bias)], ["logits"], "logits"))
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        g.nodes,
        "advtune",
        [value("pixels", onnx.TensorProto.FLOAT, ["n", 3, *size])],
        [value("logits", onnx.TensorProto.FLOAT, ["n", text.shape[1]])],
        g.weights,
    )
    made = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], producer_name="advtune",
        producer_version=__version__, ir_version=9,
    )  # fmt: skip
    return made


def pixels(g: Graph, model: VLM, size: tuple[int, int]) -> str:
    """Crop and normalise, as `Preprocess` does."""
    p, x = model.clip.config.preprocess, "pixels"
    if p.crop is not None and size != (p.crop, p.crop):
        if p.crop > min(size):
            raise UserError(f"a crop of {p.crop} is larger than the image of {size[0]}x{size[1]}: not written to ONNX")
        top, left = ((side - p.crop) // 2 for side in size)
        x = g.part(x, [top, left], [top + p.crop, left + p.crop], [2, 3])
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (p.mean, p.std))
    return g("Div", g("Sub", x, g.weight(mean)), g.weight(std))


def tower(g: Graph, image: ImageTower, x: str, activation: str, prompts: Tensor | None) -> str:
    """Normalised images [N, 3, S, S] -> embeddings [N, D], as `ImageTower`; prompts [K, P, W]."""
    width, p = image.embed.out_features, image.patch
    kernel = [g.weight(image.embed.weight.unflatten(1, (3, p, p)))]
    x = g("Conv", x, *kernel, *([] if image.embed.bias is None else [g.weight(image.embed.bias)]), strides=[p, p])
    x = g("Transpose", g("Reshape", x, g.weight([0, width, -1])), perm=[0, 2, 1])
    if image.class_token is not None:
        x = g("Concat", g.rows(image.class_token[None]), x, axis=1)
    x = g("Add", x, g.weight(image.positions()))
    plain = len(image.positions())
    if prompts is not None:
        x = g("Concat", x, g.rows(prompts[0]), axis=1)
    if isinstance(image.norm_pre, torch.nn.LayerNorm):
        x = g.norm(x, image.norm_pre)
    for i, layer in enumerate(image.blocks):
        assert isinstance(layer, Block)
        if prompts is not None and 0 < i < len(prompts):
            x = g("Concat", g.part(x, [0], [plain], [1]), g.rows(prompts[i]), axis=1)
        x = block(g, layer, x, activation)
    x = read(g, image, g.part(x, [0], [plain], [1]), activation)
    return g.linear(x, image.project) if isinstance(image.project, torch.nn.Linear) else x


def read(g: Graph, image: ImageTower, x: str, activation: str) -> str:
    """Tokens of the last layer [N, L, W] -> what is projected, [N, W]: see `ImageTower.pooled`."""
    if image.reads == "class":
        return g.norm(g("Squeeze", g.part(x, [0], [1], [1]), g.weight([1])), image.norm_post)
    x = g.part(x, [image.own], [WHOLE], [1])
    if image.pool is None and image.norm_after:
        return g.norm(g("ReduceMean", x, g.weight([1]), keepdims=0), image.norm_post)
    x = g.norm(x, image.norm_post)
    return g("ReduceMean", x, g.weight([1]), keepdims=0) if image.pool is None else pool(g, image.pool, x, activation)


def pool(g: Graph, head: AttentionPool, x: str, activation: str) -> str:
    """Patches [N, L, W] -> [N, W], as `AttentionPool`."""
    wide = head.out.in_features
    depth = wide // head.heads
    weight, bias = head.qkv.weight, head.qkv.bias
    query = ((head.probe @ weight[:wide].T + bias[:wide]) * depth**-0.5).view(head.heads, 1, depth)
    both = g("Add", g("MatMul", x, g.weight(weight[wide:].T)), g.weight(bias[wide:]))
    both = g("Reshape", both, g.weight([0, 0, 2, head.heads, depth]))
    k, v = (g("Squeeze", g.part(both, [i], [i + 1], [2]), g.weight([2])) for i in range(2))  # each [N, L, H, d]
    scores = g("Softmax", g("MatMul", g.weight(query), g("Transpose", k, perm=[0, 2, 3, 1])), axis=-1)
    mixed = g("MatMul", scores, g("Transpose", v, perm=[0, 2, 1, 3]))  # [N, H, 1, d]
    x = g.linear(g("Reshape", mixed, g.weight([0, wide])), head.out)
    return g("Add", x, mlp(g, head, g.norm(x, head.norm), activation))


def block(g: Graph, layer: Block, x: str, activation: str) -> str:
    """[N, L, W] -> [N, L, W], as `Block`."""
    depth = layer.out.in_features // layer.heads
    qkv = g("Reshape", g.linear(g.norm(x, layer.norm1), layer.qkv), g.weight([0, 0, 3, layer.heads, depth]))
    q, k, v = (g("Squeeze", g.part(qkv, [i], [i + 1], [2]), g.weight([2])) for i in range(3))  # each [N, L, H, d]
    q, v = (g("Transpose", each, perm=[0, 2, 1, 3]) for each in (g("Mul", q, g.weight(depth**-0.5)), v))
    scores = g("Softmax", g("MatMul", q, g("Transpose", k, perm=[0, 2, 3, 1])), axis=-1)
    mixed = g("Transpose", g("MatMul", scores, v), perm=[0, 2, 1, 3])
    x = g("Add", x, g.linear(g("Reshape", mixed, g.weight([0, 0, -1])), layer.out))
    return g("Add", x, mlp(g, layer, g.norm(x, layer.norm2), activation))


def mlp(g: Graph, layer: Block | AttentionPool, x: str, activation: str) -> str:
    hidden = g.linear(x, layer.fc1)
    if activation == "quick_gelu":
        hidden = g("Mul", hidden, g("Sigmoid", g("Mul", hidden, g.weight(1.702))))
    else:
        hidden = g("Gelu", hidden, approximate=ACTIVATIONS[activation])
    return g.linear(hidden, layer.fc2)
