"""Mistakes in the Neural Attentive Circuits."""

from mistakes.mistake import Mistake

NAC = "m2mkd_jax/nac/"
TESTS = "tests/m2mkd_jax/test_nac_"
LAYERS = f"{TESTS}layers.py"
KERNEL = f"{TESTS}kernel.py"
BLOCK = f"{TESTS}blocks.py::test_block_matches_plain_loop"
CONFIG = f"{TESTS}model.py"
LATENTS = f"{TESTS}latents.py"
POOLING = " ".join(
    f"{LATENTS}::test_{name}"
    for name in (
        "pooling_by_hand",
        "hard_pooling_takes_the_best_and_has_the_soft_gradient",
    )
)
WIRING = f"{TESTS}wiring.py::test_network_matches_its_parts_in_sequence"
DRAWS = " ".join(
    f"{TESTS}wiring.py::test_{name}"
    for name in ("training_draws_for_every_part", "no_two_draws_are_alike")
)
FUSED = "tests/m2mkd_jax/test_nac.py::test_cudnn_attention_matches_plain_one_with_edge_gradients"
GRAPHS = "tests/m2mkd_jax/test_graphs.py"
PRIORS = "tests/m2mkd_jax/test_priors.py"
REGULARIZERS = "tests/m2mkd_jax/test_regularizers.py"
CONVERT = "tests/m2mkd_jax/test_nac_names.py::test_every_tensor_has_its_name"

MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        f"{NAC}blocks.py",
        "for cuDNN, a receiver without an edge gets the mean of all senders",
        'return jnp.where(empty, jnp.nan if config.kernel.empty_row == "nan" else 0.0, heads)',
        "return heads",
        FUSED,
    ),
    Mistake(
        f"{NAC}layers.py",
        "gradients pass through the noise on codes",
        "spread = scale * jnp.abs(jax.lax.stop_gradient(codes))",
        "spread = scale * jnp.abs(codes)",
        LAYERS,
    ),
    Mistake(
        f"{NAC}layers.py",
        "the gain of the first weights is ignored",
        "init = uniform_init(self.inputs, config.weight_gain)",
        "init = uniform_init(self.inputs)",
        LAYERS,
    ),
    Mistake(
        f"{NAC}layers.py",
        "first weights within 1 / in, not 1 / sqrt(in)",
        "bound = gain / math.sqrt(fan_in)",
        "bound = gain / fan_in",
        LAYERS,
    ),
    Mistake(
        f"{NAC}layers.py",
        "dropped scales are divided by the share that is dropped",
        "scales = scales * mask / keep",
        "scales = scales * mask / config.dropout",
        LAYERS,
    ),
    Mistake(
        f"{NAC}kernel.py",
        "edges that are cut have no gradient, straight-through or not",
        "return _with_gradient_of(-scaled, cut) if config.straight_through else cut",
        "return cut",
        KERNEL,
    ),
    Mistake(
        f"{NAC}kernel.py",
        "the temperature divides the affinities' logits alone",
        "jnp.log(p) - jnp.log1p(-p)) / temperature",
        "(jnp.log(p) - jnp.log1p(-p)) / temperature)",
        KERNEL,
    ),
    Mistake(
        f"{NAC}kernel.py",
        "edges are cut further away by default",
        "truncation: Annotated[float, above(0, 2)] | None = 0.9",
        "truncation: Annotated[float, above(0, 2)] | None = 0.8",
        KERNEL,
    ),
    Mistake(
        f"{NAC}blocks.py",
        "the exit layer takes one receiver's code for all",
        "branch = scale_branch(self.exit(pooled, codes, train=train), self.layer_scale)",
        "branch = scale_branch(self.exit(pooled, codes[:1], train=train), self.layer_scale)",
        BLOCK,
    ),
    Mistake(
        f"{NAC}blocks.py",
        "the halves of the gated MLP change places",
        "y = y * gelu(gate)",
        "y = gelu(y) * gate",
        BLOCK,
    ),
    Mistake(
        f"{NAC}blocks.py",
        "a stochastic kernel samples the same edges for all examples",
        "shape = (batch, *distance.shape)",
        "shape = (1, *distance.shape)",
        f"{TESTS}blocks.py::test_edges_are_sampled_per_example",
    ),
    Mistake(
        f"{NAC}blocks.py",
        "stochastic depth drops the branch for the whole batch",
        "uniform((branch.shape[0], 1, 1))",
        "uniform((1, 1, 1))",
        DRAWS,
    ),
    Mistake(
        f"{NAC}blocks.py",
        "senders of one group take the codes of another",
        "ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]",
        "ends = [sum(sizes[i + 1 :]) for i in range(len(sizes) - 1)]",
        BLOCK,
    ),
    Mistake(
        f"{NAC}read_in.py",
        "the values are scaled by the keys' factors",
        "self.value.scales(codes, train=train),",
        "self.key.scales(codes, train=train),",
        f"{TESTS}blocks.py::test_read_in_matches_plain_loop",
    ),
    Mistake(
        f"{NAC}latents.py",
        "the first log-variance is 5",
        "LOG_VARIANCE = -5.0",
        "LOG_VARIANCE = 5.0",
        f"{LATENTS}::test_seeder_initialisation",
    ),
    Mistake(
        f"{NAC}latents.py",
        "the variance is taken for the deviation",
        "return mean, jnp.exp(0.5 * log_variance)",
        "return mean, jnp.exp(log_variance)",
        f"{LATENTS}::test_states_are_seeded_from_codes_and_noise",
    ),
    Mistake(
        f"{NAC}latents.py",
        "mediators are seeded from the last layer's codes",
        "codes = codes[0] if codes.ndim == 3 else codes",
        "codes = codes[-1] if codes.ndim == 3 else codes",
        f"{LATENTS}::test_states_are_seeded_from_codes_and_noise",
    ),
    Mistake(
        f"{NAC}pooling.py",
        "the temperature is ignored",
        "weights = jax.nn.softmax(confidence / self.temperature)",
        "weights = jax.nn.softmax(confidence)",
        POOLING,
    ),
    Mistake(
        f"{NAC}pooling.py",
        "hard pooling has no gradient",
        "weights = jax.lax.stop_gradient(best - weights) + weights",
        "weights = jax.lax.stop_gradient(best)",
        POOLING,
    ),
    Mistake(
        f"{NAC}tokenizer.py",
        "the trunk's norms have the epsilon of the rest",
        "NORM_EPS = 1e-6",
        "NORM_EPS = 1e-5",
        f"{TESTS}tokenizer.py::test_trunk_norms_use_epsilon_1e_6",
    ),
    Mistake(
        f"{NAC}tokenizer.py",
        "bins of a fitted grid end where the floor is",
        "-(-(i + 1) * old // new)",
        "(i + 1) * old // new",
        f"{TESTS}tokenizer.py::test_bins_of_a_smaller_or_larger_grid",
    ),
    Mistake(
        f"{NAC}network.py",
        "every iteration takes the first one's codes",
        "codes = mediators.layer_codes(layer)",
        "codes = mediators.layer_codes(0)",
        WIRING,
    ),
    Mistake(
        f"{NAC}network.py",
        "all parts draw from the same key",
        "keys = {stream: fold_name(key, name) for stream, key in self.rngs.items()}",
        "keys = dict(self.rngs)",
        DRAWS,
    ),
    Mistake(
        f"{NAC}students.py",
        "codes of students do not depend on the seed",
        'return jax.random.normal(_key(seed, "codes"), (1, width))',
        'return jax.random.normal(_key(0, "codes"), (1, width))',
        f"{TESTS}wiring.py::test_student_codes_and_states_are_normal_and_seeded",
    ),
    Mistake(
        f"{NAC}model.py",
        "the read-out cuts its edges as the propagators do",
        "kernel=READ_OUT_KERNEL,",
        "kernel=self.kernel,",
        CONFIG,
    ),
    Mistake(
        f"{NAC}model.py",
        "the pooling's temperature is left at its default",
        "ReadOutConfig(block, self.pooling, self.temperature, head, self.read_out_head_norm)",
        "ReadOutConfig(block, self.pooling, 1.0, head, self.read_out_head_norm)",
        CONFIG,
    ),
    Mistake(
        f"{NAC}graphs.py",
        "a tenth of the nodes is rounded down",
        "neighbours = config.neighbours or max(2, round(0.1 * nodes))",
        "neighbours = config.neighbours or max(2, nodes // 10)",
        f"{GRAPHS}::test_watts_strogatz_is_a_ring_with_rewired_edges",
    ),
    Mistake(
        f"{NAC}priors.py",
        "Adam's betas change places",
        "b1=0.9, b2=0.999",
        "b1=0.999, b2=0.9",
        f"{PRIORS}::test_fit_matches_adam",
    ),
    Mistake(
        f"{NAC}priors.py",
        "a kept prior of another seed is taken",
        "settings = [dataclasses.asdict(config), nodes, signature_width, seed]",
        "settings = [dataclasses.asdict(config), nodes, signature_width]",
        f"{PRIORS}::test_prior_is_recomputed_if_any_setting_changes",
    ),
    Mistake(
        "m2mkd_jax/regularizers.py",
        "stages are sorted as text, the tenth before the second",
        'sorted(params.keys() - {"graph"}, key=stage_number)',
        'sorted(params.keys() - {"graph"})',
        f"{REGULARIZERS}::test_bandwidths_are_in_order_of_iterations",
    ),
    Mistake(
        "m2mkd_jax/regularizers.py",
        "rows of the block model are clipped from above",
        "errors = jnp.maximum(errors, clip)",
        "errors = jnp.minimum(errors, clip)",
        f"{REGULARIZERS}::test_block_loss_by_hand",
    ),
    Mistake(
        "m2mkd_jax/regularizers.py",
        "the hinge counts latents that are farther away",
        "_pairs(distance) & (distance < hinge)",
        "_pairs(distance) & (distance > hinge)",
        f"{REGULARIZERS}::test_hinge_by_hand",
    ),
    Mistake(
        "m2mkd_jax/nac/names.py",
        "keys and values change places",
        '("key_compiler.", "key/", layer),\n        ("value_compiler.", "value/", layer),',
        '("key_compiler.", "value/", layer),\n        ("value_compiler.", "key/", layer),',
        CONVERT,
    ),
    Mistake(
        "m2mkd_jax/nac/names.py",
        "means and log-variances change places",
        '("code_to_state_mu.", "mean/", _DENSE),\n'
        '        ("code_to_state_logvar.", "log_variance/", optional(_DENSE)),',
        '("code_to_state_mu.", "log_variance/", _DENSE),\n'
        '        ("code_to_state_logvar.", "mean/", optional(_DENSE)),',
        CONVERT,
    ),
    Mistake(
        "common_jax/weights/entries.py",
        "what iterations share is not compared",
        "if not np.array_equal(tensor, tensors[0]):",
        "if tensor.shape != tensors[0].shape:",
        "tests/m2mkd_jax/test_nac_names.py::"
        "test_shared_tensors_are_listed_per_iteration_and_stored_once",
    ),
    Mistake(
        "m2mkd_jax/families/circuit.py",
        "progress moves within an epoch",
        "(step // steps_per_epoch) / epochs",
        "step / steps_per_epoch / epochs",
        f"{TESTS}circuit.py::test_progress_is_the_fraction_of_epochs_completed",
    ),
    Mistake(
        "m2mkd_jax/families/circuit.py",
        "the picture is of raw parameters where there is an average",
        "average=True",
        "average=False",
        f"{TESTS}circuit.py::test_picture_uses_ema_if_present",
    ),
)
