"""What the demos' pipelines compile, phase by phase, and what the compilation cache saves.

Every pipeline runs three times with few updates, each time in a new process: without the persistent
cache, with an empty one, and with the one just filled. A cache hit in the run that started with an
empty cache means that the same process needed the program twice. The cache keeps programs that take
at least half a second to compile.

    python benchmarks/compilation.py
"""

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

import timing

from common_jax.signals import ends_quietly

ROOT = pathlib.Path(__file__).resolve().parent.parent
PIPELINES = {
    "V-MoE on digits": ("m2mkd_jax", "configs/m2mkd/digits.py:phase=pipeline,scale=0.01"),
    "NAC on digits": ("m2mkd_jax", "configs/m2mkd/digits_nac.py:phase=pipeline,scale=0.01"),
    "CLIPTrans on emoji": ("cliptrans_jax", "configs/cliptrans/emoji.py:scale=0.01"),
}
CACHES = ("none", "empty", "filled")
LARGE = 0.5  # compile time in seconds from which the cache keeps a program
# A run that prints its programs: current phase, name, seconds, whether it was a cache hit.
RUN = """
import importlib, json, logging, re, sys

import jax

from common_jax import app
from common_jax.log.clocks import COMPILED

main = importlib.import_module(sys.argv.pop(1) + ".main")
phase, hit, programs = ["before"], [], []


def record(*arguments, **more):
    made = logging.LogRecord(*arguments, **more)
    if found := re.fullmatch(r"(.+): its log is .+", made.getMessage()):
        phase[0] = found[1]
    return made


def found(event, **more):
    if event == "/jax/compilation_cache/cache_hits":
        hit.append(event)


def compiled(event, seconds, fun_name="", **more):
    if event == COMPILED:
        programs.append((phase[0], fun_name, seconds, bool(hit)))
        hit.clear()


logging.setLogRecordFactory(record)
jax.monitoring.register_event_listener(found)
jax.monitoring.register_event_duration_secs_listener(compiled)
app.run(main.main, main.DESCRIPTION)
print(json.dumps(programs))
"""


class Program(NamedTuple):
    """A program that a run needed; `seconds` to compile it, or to read it from the cache."""

    phase: str
    name: str
    seconds: float
    cached: bool


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads for all timed code")
    parser.add_argument("--only", nargs="+", choices=PIPELINES, default=[*PIPELINES])
    return parser.parse_args()


def run(pipeline: str, workdir: pathlib.Path, cache: pathlib.Path, *, use: bool) -> list[Program]:
    """Runs a pipeline to its end; returns what it compiled, in order.

    Raises:
      SystemExit: the pipeline fails; has its stderr.
    """
    package, config = PIPELINES[pipeline]
    flags = (
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.run.compilation_cache={cache}",
    )
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": str(use).lower()}
    command = [sys.executable, "-c", RUN, package, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [Program(*program) for program in json.loads(done.stdout.splitlines()[-1])]


def show(pipeline: str, runs: dict[str, list[Program]]) -> None:
    """Prints a table with one row per phase."""
    print(f"\n{pipeline}\nphase | programs | at least {LARGE} s | needed twice | seconds")
    rows = collections.defaultdict(lambda: [0, 0, 0, 0.0])
    for program in runs["none"]:
        row = rows[program.phase]
        row[0] += 1
        row[1] += program.seconds >= LARGE
        row[3] += program.seconds
    for program in runs["empty"]:
        rows[program.phase][2] += program.cached
    for phase, (count, large, twice, seconds) in rows.items():
        print(f"{phase} | {count} | {large} | {twice} | {seconds:.1f}")


@ends_quietly
def main() -> None:
    flags = parse_flags()
    timing.start(flags.threads)
    details = {}
    for pipeline in flags.only:
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            runs = {
                cache: run(pipeline, root / cache, root / "cache", use=cache != "none")
                for cache in CACHES
            }
        show(pipeline, runs)
        seconds = {cache: sum(x.seconds for x in programs) for cache, programs in runs.items()}
        details[pipeline] = seconds
        print(", ".join(f"{cache} cache: {value:.1f} s" for cache, value in seconds.items()))
    timing.report("compilation", [], compile_seconds=details)


if __name__ == "__main__":
    main()
