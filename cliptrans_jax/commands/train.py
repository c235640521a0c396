"""`cliptrans train`: the same as `python -m cliptrans_jax.main`."""

import argparse

from common_jax.commands.shared import passing


def run(args: argparse.Namespace) -> None:
    """Trains with the given flags."""
    from cliptrans_jax.config import READS, SYSTEM
    from cliptrans_jax.main import DESCRIPTION, main
    from common_jax import app

    app.run(main, DESCRIPTION, ["cliptrans train", *args.rest], system=SYSTEM, reads=READS)


COMMAND = passing("train one stage or all of them: --config=FILE.py:stage=STAGE --workdir=DIR", run)
