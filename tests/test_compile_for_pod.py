"""tools/compile_for_pod.py: the command that compiles for a pod, and the runs it describes."""

import dataclasses
import json
import pathlib
import signal

import compile_for_pod
import jax
import numpy as np
import pytest
from tiny import AUGMENT, MOE, OPTIM, fill, tiny_config
from tiny_cliptrans import tiny_config as tiny_stage
from tiny_cliptrans import write_corpus

from cliptrans_jax.commands import plan as cliptrans_plan
from cliptrans_jax.config import ClipConfig
from cliptrans_jax.config import Config as StageConfig
from cliptrans_jax.config import SourcesConfig as StageSources
from cliptrans_jax.encoders import ImageTower
from cliptrans_jax.runs import translation
from cliptrans_jax.runs.contrastive import init as init_clip
from cliptrans_jax.runs.run_towers import describe_text
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.towers.siglip import SiglipVisionConfig
from common_jax import checkpoint, loop
from common_jax.commands.plan import compile as program
from common_jax.commands.plan.steps import lower_step
from common_jax.config import unfreeze
from common_jax.mesh import MeshConfig, make_mesh
from m2mkd_jax.commands import plan as m2mkd_plan
from m2mkd_jax.config import FewShotConfig, SourcesConfig
from m2mkd_jax.phases.networks import meta_network, student_modules, teacher_network, whole_student
from m2mkd_jax.phases.pipeline import describe, run_phase

ROOT = pathlib.Path(__file__).parents[1]
VMOE = f"--config={ROOT}/configs/m2mkd/vmoe_base.py:phase=end_to_end"


class Reached(Exception):
    """Raised where the loop would start."""


def mesh_of_two():
    return make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])


def task_of(monkeypatch, run, *arguments):
    """The task that a run passes to the loop."""
    tasks = []

    def train(task, *_, **__):
        tasks.append(task)
        raise Reached

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(Reached):
        run(*arguments)
    return tasks[0]


def text(task, optim, mesh):
    return lower_step(task, optim, mesh, log_every=2)[0].as_text()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The workdir of a run for every role, with all parameters that the phases read."""
    root, config = tmp_path_factory.mktemp("weights"), tiny_config("distill", stages=2)
    networks = {"meta": meta_network(config), "teacher": teacher_network(config)}
    params = {name: fill(network.init) for name, network in networks.items()}
    params |= {"module": params["teacher"], "student": fill(student_modules(config).init)}
    checkpoint.write_params(root / "parts", params, config={})
    network = {"student": fill(whole_student(config).init)}
    checkpoint.write_params(root / "whole", network, config={})
    return root


PHASES = ("pretrain_meta", "train_module", "assemble", "distill", "end_to_end", "few_shot")


@pytest.mark.parametrize("phase", PHASES)
def test_described_phase_step_matches_the_run(phase, weights, monkeypatch, tmp_path):
    parts = str(weights / "parts")
    optim = dataclasses.replace(OPTIM, accumulate=2, ema=0.9)
    if phase == "few_shot":
        optim = dataclasses.replace(optim, batch=8)
    config = dataclasses.replace(
        tiny_config(phase, optim=optim, stages=2),
        module="1",
        augment=dataclasses.replace(AUGMENT, mixup=0.0, cutmix=0.0),
        few_shot=FewShotConfig(ways=4, shots=4, test_shots=3),
        sources=SourcesConfig(
            meta=parts, teacher=parts, modules=(parts,) * 2, network=str(weights / "whole")
        ),
    )
    if phase == "end_to_end":
        config = dataclasses.replace(config, baseline=dataclasses.replace(config.distill))
    mesh = mesh_of_two()
    task = task_of(monkeypatch, run_phase, config, tmp_path, mesh)
    described = describe(dataclasses.replace(config, sources=SourcesConfig()), mesh)
    described = described.task(steps_per_epoch=task.steps_per_epoch)
    assert described.batches is None and task.batches is not None
    assert text(described, optim, mesh) == text(task, optim, mesh)


@pytest.mark.parametrize("stage", ["caption", "translate"])
def test_described_stage_step_matches_the_run(stage, monkeypatch, tmp_path):
    root = write_corpus(tmp_path / "shapes")
    config = dataclasses.replace(tiny_stage(stage, root), keep_text_features=False)
    clip = tmp_path / "clip"
    clip_config = dataclasses.replace(config, stage="clip")
    params = fill(lambda key: init_clip(clip_config, key))
    checkpoint.write_params(clip, params, config=unfreeze(clip_config).to_dict())
    config = dataclasses.replace(config, sources=StageSources(clip=str(clip)))
    mesh = mesh_of_two()
    task = task_of(monkeypatch, translation.run, config, tmp_path / "run", mesh)
    tokens = task.batch["labels"].shape[1]
    epoch, batch = task.steps_per_epoch, config.optim.batch
    described = translation.describe(config, mesh, examples=epoch * batch, tokens=tokens)
    assert {name: x.shape for name, x in described.batch.items()} == {
        name: x.shape for name, x in task.batch.items()
    }
    assert text(described, config.optim, mesh) == text(task, config.optim, mesh)


def test_published_text_tower_is_described_by_its_tokenizer_kind():
    config = StageConfig()
    published = dataclasses.replace(config.clip_tokenizer, kind="xlmr", path="x")
    tower = describe_text(dataclasses.replace(config, clip_tokenizer=published))
    assert tower.config.features == 512
    encoder, projection = 558_840_832, 1024 * 512 + 512
    assert sum(leaf.size for leaf in jax.tree.leaves(tower.params)) == encoder + projection


def test_text_encoding_program_takes_the_sentence_length():
    sizes = MClipConfig(vocab=11, positions=20, width=8, layers=1, heads=2, hidden=16, features=4)
    trained = dataclasses.replace(StageConfig().clip_tokenizer, kind="trained")
    config = dataclasses.replace(StageConfig(), clip=ClipConfig(sizes), clip_tokenizer=trained)
    step = cliptrans_plan.make_step(config, mesh_of_two(), program.Options(encode="texts"))
    assert step.title == "features of 256 sentences of 18 tokens"
    assert step.lowered.out_info[0].shape == (256, 4)


def test_picture_encoding_program_takes_prepared_pictures():
    sizes = SiglipVisionConfig(image=10, patch=4, width=8, layers=1, heads=2, hidden=16)
    clip = ClipConfig(image=sizes)
    config = dataclasses.replace(StageConfig(), clip=clip)
    step = cliptrans_plan.make_step(config, mesh_of_two(), program.Options(encode="pictures"))
    assert step.title == "features of 128 pictures of 10 x 10 pixels"
    tower, batch = ImageTower.described(sizes, config.dtype), step.arguments["batch"]
    prepared = tower.prepare(np.zeros((20, 30, 3), np.uint8))
    assert (batch["image"].shape[1:], batch["image"].dtype) == (prepared.shape, prepared.dtype)
    assert step.lowered.out_info[0].shape == (128, 8)
    patches, tokens = 4 * 4 * 3 * 8, 2 * 2
    assert step.flops.model > 128 * tokens * 2 * patches


# The command.


def command(capsys, *flags):
    """(exit status, standard output, standard error)."""
    with pytest.raises(SystemExit) as end:
        compile_for_pod.main(["compile_for_pod.py", *flags])
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


@pytest.fixture
def eight_devices(monkeypatch):
    """Uses the actual devices in place of described ones."""
    monkeypatch.setattr(program, "describe_devices", lambda *_, **__: jax.devices())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((VMOE, "--topology=v7:4x4"), "--topology=v7:4x4 must be one of"),
        ((VMOE,), "--topology= must be one of"),
        ((VMOE, "--topology=h300"), "or one of ['a100', 'b200', 'h100', 'h200']"),
        ((VMOE, "--topology=h100:1x8", "--slices=2"), "hosts is in --topology=h100:HOSTSxCARDS"),
        (
            (VMOE, "--topology=h100:1x8", "--config.mesh.fsdp=3"),
            "config.mesh=data -1 x fsdp 3 x expert 8 needs a divisor of the 8 devices",
        ),
        ((VMOE, "--topology=v5e:2x4", "--slices=0"), "--slices=0 must be a number from 1"),
        (
            (VMOE, "--topology=v5e:2x4", "--encode=sounds"),
            "--encode=sounds must be one of ['texts'",
        ),
        (
            (VMOE, "--topology=v5e:2x4", "--json=/nowhere/found.json"),
            "--json='/nowhere/found.json' cannot be written (No such file or directory; / is",
        ),
        ((VMOE, "--topology=v5e:2x4", "--hlo=/"), "--hlo='/' cannot be written (it is a folder)"),
        ((VMOE, "--topology=v5e:2x4", "--encode"), "--encode is for CLIPTrans"),
        (
            (VMOE, "--topology=v5e:2x4", "--config.mesh.fsdp=3"),
            "config.mesh=data -1 x fsdp 3 x expert 8 needs a divisor of the 8 devices",
        ),
        (
            (VMOE, "--topology=v5e:2x4", "--config.optim.batch=12"),
            "config.optim.accumulate=12 must be a multiple of the mesh's 8 devices",
        ),
        (
            (VMOE.replace("end_to_end", "pipeline"), "--topology=v5e:2x4"),
            "config.phase='pipeline' has several runs",
        ),
        (
            (
                VMOE.replace("end_to_end", "distill"),
                "--topology=v5e:2x4",
                "--config.distill.pairs_at_once=2",
            ),
            "config.module='all' with config.distill.pairs_at_once=2 has 2 programs",
        ),
        (
            (f"--config={ROOT}/configs/cliptrans/multi30k.py:stage=pipeline", "--topology=v5e:2x4"),
            "config.stage='pipeline' must be one of",
        ),
    ],
)
def test_misfits_are_reported_before_anything_is_compiled(
    flags, message, eight_devices, capsys, monkeypatch
):
    monkeypatch.setattr(program, "lower_step", pytest.fail)
    status, _, error = command(capsys, *flags)
    assert status == 2 and message in error, error


def test_chips_are_passed_to_config_files_that_take_them():
    vmoe, nac = (f"{ROOT}/configs/m2mkd/{name}.py" for name in ("vmoe_base", "nac_imagenet"))
    assert program.with_chips(vmoe, 16) == f"{vmoe}:chips=16"
    assert program.with_chips(f"{vmoe}:size=base", 16) == f"{vmoe}:size=base,chips=16"
    for text in (f"{vmoe}:chips=1", f"{nac}:phase=distill", "nowhere.py"):
        assert program.with_chips(text, 16) == text


def test_chips_are_passed_for_every_form_of_the_flag():
    file, more = f"{ROOT}/configs/m2mkd/vmoe_base.py", ["--config.seed=1", "--configs=x"]
    wanted = [f"--config={file}:chips=16", *more]
    for flag in ([f"--config={file}"], ["--config", file], [f"-config={file}"], ["-config", file]):
        assert program._config_with_chips([*flag, *more], 16) == wanted
    assert program._config_with_chips(["--config"], 16) == ["--config"]


@dataclasses.dataclass
class Compiled:
    """A compilation result with sizes of choice."""

    size: int

    def as_text(self):
        return "ENTRY %main (p: f32[4]) -> f32[4] {\n  ROOT %p = f32[4]{0} parameter(0)\n}"

    def memory_analysis(self):
        names = ("argument", "temp", "output", "alias", "generated_code")
        sizes = {f"{name}_size_in_bytes": 0 for name in names} | {"temp_size_in_bytes": self.size}
        return dataclasses.make_dataclass("Stats", sizes)(**sizes)


@dataclasses.dataclass
class Lowered:
    """A program whose compilation returns `result`, or raises it."""

    result: object

    def compile(self, options):
        assert options is None  # options are only for TPUs
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


XLA = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: (52.66G) exceeds available HBM (15.75G)\nSee")


@pytest.fixture(scope="module")
def small_step():
    """What to compile for a small network."""
    config = tiny_config("end_to_end", moe=dataclasses.replace(MOE, dispatch="capacity", groups=8))
    return m2mkd_plan.make_step(config, make_mesh(MeshConfig(expert=4)), program.Options())


@pytest.mark.parametrize(
    ("result", "status", "said"),
    [
        (Compiled(10**9), 0, "HBM per chip: 1.00 GB of 16.00 GB"),
        (
            Compiled(17 * 10**9),
            1,
            "DOES NOT FIT: a chip of v5e has 16.00 GB of HBM; the step takes",
        ),
        (XLA, 1, "(52.66G) exceeds available HBM (15.75G)"),
    ],
    ids=["fits", "too large", "refused by XLA"],
)
def test_step_over_the_memory_limit_lists_large_arrays_and_remedies(
    result, status, said, eight_devices, small_step, capsys, monkeypatch, tmp_path
):
    step = dataclasses.replace(small_step, lowered=Lowered(result))
    monkeypatch.setattr(m2mkd_plan, "make_step", lambda *_: step)
    found = tmp_path / "found.json"
    code, printed, _ = command(capsys, VMOE, "--topology=v5e:2x4", "--json", str(found))
    assert code == status and said in printed, printed
    found = json.loads(found.read_text())
    assert found["fits"] == (status == 0) and found["chips"] == 8
    assert found["largest"][0]["name"].startswith(("batch/", "params/", "opt_state/"))
    if status:
        for text in ("params/student/stage_*", "kept for the backward pass", "config.model.remat"):
            assert text in printed
        assert "config.mesh.expert" in printed and "config.precision=bfloat16" in printed


def test_stopped_plan_does_not_exit_as_one_that_fits(
    eight_devices, small_step, capsys, monkeypatch
):
    class Interrupted(Lowered):
        def compile(self, options):
            signal.raise_signal(signal.SIGTERM)
            return super().compile(options)

    step = dataclasses.replace(small_step, lowered=Interrupted(Compiled(10**9)))
    monkeypatch.setattr(m2mkd_plan, "make_step", lambda *_: step)
    status, _, error = command(capsys, VMOE, "--topology=v5e:2x4")
    assert status == 128 + signal.SIGTERM
    assert error == "stopped as requested: nothing was planned\n"


def test_full_disk_does_not_lose_the_numbers(
    eight_devices, small_step, capsys, monkeypatch, tmp_path
):
    step = dataclasses.replace(small_step, lowered=Lowered(Compiled(10**9)))
    monkeypatch.setattr(m2mkd_plan, "make_step", lambda *_: step)
    found = tmp_path / "found.json"
    status, printed, error = command(
        capsys, VMOE, "--topology=v5e:2x4", f"--json={found}", "--hlo=/dev/full"
    )
    assert status == 2 and "No space left on device" in error
    assert "HBM per chip: 1.00 GB of 16.00 GB" in printed
    assert json.loads(found.read_text())["fits"]
