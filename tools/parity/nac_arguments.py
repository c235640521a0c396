"""Arguments of the original's NAC modules, with the original's defaults. A module's own arguments
override inherited ones, and an unknown argument is an error."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

Arguments = Mapping[str, Any]

LINEAR_KINDS = {"ModFC": "modulated", "FC": "plain", "WModFC": "weight_modulated"}
NORMALIZATIONS = {"ln": "layer", "l2": "l2", "none": "none", "sigmoid": "sigmoid", "tanh": "tanh"}
ACTIVATIONS = {None: "none", "GELU": "gelu"}
EVALUATIONS = {"no_sample": "kernel", "sample": "sample", "threshold": "threshold"}
POOLINGS = {"gumbel": "gumbel", "gumbel-hard": "gumbel_hard", "vanilla": "softmax"}

# Arguments with their defaults; NEEDED marks those without one.
NEEDED = object()
SIZES = {"state_dim": NEEDED, "code_dim": NEEDED}
LINEAR_CLASS = {"mod_fc_cls": "ModFC", "mod_fc_kwargs": None}
FFN_LINEAR_CLASS = {"ffn_mod_fc_cls": None, "ffn_mod_fc_kwargs": None}
LINEAR = {
    "activation": None, "eps": 1e-6, "scale_normalization_type": "ln", "scale_gain": 1.0,
    "learnable_scale_gain": False, "scale_dropout": 0.0, "add_one_to_scale": False,
    "scale_times_input_normalization_type": "none", "weight_init_fn": None,
    "weight_init_fn_kwargs": None, "weight_init_gain": 1.0,
}  # fmt: skip
KERNEL = {
    "truncation": None, "straight_through": True, "initial_bandwidth": 1.0,
    "learnable_bandwidth": True, "stochastic_kernel": False, "stochastic_sampling_temperature": 1.0,
    "stochastic_eval_behaviour": "no_sample", "truncation_implementation": "direct",
}  # fmt: skip
HEADS = {"num_heads": 1, "head_dim": 64}
STUDENT_ATTENTION = {
    **SIZES, **HEADS, **LINEAR_CLASS, "include_residual": True, "path_drop_prob": 0.0,
    "layer_scale_initial_value": 1e-6, "scale_attention_by_affinities_after_softmax": False,
    "share_layernorm": False, "qkv_bias": True,
}  # fmt: skip
ATTENTION = {
    **STUDENT_ATTENTION,
    "kernel_type": "DotProductKernel",
    "kernel_kwargs": None,
    "mask_attn_scores_with_affinities": True,
    "normalize_kernel_along_keys": True,
}
READ_IN_ATTENTION = {
    **SIZES, **HEADS, **LINEAR_CLASS, "input_dim": NEEDED, "include_residual": True,
    "layer_scale_initial_value": 1.0, "qkv_bias": True,
}  # fmt: skip
FFN = {
    **SIZES, **LINEAR_CLASS, "capacity_factor": 1.0, "include_residual": True,
    "path_drop_prob": 0.0, "layer_scale_initial_value": 1e-6, "use_geglu": False,
}  # fmt: skip
BLOCK = {
    **SIZES, **LINEAR_CLASS, **FFN_LINEAR_CLASS, "path_drop_prob": 0.0, "ffn_capacity_factor": 1.0,
    "code_noise_scale": None, "use_geglu": False, "ffn_kwargs": None,
}  # fmt: skip
PROPAGATOR = {
    **BLOCK, **HEADS, "layer_scale_initial_value": 1e-6, "latent_attention_kwargs": None,
    "include_residual_in_latent_attention": True, "qkv_bias_in_attention": True, "stitch_dim": None,
}  # fmt: skip
READ_OUT = {**PROPAGATOR, "output_dim": None, "pre_output_layernorm": True, "use_head": True}
PROJECTION_READ_IN = {**BLOCK, "input_dim": NEEDED, "ffn_layer_scale_initial_value": 1e-6}
ATTENTIVE_READ_IN = {
    **PROJECTION_READ_IN, **HEADS, "read_in_layer_scale_initial_value": 1.0,
    "include_residual_in_read_in_attention": False, "qkv_bias_in_attention": True,
    "read_in_attention_kwargs": None,
}  # fmt: skip
TOKENIZER = {
    "input_dim": 3, "repr_dim": 384, "capacity_preset": "tiny", "num_stages": 3,
    "convnext_kwargs": None, "positional_grid_kwargs": None,
}  # fmt: skip
POOLING = {
    "state_dim": None,
    "output_dim": None,
    "softmax_type": "gumbel",
    "softmax_temperature": 1.0,
}
SEEDER = {
    **SIZES,
    "code_noise_scale": None,
    "use_state_noise": True,
    "use_code_as_mean_state": False,
}
LATENTS = {
    "num_latents": NEEDED, "signature_dim": NEEDED, "code_dim": NEEDED, "state_dim": None,
    "num_layers": None, "graph_preset": None, "graph_generator_kwargs": None,
    "learnable_signatures": True, "learnable_codes": True, "init_with_identical_codes": False,
    "learnable_initial_states": False,
}  # fmt: skip

GRAPH = {
    **PROPAGATOR, "input_dim": None, "output_dim": None, "signature_dim": NEEDED,
    "num_input_latents": NEEDED, "num_mediator_latents": NEEDED, "num_output_latents": NEEDED,
    "num_iterations": NEEDED, "share_propagator_weights": True,
    "share_ffn_between_propagators": False, "learnable_signatures": True, "learnable_codes": True,
    "use_code_noise_in_latent_seeder": False, "share_codes_between_iterations": True,
    "enable_input_output_communication": True,
    "enable_persistent_input_mediator_communication": True,
    "disable_input_mediator_communication": False, "use_input_states_as_mediator_states": False,
    "use_latent_seeder": True, "latent_seeder_kwargs": None, "input_latent_kwargs": None,
    "mediator_latent_kwargs": None, "output_latent_kwargs": None, "read_in_cls": "AttentiveReadIn",
    "read_in_kwargs": None, "propagator_kwargs": None, "propagator_layerwise_kwargs": None,
    "read_out_kwargs": None, "student_state_dict_dir": None, "predefined_codes_dir": None,
    "stitch_ckpt_path": None,
}  # fmt: skip
NETWORK = {
    "input_dim": NEEDED, "output_dim": NEEDED, "state_dim": NEEDED,
    "input_tokenizer_type": "ConvNeXtImageTokenizer", "input_tokenizer_kwargs": None,
    "latent_graph_type": "LatentGraph", "latent_graph_kwargs": None,
    "output_tokenizer_type": "FirstSlotAsLogits", "output_tokenizer_kwargs": None,
    "simplified_interface": False, "student_state_dict_dir": None, "student_type": "imagenet",
    "predefined_states_dir": None, "stitch_ckpt_path": None, "stitch_dim": None,
}  # fmt: skip
MEDIATOR_STUDENT = {**PROPAGATOR, "num_heads": 6}
OUTPUT_TOKENIZER = {"tokenizer_type": "FirstSlotAsLogits", "tokenizer_kwargs": None}
READ_OUT_STUDENT = {**READ_OUT, **OUTPUT_TOKENIZER, "include_residual_in_latent_attention": False}
READ_IN_STUDENT = {
    **ATTENTIVE_READ_IN,
    "num_heads": 6,
    "tokenizer_type": "ConvNeXtImageTokenizer",
    "tokenizer_kwargs": None,
}


def fill(name: str, kwargs: Arguments | None, table: Arguments, **inherited: Any) -> dict[str, Any]:
    """The arguments of module `name`, each from `kwargs`, else from `inherited`, else the default
    in `table`.

    Raises:
      ValueError: an argument is not in the table, or a needed one is missing.
    """
    filled = {**table, **inherited, **(kwargs or {})}
    if unknown := sorted(filled.keys() - table.keys()):
        raise ValueError(f"{name} does not take {unknown}")
    if missing := sorted(key for key, value in filled.items() if value is NEEDED):
        raise ValueError(f"{name} needs {missing}")
    return filled


def inherit(kwargs: Arguments | None, inherited: Arguments) -> dict[str, Any]:
    """`kwargs`, with missing arguments taken from `inherited`."""
    return {**inherited, **(kwargs or {})}


def pick(kwargs: Arguments, table: Arguments) -> dict[str, Any]:
    """The arguments in `kwargs` that a module with `table` takes."""
    return {name: value for name, value in kwargs.items() if name in table}


def by_layer(kwargs: Arguments, overrides: Arguments | None, count: int) -> list[dict[str, Any]]:
    """`count` copies of `kwargs`, where copy i has entry i of each list in `overrides`. The lists
    may be nested in dicts or keyed by paths with slashes."""
    copies = [copy.deepcopy(dict(kwargs)) for _ in range(count)]
    for path, values in _leaves(overrides or {}):
        for own, value in zip(copies, values, strict=False):
            for name in path[:-1]:
                if not isinstance(own.get(name), dict):
                    own[name] = {}
                own = own[name]
            own[path[-1]] = value
    return copies


def _leaves(tree: Arguments, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list]]:
    for name, value in tree.items():
        below = (*path, *name.split("/"))
        if isinstance(value, Mapping):
            yield from _leaves(value, below)
        else:
            yield below, value
