"""`python -m m2mkd_jax COMMAND`, the same as the program `m2mkd`."""

import sys

from m2mkd_jax.commands import main

if __name__ == "__main__":
    sys.exit(main())
