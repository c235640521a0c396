"""Commands that start a sweep's runs elsewhere: in a shell, a SLURM array, or xpk workloads."""

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from etils import epath

LONGEST = 39  # characters of a workload's name that xpk allows

SLURM = """#!/bin/bash
# {count} runs of {workdir}, one per task; submit again to resume them.
# Add the options that your cluster needs (--partition, --account, --gres, --time), or give them
# to sbatch.
#SBATCH --job-name={title}
#SBATCH --array=0-{last}{limit}
#SBATCH --chdir="{folder}"
#SBATCH --output="{workdir}/slurm-%A_%a.out"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120

case "$SLURM_ARRAY_TASK_ID" in
{cases}
  *) echo "there is no task $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac

# Two minutes before the time limit, or on preemption: the run saves, and the task is requeued.
stop() {{
  trap '' TERM
  kill -TERM "$step"
  wait "$step"
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
  exit 143
}}
srun --kill-on-bad-exit=1 --open-mode=append --output="$log" "${{command[@]}}" &
step=$!
trap stop TERM
wait "$step"
"""

XPK = """#!/bin/bash
# {count} runs of {workdir}, one workload each. Set the cluster, its machines and the image:
: "${{CLUSTER:?the name of the cluster}}"
: "${{TPU_TYPE:?such as v5litepod-16}}"
: "${{IMAGE:?a Docker image in whose working directory the commands start}}"
{lines}
"""

Commands = Mapping[str, Sequence[str]]  # run -> arguments for python, without the workdir


def format_commands(commands: Commands, workdir: epath.Path, *, at_a_time: int | None) -> str:
    """One shell command per line. Ignores `at_a_time`, which is up to whoever starts them."""
    return "".join(f"{shlex.join(line)}\n" for line in _lines(commands, workdir).values())


def format_slurm(commands: Commands, workdir: epath.Path, *, at_a_time: int | None) -> str:
    """A script for sbatch: an array with one task per run."""
    if not commands:
        return ""
    cases = [
        f"  {number}) log={shlex.quote(f'{workdir / name}.log')}\n"
        f"     command=({shlex.join(line)}) ;;"
        for number, (name, line) in enumerate(_lines(commands, workdir).items())
    ]
    return SLURM.format(
        count=len(cases),
        last=len(cases) - 1,
        limit=f"%{at_a_time}" if at_a_time else "",
        title=re.sub(r"[^\w.-]+", "-", workdir.name),
        workdir=workdir,
        folder=os.getcwd(),
        cases="\n".join(cases),
    )


def format_xpk(commands: Commands, workdir: epath.Path, *, at_a_time: int | None) -> str:
    """A script with one `xpk workload create` per run; the cluster schedules them."""
    if not commands:
        return ""
    lines = [
        'xpk workload create --cluster="$CLUSTER" --tpu-type="$TPU_TYPE" --docker-image="$IMAGE"'
        f" --num-slices=1 --max-restarts=10 --workload={_workload(workdir, name)}"
        f" --command={shlex.quote(shlex.join(line))}"
        for name, line in _lines(commands, workdir, python="python").items()
    ]
    return XPK.format(count=len(lines), workdir=workdir, lines="\n".join(lines))


def _lines(
    commands: Commands, workdir: epath.Path, *, python: str | None = None
) -> dict[str, list[str]]:
    """Full commands by name, by default with the running Python."""
    return {
        name: [python or sys.executable, *command, f"--workdir={workdir / name}"]
        for name, command in commands.items()
    }


def _workload(workdir: epath.Path, name: str) -> str:
    """A name that Kubernetes accepts, always the same for a run: its own, truncated, plus a
    digest."""
    digest = hashlib.sha1(f"{workdir / name}".encode()).hexdigest()[:6]
    plain = re.sub(r"[^a-z0-9]+", "-", f"{workdir.name}-{name}".lower())
    return "s-" + f"{plain[: LONGEST - 9].strip('-')}-{digest}"
