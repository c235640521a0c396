"""Sets up eight virtual CPU devices, fast compilation and one compilation cache per session.

All of it must be set before jax is first imported. Test processes and the runs that they start
inherit it.
"""

import atexit
import ctypes
import errno
import gc
import importlib.metadata
import importlib.util
import io
import logging
import os
import pathlib
import shutil
import tempfile

import pytest
from quick import is_slow

os.environ["JAX_PLATFORMS"] = "cpu"
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
# Most tests compile a lot and compute little. Every op outside of jit is compiled too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# With split codegen, or with MLIR fusion emitters, XLA takes 1.5 times as long to compile.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
version = importlib.metadata.version("jax").split(".")
# Later versions have only the MLIR emitters; libtpu does not know the flag and aborts on it.
if (int(version[0]), int(version[1])) < (0, 11) and not importlib.util.find_spec("libtpu"):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    # Cache small programs too: most occur in several test files, and reading beats compiling.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leaves out the files of tests/quick.py")


def pytest_ignore_collect(collection_path, config):
    """Ignores slow files under --quick; None leaves the decision to other plugins."""
    return True if config.getoption("quick") and is_slow(collection_path) else None


def pytest_collection_modifyitems(items):
    """Puts slow files first: a worker that begins one at the end leaves the others idle."""
    items.sort(key=lambda item: not is_slow(item.path))


def pytest_collection_finish():
    """Makes garbage collection rare, and exempts everything imported so far: tracing allocates so
    many small objects that the collector took a quarter of its time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


ROOM = 1e9  # resident bytes above which a test process drops its compiled programs


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """Drops the process's compiled programs after each test file, since they would add up to
    gigabytes. A small process keeps them: the next file may share some."""
    yield
    if resident() < ROOM:
        return
    import jax

    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise glibc keeps the freed memory


def resident() -> int:
    """Resident memory of this process in bytes."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def logging_is_restored():
    """Undoes what a command does to logging: its handler writes to the test's captured stream, and
    its levels decide what a later test finds in `caplog`."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    loggers = [root, *map(logging.getLogger, ("absl", "jax", "orbax"))]
    levels = [logger.level for logger in loggers]
    yield
    for handler in list(root.handlers):
        if handler not in handlers and not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def make_unreadable(monkeypatch):
    """make_unreadable(path): from now on the system refuses to open or list it, even for root."""

    def closing(function, closed):
        def call(path=".", *args, **settings):
            if str(path) == str(closed):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *args, **settings)

        return call

    def make(closed):
        for module, name in ((os, "scandir"), (os, "listdir"), (io, "open")):
            monkeypatch.setattr(module, name, closing(getattr(module, name), closed))

    return make


@pytest.fixture(scope="module")
def optimised():
    """Turns XLA's optimisations back on, for files that test the programs it compiles."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)
