"""Finds the checkpoint to use from a finished run, and its config."""

import dataclasses
import logging
from collections.abc import Collection, Mapping

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cliptrans_jax.config import SYSTEM, Config
from cliptrans_jax.data.tokenizers.framing import Tokenizer
from cliptrans_jax.data.tokenizers.tokens import load_tokenizer
from cliptrans_jax.encoders import ImageTower, TextTower
from cliptrans_jax.runs.run_data import RunData
from cliptrans_jax.runs.run_tokenizer import TOKENIZER
from cliptrans_jax.runs.translation import best_step
from cliptrans_jax.stages import PIPELINE, STAGES, Trains, trains
from cliptrans_jax.translators.table import TRANSLATORS
from common_jax import checkpoint, hosts
from common_jax.command_line import change_config, check_system
from common_jax.mesh import MeshConfig
from common_jax.workdir import freeze_stored, read_json

# Sections and fields of a run's config that may be changed when its model is used.
CHANGEABLE = (
    *("data", "decode", "noise", "test_side", "precision", "sources"),
    *("tokenizer.path", "clip_tokenizer.path", "mesh", "run.compilation_cache"),
    *(f"model.{translator}.attention" for translator in TRANSLATORS),
)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A checkpoint of a run.

    Attributes:
      step: its folder.
      config: the run's config, before `Config.apply_parity`.
    """

    step: epath.Path
    config: Config

    @property
    def workdir(self) -> epath.Path:
        """The run's folder."""
        return self.step.parent.parent

    @property
    def trains_towers(self) -> bool:
        """True for stage "clip", which has no translation model."""
        return trains(self.config.stage) is Trains.TOWERS

    def with_batch(self, size: int, mesh: Mesh) -> "Finished":
        """The same, but decoding at least `size` sentences at a time, split over all devices."""
        decode = dataclasses.replace(self.config.decode, batch=-(-size // mesh.size) * mesh.size)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, decode=decode))

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of the translation model."""
        config = self.config
        cut = dataclasses.replace(config.tokenizer, max_length=config.sentence_limit)
        return load_tokenizer(
            cut, sentences=None, languages=config.known_languages, path=self.workdir / TOKENIZER
        )


def find(
    source: epath.PathLike,
    stages: Collection[str] = STAGES,
    settings: Mapping[str, str] | None = None,
) -> Finished:
    """Finds a run's best checkpoint on its validation set.

    Warns if the run is not finished, or is not the last one of its pipeline.

    Args:
      source: the run's workdir; a pipeline's workdir, whose last run is used; or one step's folder.
      stages: stages that the run may belong to.
      settings: new values as text, by the path of a config field in CHANGEABLE.

    Raises:
      FileNotFoundError: if there is no finished checkpoint.
      ValueError: for a run of another stage or of the other system, or a field that cannot be set.
    """
    folder = _last_run(checkpoint.absolute(source), stages)
    step = checkpoint.common_step(folder)
    checkpoint.warn_if_unfinished(folder)
    saved = checkpoint.load_config(step)
    check_system(saved, SYSTEM, str(source))
    config = freeze_stored(Config, saved, step)
    if config.stage not in stages:
        raise ValueError(
            f"{step.parent.parent} is a run of stage {config.stage!r}, which trains no translation "
            f"model; give a run of one of {[*stages]}"
        )
    scored = step != folder and step.parent.name == checkpoint.FOLDER
    if scored and trains(config.stage) is not Trains.TOWERS:
        step = best_step(step.parent.parent, config.run)
    # Even with another language pair, a trained tokenizer keeps its languages, and so its ids.
    known = config.known_languages if config.tokenizer.is_trained else config.languages
    settings = dict(settings or {})
    if "sources.clip" not in settings:
        workdir, key = step.parent.parent, "config.sources.clip"
        clip = hosts.decide(lambda: checkpoint.find_moved(key, config.sources.clip, workdir))
        config = dataclasses.replace(config, sources=dataclasses.replace(config.sources, clip=clip))
    # The run's own mesh was for the machine that it was trained on.
    config = dataclasses.replace(config, mesh=MeshConfig(), languages=known)
    return Finished(step, change_config(config, settings, changeable=CHANGEABLE))


def _last_run(folder: epath.Path, stages: Collection[str]) -> epath.Path:
    """The folder of a pipeline's last run if `folder` is a pipeline's, else `folder`. Process 0
    chooses for all processes, which must call this together."""

    def choose() -> str:
        path = folder / "config.json"
        config = read_json(path) if path.exists() else {}
        if config.get("stage") != PIPELINE:
            return ""
        runs = [name for name in reversed(STAGES) if name in stages]
        last = next((name for name in runs if (folder / name / checkpoint.FOLDER).exists()), "")
        planned = next((name for name in runs if name in config.get("recipes", {})), last)
        if last and runs.index(planned) < runs.index(last):
            logging.warning(
                "%s is not finished: its run of stage %r is used, since that of stage %r has no "
                "checkpoint yet",
                *(folder, last, planned),
            )
        return last

    return folder / hosts.decide(choose)


def text_tower(run: Finished, mesh: Mesh) -> TextTower:
    """The text tower of a run: the one that it trained, or else the one in its config.sources."""
    config = _with_own_towers(run)
    # A published tower has its own tokenizer.
    known = None if config.sources.clip_text else run.load_tokenizer()
    tower = RunData(config, run.workdir, mesh, known=known).text_tower
    if not config.unfreeze_clip:
        return tower
    params = checkpoint.load(run.step, subtree="clip", average=True)
    return dataclasses.replace(tower, params=jax.tree.map(np.asarray, params))


def image_tower(run: Finished, mesh: Mesh) -> ImageTower:
    """The image tower of a run: the one that it trained, or else the one in its config.sources."""
    return RunData(_with_own_towers(run), run.workdir, mesh).image_tower


def _with_own_towers(run: Finished) -> Config:
    """The run's config; for a run of stage "clip", with the run itself as the source of towers."""
    if not run.trains_towers:
        return run.config
    locked = run.config.sources.clip_text if run.config.clip.lock_text else ""
    sources = dataclasses.replace(
        run.config.sources, clip=str(run.step), clip_text=locked, clip_image="", siglip=""
    )
    return dataclasses.replace(run.config, sources=sources)
