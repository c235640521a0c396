"""`python -m cliptrans_jax COMMAND`: the program `cliptrans`."""

import sys

from cliptrans_jax.commands import main

if __name__ == "__main__":
    sys.exit(main())
