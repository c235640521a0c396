"""The model card of an exported run: contents, data, settings, scores, and a licence to fill in."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from cliptrans_jax.config import Config
from cliptrans_jax.data.corpora import SOURCES
from cliptrans_jax.export.towers import HUB
from cliptrans_jax.runs.finished import Finished
from cliptrans_jax.runs.scoring import SCORES
from common_jax import checkpoint
from common_jax.config import flatten, unfreeze
from common_jax.workdir import read_json
from common_jax.workdir.results import RESULT

PAPER = "[CLIPTrans](https://arxiv.org/abs/2308.15226)"
# Settings that say nothing about the model: local paths, devices, logging.
LEFT_OUT = (
    *("data.path", "data.workers", "sources.", "tokenizer.path", "clip_tokenizer.path"),
    *("features", "run.", "mesh.", "recipes", "stage"),
)
ABOUT = {
    "config.json": "sizes of the translator",
    "generation_config.json": "the search, and the language that it writes",
    "model.safetensors": "weights of the translator, float32",
    "mapper.safetensors": "the mapping network, under the names of CLIPTrans' own checkpoints",
    "tokenizer.json": "tokenizer; a language is the token `__CODE__`",
    "text_tower/config.json": "the text tower",
    "text_tower/projection.safetensors": "its last layer, on the mean over a sentence's tokens",
    "image_tower/config.json": "the image tower",
}
WHOLE = "It has no prefix, so this folder is the whole model."
PLAIN = """**`transformers` loads this folder as a plain {name}, without the prefix**, as it has no
class for the whole model. Without M-CLIP's features and the mapping network (`mapper.safetensors`),
outputs differ from those of the trained model, and are usually worse. The scores below are of the
whole model, which the command `cliptrans translate` runs from the run's own folder."""
NO_SCORES = "None are on record for this checkpoint."
TRANSLATOR = """Translation:

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForSeq2SeqLM.from_pretrained("FOLDER")
inputs = tokenizer(["SENTENCE"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))
```"""


def write(run: Finished, files: Sequence[str], towers: Sequence[Any]) -> str:
    """The card of a run.

    Args:
      run: the checkpoint to export.
      files: names in the folder.
      towers: configs of the towers in it.
    """
    about = {f"`{name}`": ABOUT[name] for name in files if name in ABOUT}
    settings = _table(("setting", "value"), _settings(run.config))
    sections = {
        "Use": "\n\n".join(_uses(files, towers)),
        "Files": _table(("file", "content"), about),
        "Training": _table(("", ""), _training(run)),
        "Settings": f"All others have the defaults of the code.\n\n{settings}",
        "Scores": _scores(run),
        "Licence": "\n\n".join(_licence(run.config)),
    }
    parts = [f"## {title}\n\n{text}" for title, text in sections.items()]
    return "\n\n".join([_metadata(run), _head(run), *parts]) + "\n"


def _metadata(run: Finished) -> str:
    """The YAML header that the hub reads."""
    languages = run.config.known_languages if run.trains_towers else run.config.data.pair
    task = "feature-extraction" if run.trains_towers else "translation"
    return "\n".join(
        [
            "---",
            "license: unknown  # to be filled in, see the last section",
            # Quoted: a bare `no` is false in YAML, not Norwegian.
            f"language: {json.dumps([language.partition('_')[0] for language in languages])}",
            "library_name: transformers",
            f"pipeline_tag: {task}",
            "---",
        ]
    )


def _head(run: Finished) -> str:
    config = run.config
    if run.trains_towers:
        return (
            f"# M-CLIP: {', '.join(config.known_languages)}\n\nTwo towers that map pictures, and "
            f"sentences in these languages, into one space, trained for {PAPER}."
        )
    source, target = config.data.pair
    prefix, name = config.model.mapper.prefix, config.model.architecture.name
    method = (
        f"features of M-CLIP become a prefix of {prefix} vectors in the decoder of an {name}"
        if prefix
        else f"an {name}"
    )
    limits = PLAIN.format(name=name) if prefix else WHOLE
    return (
        f"# CLIPTrans: {source} to {target}\n\n"
        f"A model of {PAPER}, stage `{config.stage}`: {method}.\n\n{limits}"
    )


def _uses(files: Sequence[str], towers: Sequence[Any]) -> Iterator[str]:
    if "generation_config.json" in files:
        yield TRANSLATOR
    yield from (HUB[type(config)].use for config in towers)


def _training(run: Finished) -> dict[str, Any]:
    config, shapes = run.config, jax.tree.leaves(checkpoint.load_shapes(run.step))
    data = config.data
    names = ("model", "mbart", "clip", "clip_text", "clip_image", "siglip")
    sources = {name: Path(getattr(config.sources, name)).name for name in names}
    starts = ", ".join(f"{name} `{value}`" for name, value in sources.items() if value)
    return {
        "stage": f"`{config.stage}`",
        "step": run.step.name,
        "parameters": f"{sum(math.prod(leaf.shape) for leaf in shapes):,}",
        "data": f"`{data.source}`: trained on `{data.train_split}`, chosen on `{data.valid_split}`",
        "languages": ", ".join(config.known_languages),
        "weights of earlier runs, and published ones": starts or "none",
    }


def _settings(config: Config) -> dict[str, str]:
    """The settings that differ from the defaults."""
    ours, defaults = (dict(flatten(unfreeze(x))) for x in (config, Config()))
    return {
        f"`{key}`": f"`{value!r}`"
        for key, value in ours.items()
        if value != defaults.get(key) and not key.startswith(LEFT_OUT)
    }


def _scores(run: Finished) -> str:
    if run.trains_towers:
        result = read_json(run.workdir / RESULT) if (run.workdir / RESULT).exists() else {}
        rows = {name: f"{result[name]:.4f}" for name in result if name.startswith("val/")}
        return _table(("validation set", "value"), rows) if rows else NO_SCORES
    # Further test splits have a folder each.
    paths = [run.workdir / SCORES, *sorted(run.workdir.glob(f"*/{SCORES}"))]
    found = [read_json(path) for path in paths if path.exists()]
    own = [scores for scores in found if str(scores.get("step")) == run.step.name]
    return "\n\n".join(map(_split_scores, own)) or NO_SCORES


def _split_scores(scores: Mapping[str, Any]) -> str:
    # A bar would end the table's cell, even in code.
    signatures = {name: x.replace("|", r"\|") for name, x in scores["signatures"].items()}
    rows = {f"{name} | {scores[name]:.2f}": f"`{x}`" for name, x in signatures.items()}
    table = _table(("score | value", "signature"), rows)
    return f"{scores['sentences']} sentences of {scores['set']}:\n\n{table}"


def _licence(config: Config) -> Iterator[str]:
    yield (
        "To be filled in, here and as `license` at the top. The terms of the data apply, and those "
        "of published weights that the model started from."
    )
    if notice := SOURCES[config.data.source].notice:
        yield notice


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> str:
    columns = " | ".join(header)
    lines = [f"| {columns} |", "|" + "---|" * (columns.count(" | ") + 1)]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items())])
