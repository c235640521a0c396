"""Mistakes in CLIPTrans' data and runs: tokens, features, corpora, stages, scores."""

from mistakes.mistake import Mistake

PACKAGE, TESTS = "cliptrans_jax", "tests/cliptrans_jax"
ENCODERS = f"{TESTS}/test_encoders.py"
FEED = f"{TESTS}/test_stages.py {TESTS}/test_feed.py"
OBJECTIVE, RUN_DATA = f"{TESTS}/test_objective.py", f"{TESTS}/test_run_data.py"
INITIAL = f"{TESTS}/test_initial_weights.py"
KEPT = (
    f"{ENCODERS}::test_every_sentence_gets_its_own_feature "
    f"{ENCODERS}::test_text_features_are_cached_per_tower_and_text "
    f"{ENCODERS}::test_image_features_are_cached_per_tower_and_set"
)
AVERAGED = f"{TESTS}/test_runs.py::test_no_features_are_needed_without_a_prefix"
TEXTS = (
    f"{TESTS}/test_tokens.py::test_first_word_is_tokenized_as_inside_a_sentence "
    f"{TESTS}/test_tokens.py::test_mbart50_codes_are_the_published_ones "
    f"{TESTS}/test_tokens.py::test_special_tokens_count_towards_the_length_limit "
    f"{TESTS}/test_tokens.py::test_clip_splits_words_as_published "
    f"{TESTS}/test_published.py::test_most_probable_pieces_are_chosen"
)
CORPORA = f"{TESTS}/test_corpora.py {TESTS}/test_emoji_set.py"
SCORES = f"{TESTS}/test_scores.py {TESTS}/test_show.py"
DRAWN = f"{TESTS}/test_contrastive.py::test_training_samples_a_language_and_augments_the_image"
LOCKED = f"{TESTS}/test_locked_text.py::test_text_features_match_the_language_of_each_name"

MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        f"{PACKAGE}/encoders.py",
        "features go back in the order of the sorting and not of its inverse",
        "return features[np.argsort(order)]",
        "return features[order]",
        KEPT,
    ),
    Mistake(
        f"{PACKAGE}/encoders.py",
        "text features of another precision are taken from the cache",
        "return [repr(tower.config), str(tower.dtype), *([precision] if precision else [])]",
        "return [repr(tower.config), *([precision] if precision else [])]",
        KEPT,
    ),
    Mistake(
        f"{PACKAGE}/features.py",
        "the last rows of a cache do not reach the other hosts",
        "for start in range(0, rows, step):",
        "for start in range(0, rows - step, step):",
        f"{TESTS}/test_features.py::test_two_hosts_compute_the_same_features",
    ),
    Mistake(
        f"{PACKAGE}/config.py",
        "parity raises Adam's epsilon where it should lower it",
        "eps=self.optim.eps / self.optim.accumulate",
        "eps=self.optim.eps * self.optim.accumulate",
        f"{TESTS}/test_config.py",
    ),
    Mistake(
        f"{PACKAGE}/stages.py",
        "translation freezes what captioning does",
        "    if stage.captioning:\n",
        "    if stage:\n",
        f"{OBJECTIVE}::test_trained_parameters_of_each_stage",
    ),
    Mistake(
        f"{PACKAGE}/data/feed.py",
        "the batches of a window come in the same order in every epoch",
        "np.random.RandomState(feed.seed * 1_000_003 % 2**31 + epoch)",
        "np.random.RandomState(feed.seed * 1_000_003 % 2**31)",
        FEED,
    ),
    Mistake(
        f"{PACKAGE}/data/feed.py",
        "all sentences lose their tokens by the same draws",
        "(seed, epoch, int(i))",
        "(seed, epoch, 0)",
        FEED,
    ),
    Mistake(
        f"{PACKAGE}/data/examples.py",
        "text features are of the target, which is what has to be found",
        "Picked.of(by_language, [source for source, _ in self.languages], self.rows)",
        "Picked.of(by_language, [target for _, target in self.languages], self.rows)",
        FEED,
    ),
    Mistake(
        f"{PACKAGE}/data/pictures.py",
        "contrast changes with brightness",
        "enhance(1 + contrast * config.contrast)",
        "enhance(1 + brightness * config.contrast)",
        f"{TESTS}/test_pictures.py",
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/tokens.py",
        "the first word has other pieces than inside a sentence",
        'return f" {text}" if text else ""',
        "return text",
        TEXTS,
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/tokens.py",
        "stored ids of another tokenizer are taken",
        'f"ids 1 {tokenizer.fingerprint(frame)}"',
        'f"ids 1 {frame}"',
        f"{TESTS}/test_encode_corpus.py",
    ),
    Mistake(
        "common_jax/untrusted/zips.py",
        "damage of a mapped file goes unnoticed",
        "or zlib.crc32(content) != entry.CRC:",
        "or not content:",
        f"{TESTS}/test_encode_corpus.py::test_damaged_file_is_reported_and_rewritten",
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/framing.py",
        "a sentence that is cut is longer than the limit",
        "room = self.limit - len(start) - 1\n        too_long",
        "room = self.limit - len(start)\n        too_long",
        TEXTS,
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/sentencepieces.py",
        "pieces are as probable as each other",
        "model.pieces.add(piece=piece, score=score)",
        "model.pieces.add(piece=piece)",
        TEXTS,
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/sentencepieces.py",
        "BPE models are taken for unigram ones",
        "return types.BPE if bpe else types.UNIGRAM",
        "return types.UNIGRAM",
        f"{TESTS}/test_nllb_tokens.py::test_nllb_ids_are_sentencepiece_ids_plus_one",
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/published.py",
        "M2M-100's pieces have the ids of their order in the model",
        "[ids_of.get(piece, UNK) for piece, _ in model.pieces]",
        "[*range(4, 4 + len(model.pieces))]",
        f"{TESTS}/test_nllb_tokens.py::test_m2m100_ids_are_those_of_its_vocabulary",
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/published.py",
        "the vocabulary of another model turns all pieces into <unk>",
        "if len(missing) > FEW * len(model.pieces):",
        "if len(missing) > len(model.pieces):",
        f"{TESTS}/test_nllb_tokens.py::test_vocabulary_of_another_model_is_refused",
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/token_files.py",
        "a tokenizer.json may have any steps",
        "if kind not in kinds:",
        "if False:",
        f"{TESTS}/test_nllb_tokens.py::test_steps_that_sentencepiece_lacks_are_refused",
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/byte_pairs.py",
        "SigLIP 2 reads capital letters",
        "[normalizers.Lowercase(), normalizers.Replace",
        "[normalizers.Replace",
        f"{TESTS}/test_gemma_tokens.py::test_pieces_are_those_of_lower_cased_text",
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/byte_pairs.py",
        "CLIP takes a number for one word",
        r"""[\p{N}]|[^\s""",
        r"""[\p{N}]+|[^\s""",
        TEXTS,
    ),
    Mistake(
        f"{PACKAGE}/data/tokenizers/published.py",
        "Nepali and Dutch have exchanged their tokens",
        '"ne_NP", "nl_XX", "ro_RO"',
        '"nl_XX", "ne_NP", "ro_RO"',
        TEXTS,
    ),
    Mistake(
        f"{PACKAGE}/data/corpora.py",
        "flags are left out whatever the config says",
        "flags=config.emoji_flags)",
        "flags=False)",
        CORPORA,
    ),
    Mistake(
        f"{PACKAGE}/data/corpus.py",
        "a folder that lacks one picture is passed over",
        "if found := missing & present:",
        "if missing == (found := missing & present):",
        CORPORA,
    ),
    Mistake(
        f"{PACKAGE}/data/layouts.py",
        "what a failed download left is taken for a picture",
        "if i not in unfetched and keys[i] in present]",
        "if keys[i] in present]",
        CORPORA,
    ),
    Mistake(
        f"{PACKAGE}/data/emoji_set.py",
        "validation and test sets are exchanged",
        '{8: "val", 9: "test"}',
        '{8: "test", 9: "val"}',
        CORPORA,
    ),
    Mistake(
        f"{PACKAGE}/data/emoji_set.py",
        "a test name may have a word that training no longer has",
        "remaining[x][word] > 1",
        "remaining[x][word] > 0",
        CORPORA,
    ),
    Mistake(
        f"{PACKAGE}/data/emoji_set.py",
        "names of the test of compositions stay in training",
        'if (e in held_out) == (split == "compositions")]',
        'if split == "rest" or e in held_out]',
        CORPORA,
    ),
    Mistake(
        f"{PACKAGE}/runs/scoring.py",
        "a further test is written over the test split's scores",
        "            workdir / folder,\n",
        "            workdir,\n",
        RUN_DATA,
    ),
    Mistake(
        f"{PACKAGE}/evaluators/scores.py",
        "chrF takes the reference for the output",
        "chrf.corpus_score(hypotheses, [references])",
        "chrf.corpus_score(references, [hypotheses])",
        SCORES,
    ),
    Mistake(
        f"{PACKAGE}/evaluators/show.py",
        "outputs are found by the number of the example and not by the row",
        "*(texts[place] for texts in outputs.values())",
        "*(texts[row.index % len(rows)] for texts in outputs.values())",
        SCORES,
    ),
    Mistake(
        f"{PACKAGE}/evaluators/translation.py",
        "what lies behind the end of an output is part of it",
        "self.tokenizer.decode(ids[:length].tolist())",
        "self.tokenizer.decode(ids.tolist())",
        f"{TESTS}/test_translate.py",
    ),
    Mistake(
        f"{PACKAGE}/runs/objective.py",
        "a frozen text tower drops out and one that trains does not",
        'fold_in(dropout, TOWER) if "clip" in params else None',
        'fold_in(dropout, TOWER) if "clip" in helpers else None',
        OBJECTIVE,
    ),
    Mistake(
        f"{PACKAGE}/runs/initial_weights.py",
        "a text tower that an earlier run trained starts again from the published one",
        'from_run and "clip" in checkpoint.load_shapes(source)',
        'from_run and "clip" not in checkpoint.load_shapes(source)',
        INITIAL,
    ),
    Mistake(
        f"{PACKAGE}/evaluators/labels.py",
        "an evaluation counts what fills up its last batch",
        'labels = jnp.where(batch["_mask"][:, None] > 0, batch["labels"], pad)',
        'labels = batch["labels"]',
        OBJECTIVE,
    ),
    Mistake(
        f"{PACKAGE}/runs/translation.py",
        "the test set is translated with the last parameters and not their average",
        "rules=model.rules, average=True)",
        "rules=model.rules)",
        AVERAGED,
    ),
    Mistake(
        f"{PACKAGE}/runs/contrastive.py",
        "the last language is never drawn",
        'generator.integers(len(example["names"]))',
        'generator.integers(len(example["names"]) - 1)',
        DRAWN,
    ),
    Mistake(
        f"{PACKAGE}/runs/contrastive.py",
        "all names have the features of those in the first language",
        "text_features(tower, self.corpus, language, ",
        "text_features(tower, self.corpus, next(iter(self.names)), ",
        LOCKED,
    ),
    Mistake(
        f"{PACKAGE}/runs/run_data.py",
        "training looks at what was asked for in evaluation",
        "return stage.train if train else SIDES[config.test_side] or stage.test",
        "return SIDES[config.test_side] or (stage.train if train else stage.test)",
        RUN_DATA,
    ),
    Mistake(
        f"{PACKAGE}/runs/run_tokenizer.py",
        "the tokenizer learns its pieces from the test set",
        "corpus = load_corpus(config.data, config.data.train_split, languages)",
        "corpus = load_corpus(config.data, config.data.test_split, languages)",
        f"{TESTS}/test_run_tokenizer.py",
    ),
    Mistake(
        f"{PACKAGE}/runs/scoring.py",
        "the gallery has the first rows alone",
        "sample = [rows[i * len(rows) // count] for i in range(count)]",
        "sample = rows[:count]",
        RUN_DATA,
    ),
    Mistake(
        f"{PACKAGE}/runs/pipeline.py",
        "no stage smooths its labels as its recipe says",
        "label_smoothing=recipe.label_smoothing",
        "label_smoothing=config.label_smoothing",
        f"{TESTS}/test_pipeline.py",
    ),
    Mistake(
        f"{PACKAGE}/runs/evaluate.py",
        "a run is scored again with its last parameters and not their average",
        "checkpoint.load(step, mesh=mesh, rules=model.rules, average=True)",
        "checkpoint.load(step, mesh=mesh, rules=model.rules)",
        AVERAGED,
    ),
    Mistake(
        f"{PACKAGE}/loading.py",
        "a loaded model has the last parameters and not their average",
        "rules=model.rules, average=True)",
        "rules=model.rules)",
        AVERAGED,
    ),
    Mistake(
        f"{PACKAGE}/tensors/pictures.py",
        "pictures of another deviation than CLIP's are let through",
        '{"mean": "image_mean", "std": "image_std"}',
        '{"mean": "image_mean"}',
        f"{TESTS}/test_picture_settings.py::test_mismatched_image_normalisation_is_refused",
    ),
    Mistake(
        f"{PACKAGE}/tensors/pictures.py",
        "pictures of another size than the tower's are let through",
        'size = {"shortest_edge": side} if pictures.crops else square',
        'size = given.get("size", side)',
        f"{TESTS}/test_picture_settings.py::test_mismatched_preparation_of_images_is_refused",
    ),
    Mistake(
        f"{PACKAGE}/loading.py",
        "a loaded captioning run reads the sentence's words",
        "drops=STAGES[self.config.stage].captioning,",
        "drops=False,",
        f"{TESTS}/test_loading.py",
    ),
    Mistake(
        f"{PACKAGE}/runs/translation.py",
        "a pipeline looks for its towers when the stage begins that needs them",
        "towers=not _awaits_towers(config)",
        "towers=False",
        f"{TESTS}/test_run_towers.py",
    ),
    Mistake(
        "cliptrans_jax/data/feed.py",
        "sentences for the text tower are padded with the translator's id",
        "pad(tokens[rows], length, pad_id=inputs.clip_pad)",
        "pad(tokens[rows], length, pad_id=inputs.pad)",
        "tests/cliptrans_jax/test_feed.py::test_text_tower_sentences_are_padded_with_its_own_id",
    ),
    Mistake(
        "cliptrans_jax/config.py",
        "later stages of a pipeline forget what an earlier one learned",
        'model=stage, mbart="", fresh="", leave="")',
        'model=stage, mbart="")',
        "tests/cliptrans_jax/test_pipeline.py::test_pipeline_starts_from_given_sources",
    ),
    Mistake(
        f"{PACKAGE}/runs/initial_weights.py",
        "what is to be fresh is taken from a published file",
        "params.pop(path, None)\n        del shapes[path]",
        "params.get(path)",
        f"{INITIAL}::test_fresh_parameters_are_not_loaded",
    ),
    Mistake(
        "cliptrans_jax/runs/run_towers.py",
        "what is asked of a run of towers are not its averages",
        'f"clip/{name}", average=average)',
        'f"clip/{name}", average=False)',
        "tests/cliptrans_jax/test_run_towers.py::test_towers_from_a_run_have_the_sizes_of_that_run",
    ),
    Mistake(
        "cliptrans_jax/contrastive/objective.py",
        "a scale beyond its bound never comes back",
        "jnp.where(beyond & (gradient < 0), 0, gradient)",
        "jnp.where(beyond, 0, gradient)",
        "tests/cliptrans_jax/test_contrastive.py::test_scale_beyond_its_bound_can_only_decrease",
    ),
    Mistake(
        "cliptrans_jax/runs/translation.py",
        "a checkpoint of an interruption may be the best",
        'and (line.get("epoch", 0) % run.checkpoint_every == 0 or line["step"] == total)',
        "and run.checkpoint_every",
        "tests/cliptrans_jax/test_best_step.py",
    ),
)
