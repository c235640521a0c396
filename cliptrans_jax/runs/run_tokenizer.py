"""The tokenizer of a run's translation model: trained and written to the workdir once, then read
from there."""

import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from cliptrans_jax import pretrained
from cliptrans_jax.config import Config
from cliptrans_jax.data.corpora import load_corpus
from cliptrans_jax.data.tokenizers import byte_pairs
from cliptrans_jax.data.tokenizers.framing import Tokenizer, require_fits
from cliptrans_jax.data.tokenizers.published import PUBLISHED
from cliptrans_jax.data.tokenizers.token_files import read_record
from cliptrans_jax.data.tokenizers.tokens import load_tokenizer
from cliptrans_jax.runs.initial_weights import has_published_translator
from common_jax import checkpoint
from common_jax.inputs.ragged import Chain
from common_jax.weights.files import FOLDER_FILES
from common_jax.workdir import holds_results, write_bytes

TOKENIZER = "tokenizer.json"


def train_tokenizer(config: Config, workdir: epath.Path) -> tuple[Tokenizer, str]:
    """The translation model's tokenizer, and the content of its file if it is trained.

    If the workdir has results, its tokenizer is loaded; else one is trained, but not yet written.

    Raises:
      ValueError: if it has more tokens than the translator's vocabulary.
    """
    languages, sentences = config.known_languages, None
    if config.tokenizer.is_trained:
        corpus = load_corpus(config.data, config.data.train_split, languages)
        sentences = Chain(tuple(corpus.texts[language] for language in languages))
    cut = dataclasses.replace(config.tokenizer, max_length=config.sentence_limit)
    # Trained elsewhere, since nothing may be written to the workdir before all is checked.
    with tempfile.TemporaryDirectory() as folder:
        path = workdir / TOKENIZER
        resumes = path.exists() and holds_results(workdir)
        path = path if resumes else epath.Path(folder) / TOKENIZER
        tokenizer = load_tokenizer(cut, sentences=sentences, languages=languages, path=path)
        text = path.read_text() if sentences is not None else ""
    require_fits(tokenizer, vocab=config.model.sizes.vocab, special={}, key=config.model.key)
    return tokenizer, text


def save_tokenizer(text: str, workdir: epath.Path) -> None:
    """Atomically writes the file of a trained tokenizer, unless it already has this content."""
    path = workdir / TOKENIZER
    if not text or jax.process_index() or (path.exists() and path.read_text() == text):
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def require_same_tokenizer(config: Config, name: str, text: str) -> None:
    """Raises ValueError if a run in config.sources has another tokenizer.

    Args:
      name: field of `config.sources`.
      text: content of this run's tokenizer file; "" for a published tokenizer.
    """
    source = getattr(config.sources, name)
    try:
        step = checkpoint.find_step(source) if source else None
    except FileNotFoundError:  # raised again when weights are loaded
        return
    # With a published text tower, a run of stage "clip" has no tokenizer.
    if step is None or (name == "clip" and config.sources.clip_text):
        return
    kind = (checkpoint.load_config(step).get("tokenizer") or {}).get("kind")
    if kind not in (None, config.tokenizer.kind):
        raise ValueError(
            f"config.sources.{name}={source!r} is a run with config.tokenizer.kind={kind!r}, whose "
            f"ids mean other words than with config.tokenizer.kind={config.tokenizer.kind!r}; "
            "give the config.tokenizer of that run"
        )
    other = step.parent.parent / TOKENIZER
    if text and other.exists() and other.read_text() != text:
        raise ValueError(
            f"config.sources.{name}: {other} is not the tokenizer of this config; "
            "give the config.data, config.languages and config.tokenizer of that run"
        )


def require_tokenizer_of_weights(config: Config, text: str) -> None:
    """Raises ValueError if published weights were trained with another tokenizer than this run's,
    which it trains itself.

    The tokenizer beside the weights tells, as in an exported run. Without one, so does an embedding
    far too large for this run's; otherwise there is only a warning.

    Args:
      text: content of this run's tokenizer file; "" for a published tokenizer.
    """
    sources, architecture = config.sources, config.model.architecture
    embedding = f"{architecture.subtree}/{architecture.embedding}"
    learned = sources.fresh and re.fullmatch(sources.fresh, embedding)
    if not text or learned or not has_published_translator(config):
        return
    name = "mbart" if sources.translator else "model"
    source = sources.translator or sources.model
    try:
        path = pretrained.find(source, fetch=sources.fetch)
    except FileNotFoundError:  # raised again when weights are loaded
        return
    # The folder of a file with any other name may hold anything.
    folder = path.parent if path.name in FOLDER_FILES else path
    files = {TOKENIZER, *(file for one in PUBLISHED.values() for file in one.files)}
    beside = sorted(file for file in files if (folder / file).is_file())
    rows, key = config.model.sizes.vocab, f"config.sources.{name}={source!r}"
    if beside:
        theirs = folder / (TOKENIZER if TOKENIZER in beside else beside[0])
        if theirs.name == TOKENIZER and _words(read_record(theirs)) == _words(json.loads(text)):
            return
        reason = f"it has another one, {theirs}"
    elif rows > 2 * config.tokenizer.vocab:
        reason = (
            f"its embedding has {rows} rows, and config.tokenizer.vocab={config.tokenizer.vocab}"
        )
    else:
        logging.warning(
            "%s has no tokenizer beside it: its ids mean other words unless it was trained with "
            "the same config.data, config.languages and config.tokenizer as this run",
            key,
        )
        return
    raise ValueError(
        f"{key} was not trained with the tokenizer of config.tokenizer.kind='trained', so that "
        f"every id would mean another word: {reason}. Give config.tokenizer.kind="
        f"{architecture.tokenizer!r} and its folder as config.tokenizer.path; for a model trained "
        "here, the config.data, config.languages and config.tokenizer of its run; or train a new "
        f"embedding with config.sources.fresh={embedding!r}"
    )


def _words(record: Mapping[str, Any]) -> Any:
    """What determines the ids of a tokenizer that was trained here: pieces, merges and languages,
    from its own file or from an exported one; None for any other file."""
    try:
        if "bpe" in record:
            vocab, merges = byte_pairs.parse(json.loads(record["bpe"]))
            return vocab, merges, list(record["made_from"]["languages"])
        vocab, merges = byte_pairs.parse(record)
        added = sorted((token["id"], token["content"]) for token in record["added_tokens"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    # See `language_token` in cliptrans_jax/export/tokenizers.py.
    names = (re.fullmatch("__(.+)__", name) for place, name in added if place >= len(vocab))
    return vocab, merges, [name[1] for name in names if name]
