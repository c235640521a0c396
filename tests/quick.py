"""The tests that `make test-quick` leaves out: whole files, by what they do."""

import pathlib

FOLDER = pathlib.Path(__file__).parent
# A file that asks for one of these compiles much.
FIXTURES = ("compiled_quickly", "little_optimised", "unoptimised")
# Others that compile much, start processes, train, or try very many inputs.
SLOW = (
    "cliptrans_jax/test_command.py",
    "cliptrans_jax/test_features.py",
    "cliptrans_jax/test_stages.py",
    "cliptrans_jax/test_translate.py",
    "common_jax/test_checkpoint.py",
    "common_jax/test_hostile_files.py",
    "common_jax/test_hosts.py",
    "common_jax/test_identity.py",
    "m2mkd_jax/test_connectivity.py",
    "m2mkd_jax/test_dispatch.py",
    "m2mkd_jax/test_families.py",
    "m2mkd_jax/test_files_of_others.py",
    "m2mkd_jax/test_hybrid.py",
    "m2mkd_jax/test_models.py",
    "m2mkd_jax/test_moe.py",
    "m2mkd_jax/test_phase_sources.py",
    "m2mkd_jax/test_priors.py",
    "m2mkd_jax/test_resume.py",
    "m2mkd_jax/test_routing.py",
    "m2mkd_jax/test_viable.py",
    "test_compile_for_pod.py",
    "test_flags.py",
    "test_fuzz.py",
    "test_gpu_plan.py",
    "test_hlo.py",
    "test_plan_programs.py",
    "test_sweep.py",
    "test_sweep_output.py",
)


def is_slow(path: pathlib.Path) -> bool:
    """Whether the quick tests leave a file out."""
    if not path.name.startswith("test_"):
        return False
    text = path.read_text()
    return path in {FOLDER / name for name in SLOW} or any(name in text for name in FIXTURES)
