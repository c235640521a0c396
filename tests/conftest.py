"""Eight virtual CPU devices, quick compilation and one cache of compiled programs for every test of
a session.

All must be set before jax is first imported; test processes and the runs that they start inherit
them.
"""

import atexit
import ctypes
import gc
import importlib.metadata
import importlib.util
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
# Most tests compile much and compute little. Each operation outside of a program is compiled too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# In pieces, or with fusions by MLIR, XLA takes half as long again to compile the same program.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
version = importlib.metadata.version("jax").split(".")
# Later versions have only MLIR's; libtpu does not know the flag, and ends the process that has it.
if (int(version[0]), int(version[1])) < (0, 11) and not importlib.util.find_spec("libtpu"):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    # Small ones as well: most are of several files, and reading one is quicker than compiling it.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leaves out the files of tests/quick.py")


def pytest_ignore_collect(collection_path, config):
    """Ignores slow files where they are not asked for; None leaves the decision to others."""
    return True if config.getoption("quick") and is_slow(collection_path) else None


def pytest_collection_finish():
    """Looks for cycles seldom, and never among what was imported: tracing makes so many small
    objects that this took a quarter of its time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


ROOM = 1e9  # bytes of a test process, beyond which it forgets its compiled programs


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """After a file's tests the process drops its compiled programs, which else come to gigabytes;
    not where it is small, since the next file may share some."""
    yield
    if resident() < ROOM:
        return
    import jax

    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the memory stays with the process


def resident() -> int:
    """Bytes of memory that this process takes."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def no_log_handler_outlives_its_test():
    """Removes the handler that a command adds to the root logger: its stream is the test's."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in list(root.handlers):
        if handler not in before and not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)


@pytest.fixture(scope="module")
def optimised():
    """For files that need what compilers make of a program outside of tests."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)
