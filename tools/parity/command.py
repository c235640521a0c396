"""Runs our code on golden cases: inputs and results recorded from the original PyTorch code.

    python tools/parity.py --golden tests/golden [--only 'm2mkd/vit_.*']

prints one line per case, for the comparison closest to failing: the largest error, absolute and
relative to the largest expected value, and the tolerance. All sizes and settings are in the case's
json; its name only selects the runner.
"""

import argparse
import pathlib
import re
from collections.abc import Callable, Iterable

import jax

from parity import (
    assemble,
    cases,
    cliptrans,
    cliptrans_decode,
    cliptrans_scores,
    cliptrans_towers,
    cliptrans_training,
    data,
    m2mkd,
    nac,
    nac_graphs,
    nac_students,
    training,
)
from parity.cases import Case, Check, Runner

FOLDERS = ("m2mkd", "nac", "cliptrans")
UNOPTIMISED = "jax_disable_most_optimizations"

# (regex of folder/case, runner); the first match counts.
RUNNERS: tuple[tuple[str, Runner], ...] = (
    (r"m2mkd/vit_.*", m2mkd.run_vit),
    (r"m2mkd/vmoe_.*", m2mkd.run_vmoe),
    (r"m2mkd/m2mkd_loss_.*", m2mkd.run_m2mkd_loss),
    (r"m2mkd/kd_baseline.*", m2mkd.run_kd_baseline),
    (r"m2mkd/mt_hybrid_.*", training.run_train_module),
    (r"m2mkd/ft_train_.*", training.run_end_to_end),
    (r"m2mkd/assemble_.*", assemble.run_assemble),
    (r"m2mkd/split_teacher.*", m2mkd.run_split_teacher),
    (r"m2mkd/pos_embed_resize.*", m2mkd.run_pos_embed_resize),
    (r"m2mkd/drop_path.*", m2mkd.run_drop_path),
    (r"m2mkd/lr_schedule.*", training.run_lr_schedule),
    (r"m2mkd/mixup_cutmix.*", data.run_mixup_cutmix),
    (r"m2mkd/augment_ops.*", data.run_augment_ops),
    (r"m2mkd/few_shot.*", data.run_few_shot),
    (r"m2mkd/repeated_aug_sampler.*", data.run_repeated_aug_sampler),
    (r"nac/a_modfc.*", nac.run_modulated_linear),
    (r"nac/a_.*", nac.run_linear),
    (r"nac/b_kernel.*", nac.run_kernel),
    (r"nac/c_kmla_.*", nac.run_attention),
    (r"nac/c_read_in_attention_.*", nac.run_read_in_attention),
    (r"nac/c_(attentive|projection)_read_in.*", nac.run_read_in),
    (r"nac/c_modffn_.*", nac.run_ffn),
    (r"nac/c_propagator_.*", nac.run_propagator),
    (r"nac/c_read_out_.*", nac.run_read_out),
    (r"nac/d_latent_seeder_.*", nac.run_seeder),
    (r"nac/d_latents_.*", nac.run_latents),
    (r"nac/e_tokenizer_.*", nac.run_tokenizer),
    (r"nac/e_positional_grid.*", nac.run_positional_grid),
    (r"nac/f_nac_.*", nac.run_network),
    (r"nac/g_student_.*", nac_students.run_student),
    (r"nac/g_m2mkd_.*", nac_students.run_composition),
    (r"nac/h_signature_hinge.*", nac_graphs.run_hinge),
    (r"nac/h_signature_gmm.*", nac_graphs.run_mixture),
    (r"nac/h_sbm.*", nac_graphs.run_blocks),
    (r"nac/h_weighted_sum.*", nac_graphs.run_weighted_sum),
    (r"nac/i_.*", nac_graphs.run_prior),
    (r"cliptrans/mbart_lm.*", cliptrans.run_mbart),
    (r"cliptrans/prefix_train_.*", cliptrans.run_prefix),
    (r"cliptrans/adapter_.*", cliptrans.run_mapper),
    (r"cliptrans/generate_.*", cliptrans_decode.run_generate),
    (r"cliptrans/mclip_.*", cliptrans_towers.run_mclip),
    (r"cliptrans/clip_image.*", cliptrans_towers.run_clip_image),
    (r"cliptrans/clip_text.*", cliptrans_towers.run_clip_text),
    (r"cliptrans/dataset_.*", cliptrans_training.run_dataset),
    (r"cliptrans/optim_.*", cliptrans_training.run_optimizer),
    (r"cliptrans/bleu.*", cliptrans_scores.run_bleu),
    (r"cliptrans/meteor.*", cliptrans_scores.run_meteor),
)


def main() -> int:
    """Runs the command; returns 0 if every case with a runner passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--golden", required=True, type=pathlib.Path, help="folder of the cases")
    parser.add_argument("--only", default="", help="regex searched for in folder/case")
    arguments = parser.parse_args()
    try:
        paths = find_cases(arguments.golden, arguments.only)
    except ValueError as error:
        parser.error(str(error))
    return run(paths, print)


def find_cases(golden: pathlib.Path, only: str = "") -> list[pathlib.Path]:
    """The jsons of the cases under `golden` whose folder/case has a match of the regex `only`;
    raises ValueError if there are none."""
    if not golden.is_dir():
        raise ValueError(f"--golden {golden}: there is no such folder")
    paths = [path for folder in FOLDERS for path in sorted((golden / folder).glob("*.json"))]
    if not paths:
        raise ValueError(f"--golden {golden}: no case (NAME.json and NAME.npz) in any of {FOLDERS}")
    try:
        chosen = [path for path in paths if re.search(only, case_name(path))]
    except re.error as error:
        raise ValueError(f"--only {only!r} is no regex: {error}") from None
    if not chosen:
        raise ValueError(f"--only {only!r} matches none of the {len(paths)} cases in {golden}")
    return chosen


def run(paths: Iterable[pathlib.Path], write: Callable[[str], None]) -> int:
    """Runs the cases, writes the report, and returns the exit status."""
    paths = list(paths)
    width = max(len(case_name(path)) for path in paths)
    write(f"{'case':{width}}  max_abs_err  max_rel_err  {'tolerance':18}")
    counts = {"passed": 0, "failed": 0, "without": 0}
    for path in paths:
        runner = find_runner(case_name(path))
        if runner is None:
            counts["without"] += 1
            write(f"{case_name(path):{width}}  {'-':>11}  {'-':>11}  {'-':18}  without runner")
            continue
        lines, passed = report(path, runner, width)
        counts["passed" if passed else "failed"] += 1
        for line in lines:
            write(line)
    write("{passed} passed, {failed} failed, {without} without runner".format_map(counts))
    return 1 if counts["failed"] else 0


def report(path: pathlib.Path, runner: Runner, width: int) -> tuple[list[str], bool]:
    """The report's lines on one case, one more per failed comparison, and whether all passed."""
    name = case_name(path)
    try:
        checks = run_checks(cases.read_case(path), runner)
    except Exception as error:  # a broken case must not stop the others
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        return [f"{name:{width}}  {'-':>11}  {'-':>11}  {'-':18}  FAIL", f"    {reason}"], False
    failed = [check for check in checks if not check.passed]
    worst = max(checks, key=lambda check: check.used)
    lines = [f"{name:{width}}  {_numbers(worst)}  {'FAIL' if failed else 'ok'}"]
    lines += [f"    {check.name}: {check.problem or _numbers(check)}" for check in failed]
    return lines, not failed


def run_checks(case: Case, runner: Runner) -> list[Check]:
    """The checks of a case, computed in full float32."""
    # Tiny networks take longer to compile than to run, and XLA's optimised CPU programs are less
    # accurate than plain float32.
    before = jax.config.read(UNOPTIMISED)
    jax.config.update(UNOPTIMISED, True)
    try:
        with jax.default_matmul_precision("highest"):
            checks = cases.run_case(case, runner)
    finally:
        jax.config.update(UNOPTIMISED, before)
    if not checks:
        raise ValueError(f"{case.name} holds nothing to compare")
    return checks


def find_runner(name: str) -> Runner | None:
    """The runner of case `name` (folder/case), or None."""
    return next((runner for regex, runner in RUNNERS if re.fullmatch(regex, name)), None)


def case_name(path: pathlib.Path) -> str:
    """The name, folder/case, of a case's json."""
    return f"{path.parent.name}/{path.stem}"


def _numbers(check: Check) -> str:
    tolerance = f"{check.atol:.1e}+{check.rtol:.1e}|x|" if check.atol or check.rtol else "exact"
    return f"{check.absolute:11.2e}  {check.relative:11.2e}  {tolerance:18}"
