"""Using a trained run: the outputs of its networks on batches of images, over a mesh."""

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from common_jax import checkpoint
from common_jax.command_line import change_config, check_system
from common_jax.inputs import eval_batches
from common_jax.mesh import MeshConfig, check_batch, make_mesh, match_rules, put, to_devices
from common_jax.state import evaluation_key
from common_jax.step import one_behind
from common_jax.weights import Adapt, Origin
from common_jax.workdir import freeze_stored, read_json
from m2mkd_jax.config import SYSTEM, Config, DistillConfig, SourcesConfig
from m2mkd_jax.data.feed import prepare_evaluation
from m2mkd_jax.data.sources import load_source
from m2mkd_jax.families import Family
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.networks import SECTIONS, family_of_role, whole_network
from m2mkd_jax.phases.objective import Forward, evaluation_rngs, whole_forward
from m2mkd_jax.phases.pipeline import result_folder
from m2mkd_jax.phases.sources.teachers import load_teachers
from m2mkd_jax.phases.sources.weights import take_weights
from m2mkd_jax.phases.training import CLASSES, find_classes
from m2mkd_jax.picture_files import PictureFiles, SquareTransform
from m2mkd_jax.stages import module_name

# Sections and fields that may be changed when a run is used; all others define the network.
CHANGEABLE = (
    *("data", "ood", "evaluation", "precision", "mesh", "optim.batch", "sources"),
    "run.compilation_cache",
    *("meta.attention", "teacher.attention", "model.attention"),
)
FIXED = ("data.labels", "data.channels")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained run.

    Attributes:
      source: folder of its checkpoint.
      config: the run's config, with changed fields.
      classes: class names by label.
      mesh: mesh over which parameters and batches are sharded.
      forward: the forward pass; its outputs are by network name, which for a whole network is its
        role.
      params, helpers: the arguments of `forward`.
    """

    source: epath.Path
    config: Config
    classes: tuple[str, ...]
    mesh: Mesh
    forward: Forward
    params: Mapping[str, Any]
    helpers: Mapping[str, Any]

    @property
    def family(self) -> Family:
        """The family of the trained network."""
        return family_of_role(self.config, self.role)

    @property
    def role(self) -> str:
        """The key of the trained parameters in the checkpoint."""
        return PHASES[self.config.phase].role


def open_run(run: epath.PathLike, settings: Mapping[str, str] | None = None) -> Trained:
    """Loads a run, or the result of a pipeline, onto the devices of this machine.

    Args:
      run: its workdir (the newest checkpoint), or one step's folder.
      settings: values as text, by config path; only fields in `CHANGEABLE`. If data.image_size
        changes, position tables are resized.

    Raises:
      FileNotFoundError: if the run, or a run whose network it needs, has no finished checkpoint.
      ValueError: for a run of the other system, or a field that cannot be changed.
    """
    found = read_run(run)
    source = found.source
    # The run's own mesh describes the machine that it was trained on, and the teachers of its
    # baseline are needed only for training.
    config = dataclasses.replace(
        found.config, mesh=MeshConfig(), baseline=DistillConfig(kind="none")
    )
    settings = dict(settings or {})
    config = dataclasses.replace(config, sources=_moved_sources(config, source, settings))
    config = change_config(config, settings, changeable=CHANGEABLE, fixed=FIXED)
    phase = PHASES[config.phase]
    role, family = phase.role, family_of_role(config, phase.role)
    section = getattr(config, SECTIONS[role])
    mesh = make_mesh(config.mesh, _devices(family, section, config.mesh))
    params = {
        role: checkpoint.load(source, subtree=role, mesh=mesh, rules=family.rules, average=True)
    }
    if phase.modular:
        training = phase.describe(config, mesh)
        forward, init = training.forward, training.init
        helpers = _load_helpers(config, training.helpers)
    else:
        network = whole_network(config, role)
        forward, helpers = whole_forward(network, role), {}

        def init(key: jax.Array) -> dict[str, Any]:
            return {role: network.init(key)}

    ways = {f"{role}/{regex}": way for regex, way in family.adapt(section).items()}
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = _resize(params, shapes, ways, match_rules(family.rules, shapes, mesh))
    return Trained(source, config, found.classes, mesh, forward, params, helpers)


def _devices(family: Family, section: Any, mesh: MeshConfig) -> list[jax.Device]:
    """The devices to run on: all, unless the mesh is not given and the network can be split only
    over fewer."""
    devices = jax.devices()
    for count in range(len(devices), 0, -1):
        with contextlib.suppress(ValueError):
            family.check_mesh(section, {"data": count}, 0)  # 0 is a multiple of any group
            break
    if count == len(devices) or mesh != MeshConfig() or jax.process_count() > 1:
        return devices
    logging.warning("the network can be split over %d of the %d devices", count, len(devices))
    return devices[:count]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run's checkpoint, the run's config, and its classes by label."""

    source: epath.Path
    config: Config
    classes: tuple[str, ...]


def read_run(run: epath.PathLike) -> Finished:
    """The checkpoint, config and classes of a run, or of a pipeline's result; as `find_run`."""
    source, config = find_run(run)
    return Finished(source, config, read_classes(source, config))


def find_run(run: epath.PathLike) -> tuple[epath.Path, Config]:
    """Finds the checkpoint of a run, or of a pipeline's result, and the run's config. Warns if the
    run is not finished.

    Raises:
      FileNotFoundError: if there is no finished checkpoint.
      ValueError: for a run of the other system.
    """
    folder = _product(epath.Path(run))
    source = checkpoint.find_step(folder)
    checkpoint.warn_if_unfinished(folder)
    saved = checkpoint.load_config(source)
    check_system(saved, SYSTEM, str(source))
    return source, freeze_stored(Config, saved, source)


def read_classes(source: epath.Path, config: Config) -> tuple[str, ...]:
    """Class names from the run's classes.json, else from its training set, else plain numbers."""
    if (path := find_classes(source)) is not None:
        names = read_json(path, {"names": list})["names"]
        if len(names) == config.data.labels and all(isinstance(one, str) for one in names):
            return tuple(names)
        raise ValueError(f"{path} must list config.data.labels={config.data.labels} class names")
    try:
        return tuple(load_source(config.data, config.data.train_split).label_names)
    except (OSError, ValueError, ImportError) as error:
        logging.warning("%s is missing, so classes are named by number: %s", CLASSES, error)
        return tuple(map(str, range(config.data.labels)))


def choose_network(trained: Trained, module: int | None) -> str:
    """The key of a run's network in the results of `run_batches`; for a run of several modules, the
    key of the meta model with module `module`.

    Raises:
      ValueError: if the run has several modules and `module` is none of them.
    """
    if not PHASES[trained.config.phase].modular:
        if module is not None:
            raise ValueError(
                f"--module={module}: {trained.source} holds a whole network; leave it out"
            )
        return trained.role
    stages = trained.config.modules()
    chosen = stages if module is None else (module,)
    if len(chosen) != 1 or chosen[0] not in stages:
        given = "" if module is None else f"--module={module}: "
        raise ValueError(
            f"{given}{trained.source} holds modules {', '.join(map(str, stages))}, each for its "
            "own stage of the meta model; choose one with --module=K"
        )
    return module_name(chosen[0])


def choose_batch(trained: Trained, count: int) -> int:
    """The smallest batch that holds `count` images and can be split over the devices, up to the
    batch size of the run's own evaluation.

    Raises:
      ValueError: if there is none.
    """
    config, devices = trained.config, trained.mesh.size
    most = config.optim.micro_batch
    divisors = [size for size in range(1, most + 1) if most % size == 0]
    # Divisors of the batch that the run evaluates with, made multiples of the devices.
    sizes = sorted({math.lcm(size, devices) for size in divisors})
    section, problem = getattr(config, SECTIONS[trained.role]), None
    for size in [size for size in sizes if size >= min(count, most)]:
        try:
            # Where tokens compete for experts, the batch must be a multiple of the groups.
            trained.family.check_mesh(section, dict(trained.mesh.shape), size)
            return size
        except ValueError as error:
            problem = error
    raise problem


def picture_batches(
    trained: Trained, paths: Sequence[str], batch: int | None
) -> tuple[PictureFiles, Iterator[Mapping[str, np.ndarray]]]:
    """Image files and their batches, preprocessed as in the run's evaluation; unreadable files are
    masked out.

    Args:
      trained: the run.
      paths: paths of the files.
      batch: images per batch; None chooses one, see `choose_batch`.

    Raises:
      ValueError: for a batch that cannot be split over the devices.
    """
    data = trained.config.data
    batch = batch or choose_batch(trained, len(paths))
    check_batch(trained.mesh, "--batch", batch)
    source = PictureFiles(paths, data.channels)
    batches = eval_batches(
        source,
        transform=SquareTransform(data.image_size),
        batch=batch,
        workers=data.workers,
        bad_share=1.0,
    )
    return source, batches


def run_batches(
    trained: Trained,
    batches: Iterable[Mapping[str, np.ndarray]],
    finish: Callable[[jax.Array, Mapping[str, jax.Array]], Any],
) -> Iterator[tuple[Mapping[str, np.ndarray], dict[str, Any]]]:
    """Yields every batch with the results of `finish(logits, batch)` by network, on the host.

    Args:
      trained: the run.
      batches: batches from `common_jax.inputs.eval_batches`.
      finish: a traceable function; logits are (B, L).
    """
    config = trained.config

    @jax.jit
    def compute(params: Any, helpers: Any, batch: Any, index: Any) -> dict[str, Any]:
        # The key that the run's own evaluation gives batch `index`, unless its noise is "sampled".
        rngs = evaluation_rngs(config, evaluation_key(np.uint32(config.seed), index))
        images = prepare_evaluation(batch, config.data)
        outputs = trained.forward(params, helpers, images, False, rngs)
        return {name: finish(one.logits, batch) for name, one in outputs.items()}

    def dispatched() -> Iterator[tuple[Mapping[str, np.ndarray], Any]]:
        for index, batch in enumerate(batches):
            with jax.set_mesh(trained.mesh):
                placed = to_devices(batch, trained.mesh)
                found = compute(trained.params, trained.helpers, placed, np.int32(index))
            yield batch, found

    for batch, found in one_behind(dispatched()):
        yield batch, jax.device_get(found)


def _product(run: epath.Path) -> epath.Path:
    """The folder of a pipeline's result; any other folder unchanged."""
    config = run / "config.json"
    if config.exists() and read_json(config).get("phase") == "pipeline":
        return run / result_folder()
    return run


def _moved_sources(config: Config, step: epath.Path, settings: Mapping[str, str]) -> SourcesConfig:
    """The sources of a run's frozen networks, which were moved with it if it is a pipeline's; those
    in `settings` are the user's own."""

    def find(role: str, source: str) -> str:
        return checkpoint.find_moved(f"config.sources.{role}", source, step.parent.parent)

    sources, found = config.sources, {}
    for role in ("meta", "teacher"):
        if f"sources.{role}" not in settings:
            found[role] = find(role, getattr(sources, role))
    if "sources.teachers" not in settings:
        found["teachers"] = tuple(find("teachers", one) for one in sources.teachers)
    return dataclasses.replace(sources, **found)


def _load_helpers(config: Config, shapes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The frozen networks of other runs that surround the trained modules."""
    several, _ = load_teachers(config, shapes)
    origins, shapes = [], {role: shapes[role] for role in shapes if role not in several}
    for role, stages in shapes.items():
        source = getattr(config.sources, role)
        checkpoint.check_source(f"config.sources.{role}", source)
        origins += [Origin(source, f"{role}/{name}", f"{role}/{name}") for name in stages]
    return {**take_weights(config, shapes, origins, frozen=True).params, **several}


def _resize(
    params: Mapping[str, Any],
    shapes: Mapping[str, Any],
    ways: Mapping[str, Adapt],
    shardings: Mapping[str, Any],
) -> dict[str, Any]:
    """Resizes parameters to the network's shapes where the family says how; raises ValueError for
    any other parameter whose shape differs."""
    flat = traverse_util.flatten_dict(params, sep="/")
    placed = traverse_util.flatten_dict(shardings, sep="/")
    for path, shape in traverse_util.flatten_dict(shapes, sep="/").items():
        if path in flat and flat[path].shape == shape.shape:
            continue
        way = next((way for regex, way in ways.items() if re.fullmatch(regex, path)), None)
        if path not in flat or way is None:
            raise ValueError(
                f"{path} should have shape {shape.shape}, but the checkpoint has "
                f"{flat[path].shape if path in flat else 'none'}: the network takes images of "
                "another size, or only of the size that it was trained on"
            )
        adapted = way(np.asarray(flat[path]), shape.shape)
        flat[path] = put(adapted, placed[path])
    return traverse_util.unflatten_dict(flat, sep="/")
