"""Mistakes in distillation: losses, hybrids, phases, pipeline, few-shot, evaluation."""

from mistakes.mistake import Mistake

TESTS = "tests/m2mkd_jax"
LOSSES = f"{TESTS}/test_losses.py"
HYBRID = f"{TESTS}/test_hybrid.py"
STAGES = f"{TESTS}/test_stages.py"
OBJECTIVE = f"{TESTS}/test_objective.py"
PLAN = f"{TESTS}/test_plan.py"
SOURCES = " ".join(
    f"{TESTS}/test_phase_sources.py::test_{name}"
    for name in (
        "assemble_takes_each_module_from_its_workdir",
        "baseline_teacher_is_loaded_whole",
        "different_normalisation_is_detected",
    )
)
FOREIGN = f"{TESTS}/test_phase_sources.py"
FAMILIES = f"{TESTS}/test_families.py"
CIRCUIT = f"{TESTS}/test_circuit.py"
ASSIGNMENT = f"{TESTS}/test_assignment.py"
CONNECTIVITY = (
    f"{TESTS}/test_connectivity.py::test_edges_include_the_truncation_distance "
    f"{TESTS}/test_connectivity.py::test_before_and_after_share_order_colours_and_positions"
)
RATES = f"{TESTS}/test_phases.py::test_drop_path_rates_of_each_phase"
PRECISION = f"{TESTS}/test_phases.py::test_every_network_computes_in_configured_precision"
TRAINED = f"{TESTS}/test_phases.py::test_roles_and_helpers_of_each_phase"
FEED = (
    f"{TESTS}/test_phases.py::test_only_whole_networks_are_evaluated_out_of_distribution "
    f"{TESTS}/test_phases.py::test_training_order_depends_on_seed"
)
DRAWS = (
    f"{TESTS}/test_evaluation.py::test_evaluation_draws_depend_on_run_seed "
    f"{TESTS}/test_evaluation.py::test_only_sampled_noise_differs_between_steps"
)
EPISODES = " ".join(
    f"{TESTS}/test_few_shot.py::test_{name}"
    for name in (
        "episode_trains_on_shots_and_tests_on_test_shots",
        "episode_seed_sets_examples_and_run_seed_their_order",
        "summary_averages_every_test_metric",
        "first_feed_draws_every_episode_and_returns_the_first",
    )
)
TOTALS = f"{TESTS}/test_classification.py::test_totals_by_hand tests/common_jax/test_ranking.py"

MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        "m2mkd_jax/losses.py",
        "the divergence is the other way round",
        "jnp.mean(jnp.exp(log_t) * (log_t - log_s))",
        "jnp.mean(jnp.exp(log_s) * (log_s - log_t))",
        LOSSES,
    ),
    Mistake(
        "m2mkd_jax/losses.py",
        "two kinds of distillation have each other's name",
        """    "soft": Distillation(soft_distillation),
    "soft_batch_mean": Distillation(soft_distillation_batch_mean),""",
        """    "soft": Distillation(soft_distillation_batch_mean),
    "soft_batch_mean": Distillation(soft_distillation),""",
        LOSSES,
    ),
    Mistake(
        "m2mkd_jax/losses.py",
        "a mean of softened distributions is not scaled back to logits",
        "return distillation(student, tau * log_mean, tau)",
        "return distillation(student, log_mean, tau)",
        LOSSES,
    ),
    Mistake(
        "m2mkd_jax/models/bridge.py",
        "tokens leave a stage in its own layout",
        "return x if self.classifies else convert_tokens(x, self.own, self.outer)",
        "return x",
        f"{TESTS}/test_bridge.py",
    ),
    Mistake(
        "m2mkd_jax/phases/train_module.py",
        "joined modules are trained as a whole",
        'trainable=_trained(config) if joins else ".*",',
        'trainable=".*",',
        f"{TESTS}/test_teachers.py::test_joining_trains_only_stitches_and_head",
    ),
    Mistake(
        "m2mkd_jax/phases/pipeline.py",
        "a pipeline does not check what its phases pass on",
        "            PHASES[run.phase].fit(training, planned)\n",
        "",
        f"{TESTS}/test_viable.py::test_what_phases_pass_on_is_checked_before_training",
    ),
    Mistake(
        "m2mkd_jax/phases/objective.py",
        "temperature of the config ignored",
        "distillation(outputs.logits, outputs.teacher, distill.tau)",
        "distillation(outputs.logits, outputs.teacher, 1.0)",
        OBJECTIVE,
    ),
    Mistake(
        "m2mkd_jax/phases/objective.py",
        "balance losses are not in the total",
        "total, moe = total + value + balance, moe | recorded",
        "total, moe = total + value, moe | recorded",
        OBJECTIVE,
    ),
    Mistake(
        "m2mkd_jax/hybrid.py",
        "gradients pass into what a teacher gives",
        "return jax.lax.stop_gradient(targets), logits, recorded",
        "return targets, logits, recorded",
        HYBRID,
    ),
    Mistake(
        "m2mkd_jax/hybrid.py",
        "the meta model behind a student is in training as the student is",
        "return apply(meta_params, x, train=train_meta, **span)[0]",
        "return apply(meta_params, x, train=train, **span)[0]",
        HYBRID,
    ),
    Mistake(
        "m2mkd_jax/hybrid.py",
        "teachers are in training as their students are",
        "given = hybrid_logits(modules, meta_params, hidden)[0]",
        "given = hybrid_logits(modules, meta_params, hidden, train=train, rngs=rngs)[0]",
        HYBRID,
    ),
    Mistake(
        "m2mkd_jax/stages.py",
        "all stages draw with one key",
        "keys = {stream: fold_name(key, name) for stream, key in (rngs or {}).items()}",
        "keys = dict(rngs or {})",
        STAGES,
    ),
    Mistake(
        "m2mkd_jax/stages.py",
        "all stages start from one key",
        "init(fold_name(key, stage_name(i)), zeros, train=False)",
        "init(key, zeros, train=False)",
        STAGES,
    ),
    Mistake(
        "m2mkd_jax/models/stitch.py",
        "the encoder's epsilon",
        "NORM_EPS = 1e-5",
        "NORM_EPS = 1e-6",
        STAGES,
    ),
    Mistake(
        "m2mkd_jax/assignment.py",
        "chains are one move too short",
        "length, before = jax.lax.fori_loop(0, blocks - 1, lengthen, start)",
        "length, before = jax.lax.fori_loop(0, blocks - 2, lengthen, start)",
        ASSIGNMENT,
    ),
    Mistake(
        "m2mkd_jax/assignment.py",
        "rows leave blocks that are full and not crowded",
        "jnp.where(size > room, 0.0, jnp.inf)",
        "jnp.where(size >= room, 0.0, jnp.inf)",
        ASSIGNMENT,
    ),
    Mistake(
        "m2mkd_jax/connectivity.py",
        "edges at the truncation itself are left out",
        "np.triu(distance <= truncation, 1)",
        "np.triu(distance < truncation, 1)",
        CONNECTIVITY,
    ),
    Mistake(
        "m2mkd_jax/connectivity.py",
        "both sides show the signatures before training",
        '"after training": signatures_after}',
        '"after training": signatures_before}',
        CONNECTIVITY,
    ),
    Mistake(
        "m2mkd_jax/families/vit.py",
        "teachers compute in float32 whatever the config says",
        "vit.build(section, context.interface, dtype=context.dtype,",
        "vit.build(section, context.interface,",
        PRECISION,
    ),
    Mistake(
        "m2mkd_jax/phases/sources/weights.py",
        "one workdir for all stages stands for the first alone",
        "return sources if len(sources) == count else sources * count",
        "return sources",
        SOURCES,
    ),
    Mistake(
        "m2mkd_jax/phases/sources/weights.py",
        "other means of pixels are not looked at",
        'for name in ("mean", "std")',
        'for name in ("std",)',
        SOURCES,
    ),
    Mistake(
        "m2mkd_jax/phases/training.py",
        "no stochastic depth in whole networks",
        "network = whole_network(config, role, drop_path=config.drop_path)",
        "network = whole_network(config, role)",
        RATES,
    ),
    Mistake(
        "m2mkd_jax/phases/train_module.py",
        "stochastic depth ramps over the module alone",
        "family.ramp(replace_stage(meta, stage, teacher), config.drop_path)",
        "replace_stage(meta, stage, family.ramp(teacher, config.drop_path))",
        RATES,
    ),
    Mistake(
        "m2mkd_jax/phases/distill.py",
        "the baseline's objective in place of the pairs'",
        "distill=config.distill,",
        "distill=config.baseline,",
        TRAINED,
    ),
    Mistake(
        "m2mkd_jax/phases/phase.py",
        "modules are clipped by one norm",
        "return 2 if self.phase.modular else 0",
        "return 1 if self.phase.modular else 0",
        TRAINED,
    ),
    Mistake(
        "m2mkd_jax/phases/end_to_end.py",
        "the baseline's teacher comes from the place of the meta model",
        'origin = Origin(require_source(config, "teacher"), "teacher", "teacher")',
        'origin = Origin(require_source(config, "teacher"), "meta", "teacher")',
        SOURCES,
    ),
    Mistake(
        "m2mkd_jax/families/nac.py",
        "shared propagators leave the last mediator student out",
        "for stage in range(2, section.iterations + 1)",
        "for stage in range(2, section.iterations)",
        FAMILIES,
    ),
    Mistake(
        "m2mkd_jax/families/vmoe.py",
        "stitches that are kept have the student's width",
        "stitch_width=context.meta_width if",
        "stitch_width=section.width if",
        FAMILIES,
    ),
    Mistake(
        "m2mkd_jax/families/circuit.py",
        "weights of regularisers move step by step",
        'return regularize(params["student"], (step // steps_per_epoch) / epochs)',
        'return regularize(params["student"], step / (steps_per_epoch * epochs))',
        CIRCUIT,
    ),
    Mistake(
        "m2mkd_jax/families/circuit.py",
        "inputs and outputs start from one draw",
        'fold_name(key, f"{name} signatures")',
        'fold_name(key, "signatures")',
        CIRCUIT,
    ),
    Mistake(
        "m2mkd_jax/phases/training.py",
        "every run evaluates with the draws of seed 0",
        "seed=config.seed, fold_step=",
        "seed=0, fold_step=",
        DRAWS,
    ),
    Mistake(
        "m2mkd_jax/phases/phase.py",
        "every run shuffles with seed 0",
        """        seed=config.seed,
        workdir=workdir,
        train=train,""",
        """        seed=0,
        workdir=workdir,
        train=train,""",
        FEED,
    ),
    Mistake(
        "m2mkd_jax/phases/pipeline.py",
        "all runs augment as the pipeline's own section says",
        "augment=recipe.augment,",
        "augment=config.augment,",
        PLAN,
    ),
    Mistake(
        "m2mkd_jax/phases/pipeline.py",
        "stages are taken in the order of their digits",
        "return tuple(str(workdir / folders[stage]) for stage in sorted(folders))",
        "return tuple(str(workdir / folders[stage]) for stage in sorted(folders, key=str))",
        PLAN,
    ),
    Mistake(
        "m2mkd_jax/phases/few_shot.py",
        "as many test images as training images",
        "validation_shots=few_shot.test_shots",
        "validation_shots=few_shot.shots",
        EPISODES,
    ),
    Mistake(
        "m2mkd_jax/phases/few_shot.py",
        "the interval of a population in place of a sample",
        "np.std(values, ddof=1)",
        "np.std(values)",
        EPISODES,
    ),
    Mistake(
        "m2mkd_jax/data/few_shot.py",
        "test images always from the training split",
        "train_labels if validate_on_train else test_labels",
        "train_labels",
        EPISODES,
    ),
    Mistake(
        "m2mkd_jax/evaluators/classification.py",
        "six are the best five",
        "mask * (rank < 5)",
        "mask * (rank <= 5)",
        TOTALS,
    ),
    Mistake(
        "common_jax/ranking.py",
        "of equal scores the last comes first",
        "(scores == own_score) & earlier",
        "(scores == own_score) & ~earlier",
        TOTALS,
    ),
    Mistake(
        "m2mkd_jax/phases/sources/weights.py",
        "frozen networks may have been trained with other fields",
        "        if frozen:\n            flags",
        "        if not frozen:\n            flags",
        f"{FOREIGN}::test_frozen_network_must_run_as_it_was_trained",
    ),
    Mistake(
        "m2mkd_jax/phases/sources/weights.py",
        "fields of sections within a section are named as if they were its own",
        'differing |= {f"{name}.{path}": values for path',
        "differing |= {path: values for path",
        f"{FOREIGN}::test_trained_network_may_continue_with_other_settings",
    ),
    Mistake(
        "m2mkd_jax/phases/sources/teachers.py",
        "classes of the teachers alone are compared",
        "given = getattr(config.sources, role)\n        several",
        'given = getattr(config.sources, "teachers")\n        several',
        f"{FOREIGN}::test_frozen_network_must_have_the_classes_of_the_run",
    ),
    Mistake(
        "m2mkd_jax/phases/sources/weights.py",
        "frozen networks are the last parameters",
        "average=average or frozen,",
        "average=average,",
        f"{FOREIGN}::test_what_stays_frozen_is_the_average_that_was_evaluated",
    ),
    Mistake(
        "m2mkd_jax/phases/training.py",
        "a head from scratch is warned of as a loaded one",
        "if re.fullmatch(head, path)",
        'if re.match(r".*/stage_", path)',
        f"{TESTS}/test_classes.py::test_loaded_head_of_other_classes_gives_a_warning",
    ),
)
