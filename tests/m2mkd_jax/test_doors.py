"""Adding a phase, family or evaluator takes one record: the rest of the code finds it in the
table."""

import dataclasses
import pathlib
import types
import typing

import jax
import pytest
from jax import numpy as jnp
from meshes import one_device
from tiny import NAC, tiny_config, tiny_pipeline

from common_jax.run_config import RunConfig
from m2mkd_jax import config as configs
from m2mkd_jax import families
from m2mkd_jax.config import Config, DistillConfig
from m2mkd_jax.evaluators import EVALUATORS, Evaluator, show
from m2mkd_jax.families import FAMILIES, family_of, kind_of, section_type
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.phases import PHASES, fields, objective, pipeline, training
from m2mkd_jax.phases.networks import SECTIONS
from m2mkd_jax.phases.objective import Outputs, make_sums
from m2mkd_jax.phases.phase import Phase, WeightSource
from m2mkd_jax.pretrained import KINDS, kind_of_run
from m2mkd_jax.pretrained.kinds import kinds_of

# Phases.


@pytest.mark.parametrize("name", PHASES)
def test_phase_records_name_existing_roles_sections_and_evaluators(name):
    phase, config = PHASES[name], tiny_config(name)
    assert phase.role in SECTIONS and set(phase.evaluators) <= set(EVALUATORS)
    assert all(hasattr(config, section) for section in phase.differentiates)
    assert SECTIONS[phase.role] in phase.differentiates
    described = phase.describe(config, one_device())
    assert described.phase is phase
    assert list(jax.eval_shape(described.init, jax.random.key(0))) == [phase.role]
    for source in phase.sources:
        assert isinstance(source.value(config), str | tuple)


def test_sources_are_made_by_earlier_phases():
    made = set()
    for name, phase in PHASES.items():
        needed = {one.field for one in phase.sources if one.section == "sources" and one.made}
        assert needed <= made, name
        made.add(phase.makes)
    assert pipeline.PRODUCT in made


def test_logit_distillation_needs_a_teacher_source():
    config = tiny_config("end_to_end")
    assert [one.path for one in fields.used_sources(config)] == ["sources.students", "init.upcycle"]
    taught = dataclasses.replace(config, baseline=DistillConfig("soft"))
    assert "sources.teacher" in [one.path for one in fields.used_sources(taught)]
    paths = [one.path for one in fields.used_sources(tiny_pipeline())]
    assert paths == ["sources.meta", "sources.teacher"]


def test_new_phase_needs_only_a_record(monkeypatch):
    """It replaces few_shot, whose name the config knows."""
    probe = Phase(
        describe=PHASES["few_shot"].describe,
        run=PHASES["few_shot"].run,
        role="student",
        reads=("model",),
        differentiates=("model",),
        sources=(WeightSource("students"), WeightSource("meta")),
        folder="probe",
        ood=True,
    )
    table = dict(PHASES, few_shot=dataclasses.replace(probe, optional=True))
    monkeypatch.setattr(pipeline, "PHASES", table)
    monkeypatch.setattr(fields, "PHASES", table)
    root = pathlib.Path("/runs")
    folder, run = pipeline.plan(tiny_pipeline(), root)[-1]
    assert folder == "probe" and run.phase == "few_shot"
    assert run.sources.students == ("/runs/students",) * 3 and run.sources.meta == "/runs/meta"
    assert run.sources.network == ""
    reads = fields.reads()["few_shot"]
    assert {"ood", "sources.students", "sources.meta", "sources.fresh"} <= set(reads)
    assert "few_shot" not in reads and "few_shot" not in fields.reads()["pipeline"]


# Families.


def test_section_type_determines_family():
    sections = {"vit": ViTConfig(), "vmoe": VMoEConfig(), "nac": NacConfig()}
    assert {kind: kind_of(section) for kind, section in sections.items()} == {
        kind: kind for kind in FAMILIES
    }
    for kind, section in sections.items():
        assert family_of(section) is FAMILIES[kind]


def test_section_accepts_every_family_of_its_role():
    hints = typing.get_type_hints(Config)
    for section in ("meta", "teacher", "model"):
        found = typing.get_args(hints[section]) or (hints[section],)
        assert set(found) == {f.config for f in FAMILIES.values() if section in f.roles}
    assert section_type("meta") is ViTConfig


def test_new_family_extends_section_type(monkeypatch):
    class OtherConfig(VMoEConfig):
        """The config of a family that does not exist."""

    other = dataclasses.replace(FAMILIES["vmoe"], config=OtherConfig, roles=("model", "meta"))
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES, other=other))
    assert OtherConfig in typing.get_args(section_type("model"))
    assert typing.get_args(section_type("meta")) == (ViTConfig, OtherConfig)
    assert kind_of(OtherConfig()) == "other" and kind_of(VMoEConfig()) == "vmoe"


@pytest.mark.parametrize("kind", FAMILIES)
def test_meta_model_families_define_token_count(kind):
    family = FAMILIES[kind]
    assert ("meta" in family.roles) <= (family.tokens is not None)


def test_context_is_built_from_run_config():
    config = dataclasses.replace(tiny_config("distill"), seed=4, precision="bfloat16", model=NAC)
    context = config.context
    assert (context.seed, context.dtype, context.meta_width) == (4, jnp.bfloat16, 16)
    assert context.interface == config.interface and context.meta_tokens() == 5


# Kinds of files, derived from the records of phases and families.

KIND_OF = {
    "pretrain_meta": "meta",
    "train_module": "module",
    "assemble": "teacher",
    "distill": "vmoe_student",
    "end_to_end": "vmoe",
    "few_shot": "vmoe",
}


@pytest.mark.parametrize("phase", PHASES)
def test_kind_of_run_matches_phase_record(phase):
    config = tiny_config(phase)
    kind, role = KINDS[KIND_OF[phase]], PHASES[phase].role
    whole = {role: dict.fromkeys(("stage_0", "stage_1", "stage_2"))}
    assert kind_of_run(config, whole) == KIND_OF[phase]
    assert kind.role == role and kind.family is family_of(getattr(config, kind.section))
    assert kind.form.single == PHASES[phase].modular
    assert phase in (kind.phase, "few_shot")


def test_teacher_modules_and_nac_students_have_their_own_kinds():
    config = tiny_config("assemble")
    assert kind_of_run(config, {"teacher": {"stage_1": None}}) == "teacher_module"
    assert kind_of_run(config, {"teacher": dict.fromkeys("abc")}, single=True) == "teacher_module"
    for phase, kind in (("distill", "nac_student"), ("end_to_end", "nac")):
        config = dataclasses.replace(tiny_config(phase), model=NAC)
        assert kind_of_run(config, {"student": dict.fromkeys(range(5))}) == kind
    assert len(KINDS) == 8 and KINDS["nac"].about == "a whole NAC, for config.sources.network"


def test_family_without_published_names_has_no_kinds_and_no_export(monkeypatch):
    class OtherConfig(VMoEConfig):
        """The config of a family that does not exist."""

    other = dataclasses.replace(FAMILIES["vmoe"], config=OtherConfig, files=None)
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES, other=other))
    assert kinds_of(families.FAMILIES) == dict(KINDS)
    config = dataclasses.replace(tiny_config("end_to_end"), model=OtherConfig())
    with pytest.raises(ValueError, match=r"config\.model is a OtherConfig.* no published tensor"):
        kind_of_run(config, {"student": {}})


@pytest.mark.parametrize("kind", ["nac", "nac_student"])
def test_kind_of_another_family_than_config_is_refused(kind):
    for read in (KINDS[kind].table, KINDS[kind].shapes):
        with pytest.raises(ValueError, match=r"config\.model is a VMoEConfig, .* a NacConfig"):
            read(tiny_config("end_to_end"), None)


# Evaluators.


def test_new_evaluator_needs_only_a_table_entry(monkeypatch):
    def count_sure(logits, labels, mask):
        return {"sure": jnp.sum(mask * (jnp.max(logits, axis=-1) > 2))}

    table = dict(EVALUATORS, certainty=Evaluator(count_sure, {"sure": str}, lower=()))
    monkeypatch.setattr(objective, "EVALUATORS", table)
    logits = jnp.asarray([[3.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
    outputs = {"net": Outputs(logits, None, {})}
    batch = {
        "image": jnp.zeros((3, 8, 8, 1), jnp.uint8),
        "label": jnp.asarray([0, 0, 1]),
        "_mask": jnp.asarray([1.0, 1.0, 0.0]),
    }
    config = tiny_config("end_to_end")

    def sums(names):
        forward = make_sums(lambda *_: outputs, config, names)
        return forward({}, {}, batch, jax.random.key(0))

    assert sums(["certainty"]) == {"sure": 1, "count": 2}
    both = sums(["classification", "certainty"])
    assert (both["accuracy"], both["sure"], both["count"]) == (2, 1, 2)


@pytest.mark.parametrize("name", EVALUATORS)
def test_record_of_an_evaluator_lists_its_metrics(name):
    evaluator, row = EVALUATORS[name], jax.ShapeDtypeStruct((2,), jnp.float32)
    logits, labels = (jax.ShapeDtypeStruct(*one) for one in (((2, 9), row.dtype), ((2,), int)))
    totals = jax.eval_shape(evaluator.totals, logits, labels, row)
    assert set(totals) == set(evaluator.shown) >= set(evaluator.lower)


def test_best_checkpoint_follows_the_evaluators_of_the_phase(monkeypatch):
    """A metric of which lower is better is kept at its lowest; one of another evaluator is
    refused."""
    brier = Evaluator(lambda *_: {}, {"brier": str}, lower=("brier",))
    for module in (configs, training):
        monkeypatch.setattr(module, "EVALUATORS", dict(EVALUATORS, calibration=brier))
    run = RunConfig(best="test/brier")
    config = dataclasses.replace(tiny_config("end_to_end"), run=run)
    feed = types.SimpleNamespace(evaluation=None, ood=None, batches=None, label_names=("a",))
    feed.steps_per_epoch = 1
    described = PHASES["end_to_end"].describe(config, one_device())
    with pytest.raises(ValueError, match=r"best='test/brier' is never .* accuracy_top5 or loss"):
        training.with_feed(described, feed, one_device())
    phase = dataclasses.replace(PHASES["end_to_end"], evaluators=("calibration", "classification"))
    described = dataclasses.replace(described, phase=phase)
    assert training.with_feed(described, feed, one_device()).lower == ("brier", "loss")


def test_show_formats_metrics_by_evaluator():
    assert show("accuracy", 0.5) == "50.0 %" and show("loss", 1.23456) == "1.235"
    assert show("accuracy", None) == "none"
    with pytest.raises(ValueError, match=r"lists the metric 'ece' in `shown`.*'accuracy'"):
        show("ece", 0.5)
