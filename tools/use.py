"""Runs commands that use what a demo has trained, and shows them as a user would type them."""

import os
import shlex
import subprocess
import sys

PROGRAMS = {"m2mkd": "m2mkd_jax", "cliptrans": "cliptrans_jax"}


def show_use(program: str, *arguments: str) -> None:
    """Prints the command line and runs it; exits with its status unless that is 0.

    Args:
      program: a key of PROGRAMS.
      arguments: its arguments.
    """
    print(f"\n$ {shlex.join([program, *arguments])}", flush=True)
    command = [sys.executable, "-m", PROGRAMS[program], *arguments]
    # The network runs once, so most of the time is compilation.
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    result = subprocess.run(command, env=environment, check=False)
    if result.returncode != 0:
        sys.exit(result.returncode)
