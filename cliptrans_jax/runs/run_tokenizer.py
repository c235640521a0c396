"""The tokenizer of a run's translation model: trained and written to the workdir once, then read
from there."""

import dataclasses
import tempfile

import jax
from etils import epath

from cliptrans_jax.config import Config
from cliptrans_jax.data.corpora import load_corpus
from cliptrans_jax.data.tokenizers.framing import Tokenizer, require_fits
from cliptrans_jax.data.tokenizers.tokens import load_tokenizer
from common_jax import checkpoint
from common_jax.inputs.ragged import Chain
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
