"""Runners for m2mKD's networks, objectives and stages."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from common_jax.nn.norm import LayerNorm
from common_jax.nn.patches import PatchEmbedding
from m2mkd_jax import losses
from m2mkd_jax.hybrid import Pair, pair_logits
from m2mkd_jax.models import encoder
from m2mkd_jax.models.positions import resize_positions
from m2mkd_jax.stages import stage_name
from parity.cases import Case, Comparison, compare_lists, compare_trees
from parity.names import root_name, write_network, write_stage
from parity.networks import (
    build_student,
    build_vit,
    build_vmoe,
    load_network,
    load_stage,
    to_images,
)

RELATIVE_L2 = 1e-4  # limit per gradient tensor, in addition to the element-wise tolerance


def run_vit(case: Case) -> Iterator[Comparison]:
    """A ViT: logits, features, embedding, every stage boundary, stage-local and root names."""
    sizes, arrays, tolerance = case.config["config"], case.arrays, case.tolerance()
    network = build_vit(sizes)
    params = load_network(arrays.below("params/"), sizes)
    images = to_images(arrays["inputs/images"])
    logits, recorded = network.apply(params, images, record=("intermediates",))
    first, last = (recorded[stage_name(i)]["intermediates"] for i in (0, len(network) - 1))
    embedded = first["embedded"][0]
    shared = network.stages[0].encoder
    patches = PatchEmbedding(shared.patch, shared.width, jnp.float32).apply(
        {"params": params["stage_0"]["patches"]}, images
    )
    # The original's forward(images, 0, 0): no blocks, only the final norm and the class token.
    normed = LayerNorm(shared.norm_eps, jnp.float32, name="norm").apply(
        {"params": params[stage_name(len(network) - 1)]["norm"]}, embedded[:, 0]
    )
    results = {
        "logits": logits,
        "features": last["features"][0],
        "patch_tokens": patches,
        "embedded_tokens": embedded,
        "forward_0_0": normed,
    }
    x = images
    for i in range(len(network)):
        x, _ = network.apply(params, x, start=i, stop=i + 1)
        results[f"stage_{i}"] = x
        yield f"stage_{i} chained", x, network.apply(params, images, stop=i + 1)[0], 0, 0
    yield from compare_trees("outputs/", results, arrays.below("outputs/"), tolerance)

    root = arrays.below("params/")
    depths = sizes["divided_depths"]
    bounds = np.cumsum([0, *depths])
    yield "stage_ranges", np.stack([bounds[:-1], bounds[1:]], 1), case.config["stage_ranges"], 0, 0
    yield "full_state_dict_key_count", 2 * len(root), case.config["full_state_dict_key_count"], 0, 0
    yield from _compare_stage_keys(case, params)
    for i, names in enumerate(case.config["stage_key_to_root_key"]):
        for name, array in write_stage(params[stage_name(i)]).items():
            yield f"stage_{i}/{name}", array, root[names[name]], 0, 0
            at_root = root_name(name, stage=i, depths=depths)
            yield compare_lists(f"stage_{i}/{name} at root", [at_root], [names[name]])


def run_vmoe(case: Case) -> Iterator[Comparison]:
    """A V-MoE or one of its students: output, every block, routing."""
    sizes, arrays, tolerance = case.config["config"], case.arrays, case.tolerance()
    state = arrays.below("params/")
    if sizes["is_student"]:
        network, stage = build_student(sizes)
        params, run = load_stage(state, sizes, stage=stage), (stage, stage + 1)
    else:
        network = build_vmoe(sizes)
        params, run = load_network(state, sizes), (0, len(network))
    x = to_images(arrays["inputs/images"]) if run[0] == 0 else arrays["inputs/tokens"]
    out, recorded = network.apply(
        params, jnp.asarray(x), start=run[0], stop=run[1], record=("intermediates", "routing")
    )
    results, number, load = {"out": out}, 0, {}
    for stage in recorded.values():
        for j, tokens in enumerate(stage["intermediates"]["block"]):
            results[f"block_{number}"] = tokens
            if routing := stage.get("routing", {}).get(f"block_{j}"):
                routing = routing["moe"]
                results[f"routing_{number}/expert_idx"] = routing["expert"]
                results[f"routing_{number}/score"] = routing["weight"]
                results[f"routing_{number}/gate_logits"] = routing["logits"]
                chosen = np.asarray(routing["expert"]).ravel()
                load[str(number)] = np.bincount(chosen, minlength=sizes["num_expert"])
            number += 1
    want = arrays.below("outputs/")
    ids = {name for name in results.keys() | want.keys() if name.endswith("expert_idx")}
    for names, allowed in ((ids, (0, 0)), ((results.keys() | want.keys()) - ids, tolerance)):
        got = {name: results[name] for name in results if name in names}
        yield from compare_trees("outputs/", got, {n: want[n] for n in want if n in names}, allowed)
    for name, counts in case.config["tokens_per_expert"].items():
        yield f"tokens_per_expert/{name}", load.get(name, ()), counts, 0, 0
    yield from _compare_stage_keys(case, params)


def run_m2mkd_loss(case: Case) -> Iterator[Comparison]:
    """m2mKD's composed networks: module outputs, logits, all objectives, student gradients."""
    sizes, arrays = case.config["config"], case.arrays
    count = len(sizes["meta"]["divided_depths"])
    student, stage = build_student(sizes["student"], stages=count)
    networks = Pair(build_vit(sizes["meta"]), build_vit(sizes["teacher"]), student)
    params = {
        "meta": load_network(arrays.below("params/meta/"), sizes["meta"]),
        "teacher": load_stage(arrays.below("params/teacher/"), sizes["teacher"], stage=stage),
    }
    trained = load_stage(arrays.below("params/student/"), sizes["student"], stage=stage)
    images = to_images(arrays["inputs/images"])
    shared, _ = networks.meta.apply(params["meta"], images, stop=stage)
    alone = {"start": stage, "stop": stage + 1}
    teacher_output, _ = networks.teacher.apply(params["teacher"], shared, **alone)
    student_output, _ = networks.student.apply(trained, shared, **alone)
    results = {"teacher_module_output": teacher_output, "student_module_output": student_output}
    if stage > 0:
        results["meta_output"] = shared
    yield compare_lists("stage of the teacher", [stage], [sizes["teacher"]["block_index"]])

    def logits(trained):
        everything = params | {"student": trained}
        pairs = pair_logits(networks, everything, images, stages=(stage,), train=True)
        return pairs[0][stage], pairs[1][stage]

    def to_original(gradient):
        return write_stage(gradient[stage_name(stage)])

    yield from _compare_objectives(case, logits, trained, results, to_original)


def run_kd_baseline(case: Case) -> Iterator[Comparison]:
    """Distillation between the logits of whole networks."""
    sizes, arrays = case.config["config"], case.arrays
    teacher, student = build_vit(sizes["teacher"]), build_vit(sizes["student"])
    fixed = load_network(arrays.below("params/teacher/"), sizes["teacher"])
    trained = load_network(arrays.below("params/student/"), sizes["student"])
    images = to_images(arrays["inputs/images"])

    def logits(trained):
        targets = jax.lax.stop_gradient(teacher.apply(fixed, images)[0])
        return targets, student.apply(trained, images, train=True)[0]

    def to_original(gradient):
        return write_network(gradient, depths=sizes["student"]["divided_depths"])

    yield from _compare_objectives(case, logits, trained, {}, to_original)


def run_split_teacher(case: Case) -> Iterator[Comparison]:
    """A teacher split into modules: the tensors and output of each."""
    sizes, arrays = case.config["config"], case.arrays
    network = build_vit(sizes)
    params = load_network(arrays.below("params/"), sizes)
    bounds = np.cumsum([0, *sizes["divided_depths"]])
    x = to_images(arrays["inputs/images"])
    for i in range(len(network)):
        module = {stage_name(i): params[stage_name(i)]}
        state = write_stage(module[stage_name(i)])
        prefix = f"outputs/module_{i}/"
        yield from compare_trees(prefix, state, arrays.below(prefix), case.tolerance("split"))
        x, _ = network.apply(module, x, start=i, stop=i + 1)
        want = arrays[f"outputs/module_output_{i}"]
        yield f"outputs/module_output_{i}", x, want, *case.tolerance("module_output")
        ranges = case.config["loader_ranges"][str(i)]
        yield f"range of {i}", bounds[i : i + 2], [ranges["start"], ranges["end"]], 0, 0
    for name, file in case.config["files"].items():
        names = write_stage(params[stage_name(file["block_index"])])
        yield compare_lists(f"{name}/keys", names, file["block_state_dict_keys"])


def run_pos_embed_resize(case: Case) -> Iterator[Comparison]:
    """Position tables resized to other grids."""
    for pair in case.config["config"]["pairs"]:
        name = f"pos_embed_{pair['old_grid']}to{pair['new_grid']}"
        got = resize_positions(case.arrays[f"inputs/{name}"], pair["new_grid"] ** 2 + 1)
        yield f"outputs/{name}", got, case.arrays[f"outputs/{name}"], *case.tolerance()


def run_drop_path(case: Case) -> Iterator[Comparison]:
    """Stochastic depth with the case's uniform draws, and the rate of each block."""
    sizes, arrays = case.config["config"], case.arrays
    x, uniform = (jnp.asarray(arrays[f"inputs/{name}"]) for name in ("x", "uniform"))
    results = {
        "y": encoder.drop_path(x, uniform, sizes["rate"]),
        "per_block_rates": encoder.drop_path_rates(sizes["drop_path_rate"], sizes["depth"]),
    }
    yield from compare_trees("outputs/", results, arrays.below("outputs/"), case.tolerance())


def _compare_objectives(case, logits, trained, results, to_original) -> Iterator[Comparison]:
    """Logits, every objective in the json, and the gradients in the case.

    `logits(trained)` returns the teacher's and the student's logits; `results` has further outputs.
    """
    arrays = case.arrays
    totals = [tuple(name.split("__")) for name in case.config["totals"]]
    objectives = [_objective(case, base, kind) for base, kind in totals]

    @jax.jit  # one program for all objectives
    def differentiate(trained, index):
        def total(trained):
            both = logits(trained)
            branches = [lambda t, s, o=objective: o(t, s)[2] for objective in objectives]
            return jax.lax.switch(index, branches, *both), both

        return jax.value_and_grad(total, has_aux=True)(trained)

    (_, (teacher, student)), _ = differentiate(trained, 0)
    want = arrays.below("outputs/")
    scalars = {name for name in want if name.split("/")[0] in ("base", "kd", "total")}
    results = results | {"teacher_logits": teacher, "student_logits": student}
    values = {name: array for name, array in want.items() if name not in scalars}
    yield from compare_trees("outputs/", results, values, case.tolerance())
    terms = {}
    for (base, kind), objective in zip(totals, objectives, strict=True):
        label, term, total = objective(teacher, student)
        terms |= {f"base/{base}": label, f"total/{base}__{kind}": total}
        if term is not None:
            terms[f"kd/{kind}"] = term
    values = {name: want[name] for name in scalars}
    yield from compare_trees("outputs/", terms, values, case.tolerance("losses"))

    # Gradients without a name are those of the first objective.
    prefixes = {f"grads_{base}__{kind}/": i for i, (base, kind) in enumerate(totals)}
    prefixes["grads/"] = 0
    without = set(case.config.get("student_params_without_grad", ()))
    for prefix, index in prefixes.items():
        if not (expected := arrays.below(prefix)):
            continue
        _, gradient = differentiate(trained, index)
        got = {n: array for n, array in to_original(gradient).items() if n not in without}
        yield from compare_trees(prefix, got, expected, case.tolerance("grads"))
        for name in got.keys() & expected.keys():
            if norm := np.linalg.norm(expected[name]):
                distance = np.linalg.norm(got[name] - expected[name]) / norm
                yield f"{prefix}{name} (relative L2)", distance, 0.0, RELATIVE_L2, 0


def _objective(case: Case, base: str, kind: str) -> Callable[..., tuple]:
    """objective(teacher, student) -> (label loss, distillation term or None, total)."""
    sizes = case.config["config"]
    alpha = sizes["alpha_teacher"] if "alpha_teacher" in sizes else sizes["alpha"]
    labels = jnp.asarray(case.arrays["inputs/labels"])
    targets = jnp.asarray(case.arrays["inputs/soft_targets"])
    smoothing = sizes["label_smoothing"]
    label_loss = {
        "soft_ce": lambda z: losses.soft_cross_entropy(z, targets),
        "label_smoothing_ce": lambda z: losses.smoothed_cross_entropy(z, labels, smoothing),
        "ce": lambda z: losses.smoothed_cross_entropy(z, labels, 0.0),
    }[base]
    name, tau = re.fullmatch(r"([a-z]+)(?:_tau([\d.]+))?", kind).groups()

    def objective(teacher, student):
        label = label_loss(student)
        if name == "none":
            return label, None, label
        term = losses.DISTILLATIONS[name].loss(student, teacher, float(tau or 1))
        return label, term, losses.blend(label, term, alpha)

    return objective


def _compare_stage_keys(case: Case, params: Mapping[str, Any]) -> Iterator[Comparison]:
    """Compares the names in each stage's state, in the original's order."""
    stages = [write_stage(stage) for stage in params.values()]
    for i, (state, names) in enumerate(zip(stages, case.config["model_stages_keys"], strict=True)):
        yield compare_lists(f"names of stage_{i}", state, names)
