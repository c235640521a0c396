"""Mistakes in reading, augmenting, choosing and feeding images."""

from mistakes.mistake import Mistake

DATA, INPUTS = "m2mkd_jax/data", "common_jax/inputs"
TESTS = "tests/m2mkd_jax"

AUGMENT = (
    f"{TESTS}/test_augment.py::test_padded_crop_offsets_are_uniform "
    f"{TESTS}/test_augment.py::test_flip_mirrors_about_half "
    f"{TESTS}/test_augment.py::test_no_two_draws_share_a_key "
    f"{TESTS}/test_augment.py::test_random_affine_draws_are_uniform_and_independent "
    f"{TESTS}/test_augment.py::test_erased_rectangles_cover_range_of_area_aspect_and_position"
)
MIXING = f"{TESTS}/test_mixing.py::test_mix_draws_follow_the_config"
RANDAUGMENT = f"{TESTS}/test_randaugment.py"
TRANSFORMS = f"{TESTS}/test_transforms.py"
FEED = (
    f"{TESTS}/test_feed.py::test_evaluation_splits_test_set_into_micro_batches "
    f"{TESTS}/test_feed.py::test_augmentation_and_mixing_use_separate_streams"
)
TASK = (
    f"{TESTS}/test_few_shot.py::test_task_validates_on_test_split_by_default "
    f"{TESTS}/test_few_shot.py::test_known_examples_and_labels "
    f"{TESTS}/test_few_shot.py::test_repeated_indices_by_hand"
)
LISTS = f"{TESTS}/test_listing.py {TESTS}/test_subsets.py {TESTS}/test_digits.py"
ORDER = (
    "tests/common_jax/test_order.py::test_draws_depend_on_seed_epoch_index_and_copy "
    "tests/common_jax/test_inputs.py::test_batches_follow_the_frozen_order "
    "tests/common_jax/test_inputs.py::test_transform_draws_belong_to_the_example "
    "tests/common_jax/test_inputs.py::test_evaluation_transforms_each_example"
)
ZIPS = (
    f"{TESTS}/test_zips.py::test_extra_fields_and_folders_do_not_shift_images "
    f"{TESTS}/test_zips.py::test_split_matches_a_whole_name_or_path"
)

MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        file=f"{DATA}/augment.py",
        what="crops never reach the last offset",
        right="0, 2 * padding + 1)",
        wrong="0, 2 * padding)",
        tests=AUGMENT,
    ),
    Mistake(
        file=f"{DATA}/augment.py",
        what="a batch is mirrored as a whole or not at all",
        right="jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))",
        wrong="jax.random.bernoulli(key, 0.5, (1, 1, 1, 1))",
        tests=AUGMENT,
    ),
    Mistake(
        file=f"{DATA}/augment.py",
        what="crop and flip share a key",
        right="images = flip(images, flip_key)",
        wrong="images = flip(images, crop_key)",
        tests=AUGMENT,
    ),
    Mistake(
        file=f"{DATA}/augment.py",
        what="images turn, grow and move in one direction alone",
        right="minval=-1.0, maxval=1.0",
        wrong="minval=0.0, maxval=1.0",
        tests=AUGMENT,
    ),
    Mistake(
        file=f"{DATA}/augment.py",
        what="nothing is erased in the last row",
        right="corner[0] * (height - tall + 1)",
        wrong="corner[0] * (height - tall)",
        tests=AUGMENT,
    ),
    Mistake(
        file=f"{DATA}/augment.py",
        what="mixup draws lambda with the alpha of cutmix",
        right="beta(mixup_key, config.mixup)",
        wrong="beta(mixup_key, config.cutmix)",
        tests=MIXING,
    ),
    Mistake(
        file=f"{DATA}/augment.py",
        what="the column of a box is drawn within the height",
        right="jax.random.randint(column_key, (), 0, width)",
        wrong="jax.random.randint(column_key, (), 0, height)",
        tests=MIXING,
    ),
    Mistake(
        file=f"{DATA}/randaugment.py",
        what="the last operation is never drawn",
        right="NAMES[int(choice * len(NAMES))]",
        wrong="NAMES[int(choice * (len(NAMES) - 1))]",
        tests=RANDAUGMENT,
    ),
    Mistake(
        file=f"{DATA}/randaugment.py",
        what="images move down by a share of their width",
        right="(1, 0, 0, 0, 1, argument * image.size[1])",
        wrong="(1, 0, 0, 0, 1, argument * image.size[0])",
        tests=RANDAUGMENT,
    ),
    Mistake(
        file=f"{DATA}/transforms.py",
        what="random crops never reach the right edge",
        right="int(x * (width - wide + 1))",
        wrong="int(x * (width - wide))",
        tests=TRANSFORMS,
    ),
    Mistake(
        file=f"{DATA}/transforms.py",
        what="the spread of RandAugment's magnitude stays at its default",
        right="                magnitude_std=augment.magnitude_std,\n",
        wrong="",
        tests=TRANSFORMS,
    ),
    Mistake(
        file=f"{DATA}/feed.py",
        what="evaluation takes whole batches at once",
        right="inputs.eval_batches, batch=micro_batch",
        wrong="inputs.eval_batches, batch=batch",
        tests=FEED,
    ),
    Mistake(
        file=f"{DATA}/feed.py",
        what="mixing draws from the stream of the other changes",
        right='rngs["mix"], config=augmentation',
        wrong='rngs["augment"], config=augmentation',
        tests=FEED,
    ),
    Mistake(
        file=f"{DATA}/few_shot.py",
        what="as many images are tested on as trained on",
        right="shots=validation_shots",
        wrong="shots=shots",
        tests=TASK,
    ),
    Mistake(
        file=f"{DATA}/few_shot.py",
        what="the first images of each class are taken",
        right="draw.permutation(places)[:shots]",
        wrong="places[:shots]",
        tests=TASK,
    ),
    Mistake(
        file=f"{DATA}/samplers.py",
        what="copies of an image lie an epoch apart",
        right="np.repeat(permutation, repeats)",
        wrong="np.tile(permutation, repeats)",
        tests=TASK,
    ),
    Mistake(
        file=f"{DATA}/ood.py",
        what="an OOD set is thinned as the training set is",
        right="            per_class=0,",
        wrong="",
        tests=f"{TESTS}/test_ood.py::test_per_class_limits_do_not_apply_to_ood_set",
    ),
    Mistake(
        file=f"{DATA}/files/folders.py",
        what="the first name of a list keeps its byte order mark",
        right='.decode("utf-8-sig")',
        wrong='.decode("utf-8")',
        tests=LISTS,
    ),
    Mistake(
        file="common_jax/inputs/pictures.py",
        what="images in hidden folders count",
        right='not any(map(is_hidden, name.split("/")))',
        wrong='not is_hidden(name.split("/")[-1])',
        tests=LISTS,
    ),
    Mistake(
        file=f"{DATA}/subsets.py",
        what="labels of a test set are mapped the other way round",
        right="np.array(places, np.int32)[np.asarray(source.labels)]",
        wrong="np.argsort(places).astype(np.int32)[np.asarray(source.labels)]",
        tests=LISTS,
    ),
    Mistake(
        file=f"{DATA}/digits.py",
        what="stretched values are cut off, not rounded",
        right="np.round(dataset.images * (255 / 16))",
        wrong="np.floor(dataset.images * (255 / 16))",
        tests=LISTS,
    ),
    Mistake(
        file=f"{DATA}/files/zips.py",
        what="the extra field before a member's content is not skipped",
        right="for i in (26, 28)",
        wrong="for i in (26,)",
        tests=ZIPS,
    ),
    Mistake(
        file=f"{DATA}/files/zips.py",
        what="a split takes those whose names it begins",
        right='m.filename.startswith(f"{split}/")',
        wrong="m.filename.startswith(split)",
        tests=ZIPS,
    ),
    Mistake(
        file=f"{DATA}/files/records.py",
        what="kept labels are believed if only the first file is the same",
        right="for path in (paths[0], paths[-1]):",
        wrong="for path in (paths[0],):",
        tests=f"{TESTS}/test_records.py::test_labels_are_reread_if_any_file_differs",
    ),
    Mistake(
        file=f"{DATA}/in_memory.py",
        what="images are decoded into the places of the first chunk",
        right="images[index] = example",
        wrong="images[index - start] = example",
        tests=f"{TESTS}/test_sources.py::test_images_are_decoded_in_chunks",
    ),
    Mistake(
        file=f"{DATA}/in_memory.py",
        what="the first images stand for the set",
        right="np.linspace(0, size - 1, min(SAMPLE, size))",
        wrong="np.arange(min(SAMPLE, size))",
        tests=f"{TESTS}/test_sources.py::test_set_whose_first_images_are_bad_is_decoded",
    ),
    Mistake(
        file=f"{DATA}/few_shot.py",
        what="images to test on are said to be missing from the training split",
        right='split="training" if validate_on_train else "test"',
        wrong='split="training"',
        tests=f"{TESTS}/test_few_shot.py::test_class_and_split_with_too_few_images_are_named",
    ),
    Mistake(
        file=f"{INPUTS}/order.py",
        what="an example's draws are those of every epoch",
        right="path = (epoch, index, copy) if copy else (epoch, index)",
        wrong="path = (0, index, copy) if copy else (0, index)",
        tests=ORDER,
    ),
    Mistake(
        file=f"{INPUTS}/batches.py",
        what="copies of an example have the same draws",
        right="example_generator(self.seed, epoch, index, copy=copy)",
        wrong="example_generator(self.seed, epoch, index)",
        tests=ORDER,
    ),
    Mistake(
        file=f"{INPUTS}/batches.py",
        what="test images are not transformed",
        right="return example if self.transform is None else self.transform(example)",
        wrong="return example",
        tests=ORDER,
    ),
    Mistake(
        file=f"{INPUTS}/pictures.py",
        what="of 16 bits the lower 8 are kept",
        right="np.asarray(image) >> 8",
        wrong="np.asarray(image) & 255",
        tests="tests/common_jax/test_pictures.py::test_16_bit_grey_keeps_its_upper_8_bits",
    ),
    Mistake(
        file=f"{INPUTS}/pieces.py",
        what="a slot is written to before its piece is copied out",
        right="self._written - self._done[0] >= self.slots",
        wrong="self._written - self._done[0] > self.slots",
        tests="tests/common_jax/test_pieces.py::test_full_ring_neither_overwrites_nor_blocks",
    ),
    Mistake(
        file=f"{INPUTS}/workers.py",
        what="processes read from the first step on, wherever a run resumes",
        right="grain.MapDataset.range(positions.start, positions.stop",
        wrong="grain.MapDataset.range(0, positions.stop",
        tests="tests/common_jax/test_inputs.py::test_a_resumed_run_sees_the_same_pixels",
    ),
    Mistake(
        file=f"{INPUTS}/batches.py",
        what="the padding of an evaluation counts the bad examples of other hosts",
        right="return {name: np.zeros_like(value) for name, value in example.items()}\n    raise",
        wrong="return {name: np.zeros_like(value) for name, value in example.items()}\n"
        "        BadExamples(9, 0, None).add(index, example)\n    raise",
        tests="tests/common_jax/test_inputs.py::"
        "test_host_does_not_count_the_bad_examples_of_another",
    ),
)
