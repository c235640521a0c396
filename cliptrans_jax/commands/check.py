"""`cliptrans check`: what a config's data contain, and every problem that keeps a run from starting
on them."""

from typing import TYPE_CHECKING, Any

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

    def fields(config: Any) -> dict[str, Any]:
        settings = settings_of(config.data.path, config.data.to_dict())
        values = {f"data.{name}": value for name, value in settings.items()}
        if settings and config.languages:  # given for other data
            values["languages"] = settings["source_language"], settings["target_language"]
        return values

    return Checker(Config, check_cliptrans, fields, EXAMPLE)


COMMAND = check_command("cliptrans", "stage", checker)
