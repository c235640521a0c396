"""Builds configs of NAC's modules from the original's arguments in golden cases."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from m2mkd_jax.nac.blocks import BlockConfig, Ffn
from m2mkd_jax.nac.kernel import KernelConfig
from m2mkd_jax.nac.layers import LinearConfig
from m2mkd_jax.nac.network import ReadInConfig, ReadOutConfig
from m2mkd_jax.nac.tokenizer import TokenizerConfig
from parity import nac_arguments as original
from parity.nac_arguments import Arguments, fill, inherit, pick

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class SplitConfig(BlockConfig):
    """Config of a block whose MLP and attention differ in a setting that is shared in our blocks
    but not in the original. Under `split_ffn`, the MLP uses `ffn`."""

    ffn: BlockConfig | None = None


def split_ffn(call: Callable[..., Any], arguments, switches, context: nn.module.InterceptorContext):
    """Linen method interceptor that gives an MLP its own config."""
    module = context.module
    if isinstance(module, Ffn) and isinstance(module.config, SplitConfig):
        object.__setattr__(module, "config", module.config.ffn)
    return call(*arguments, **switches)


def linear_config(kwargs: Arguments, params: Params) -> LinearConfig:
    """Config of a code-conditioned layer, whose kind follows from its parameters; other arguments
    are ignored."""
    kind = "ModFC" if "code_kernel" in params else "FC"
    kind = "WModFC" if "code_bias" in params else kind
    return _linear(kind, pick(kwargs, original.LINEAR))


def _linear(kind: str, kwargs: Arguments | None) -> LinearConfig:
    options = fill(kind, kwargs, original.LINEAR)
    return LinearConfig(
        kind=original.LINEAR_KINDS[kind],
        normalization=original.NORMALIZATIONS[options["scale_normalization_type"]],
        gain=float(options["scale_gain"]),
        learnable_gain=options["learnable_scale_gain"],
        add_one=options["add_one_to_scale"],
        renormalization=original.NORMALIZATIONS[options["scale_times_input_normalization_type"]],
        dropout=float(options["scale_dropout"]),
        activation=original.ACTIVATIONS[options["activation"]],
    )


def kernel_config(kwargs: Arguments | None, kind: str = "DotProductKernel") -> KernelConfig:
    """Config of a kernel, whose bandwidth is always a parameter, as in the original's state."""
    if kind != "DotProductKernel":
        raise ValueError(f"kernel {kind!r} is not supported")
    options = fill(kind, kwargs, original.KERNEL)
    return KernelConfig(
        truncation=_float(options["truncation"]),
        truncation_kind=options["truncation_implementation"],
        straight_through=options["straight_through"],
        stochastic=options["stochastic_kernel"],
        temperature=float(options["stochastic_sampling_temperature"]),
        evaluation=original.EVALUATIONS[options["stochastic_eval_behaviour"]],
        empty_row="nan",
    )


def attention_config(kwargs: Arguments, *, kernel: bool = True) -> BlockConfig:
    """Config of latent attention; without a kernel in a student."""
    options = fill(
        "latent attention", kwargs, original.ATTENTION if kernel else original.STUDENT_ATTENTION
    )
    modulation = {}
    if kernel:
        modulation = {
            "kernel": kernel_config(options["kernel_kwargs"], options["kernel_type"]),
            "mask": options["mask_attn_scores_with_affinities"],
            "scale_after_softmax": options["scale_attention_by_affinities_after_softmax"],
            "normalise_kernel": options["normalize_kernel_along_keys"],
        }
    return BlockConfig(
        share_norm=options["share_layernorm"],
        drop_path=float(options["path_drop_prob"]),
        layer_scale=_float(options["layer_scale_initial_value"]),
        **_attention_sizes(options),
        **modulation,
    )


def block_config(kwargs: Arguments, params: Params, *, kernel: bool = True) -> BlockConfig:
    """Config of a propagator, or of only the part of a block that `params` has: attention to
    tokens, or the MLP."""
    if params.keys() >= {"attention", "ffn"}:
        return propagator_config(kwargs, original.PROPAGATOR, kernel=kernel)
    if "ffn" in params:
        return _ffn(kwargs)
    options = fill("read-in attention", kwargs, original.READ_IN_ATTENTION)
    scale = _float(options["layer_scale_initial_value"])
    return BlockConfig(layer_scale=scale, **_attention_sizes(options))


def read_in_config(kwargs: Arguments, params: Params) -> ReadInConfig:
    """Config of a read-in by attention or, if `params` has one, by projection."""
    if "projection" in params:
        options = fill("ProjectionReadIn", kwargs, original.PROJECTION_READ_IN)
        scale = options["ffn_layer_scale_initial_value"]
        linear = _linear(options["mod_fc_cls"], options["mod_fc_kwargs"])
        first = BlockConfig(
            options["state_dim"], options["code_dim"], heads=1, head_width=1, linear=linear
        )
        return ReadInConfig(_join(options, first, scale, drops=False), "projection", None)
    options = fill("AttentiveReadIn", kwargs, original.ATTENTIVE_READ_IN)
    inherited = {
        **pick(
            options,
            {**original.SIZES, **original.HEADS, **original.LINEAR_CLASS, "input_dim": None},
        ),
        "include_residual": options["include_residual_in_read_in_attention"],
        "layer_scale_initial_value": options["read_in_layer_scale_initial_value"],
        "qkv_bias": options["qkv_bias_in_attention"],
    }
    attention = block_config(inherit(options["read_in_attention_kwargs"], inherited), {})
    block = _join(options, attention, options["ffn_layer_scale_initial_value"], drops=False)
    return ReadInConfig(block, "attention", attention.layer_scale)


def read_out_config(
    kwargs: Arguments, pooling: tuple[str, Arguments | None] | None, *, kernel: bool = True
) -> ReadOutConfig:
    """Config of a read-out; `pooling` is the output tokenizer's class and arguments."""
    options = fill("read-out", kwargs, original.READ_OUT)
    block = propagator_config(options, original.READ_OUT, kernel=kernel)
    kind, temperature = "first_slot", 1.0
    name, arguments = pooling or ("FirstSlotAsLogits", None)
    if name == "OutputLatentPooling":
        pooled = fill("pooling", arguments, original.POOLING)
        kind, temperature = (
            original.POOLINGS[pooled["softmax_type"]],
            float(pooled["softmax_temperature"]),
        )
    elif name != "FirstSlotAsLogits":
        raise ValueError(f"output tokenizer {name!r} is not supported")
    head = options["output_dim"] if options["use_head"] else None
    return ReadOutConfig(block, kind, temperature, head, options["pre_output_layernorm"])


def seeding(kwargs: Arguments | None, inherited: Arguments) -> str:
    """The kind of seeding of a LatentSeeder."""
    options = fill("LatentSeeder", kwargs, original.SEEDER, **inherited)
    if options["use_code_as_mean_state"]:
        return "code"
    return "noise" if options["use_state_noise"] else "mean"


def tokenizer_config(kwargs: Arguments | None, *, width: int) -> TokenizerConfig:
    """Config of a ConvNeXtImageTokenizer, which inherits `width`."""
    options = fill("tokenizer", kwargs, original.TOKENIZER, repr_dim=width)
    if options["convnext_kwargs"]:
        raise ValueError(f"convnext_kwargs={options['convnext_kwargs']} is not supported")
    grid = options["positional_grid_kwargs"]
    if grid is None:
        raise ValueError("a tokenizer without a positional grid is not supported")
    rows, columns = grid.get("grid_size", (8, 8))
    if rows != columns:
        raise ValueError(f"a positional grid of {rows} rows and {columns} columns is not supported")
    return TokenizerConfig(
        preset=options["capacity_preset"],
        stages=options["num_stages"],
        width=options["repr_dim"],
        grid_width=grid["dim"],
        grid_size=rows,
    )


def propagator_config(kwargs: Arguments, table: Arguments, *, kernel: bool = True) -> BlockConfig:
    """Config of a propagator, or of a read-out, whose `table` has more arguments."""
    options = fill("propagator", kwargs, table)
    inherited = {
        **pick(options, {**original.SIZES, **original.HEADS, **original.LINEAR_CLASS}),
        "layer_scale_initial_value": options["layer_scale_initial_value"],
        "include_residual": options["include_residual_in_latent_attention"],
        "path_drop_prob": options["path_drop_prob"],
        "qkv_bias": options["qkv_bias_in_attention"],
    }
    attention = inherit(options["latent_attention_kwargs"], inherited)
    attention = attention_config(attention, kernel=kernel)
    return _join(options, attention, options["layer_scale_initial_value"])


def _join(
    options: Arguments, first: BlockConfig, scale: float | None, *, drops: bool = True
) -> BlockConfig:
    """Joins the config of an attention (or projection) with that of the MLP after it.

    Args:
      options: the block's arguments, defaults filled in.
      first: config of the attention.
      scale: the MLP's layer scale, unless its own arguments override it.
      drops: whether drop path and layer scale of the attention are in the same config.
    """
    kind, kwargs = options["mod_fc_cls"], options["mod_fc_kwargs"]
    if options["ffn_mod_fc_cls"] is not None:
        kind, kwargs = options["ffn_mod_fc_cls"], options["ffn_mod_fc_kwargs"]
    inherited = {
        **pick(options, original.SIZES),
        "layer_scale_initial_value": scale,
        "capacity_factor": options["ffn_capacity_factor"],
        "path_drop_prob": options["path_drop_prob"],
        "use_geglu": options["use_geglu"],
        "mod_fc_cls": kind,
        "mod_fc_kwargs": kwargs,
    }
    ffn = _ffn(inherit(options["ffn_kwargs"], inherited))
    one = {"linear": (first.linear, ffn.linear)}
    if drops:
        one["drop_path"] = first.drop_path, ffn.drop_path
        one["layer_scale"] = first.layer_scale is None, ffn.layer_scale is None
    both = {"ffn_factor": ffn.ffn_factor, "geglu": ffn.geglu}
    both["code_noise"] = float(options["code_noise_scale"] or 0)
    alone = not first.residual and ffn.drop_path > 0
    if alone or any(own != other for own, other in one.values()):
        return _split(dataclasses.replace(first, **both), ffn)
    scales = {"layer_scale": ffn.layer_scale, "drop_path": ffn.drop_path}
    return dataclasses.replace(first, **both, **scales)


def share_ffn(block: BlockConfig, owner: BlockConfig) -> BlockConfig:
    """`block` with the MLP of `owner`."""
    return _split(block, getattr(owner, "ffn", owner))


def _split(block: BlockConfig, ffn: BlockConfig) -> SplitConfig:
    sizes = {field.name: getattr(block, field.name) for field in dataclasses.fields(BlockConfig)}
    return SplitConfig(**sizes, ffn=ffn)


def _ffn(kwargs: Arguments) -> BlockConfig:
    """Config of the MLP alone, with dummy attention sizes."""
    options = fill("ffn", kwargs, original.FFN)
    return BlockConfig(
        width=options["state_dim"],
        code_width=options["code_dim"],
        heads=1,
        head_width=1,
        ffn_factor=float(options["capacity_factor"]),
        geglu=options["use_geglu"],
        layer_scale=_float(options["layer_scale_initial_value"]),
        linear=_linear(options["mod_fc_cls"], options["mod_fc_kwargs"]),
        drop_path=float(options["path_drop_prob"]),
        ffn_residual=options["include_residual"],
    )


def _attention_sizes(options: Arguments) -> dict[str, Any]:
    return {
        "width": options["state_dim"],
        "code_width": options["code_dim"],
        "heads": options["num_heads"],
        "head_width": options["head_dim"],
        "qkv_bias": options["qkv_bias"],
        "residual": options["include_residual"],
        "linear": _linear(options["mod_fc_cls"], options["mod_fc_kwargs"]),
    }


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
