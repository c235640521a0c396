"""Exports a run as a folder that `transformers` loads as is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cliptrans_jax import pretrained
from cliptrans_jax.config import Config
from cliptrans_jax.encoders import TextTower
from cliptrans_jax.export import card
from cliptrans_jax.export.tokenizers import write_tokenizer
from cliptrans_jax.export.towers import write_tower
from cliptrans_jax.models.cliptrans_names import mapper_table
from cliptrans_jax.runs.finished import Finished, image_tower, text_tower
from cliptrans_jax.runs.run_data import caption_language
from cliptrans_jax.runs.run_tokenizer import TOKENIZER
from cliptrans_jax.runs.run_towers import text_tokenizer
from cliptrans_jax.stages import STAGES
from common_jax import checkpoint
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.weights import write_tensors
from common_jax.weights.table import write
from common_jax.workdir import new_folder

CARD, MAPPER = "README.md", "mapper.safetensors"
TEXT_TOWER, IMAGE_TOWER = "text_tower", "image_tower"


def export(run: Finished, out: Path) -> list[str]:
    """Writes the folder of a run, atomically.

    For a run that trains a translator it contains the translator with its tokenizer, and the
    mapping network under the original's names; for every run, the towers that were trained here,
    each in its own folder. README.md is the model card.

    Args:
      run: a run of any stage.
      out: a new folder.

    Returns:
      The files, sorted.

    Raises:
      FileExistsError: if `out` exists and is not an empty folder.
      FileNotFoundError, ValueError: if towers or a tokenizer are missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists; give a new folder")
    with new_folder(out) as part:
        if not run.trains_towers:
            _write_translator(part, run)
        towers = _write_towers(part, run)
        files = sorted(str(x.relative_to(part)) for x in part.rglob("*") if x.is_file())
        (part / CARD).write_text(card.write(run, files, towers))
    return [CARD, *files]


def _write_translator(folder: Path, run: Finished) -> None:
    config = run.config
    params = checkpoint.load(run.step, average=True)
    params = jax.tree.map(np.asarray, params)
    pretrained.save(folder, params[config.model.architecture.subtree], config.model.sizes)
    _write_json(folder / "generation_config.json", _generation(run))
    write_tokenizer(
        folder,
        config.tokenizer,
        run.workdir / TOKENIZER,
        config.known_languages,
        limit=config.sentence_limit,
        pair=config.data.pair,
    )
    if config.has_prefix:
        names = mapper_table(config.model.mapper).below(source="adapter.", target="")
        write_tensors(folder / MAPPER, write(names, params["mapper"]))


def _write_towers(folder: Path, run: Finished) -> list[Any]:
    """Writes the towers that were trained here, and returns their configs. Published towers are not
    copied."""
    written = []
    config, mesh = run.config, make_mesh(MeshConfig(), jax.local_devices()[:1])
    trained = run.trains_towers or (config.has_prefix and config.sources.clip)
    if (trained and not _has_published_text(run)) or config.unfreeze_clip:
        tower = text_tower(run, mesh)
        write_tower(folder / TEXT_TOWER, tower.params, tower.config)
        _write_text_tokenizer(folder / TEXT_TOWER, run, tower)
        written.append(tower.config)
    if trained:
        tower = image_tower(run, mesh)
        write_tower(folder / IMAGE_TOWER, tower.params, tower.config)
        written.append(tower.config)
    return written


def _has_published_text(run: Finished) -> bool:
    """True if the text tower was not trained by stage "clip"."""
    config, sources = run.config, run.config.sources
    return config.clip.lock_text if run.trains_towers else bool(sources.clip_text or sources.siglip)


def _write_text_tokenizer(folder: Path, run: Finished, tower: TextTower) -> None:
    config = run.config
    tokenizer = text_tokenizer(config) if _has_published_text(run) else config.tokenizer
    write_tokenizer(
        folder,
        tokenizer,
        run.workdir / TOKENIZER,
        config.known_languages,
        limit=min(tokenizer.limit, tower.longest),
        pair=None,
    )


def _generation(run: Finished) -> dict[str, Any]:
    """The run's search settings in the terms of `transformers`."""
    config: Config = run.config
    sizes, decode = config.model.sizes, config.decode
    captions = STAGES[config.stage].captioning
    language = caption_language(config) if captions else config.data.target_language
    target = run.load_tokenizer().language_id(language)
    return {
        "bos_token_id": 0,
        "pad_token_id": sizes.pad,
        "eos_token_id": sizes.eos,
        "decoder_start_token_id": sizes.start,
        "forced_bos_token_id": target,
        "forced_eos_token_id": sizes.eos,
        "num_beams": decode.beams,
        "max_new_tokens": decode.max_new_tokens,
        "length_penalty": decode.length_penalty,
        "early_stopping": decode.early_stopping,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
