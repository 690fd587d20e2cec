"""`python -m pgolf_jax` is the program `pgolf`."""

import sys

from pgolf_jax.cli import main

if __name__ == "__main__":
  sys.exit(main())
