"""Prints the bytes that a run's train step needs on this machine's CPU: its arguments (parameters,
optimizer, frozen weights, batch) and, as XLA plans them, its temporaries (gradients, activations).
Nothing is read or computed.

    python -m rehearsal.ideal TOKENS --config=FILE:ARGS [--config.x=y ...]
"""

import sys

from cliptrans_jax.commands.plan import planner as plan_cliptrans
from common_jax import app
from common_jax.commands.choice import choose
from common_jax.commands.plan.compile import Options
from common_jax.config import freeze
from common_jax.mesh import make_mesh
from common_jax.nn.dense import matmul_precision
from m2mkd_jax.commands.plan import planner as plan_m2mkd

EXAMPLES = 64  # size of the training set; memory does not depend on it


def main() -> None:
    tokens, flags = int(sys.argv[1]), sys.argv[2:]
    config = app.read_config([sys.argv[0], "--workdir=nowhere", *flags])
    planner = choose(config, {"stage": plan_cliptrans(), "phase": plan_m2mkd()})
    frozen = freeze(planner.config, config)
    mesh = make_mesh(frozen.mesh)
    with matmul_precision(frozen.matmul_precision):
        step = planner.step(frozen, mesh, Options(tokens=tokens, examples=EXAMPLES))
    memory = step.lowered.compile().memory_analysis()
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(memory.argument_size_in_bytes + memory.temp_size_in_bytes + own)


if __name__ == "__main__":
    main()
