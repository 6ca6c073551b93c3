"""What the command line shows to learn from: how to begin, and below the options of a verb commands to copy."""

import advtune

DESCRIPTION = "Adversarially robust tuning of CLIP-style models, and evaluation that can be believed."
START = f"""\
advtune {advtune.__version__}: {DESCRIPTION[0].lower()}{DESCRIPTION[1:]}

three commands to try, offline, on what is in the package:
  advtune evaluate zero-shot --data fashion-mnist-mini --limit 100 --attack pgd -a eps=1/255 -a steps=10
                          how often an untuned model is right, and how often under attack
  advtune demo            four methods tuned, attacked and set side by side, in minutes
  advtune list methods    what can be tuned, with every option

verbs: {{}}
what one of them takes: advtune VERB --help
"""
EPILOG = """\
a first run, offline, on what is in the package:
  advtune train capt --data fashion-mnist-mini --shots 16 --epochs 5 --out runs/capt
  advtune evaluate runs/capt --data fashion-mnist-mini --limit 200 --attack pgd -a eps=1/255 -a steps=20
  advtune report runs/capt

your own images (one folder a class) and your own CLIP:
  advtune train tecoa --backbone openai/clip-vit-base-patch32 --data folder:photos --out runs/photos
"""

STUDY = """\
examples, offline, on what is in the package:
  advtune study few-shot --methods zero-shot tecoa --data fashion-mnist-mini --shots 1 4 --seeds 0 1 \\
      --epochs 2 --limit 100 --eps 1/255 --out runs/few --dry-run      (what would be run, and how long it takes)
  advtune study runs/few/study.toml --out runs/few                     (goes on, or says that all is done)
  advtune study runs/few/study.toml --out runs/few --engine slurm      (writes an array script, a task a run)
  advtune study base-to-new --methods capt --data fashion-mnist-mini --epochs 2 --out runs/base-new

a study as a file, to keep; flags lie over what it says:
  protocol = "transfer"            # few-shot, base-to-new, cross-dataset, domain-shift, transfer, eps-curve
  methods = ["zero-shot", "tecoa"]
  train_on = "tinyimagenet"
  data = ["cifar10", "caltech101"]
  options = { lr = 1e-5 }          # for every method;  [method.tecoa] epochs = 2  for one
  train_attack = { eps = "1/255" }
  [[attacks]]                      # several allowed
  name = "pgd"
  eps = ["1/255", "4/255"]
  steps = 100
"""
AUDIT = """\
an example, offline, on what is in the package:
  advtune audit --backbone mini --data fashion-mnist-mini --limit 50 --fix tecoa --epochs 10 \\
      -o lr=3e-3 -o batch_size=32

PGD takes seconds where AutoAttack takes minutes: images that stand to its end cost about 8,000 forwards each.
"""
COMPLETION = """\
  bash:  advtune completion bash > ~/.local/share/bash-completion/completions/advtune
  zsh:   advtune completion zsh > "${fpath[1]}/_advtune"
  fish:  advtune completion fish > ~/.config/fish/completions/advtune.fish
"""
