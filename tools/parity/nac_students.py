"""Runners for NAC's students, alone and composed with the meta model as in m2mKD."""

import re
from collections.abc import Iterator

import jax
from flax import linen as nn
from jax import numpy as jnp

from m2mkd_jax import losses
from m2mkd_jax.hybrid import Pair, module_logits, pair_logits, replace_stage
from m2mkd_jax.nac.layers import NOISE
from m2mkd_jax.stages import Network, stage_name
from parity.cases import Case, Comparison
from parity.nac_compare import compare, grad_tolerance
from parity.nac_configs import split_ffn
from parity.nac_networks import Draws, build_student, to_device
from parity.names import read_part, write_part
from parity.networks import build_vit, load_network, to_images

PARTS = {"readin": "read_in_student", "mediator": "mediator_student", "readout": "read_out_student"}
# ViT settings whose names differ between cases: name in NAC cases -> name in m2mKD cases.
VIT_NAMES = {"norm_eps": "ln_eps"}


def run_student(case: Case) -> Iterator[Comparison]:
    """A student alone: output and all gradients, including those of its fixed codes and states."""
    config, arrays = case.config["config"], case.arrays
    (kind,) = PARTS.keys() & config.keys()
    params = read_part(arrays.below("params/"), PARTS[kind])
    source = {"readin": "image"}.get(kind, "meta_output")
    inputs = ("codes", source) if kind == "mediator" else ("codes", "states", source)
    x = arrays[f"inputs/{source}"]
    student = build_student(
        kind,
        config["share_kwargs"] | config[kind],
        params,
        image=x.shape[-1],
        tokens=x.shape[1],
        labels=config[kind].get("output_dim", 0),
    )
    noise = _student_noise(Draws(arrays.below("noise/")))
    train = case.config["mode"] == "train"

    def run(params, inputs):
        fixed = {name: inputs[name] for name in inputs if name != source}
        x = inputs[source]
        x = jnp.moveaxis(x, 1, -1) if kind == "readin" else x
        variables = {"params": params, NOISE: {**noise, **fixed}}
        return {"out": student.apply(variables, x, train=train)}

    yield from compare(case, run, params, PARTS[kind], inputs)


def run_composition(case: Case) -> Iterator[Comparison]:
    """A pair of m2mKD: the logits of both, the loss, and the student's gradients."""
    config, arrays = case.config["config"], case.arrays
    meta_sizes = _vit_sizes(config["meta"])
    teacher_sizes = meta_sizes | {"divided_depths": case.config["teacher_divided_depths"]}
    images = to_images(arrays["inputs/image"])
    count = len(meta_sizes["divided_depths"])
    stage = config["idx"] % count
    kind = {0: "readin", count - 1: "readout"}.get(stage, "mediator")
    state = arrays.below("params/student.")
    params = read_part(state, PARTS[kind])
    student = build_student(
        kind,
        config["share_kwargs"] | config["student"],
        params,
        image=images.shape[1],
        tokens=(meta_sizes["img_size"] // meta_sizes["patch_size"]) ** 2 + 1,
        labels=meta_sizes["num_classes"],
    )
    meta = build_vit(meta_sizes)
    teacher = build_vit(teacher_sizes)
    frozen = {
        "meta": load_network(_flat_names(arrays.below("params/meta.")), meta_sizes),
        "teacher": load_network(_flat_names(arrays.below("params/teacher.")), teacher_sizes),
    }
    bounds = [sum(teacher_sizes["divided_depths"][:stage]), 0]
    bounds[1] = bounds[0] + teacher_sizes["divided_depths"][stage]
    yield "teacher span", [stage, *bounds], case.config["teacher"], 0, 0

    noise = _student_noise(Draws(arrays.below("noise/"), "student."))
    names = ("codes", "states") if "inputs/states" in arrays else ("codes",)
    fixed = {name: jnp.asarray(arrays[f"inputs/{name}"]) for name in names}

    distillation = _distillation(case)
    train = case.config["mode"] == "train"

    def bind_pair(fixed):
        bound = _Bound(student, {**noise, **fixed})
        stages = [bound if i == stage else meta.stages[i] for i in range(count)]
        return Pair(meta, teacher, Network(tuple(stages)))

    def objective(teacher_logits, student_logits):
        base = losses.soft_cross_entropy(student_logits, jnp.asarray(arrays["inputs/target"]))
        distill = losses.DISTILLATIONS[distillation].loss
        term = distill(student_logits, teacher_logits, config["tau"])
        return losses.blend(base, term, config["alpha_teacher"])

    def loss(trained, fixed):
        params = {**frozen, "student": {stage_name(stage): trained}}
        logits = pair_logits(bind_pair(fixed), params, images, stages=(stage,), train=train)
        logits = {"teacher_logits": logits[0][stage], "student_logits": logits[1][stage]}
        return objective(**logits), logits

    trained = to_device(params)
    (value, logits), (by_params, by_fixed) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        trained, fixed
    )
    shared, _ = meta.apply(frozen["meta"], images, stop=stage)
    results = {**logits, "loss": value, "meta_output": shared}
    for name, want in arrays.below("outputs/").items():
        yield f"outputs/{name}", results[name], want, *case.tolerance("float32")
    got = write_part(by_params, PARTS[kind])
    got = {f"student.{name}": gradient for name, gradient in got.items()}
    got |= {f"inputs/{name}": gradient for name, gradient in by_fixed.items()}
    if "grads/inputs/image" in arrays:
        # The shared stages have no gradient in `pair_logits`, so the student's side runs alone.
        def loss_of_images(images):
            pair, own = bind_pair(fixed), {stage_name(stage): trained}
            student_logits = _student_side(pair, frozen["meta"], own, images, stage, train)
            return objective(logits["teacher_logits"], student_logits)

        got["inputs/image"] = jnp.moveaxis(jax.grad(loss_of_images)(images), -1, 1)
    for name, want in arrays.below("grads/").items():
        yield f"grads/{name}", got[name], want, *grad_tolerance(case)


def _student_side(pair: Pair, meta, params, images, stage: int, train: bool) -> jax.Array:
    shared, _ = pair.meta.apply(meta, images, stop=stage)
    hybrid = {stage: replace_stage(pair.meta, stage, pair.student)}
    logits, _ = module_logits(hybrid, meta, params, {stage: shared}, train=train)
    return logits[stage]


def _distillation(case: Case) -> str:
    """The kind of distillation, soft or hard, which is only in the json's description."""
    return re.search(r"\* ?(soft|hard) distillation", case.config["description"])[1]


class _Bound:
    """A stage with fixed random draws."""

    def __init__(self, stage, noise):
        self.stage, self.noise = stage, noise

    def apply(self, variables, x, **settings):
        with nn.intercept_methods(split_ffn):
            return self.stage.apply({**variables, NOISE: self.noise}, x, **settings)


def _student_noise(draws: Draws) -> dict:
    noise = draws.propagator()
    noise |= {"read_in": draws.read_in("read_in.")}
    gumbel = draws.take("tokenizer", "gumbel")
    noise |= {} if gumbel is None else {"pooling": {"gumbel": gumbel}}
    return to_device(noise)


def _flat_names(state: dict) -> dict:
    """A state without the per-stage aliases that the original adds."""
    return {name: array for name, array in state.items() if not name.startswith("stages.")}


def _vit_sizes(sizes: dict) -> dict:
    named = {VIT_NAMES.get(name, name): value for name, value in sizes.items()}
    return named | {"mlp_ratio": float(sizes["mlp_ratio"])}
