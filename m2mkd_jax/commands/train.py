"""`m2mkd train`: the same as `python -m m2mkd_jax.main`."""

import argparse

from common_jax.commands.shared import passing


def run(args: argparse.Namespace) -> None:
    """Trains according to the flags."""
    from common_jax import app
    from m2mkd_jax.config import SYSTEM
    from m2mkd_jax.main import DESCRIPTION, main
    from m2mkd_jax.phases.fields import reads

    app.run(main, DESCRIPTION, ["m2mkd train", *args.rest], system=SYSTEM, reads=reads())


COMMAND = passing("train one phase or all of them: --config=FILE.py:phase=PHASE --workdir=DIR", run)
