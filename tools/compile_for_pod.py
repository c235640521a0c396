"""Compiles a run's train step for TPUs or GPUs that you do not have; see --help.

Takes a config of either system.

    python tools/compile_for_pod.py --config=configs/m2mkd/vmoe_base.py:phase=end_to_end \\
        --topology=v5e:16x16
    python tools/compile_for_pod.py --config=configs/cliptrans/multi30k.py:stage=translate \\
        --topology=v5e:16x16 --json=translate.json

docs/sizing.md explains the numbers.
"""

import sys
from collections.abc import Sequence

from cliptrans_jax.commands import plan as cliptrans
from common_jax.commands.plan import compile as plan
from m2mkd_jax.commands import plan as m2mkd


def main(argv: Sequence[str]) -> None:
    """Runs the command, and exits with its status."""
    plan.main(argv, {"phase": m2mkd.planner(), "stage": cliptrans.planner()})


if __name__ == "__main__":
    main(sys.argv)
