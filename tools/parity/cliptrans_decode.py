"""Runners for decoding: every step of a beam search, and its result."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from cliptrans_jax.decode import DecodeConfig, Search, SearchState
from cliptrans_jax.models import prefix as prefixes
from cliptrans_jax.translators.mbart import MBart
from parity.cases import Case, Comparison
from parity.cliptrans import EXACT, load, translator


def run_generate(case: Case) -> Iterator[Comparison]:
    """Beam search and greedy decoding of one model: every step, and every sample alone."""
    settings, arrays = case.config["generation"], case.arrays
    model = translator(case.config["config"])
    params = load(model, case)
    inputs = {
        "source": jnp.asarray(arrays["inputs/input_ids"]),
        "features": jnp.asarray(arrays["inputs/clip"]) if model.config.mapper.prefix else None,
    }
    mask = inputs["source"] != model.config.mbart.pad
    yield "source mask", mask, arrays["inputs/attention_mask"], *EXACT
    yield from _first_block(case, model, params, inputs)
    names = {key.split("/")[1] for key in arrays if key.startswith("outputs/")}
    for name in sorted(names & {"beam5", "beam3", "greedy"}):
        beams = 1 if name == "greedy" else int(name.removeprefix("beam"))
        yield from _search(case, _make(model, settings, beams), params, inputs, name)
    for name in sorted({key.rsplit("/", 1)[0] for key in arrays if "_single/" in key}):
        kind, row = name.split("/")[1:]
        beams = int(kind.removeprefix("beam").removesuffix("_single"))
        yield from _single(case, _make(model, settings, beams), params, inputs, name, int(row))


def _make(model, settings, beams: int) -> Search:
    ids = model.config.mbart
    special = {"eos_token_id": ids.eos, "pad_token_id": ids.pad, "forced_eos_token_id": ids.eos}
    assert all(settings[key] == value for key, value in special.items())
    return Search(
        model,
        DecodeConfig(
            beams=beams,
            max_new_tokens=settings["max_new_tokens"],
            length_penalty=settings["length_penalty"],
            early_stopping=settings["early_stopping"],
            growth=1,  # a single loop compiles fastest; splitting it changes only speed
            halvings=0,
        ),
    )


def _language(case: Case, batch: int) -> jax.Array:
    return jnp.full(batch, case.config["generation"]["forced_bos_token_id"], jnp.int32)


def _first_block(case: Case, model, params, inputs) -> Iterator[Comparison]:
    arrays, count = case.arrays, model.config.mapper.prefix
    if not count:
        return
    batch = len(inputs["source"])
    variables = {"params": params["mbart"]}
    start = jnp.full((batch, 1), model.config.mbart.start, jnp.int32)
    embedded = model.network.apply(variables, start, method=MBart.embed)
    vectors = model.prefix(params, inputs["features"], batch)
    block, visible = prefixes.start_block(embedded, vectors, embedded, model.config.prefix)
    tolerance = case.tolerance("logits")
    want = arrays["outputs/decoder_inputs_embeds_first"]
    yield "first block", block[:, :-1], want, *tolerance
    want = arrays["outputs/decoder_attention_mask_first"]
    yield "first mask", np.ones((batch, count + 1)), want, *EXACT
    for key in arrays:
        if key.endswith("first_step_visible"):
            want = arrays[key]
            got = jnp.broadcast_to(visible[:, :, :-1, :-1], want.shape)
            yield key, got, want, *EXACT


def _search(case: Case, search: Search, params, inputs, name: str) -> Iterator[Comparison]:
    arrays, beams = case.arrays, search.config.beams
    scores, logits_tolerance = case.tolerance("scores"), case.tolerance("logits")
    source, pad = inputs["source"], search.translator.config.mbart.pad
    batch = len(source)
    language = _language(case, batch)
    expected = arrays.below(f"outputs/{name}/")
    expected.pop("first_step_visible", None)
    length = expected["sequences"].shape[1]

    states = jax.jit(search.translator.encode)(params, source)
    state, logits = jax.jit(search.start)(params, inputs["features"], source, states, language)
    first = _logits_of_start(search, params, inputs, states, language)
    steps = [(np.zeros(batch, bool), np.repeat(first[:, None], beams, 1), None)]
    step, advance = jax.jit(search.step), jax.jit(search.advance)
    while True:
        done = np.asarray(state.done)
        state, chosen = advance(state, logits)
        steps.append((done, np.asarray(logits), jax.tree.map(np.asarray, chosen)))
        if state.length == search.config.max_length or state.done.all():
            break
        state, logits = step(params, source, state)

    for number, (done, logits, chosen) in enumerate(steps):
        live = ~done
        if "step_logits" in expected:
            want = expected["step_logits"][number].reshape(batch, beams, -1)
            yield f"{name} logits {number}", logits[live], want[live], *logits_tolerance
        if "step_done_before" in expected:
            want = expected["step_done_before"][number]
            yield f"{name} done {number}", done, want, *EXACT
            yield from _step(state, expected, (name, number), live, chosen, language, scores)
    if "step_done_before" in expected:
        yield f"{name} steps", len(steps), len(expected["step_done_before"]), *EXACT

    finished = state.finished
    ids = _sequences(finished, search, length)
    yield f"{name} sequences", ids, expected["sequences"], *EXACT
    if "hyp_scores" in expected:
        width = expected["hyp_tokens"].shape[2]
        assert (np.asarray(finished.tokens)[:, :, width:] == pad).all()
        yield f"{name} scores", finished.scores[:, 0], expected["sequences_scores"], *scores
        yield f"{name} heap scores", finished.scores, expected["hyp_scores"], *scores
        yield f"{name} heap", finished.tokens[:, :, :width], expected["hyp_tokens"], *EXACT
        yield f"{name} heap lengths", finished.lengths, expected["hyp_lengths"], *EXACT


def _step(
    state: SearchState, expected, place: tuple[str, int], live, chosen, language, tolerance
) -> Iterator[Comparison]:
    """One step's candidates and choices. Our search has no first step, which in the original only
    sets the language code."""
    name, number = place
    batch, beams = len(live), state.scores.shape[1]
    want = {
        key: expected[f"step_{key}"][number]
        for key in (
            "cand_scores",
            "cand_tokens",
            "cand_beams",
            "next_scores",
            "next_tokens",
            "next_beams",
        )
    }
    offset = beams * np.arange(batch)[:, None]  # the original numbers beams across the batch
    if chosen is None:
        code = np.repeat(np.asarray(language)[:, None], beams, 1)
        scores = np.full((batch, beams), -1e9)
        scores[:, 0] = 0
        yield f"{name} first scores", scores, want["next_scores"], *tolerance
        yield f"{name} first tokens", code, want["next_tokens"], *EXACT
        beams_in_order = np.sort(want["next_beams"] - offset, 1)  # all but one are equal
        yield f"{name} first beams", np.tile(np.arange(beams), (batch, 1)), beams_in_order, *EXACT
        yield f"{name} first candidates", scores, want["cand_scores"][:, :beams], *tolerance
        yield f"{name} first codes", code, want["cand_tokens"][:, :beams], *EXACT
        yield (
            f"{name} first origins",
            np.sort(want["cand_beams"][:, :beams]),
            np.tile(np.arange(beams), (batch, 1)),
            *EXACT,
        )
        return
    real = live[:, None] & np.isfinite(want["cand_scores"])
    for key, got in (("scores", chosen.scores), ("tokens", chosen.tokens), ("beams", chosen.beams)):
        limits = tolerance if key == "scores" else EXACT
        yield f"{name} candidate {key} {number}", got[real], want[f"cand_{key}"][real], *limits
    # Where the end is forced, no beam continues.
    real = live[:, None] & np.isfinite(want["next_scores"])
    real &= np.isfinite(chosen.next_scores)
    got = (chosen.next_scores, chosen.next_tokens, chosen.next_beams + offset)
    for key, value in zip(("scores", "tokens", "beams"), got, strict=True):
        limits = tolerance if key == "scores" else EXACT
        yield f"{name} next {key} {number}", value[real], want[f"next_{key}"][real], *limits


def _logits_of_start(search: Search, params, inputs, states, language) -> np.ndarray:
    """Logits of the first token, which is then overwritten by the language code."""
    hidden, _ = jax.jit(search.prefill)(
        params, inputs["features"], inputs["source"], states, language
    )
    variables = {"params": params["mbart"]}
    network = search.translator.network
    return np.asarray(network.apply(variables, hidden[:, -2], method=MBart.logits))


def _single(
    case: Case, search: Search, params, inputs, name: str, row: int
) -> Iterator[Comparison]:
    """A sample decoded alone, without pads, must give the same result as in the batch."""
    ids = inputs["source"][row]
    source = ids[ids != search.translator.config.mbart.pad][None]
    features = inputs["features"]
    features = None if features is None else features[row : row + 1]
    finished = jax.jit(search.run)(params, features, source, _language(case, 1))
    expected: dict[str, Any] = case.arrays.below(f"{name}/")
    ids = _sequences(finished, search, expected["sequences"].shape[1])
    yield f"{name} sequences", ids, expected["sequences"], *EXACT
    scores = case.tolerance("scores")
    yield f"{name} scores", finished.scores[:, 0], expected["sequences_scores"], *scores


def _sequences(finished, search: Search, length: int) -> np.ndarray:
    """The best hypotheses with their end tokens, padded to the longest."""
    tokens, lengths = np.array(finished.tokens[:, 0]), np.asarray(finished.lengths[:, 0])
    tokens[np.arange(len(tokens)), lengths] = search.translator.config.mbart.eos
    assert lengths.max() + 1 == length, (lengths, length)
    return tokens[:, :length]
