"""Starts runs in their own processes, either one process or two that form one run, so that tests
can disturb them."""

import atexit
import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax

ROOT = pathlib.Path(__file__).parents[1]
DEADLINE = 300  # maximum seconds to wait for anything
# 44 updates in 4 epochs of the digits, with random augmentation, drop path and averaging.
DIGITS = (
    "m2mkd_jax.main",
    "--config=configs/m2mkd/digits.py:phase=end_to_end",
    "--config.model.depths=(1,1)",
    "--config.meta.depths=(1,1)",
    "--config.teacher.depths=(1,1)",
    "--config.model.width=16",
    "--config.data.image_size=8",
    "--config.model.patch=4",
    "--config.drop_path=0.1",
    "--config.optim.ema=0.9",
    "--config.optim.batch=128",
    "--config.optim.steps=44",
    "--config.optim.warmup_epochs=1",
    "--config.run.log_every=3",
    "--config.run.eval_every=1",
    "--config.run.checkpoint_every=1",
    "--config.run.compilation_cache=None",
)
# Later versions of XLA cannot compile fusions in any other way.
FUSIONS_BY_LLVM = jax.__version_info__ < (0, 11)
QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if FUSIONS_BY_LLVM:
    QUICKLY += " --xla_cpu_use_fusion_emitters=false"


@dataclasses.dataclass(frozen=True)
class Started:
    """A process, and the file that its output goes to."""

    process: subprocess.Popen
    log: pathlib.Path

    def output(self) -> str:
        return self.log.read_text()

    def running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> int:
        """Waits for the process to end; returns its exit status."""
        return self.process.wait(timeout=DEADLINE)

    def finish(self) -> str:
        """Waits for the process to end successfully; returns its output."""
        assert self.end() == 0, self.output()
        return self.output()

    def send(self, number: int, when: Callable[[], bool] = lambda: True) -> None:
        """Sends a signal once the condition holds, which must be before the process ends."""
        deadline = time.monotonic() + DEADLINE
        while not when():
            assert self.running(), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.0005)
        self.process.send_signal(number)

    def kill(self, when: Callable[[], bool]) -> None:
        """Kills the process once the condition holds."""
        self.send(signal.SIGKILL, when)
        self.process.wait()


def start(
    workdir: pathlib.Path,
    *more: str,
    run: tuple[str, ...] = DIGITS,
    devices: int = 1,
    log: pathlib.Path | None = None,
) -> Started:
    """Starts a run in one process, with its output in a file next to the workdir by default."""
    return _start(workdir, (*run, *more), devices, log=log or workdir.with_suffix(".log"))


@contextlib.contextmanager
def pair(
    workdir: pathlib.Path,
    *more: str,
    run: tuple[str, ...] = DIGITS,
    devices: int = 4,
    second: tuple[str, ...] = (),
) -> Iterator[list[Started]]:
    """Starts a run in two processes, the second one with more flags; kills those that are left at
    the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        _start(
            workdir,
            (
                *(*run, *more, *(second if process else ())),
                *(f"--coordinator={address}", "--processes=2", f"--process={process}"),
            ),
            devices,
            log=workdir.with_suffix(f".{process}.log"),
        )
        for process in range(2)
    ]
    try:
        yield started
    finally:
        for one in started:
            if one.running():
                one.process.kill()
                one.process.wait()


def finish_pair(
    workdir: pathlib.Path, *more: str, run: tuple[str, ...] = DIGITS, devices: int = 4
) -> list[str]:
    """Runs two processes of one run undisturbed; returns their outputs."""
    with pair(workdir, *more, run=run, devices=devices) as processes:
        return finish_all(processes)


def finish_all(processes: Sequence[Started]) -> list[str]:
    """Waits until the processes of a run end successfully; returns their outputs. If one fails or
    hangs, the error has all outputs, since the first often says only that another process is
    missing."""
    for process in processes:
        try:
            ended = process.end() == 0
        except subprocess.TimeoutExpired:
            ended = False
        assert ended, "\n\n".join(one.output() for one in processes)
    return [process.output() for process in processes]


def says(path: pathlib.Path, text: str) -> bool:
    """Whether a file exists and contains the text."""
    return path.exists() and text in path.read_text()


def _start(workdir, arguments, devices: int, *, log: pathlib.Path) -> Started:
    module, *flags = arguments
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"{QUICKLY} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    command = [sys.executable, "-m", module, *flags, f"--workdir={workdir}"]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    atexit.register(process.kill)  # has no effect on a process that has ended
    return Started(process, log)
