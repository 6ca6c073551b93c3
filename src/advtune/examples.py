"""What the command line shows to learn from: how to begin, and below the options of a verb commands to copy. No line
is wider than 79 columns."""

import textwrap
from collections.abc import Iterable

import advtune

DESCRIPTION = "Adversarially robust tuning of CLIP-style models, and evaluation that can be believed."
START = f"""\
advtune {advtune.__version__}: adversarially robust tuning of CLIP-style models, and evaluation
that can be believed.

three commands to try, offline, on what is in the package:

  how often is an untuned model right, and how often under attack?
  advtune evaluate zero-shot --data fashion-mnist-mini --limit 100 \\
      --attack pgd -a eps=1/255 -a steps=10

  four methods tuned, attacked and set side by side, in minutes:
  advtune demo

  what can be tuned, with every option:
  advtune list methods

{{}}
what one of them takes: advtune VERB --help
"""
EPILOG = """\
a first run, offline, on what is in the package:
  advtune train capt --data fashion-mnist-mini --shots 16 --epochs 5 \\
      --out runs/capt
  advtune evaluate runs/capt --data fashion-mnist-mini --limit 200 \\
      --attack pgd -a eps=1/255 -a steps=20
  advtune report runs/capt

your own images (one folder a class) and your own CLIP:
  advtune train tecoa --backbone openai/clip-vit-base-patch32 \\
      --data folder:photos --out runs/photos
"""

STUDY = """\
examples, offline, on what is in the package: what would be run, and how long
it takes; the same without --dry-run does it, and goes on after a kill
  advtune study few-shot --methods zero-shot tecoa --data fashion-mnist-mini \\
      --shots 1 4 --seeds 0 1 --epochs 2 --limit 100 --eps 1/255 \\
      --out runs/few --dry-run
  advtune study base-to-new --methods capt --data fashion-mnist-mini \\
      --epochs 2 --out runs/base-new
an array script for Slurm, a task a run:
  advtune study few-shot --methods tecoa --data fashion-mnist-mini \\
      --shots 4 --seeds 0 1 --epochs 2 --out runs/array --engine slurm

a study as a file, to keep; flags lie over what it says:
  protocol = "transfer"          # or another of those above
  methods = ["zero-shot", "tecoa"]
  train_on = "tinyimagenet"
  data = ["cifar10", "caltech101"]
  options = { lr = 1e-5 }        # for every method
  method.tecoa = { epochs = 2 }  # for one
  train_attack = { eps = "1/255" }
  [[attacks]]                    # several allowed
  name = "pgd"
  eps = ["1/255", "4/255"]
  steps = 100
"""
AUDIT = """\
an example, offline, on what is in the package:
  advtune audit --backbone mini --data fashion-mnist-mini --limit 50 \\
      --fix tecoa --epochs 10 -o lr=3e-3 -o batch_size=32

PGD takes seconds where AutoAttack takes minutes: images that stand to its end
cost about 8,000 forwards each.
"""
EXPORT = """\
huggingface: CLIPModel.from_pretrained loads it (tuned towers); onnx: a
classifier of fixed classes; prompts: the learned prompts alone, kilobytes, to
lay on the same backbone. For example:
  advtune export runs/capt --to prompts --out exported/capt
"""
COMPLETION = """\
  bash:
  advtune completion bash > \\
      ~/.local/share/bash-completion/completions/advtune
  zsh:
  advtune completion zsh > "${fpath[1]}/_advtune"
  fish:
  advtune completion fish > ~/.config/fish/completions/advtune.fish
"""
EXAMPLES = {  # the one that is named when something is missing; shown below --help, too, where no others are
    "train": "advtune train capt --data fashion-mnist-mini --shots 16 --epochs 5 --out runs/capt",
    "evaluate": "advtune evaluate runs/capt --data fashion-mnist-mini --attack pgd -a eps=1/255",
    "audit": "advtune audit --backbone mini --data fashion-mnist-mini --limit 50",
    "study": "advtune study few-shot --methods zero-shot tecoa --data fashion-mnist-mini --out runs/few --dry-run",
    "report": "advtune report runs/capt",
    "compare": "advtune compare runs/capt runs/tecoa",
    "interpolate": "advtune interpolate runs/tecoa --share 0.25 0.5 0.75 --out runs/between",
    "predict": "advtune predict runs/capt photos/",
    "export": "advtune export runs/capt --to prompts --out exported/capt",
    "list": "advtune list methods",
    "backbone": "advtune backbone inspect mini",
    "completion": "advtune completion bash",
}


def start(verbs: Iterable[str]) -> str:
    """How to begin, for who typed nothing but the name."""
    return START.format(textwrap.fill(f"verbs: {', '.join(verbs)}", 79, subsequent_indent="  "))
