"""`python -m advtune`, which is how torchrun starts it."""

import sys

from advtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
