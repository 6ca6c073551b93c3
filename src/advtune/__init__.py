"""advtune: adversarially robust tuning of CLIP-style models, and evaluation that can be believed.

    import advtune
    clip = advtune.load("mini")
    data = advtune.load_task("fashion-mnist-mini")
    robust = advtune.tune("capt", clip, data, shots=16)
    row = advtune.evaluate(robust, data, advtune.PGD(eps=1 / 255, steps=50))
    print(row.clean["accuracy"], row.robust["accuracy"])

Names are imported when first used: importing advtune runs nothing and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from advtune.attacks import ATTACKS as ATTACKS
    from advtune.attacks import PGD as PGD
    from advtune.attacks import AutoAttack as AutoAttack
    from advtune.comparison import compare as compare
    from advtune.data import load_task as load_task
    from advtune.errors import UserError as UserError
    from advtune.evaluation import evaluate as evaluate
    from advtune.evaluation import evaluate_curve as evaluate_curve
    from advtune.methods import METHODS as METHODS
    from advtune.predict import Classifier as Classifier
    from advtune.results import Row as Row
    from advtune.runs import load as load
    from advtune.train import tune as tune
    from advtune.vlm import VLM as VLM

_HOME = {
    "ATTACKS": "attacks",
    "AutoAttack": "attacks",
    "Classifier": "predict",
    "METHODS": "methods",
    "PGD": "attacks",
    "Row": "results",
    "UserError": "errors",
    "VLM": "vlm",
    "compare": "comparison",
    "evaluate": "evaluation",
    "evaluate_curve": "evaluation",
    "load": "runs",
    "load_task": "data",
    "tune": "train",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'advtune' has no attribute {name!r}")
    return getattr(import_module(f"advtune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
