"""NAC's weights under the original's names and in its layouts, to our parameter trees and back.

The original's linear layers hold [out, in], its convolutions [out, in, rows, columns], its
positional grid [width, rows, columns]. Plain numpy; both directions move numbers and change none. A
whole NAC has names such as `latent_graphs.0.propagators.3.ffn.ffn.0.native_weight`; parts and
students have those below their own module. Whether a state is complete shows when its tree meets
the network that takes it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from common_jax.weights import list_problems
from m2mkd_jax.nac.network import GRAPH
from m2mkd_jax.stages import stage_name

State = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor: the original's name, our path, how its axes move to ours and back, and the kind of
    code-conditioned layer it is of, since these differ in names alone."""

    name: str
    path: str
    load: Callable[[np.ndarray], np.ndarray]
    store: Callable[[np.ndarray], np.ndarray]
    kind: str = ""

    def below(self, name: str, path: str) -> "_Entry":
        """The entry of a module that stands under `name` and `path`."""
        return dataclasses.replace(self, name=name + self.name, path=path + self.path)


Part = tuple[_Entry, ...]


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _tensor(name: str, path: str, *, kind: str = "") -> _Entry:
    return _Entry(name, path, _same, _same, kind)


def _matrix(name: str, path: str, *, kind: str = "") -> _Entry:
    return _Entry(name, path, np.transpose, np.transpose, kind)


def _axes(name: str, path: str, axes: tuple[int, ...]) -> _Entry:
    back = tuple(np.argsort(axes))
    return _Entry(name, path, lambda a: a.transpose(axes), lambda a: a.transpose(back))


def _join(*parts: tuple[str, str, Part]) -> Part:
    return tuple(entry.below(name, path) for name, path, part in parts for entry in part)


_NORM = (_tensor("weight", "scale"), _tensor("bias", "bias"))
_DENSE = (_matrix("weight", "kernel"), _tensor("bias", "bias"))
_CONV = (_axes("weight", "kernel", (2, 3, 1, 0)), _tensor("bias", "bias"))
_CODE_LINEAR = (
    _matrix("native_weight", "kernel", kind="modulated"),
    _tensor("native_bias", "bias", kind="modulated"),
    _tensor("scale_gain", "gain", kind="modulated"),
    _matrix("scale.weight", "code_kernel", kind="modulated"),
    _matrix("lin.weight", "kernel", kind="plain"),
    _tensor("lin.bias", "bias", kind="plain"),
    _matrix("weight", "kernel", kind="weight_modulated"),
    _tensor("bias", "bias", kind="weight_modulated"),
    _matrix("modulation.weight", "code_kernel", kind="weight_modulated"),
    _tensor("modulation.bias", "code_bias", kind="weight_modulated"),
)
_ATTENTION = _join(
    ("receiver_layernorm.", "receiver_norm/", _NORM),
    ("sender_layernorm.", "sender_norm/", _NORM),
    ("query_compiler.", "query/", _CODE_LINEAR),
    ("key_compiler.", "key/", _CODE_LINEAR),
    ("value_compiler.", "value/", _CODE_LINEAR),
    ("exit_layer.", "exit/", _CODE_LINEAR),
    (
        "",
        "",
        (_tensor("layer_scale.gamma", "layer_scale"), _tensor("kernel.bandwidth", "bandwidth")),
    ),
)
_FFN = _join(
    ("layernorm.", "norm/", _NORM),
    ("ffn.0.", "up/", _CODE_LINEAR),
    ("ffn.2.", "down/", _CODE_LINEAR),
    ("", "", (_tensor("layer_scale.gamma", "layer_scale"),)),
)
_PROPAGATOR = _join(("latent_attention.", "attention/", _ATTENTION), ("ffn.", "ffn/", _FFN))
_READ_IN = _join(
    ("read_in_attention.", "attention/", _ATTENTION),
    ("read_in_projection.", "projection/", _CODE_LINEAR),
    ("ffn.", "ffn/", _FFN),
)
_READ_OUT = _join(
    ("", "", _PROPAGATOR),
    ("head.0.module.", "code_head/norm/", _NORM),
    ("head.1.", "code_head/linear/", _CODE_LINEAR),
)
_POOLING = _join(("confidence_scorer.", "confidence/", _DENSE), ("to_logits.", "head/", _DENSE))
_BLOCK = _join(
    ("", "", (_tensor("gamma", "gamma"),)),
    ("dwconv.", "depthwise/", _CONV),
    ("norm.", "norm/", _NORM),
    ("pwconv1.", "up/", _DENSE),
    ("pwconv2.", "down/", _DENSE),
)
_STAGES, _MOST_BLOCKS = range(3), range(27)
_TOKENIZER = _join(
    ("backbone.downsample_layers.0.0.", "stem/", _CONV),
    ("backbone.downsample_layers.0.1.", "stem_norm/", _NORM),
    *(
        (f"backbone.downsample_layers.{s}.{i}.", f"downsample_{s}/{name}/", part)
        for s in _STAGES[1:]
        for i, (name, part) in enumerate((("norm", _NORM), ("conv", _CONV)))
    ),
    *(
        (f"backbone.stages.{s}.{i}.", f"block_{s}_{i}/", _BLOCK)
        for s in _STAGES
        for i in _MOST_BLOCKS
    ),
    ("positional_grid.", "", (_axes("grid", "grid", (1, 2, 0)),)),
)
_LATENTS = (
    _tensor("signatures_", "signatures"),
    _tensor("codes_", "codes"),
    _tensor("initial_states_", "states"),
)
_SEEDER = _join(
    ("layernorm.", "norm/", _NORM),
    ("code_to_state_mu.", "mean/", _DENSE),
    ("code_to_state_logvar.", "log_variance/", _DENSE),
)
_PRE, _POST = ("pre_stitch.", "pre_stitch/", _DENSE), ("post_stitch.", "post_stitch/", _DENSE)

# Parts by name; of the students, "read_in_student", "mediator_student" and "read_out_student".
PARTS: Mapping[str, Part] = {
    "code_linear": _CODE_LINEAR,
    "attention": _ATTENTION,
    "ffn": _FFN,
    "propagator": _PROPAGATOR,
    "read_in": _READ_IN,
    "read_out": _READ_OUT,
    "tokenizer": _TOKENIZER,
    "latents": _LATENTS,
    "seeder": _SEEDER,
    "pooling": _POOLING,
    "read_in_student": _join(
        ("tokenizer.", "tokenizer/", _TOKENIZER), ("read_in.", "read_in/", _READ_IN), _POST
    ),
    "mediator_student": _join(_PRE, ("", "", _PROPAGATOR), _POST),
    "read_out_student": _join(_PRE, ("", "", _READ_OUT), ("tokenizer.", "pooling/", _POOLING)),
}


def part_from_original(state: State, part: str) -> dict[str, Any]:
    """Parameters of a part, a key of PARTS, from its state under its own names.

    Raises:
      ValueError: for names that are none of the part's; all are named.
    """
    return _load(state, PARTS[part])


def part_to_original(params: Mapping[str, Any], part: str) -> dict[str, np.ndarray]:
    """`part_from_original` backwards; of a part, or of anything else of its shapes, such as
    gradients.

    Raises:
      ValueError: for paths that are none of the part's.
    """
    return _store(params, PARTS[part])


def network_from_original(
    state: State, *, iterations: int, share_propagators: bool = False, share_ffns: bool = False
) -> dict[str, Any]:
    """Parameters of a whole NAC from the original's state.

    Args:
      state: arrays by name.
      iterations: propagators L; the read-out becomes stage L + 1.
      share_propagators, share_ffns: what the original lists once an iteration, and we keep once.

    Raises:
      ValueError: for unknown names, and where iterations differ that should share.
    """
    kept, problems = dict(state), []
    for alias, own in _aliases(kept, iterations, share_propagators, share_ffns):
        if own not in kept or not np.array_equal(kept.pop(alias), kept[own]):
            problems.append(f"{alias} is not {own}, which it should share")
    if problems:
        raise ValueError(f"the iterations do not share:{list_problems(problems)}")
    return _load(kept, _network(iterations))


def network_to_original(
    params: Mapping[str, Any],
    *,
    iterations: int,
    share_propagators: bool = False,
    share_ffns: bool = False,
) -> dict[str, np.ndarray]:
    """`network_from_original` backwards: what is shared is listed once an iteration.

    Raises:
      ValueError: for paths that are none of a NAC's of so many iterations.
    """
    state = _store(params, _network(iterations))
    shared = "" if share_propagators else "ffn." if share_ffns else None
    if shared is not None:
        first = f"{_PROPAGATORS}0.{shared}"
        own = {name: a for name, a in state.items() if name.startswith(first)}
        for i in range(1, iterations):
            renamed = {n.replace(first, f"{_PROPAGATORS}{i}.{shared}"): a for n, a in own.items()}
            state |= renamed
    return state


_PROPAGATORS = "latent_graphs.0.propagators."


def _network(iterations: int) -> Part:
    graph, last = "latent_graphs.0.", stage_name(iterations + 1)
    return _join(
        *(
            (f"{graph}{name}_latents.", f"{GRAPH}/{name}/", _LATENTS)
            for name in ("input", "mediator", "output")
        ),
        (f"{graph}latent_seeder.", f"{GRAPH}/seeder/", _SEEDER),
        ("input_tokenizer.", f"{stage_name(0)}/tokenizer/", _TOKENIZER),
        (f"{graph}read_in.", f"{stage_name(0)}/read_in/", _READ_IN),
        *((f"{_PROPAGATORS}{i}.", f"{stage_name(i + 1)}/", _PROPAGATOR) for i in range(iterations)),
        (f"{graph}read_out.", f"{last}/", _READ_OUT),
        ("output_tokenizer.", f"{last}/pooling/", _POOLING),
    )


def _aliases(
    state: State, iterations: int, share_propagators: bool, share_ffns: bool
) -> Iterable[tuple[str, str]]:
    """Names of later iterations with the first iteration's of the same tensor."""
    for i in range(1, iterations):
        prefix = f"{_PROPAGATORS}{i}."
        for name in list(state):
            rest = name.removeprefix(prefix)
            shares = share_propagators or (share_ffns and rest.startswith("ffn."))
            if name.startswith(prefix) and shares:
                yield name, f"{_PROPAGATORS}0.{rest}"


def _load(state: State, part: Part) -> dict[str, Any]:
    entries = {entry.name: entry for entry in part}
    if unknown := sorted(state.keys() - entries.keys()):
        raise ValueError(f"these tensors have no place:{list_problems(unknown)}")
    flat = {entries[name].path: entries[name].load(np.asarray(a)) for name, a in state.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def _store(params: Mapping[str, Any], part: Part) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(params, sep="/")
    kinds = {path: _kind(path, flat) for path in flat}
    entries = {}
    for entry in part:
        if entry.path in flat and entry.kind in ("", kinds[entry.path]):
            entries[entry.path] = entry
    if unknown := sorted(flat.keys() - entries.keys()):
        raise ValueError(f"the original has no names for {unknown}")
    return {e.name: e.store(np.asarray(flat[path])) for path, e in entries.items()}


def _kind(path: str, flat: Mapping[str, Any]) -> str:
    """The kind of code-conditioned layer that a path would be of, told by its neighbours."""
    layer = path.rpartition("/")[0]
    layer = f"{layer}/" if layer else ""
    if f"{layer}code_bias" in flat:
        return "weight_modulated"
    return "modulated" if f"{layer}code_kernel" in flat else "plain"
