"""Sweeps whose runs are stand-ins that take no time and do as they are told."""

import csv
import json
import pathlib
import sys
import time

import sweep

from common_jax.commands.sweep import cells as sweep_cells

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = f"{ROOT}/configs/m2mkd/digits.py"
EMOJI = f"{ROOT}/configs/cliptrans/emoji.py"
WHOLE = f"{DIGITS}:phase=end_to_end"
DISTILLED = "--config.baseline.kind=soft"  # otherwise baseline.alpha would change nothing
GRID = "baseline.alpha=0.3,0.5"

# Stands in for python: records the call and does what a file named after the run says.
STAND_IN = """#!{python} -ES
import json, os, pathlib, signal, sys, time
flags = dict(flag.partition("=")[::2] for flag in sys.argv if flag.startswith("--"))
folder = pathlib.Path(flags["--workdir"])
with open({folder!r} + "/called", "a") as file:
    file.write(folder.name + "\\n")
orders = json.loads(pathlib.Path({folder!r}, "orders.json").read_text())
order = orders.get(folder.name, "")
folder.mkdir(exist_ok=True)
if order == "fail":
    print("out of paper")
    sys.exit(3)
if order == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if order == "wait":
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(0)))
    (folder / "started").touch()
    time.sleep(60)
seed, alpha = flags["--config.seed"], flags.get("--config.baseline.alpha", "0.5")
accuracy = float(alpha) + 0.01 * int(seed)
(folder / "result.json").write_text(json.dumps({{"steps": 3, "test/accuracy": accuracy}}))
"""


def replace_python(folder, monkeypatch):
    """Replaces python by the stand-in. Returns two functions: one sets what a run does, the other
    returns the names of the runs called since the last time."""
    script, called = folder / "python", folder / "called"
    script.write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    def give(orders):
        (folder / "orders.json").write_text(json.dumps(orders))

    def take():
        lines = called.read_text().splitlines() if called.exists() else []
        called.unlink(missing_ok=True)
        return sorted(lines)

    give({})
    return give, take


def start(workdir, *flags, config=WHOLE, grid=GRID):
    grids = [] if grid is None else [f"--grid={grid}"]
    flags = [*([DISTILLED] if config == WHOLE else []), *map(str, flags)]
    return sweep.main([f"--config={config}", f"--workdir={workdir}", *grids, *flags])


def cells(grid, config=WHOLE, flags=(DISTILLED,)):
    flags = flags if config == WHOLE else ()
    return sweep_cells.plan_cells(config, flags, sweep_cells.parse_grid(grid), sweep.programs())


def read_csv(workdir):
    with open(workdir / "sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)
