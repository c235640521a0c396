"""Time from launch to the first step of a run on digits, with and without the compilation cache.

Every start is a new process: Python, imports, data, compilation, one step of a V-MoE. With the
persistent compilation cache, programs compiled by an earlier start are loaded. Imports are also
timed alone. All cases take turns.

    python benchmarks/cold_start.py
"""

import argparse
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile

import timing

from common_jax.signals import ends_quietly

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = ("--config=configs/m2mkd/digits.py:phase=end_to_end", "--config.run.log_every=1")
IMPORT = "import m2mkd_jax.main"
# A run that exits once the loop records the metrics of the first step.
RUN = """
import os, sys
from common_jax import app, metrics
from m2mkd_jax import main

metrics.Recorder.write = lambda *_: os._exit(0)
app.run(main.main, main.DESCRIPTION)
sys.exit("the run ended before its first step")
"""


def parse_sizes() -> argparse.Namespace:
    return timing.parser(__doc__, repeats=5).parse_args()


def launch(code: str, *arguments: str, cached: bool = False) -> None:
    """Runs a process to its end.

    Raises:
      SystemExit: the process fails; has its stderr.
    """
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": str(cached).lower()}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


@ends_quietly
def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads)
    with tempfile.TemporaryDirectory() as folder:
        flags = (*FLAGS, f"--config.run.compilation_cache={folder}/cache")
        workdirs = (f"--workdir={folder}/run_{number}" for number in itertools.count())
        cases = {
            "imports": lambda: launch(IMPORT),
            "compiled": lambda: launch(RUN, *flags, next(workdirs)),
            "from the cache": lambda: launch(RUN, *flags, next(workdirs), cached=True),
        }
        times = timing.take_turns(cases, sizes.repeats)
    claim = "start of a run to its first step, with a filled compilation cache"
    claims = [timing.compare(times, "from the cache", "compiled", claim=claim, target=None)]
    timing.report("cold_start", claims, times=times)


if __name__ == "__main__":
    main()
