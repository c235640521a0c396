"""`cliptrans check`: what a config's data contains, and every problem that would stop a run."""

from typing import TYPE_CHECKING

from common_jax.commands.shared import check_command

if TYPE_CHECKING:
    from common_jax.commands.check import Checker

EXAMPLE = """Example:
  cliptrans check --config=cliptrans/multi30k.py:target=fr \\
      --config.data.path=/data/multi30k --all
"""


def checker() -> "Checker":
    """The checks of this package."""
    from cliptrans_jax.commands.check_corpora import check_cliptrans
    from cliptrans_jax.config import Config
    from cliptrans_jax.data.own import settings_of
    from common_jax.commands.check import Checker

    return Checker(Config, check_cliptrans, settings_of, EXAMPLE)


COMMAND = check_command("cliptrans", "stage", checker)
