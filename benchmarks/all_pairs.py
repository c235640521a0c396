"""All pairs of a distillation in one program, against one program per pair.

The students are those of a V-MoE with four stages and a NAC with ten, at the sizes of the demos.
Gradients are compared module by module. Then one update of the program with all pairs is timed in
turns with one update of each single-pair program, on the same images. Finally, whole runs of
--steps updates are timed once, one with `module=all` and K with one module each, including startup,
compilation, data, evaluation and saving.

Let m, t and s be the forward FLOPs of one stage of the meta model, the teacher and the student. Per
update, K programs with one pair each need

    K (t + 3 s) + 2 K (K - 1) m

(the meta model's stages before each module, after the teacher's and after the student's, and the
backward pass to the inputs of the last). One program shares the stages before the modules:

    K (t + 3 s) + (3 K (K - 1) / 2 + K - 1) m

The printed FLOP ratio is counted in the programs. Further savings come from fewer and larger matrix
products and, for whole runs, from one startup, one data pipeline and one compilation.

    python benchmarks/all_pairs.py
"""

import dataclasses
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import timing

from common_jax import checkpoint
from common_jax.command_line import read_config_file
from common_jax.config import freeze
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.signals import ends_quietly
from common_jax.state import step_rngs
from m2mkd_jax.config import Config
from m2mkd_jax.phases.networks import meta_network, teacher_network
from m2mkd_jax.phases.pipeline import describe

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from common_jax.commands.plan.steps import step_flops

ROOT = pathlib.Path(__file__).parents[1]
ONE, EACH, RUN_EACH = "all pairs", "a program each", "a run each"
TOLERANCE = 1e-4
TEN = (1,) * 10
NAC_FLAGS = {
    "model.iterations": 8,
    "meta.depths": TEN,
    "teacher.depths": TEN,
}
# Name -> (config file, overrides, target ratio of whole runs).
CASES = {
    "V-MoE, K = 4": ("configs/m2mkd/digits.py", {}, 1.5),
    "NAC, K = 10": ("configs/m2mkd/digits_nac.py", NAC_FLAGS, 2.0),
}


def load(file: str, changes: dict[str, object]) -> Config:
    config = read_config_file(f"{ROOT / file}:phase=distill")
    config.update_from_flattened_dict(changes)
    return freeze(Config, config)


def random_like(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.05 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


class Program(timing.Training):
    """The update of a run that trains some of the modules."""

    def __init__(self, config: Config, batch: dict[str, np.ndarray], helpers):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self.task = describe(config, mesh).task(steps_per_epoch=100)
        optim = dataclasses.replace(config.optim, steps=1000, warmup_steps=10)
        own = {
            role: {stage: helpers[role][stage] for stage in stages}
            for role, stages in self.task.helpers.items()
        }
        super().__init__(self.task, optim, batch, own)
        self.flops = step_flops(self.task, optim).model

    def gradient(self):
        loss = jax.jit(jax.grad(self.task.loss, has_aux=True))
        rngs = step_rngs(0, 0, self.task.streams)
        return loss(self.state.params, self.helpers, self.batch, rngs, np.int32(0))[0]


def compare_updates(name: str, config: Config, repeats: int) -> tuple[timing.Claim, dict, dict]:
    """Returns the claim, the times and further details."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    task = describe(config, mesh).task(steps_per_epoch=100)
    batch = timing.random_batch(task)
    helpers = jax.device_put(random_like(task.helpers))
    together = Program(config, batch, helpers)
    apart = [
        Program(dataclasses.replace(config, module=str(stage)), batch, helpers)
        for stage in config.modules()
    ]
    ours, theirs = together.gradient()["student"], {}
    for program in apart:
        theirs |= program.gradient()["student"]
    difference = timing.check_results(ours, theirs, TOLERANCE)
    labels = f"{name}, {ONE}", f"{name}, {EACH}"
    times = timing.take_turns(
        {labels[0]: together, labels[1]: lambda: [program() for program in apart]}, repeats
    )
    claim = timing.compare(times, *labels, claim=f"{name}, update", target=None)
    operations = [together.flops, sum(program.flops for program in apart)]
    details = {
        "gradients_differ_by": difference,
        "gflop": [count / 1e9 for count in operations],
        "ratio_of_operations": operations[1] / operations[0],
        "compile_seconds": [
            together.compile_seconds,
            sum(program.compile_seconds for program in apart),
        ],
    }
    print(
        f"{name}: gradients differ by {difference:.1e} of the largest; FLOP ratio "
        f"{details['ratio_of_operations']:.2f} ({operations[1] / 1e9:.2f} / "
        f"{operations[0] / 1e9:.2f} GFLOP); compiled in {together.compile_seconds:.0f} s, the "
        f"single-pair programs in {details['compile_seconds'][1]:.0f} s in total"
    )
    return claim, times, details


def save_helpers(config: Config, folder: pathlib.Path) -> None:
    """Writes workdirs of an untrained meta model and teacher."""
    for role, network in (("meta", meta_network(config)), ("teacher", teacher_network(config))):
        params = {role: network.init(jax.random.key(0))}
        checkpoint.write_params(folder / role, params, {})


def time_run(
    file: str, changes: dict[str, object], folder: pathlib.Path, *, steps: int, module: str
) -> np.ndarray:
    """Wall-clock and CPU seconds of a whole run in its own process."""
    settings = changes | {
        "sources.meta": folder / "meta",
        "sources.teacher": folder / "teacher",
        "run.compilation_cache": None,
        "optim.steps": steps,
        "optim.warmup_steps": 10,
        "module": module,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = f"--config={ROOT / file}:phase=distill"
    start = timing.clocks()
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        done = subprocess.run(
            [sys.executable, "-m", "m2mkd_jax.main", config, *flags, f"--workdir={workdir}/run"],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"a run ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return timing.clocks() - start


def compare_runs(
    name: str, file: str, changes: dict[str, object], steps: int, target: float
) -> timing.Claim:
    config = load(file, changes)
    modules = ["all", *map(str, config.modules())]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        save_helpers(config, folder)
        one, *each = (
            time_run(file, changes, folder, steps=steps, module=module) for module in modules
        )
    print(f"{name}, {steps} updates: {ONE} {one[0]:.0f} s, {RUN_EACH} {sum(each)[0]:.0f} s")
    ratio, processor = sum(each) / one
    return {
        "claim": f"{name}, run of {steps} updates",
        "peer": RUN_EACH,
        **dict.fromkeys(("ratio", "low", "high"), ratio),
        "processor": processor,
        "repeats": 1,
        "target": target,
    }


@ends_quietly
def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--steps", type=int, default=88, help="updates of a whole run")
    flags = parser.parse_args()
    timing.start(flags.threads, keep_memory=True)
    claims, times, details = [], {}, {}
    for name, (file, changes, target) in CASES.items():
        update, own_times, details[name] = compare_updates(name, load(file, changes), flags.repeats)
        claims += [update, compare_runs(name, file, changes, flags.steps, target)]
        times |= own_times
    timing.report("all_pairs", claims, times=times, found=details)


if __name__ == "__main__":
    main()
