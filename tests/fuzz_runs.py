"""Files that runs write, caches and their own: samples, our reading, and that of numpy and json."""

import contextlib
import dataclasses
import io
import json
import logging
import random
import tempfile
from pathlib import Path
from typing import Any

import mutations
import numpy as np
from fuzz_format import Format, same

# ----- caches, which are rebuilt if they are broken -----

FEATURES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
PRINT = "f00d"


@contextlib.contextmanager
def _logged():
    """The records logged in this context, from INFO up."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _require_one_warning(records: list[logging.LogRecord], again: str) -> None:
    """Raises the one warning about a broken file as a ValueError."""
    warnings = [r.getMessage() for r in records if r.levelno >= logging.WARNING]
    other = [r.getMessage() for r in records if "was made from other" in r.getMessage()]
    if len(warnings) + len(other) != 1:
        raise AssertionError(f"{again} with {len(warnings)} warnings: {warnings}")
    raise ValueError(*warnings, *other)


def _read_features(path: Path) -> np.ndarray:
    from cliptrans_jax.features import cached

    calls = []
    with _logged() as records:
        found = cached(path.parent, path.stem, PRINT, lambda: calls.append(1) or FEATURES)
    if calls:
        assert same(found, FEATURES)
        _require_one_warning(records, "recomputing")
    return found


def _npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _plain_features(path: Path, content: bytes) -> np.ndarray:
    with np.load(io.BytesIO(content)) as arrays:
        assert str(arrays["fingerprint"]) == PRINT
        return np.ascontiguousarray(arrays["features"])


def _prior_settings() -> dict[str, Any]:
    from m2mkd_jax.nac.graphs import PriorConfig

    config = PriorConfig(graph="barabasi_albert", steps=2)
    return {"config": config, "nodes": 8, "signature_width": 4, "seed": 0}


def _prepare_prior(cache: Path | None) -> dict[str, Any]:
    from m2mkd_jax.nac.priors import prepare_prior

    return dataclasses.asdict(prepare_prior(**_prior_settings(), cache=cache))


def _prior_sample() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        _prepare_prior(Path(folder))
        return (Path(folder) / "prior.npz").read_bytes()


def _read_prior(path: Path) -> dict[str, Any]:
    before = path.read_bytes()
    with _logged() as records:
        found = _prepare_prior(path.parent)
    if path.read_bytes() != before:
        assert same(found, _prepare_prior(None))
        warned = any(record.levelno >= logging.WARNING for record in records)
        if not warned:  # the cache is of other settings
            raise ValueError(f"{path} is of other settings")
        _require_one_warning(records, "made again")
    return found


def _plain_prior(path: Path, content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content)) as arrays:
        values = {name: arrays[name] for name in arrays if name != "fingerprint"}
    names = _prepare_prior(None)
    return {k: values[k] if values[k].ndim else values[k].item() for k in names}


# ----- a run's own files -----

LINES = [
    {"step": 2, "epoch": 0.5, "train/loss": 1.25, "train/moe/load": [0.5, 0.25]},
    {"step": 4, "epoch": 1.0, "train/loss": float("nan"), "test/accuracy": 0.5},
    {"step": 6, "epoch": 1.5, "train/loss": 0.75},
]


def _metrics_sample() -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in LINES)


def _lines(rng: random.Random, data: bytes) -> bytes:
    """A line changed, removed, doubled or swapped."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place] = rng.choice((mutations.json_text, mutations.digits, mutations.flip))(
        rng, lines[place] or b"{}"
    )
    if rng.random() < 0.2:
        rng.shuffle(lines)
    return b"\n".join(lines)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    from common_jax.metrics import read_metrics

    return read_metrics(path)


def _plain_metrics(path: Path, content: bytes) -> list[dict[str, Any]]:
    lines = content.split(b"\n")
    found = [json.loads(line.decode("utf-8-sig")) for line in lines[:-1]]
    try:
        last = json.loads(lines[-1].decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return found
    return [*found, last] if isinstance(last, dict) and type(last.get("step")) is int else found


def _config_sample() -> bytes:
    from tiny import tiny_config

    from common_jax.config import unfreeze

    config = unfreeze(tiny_config("distill")).to_dict()
    return json.dumps(config, indent=2).encode()


def _read_config(path: Path) -> dict[str, Any]:
    """The fields of the config stored in a run's folder."""
    from common_jax.config import flatten
    from common_jax.workdir import freeze_stored, plain, read_json
    from m2mkd_jax.config import Config

    return dict(flatten(plain(freeze_stored(Config, read_json(path), path))))


def _plain_config(path: Path, content: bytes) -> dict[str, Any]:
    from common_jax.config import flatten

    return dict(flatten(json.loads(content.decode("utf-8-sig"))))


def _agrees(found: dict[str, Any], stored: dict[str, Any]) -> bool:
    """Whether a config has what the file says. Fields from other versions may be on one side
    only."""
    if not isinstance(found, dict):
        return False
    return all(_listed(found[key]) == _listed(stored[key]) for key in found.keys() & stored.keys())


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, list | tuple) else value


_NPZ_EDITS = (
    mutations.zip_entries(mutations.npy),
    mutations.zip_entries(mutations.npy),
    mutations.zip_fields,
)


def feature_caches() -> Format:
    """Encoder features that cliptrans_jax caches."""
    return Format(
        "features npz",
        "train.npz",
        (_npz(features=FEATURES, fingerprint=np.array(PRINT)),),
        _NPZ_EDITS,
        _read_features,
        _plain_features,
        checked=True,
    )


def prior_caches() -> Format:
    """Graph priors that m2mkd_jax caches."""
    return Format(
        "prior npz",
        "prior.npz",
        (_prior_sample(),),
        _NPZ_EDITS,
        _read_prior,
        _plain_prior,
        checked=True,
    )


def metrics_files() -> Format:
    """A run's metrics.jsonl."""
    return Format(
        "metrics.jsonl",
        "metrics.jsonl",
        (_metrics_sample(),),
        (_lines, _lines),
        _read_metrics,
        _plain_metrics,
        checked=False,
    )


def config_files() -> Format:
    """A run's config.json."""
    return Format(
        "config.json",
        "config.json",
        (_config_sample(),),
        (mutations.json_text,),
        _read_config,
        _plain_config,
        checked=False,
        agree=_agrees,
    )
