"""Exporting a run as a folder for other frameworks: weights, config.json and a model card."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from common_jax.config import flatten, unfreeze
from common_jax.untrusted import brief
from common_jax.weights import write_tensors
from common_jax.weights.table import Pretrained
from common_jax.workdir import freeze_stored, new_folder, read_json, write_json
from common_jax.workdir.results import RESULT
from m2mkd_jax.config import Config
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.networks import SECTIONS
from m2mkd_jax.pretrained.kinds import KINDS
from m2mkd_jax.pretrained.timm_config import timm_config
from m2mkd_jax.pretrained.writing import kind_of_run, load_run, to_tensors

WEIGHTS, CONFIG, RUN, CARD = "model.safetensors", "config.json", "run_config.json", "README.md"
PAPER = "[m2mKD](https://arxiv.org/abs/2402.16918)"
# Fields that say where and how a run was done, not what was trained.
LEFT_OUT = ("sources.", "mesh.", "run.", "recipes.", "data.path", "data.workers", "ood.path")
USE_TIMM = """```python
import timm, torch

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probabilities = model(transform(picture)[None]).softmax(-1)  # picture: PIL, mode {mode}
names = model.pretrained_cfg["label_names"]
```"""
USE_OWN = """No other framework has this network: {reason}. `run_config.json` is its config, and the
tensors have the names of the method's original code. `python tools/convert_weights.py FOLDER OUT`
makes a checkpoint of them again, with this config."""


def write_folder(
    source: epath.Path, out: Path, *, stage: int | None, classes: tuple[str, ...]
) -> Pretrained:
    """Writes a run's network to `out`, a new folder, atomically.

    A whole ViT gets timm's config.json if timm has such a network. Any other network, or a module,
    only gets run_config.json beside its weights.

    Args:
      source: folder of a checkpoint.
      out: the folder to create.
      stage: stage of the module to export, if the run has several.
      classes: class names by label.

    Returns:
      What was written.

    Raises:
      FileExistsError: if `out` exists.
      ValueError: like `load_run`.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new folder")
    found = load_run(source, stage=stage)
    kind, about, reason = KINDS[found.kind], None, ""
    try:
        if not kind.loads_in_timm:
            raise ValueError(f"it is {_about(found)}")
        about = timm_config(found.config, getattr(found.config, kind.section), classes)
    except ValueError as error:
        reason = str(error)
    with new_folder(out) as part:
        write_tensors(part / WEIGHTS, to_tensors(found))
        if about:
            write_json(part / CONFIG, about)
        more = {"kind": found.kind, "classes": list(classes)}
        write_json(part / RUN, unfreeze(found.config).to_dict() | more)
        (part / CARD).write_text(write_card(found, source, classes, reason))
    return found


@dataclasses.dataclass(frozen=True)
class Exported:
    """What a folder that `write_folder` wrote says of its weights.

    Attributes:
      config: config of the run.
      kind: a key of KINDS.
      classes: class names by label; () if the folder has none.
    """

    config: Config
    kind: str
    classes: tuple[str, ...]


def read_run_config(source: Path) -> Exported | None:
    """Reads what `write_folder` wrote beside the weights in `source`, a folder or the file of
    weights in it; None if there is nothing. Raises ValueError if it is damaged."""
    # The folder of a file with any other name may hold anything.
    path = (source.parent if source.name == WEIGHTS else source) / RUN
    if not path.is_file():
        return None
    stored = read_json(path)
    kind, names = stored.pop("kind", None), stored.pop("classes", [])
    config = freeze_stored(Config, stored, path)
    if kind is None:  # written by an earlier version
        role = PHASES[config.phase].role
        stages = getattr(config, SECTIONS[role]).depths
        kind = kind_of_run(config, {role: dict(enumerate(stages))}, single=config.module.isdigit())
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path}: kind={brief(kind)} must be one of {sorted(KINDS)}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: classes={brief(names)} must be a list of names")
    return Exported(config, kind, tuple(names))


def write_card(found: Pretrained, source: epath.Path, classes: tuple[str, ...], reason: str) -> str:
    """The text of the model card.

    Args:
      found: what is exported.
      source: folder of the checkpoint.
      classes: class names by label.
      reason: why timm cannot load it; "" if it can.
    """
    config = found.config
    mode = {1: "L", 3: "RGB"}[config.data.channels]
    use = USE_OWN.format(reason=reason) if reason else USE_TIMM.format(mode=mode)
    sections = {
        "Use": use,
        "Training": "\n".join(_training(config, found, source)),
        "Scores": "\n".join(_scores(source)),
        "Settings": "All others have their defaults.\n\n" + "\n".join(_settings(config)),
        "Classes": ", ".join(classes[:100]) + (", ..." if len(classes) > 100 else ""),
        "Licence": "To be filled in, here and at the top: the terms of the data apply, and those "
        "of published weights that the run started from.",
    }
    library = "" if reason else "library_name: timm\n"
    head = (
        f"---\nlicense: unknown  # to be filled in\n{library}"
        f"pipeline_tag: image-classification\n---\n\n# {PAPER}: {config.phase}\n\n"
        f"This is {_about(found)}, for images of "
        f"{config.data.image_size} x {config.data.image_size} pixels.\n"
    )
    return head + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def _about(found: Pretrained) -> str:
    """A description of the network, for users."""
    return KINDS[found.kind].about.partition(", for")[0]


def _training(config: Config, found: Pretrained, source: epath.Path) -> Iterator[str]:
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(found.params))
    yield f"- phase `{config.phase}`, step {source.name}; {count:,} parameters"
    yield f"- data `{config.data.source}`, split `{config.data.train_split}`"
    for name, value in flatten(unfreeze(config.sources).to_dict()):
        if value:
            yield f"- weights of earlier runs, `{name}`"


def _scores(source: epath.Path) -> Iterator[str]:
    """The final scores of the run, if this is its last checkpoint."""
    path = source.parent.parent / RESULT
    result: Mapping[str, Any] = read_json(path) if path.exists() else {}
    if str(result.get("steps")) != source.name:
        yield "None are on record for this checkpoint."
        return
    yield "| metric | value |"
    yield "|---|---|"
    for name, value in result.items():
        if "/" in name and isinstance(value, int | float):
            yield f"| {name} | {value:.4f} |"


def _settings(config: Config) -> Iterator[str]:
    """The settings that are not the defaults."""
    yield "| setting | value |"
    yield "|---|---|"
    ours, defaults = (dict(flatten(unfreeze(one))) for one in (config, Config()))
    for key, value in ours.items():
        if value != defaults.get(key) and not key.startswith(LEFT_OUT):
            yield f"| `{key}` | `{json.dumps(value, default=str)}` |"
