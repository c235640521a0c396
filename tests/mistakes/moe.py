"""Mistakes in the transformers and the mixture of experts: routing, dispatch, encoder,
converter."""

from mistakes.mistake import Mistake

ROUTING = " ".join(
    f"tests/m2mkd_jax/test_routing.py::{name}"
    for name in (
        "test_priority_goes_by_probability_not_logits",
        "test_noise_is_drawn_for_each_group_token_expert_and_key",
        "test_load_loss_of_two_choices_by_hand",
    )
)
ROWS = "tests/m2mkd_jax/test_dispatch.py::test_arrange_has_a_row_for_every_pair"
KERNELS = "tests/m2mkd_jax/test_grouped_gpu.py::test_"
SLOTS = (
    "tests/m2mkd_jax/test_dispatch.py"
    "::test_capacity_matches_loop_with_overflow_dropped "
    "tests/m2mkd_jax/test_dispatch.py::test_bfloat16_accumulates_in_float32"
)
LAYER = " ".join(
    f"tests/m2mkd_jax/{name}"
    for name in (
        "test_moe_config.py::test_slots_are_fair_share_times_capacity_factor_rounded_up",
        "test_moe.py::test_slots_go_to_first_or_most_confident_tokens_of_each_group",
        "test_moe.py::test_other_routers_draw_no_noise",
        "test_moe.py::test_gate_is_exact_for_bfloat16_tokens",
        "test_soft.py::test_gate_is_exact_for_bfloat16_tokens",
    )
)
STARTS = "tests/m2mkd_jax/test_encoder.py::test_initialisation_matches_original"
DEPTH = "tests/m2mkd_jax/test_encoder.py::test_drop_path_draws_per_example_and_branch"
EQUATIONS = " ".join(
    f"tests/m2mkd_jax/test_encoder.py::{name}"
    for name in (
        "test_network_matches_its_equations",
        "test_stitches_use_their_own_epsilon",
        "test_norms_are_accurate_for_large_means",
        "test_bfloat16_network_has_bfloat16_tokens_and_float32_logits",
    )
)
LOOPS = "tests/test_remat_and_scan.py::test_gate_noise_is_drawn_per_layer"
SIZES = " ".join(
    f"tests/m2mkd_jax/test_models.py::{name}"
    for name in (
        "test_published_networks_have_the_published_heads",
        "test_moe_positions_by_hand",
        "test_stochastic_depth_ramps_over_network_and_within_each_student",
    )
)
POSITIONS = "tests/m2mkd_jax/test_positions.py"
VARIANTS = "tests/m2mkd_jax/test_vit_variants.py"
LAYERS = "tests/common_jax/test_attention.py tests/common_jax/test_mlp.py"
PADDING = "tests/common_jax/test_attention.py::test_padding_to_even_length_changes_nothing"
DENSE = "tests/common_jax/test_dense.py::test_precision_argument_applies_to_gradients"
CONVERT = "tests/m2mkd_jax/test_vit_names.py"
LOADING = "tests/m2mkd_jax/test_loading.py"
NAMES = "tests/m2mkd_jax/test_timm_names.py"

MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        file="m2mkd_jax/moe/routers.py",
        what="priority by the largest logit, not by its probability",
        right="jnp.max(jax.nn.log_softmax(jax.lax.stop_gradient(logits), axis=-1), axis=-1)",
        wrong="jnp.max(jax.lax.stop_gradient(logits), axis=-1)",
        tests=ROUTING,
    ),
    Mistake(
        file="m2mkd_jax/moe/routers.py",
        what="the same noise in every group",
        right="jax.random.normal(key, logits.shape, logits.dtype)",
        wrong="jax.random.normal(key, logits.shape[1:], logits.dtype)",
        tests=ROUTING,
    ),
    Mistake(
        file="m2mkd_jax/moe/routers.py",
        what="the load loss takes the largest logit for the bar, however many are chosen",
        right="best[..., -1:]",
        wrong="best[..., :1]",
        tests=ROUTING,
    ),
    Mistake(
        file="m2mkd_jax/moe/dispatch.py",
        what="all groups share the slots of an expert",
        right="rank, _ = jax.vmap(partial(rank_in_expert, experts=count))(routes.expert)",
        wrong="rank = rank_in_expert(routes.expert.reshape(-1), count)[0]"
        ".reshape(routes.expert.shape)",
        tests=SLOTS,
    ),
    Mistake(
        file="m2mkd_jax/moe/dispatch.py",
        what="answers summed in the type of the tokens",
        right="wide = jnp.promote_types(answers.dtype, jnp.float32)",
        wrong="wide = answers.dtype",
        tests=SLOTS,
    ),
    Mistake(
        file="m2mkd_jax/moe/grouped.py",
        what="a block too few for the worst routing",
        right="blocks = pairs // block + experts",
        wrong="blocks = pairs // block + experts - 1",
        tests=ROWS,
    ),
    Mistake(
        file="m2mkd_jax/moe/grouped.py",
        what="tiles that no kernel wrote are the last expert's",
        right="expert = jnp.where(tiles.in_use(), tiles.expert, len(experts.up))",
        wrong="expert = tiles.expert",
        tests=f"{KERNELS}float32_values_and_gradients",
    ),
    Mistake(
        file="m2mkd_jax/moe/grouped_gpu.py",
        what="hidden values are rounded before the GELU",
        right="active[tile.rows, tile.columns] = (wide * normal_cdf(wide)[0]).astype(active.dtype)",
        wrong="wide = wide.astype(hidden.dtype).astype(jnp.float32)\n"
        "    active[tile.rows, tile.columns] = (wide * normal_cdf(wide)[0]).astype(active.dtype)",
        tests=f"{KERNELS}bfloat16_values_and_gradients",
    ),
    Mistake(
        file="m2mkd_jax/moe/grouped_gpu.py",
        what="an expert's outer product has the rows of all experts before it",
        right="fori_loop(start[expert] // step, end[expert] // step, add, total)",
        wrong="fori_loop(0, end[expert] // step, add, total)",
        tests=f"{KERNELS}float32_values_and_gradients",
    ),
    Mistake(
        file="m2mkd_jax/moe/pairs.py",
        what="slots rounded down",
        right="math.ceil(self.capacity_factor",
        wrong="math.floor(self.capacity_factor",
        tests=LAYER,
    ),
    Mistake(
        file="m2mkd_jax/moe/pairs.py",
        what="the order of priority is ignored",
        right="order=config.order",
        wrong='order="token"',
        tests=LAYER,
    ),
    Mistake(
        file="m2mkd_jax/moe/pairs.py",
        what="noise for every router",
        right="noisy=lambda config: noisy and config.noise_std > 0",
        wrong="noisy=lambda config: config.noise_std > 0",
        tests=LAYER,
    ),
    Mistake(
        file="m2mkd_jax/moe/layer.py",
        what="the gate computes in the type of the tokens",
        right="gate_dtype = jnp.promote_types(x.dtype, jnp.float32)",
        wrong="gate_dtype = x.dtype",
        tests=LAYER,
    ),
    Mistake(
        file="m2mkd_jax/models/encoder.py",
        what="one draw of stochastic depth for a whole batch",
        right="(branch.shape[0], 1, 1)",
        wrong="(1, 1, 1)",
        tests=DEPTH,
    ),
    Mistake(
        file="common_jax/nn/norm.py",
        what="variances as differences of large numbers",
        right="if fast_variance:",
        wrong="if True:",
        tests=EQUATIONS,
    ),
    Mistake(
        file="common_jax/nn/norm.py",
        what="norms without the config's epsilon",
        right="_normalise(self.epsilon, ",
        wrong="_normalise(1e-6, ",
        tests=EQUATIONS,
    ),
    Mistake(
        file="common_jax/nn/norm.py",
        what="the mean passes no gradient on",
        right="by_x = rate * (dy - jnp.mean(dy, axis=-1, keepdims=True) - normal * along)",
        wrong="by_x = rate * (dy - normal * along)",
        tests="tests/common_jax/test_norm.py",
    ),
    Mistake(
        file="common_jax/nn/attention_cpu.py",
        what="scores that are masked get a gradient",
        right="by_scores = jnp.where(visible, by_scores, 0)",
        wrong="by_scores = by_scores + 0",
        tests="tests/common_jax/test_attention_cpu.py",
    ),
    Mistake(
        file="common_jax/nn/attention_cpu.py",
        what="gradients of the values are not divided by the sums of the weights",
        right="    dy = dy / total\n    mean",
        wrong="    mean",
        tests="tests/common_jax/test_attention_cpu.py",
    ),
    Mistake(
        file="m2mkd_jax/models/encoder.py",
        what="logits in the type of the tokens",
        right="exact = jnp.promote_types(self.dtype, jnp.float32)",
        wrong="exact = self.dtype",
        tests=EQUATIONS,
    ),
    Mistake(
        file="m2mkd_jax/models/encoder.py",
        what="no noise for gates in a loop over blocks",
        right='STREAMS = ("drop_path", "gate")',
        wrong='STREAMS = ("drop_path",)',
        tests=LOOPS,
    ),
    Mistake(
        file="m2mkd_jax/models/encoder.py",
        what="registers take the positions of the first patches",
        right="[positions[:, :start], zeros, positions[:, start:]]",
        wrong="[positions, zeros]",
        tests=f"{VARIANTS}::test_token_embedding_by_hand",
    ),
    Mistake(
        file="m2mkd_jax/models/encoder.py",
        what="registers are pooled with the patches",
        right="patches = x[:, encoder.leading :]",
        wrong="patches = x[:, encoder.class_token :]",
        tests=f"{VARIANTS}::test_token_pooling_by_hand",
    ),
    Mistake(
        file="m2mkd_jax/models/encoder.py",
        what="layer scale that starts at 1",
        right="nn.initializers.constant(start)",
        wrong="nn.initializers.ones",
        tests=f"{VARIANTS}::test_initialisation_matches_timm",
    ),
    Mistake(
        file="common_jax/nn/pooling.py",
        what="an attention pool without its residual",
        right="y = y + Mlp(",
        wrong="y = Mlp(",
        tests=f"{VARIANTS}::test_token_pooling_by_hand",
    ),
    Mistake(
        file="m2mkd_jax/models/vit.py",
        what="half the heads in the large ViTs",
        right='_LARGE = {"width": 1024, "heads": 16}',
        wrong='_LARGE = {"width": 1024, "heads": 8}',
        tests=SIZES,
    ),
    Mistake(
        file="m2mkd_jax/models/vit.py",
        what="no stochastic depth",
        right="return encoder.ramp_drop_path(network, drop_path)",
        wrong="return network",
        tests=SIZES,
    ),
    Mistake(
        file="m2mkd_jax/models/vmoe.py",
        what="last_N of more blocks than there are",
        right="range(max(depth - count, 0), depth)",
        wrong="range(depth - count, depth)",
        tests=SIZES,
    ),
    Mistake(
        file="m2mkd_jax/models/positions.py",
        what="the cubic that others use",
        right="CUBIC = -0.75",
        wrong="CUBIC = -0.5",
        tests=POSITIONS,
    ),
    Mistake(
        file="common_jax/nn/attention.py",
        what="every token attends to all of them",
        right="mask=visible",
        wrong="mask=None",
        tests=LAYERS,
    ),
    Mistake(
        file="common_jax/nn/attention.py",
        what="for cuDNN, the key that makes their number even is attended to",
        right='"key_value_seq_lengths": jnp.full(batch, senders, jnp.int32)',
        wrong='"key_value_seq_lengths": jnp.full(batch, senders + 1, jnp.int32)',
        tests=PADDING,
    ),
    Mistake(
        file="common_jax/nn/attention_tpu.py",
        what="on TPUs, keys that fill up a block are attended to",
        right="seen = jnp.broadcast_to(_pad(seen, of_keys)",
        wrong="seen = jnp.broadcast_to(~_pad(~seen, of_keys)",
        tests="tests/common_jax/test_attention_tpu.py",
    ),
    Mistake(
        file="common_jax/nn/attention_tpu.py",
        what="on TPUs, scores are not divided by the root of the width",
        right="(query * width**-0.5, of_query)",
        wrong="(query, of_query)",
        tests="tests/common_jax/test_attention_tpu.py",
    ),
    Mistake(
        file="common_jax/nn/dense.py",
        what="the gradient by a kernel forgets the precision",
        right="functools.partial(_plain, count, precision, x)",
        wrong="functools.partial(_plain, count, None, x)",
        tests=DENSE,
    ),
    Mistake(
        file="common_jax/nn/layers.py",
        what="all layers of a loop draw the same",
        right="jnp.stack([layer.make_rng(name) for layer in layers])",
        wrong="jnp.stack([first.make_rng(name)] * len(layers))",
        tests=LOOPS,
    ),
    Mistake(
        file="common_jax/nn/layers.py",
        what="a loop keeps all that its layers compute",
        right="return operation.name not in _CHEAP",
        wrong="return True",
        tests="tests/common_jax/test_layers.py",
    ),
    Mistake(
        file="common_jax/nn/layers.py",
        what="a loop keeps the products of layers that are computed again",
        right="if not remat:",
        wrong="if True:",
        tests="tests/test_remat_and_scan.py::test_scan_layers_changes_neither_loss_nor_gradient",
    ),
    Mistake(
        file="common_jax/nn/mlp.py",
        what="the GELU by tanh",
        right="return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))",
        wrong="return jax.nn.gelu(x)",
        tests=LAYERS,
    ),
    Mistake(
        file="common_jax/nn/patches.py",
        what="the bias starts at zero",
        right='self.param("bias", init,',
        wrong='self.param("bias", nn.initializers.zeros,',
        tests=STARTS,
    ),
    Mistake(
        file="common_jax/weights/entries.py",
        what="a norm's gain and bias take each other's place, both ways",
        right='f"{target}/scale": copy(f"{source}.weight"),\n'
        '        f"{target}/bias": copy(f"{source}.bias"),',
        wrong='f"{target}/scale": copy(f"{source}.bias"),\n'
        '        f"{target}/bias": copy(f"{source}.weight"),',
        tests=CONVERT,
    ),
    Mistake(
        file="m2mkd_jax/models/vit_names.py",
        what="the last expert is written first",
        right="tuple(turn(x[e : e + 1]) for e in range(count))",
        wrong="tuple(turn(x[e : e + 1]) for e in reversed(range(count)))",
        tests=CONVERT,
    ),
    Mistake(
        file="m2mkd_jax/loading.py",
        what="the last parameters in place of their average",
        right="average=True",
        wrong="average=False",
        tests=LOADING,
    ),
    Mistake(
        file="m2mkd_jax/loading.py",
        what="pixels are not normalised",
        right='return prepare_evaluation({"image": jnp.asarray(images)}, config.data)',
        wrong="return jnp.asarray(images, jnp.float32) / 255",
        tests=LOADING,
    ),
    Mistake(
        file="m2mkd_jax/phases/networks.py",
        what="the meta model in place of the module",
        right='"module": "teacher",',
        wrong='"module": "meta",',
        tests=LOADING,
    ),
    Mistake(
        file="m2mkd_jax/pretrained/hub.py",
        what="the architecture's name overrides the arguments of the network",
        right="fields = images | known | fields",
        wrong="fields = images | fields | known",
        tests=NAMES,
    ),
    Mistake(
        file="m2mkd_jax/pretrained/sizes.py",
        what="an unknown architecture borrows from a network of the same size",
        right="elif kind.family.files.timm and not _is_known(file, kind):",
        wrong="elif False:",
        tests=NAMES,
    ),
)
