"""Reports what the data of a config holds, and every problem in it; see --help.

Takes a config of either system.

    python tools/check_data.py --config=configs/m2mkd/vmoe_base.py --config.data.path=/data/imagenet
    python tools/check_data.py --config=configs/m2mkd/cifar10_vmoe.py --config.data.path=/data/birds
    python tools/check_data.py --config=configs/cliptrans/multi30k.py:target=fr \\
        --config.data.path=/data/multi30k --all
"""

import sys
from collections.abc import Sequence

from cliptrans_jax.commands import check as cliptrans
from common_jax.commands import check
from m2mkd_jax.commands import check as m2mkd


def main(argv: Sequence[str]) -> None:
    """Runs the command, and exits with its status."""
    check.main(argv, {"phase": m2mkd.checker(), "stage": cliptrans.checker()})


if __name__ == "__main__":
    main(sys.argv)
