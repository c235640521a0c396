"""Eight virtual CPU devices and one cache of compiled programs for every test of a session.

Both must be set before jax is first imported; test processes and the runs that they start inherit
them.
"""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module")
def compiled_quickly():
    """For files that compile much and compute little: `tiny.quickly` around all of their tests."""
    from tiny import quickly  # which imports jax

    with quickly():
        yield


@pytest.fixture(scope="module")
def little_optimised():
    """For files that compile much at first use: `tiny.unoptimised` around all of their tests."""
    from tiny import unoptimised

    with unoptimised():
        yield
