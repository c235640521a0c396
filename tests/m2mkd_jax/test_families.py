"""Students and the network that they are merged into: only the parameters that they do not share
are dropped or start from scratch."""

import dataclasses
import re

import jax
import pytest
from flax import traverse_util
from tiny import NAC, tiny_config

from m2mkd_jax.families import family_of
from m2mkd_jax.nac.kernel import KernelConfig
from m2mkd_jax.phases.networks import student_modules, whole_student

DEEP = dataclasses.replace(NAC, iterations=3)
CASES = {
    "V-MoE": {},
    "V-MoE, kept": {"stitches": "kept"},
    "NAC": DEEP,
    "shared": dataclasses.replace(DEEP, share_propagators=True),
    "shared MLPs": dataclasses.replace(DEEP, share_ffns=True),
    "one iteration": dataclasses.replace(NAC, share_ffns=True),
    "Tiny-ImageNet": dataclasses.replace(DEEP, students="tinyimagenet"),
    "read-out head": dataclasses.replace(DEEP, read_out_head=True),
    "projection": dataclasses.replace(DEEP, read_in="projection", inputs=16),
    "no layer scale": dataclasses.replace(DEEP, layer_scale=None, legacy_read_in_scale=True),
    "no bandwidth": dataclasses.replace(DEEP, kernel=KernelConfig(learnable_bandwidth=False)),
}
POOLING = r"student/stage_\d/pooling/.*"
# What students and the whole network both have, in other shapes.
UNLIKE = {
    "Tiny-ImageNet": rf"student/stage_0/tokenizer/grid|{POOLING}",
    "read-out head": POOLING,
}


def config_of(case):
    config = tiny_config("end_to_end")
    changes = CASES[case]
    if isinstance(changes, dict):
        model = dataclasses.replace(config.model, depths=(2, 1, 2), **changes)
        meta = dataclasses.replace(config.meta, width=24)
        return dataclasses.replace(config, model=model, meta=meta)
    return dataclasses.replace(config, model=changes)


def shapes(network):
    tree = {"student": jax.eval_shape(network.init, jax.random.key(0))}
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def matched(allowances, names):
    return {n for n in names if any(re.fullmatch(a.regex, n) for a in allowances)}


@pytest.mark.parametrize("case", CASES)
def test_left_and_fresh_are_exactly_the_unshared_parameters(case):
    config = config_of(case)
    students, whole = shapes(student_modules(config)), shapes(whole_student(config))
    unlike = {n for n in whole if case in UNLIKE and re.fullmatch(UNLIKE[case], n)}
    assert bool(unlike) == (case in UNLIKE)
    kind = family_of(config.model)
    assert matched(kind.left(config.model), students) == (students.keys() - whole.keys()) | unlike
    assert matched(kind.fresh(config.model), whole) == (whole.keys() - students.keys()) | unlike
    for name in (students.keys() & whole.keys()) - unlike:
        assert students[name] == whole[name], name


@pytest.mark.parametrize("case", ["V-MoE", "NAC"])
def test_head_is_only_the_classifier(case):
    config = config_of(case)
    names = shapes(whole_student(config))
    head = {n for n in names if re.fullmatch(family_of(config.model).head(config.model), n)}
    place = "stage_2/head" if case == "V-MoE" else "stage_4/pooling/head"
    assert head == {f"student/{place}/{leaf}" for leaf in ("kernel", "bias")}
    episode = dataclasses.replace(config, data=dataclasses.replace(config.data, labels=3))
    other = shapes(whole_student(episode))
    moved = {n for n in names if names[n] != other[n]}
    assert moved == head


@pytest.mark.parametrize(
    ("pooling", "layers"),
    [
        ("first_slot", {"code_head/linear"}),
        ("gumbel", {"code_head/linear", "pooling/confidence", "pooling/head"}),
    ],
)
def test_the_head_has_all_layers_that_depend_on_the_labels(pooling, layers):
    config = config_of("NAC")
    model = dataclasses.replace(config.model, pooling=pooling, read_out_head=True)
    names = shapes(whole_student(dataclasses.replace(config, model=model)))
    head = {n for n in names if re.fullmatch(family_of(model).head(model), n)}
    assert {name.rsplit("/", 1)[0] for name in head} == {f"student/stage_4/{x}" for x in layers}
    data = dataclasses.replace(config.data, labels=3)
    other = shapes(whole_student(dataclasses.replace(config, model=model, data=data)))
    assert {n for n in names if names[n] != other[n]} <= head


def test_students_have_no_first_slot():
    config = config_of("read-out head")
    model = dataclasses.replace(config.model, pooling="first_slot")
    with pytest.raises(ValueError, match=r"config\.model\.pooling='first_slot'.*no such head"):
        student_modules(dataclasses.replace(config, model=model))


@pytest.mark.parametrize("case", CASES)
def test_allowance_reasons_name_config_fields(case):
    config = config_of(case)
    kind = family_of(config.model)
    allowances = kind.left(config.model) + kind.fresh(config.model)
    reasons = {a.reason for a in allowances if "config.model" in a.reason}
    want = {
        "V-MoE": {"stitches='dropped'"},
        "shared": {"share_propagators takes only the first mediator student"},
        "shared MLPs": {"share_ffns takes only the first mediator student's MLP"},
        "Tiny-ImageNet": {"students='tinyimagenet'"},
        "read-out head": {"read_out_head=True pools logits, students pool states"},
        "projection": {"read_in='projection' has no attention"},
    }.get(case, set())
    assert reasons == {f"config.model.{reason}" for reason in want}


def test_nac_students_use_run_seed_and_meta_model_sizes():
    config = dataclasses.replace(config_of("NAC"), seed=9)
    config = dataclasses.replace(config, meta=dataclasses.replace(config.meta, width=24))
    students = student_modules(config, drop_path=0.2)
    assert {stage.seed for stage in students.stages} == {9}
    assert {stage.stitch_width for stage in students.stages} == {24}
    # Four patches and a class token.
    assert [stage.example(2).shape for stage in students.stages[1:]] == [(2, 5, 24)] * 4
    rates = [stage.config.drop_path for stage in students.stages[1:-1]]
    assert rates == [0.2] * 3
    whole = whole_student(config, drop_path=0.2)
    assert [part.config.drop_path for part in whole.propagators] == [0.2] * 3
