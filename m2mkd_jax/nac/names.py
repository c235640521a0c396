"""Tensor names of NACs and of their students, as in the original.

A whole NAC has names such as `latent_graphs.0.propagators.3.ffn.ffn.0.native_weight`; parts and
students have the names below their own module. The kinds of code-conditioned layers differ only in
names, so the functions for parts with such layers take their kind (`LinearConfig.kind`).
"""

import itertools
from collections.abc import Mapping

from common_jax.weights.entries import (
    Entry,
    below,
    convolution,
    copy,
    linear,
    optional,
    tied,
    transpose,
)
from common_jax.weights.table import Table
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.nac.network import GRAPH
from m2mkd_jax.nac.tokenizer import PRESETS
from m2mkd_jax.stages import Place, stage_name

Entries = dict[str, Entry]
ROOT = "latent_graphs.0."
PROPAGATORS = f"{ROOT}propagators."
# Tensor names of a code-conditioned layer by kind, and by our name of the parameter.
CODE_LINEAR: Mapping[str, Mapping[str, str]] = {
    "modulated": {
        "kernel": "native_weight",
        "bias": "native_bias",
        "gain": "scale_gain",
        "code_kernel": "scale.weight",
    },
    "plain": {"kernel": "lin.weight", "bias": "lin.bias"},
    "weight_modulated": {
        "kernel": "weight",
        "bias": "bias",
        "code_kernel": "modulation.weight",
        "code_bias": "modulation.bias",
    },
}


def network_table(config: NacConfig) -> Table:
    """The tensor names of a whole NAC; a file repeats shared tensors for every iteration."""
    kind, count = config.linear.kind, config.iterations
    last = stage_name(count + 1)
    entries = _join(
        *(
            (f"{ROOT}{name}_latents.", f"{GRAPH}/{name}/", latents())
            for name in ("input", "mediator", "output")
        ),
        (f"{ROOT}latent_seeder.", f"{GRAPH}/seeder/", optional(seeder())),
        ("input_tokenizer.", f"{stage_name(0)}/tokenizer/", tokenizer()),
        (f"{ROOT}read_in.", f"{stage_name(0)}/read_in/", read_in(kind)),
        (f"{ROOT}read_out.", f"{last}/", read_out(kind)),
        ("output_tokenizer.", f"{last}/pooling/", optional(pooling())),
    )
    for i in range(count):
        source, target = f"{PROPAGATORS}{i}.", f"{stage_name(i + 1)}/"
        # A file lists a shared tensor under every iteration. It is read from the first, and all
        # must be equal.
        others = tuple(f"{PROPAGATORS}{j}." for j in range(1, count)) if i == 0 else ()
        parts = {
            ("latent_attention.", "attention/"): (attention(kind), config.share_propagators),
            ("ffn.", "ffn/"): (ffn(kind), config.share_propagators or config.share_ffns),
        }
        for (name, path), (part, is_shared) in parts.items():
            if is_shared and i > 0:
                continue
            own = below(part, source=source + name, target=target + path)
            entries |= tied(own, source, others) if is_shared else own
    return Table(entries)


def student_table(config: NacConfig, place: Place) -> Table:
    """The tensor names of a student, by its place among the others."""
    return Table(STUDENTS[place](config.linear.kind))


def code_linear(kind: str) -> Entries:
    """The entries of a `nac.layers.CodeLinear`; biases and gain may be absent."""
    names = CODE_LINEAR[kind]
    turned = {"kernel", "code_kernel"}
    entries = {p: (transpose if p in turned else copy)(name) for p, name in names.items()}
    return entries | optional({p: e for p, e in entries.items() if p not in turned})


def attention(kind: str) -> Entries:
    """The entries of latent and read-in attention."""
    layer = code_linear(kind)
    return _join(
        ("receiver_layernorm.", "receiver_norm/", _NORM),
        ("sender_layernorm.", "sender_norm/", optional(_NORM)),
        ("query_compiler.", "query/", layer),
        ("key_compiler.", "key/", layer),
        ("value_compiler.", "value/", layer),
        ("exit_layer.", "exit/", layer),
        ("", "", optional({"bandwidth": copy("kernel.bandwidth")} | _SCALE)),
    )


def ffn(kind: str) -> Entries:
    """The entries of the code-conditioned MLP."""
    layer = code_linear(kind)
    return _join(
        ("layernorm.", "norm/", _NORM),
        # `ffn.1` is the activation, which has no tensors.
        ("ffn.0.", "up/", layer),
        ("ffn.2.", "down/", layer),
        ("", "", optional(_SCALE)),
    )


def propagator(kind: str) -> Entries:
    """The entries of a propagator: attention and MLP."""
    return _join(("latent_attention.", "attention/", attention(kind)), ("ffn.", "ffn/", ffn(kind)))


def read_in(kind: str) -> Entries:
    """The entries of a read-in, by attention or projection."""
    return _join(
        ("read_in_attention.", "attention/", optional(attention(kind))),
        ("read_in_projection.", "projection/", optional(code_linear(kind))),
        ("ffn.", "ffn/", ffn(kind)),
    )


def read_out(kind: str) -> Entries:
    """The entries of the read-out: attention, MLP and head of the output latents."""
    return _join(
        ("", "", propagator(kind)),
        ("head.0.module.", "code_head/norm/", optional(_NORM)),
        ("head.1.", "code_head/linear/", optional(code_linear(kind))),
    )


def tokenizer() -> Entries:
    """The entries of a tokenizer with any number of stages and blocks."""
    trunk = _join(
        ("downsample_layers.0.0.", "stem/", _CONV),
        ("downsample_layers.0.1.", "stem_norm/", _NORM),
        *(
            (f"downsample_layers.{stage}.{i}.", f"downsample_{stage}/{name}/", optional(part))
            for stage in (1, 2)
            for i, (name, part) in enumerate((("norm", _NORM), ("conv", _CONV)))
        ),
        *(
            (f"stages.{stage}.{i}.", f"block_{stage}_{i}/", optional(_CONVNEXT))
            # As many blocks as the largest preset has; the shapes of a network select among them.
            for stage, most in enumerate(map(max, zip(*PRESETS.values(), strict=True)))
            for i in range(most)
        ),
    )
    grid = Entry(
        ("positional_grid.grid",),
        lambda x: x.transpose(1, 2, 0),  # [width, rows, columns] to (rows, columns, width)
        lambda x: (x.transpose(2, 0, 1),),
    )
    return below(trunk, source="backbone.", target="") | {"grid": grid}


def latents() -> Entries:
    """The entries of one set of latents."""
    states = optional({"states": copy("initial_states_")})
    return {"signatures": copy("signatures_"), "codes": copy("codes_")} | states


def seeder() -> Entries:
    """The entries of the seeder, which makes initial states from codes."""
    return _join(
        ("layernorm.", "norm/", _NORM),
        ("code_to_state_mu.", "mean/", _DENSE),
        ("code_to_state_logvar.", "log_variance/", optional(_DENSE)),
    )


def pooling() -> Entries:
    """The entries of the pooling of output states, with or without confidences."""
    return linear("to_logits", "head") | optional(linear("confidence_scorer", "confidence"))


def read_in_student(kind: str) -> Entries:
    """The entries of the first student."""
    return _join(
        ("tokenizer.", "tokenizer/", tokenizer()), ("read_in.", "read_in/", read_in(kind)), _POST
    )


def mediator_student(kind: str) -> Entries:
    """The entries of a student between the first and the last."""
    return _join(_PRE, ("", "", propagator(kind)), _POST)


def read_out_student(kind: str) -> Entries:
    """The entries of the last student."""
    # Here `tokenizer` is the original's output tokenizer, in `read_in_student` the one of images.
    return _join(_PRE, ("", "", read_out(kind)), ("tokenizer.", "pooling/", pooling()))


def _join(*parts: tuple[str, str, Entries]) -> Entries:
    """The entries of several modules, each below its prefix of tensor names and of our paths."""
    joined = (below(part, source=source, target=target) for source, target, part in parts)
    return dict(itertools.chain.from_iterable(part.items() for part in joined))


_NORM = {"scale": copy("weight"), "bias": copy("bias")}
_DENSE = {"kernel": transpose("weight"), "bias": copy("bias")}
_CONV = {"kernel": convolution("weight"), "bias": copy("bias")}
_SCALE = {"layer_scale": copy("layer_scale.gamma")}
_CONVNEXT = _join(
    ("", "", {"gamma": copy("gamma")}),
    ("dwconv.", "depthwise/", _CONV),
    ("norm.", "norm/", _NORM),
    ("pwconv1.", "up/", _DENSE),
    ("pwconv2.", "down/", _DENSE),
)
_PRE = ("pre_stitch.", "pre_stitch/", _DENSE)
_POST = ("post_stitch.", "post_stitch/", _DENSE)
STUDENTS = {
    Place.FIRST: read_in_student,
    Place.MIDDLE: mediator_student,
    Place.LAST: read_out_student,
}
