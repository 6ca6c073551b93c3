"""VLM = a dual encoder + what was learned on top of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtune.clip import CLIP
from advtune.compiled import Compiled, check_compiler
from advtune.data.templates import parts
from advtune.errors import UserError
from advtune.low_rank import attach
from advtune.memory import room
from advtune.portions import encode
from advtune.preprocess import Preprocess
from advtune.pretrained import read_pretrained
from advtune.prompts import FixedPrompts, Learned, Prompts, fixed
from advtune.tokenizer import Tokenizer

Classifier = Callable[[Tensor], Tensor]  # images [B, 3, any, any] in [0, 1] -> logits [B, C]
CONTEXT = "{}."  # the template beside a learned context: the class at the end


@dataclass(frozen=True)
class Origin:
    """Where the frozen weights came from; goes into every result row."""

    name: str
    sha256: str
    notice: str = ""


@dataclass
class Batch:
    """One training batch: images x [B, 3, S, S] in [0, 1], labels y [B], and for every model by name the class
    texts' token ids [C, L]. `cycle` counts the repetitions of the schedule (0 but for two-phase methods). `kept`:
    these images' rows of what the method prepared before the first step; empty when images are augmented.

    A batch may be a portion, the images from `begin` on of a batch of `whole`; then `means` holds over the whole what
    the method asks for by a hook of that name.
    """

    x: Tensor
    y: Tensor
    tokens: Mapping[str, Tensor]
    cycle: int = 0
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    begin: int = 0
    whole: int | None = None
    means: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Images of the whole batch."""
        return len(self.y) if self.whole is None else self.whole

    @property
    def share(self) -> float:
        """The part of the whole batch that this is; 1 for all of it."""
        return len(self.y) / self.size


@dataclass
class TextCache:
    tokens: Tensor | None = None
    features: Tensor = field(default_factory=lambda: torch.empty(0))


def shell(clip: CLIP) -> CLIP:
    """A dual encoder whose parts are the other's, but can be replaced without changing the other."""
    other = copy.copy(clip)
    other._modules = dict(clip._modules)
    return other


class VLM(nn.Module):
    """`image_features`, `text_features`, `logits`, `classifier`, `delta`: all that a method or attack needs.

    `precision` bf16 runs the towers under autocast; features, logits and losses stay fp32.
    """

    def __init__(self, clip: CLIP, tokenizer: Tokenizer, origin: Origin, prompts: nn.Module | None = None):
        super().__init__()
        self.clip = clip
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.origin = origin
        self.precision = "fp32"
        self.compiled = ""  # torch.compile's backend for the image tower; none: as it is written
        self.recompute = False  # activations of the blocks are forgotten, and computed again for a gradient
        self.text_memory: float | None = None  # bytes that a graph of texts may take; none: see `room`
        self.learned: tuple[str, ...] = ()  # prefixes of what this model adds to its backbone
        self.template = ""  # stands for every data set's, when the learned context takes its place
        self.classes: tuple[str, ...] = ()  # the only ones that a class-specific context has
        self.run: dict[str, Any] = {}  # how it was tuned; empty for a zero-shot model
        self.folders: frozenset[str] = frozenset()  # the run folders that it stands on
        self.seen: frozenset[str] = frozenset()  # content hashes of the images it was tuned on
        self._cache = TextCache()
        self._program: Compiled | None = None

    # --- what was learned -------------------------------------------------------------------------------

    def with_prompts(
        self, template: str, text: int, image: int, depth: int, coupling: str = "independent", seed: int = 0,
        pad: int = 0,
    ) -> VLM:  # fmt: skip
        """A model of the same towers with fresh trainable prompts (see `Prompts`), the first text prompt begun from the
        template's first words. Raises UserError when there are prompts already."""
        words = self.tokenizer.pieces(template.split("{}")[0])[:text]
        start = self.clip.text.embed(torch.tensor(words, device=self.device)) if words else None
        return self._prompted(Prompts(self.clip, text, image, depth, coupling, start, seed, pad=pad))

    def with_context(self, length: int, classes: Sequence[str] = (), seed: int = 0) -> VLM:
        """A model with a fresh trainable text context in the template's place, "[v1] ... [vP] name.", for all
        classes or, with `classes`, of each its own (CoOp, arXiv:2109.01134). Raises as `with_prompts`."""
        model = self._prompted(Prompts(self.clip, length, 0, 1, seed=seed, classes=len(classes)))
        model.template, model.classes = CONTEXT, tuple(classes)
        return model

    def with_fixed(self, learned: Learned) -> VLM:
        """This model with these prompts, as they are, in place of its own."""
        return self.like(self.clip, FixedPrompts(*learned))

    def _prompted(self, prompts: Prompts) -> VLM:
        if self.prompts is not None:
            raise UserError("the backbone has learned prompts already; tune on a run that learned a tower")
        return self.like(self.clip, prompts.to(self.device), ("prompts.",))

    def with_image_tower(self, rank: int = 0, seed: int = 0) -> VLM:
        """A model with a trainable copy of the image tower, or `rank` low-rank updates of one (see `attach`)."""
        clip = shell(self.clip)
        clip.image = copy.deepcopy(self.clip.image).requires_grad_(True)
        if rank:
            attach(clip.image, rank, seed)
        return self.like(clip, self.prompts, ("clip.image.",))

    def with_preprocess(self, preprocess: Preprocess) -> VLM:
        """The same weights behind another resize, crop or normalisation."""
        clip = shell(self.clip)
        clip.config = dataclasses.replace(clip.config, preprocess=preprocess)
        return self.like(clip, self.prompts)

    def like(self, clip: CLIP, prompts: nn.Module | None, learned: tuple[str, ...] | None = None) -> VLM:
        """A model of these parts that is used as this one is; learned: if None, what this one learned."""
        model = VLM(clip, self.tokenizer, self.origin, prompts)
        model.learned = self.learned if learned is None else learned
        for name in ("precision", "text_memory", "compiled", "recompute", "template", "classes"):
            setattr(model, name, getattr(self, name))
        return model

    def delta(self) -> dict[str, Tensor]:
        """Only what was learned: a tuned tower's parameters, or the prompts as they enter the towers (couplings
        applied, so kilobytes)."""
        named = {f"clip.{name}": value for name, value in self.clip.named_parameters()}
        named |= {f"prompts.{name}": value for name, value in self._prompts()._asdict().items()}
        return {
            name: value.detach().cpu().contiguous()
            for name, value in named.items()
            if value is not None and name.startswith(self.learned or ("nothing",))
        }

    def with_delta(self, delta: dict[str, Tensor]) -> VLM:
        """This model with a stored delta applied. Raises UserError on a tensor that does not belong here."""
        model = self
        if any(name.startswith("clip.") for name in delta):
            model = self.with_image_tower()
        if any(name.startswith("prompts.") for name in delta):
            prompts = fixed(self.clip, {name: delta.get(f"prompts.{name}") for name in Learned._fields})
            model = self.like(model.clip, prompts, ("prompts.",))
        parameters = dict(model.named_parameters())
        for name, value in delta.items():
            if name in [f"prompts.{each}" for each in Learned._fields]:
                continue
            if name not in parameters or parameters[name].shape != value.shape:
                raise UserError(f"learned tensor {name} does not fit backbone {self.origin.name}")
            parameters[name].data.copy_(value)
        return model.requires_grad_(False).eval().to(self.device)

    # --- the encoders -----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    @property
    def side(self) -> int:
        """Side in pixels of the images that need no resizing inside the model."""
        preprocess = self.clip.config.preprocess
        return preprocess.resize if isinstance(preprocess.resize, int) else self.clip.config.image_size

    def tokens(self, classes: Sequence[str], template: str) -> Tensor:
        """Token ids [C, L] of the class texts, with room for the learned text prompt; on the processor, where their
        lengths are read; [T, C, L] of several templates. Raises UserError for other classes than a class-specific
        context was learned for, and for several templates beside a learned text prompt."""
        text = self._prompts().text
        if self.classes and tuple(classes) != self.classes:
            raise UserError("a class-specific context fits only the classes it was tuned on; tune context=unified")
        room = 0 if text is None else text.shape[-2]
        if text is not None and len(parts(template)) > 1:
            raise UserError("several templates are averaged only where no text prompt is learned; give one --template")
        return self.tokenizer.prompts(classes, self.template or template, room)

    def image_features(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, any, any] in [0, 1] -> unit vectors [B, D]."""
        return F.normalize(self._image(x, self._prompts()), dim=-1)

    def image_embeddings(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, any, any] in [0, 1] -> embeddings [B, D], not normalised."""
        return self._image(x, self._prompts())

    def dense_embeddings(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, any, any] in [0, 1] -> embeddings of the class token and the patches [B, 1 + N, D], not
        normalised."""
        return self._image(x, self._prompts(), dense=True)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Token ids [C, L] -> unit vectors [C, D]; of several templates [T, C, L] their mean, made a unit again."""
        return self._text(tokens, self._prompts().text)

    def logits(self, x: Tensor, text: Tensor) -> Tensor:
        """Pixels and text features [C, D] -> logits [B, C]."""
        return self._scaled(self.image_features(x), text)

    def classifier(self, tokens: Tensor) -> Classifier:
        """f: images -> logits, with the text encoded once, now; gradients reach whatever is trainable."""
        encode, compare = self.towers(tokens)
        return lambda x: compare(encode(x))

    def towers(self, tokens: Tensor) -> tuple[Classifier, Classifier]:
        """The two halves of `classifier`: images -> unit vectors [B, D], and unit vectors [B, D] -> logits [B, C]."""
        learned = self._prompts()
        text = self._text(tokens, learned.text)
        return lambda x: F.normalize(self._image(x, learned), dim=-1), lambda image: self._scaled(image, text)

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied by (about 100 in OpenAI CLIP)."""
        return self.clip.logit_scale.exp()

    def _scaled(self, image: Tensor, text: Tensor) -> Tensor:
        logits = self.logit_scale * image @ text.T
        return logits if self.clip.logit_bias is None else logits + self.clip.logit_bias

    def _prompts(self) -> Learned:
        return Learned() if self.prompts is None else self.prompts()

    def _image(self, x: Tensor, learned: Learned, dense: bool = False) -> Tensor:
        if self.compiled and self._program is None:
            self._program = Compiled(self.clip.image, self.compiled, graphs=self.device.type == "cuda")
        with self._autocast(self.precision == "bf16"):
            how = (learned.image, learned.pad, dense, self._program, self.recompute)
            return self.clip.encode_image(x, *how).float()

    def _autocast(self, low: bool) -> AbstractContextManager[Any]:
        if self.device.type == "meta":  # where operations are counted; it knows no autocast
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)

    def _text(self, tokens: Tensor, prompts: Tensor | None) -> Tensor:
        if tokens.dim() == 3:
            each = self._text(tokens.flatten(0, 1), prompts)
            return F.normalize(each.view(*tokens.shape[:2], -1).mean(0), dim=-1)
        cache = self._cache
        constant = prompts is None and not any(p.requires_grad for p in self.clip.text.parameters())
        if constant and cache.tokens is not None and torch.equal(cache.tokens, tokens.cpu()):
            return cache.features
        # Without a gradient to pay for, text is encoded in fp32: it is one forward for a whole evaluation.
        low = self.precision == "bf16" and not constant and torch.is_grad_enabled()
        memory = room(self.device) if self.text_memory is None else self.text_memory
        lengths, shared = self.clip.text.lengths(tokens), self.clip.text.shared(tokens, prompts)
        how = (self.clip.config.text, tokens, lengths, prompts, low, memory, shared)
        with self._autocast(low):
            features = encode(partial(self.clip.encode_text, again=self.recompute), *how)
        features = F.normalize(features.float(), dim=-1)
        if constant:
            self._cache = TextCache(tokens.cpu(), features)
        return features


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 has its own instructions here, so that it is faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def load_vlm(name: str, device: str = "cpu", precision: str = "auto", compile: bool = False) -> VLM:
    """A frozen zero-shot model from a backbone: `mini`, a folder in Hugging Face CLIP format, or a hub id.

    precision: fp32, bf16, or auto (bf16 where the hardware has it). compile: the image tower through torch.compile.
    Raises UserError as `read_pretrained`, and where there is nothing to compile with.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"precision {precision!r} is not one of auto, fp32, bf16")
    if compile:
        check_compiler()
    read = read_pretrained(name)
    model = VLM(read.clip, read.tokenizer, Origin(read.name, read.sha256, read.notice)).to(device)
    model.precision = precision if precision != "auto" else "bf16" if native_bf16(model.device) else "fp32"
    model.compiled = "inductor" if compile else ""
    return model
