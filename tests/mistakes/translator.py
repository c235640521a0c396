"""Mistakes in CLIPTrans' networks: mBART, mapper, prefix, towers, decoding, losses."""

from mistakes.mistake import Mistake

MODELS, TRANSLATORS = "cliptrans_jax/models", "cliptrans_jax/translators"
TESTS = "tests/cliptrans_jax"
NUMBERS = f"{TESTS}/test_models.py::test_model_matches_a_naive_implementation"
READS = f"{TESTS}/test_models.py::test_decoder_inputs_in_training"
ATTENTION = f"{TESTS}/test_attention.py"
DROPS = f"{TESTS}/test_models.py::test_embeddings_and_branches_have_dropout_only_in_training"
MAPPER = f"{TESTS}/test_mapper.py"
STEPS = f"{TESTS}/test_decode_steps.py"
SEARCH = f"{TESTS}/test_decode.py::test_search_matches_a_plain_search_without_cache"
LOSSES = f"{TESTS}/test_losses.py"
NLLB = f"{TESTS}/test_nllb.py"
TOWERS = f"{TESTS}/test_towers.py::test_tower_matches_a_naive_implementation"
RESNET = f"{TESTS}/test_towers.py::test_resnet_matches_a_naive_implementation"
SIGLIP = f"{TESTS}/test_siglip.py::test_tower_matches_a_naive_implementation"
TABLES = f"{TESTS}/test_tower_names.py"
FORMULAS = "tests/common_jax/test_name_table.py::test_entries_match_their_formulas"
NAMES = " ".join(
    f"{TABLES}::{name}"
    for name in (
        "test_every_config_key_is_read",
        "test_openai_names_give_the_same_towers",
        "test_missing_unknown_and_misshapen_tensors_are_reported",
    )
)
SIZES = f"{TESTS}/test_pretrained.py::test_openai_tower_sizes_are_inferred_from_shapes"

MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        f"{TRANSLATORS}/transformer.py",
        "the decoder's positions do not skip the two rows",
        "self.positions(self.config.first_row + position)",
        "self.positions(position)",
        NUMBERS,
    ),
    Mistake(
        f"{TRANSLATORS}/transformer.py",
        "another epsilon",
        "EPSILON = 1e-5",
        "EPSILON = 1e-6",
        NUMBERS,
    ),
    Mistake(
        f"{TRANSLATORS}/transformer.py",
        "embeddings are scaled by the width",
        "x * self.config.width**0.5",
        "x * self.config.width",
        NUMBERS,
    ),
    Mistake(
        f"{TRANSLATORS}/transformer.py",
        "a pad's embedding learns from where it is read",
        "jnp.where((ids == self.config.pad)[..., None], jax.lax.stop_gradient(x), x)",
        "jnp.where((ids == self.config.pad)[..., None], x, x)",
        f"{TESTS}/test_mbart.py::test_pad_embedding_has_no_gradient",
    ),
    Mistake(
        f"{TRANSLATORS}/transformer.py",
        "what cross-attention gives is not dropped",
        "x = x + self.drop(across, deterministic=not train)",
        "x = x + across",
        DROPS,
    ),
    Mistake(
        f"{TRANSLATORS}/transformer.py",
        "embeddings drop out outside training",
        "x = self.drop(x, deterministic=not train)\n        # Init",
        "x = self.drop(x, deterministic=False)\n        # Init",
        DROPS,
    ),
    Mistake(
        f"{TRANSLATORS}/transformer.py",
        "sines and cosines change places",
        "jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)",
        "jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)",
        f"{NLLB}::test_sinusoids_match_their_formula",
    ),
    Mistake(
        f"{TRANSLATORS}/nllb.py",
        "the first token has the position of pads",
        "return self.pad + 1",
        "return self.pad",
        f"{NLLB}::test_first_position_follows_the_pad_id",
    ),
    Mistake(
        f"{MODELS}/attention.py",
        "kept keys are compared at the scale of all heads",
        "query.swapaxes(1, 2) * query.shape[-1] ** -0.5",
        "query.swapaxes(1, 2) * (query.shape[-1] * query.shape[-2]) ** -0.5",
        ATTENTION,
    ),
    Mistake(
        f"{MODELS}/attention.py",
        "scores are rounded to the queries' type",
        "kind = jnp.promote_types(query.dtype, jnp.float32)",
        "kind = query.dtype",
        ATTENTION,
    ),
    Mistake(
        f"{MODELS}/attention.py",
        "cross-attention takes keys for values",
        "self.query(x), pairs[:, :, 0], pairs[:, :, 1], visible",
        "self.query(x), pairs[:, :, 1], pairs[:, :, 0], visible",
        NUMBERS,
    ),
    Mistake(
        f"{MODELS}/prefix.py",
        "the last vector of the prefix is no part of it",
        "(key >= 1) & (key <= count)",
        "(key >= 1) & (key < count)",
        READS,
    ),
    Mistake(
        f"{MODELS}/prefix.py",
        "decoding begins with the rule that has no bounds",
        'rule = config.mask if count else "prefix"',
        'rule = "prefix"',
        f"{TESTS}/test_models.py::test_decoding_begins_with_the_configured_mask",
    ),
    Mistake(
        f"{MODELS}/cliptrans.py",
        "pads are attended to",
        "mask = jnp.pad(ids[:, 1:] != config.sizes.pad, ((0, 0), (1 + count, 0)))",
        "mask = jnp.pad(ids[:, 1:] >= 0, ((0, 0), (1 + count, 0)))",
        READS,
    ),
    Mistake(
        f"{MODELS}/cliptrans.py",
        "the first slots of the prefix stay, the last words go",
        "return prefix.remove(states, self.prefix_length)",
        "return states[:, : labels.shape[1]]",
        NUMBERS,
    ),
    Mistake(
        f"{MODELS}/mapper.py",
        "the transformer's attention starts within the bounds of three matrices",
        "math.sqrt(6 / (4 * width))",
        "math.sqrt(6 / (2 * width))",
        f"{MAPPER}::test_mapper_initialisation_is_within_the_published_bounds",
    ),
    Mistake(
        f"{MODELS}/mapper.py",
        "hidden units of the transformer are not dropped",
        '"down")(drop(hidden))',
        '"down")(hidden)',
        f"{MAPPER}::test_transformer_mapper_applies_dropout_to_branches_and_hidden",
    ),
    Mistake(
        f"{MODELS}/mapper.py",
        "the hidden layer has no ReLU",
        "out(nn.relu(hidden))",
        "out(hidden)",
        f"{MAPPER}::test_mappers_match_naive_implementations",
    ),
    Mistake(
        f"{MODELS}/linear_loss.py",
        "gradients of the readout are summed as they come",
        "kind = jnp.promote_types(rows.dtype, jnp.float32)",
        "kind = rows.dtype",
        f"{LOSSES}::test_small_gradients_accumulate_over_many_chunks",
    ),
    Mistake(
        f"{MODELS}/linear_loss.py",
        "the last, shorter chunk is left out",
        "(jnp.sum(labels != self.pad) + chunk - 1) // chunk",
        "jnp.sum(labels != self.pad) // chunk",
        f"{LOSSES}::test_chunked_loss_matches_the_plain_loss",
    ),
    Mistake(
        f"{MODELS}/linear_loss.py",
        "blocks are added up as if all had one maximum",
        "[jnp.exp(part.top - top) for part in parts]",
        "[jnp.ones_like(top) for part in parts]",
        f"{LOSSES}::test_chunked_loss_matches_the_plain_loss",
    ),
    Mistake(
        f"{MODELS}/linear_loss.py",
        "the gradient of a label is computed from its rounded probability",
        "real * (jnp.expm1(label_logits - log_z) + smoothing)",
        "real * ((jnp.exp(label_logits - log_z).astype(rows.dtype) - 1).astype(kind) + smoothing)",
        f"{LOSSES}::test_gradients_of_nearly_certain_labels_are_exact",
    ),
    Mistake(
        "common_jax/nn/top_k.py",
        "equal scores of two spans change places",
        "chosen = jnp.sort(chosen, axis=-1)",
        "chosen = -jnp.sort(-chosen, axis=-1)",
        "tests/common_jax/test_top_k.py::test_top_k_of_spans_matches_top_k",
    ),
    Mistake(
        "cliptrans_jax/losses.py",
        "smoothing takes nothing from the label",
        "log_z - (1 - smoothing) * label_logits",
        "log_z - chosen",
        f"{LOSSES}::test_label_loss_of_simple_distributions",
    ),
    Mistake(
        "cliptrans_jax/contrastive/softmax.py",
        "images alone look for their texts",
        "rows, columns = jax.nn.log_softmax(scores, axis=1), jax.nn.log_softmax(scores, axis=0)",
        "rows, columns = jax.nn.log_softmax(scores, axis=0), jax.nn.log_softmax(scores, axis=0)",
        f"{LOSSES}::test_contrastive_loss_by_hand",
    ),
    Mistake(
        "cliptrans_jax/decode.py",
        "the encoder leaves out a column that has a token",
        "source[:, short:]",
        "source[:, short + 1 :]",
        f"{TESTS}/test_decode.py::test_padding_columns_have_no_effect",
    ),
    Mistake(
        "cliptrans_jax/decode.py",
        "the length of what ends counts the end",
        "values = best[:, :beams] / state.length.astype(best.dtype) ** self.config.length_penalty",
        "values = best[:, :beams] / (state.length + 1.0) ** self.config.length_penalty",
        STEPS,
    ),
    Mistake(
        "cliptrans_jax/decode.py",
        "without early stopping a search ends when the best that ended cannot be beaten",
        "done = full & (finished.scores[:, -1] >= bound)",
        "done = full & (finished.scores[:, 0] >= bound)",
        STEPS,
    ),
    Mistake(
        "cliptrans_jax/decode.py",
        "a search that is over goes on writing words",
        "shown = jnp.where(state.done[:, None], pad, next_tokens)",
        "shown = next_tokens",
        STEPS,
    ),
    Mistake(
        "cliptrans_jax/decode.py",
        "the forced end costs what it would cost",
        "scores, tokens = jnp.where(last, forced, scores), jnp.where(last, end, tokens)",
        "scores, tokens = scores, jnp.where(last, end, tokens)",
        STEPS,
    ),
    Mistake(
        "cliptrans_jax/decode.py",
        "tokens stay where they are when beams change places",
        "followed = jnp.take_along_axis(state.tokens, next_beams[:, :, None], axis=1)",
        "followed = state.tokens",
        STEPS,
    ),
    Mistake(
        "cliptrans_jax/towers/clip.py",
        "a sentence is pooled at its last token",
        "return jnp.argmax(ids, axis=1)",
        "return jnp.full(len(ids), ids.shape[1] - 1)",
        TOWERS,
    ),
    Mistake(
        "common_jax/nn/patches.py",
        "patches run along the columns first",
        ".transpose(0, 1, 3, 2, 4, 5)",
        ".transpose(0, 3, 1, 2, 4, 5)",
        TOWERS,
    ),
    Mistake(
        "cliptrans_jax/towers/mclip.py",
        "the pad is the usual one whatever the config says",
        "return position_ids(ids, self.pad)",
        "return position_ids(ids, 1)",
        TOWERS,
    ),
    Mistake(
        "cliptrans_jax/towers/mclip.py",
        "the mean is over all tokens",
        "total = jnp.sum(x, axis=1, where=visible[:, :, None])",
        "total = jnp.sum(x, axis=1)",
        TOWERS,
    ),
    Mistake(
        "cliptrans_jax/towers/resnet.py",
        "the shortcut is not averaged",
        '"shortcut")(_average(x, self.stride))',
        '"shortcut")(x[:, :: self.stride, :: self.stride])',
        RESNET,
    ),
    Mistake(
        "cliptrans_jax/towers/resnet.py",
        "variances have no epsilon",
        'jax.lax.rsqrt(stored["var"] + self.eps)',
        'jax.lax.rsqrt(stored["var"])',
        RESNET,
    ),
    Mistake(
        "cliptrans_jax/towers/siglip.py",
        "a sentence is pooled at its first token",
        'name="projection")(x[:, -1])',
        'name="projection")(x[:, 0])',
        SIGLIP,
    ),
    Mistake(
        "cliptrans_jax/towers/siglip.py",
        "sentences are not padded to all positions",
        "(0, config.positions - length)",
        "(0, 0)",
        SIGLIP,
    ),
    Mistake(
        "common_jax/nn/pooling.py",
        "keys of a stacked projection are its queries",
        "dense.product(tokens, kernel[:, 1:], last)",
        "dense.product(tokens, kernel[:, :2], last)",
        SIGLIP,
    ),
    Mistake(
        "cliptrans_jax/data/pictures.py",
        "pictures of towers without a crop are cropped",
        "if pictures.crops else (size, size)",
        "if True else (size, size)",
        f"{TESTS}/test_siglip.py::test_images_are_resized_to_a_square_without_a_crop",
    ),
    Mistake(
        "cliptrans_jax/translators/transformer_names.py",
        "the two norms of a layer change places",
        'entries.norm(f"{source}.self_attn_layer_norm", "attention_norm")',
        'entries.norm(f"{source}.final_layer_norm", "attention_norm")',
        NUMBERS,
    ),
    Mistake(
        "cliptrans_jax/towers/clip_names.py",
        "the image tower's norms under OpenAI's names change places",
        'norm("visual.ln_pre", "pre_norm")',
        'norm("visual.ln_post", "pre_norm")',
        NAMES,
    ),
    Mistake(
        "cliptrans_jax/tensors/config_json.py",
        "the longest text stands under another key",
        '"positions": "max_position_embeddings"}',
        '"positions": "n_positions"}',
        NAMES,
    ),
    Mistake(
        "common_jax/weights/entries.py",
        "heads are the inner axis of a stacked attention",
        "x.reshape(parts, heads, -1, *x.shape[1:]), (0, 1, 2), (-3, -2, -1)",
        "x.reshape(parts, -1, heads, *x.shape[1:]), (0, 2, 1), (-3, -2, -1)",
        FORMULAS,
    ),
    Mistake(
        "common_jax/weights/table.py",
        "a name is dropped for what it starts with",
        "if re.fullmatch(rx, name)",
        "if re.match(rx, name)",
        NAMES,
    ),
    Mistake(
        "cliptrans_jax/tensors/sizes.py",
        "features are as wide as tokens",
        '_shape(tensors, "visual.proj", 2, file)[1]',
        '_shape(tensors, "visual.proj", 2, file)[0]',
        SIZES,
    ),
    Mistake(
        "cliptrans_jax/runs/run_towers.py",
        "an image tower beside a text tower that keeps training is not the average",
        'not (name == "text" and config.unfreeze_clip)',
        "not config.unfreeze_clip",
        "tests/cliptrans_jax/test_run_towers.py::test_towers_from_a_run_have_the_sizes_of_that_run",
    ),
)
