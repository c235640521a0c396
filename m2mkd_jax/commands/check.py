"""`m2mkd check`: what is in a config's data, and every problem that keeps a run from starting on
them."""

from typing import TYPE_CHECKING, Any

from common_jax.commands.shared import check_command

if TYPE_CHECKING:
    from common_jax.commands.check import Checker

EXAMPLE = """Example:
  m2mkd check --config=m2mkd/vmoe_base.py --config.data.path=/data/imagenet
  m2mkd check --config=m2mkd/cifar10_vmoe.py --config.data.path=/data/birds
"""


def checker() -> "Checker":
    """This package's part of the command."""
    from common_jax.commands.check import Checker
    from m2mkd_jax.commands.check_images import check_m2mkd
    from m2mkd_jax.config import Config
    from m2mkd_jax.data.own.discover import settings_of

    def fields(config: Any) -> dict[str, Any]:
        settings = settings_of(config.data.path, config.data.to_dict())
        return {f"data.{name}": value for name, value in settings.items()}

    return Checker(Config, check_m2mkd, fields, EXAMPLE)


COMMAND = check_command("m2mkd", "phase", checker)
