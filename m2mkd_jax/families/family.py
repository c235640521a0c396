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
      dtype: compute dtype.
      seed: seed of the run.
      meta_width: width of the meta model's tokens, to which modules are stitched.
      meta_tokens: returns the number of these tokens; a function, because few networks need it.
      stitched: whether a teacher's modules have stitches to that width, as students always do.
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
    """What a family does before and after the training of a whole network.

    `section` is the network's section of the config, and `start` is what `make` returns.

    Attributes:
      check: (section, seed) -> None; raises ValueError if `make` would fail.
      sketch: (section, seed) -> values of the same shapes as those of `make`, but cheap.
      make: (section, seed, workdir) -> initial values of a run, cached in the workdir.
      init: (network, start) -> function from a key to all parameters.
      trainable: section -> regex of the parameters to update.
      regularizer: (section, start, config.regularizers, config.optim, steps per epoch) -> a loss
        term.
      draw: (section, start, workdir) -> None; draws the trained network.
      picture: file name of the drawing.
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
    """A check that accepts anything."""


@dataclasses.dataclass(frozen=True)
class FileNames:
    """A family's tensor names in published files of a whole network or of a single stage.

    Attributes:
      network: what to call the network in messages.
      table: (section, image channels, stage) -> the tensor names of a stage, by our parameter paths
        below it, or those of the whole network if `stage` is None.
      examples: sections of small networks, whose tables distinguish the kinds of files.
      marker, stage_marker: regex of a tensor that every file of a network, or of a stage, has.
      first, last: tensors that only the first, or only the last, stage has.
      sizes: tensors of a whole network -> section fields that they reveal beyond those of a ViT, or
        fields elsewhere in the config by their full path ("meta.width"); None if the network is not
        a ViT.
      variants: published networks by name: image side, depth, and fields of the section.
      config, stage_config: an example of the config that files of a network, or of a stage, need
        because their tensors do not reveal all sizes; "" if they do.
      timm: whether timm has such networks, under these names.
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
      config: dataclass of its section. For meta models and teachers it has `depths` and `width`.
      roles: config sections that it can fill, among "meta", "teacher" and "model".
      whole: (section, context, stochastic depth) -> the whole network.
      modules: (section, context, stochastic depth) -> its modules, one per stage.
      rules: partition rules of both.
      head: section -> regex of the classifier's parameters.
      stitches: regex of the parameters of the stitches of a teacher's modules.
      streams: names of the random streams that its networks draw from in training.
      files: its tensor names in published files; None if there are no such files, and its runs
        cannot be exported.
      evaluation_streams: those that they also draw from in evaluation, if it has any noise.
      adapt: section -> functions that reshape parameters, such as resizing a position table; by
        regex of paths below the role.
      left: section -> parameters of the modules that the whole network does not have.
      fresh: section -> parameters of the whole network that no module has.
      ramp: (network or hybrid, rate) -> the same with stochastic depth that increases from 0 at
        the first block to `rate` at the last; required for a teacher.
      tokens: (section, interface) -> number of tokens between two stages; required for a meta
        model.
      leading: section -> fields that say which tokens precede the patches between two stages; {} if
        its modules take any.
      leading_tokens: section -> number of tokens before a grid of patches; None for networks whose
        tokens are not such a grid.
      check_mesh: (section, mesh sizes, batch) -> None; raises ValueError if it cannot run there.
      check_noise: (section, config.evaluation.noise) -> None; raises FieldError if they conflict.
      upcycle: (section, workdir, parameter shapes) -> its initialisation from a dense ViT.
      preparation: see `Preparation`.
      idle: section -> those of its fields, by path below it, that have no effect given the others,
        and why; whether they are set or not.
      modules_drop: section -> whether stochastic depth drops anything in its modules.
      warnings: section -> warnings about it, each beginning with the path of a field below it.
      savers: config fields that reduce its memory per chip.
    """

    config: type
    roles: tuple[str, ...]
    whole: Callable[[Any, Context, float], WholeNetwork]
    modules: Callable[[Any, Context, float], Network]
    rules: Rules
    head: Callable[[Any], str]
    streams: tuple[str, ...]
    files: FileNames | None = None
    evaluation_streams: tuple[str, ...] = ()
    adapt: Callable[[Any], Mapping[str, Adapt]] = lambda section: {}
    left: Callable[[Any], tuple[Allowance, ...]] = lambda section: ()
    fresh: Callable[[Any], tuple[Allowance, ...]] = lambda section: ()
    stitches: str = ""
    ramp: Callable[[Network, float], Network] | None = None
    tokens: Callable[[Any, Interface], int] | None = None
    leading: Callable[[Any], Mapping[str, Any]] = lambda section: {}
    leading_tokens: Callable[[Any], int] | None = None
    check_mesh: Callable[[Any, Mapping[str, int], int], None] = _accept
    check_noise: Callable[[Any, str], None] = _accept
    upcycle: Callable[[Any, epath.PathLike, Mapping[str, Any]], Upcycling] | None = None
    preparation: Preparation | None = None
    idle: Callable[[Any], Mapping[str, str]] = lambda section: {}
    modules_drop: Callable[[Any], bool] = lambda section: True
    warnings: Callable[[Any], tuple[str, ...]] = lambda section: ()
    savers: tuple[str, ...] = ()
