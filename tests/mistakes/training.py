"""Mistakes in the training loop: optimizer, step, state, averages, checkpoints, inputs, metrics."""

from mistakes.mistake import Mistake


def named(file: str, *tests: str) -> str:
    """Tests in one file of this area."""
    return " ".join(f"tests/common_jax/{file}::{test}" for test in tests)


OPTIM = named(
    "test_optim.py",
    "test_adamw_steps_match_a_hand_computation",
    "test_polynomial_decays_from_the_peak_without_warmup",
    "test_epoch_schedules_count_a_partial_last_epoch",
    "test_part_is_clipped_by_the_norm_of_all_its_parameters",
    "test_decay_mask_matches_whole_names_of_biases_and_positions",
)
STEP = named(
    "test_step.py",
    "test_micro_batches_take_every_nth_example",
    "test_each_micro_batch_has_its_own_keys",
    "test_non_finite_loss_or_gradient_alone_skips_the_step",
    "test_sgd_steps_and_average_match_a_hand_computation",
)
STATE = "tests/common_jax/test_state.py"
DESCENT = named(
    "test_descent.py",
    "test_every_step_matches_a_hand_computation",
    "test_evaluation_uses_the_average_without_skipped_steps",
    "test_resumed_average_is_bitwise_identical",
    "test_too_many_skipped_steps_in_a_row_stop_the_run",
    "test_timed_save_does_not_inherit_an_earlier_score",
)
TASK = named(
    "test_task.py",
    "test_moments_and_averages_are_sharded_like_their_parameters",
    "test_initial_state_is_drawn_from_the_seed_and_the_name_init",
)
WEIGHTS = named(
    "test_weights.py",
    "test_origin_renames_source_to_target_names",
    "test_fresh_parameters_are_drawn_even_if_in_the_source",
)
METRICS = named(
    "test_metrics.py",
    "test_events_hold_scalars_and_mark_the_restart",
    "test_line_that_does_not_fit_on_the_disk_leaves_no_trace",
)
MESH = named(
    "test_mesh.py",
    "test_rows_are_taken_from_every_shard_and_put_back",
)
CONFIG = named("test_config.py", "test_kind_selects_the_section_and_defaults_to_the_first")
INPUTS = " ".join(
    (
        named("test_order.py", "test_draws_depend_on_seed_epoch_index_and_copy"),
        named("test_inputs.py", "test_transform_is_applied_to_in_memory_sources_too"),
    )
)
CHECKPOINT = named(
    "test_checkpoint.py",
    "test_score_added_after_saving_counts_for_best",
    "test_running_average_is_loaded_if_present",
)
IDENTITY = named(
    "test_identity.py",
    "test_newest_checkpoint_identifies_a_run_without_run_json",
)
REPORT = named("test_report.py", "test_heat_maps_show_shares_relative_to_the_fair_share")
LARGEST = named("test_hosts.py", "test_largest_is_taken_across_processes")
FLOPS = (
    "tests/test_plan_flops.py::test_batched_products_and_grouped_convolutions_match_a_hand_count"
)
GPUS = "tests/test_gpu_programs.py"

MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        "common_jax/optim/optimizers.py",
        "the betas are swapped",
        "config.b1, config.b2, config.eps",
        "config.b2, config.b1, config.eps",
        OPTIM,
    ),
    Mistake(
        "common_jax/optim/optimizers.py",
        "eps is under the root",
        "config.b1, config.b2, config.eps",
        "config.b1, config.b2, 0.0, config.eps",
        OPTIM,
    ),
    Mistake(
        "common_jax/optim/schedules.py",
        "the polynomial is always a square",
        "config.min_lr, config.power, total",
        "config.min_lr, 2.0, total",
        OPTIM,
    ),
    Mistake(
        "common_jax/optim/schedules.py",
        "a last epoch that is not whole is not counted",
        "math.ceil(config.total_steps(steps_per_epoch) / steps_per_epoch)",
        "config.total_steps(steps_per_epoch) // steps_per_epoch",
        OPTIM,
    ),
    Mistake(
        "common_jax/optim/optimizers.py",
        "every array is clipped by itself",
        "parts = subtrees(gradient, depth)",
        "parts = subtrees(gradient, depth + 1)",
        OPTIM,
    ),
    Mistake(
        "common_jax/optim/optimizers.py",
        "a path without decay need only begin so",
        "and not re.fullmatch(no_decay, path)",
        "and not re.match(no_decay, path)",
        OPTIM,
    ),
    Mistake(
        "common_jax/step.py",
        "micro-batches share their keys",
        "keys = {name: jax.random.fold_in(key, index) for name, key in rngs.items()}",
        "keys = rngs",
        STEP,
    ),
    Mistake(
        "common_jax/step.py",
        "a result is read before the next is dispatched",
        "        yield from waiting\n        waiting = [result]",
        "        yield result",
        STEP,
    ),
    Mistake(
        "common_jax/step.py",
        "neighbouring examples make a micro-batch",
        "x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)",
        "x = x.reshape(count, x.shape[0] // count, *x.shape[1:])",
        STEP,
    ),
    Mistake(
        "common_jax/step.py",
        "the average keeps what is not finite",
        "ema = keep(finite, optax.incremental_update(updated, ema, 1 - config.ema), ema)",
        "ema = optax.incremental_update(updated, ema, 1 - config.ema)",
        STEP,
    ),
    Mistake(
        "common_jax/optim/optimizers.py",
        "the optimizer keeps what is not finite",
        "return direction, keep(finite, new, state)",
        "return direction, new",
        STEP,
    ),
    Mistake(
        "common_jax/step.py",
        "the average is behind by a step",
        "optax.incremental_update(updated, ema, 1 - config.ema)",
        "optax.incremental_update(trained, ema, 1 - config.ema)",
        STEP,
    ),
    Mistake(
        "common_jax/step.py",
        "a loss that is not finite is a step",
        "finite = jnp.isfinite(value) & jnp.isfinite(norm)",
        "finite = jnp.isfinite(norm)",
        STEP,
    ),
    Mistake(
        "common_jax/step.py",
        "the rate is that of the next step",
        "schedule(state.step)",
        "schedule(state.step + 1)",
        STEP,
    ),
    Mistake(
        "common_jax/state.py",
        "step and seed change places",
        "jax.random.fold_in(jax.random.key(seed), step)",
        "jax.random.fold_in(jax.random.key(step), seed)",
        STATE,
    ),
    Mistake(
        "common_jax/state.py",
        "names are hashed otherwise in every process",
        "zlib.crc32(name.encode())",
        "hash(name) % 2**32",
        STATE,
    ),
    Mistake(
        "common_jax/state.py",
        "what is trained need only begin so",
        "if re.fullmatch(regex, path)",
        "if re.match(regex, path)",
        STATE,
    ),
    Mistake(
        "common_jax/loop.py",
        "the average is never evaluated",
        "params = merge(state.params, state.ema) if averaged else state.params",
        "params = state.params",
        DESCENT,
    ),
    Mistake(
        "common_jax/loop.py",
        "a mean over two checkpoints starts at the first parameters",
        "np.float32(1 / (1 + averaged.index(done)))",
        "np.float32(1 / (2 + averaged.index(done)))",
        DESCENT,
    ),
    Mistake(
        "common_jax/run_config.py",
        "a mean is evaluated before it is whole",
        "return not self.averaged or step == self.total",
        "return True",
        DESCENT,
    ),
    Mistake(
        "common_jax/checkpoint/writing.py",
        "a mean is loaded before it is whole",
        "return AVERAGE if step >= self._averaged_from else PARTIAL_AVERAGE",
        "return AVERAGE",
        DESCENT,
    ),
    Mistake(
        "common_jax/loop.py",
        "a save by the clock has the score of an earlier step",
        "must not.\n                saver.save(state, done, None)",
        "must not.\n                saver.save(state, done, evaluation)",
        DESCENT,
    ),
    Mistake(
        "common_jax/loop.py",
        "a run that resumes reads its data from the start",
        "_prefetch(task.batches(start), mesh)",
        "_prefetch(task.batches(0), mesh)",
        DESCENT,
    ),
    Mistake(
        "common_jax/log/lines.py",
        "patience is a step longer than it says",
        "if skipped_in_row >= self._patience:",
        "if skipped_in_row > self._patience:",
        DESCENT,
    ),
    Mistake(
        "common_jax/task.py",
        "parameters are drawn from the seed's own key",
        'fold_name(jax.random.key(seed), "init")',
        "jax.random.key(seed)",
        TASK,
    ),
    Mistake(
        "common_jax/task.py",
        "every device holds the whole average",
        "ema=None if state.ema is None else trained,",
        "",
        TASK,
    ),
    Mistake(
        "common_jax/weights/warm_start.py",
        "names stay those of the source",
        "origin.renamed.get(name, name)",
        "name",
        WEIGHTS,
    ),
    Mistake(
        "common_jax/weights/warm_start.py",
        "what is to be fresh is taken where it is there",
        "if _allowed(path, fresh):\n                continue",
        "if _allowed(path, fresh) and path not in flat:\n                continue",
        WEIGHTS,
    ),
    Mistake(
        "common_jax/metrics.py",
        "TensorBoard drops the line before the start",
        "step=step + 1, session_log=start",
        "step=step, session_log=start",
        METRICS,
    ),
    Mistake(
        "common_jax/metrics.py",
        "a line that finds no room stays in part",
        "            file.truncate(size)\n",
        "",
        METRICS,
    ),
    Mistake(
        "common_jax/mesh.py",
        "rows are put back into the first share's places",
        "jax.vmap(lambda a, b, row: a.at[row].set(b))(old, new, rows)",
        "jax.vmap(lambda a, b, row: a.at[rows[0]].set(b))(old, new, rows)",
        MESH,
    ),
    Mistake(
        "common_jax/config.py",
        "without a kind the last of several sections is taken",
        'kind = value.get("kind", chosen.kind)',
        'kind = value.get("kind", choices[-1].kind)',
        CONFIG,
    ),
    Mistake(
        "common_jax/inputs/order.py",
        "copies of an example share their numbers",
        "path = (epoch, index, copy) if copy else (epoch, index)",
        "path = (epoch, index)",
        INPUTS,
    ),
    Mistake(
        "common_jax/inputs/batches.py",
        "evaluation passes the transform over for a source in memory",
        "if source.arrays is not None and transform is None:\n        return _gather_eval_batches",
        "if source.arrays is not None:\n        return _gather_eval_batches",
        INPUTS,
    ),
    Mistake(
        "common_jax/checkpoint/writing.py",
        "after a failed save the best checkpoint is forgotten",
        "self.score(step, metrics)  # kept here, since `_attempt` may replace the manager",
        "pass",
        "tests/common_jax/test_checkpoint.py::test_best_checkpoint_survives_a_later_failed_save",
    ),
    Mistake(
        "common_jax/checkpoint/writing.py",
        "files wait in memory until they have 2 GiB",
        "return FILE if largest <= FILE and",
        "return None if largest <= FILE and",
        "tests/common_jax/test_checkpoint.py::test_files_stay_small_unless_an_array_is_larger",
    ),
    Mistake(
        "common_jax/checkpoint/writing.py",
        "of a checkpoint that was evaluated later the score is not looked for",
        'return self._scores.get(checkpoint.step, float("-inf"))',
        'return float("-inf")',
        CHECKPOINT,
    ),
    Mistake(
        "common_jax/checkpoint/reading.py",
        "the average is not loaded",
        "if average and has_average(step)",
        "if average and not has_average(step)",
        CHECKPOINT,
    ),
    Mistake(
        "common_jax/checkpoint/belonging.py",
        "where run.json is lost the oldest checkpoint says which run it is",
        "Identity(ids[-1], unmarked)",
        "Identity(ids[0], unmarked)",
        IDENTITY,
    ),
    Mistake(
        "common_jax/report/draw.py",
        "shares are drawn over the number of lists in place of items",
        "cells = np.clip(cells * count,",
        "cells = np.clip(cells * len(curves),",
        REPORT,
    ),
    Mistake(
        "common_jax/hosts.py",
        "processes get the smallest of each value",
        ".max(axis=0)",
        ".min(axis=0)",
        LARGEST,
    ),
    Mistake(
        "common_jax/commands/plan/flops.py",
        "of a convolution's kernel all channels count for each group",
        "(math.prod(kernel) // outputs)",
        '(equation.params["feature_group_count"] * math.prod(kernel) // outputs)',
        FLOPS,
    ),
    Mistake(
        "common_jax/commands/plan/launches.py",
        "a loop of a known length computes no condition on a GPU",
        "if name in known:",
        "if name not in known:",
        GPUS,
    ),
    Mistake(
        "common_jax/commands/plan/traffic.py",
        "a scatter that adds reads what it adds to",
        "total += _scattered(fused, one) if _combines(program, one) else 0",
        "total += 0 if _combines(program, one) else _scattered(fused, one)",
        GPUS,
    ),
    Mistake(
        "common_jax/commands/plan/hlo.py",
        "a loop of unknown length has as many turns as its smallest slices allow",
        "most = max(most or 1, *(size // of for size, of in sizes))",
        "most = min(most or 1, *(size // of for size, of in sizes))",
        GPUS,
    ),
    Mistake(
        "common_jax/checkpoint/writing.py",
        "of losses the highest is the best",
        "-1 if best is not None",
        "1 if best is not None",
        "tests/common_jax/test_checkpoint.py::test_lowest_loss_is_kept_as_best",
    ),
    Mistake(
        "common_jax/hosts.py",
        "hosts whose data differ are not noticed",
        "if highest != lowest:",
        "if highest < lowest:",
        "tests/common_jax/test_hosts.py::test_mismatch_between_processes_is_reported",
    ),
    Mistake(
        "common_jax/weights/warm_start.py",
        "a regex of the user that matches nothing is not warned of",
        "allowance.asked and not any(",
        "allowance.asked and any(",
        "tests/common_jax/test_weights.py::test_user_regex_without_a_match_causes_a_warning",
    ),
    Mistake(
        "common_jax/workdir/claim.py",
        "another run beside this one counts as the same run, moved",
        'any(old.endswith(f"/{tail}") for tail in tails)',
        "any(tail for tail in tails)",
        "tests/common_jax/test_claim.py::test_runs_moved_together_still_match_their_sources",
    ),
    Mistake(
        "common_jax/run_config.py",
        "an average over the last checkpoints is continued over others",
        "if start >= min(",
        "if start > 10**9 + min(",
        "tests/common_jax/test_interruptions.py::test_average_in_progress_refuses_another_epoch_length",
    ),
    Mistake(
        "common_jax/checkpoint/belonging.py",
        "a run starts again over partial copies of its checkpoints",
        "if not steps and not in_bucket(folder)",
        "if steps and not in_bucket(folder)",
        "tests/common_jax/test_checkpoint.py",
    ),
    Mistake(
        "common_jax/optim/config.py",
        "the value that is advised for the average is rounded up",
        "math.floor(START_SHARE ** (1 / total) * precision)",
        "math.ceil(START_SHARE ** (1 / total) * precision)",
        "tests/common_jax/test_loop.py",
    ),
)
