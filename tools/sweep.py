"""Runs a config of either system over a grid of settings and several seeds; see --help.

    python tools/sweep.py --config=configs/m2mkd/digits.py:phase=end_to_end --workdir=runs/moe \\
        --grid='model.moe.experts=4,8;optim.lr=1e-3,3e-3' --seeds=3
"""

import sys
from collections.abc import Sequence
from typing import Any

from cliptrans_jax.commands import sweep as cliptrans
from common_jax.commands.sweep import command
from m2mkd_jax.commands import sweep as m2mkd


def programs() -> dict[str, Any]:
    """Both systems, by the config field that tells them apart."""
    return {"phase": m2mkd.program(), "stage": cliptrans.program()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return command.main(argv, programs(), m2mkd.EXAMPLE + cliptrans.EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
