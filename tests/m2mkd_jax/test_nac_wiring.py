"""Who attends to whom in a whole NAC, and the draws in each part; students as parts."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax import numpy as jnp
from tiny import fill

from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac import blocks, latents, layers, model, pooling, students
from m2mkd_jax.nac.blocks import BlockConfig, Propagator
from m2mkd_jax.nac.latents import Graph
from m2mkd_jax.nac.layers import NOISE, LinearConfig
from m2mkd_jax.nac.network import ReadIn, ReadInConfig, ReadOut, ReadOutConfig
from m2mkd_jax.nac.tokenizer import TokenizerConfig

ITERATIONS, BATCH = 3, 2
SIZES = model.NacConfig(
    tokenizer=TokenizerConfig("atto", stages=1, width=16, stem=4, grid_width=4),
    inputs=3,
    mediators=4,
    outputs=2,
    iterations=ITERATIONS,
    width=8,
    code_width=8,
    signature_width=5,
    heads=2,
    head_width=4,
    ffn_factor=1.0,
)
INTERFACE = Interface(8, 1, 5)
STREAMS = ("code", "kernel", "drop_path", "state", "pooling")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


IMAGES = normal(BATCH, 8, 8, 1)


def build(**changes):
    network = model.build(dataclasses.replace(SIZES, **changes), INTERFACE, drop_path=0.2)
    return network, fill(network.init)


def rngs(**seeds: int) -> dict[str, jax.Array]:
    """A separate key for each stream, or one from the seed given for it."""
    return {
        name: jax.random.key(seeds.get(name, number), impl="rbg")
        for number, name in enumerate(STREAMS)
    }


# Wiring.


def distance(receivers, *senders):
    receivers, senders = np.asarray(receivers), np.concatenate(senders)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (receivers, senders)]
    return jnp.asarray(1 - unit[0] @ unit[1].T)


def part_by_part(network, params, *, to_mediators, to_outputs, inputs_as_mediators):
    """Logits in evaluation, written out; every iteration has its own codes."""

    def run(part, module, *arguments, **settings):
        return module.apply({"params": params[part]}, *arguments, **settings)

    graph = run("graph", Graph(network.graph, jnp.float32), BATCH)
    inputs, mediators, outputs = (graph[name] for name in ("input", "mediator", "output"))
    input_states = run("stage_0", network.read_in, IMAGES, inputs.states, inputs.codes, train=False)
    states = input_states if inputs_as_mediators else mediators.states
    for layer in range(ITERATIONS):
        codes, module = mediators.codes[layer], network.propagators[layer]
        if layer in to_mediators:
            senders, sender_codes = (input_states, states), jnp.concatenate([inputs.codes, codes])
            d = distance(mediators.signatures, inputs.signatures, mediators.signatures)
        else:
            senders, sender_codes = (states,), codes
            d = distance(mediators.signatures, mediators.signatures)
        states = run(f"stage_{layer + 1}", module, states, codes, senders, sender_codes, d)
    senders, codes, signatures = (states,), mediators.codes[-1], mediators.signatures
    if to_outputs:
        senders, codes = (input_states, states), jnp.concatenate([inputs.codes, codes])
        signatures = jnp.concatenate([inputs.signatures, signatures])
    d = distance(outputs.signatures, signatures)
    arguments = outputs.states, outputs.codes, senders, codes, d
    return run(f"stage_{ITERATIONS + 1}", network.read_out, *arguments, train=False)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({"inputs_to_mediators": "first"}, {"to_mediators": (0,)}),
        (
            {
                "inputs_to_mediators": "never",
                "inputs_to_outputs": False,
                "inputs_as_mediators": True,
                "mediators": 3,
            },
            {"to_mediators": (), "to_outputs": False, "inputs_as_mediators": True},
        ),
        ({"inputs_as_mediators": True, "mediators": 3}, {"inputs_as_mediators": True}),
    ],
)
def test_network_matches_its_parts_in_sequence(changes, settings):
    network, params = build(share_codes=False, **changes)
    plain = {"to_mediators": (0, 1, 2), "to_outputs": True, "inputs_as_mediators": False}
    want = part_by_part(network, params, **(plain | settings))
    np.testing.assert_allclose(network.apply(params, IMAGES)[0], want, atol=1e-5)


def test_every_part_is_initialised_from_its_own_key():
    network, paths = build(iterations=2)[0], ("attention/query/kernel", "pooling/head/kernel")

    def init(key):  # what is not requested is not computed
        params = network.init(key)
        flat = traverse_util.flatten_dict(params, sep="/")
        chosen = [flat[f"stage_{i}/{paths[0]}"] for i in (1, 2, 3)]
        return [*chosen, flat[f"stage_3/{paths[1]}"], flat["graph/input/codes"]]

    init = jax.jit(init)
    first, second = (init(jax.random.key(seed, impl="rbg")) for seed in (0, 1))
    for one, two in zip(first, second, strict=True):
        assert not np.any(np.asarray(one == two))
    for one, two in zip(first[:3], first[1:3] + first[:1], strict=True):
        assert not np.any(np.asarray(one == two))


@pytest.mark.parametrize("pooling_kind", ["first_slot", "softmax"])
def test_logits_are_in_float32(pooling_kind):
    block = SIZES.read_out_config(5).block
    head = 5 if pooling_kind == "first_slot" else None
    module = ReadOut(ReadOutConfig(block, pooling_kind, head=head), 5, jnp.bfloat16)
    states, codes = jnp.zeros((1, 2, 8), jnp.bfloat16), jnp.zeros((2, 8))
    arguments = states, codes, (states,), codes, jnp.zeros((2, 2))
    init = functools.partial(module.init_with_output, train=False)
    assert jax.eval_shape(init, jax.random.key(0), *arguments)[0].dtype == jnp.float32


# What is drawn.


class Draws:
    """Stream, name and numbers of everything that is drawn."""

    def __init__(self):
        self.seen = []

    def draw(self, module, name, sample, *, stream, plain=layers.draw):
        numbers = plain(module, name, sample, stream=stream)
        self.seen.append((stream, "/".join((*module.path, name)), numbers))
        return numbers

    def listed(self, run, *keys):
        """Stream, name and shape of what `run` draws, in order."""
        self.seen.clear()
        jax.eval_shape(run, *keys)
        return [(stream, name, numbers.shape) for stream, name, numbers in self.seen]

    def numbers(self, run):
        """A function of keys that returns the numbers that `run` draws, and computes nothing
        else."""

        def drawn(keys):
            self.seen.clear()
            run(keys)
            return [numbers for _, _, numbers in self.seen]

        return jax.jit(drawn)


@pytest.fixture
def drawn(monkeypatch):
    draws = Draws()
    for where in (layers, blocks, latents, pooling):
        monkeypatch.setattr(where, "draw", draws.draw)
    return draws


def applied(train: bool = True, **changes):
    """A network as a function of its keys."""
    network, params = build(**changes)
    return lambda keys: network.apply(params, IMAGES, train=train, rngs=keys)[0]


def test_training_draws_for_every_part(drawn):
    graph = [
        draws
        for name, count in (("input", 3), ("mediator", 4), ("output", 2))
        for draws in (
            ("code", f"{name}_codes", (count, 8)),
            ("state", f"{name}_states", (BATCH, count, 8)),
        )
    ]
    propagator = [
        ("code", "receiver_codes", (4, 8)),
        ("code", "sender_codes", (7, 8)),
        ("kernel", "attention/kernel", (BATCH, 4, 7)),
        ("drop_path", "attention/drop_path", (BATCH, 1, 1)),
        ("drop_path", "ffn/drop_path", (BATCH, 1, 1)),
    ]
    last = [
        ("code", "receiver_codes", (2, 8)),
        ("code", "sender_codes", (7, 8)),
        ("pooling", "pooling/gumbel", (BATCH, 2)),
    ]
    want = [*graph, ("code", "read_in/receiver_codes", (3, 8)), *propagator * ITERATIONS, *last]
    assert drawn.listed(applied(), rngs()) == want


@pytest.mark.parametrize("shared", [False, True])
def test_no_two_draws_are_alike(drawn, shared):
    found = [np.asarray(x) for x in drawn.numbers(applied(share_propagators=shared))(rngs())]
    names = [name for _, name, _ in drawn.seen]
    for i, (name, numbers) in enumerate(zip(names, found, strict=True)):
        if "codes" not in name:
            assert not np.any(numbers[0] == numbers[1]), name  # of two examples
        for other, others in zip(names[:i], found, strict=False):
            if numbers.shape == others.shape:
                assert not np.any(numbers == others), (name, other)


def test_key_changes_only_the_draws_of_its_stream(drawn):
    draw = drawn.numbers(applied(iterations=1))
    before = draw(rngs())
    streams = [stream for stream, _, _ in drawn.seen]
    assert set(streams) == set(STREAMS)
    for stream in STREAMS:
        after = draw(rngs(**{stream: 99}))
        moved = [not np.array_equal(one, two) for one, two in zip(before, after, strict=True)]
        assert moved == [own == stream for own in streams], stream


def test_evaluation_draws_only_states_and_pooling(drawn):
    names = [name for _, name, _ in drawn.listed(applied(train=False), rngs())]
    assert names == ["input_states", "mediator_states", "output_states", "pooling/gumbel"]


@pytest.mark.parametrize("train", [True, False])
def test_scale_dropout_is_drawn_per_layer(drawn, train):
    linear = LinearConfig(dropout=0.3)
    run = applied(train, share_propagators=True, code_noise=0.0, linear=linear)
    names = [name for _, name, _ in drawn.listed(run, rngs())]
    found = collections.Counter(n.removesuffix("/dropout") for n in names if "dropout" in n)
    layers_of = {"attention": ("query", "key", "value", "exit"), "ffn": ("up", "down")}
    paths = [f"{part}/{layer}" for part, group in layers_of.items() for layer in group]
    # Every iteration and the read-out; for keys and values, those of inputs and of mediators.
    want = dict.fromkeys([f"read_in/{path}" for path in paths], 1)
    want |= dict.fromkeys(paths, ITERATIONS + 1)
    want |= dict.fromkeys(("attention/key", "attention/value"), 2 * (ITERATIONS + 1))
    assert found == (want if train else {})


# Students.

STITCH = 7
BLOCK = BlockConfig(width=8, code_width=8, heads=2, head_width=4)
FIXED = {"codes": normal(1, 8, seed=1), "states": normal(BATCH, 1, 8, seed=2)}


def run_student(student, x):
    """The output of a student with the codes and states of FIXED, its parameters, and how its
    stitch maps them."""
    params = fill(functools.partial(student.init, train=False), x)["params"]
    stitch = lambda x, name: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    return student.apply({"params": params, NOISE: FIXED}, x, train=False), params, stitch


def test_a_read_in_student_is_a_read_in_and_a_stitch():
    config, tokenizer = ReadInConfig(BLOCK, scale=0.7), SIZES.tokenizer
    student = students.ReadInStudent(tokenizer, config, INTERFACE, STITCH, 0, jnp.float32)
    found, params, stitch = run_student(student, IMAGES)
    part = ReadIn(tokenizer, config, INTERFACE, jnp.float32)
    states = part.apply({"params": params}, IMAGES, FIXED["states"], FIXED["codes"], train=False)
    assert found.shape == (BATCH, 1, STITCH)
    np.testing.assert_allclose(found, stitch(states, "post_stitch"), atol=1e-5)


def test_a_mediator_student_is_a_block_between_stitches():
    tokens, codes = normal(BATCH, 5, STITCH, seed=3), FIXED["codes"]
    student = students.MediatorStudent(BLOCK, 5, STITCH, 0, jnp.float32)
    found, params, stitch = run_student(student, tokens)
    states = stitch(tokens, "pre_stitch")
    part = Propagator(BLOCK, jnp.float32)
    states = part.apply({"params": params}, states, codes, (states,), codes)
    np.testing.assert_allclose(found, stitch(states, "post_stitch"), atol=1e-5)


def test_read_out_student_attends_to_stitched_tokens():
    tokens, codes = normal(BATCH, 5, STITCH, seed=3), FIXED["codes"]
    config = ReadOutConfig(dataclasses.replace(BLOCK, residual=False))
    student = students.ReadOutStudent(config, 5, 5, STITCH, 0, jnp.float32)
    found, params, stitch = run_student(student, tokens)
    part = ReadOut(config, 5, jnp.float32)
    senders = (stitch(tokens, "pre_stitch"),)
    arguments = FIXED["states"], codes, senders, codes
    want = part.apply({"params": params}, *arguments, train=False)
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_students_draw_only_in_training(drawn):
    noisy = dataclasses.replace(BLOCK, code_noise=0.1, drop_path=0.1)
    still = dataclasses.replace(noisy, drop_path=0.0)
    settings = {"stitch_width": STITCH, "seed": 0, "dtype": jnp.float32}
    tokenizer, tokens = SIZES.tokenizer, normal(BATCH, 5, STITCH, seed=3)
    codes, paths = ("receiver_codes", "sender_codes"), ("attention/drop_path", "ffn/drop_path")
    read_in = students.ReadInStudent(tokenizer, ReadInConfig(still), INTERFACE, **settings)
    read_out = students.ReadOutStudent(ReadOutConfig(still), 5, 5, **settings)
    for student, x, want in (
        (read_in, IMAGES, ["read_in/receiver_codes"]),
        (students.MediatorStudent(noisy, 5, **settings), tokens, [*codes, *paths]),
        (read_out, tokens, [*codes, "pooling/gumbel"]),
    ):
        params = fill(functools.partial(student.init, train=False), x)
        for train, names in ((True, want), (False, [])):
            run = functools.partial(student.apply, params, x, train=train)
            found = drawn.listed(lambda keys, run=run: run(rngs=keys), rngs() if train else {})
            assert [name for _, name, _ in found] == names


class Drawn(nn.Module):
    """A student's codes and states, with many numbers of each."""

    seed: int

    def __call__(self):
        codes = students.fixed_codes(self, self.seed, 500)
        return codes, students.fixed_states(self, self.seed, 3, 500, jnp.float32)


def test_student_codes_and_states_are_normal_and_seeded():
    draws = []
    for seed in (0, 1):
        codes, states = Drawn(seed).apply({})
        assert codes.shape == (1, 500) and states.shape == (3, 1, 500)
        draws += [codes[0], *states[:, 0]]
    draws = np.stack(draws)  # by seed: codes, then states of three positions
    np.testing.assert_allclose(draws.std(1), 1, atol=0.12)
    np.testing.assert_allclose(draws.mean(1), 0, atol=0.15)
    assert len(np.unique(draws)) > 0.99 * draws.size
