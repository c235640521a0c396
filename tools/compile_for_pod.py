"""Compiles a run's train step for a TPU pod that need not be there; reports its memory and time.

    python tools/compile_for_pod.py --config=configs/m2mkd/vmoe_base.py:phase=end_to_end \\
        --topology=v5e:16x16
    python tools/compile_for_pod.py --config=configs/cliptrans/multi30k.py:stage=translate \\
        --topology=v5e:16x16 --json=translate.json

Takes the config and flags of a run of either package; neither data nor weights are read. Where the
config file has an argument `chips` and none is given, it gets the number of chips: the program is
that of a run with that argument. docs/sizing.md explains the numbers.

  --topology=CHIP:SHAPE  v4, v5e, v5p or v6e and the shape of a slice, such as v5e:16x16
  --slices=N             so many slices, over which the data axis runs (default 1)
  --examples=N           size of the training set, which schedules need (default: that of ImageNet,
                         or of Multi30k)
  --tokens=N             of CLIPTrans: length to which all sentences are padded (default 64)
  --encode               of CLIPTrans: the program of the frozen text tower, not the train step
  --json=PATH            also writes the numbers as JSON
  --hlo=PATH             also writes the compiled program's text

Exit status 0 if the step fits the chips, 1 if it does not, 2 if flags, config or topology do not
fit each other, which is checked before anything is compiled.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh
from plan.chips import chip_of, describe_devices
from plan.flops import Flops, count_flops
from plan.sizing import (
    ArraySize,
    Sizing,
    bytes_text,
    collectives_text,
    largest_arguments,
    largest_kept,
    size_up,
)
from plan.steps import kept_shapes, lower_step, step_arguments, step_flops

from cliptrans_jax import config as cliptrans
from cliptrans_jax.features import encode_program
from cliptrans_jax.main import check_run as check_cliptrans
from cliptrans_jax.runs import translation
from cliptrans_jax.runs.run_data import describe_text
from cliptrans_jax.stages import TRANSLATION_STAGES
from common_jax import app
from common_jax.command_line import run_config_file
from common_jax.config import freeze
from common_jax.inputs import steps_per_epoch
from common_jax.mesh import batched, make_mesh, replicated
from common_jax.optim import OptimConfig
from common_jax.task import Task
from m2mkd_jax import config as m2mkd
from m2mkd_jax.families import family_of
from m2mkd_jax.main import check_run as check_m2mkd
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.pipeline import describe

NOWHERE = "compile_for_pod"  # a workdir that is never written
IMAGENET, MULTI30K = 1_281_167, 29_000
NO_ROOM = "RESOURCE_EXHAUSTED"
SAVERS = ("config.optim.accumulate", "config.mesh.fsdp")  # that lower the memory of any run


@dataclasses.dataclass(frozen=True)
class Options:
    """The tool's own flags; see the file's docstring."""

    topology: str = ""
    slices: int = 1
    examples: int | None = None
    tokens: int = 64
    encode: bool = False
    json: str = ""
    hlo: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """A program to compile.

    Attributes:
      title: for people.
      lowered: traced, for the devices of the mesh.
      arguments: shapes and shardings, by name.
      flops: its operations over all devices.
      kept: returns the largest arrays that it keeps for a backward pass, a device's share.
      savers: config fields that lower its memory.
    """

    title: str
    lowered: jax.stages.Lowered
    arguments: Any
    flops: Flops
    kept: Callable[[], list[ArraySize]]
    savers: Sequence[str]


def m2mkd_step(config: m2mkd.Config, mesh: Mesh, options: Options) -> Step:
    """The train step of a phase."""
    training = describe(config, mesh)
    check_m2mkd(config, mesh)
    examples = options.examples or max(IMAGENET, config.optim.batch)
    epoch = steps_per_epoch(examples, config.optim.batch)
    task = training.task(steps_per_epoch=epoch)
    sections = PHASES[config.phase].differentiates
    savers = [f"config.{name}.remat" for name in sections]
    savers += [field for name in sections for field in family_of(getattr(config, name)).savers]
    return train_step(
        task, config, config.optim, mesh, savers, flops=step_flops(task, config.optim)
    )


def cliptrans_step(asked: cliptrans.Config, mesh: Mesh, options: Options) -> Step:
    """The train step of a stage of the table, or the program of the frozen text tower."""
    if options.encode:
        return encode_step(asked, mesh, options)
    if asked.stage not in TRANSLATION_STAGES:
        raise ValueError(
            f"config.stage={asked.stage!r} must be one of {list(TRANSLATION_STAGES)}, each of "
            "which is a program of its own"
        )
    check_cliptrans(asked, mesh)
    optim = asked.apply_parity().optim
    examples = options.examples or max(MULTI30K, optim.batch)
    sizes = {"examples": examples, "tokens": options.tokens}
    task = translation.describe(asked, mesh, **sizes)
    # The length of a loop over chunks of labels is data; in one chunk operations can be counted.
    whole = dataclasses.replace(asked, label_chunk=optim.batch * options.tokens)
    flops = step_flops(translation.describe(whole, mesh, **sizes), optim)
    savers = ["config.model.mbart.remat", "config.label_chunk"]
    return train_step(task, asked, optim, mesh, savers, flops=flops)


def encode_step(config: cliptrans.Config, mesh: Mesh, options: Options) -> Step:
    """The program of features of sentences, with all parameters on every device."""
    tower = describe_text(config)
    batch = tower.batch_shapes(mesh, tokens=options.tokens)
    placed, rows = placed_on(batch, batched(mesh)), placed_on(batch["_mask"], batched(mesh))
    params = placed_on(tower.params, replicated(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = encode_program(tower.apply_batch, mesh).lower(params, placed, rows)
    return Step(
        title=f"features of {len(batch['ids'])} sentences of {batch['ids'].shape[1]} tokens",
        lowered=lowered,
        arguments={"params": params, "batch": placed},
        flops=count_flops(tower.apply_batch, tower.params, batch),
        kept=list,
        savers=precision_savers(config),
    )


def train_step(
    task: Task,
    config: m2mkd.Config | cliptrans.Config,
    optim: OptimConfig,
    mesh: Mesh,
    savers: Sequence[str],
    *,
    flops: Flops,
) -> Step:
    """The step of a task."""
    lowered, abstract = lower_step(task, optim, mesh, log_every=config.run.log_every)
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


def precision_savers(config: m2mkd.Config | cliptrans.Config) -> tuple[str, ...]:
    """The precision, where it could be lower."""
    return () if config.precision == "bfloat16" else ("config.precision=bfloat16",)


def placed_on(shapes: Any, sharding: jax.sharding.Sharding) -> Any:
    """The shapes, all of them with one sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def compile_step(config: ml_collections.ConfigDict, options: Options) -> int:
    """Compiles, prints the numbers, and returns the exit status."""
    logging.getLogger().setLevel(logging.WARNING)
    chip = chip_of(options.topology)
    devices = describe_devices(options.topology, slices=options.slices)
    package, make = (cliptrans, cliptrans_step) if "stage" in config else (m2mkd, m2mkd_step)
    frozen = freeze(package.Config, config)
    mesh = make_mesh(frozen.mesh, devices)
    start = time.perf_counter()
    step = make(frozen, mesh, options)
    traced = time.perf_counter()
    print(
        f"{step.title} on {mesh.size} chips, {options.slices} x {options.topology}: "
        + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        f"traced in {traced - start:.0f} s, compiling",
        sep="\n",
        flush=True,
    )
    found = {
        "title": step.title,
        "topology": options.topology,
        "slices": options.slices,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "chip": dataclasses.asdict(chip),
        "model_flops": step.flops.model,
        "executed_flops": step.flops.executed,
    }
    sizing, problem = None, ""
    used = time.process_time()
    try:
        compiled = step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if NO_ROOM not in str(error):
            raise
        problem = str(error).splitlines()[0]
    found["compile_seconds"] = time.perf_counter() - traced
    found["compile_cpu_seconds"] = time.process_time() - used
    if not problem:
        if options.hlo:
            pathlib.Path(options.hlo).write_text(compiled.as_text())
        sizing = size_up(compiled, step.flops, chip, devices=mesh.size, slices=options.slices)
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
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    if not problem:
        return 0
    kind = options.topology.partition(":")[0]
    print(
        f"DOES NOT FIT: a chip of {kind} has {bytes_text(chip.hbm)} of HBM; {problem}",
        "largest of a chip, arguments first:",
        *(f"  {bytes_text(one.bytes)}  {one.name}  {one.shape}" for one in large),
        "fields that lower it: " + ", ".join(step.savers),
        sep="\n",
    )
    return 1


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
    lines = [
        f"HBM per chip: {bytes_text(memory.total)} of {bytes_text(sizing.chip.hbm)} ("
        + ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items())
        + ")",
        f"model FLOPs: {flops.model:.4g} per step, {flops.model / sizing.devices:.4g} per chip; "
        f"computed again {flops.again / max(flops.model, 1):.0%} of them",
        f"collectives: {collectives_text(sizing.collectives) or 'none'}",
        f"HBM traffic per chip: {bytes_text(sizing.traffic)} per step",
        f"roofline: {1e3 * sizing.step_seconds:.2f} ms per step ({times})",
        f"MFU at most {sizing.mfu:.1%}",
    ]
    if sizing.unknown_loops:
        lines.append(f"loops of unknown length, counted as run once: {sizing.unknown_loops}")
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
        "unknown_loops": sizing.unknown_loops,
    }


def with_chips(text: str, chips: int) -> str:
    """FILE:ARGS of --config, with `chips` added where the file has it and it is not given."""
    file, _, args = text.partition(":")
    if "chips=" in args or not os.path.exists(file):
        return text
    if "chips" not in run_config_file(file).get("ARGUMENTS", {}):
        return text
    return f"{file}:{args},chips={chips}" if args else f"{file}:chips={chips}"


def read_options(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The tool's flags, as --name=value or --name value, and the others.

    Raises:
      ValueError: for a value that is no number from 1.
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
            values[name] = True
            continue
        value = value if equals else pending.pop(0) if pending else ""
        if name in ("slices", "examples", "tokens"):
            if not value.isdigit() or int(value) < 1:
                raise ValueError(f"--{name}={value} must be a number from 1")
            value = int(value)
        values[name] = value
    return Options(**values), rest


def main(argv: Sequence[str]) -> None:
    """The command; exits with 0, 1 or 2."""
    jax.config.update("jax_platforms", "cpu")
    try:
        options, rest = read_options(argv[1:])
        if "--help" not in rest:
            chip_of(options.topology)
            chips = options.slices * math.prod(map(int, options.topology.split(":")[1].split("x")))
            rest = [
                f"--config={with_chips(one.removeprefix('--config='), chips)}"
                if one.startswith("--config=")
                else one
                for one in rest
            ]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    app.run(
        lambda config, _: sys.exit(compile_step(config, options)),
        __doc__,
        [argv[0], f"--workdir={NOWHERE}", "--hosts=one", *rest],
    )


if __name__ == "__main__":
    main(sys.argv)
