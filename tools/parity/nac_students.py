"""Runners for NAC's students, alone and in m2mKD's composition."""

import re
from collections.abc import Iterator

import jax
from flax import linen as nn
from jax import numpy as jnp

from m2mkd_jax import losses
from m2mkd_jax.hybrid import Pair, finish, pair_logits, replace_stage
from m2mkd_jax.nac.layers import NOISE
from m2mkd_jax.stages import Network, stage_name
from parity.cases import Case, Comparison
from parity.nac_compare import compare, grad_tolerance
from parity.nac_configs import split_ffn
from parity.nac_networks import Draws, build_student, to_device
from parity.names import read_part, write_part
from parity.networks import build_vit, load_network, to_images

PARTS = {"readin": "read_in_student", "mediator": "mediator_student", "readout": "read_out_student"}
# The original's settings of a ViT that golden NAC cases leave out.
VIT_NAMES = {"norm_eps": "ln_eps"}


def run_student(case: Case) -> Iterator[Comparison]:
    """A student alone: its output and all gradients, those by its fixed codes and states too."""
    config, arrays = case.config["config"], case.arrays
    (kind,) = PARTS.keys() & config.keys()
    params = read_part(arrays.below("params/"), PARTS[kind])
    given = {"readin": "image"}.get(kind, "meta_output")
    inputs = ("codes", given) if kind == "mediator" else ("codes", "states", given)
    x = arrays[f"inputs/{given}"]
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
        fixed = {name: inputs[name] for name in inputs if name != given}
        x = inputs[given]
        x = jnp.moveaxis(x, 1, -1) if kind == "readin" else x
        variables = {"params": params, NOISE: {**noise, **fixed}}
        return {"out": student.apply(variables, x, train=train)}

    yield from compare(case, run, params, PARTS[kind], inputs)


def run_composition(case: Case) -> Iterator[Comparison]:
    """A pair of m2mKD: both logits, the loss, and the gradients of the student."""
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
    held = {
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

    def score(given, own):
        base = losses.soft_cross_entropy(own, jnp.asarray(arrays["inputs/target"]))
        term = losses.DISTILLATIONS[distillation](own, given, config["tau"])
        return losses.blend(base, term, config["alpha_teacher"])

    def loss(trained, fixed):
        everything = {**held, "student": {stage_name(stage): trained}}
        pair = bind_pair(fixed)
        given, own, _ = pair_logits(pair, everything, images, stages=(stage,), train=train)
        return score(given[stage], own[stage]), (given[stage], own[stage])

    trained = to_device(params)
    (value, (given, own)), (by_params, by_fixed) = jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True
    )(trained, fixed)
    shared, _ = meta.apply(held["meta"], images, stop=stage)
    results = {"teacher_logits": given, "student_logits": own, "loss": value, "meta_output": shared}
    for name, want in arrays.below("outputs/").items():
        yield f"outputs/{name}", results[name], want, *case.tolerance("float32")
    found = write_part(by_params, PARTS[kind])
    found = {f"student.{name}": gradient for name, gradient in found.items()}
    found |= {f"inputs/{name}": gradient for name, gradient in by_fixed.items()}
    if "grads/inputs/image" in arrays:
        # No gradient goes to what the two sides share, so the student's side is run by itself.
        def loss_of_images(images):
            pair, own_params = bind_pair(fixed), {stage_name(stage): trained}
            return score(given, _student_side(pair, held["meta"], own_params, images, stage, train))

        found["inputs/image"] = jnp.moveaxis(jax.grad(loss_of_images)(images), -1, 1)
    for name, want in arrays.below("grads/").items():
        yield f"grads/{name}", found[name], want, *grad_tolerance(case)


def _student_side(pair: Pair, meta, params, images, stage: int, train: bool) -> jax.Array:
    shared, _ = pair.meta.apply(meta, images, stop=stage)
    hybrid = {stage: replace_stage(pair.meta, stage, pair.student)}
    logits, _ = finish(hybrid, meta, params, {stage: shared}, train=train)
    return logits[stage]


def _distillation(case: Case) -> str:
    """Its kind, soft or hard, which the json says in words alone."""
    return re.search(r"\* ?(soft|hard) distillation", case.config["description"])[1]


class _Bound:
    """A stage whose random numbers are given."""

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
    """A state without the aliases that the original lists by stage."""
    return {name: array for name, array in state.items() if not name.startswith("stages.")}


def _vit_sizes(sizes: dict) -> dict:
    named = {VIT_NAMES.get(name, name): value for name, value in sizes.items()}
    return named | {"mlp_ratio": float(sizes["mlp_ratio"])}
