"""Labelled image sets: where they come from, which images are used, and their pixels.

`load_task("fashion-mnist-mini")` gives a Task, `load_images(task, Split(part="test"))` its pixels.
Names are imported when first used, so that `advtune.data.catalog` needs neither torch nor datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advtune.data.fewshot import Split as Split
    from advtune.data.images import Images as Images
    from advtune.data.images import load_images as load_images
    from advtune.data.sources import Part as Part
    from advtune.data.task import Task as Task
    from advtune.data.task import load_task as load_task

_HOME = {
    "Images": "images",
    "Part": "sources",
    "Split": "fewshot",
    "Task": "task",
    "load_images": "images",
    "load_task": "task",
}
__all__ = ["Images", "Part", "Split", "Task", "load_images", "load_task"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'advtune.data' has no attribute {name!r}")
    return getattr(import_module(f"advtune.data.{_HOME[name]}"), name)
