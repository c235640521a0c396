"""Runs our code on golden cases of the original PyTorch code; see `parity/command.py`.

python tools/parity.py --golden tests/golden [--only 'm2mkd/vit_.*']
"""

import sys

from parity.command import main

if __name__ == "__main__":
    sys.exit(main())
