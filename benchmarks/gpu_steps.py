"""Cases of `gpu.py`: training steps of published configs in bfloat16, and decoding."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from unittest import mock

import jax
import numpy as np
from decode import FIRST_WORD, LANGUAGE
from gpu_timing import chained, rate, run_case, say
from jax import numpy as jnp
from timing import Training

from cliptrans_jax import config as cliptrans
from cliptrans_jax.decode import DecodeConfig, Search
from cliptrans_jax.models.cliptrans import ModelConfig, Translator
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.runs import translation
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.command_line import read_config_file
from common_jax.commands.plan.steps import step_flops
from common_jax.config import freeze
from common_jax.inputs import steps_per_epoch
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.optim import OptimConfig
from common_jax.task import Task
from m2mkd_jax import config as m2mkd
from m2mkd_jax.moe import dispatch, grouped
from m2mkd_jax.phases.pipeline import describe

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
IMAGENET, MULTI30K = 1_281_167, 29_000  # training examples
TOKENS = 64  # per sentence

Fields = Mapping[str, Any]
C = TypeVar("C")


def load(cls: type[C], file: str, fields: Fields) -> C:
    """The config of FILE.py:ARGUMENTS in bfloat16, with `fields` set by path."""
    config = read_config_file(f"{CONFIGS / file}")
    config.update_from_flattened_dict({"precision": "bfloat16", **fields})
    return freeze(cls, config)


def random_batch(
    task: Task, optim: OptimConfig, numbers: Mapping[str, tuple[int, int]]
) -> dict[str, np.ndarray]:
    """All micro-batches of a step: integers from the range that `numbers` gives an array, else
    normal draws."""
    draw, batch = np.random.default_rng(0), {}
    for name, leaf in task.batch.items():
        shape = optim.accumulate * leaf.shape[0], *leaf.shape[1:]
        drawn = draw.integers(*numbers[name], shape) if name in numbers else draw.normal(size=shape)
        batch[name] = drawn.astype(leaf.dtype)
    return batch


def measure_step(
    case: str,
    task: Task,
    optim: OptimConfig,
    batch: Mapping[str, np.ndarray],
    *,
    flops: float,
    note: str,
) -> None:
    """Times the step of a run with random weights; reports the losses of the first three steps."""
    step = Training(task, optim, batch)
    losses = [float(step()) for _ in range(3)]
    times = chained(step)
    stats = jax.local_devices()[0].memory_stats() or {}
    say(
        case,
        **times,
        **rate(times, flops),
        compile_s=step.compile_seconds,
        losses=losses,
        temp_gb=step.compiled.memory_analysis().temp_size_in_bytes / 1e9,
        peak_gb=stats.get("peak_bytes_in_use", 0) / 1e9,
        note=note,
    )


# Image networks.

VMOE = "m2mkd/vmoe_base.py:phase=end_to_end"
TINY_VIT = {"depths": (1, 1, 1, 1), "width": 64, "heads": 4}
TINY_NAC = {
    "mediators": 24, "inputs": 16, "iterations": 2, "width": 64, "code_width": 64,
    "heads": 2, "head_width": 32,
}  # fmt: skip


def below(section: str, fields: Fields) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in fields.items()}


def measure_phase(
    case: str,
    file: str,
    fields: Fields,
    note: str = "",
    patch: AbstractContextManager | None = None,
) -> None:
    """Times the step of a phase under `patch`; FLOPs are counted without it."""
    config = load(m2mkd.Config, file, fields)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    training = describe(config, mesh)
    task = training.task(steps_per_epoch=steps_per_epoch(IMAGENET, config.optim.batch))
    batch = random_batch(task, config.optim, {"image": (0, 256), "label": (0, config.data.labels)})
    flops = step_flops(task, config.optim).model
    with patch or nullcontext():
        measure_step(case, task, config.optim, batch, flops=flops, note=note)


def measure_vitl(tiny: bool) -> None:
    """ViT-Large, all blocks trained."""
    fields = below("teacher", TINY_VIT) if tiny else {"teacher.scan_layers": True}
    fields |= {"optim.batch": 4 if tiny else 128}
    attention = "attention by cuDNN where there is a GPU, else by XLA"
    measure_phase("vitl_step", "m2mkd/vmoe_base.py:phase=assemble", fields, attention)


def vmoe_fields(tiny: bool) -> dict[str, Any]:
    return {"optim.batch": 4, **below("model", TINY_VIT)} if tiny else {"optim.batch": 128}


def measure_vmoe_triton(tiny: bool) -> None:
    """Dropless dispatch, as runs compute it."""
    note = "the block loop, as on any CPU" if tiny else "Pallas-Triton kernels"
    measure_phase("vmoe_triton_step", VMOE, vmoe_fields(tiny), note)


def measure_vmoe_dropless(tiny: bool) -> None:
    """Dropless dispatch by the block loop, the fallback for GPUs without Triton and odd widths."""

    def loop(x, weight, experts, rows):
        return grouped.grouped_mlp(x, weight, experts, rows, grouped.BLOCKWISE)

    def block(pairs, experts, **_):
        return grouped.block_size(pairs, experts, jax.default_backend())

    # The length of this loop is data, so FLOPs in it cannot be counted.
    patch = mock.patch.multiple(dispatch, grouped_mlp=loop, block_for_target=block)
    measure_phase("vmoe_dropless_step", VMOE, vmoe_fields(tiny), "the block loop", patch)


def measure_vmoe_capacity(tiny: bool) -> None:
    """Capacity dispatch, which drops pairs."""
    fields = vmoe_fields(tiny) | {"model.moe.dispatch": "capacity"}
    measure_phase("vmoe_capacity_step", VMOE, fields, "drops pairs")


def measure_nac(case: str, attention: str, tiny: bool) -> None:
    """The NAC for ImageNet, trained end to end."""
    if tiny and attention == "cudnn":
        say(case, error="left out: cuDNN needs a GPU")
        return
    fields = {"optim.batch": 2 if tiny else 64, "model.attention": attention}
    if tiny:
        fields |= {**below("model", TINY_NAC), "data.image_size": 64}
    file = "m2mkd/nac_imagenet.py:phase=end_to_end"
    measure_phase(case, file, fields, f"attention by {attention}")


# Translation.


def mbart_sizes(tiny: bool) -> MBartConfig:
    """mBART-large, or a small one if `tiny`."""
    if not tiny:
        return MBartConfig()
    return MBartConfig(
        vocab=1000, width=64, encoder_layers=1, decoder_layers=1, encoder_heads=4, decoder_heads=4,
        encoder_hidden=128, decoder_hidden=128,
    )  # fmt: skip


def measure_mbart(tiny: bool) -> None:
    """mBART-large in stage "translate", with a prefix."""
    sizes = dataclasses.replace(mbart_sizes(tiny), scan_layers=not tiny)
    fields = below("model.mbart", dataclasses.asdict(sizes))
    config = load(cliptrans.Config, "cliptrans/multi30k.py:stage=translate", fields)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    make_task = functools.partial(translation.describe, mesh=mesh, examples=MULTI30K, tokens=TOKENS)
    optim, task = config.apply_parity().optim, make_task(config)
    # The length of a loop over chunks of labels is data; with one chunk, FLOPs can be counted.
    whole = dataclasses.replace(config, label_chunk=optim.batch * TOKENS)
    flops = step_flops(make_task(whole), optim).model
    words = FIRST_WORD, sizes.vocab
    batch = random_batch(task, optim, {"source": words, "labels": words})
    note = f"{optim.batch} sentences of {TOKENS} tokens, {optim.accumulate} micro-batches"
    measure_step("mbart_step", task, optim, batch, flops=flops, note=note)


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Sentences to translate: their number, their tokens, and the tokens of their translations."""

    count: int
    source: int
    new: int


def sentences(tiny: bool) -> Sentences:
    return Sentences(4, 16, 8) if tiny else Sentences(64, 32, 60)


def measure_decode(tiny: bool) -> None:
    """mBART-large's beam search and greedy decoding."""
    sizes, work = mbart_sizes(tiny), sentences(tiny)
    translator = Translator(ModelConfig(sizes, MapperConfig(prefix=0)), dtype=jnp.bfloat16)
    params = jax.jit(translator.init)(jax.random.key(0))
    draw = np.random.default_rng(0)
    source = draw.integers(FIRST_WORD, sizes.vocab, (work.count, work.source)).astype(np.int32)
    language = np.full(work.count, LANGUAGE, np.int32)
    for beams in (5, 1):
        # One loop and one batch size, since random weights end no sentence early.
        config = DecodeConfig(beams=beams, max_new_tokens=work.new, growth=1, halvings=0)
        start = time.perf_counter()
        run = jax.jit(Search(translator, config).run)
        program = run.lower(params, None, source, language).compile()
        compile_seconds = time.perf_counter() - start
        hypotheses = program(params, None, source, language)
        times = chained(
            lambda program=program: program(params, None, source, language), count=1, repeats=5
        )
        say(
            f"decode_beams{beams}",
            **times,
            sentences_s=1e3 * work.count / times["ms"],
            compile_s=compile_seconds,
            tokens=float(np.mean(np.asarray(hypotheses.lengths)[:, 0])),
            ms_step=times["ms"] / config.steps,
            note="random weights: sentences run to the longest",
        )


CASES = {
    "vitl": measure_vitl,
    "vmoe_triton": measure_vmoe_triton,
    "vmoe_capacity": measure_vmoe_capacity,
    "vmoe_dropless": measure_vmoe_dropless,
    "nac": functools.partial(measure_nac, "nac_step", "xla"),
    "nac_cudnn": functools.partial(measure_nac, "nac_cudnn_step", "cudnn"),
    "mbart": measure_mbart,
    "decode": measure_decode,
}

if __name__ == "__main__":
    run_case(CASES)
