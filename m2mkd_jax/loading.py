"""Loading a trained network from a workdir."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from flax import traverse_util
from jax import numpy as jnp
from jax.sharding import Mesh

from common_jax import checkpoint
from m2mkd_jax.config import Config
from m2mkd_jax.data.feed import prepare_evaluation
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.networks import family_of_role, module_network, whole_network
from m2mkd_jax.stages import stage_name
from m2mkd_jax.trained import find_run, read_classes


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Apply:
    """A loaded network as a function of its parameters and x; see `load_model`.

    Attributes:
      source: folder of the checkpoint.
      config: the run's config.
      network: the network; its own `apply` takes prepared images, see `prepare`.
      stage: stage of a single module; None for a whole network.
    """

    source: epath.Path
    config: Config
    network: Any
    stage: int | None

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        stage = self.stage
        if stage is None:
            return self.network.apply(params, prepare(x, self.config))[0]
        example = self.network.stages[stage].example(1)
        x = prepare(x, self.config) if stage == 0 else check_tokens(x, example.shape[1:])
        return self.network.apply(params, x, start=stage, stop=stage + 1)[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label."""
        return read_classes(self.source, self.config)

    def features(self, params: Any, images: jax.Array) -> jax.Array:
        """The input of the head, normed and pooled (B, M), of a ViT or V-MoE.

        Raises:
          ValueError: as `apply`, and for a single module or a NAC.
        """
        role = PHASES[self.config.phase].role
        if self.stage is not None or family_of_role(self.config, role).leading_tokens is None:
            raise ValueError(
                f"{self.source} is not of a whole ViT or V-MoE, which alone have features: load "
                "the run of one"
            )
        x = prepare(images, self.config)
        _, recorded = self.network.apply(params, x, record=("intermediates",))
        (features,) = recorded[stage_name(len(self.network) - 1)]["intermediates"]["features"]
        return features


def load_model(
    source: epath.PathLike, *, module: int | None = None, mesh: Mesh | None = None
) -> tuple[Apply, dict[str, Any]]:
    """The network that a run trained.

    Args:
      source: the run's workdir (its newest checkpoint), a pipeline's workdir (its run of the whole
        student), or one step's folder.
      module: stage of the module to load, if the run trained several.
      mesh: mesh to shard the parameters over, as in training; None puts them on the first device.

    Returns:
      `apply(params, x)` and `params`. For a whole network x is a batch of images (B, I, J,
      channels) with pixels from 0 to 255, and the result is logits (B, labels). For a single
      module, `apply` runs only that stage, on images if it is the first and on tokens (B, T, D)
      otherwise. `apply.features`, `apply.classes`, `apply.config` and `apply.network` give more
      of a run, see `Apply`. If the run averages its parameters (config.optim.ema,
      config.run.average_last), `params` are the averages, as in evaluation.

    Raises:
      FileNotFoundError: if there is no finished checkpoint.
      ValueError: if the run trained several modules and `module` is none of them, no checkpoint in
        the workdir is from its run, it is from the other system, or it was converted without
        parameters that the network needs, such as its head. `apply` raises it if x has the wrong
        shape or type.
    """
    source, config = find_run(source)
    role = PHASES[config.phase].role
    stage = _stage(config, module)
    name = "" if stage is None else stage_name(stage)
    params = checkpoint.load(
        source,
        subtree=f"{role}/{name}" if name else role,
        mesh=mesh,
        rules=family_of_role(config, role).rules,
        average=True,
    )
    if stage is None:
        whole = whole_network(config, role)
        _require_all(params, whole.init, config, str(source))
        return Apply(source, config, whole, None), params
    network = module_network(config, role)
    init = functools.partial(network.init, only=(stage,))
    _require_all({name: params}, init, config, str(source))
    return Apply(source, config, network, stage), {name: params}


def _require_all(
    params: Any, init: Callable[[jax.Array], Any], config: Config, source: str
) -> None:
    """Raises ValueError if `params` lacks any parameter that `init` makes: a conversion leaves out
    those that config.sources.fresh names."""
    if not config.sources.fresh:
        return
    shapes = jax.eval_shape(init, jax.random.key(0))
    all_paths, there = (traverse_util.flatten_dict(tree, sep="/") for tree in (shapes, params))
    if absent := sorted(all_paths.keys() - there):
        raise ValueError(
            f"{source} was converted with config.sources.fresh={config.sources.fresh!r}, so it "
            f"lacks {', '.join(absent[:4])}, which its network needs: convert a file that has "
            "them, such as one with its classifier, or read the parameters with "
            "common_jax.checkpoint.load"
        )


def _stage(config: Config, module: int | None) -> int | None:
    """The stage of the module to load; None for a whole network."""
    modular = PHASES[config.phase].modular
    stages = config.modules() if modular else ()
    if module is None and len(stages) < 2:
        return stages[0] if modular else None
    if module not in stages:
        trained = f"trained modules {list(stages)}: give module=K, one of these"
        raise ValueError(
            f"module={module}: this run of phase={config.phase!r} "
            + (trained if modular else "trained a whole network: leave module out")
        )
    return module


def prepare(images: jax.Array, config: Config) -> jax.Array:
    """Prepares images with pixels from 0 to 255 for the run's networks; raises as
    `check_images`."""
    side, channels = config.data.image_size, config.data.channels
    check_images(images, (side, side, channels))
    return prepare_evaluation({"image": jnp.asarray(images)}, config.data)


def check_images(images: jax.Array, expected: tuple[int, int, int]) -> None:
    """Raises ValueError unless `images` is a batch (B, *expected) of pixels from 0 to 255; pixels
    are not checked under tracing."""
    shape = _shape_of(images, "images")
    side, _, channels = expected
    if shape[1:] != expected:
        if shape == expected:
            way_out = "a single image needs a batch axis first, x[None]"
        elif shape[1:] == (channels, side, side):
            way_out = "channels come last, np.moveaxis(x, 1, -1)"
        elif len(shape) == 4 and shape[3] == channels:
            way_out = "resize them"
        else:
            way_out = "B images of rows, columns and channels, in that order"
        raise ValueError(f"images have shape {shape}, expected (B, {_listed(expected)}): {way_out}")
    # Pixels of a tracer are unknown, and uint8 cannot be out of range.
    if isinstance(images, jax.core.Tracer) or images.dtype == jnp.uint8 or 0 in shape:
        return
    # A concrete array that a jitted function closes over is computed with now, not traced.
    with jax.ensure_compile_time_eval():
        low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 255):  # true for NaN
        raise ValueError(
            f"pixels range from {low:g} to {high:g}, but must be from 0 to 255 and not normalised: "
            "the run's mean and std are applied here"
        )
    # Most likely divided by 255 already. Integers up to 1 may be a nearly black image.
    if jnp.issubdtype(images.dtype, jnp.floating) and 0 < high <= 1:
        raise ValueError(
            f"pixels range from {low:g} to {high:g}, but must be from 0 to 255: give 255 * x"
        )


def check_tokens(x: jax.Array, expected: tuple[int, ...]) -> jax.Array:
    """Returns `x`, tokens (B, T, D) from the previous stage; raises ValueError if (T, D) is not
    `expected`."""
    shape = _shape_of(x, "tokens")
    if shape[1:] != expected:
        raise ValueError(
            f"tokens have shape {shape}, expected (B, {_listed(expected)}), as the previous "
            "stage outputs them"
        )
    return x


def _shape_of(x: jax.Array, what: str) -> tuple[int, ...]:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{what} must be an array, not a {type(x).__name__}")
    real = jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
    if not real:
        raise ValueError(f"{what} have dtype {x.dtype}, but must be real numbers, such as uint8")
    return tuple(x.shape)


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))
