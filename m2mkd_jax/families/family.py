"""`Family`: everything that the rest of the code needs to know about a kind of network."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from common_jax.mesh import Rules
from common_jax.optim import OptimConfig
from common_jax.weights import Adapt, Allowance, Origin
from common_jax.weights.table import Table
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.regularizers import RegularizersConfig
from m2mkd_jax.stages import Network

# regularizer(params, step) -> (scalar, metrics)
Regularizer = Callable[[Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@runtime_checkable
class WholeNetwork(Protocol):
    """A network from images to logits; its parameters have one subtree per stage."""

    def __len__(self) -> int: ...

    def init(self, key: jax.Array) -> Any: ...

    def apply(self, params: Any, x: jax.Array) -> tuple[jax.Array, Mapping[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Context:
    """Settings that a network needs besides its own section of the config.

    Attributes:
      interface: image side, channels and labels.
      dtype: precision of computation.
      seed: of the run.
      meta_width: width of the meta model's tokens, which modules are stitched to.
      meta_tokens: returns the number of these tokens; a function, since few networks need it.
      stitched: whether a teacher's modules have stitches to that width, as a student's always have.
    """

    interface: Interface
    dtype: DTypeLike
    seed: int
    meta_width: int
    meta_tokens: Callable[[], int]
    stitched: bool = False


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """Initialisation of a network from a dense ViT, as arguments of `common_jax.weights.take`."""

    origin: Origin
    fresh: tuple[Allowance, ...]
    adapt: Mapping[str, Adapt]


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Work before and after the training of a whole network.

    `section` is the network's section of the config and `start` the value of `make`.

    Attributes:
      check: (section, seed) -> None; ValueError where `make` would fail.
      sketch: (section, seed) -> values of the same shapes as `make` returns, without its work.
      make: (section, seed, workdir) -> initial values of a run, cached in the workdir.
      init: (network, start) -> function from a key to all parameters.
      trainable: section -> regex of the parameters to update.
      regularizer: (section, start, config.regularizers, config.optim, steps per epoch) -> a term
        of the loss.
      draw: (section, start, workdir) -> None; draws the trained network.
      picture: file name of the picture.
      caption: its caption in the report.
    """

    check: Callable[[Any, int], None]
    sketch: Callable[[Any, int], Any]
    make: Callable[[Any, int, epath.Path], Any]
    init: Callable[[Any, Any], Callable[[jax.Array], Any]]
    trainable: Callable[[Any], str]
    regularizer: Callable[[Any, Any, RegularizersConfig, OptimConfig, int], Regularizer]
    draw: Callable[[Any, Any, epath.Path], None]
    picture: str
    caption: str


def _accept(*arguments: Any) -> None:
    """Accepts anything."""


@dataclasses.dataclass(frozen=True)
class FileNames:
    """The names of a family's tensors in published files, of a whole network or of a single stage.

    Attributes:
      network: what to call the network.
      table: (section, channels of an image, stage) -> the names of a stage's tensors, by our paths
        in it, or those of the whole network if `stage` is None.
      examples: sections of small networks, whose tables distinguish kinds of files.
      marker, stage_marker: regex of a tensor that every file of the network, or of a stage, has.
      first, last: tensors that no stage but the first, or the last, has.
      sizes: tensors of a whole network -> fields of the section that they show beyond a ViT's, or
        of the config by their whole path ("meta.width"); None if the network is no ViT.
      variants: published networks by name: image side, depth, and fields of the section.
      config, stage_config: an example of the config that files of the network, or of a stage, need
        since tensors do not show all sizes; "" if they do.
      timm: whether timm has such networks, with these names.
    """

    network: str
    table: Callable[[Any, int, int | None], Table]
    examples: tuple[Any, ...]
    marker: str
    stage_marker: str
    first: tuple[str, ...]
    last: tuple[str, ...]
    sizes: Callable[[Mapping[str, np.ndarray]], dict[str, Any]] | None = None
    variants: Mapping[str, tuple[int, int, Mapping[str, Any]]] = dataclasses.field(
        default_factory=dict
    )
    config: str = ""
    stage_config: str = ""
    timm: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of network.

    `section` is the network's section of the config, of type `config`.

    Attributes:
      config: dataclass of its section. That of a meta model or teacher has `depths` and `width`.
      roles: sections of the config that it can fill, among "meta", "teacher" and "model".
      whole: (section, context, stochastic depth) -> the whole network.
      modules: (section, context, stochastic depth) -> its modules, one per stage.
      rules: partition rules of both.
      head: regex of the classifier's parameters.
      stitches: regex of the parameters of the stitches of a teacher's modules.
      files: the names of its tensors in published files.
      adapt: section -> functions that give parameters another shape, such as a larger position
        table, by a regex of paths below the role.
      left: section -> parameters of the modules that have no place in the whole network.
      fresh: section -> parameters of the whole network that no module has.
      tokens: (section, interface) -> tokens between two stages; required for a meta model.
      leading: section -> fields that say which tokens precede those of the patches between two
        stages; {} where its modules take any.
      leading_tokens: section -> number of tokens before those of a grid of patches; None for
        networks whose tokens are no such grid.
      check_mesh: (section, mesh sizes, batch) -> None; ValueError where it cannot run there.
      check_noise: (section, config.evaluation.noise) -> None; FieldError where they conflict.
      upcycle: (section, workdir, parameter shapes) -> its initialisation from a dense ViT.
      preparation: see `Preparation`.
      savers: fields of the config that reduce its memory per chip.
    """

    config: type
    roles: tuple[str, ...]
    whole: Callable[[Any, Context, float], WholeNetwork]
    modules: Callable[[Any, Context, float], Network]
    rules: Rules
    head: str
    files: FileNames
    adapt: Callable[[Any], Mapping[str, Adapt]] = lambda section: {}
    left: Callable[[Any], tuple[Allowance, ...]] = lambda section: ()
    fresh: Callable[[Any], tuple[Allowance, ...]] = lambda section: ()
    stitches: str = ""
    tokens: Callable[[Any, Interface], int] | None = None
    leading: Callable[[Any], Mapping[str, Any]] = lambda section: {}
    leading_tokens: Callable[[Any], int] | None = None
    check_mesh: Callable[[Any, Mapping[str, int], int], None] = _accept
    check_noise: Callable[[Any, str], None] = _accept
    upcycle: Callable[[Any, epath.PathLike, Mapping[str, Any]], Upcycling] | None = None
    preparation: Preparation | None = None
    savers: tuple[str, ...] = ()
