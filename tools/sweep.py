"""The command of `sweep/command.py`: runs a config for every setting of a grid and several seeds.

    python tools/sweep.py --config=configs/m2mkd/digits.py:phase=end_to_end --workdir=runs/moe \\
        --grid='model.moe.experts=4,8;optim.lr=1e-3,3e-3' --seeds=3
"""

import sys

from sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
