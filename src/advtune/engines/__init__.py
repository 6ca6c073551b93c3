"""Engines: who does the runs of a study. One is a frozen dataclass whose fields say what it may use; called with the
runs to do, by their place in the plan, and the bench, it yields what came of each. Imports nothing heavy."""

from typing import Any

from advtune.engines.local import Local
from advtune.engines.ray import Ray
from advtune.engines.slurm import Slurm

ENGINES: dict[str, Any] = {"local": Local, "ray": Ray, "slurm": Slurm}
