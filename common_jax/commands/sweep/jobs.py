"""Runs the processes of a demo or a sweep, a few at a time, each after the run that it needs. Also
has the flags of a demo, and the numbers in its tables."""

import argparse
import contextlib
import dataclasses
import fcntl
import math
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from common_jax.commands.arguments import count
from common_jax.metrics import read_metrics
from common_jax.report import Table
from common_jax.signals import heeded
from common_jax.workdir import check_output, read_json

ROOT = pathlib.Path(__file__).resolve().parents[3]
# On CPU, XLA allocates a step's buffers anew in every step. These settings, read when a process
# starts, make glibc keep freed memory: one heap that never shrinks, no separate mappings, pages of
# 2 MB. `benchmarks/kept_memory.py` measures the gain.
KEPT_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=1000000000000:glibc.malloc.hugetlb=1"
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
      command: arguments for python, without the run's workdir.
      needs: the run that must finish before it starts, or None.
      file: a file that must exist before it starts, such as the result of part of another run; None
        for none.
    """

    command: tuple[str, ...]
    needs: str | None = None
    file: pathlib.Path | None = None

    def may_start(self, done: Collection[str | None]) -> bool:
        """Whether all that it needs is there, given the names of finished runs, and None."""
        return self.needs in done and (self.file is None or self.file.exists())


def demo_parser(description: str, *, workdir: str, seeds: int) -> argparse.ArgumentParser:
    """A parser for the flags of every demo, with these defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path(workdir))
    parser.add_argument(
        "--seeds", type=count, default=seeds, help="repetitions of everything that is compared"
    )
    parser.add_argument("--jobs", type=count, default=2, help="runs at a time")
    parser.epilog = (
        "--config.FIELD=VALUE changes a field in every run; other flags for the runs go last, "
        "after --"
    )
    return parser


def parse_demo(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """The flags of a demo, with the list `flags` of those for its runs. Exits with status 2 if one
    is unknown."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    own, last = argv[:end], argv[end + 1 :]
    settings = [argument for argument in own if argument.startswith("--config.")]
    if lacking := [argument for argument in settings if "=" not in argument]:
        parser.error(f"{lacking[0]} lacks a value; write {lacking[0]}=VALUE")
    flags, unknown = parser.parse_known_args([x for x in own if x not in settings])
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; flags for the runs, other than "
            "--config.FIELD=VALUE, go last, after --"
        )
    return argparse.Namespace(**vars(flags), flags=[*settings, *last])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How several runs ended.

    Attributes:
      statuses: exit status by name; minus the signal's number if one ended the run, and None if
        another process is working on the run. Runs that were not started are left out.
      signal: the number of the signal that was passed on to the runs, or None.
    """

    statuses: Mapping[str, int | None]
    signal: int | None


Running = dict[str, tuple[subprocess.Popen, int]]  # process, and the index of its slot


def run_all(
    jobs: Mapping[str, Job],
    workdir: pathlib.Path,
    *,
    at_a_time: int,
    after_each: Callable[[str], None] = lambda name: None,
) -> None:
    """Runs the named jobs, in order as far as their needs allow, with workdir WORKDIR/NAME and
    output in WORKDIR/NAME.log; exits at the first failure. Whenever it ends early, including on
    Ctrl-C and SIGTERM, it asks the other runs to stop and waits until they have saved. Calls
    `after_each` with the name of every finished job."""
    start, running = time.time(), {}
    try:
        check_output("--workdir", workdir)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    def begin(name: str, job: Job, place: int) -> subprocess.Popen:
        return _start(job, workdir, name, _own_core(place))

    try:
        for name, status in _ends(dict(jobs), running, begin, at_a_time=at_a_time):
            if status != 0:
                end = f"{name} {describe(status)}; see {workdir / name}.log"
                print(end, file=sys.stderr, flush=True)
                sys.exit(1)
            print(f"{time.time() - start:5.0f} s  {name} done", flush=True)
            after_each(name)
    except BaseException as end:  # including those of `after_each`
        # If the terminal has already sent SIGINT to the runs, the two count as one request.
        number = signal.SIGINT if isinstance(end, KeyboardInterrupt) else signal.SIGTERM
        for process, _ in running.values():
            process.send_signal(number)
        for process, _ in running.values():
            process.wait()
        raise


def run_each(jobs: Mapping[str, Job], workdir: pathlib.Path, *, at_a_time: int) -> Outcome:
    """Runs the named jobs like `run_all`, but continues after failures, and in this process's
    folder and environment; several at a time, each on its share of the cores.

    Passes requests to stop on to the runs, waits for them and starts no others. Skips a run that
    another process is working on, such as one left running by an earlier start that was killed.
    """
    start, waiting, started, statuses, caught = time.time(), dict(jobs), [], {}, []

    def begin(name: str, job: Job, place: int) -> subprocess.Popen | None:
        before = len(caught)
        process = _start_locked(job, workdir, name, _share_of_cores(place, at_a_time))
        if process is not None:
            started.append(process)
            if len(caught) > before:  # the signal arrived while it was starting
                process.send_signal(caught[-1])
        return process

    def pass_on(number: int, _) -> None:
        caught.append(number)
        waiting.clear()
        living = [process for process in started if process.poll() is None]
        for process in living:
            process.send_signal(number)
        name = signal.Signals(number).name
        # Not on standard output, which the signal may have interrupted in the middle of a line.
        runs = "1 run" if len(living) == 1 else f"{len(living)} runs"
        print(f"{name}: passed on to {runs}; waiting until all have ended", file=sys.stderr)

    with _handling(heeded(), pass_on):
        for name, status in _ends(waiting, {}, begin, at_a_time=at_a_time):
            statuses[name] = status
            # A run that stops on request exits with 0, like a finished one.
            end = "stopped" if caught and status == 0 else describe(status)
            print(f"{time.time() - start:5.0f} s  {name} {end}", flush=True)
    return Outcome(statuses, caught[-1] if caught else None)


def describe(status: int | None) -> str:
    """How a run ended, in words."""
    if status is None:
        return "is being run by another process"
    number = -status if status < 0 else status - 128  # a shell's way, and that of our commands
    if number in signal.valid_signals():
        return f"ended by {signal.Signals(number).name}"
    return f"failed with status {status}" if status else "done"


def _ends(
    waiting: dict[str, Job],
    running: Running,
    begin: Callable[[str, Job, int], subprocess.Popen | None],
    *,
    at_a_time: int,
) -> Iterator[tuple[str, int | None]]:
    """Starts waiting jobs as soon as possible, and yields (name, status) as they end. Keeps
    `waiting` and `running` up to date; the caller may read and change them."""
    done = {None}  # so that jobs that need no other run can start
    while running or any(job.may_start(done) for job in waiting.values()):
        for name in [name for name, job in waiting.items() if job.may_start(done)]:
            if len(running) < at_a_time and name in waiting:
                place = min(set(range(at_a_time)) - {place for _, place in running.values()})
                process = begin(name, waiting.pop(name), place)
                if process is None:
                    yield name, None
                else:
                    running[name] = process, place
        time.sleep(0.2)
        for name, (process, _) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode == 0:
                done.add(name)
            yield name, process.returncode


def _start(job: Job, workdir: pathlib.Path, name: str, core: str) -> subprocess.Popen:
    """Starts a run of a demo on one core."""
    workdir = workdir.resolve()
    (workdir / name).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *job.command, f"--workdir={workdir / name}"]
    with open(workdir / f"{name}.log", "a") as log:
        # Most of the time is compilation, a fifth faster at this level; steps are as fast.
        xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1"
        environment = KEPT_MEMORY | os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
        # Networks this small run fastest on one core each; two threads would wait for each other.
        return subprocess.Popen(
            _on_cores(core, command), stdout=log, stderr=log, cwd=ROOT, env=environment
        )


def _start_locked(
    job: Job, workdir: pathlib.Path, name: str, cores: str
) -> subprocess.Popen | None:
    """Starts a run whose process keeps its log locked while it lives; None if another process holds
    the lock."""
    workdir = workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *job.command, f"--workdir={workdir / name}"]
    with open(workdir / f"{name}.log", "a") as log, open(workdir / f"{name}.log", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        # In a new session, Ctrl-C reaches the run only once, when it is passed on. The lock has its
        # own descriptor, since child processes of the run inherit the log's.
        return subprocess.Popen(
            _on_cores(cores, command),
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )


def _on_cores(cores: str, command: list[str]) -> list[str]:
    """The command pinned to these cores; unchanged if `cores` is "" or there is no taskset."""
    return ["taskset", "-c", cores, *command] if cores and shutil.which("taskset") else command


def _allowed_cores() -> list[int]:
    """The cores that this process may use; none if the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _own_core(place: int) -> str:
    """The core of a slot, of those that this process may use; "" if the system does not say."""
    cores = _allowed_cores()
    return str(cores[place % len(cores)]) if cores else ""


def _share_of_cores(place: int, places: int) -> str:
    """The cores of one of several slots, such as "0,1"; "" if there is not one for each."""
    if places == 1:
        return ""
    cores = _allowed_cores()
    each = len(cores) // places
    return ",".join(str(core) for core in cores[place * each : (place + 1) * each])


@contextlib.contextmanager
def _handling(numbers: Sequence[signal.Signals], handler: Callable) -> Iterator[None]:
    """Sends these signals to `handler` within the block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def mean_and_spread(results: Sequence[Mapping[str, float]], metric: str, *, unit: str = "") -> str:
    """`42.1 ± 9.6`: the mean and, for several runs, the sample standard deviation; "" if no run
    measured the metric."""
    values = [result[metric] for result in results if metric in result]
    if not values:
        return ""
    spread = f" ± {deviation(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}{unit}"


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; NaN if a value is not finite, which `statistics` rejects."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def read_curve(run: pathlib.Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every line of a run's metrics that has the metric."""
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line[metric]) for line in lines if metric in line]


def accuracies(run: pathlib.Path) -> dict[str, float]:
    """The accuracies of a run's last evaluation, in per cent."""
    return {
        name: 100 * value
        for name, value in read_json(run / "result.json").items()
        if name.endswith("accuracy")
    }


def show(table: Table) -> None:
    """Prints a table in aligned columns."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(table.header))]
    print(f"\n{table.caption}\n")
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "".join(cells).rstrip())
