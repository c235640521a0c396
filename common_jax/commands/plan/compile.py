"""Compiles a run's train step for TPUs or GPUs that you do not have; reports its memory and time.

Takes the config and flags of a run; reads neither data nor weights. If the config file has an
argument `chips` that is not given, it is set to the number of chips, as for a run on them.

  --topology=CHIP:SHAPE  v4, v5e, v5p or v6e and the shape of a slice, such as v5e:16x16; or
                         a100, h100, h200 or b200 with hosts and cards per host, such as h100:1x8
                         (default 1x1)
  --slices=N             TPUs: number of slices, which the data axis spans (default 1)
  --examples=N           size of the training set, which schedules need (default: the usual one)
  --tokens=N             runs on sentences: length that all are padded to (default 64)
  --encode[=texts]       runs on frozen features: the program that encodes texts, not the train step
  --encode=pictures      the same for pictures
  --json=PATH            also write the numbers as JSON
  --hlo=PATH             also write the compiled program's text

Exit status: 0 if the step fits on the chips, 1 if it does not, 2 if flags, config and topology
contradict each other, which is checked before anything is compiled, or 128 plus the number of the
signal that stopped it.
"""

import dataclasses
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from common_jax import app
from common_jax.command_line import run_config_file
from common_jax.commands.choice import choose
from common_jax.commands.plan.flops import Flops
from common_jax.commands.plan.launches import Launches
from common_jax.commands.plan.products import Products
from common_jax.commands.plan.sizing import (
    ArraySize,
    Sizing,
    bytes_text,
    collectives_text,
    largest_arguments,
    largest_kept,
    size_up,
)
from common_jax.commands.plan.steps import kept_shapes, lower_step, step_arguments
from common_jax.commands.plan.topology import describe_devices, read_topology
from common_jax.config import freeze
from common_jax.mesh import make_mesh
from common_jax.nn.dense import matmul_precision
from common_jax.optim import OptimConfig
from common_jax.task import Task
from common_jax.workdir import check_output_file

NOWHERE = "plan"  # a workdir that is never written
NO_ROOM = "RESOURCE_EXHAUSTED"
ENCODED = ("texts", "pictures")  # the inputs of frozen towers
SAVERS = ("config.optim.accumulate", "config.mesh.fsdp")  # fields that lower any run's memory


@dataclasses.dataclass(frozen=True)
class Options:
    """The tool's own flags; see the file's docstring."""

    topology: str = ""
    slices: int = 1
    examples: int | None = None
    tokens: int = 64
    encode: str = ""
    json: pathlib.Path | None = None
    hlo: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """A program to compile.

    Attributes:
      title: name for people.
      lowered: the program, traced and lowered for the devices of the mesh.
      arguments: shapes and shardings of its arguments, by name.
      flops: its operations, over all devices.
      kept: returns the largest arrays per device that are kept for the backward pass.
      savers: config fields that lower its memory.
    """

    title: str
    lowered: jax.stages.Lowered
    arguments: Any
    flops: Flops
    kept: Callable[[], list[ArraySize]]
    savers: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Planner:
    """What a package contributes to the plan.

    Attributes:
      config: the dataclass of its configs.
      step: (config, mesh, options) -> the program to compile.
      example: an example command for --help.
    """

    config: type
    step: Callable[[Any, Mesh, Options], Step]
    example: str


Planners = Mapping[str, Planner]  # by the config field that identifies the package


def train_step(
    task: Task,
    config: Any,
    optim: OptimConfig,
    mesh: Mesh,
    savers: Sequence[str],
    *,
    flops: Flops,
) -> Step:
    """The train step of a task, ready to compile."""
    run = config.run
    lowered, abstract = lower_step(
        task, optim, mesh, log_every=run.log_every, averaged=run.average_last > 1
    )
    state, helpers, batch, _ = step_arguments(task, optim, abstract, mesh)
    parts = {name: getattr(state, name) for name in ("params", "opt_state", "ema")}

    def kept() -> list[ArraySize]:
        return largest_kept(kept_shapes(task), state.params, devices=mesh.size)

    return Step(
        title=f"step of {task.title}",
        lowered=lowered,
        arguments=parts | {"helpers": helpers, "batch": batch},
        flops=flops,
        kept=kept,
        savers=("config.optim.accumulate", "config.mesh.fsdp", *savers, *precision_savers(config)),
    )


def precision_savers(config: Any) -> tuple[str, ...]:
    """The precision field, if it could be lowered."""
    return () if config.precision == "bfloat16" else ("config.precision=bfloat16",)


def placed_on(shapes: Any, sharding: jax.sharding.Sharding) -> Any:
    """The shapes, all with the same sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def compile_step(config: ml_collections.ConfigDict, options: Options, planners: Planners) -> int:
    """Compiles, prints the numbers, and returns the exit status."""
    logging.getLogger().setLevel(logging.WARNING)
    topology = read_topology(options.topology, slices=options.slices)
    chip, devices = topology.chip, describe_devices(topology)
    planner = choose(config, planners)
    frozen = freeze(planner.config, config)
    mesh = make_mesh(frozen.mesh, devices)
    start = time.perf_counter()
    with matmul_precision(frozen.matmul_precision):
        step = planner.step(frozen, mesh, options)
    traced = time.perf_counter()
    print(
        f"{step.title} on {mesh.size} {chip.unit}{'s' * (mesh.size > 1)}, {options.slices} x "
        f"{topology.name}: " + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        f"traced in {traced - start:.0f} s, compiling",
        sep="\n",
        flush=True,
    )
    found = {
        "title": step.title,
        "topology": topology.name,
        "slices": options.slices,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "chip": dataclasses.asdict(chip),
        "model_flops": step.flops.model,
        "executed_flops": step.flops.executed,
    }
    compiled, problem = None, ""
    used = time.process_time()
    try:
        compiled = step.lowered.compile(topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if NO_ROOM not in str(error):
            raise
        problem = str(error).splitlines()[0]
    found["compile_seconds"] = time.perf_counter() - traced
    found["compile_cpu_seconds"] = time.process_time() - used
    if compiled is not None:
        sizing = size_up(compiled, step.flops, chip, devices=mesh.size, groups=topology.groups)
        found |= as_json(sizing)
        times = (
            f"{found['compile_seconds']:.0f} s, {found['compile_cpu_seconds']:.0f} s of CPU time"
        )
        print(*as_lines(sizing), f"compiled in {times}", sep="\n")
        if sizing.memory.total > chip.hbm:
            problem = f"the step takes {bytes_text(sizing.memory.total)}"
    large = largest_arguments(step.arguments) + (step.kept() if problem else [])
    found |= {"fits": not problem, "problem": problem}
    found["largest"] = [dataclasses.asdict(one) for one in large]
    if problem:
        print(
            f"DOES NOT FIT: a {chip.unit} of {topology.kind} has {bytes_text(chip.hbm)} of HBM; "
            f"{problem}",
            f"largest of a {chip.unit}, arguments first:",
            *(f"  {bytes_text(one.bytes)}  {one.name}  {one.shape}" for one in large),
            "fields that lower it: " + ", ".join(step.savers),
            sep="\n",
        )
    # Files last, the largest after the others: a full disk loses no more than it must.
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.hlo is not None and compiled is not None:
        options.hlo.write_text(compiled.as_text())
    return 1 if problem else 0


def as_lines(sizing: Sizing) -> list[str]:
    """The numbers of a step, for people."""
    memory, seconds, flops = sizing.memory, sizing.seconds, sizing.flops
    parts = {
        "arguments": memory.arguments,
        "temporaries": memory.temporaries,
        "output": memory.output,
    }
    parts |= {"of it aliased": memory.aliased, "code": memory.code}
    times = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    unit = sizing.chip.unit
    return [
        f"HBM per {unit}: {bytes_text(memory.total)} of {bytes_text(sizing.chip.hbm)} ("
        + ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items())
        + ")",
        f"model FLOPs: {flops.model:.4g} per step, {flops.model / sizing.devices:.4g} per {unit}; "
        f"{flops.again / max(flops.model, 1):.0%} of them recomputed",
        *_products_line(sizing.products),
        f"collectives: {collectives_text(sizing.collectives, sizing.chip) or 'none'}",
        f"HBM traffic per {unit}: {bytes_text(sizing.traffic)} per step",
        *_launches_line(sizing.launches),
        f"roofline: {1e3 * sizing.step_seconds:.2f} ms per step ({times})",
        f"MFU at most {sizing.mfu:.1%}",
        *_open_loop_lines(sizing.open_loops),
    ]


def _products_line(products: Products | None) -> list[str]:
    if products is None:
        return []
    calls = ", ".join(f"{name} {count}" for name, count in sorted(products.calls.items()))
    flops = ", ".join(f"{count:.4g} on {kind}" for kind, count in sorted(products.flops.items()))
    return [f"products per card: {calls or 'none'}; FLOPs {flops or 'none'}"]


def _launches_line(launches: Launches | None) -> list[str]:
    if launches is None:
        return []
    return [f"launches: {launches.kernels:,} per step; the host waits {launches.waits:,} times"]


def _open_loop_lines(loops: Mapping[int | None, int]) -> list[str]:
    lines = [
        f"loops whose length depends on data: {count}, counted with {turns} iterations, the most "
        "that the shapes of what they slice allow"
        for turns, count in sorted(pair for pair in loops.items() if pair[0])
    ]
    if None in loops:
        lines.append(f"loops of unknown length, counted as run once: {loops[None]}")
    return lines


def as_json(sizing: Sizing) -> dict[str, Any]:
    """The numbers of a step, for programs."""
    return {
        "hbm_bytes": sizing.memory.total,
        "memory": dataclasses.asdict(sizing.memory),
        "hbm_traffic_bytes": sizing.traffic,
        "collectives": [dataclasses.asdict(one) for one in sizing.collectives],
        "roofline_seconds": sizing.seconds,
        "step_seconds": sizing.step_seconds,
        "mfu_bound": sizing.mfu,
        "unknown_loops": sizing.open_loops.get(None, 0),
        "open_loops": [
            {"turns": turns, "loops": count}
            for turns, count in sizing.open_loops.items()
            if turns is not None
        ],
        "launches": sizing.launches and dataclasses.asdict(sizing.launches),
        "products": sizing.products and dataclasses.asdict(sizing.products),
    }


def _config_with_chips(arguments: Sequence[str], chips: int) -> list[str]:
    """The command line with `with_chips` applied to the value of --config."""
    found, pending = [], list(arguments)
    while pending:
        argument = pending.pop(0)
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config") and (equals or pending):
            argument = f"--config={with_chips(value if equals else pending.pop(0), chips)}"
        found.append(argument)
    return found


def with_chips(text: str, chips: int) -> str:
    """FILE:ARGS of --config, with `chips` added if the file has that argument and ARGS lacks it."""
    file, _, args = text.partition(":")
    try:
        known = run_config_file(file).get("ARGUMENTS", {})
    except app.USER_ERRORS:  # reported later, when the config is read
        return text
    if "chips=" in args or "chips" not in known:
        return text
    return f"{file}:{args},chips={chips}" if args else f"{file}:chips={chips}"


def read_options(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Splits the arguments into the tool's flags, --name=value or --name value, and the others.

    Raises:
      ValueError: for a value that is not a number from 1, or not something that a tower reads.
      OSError: for a file that cannot be written.
    """
    known = {field.name: field for field in dataclasses.fields(Options)}
    values, rest, pending = {}, [], list(arguments)
    while pending:
        argument = pending.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in known:
            rest.append(argument)
            continue
        if name == "encode":
            values[name] = value if equals else ENCODED[0]
            if values[name] not in ENCODED:
                raise ValueError(f"--encode={value} must be one of {list(ENCODED)}")
            continue
        value = value if equals else pending.pop(0) if pending else ""
        if name in ("slices", "examples", "tokens"):
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"--{name}={value} must be a number from 1")
            value = int(value)
        elif name in ("json", "hlo"):
            value = check_output_file(f"--{name}", value)
        values[name] = value
    return Options(**values), rest


def main(argv: Sequence[str], planners: Planners) -> None:
    """Runs the command, and exits with its status.

    Args:
      argv: the command line, starting with the program's name.
      planners: the planners of the packages whose configs it accepts.
    """
    # Described devices are compiled for without a device, and real ones must not be claimed.
    jax.config.update("jax_platforms", "cpu")
    try:
        options, rest = read_options(argv[1:])
        if not {"--help", "-h"} & set(rest):
            chips = read_topology(options.topology, slices=options.slices).devices
            rest = _config_with_chips(rest, chips)
    except app.USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    app.run(
        lambda config, _: sys.exit(compile_step(config, options, planners)),
        "\n".join([__doc__, *(planner.example for planner in planners.values())]),
        [argv[0], f"--workdir={NOWHERE}", "--hosts=one", *rest],
        lost="nothing was planned",
    )
