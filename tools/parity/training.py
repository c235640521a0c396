"""Runners for m2mKD's training: trajectories of modular and end-to-end training, the schedule.

The steps are our own (`common_jax.step`). Only one deliberate difference is imitated here: in the
original's modular training, the clip norm includes the later meta stages, whose gradients are never
zeroed and pile up.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from common_jax.optim import OptimConfig, decay_mask, make_optimizer
from common_jax.optim.schedules import epoch_cosine
from common_jax.step import init_state, make_step
from m2mkd_jax import losses
from m2mkd_jax.hybrid import replace_stage
from m2mkd_jax.stages import Network, stage_name
from parity.cases import Case, Comparison, compare_lists, compare_trees
from parity.names import write_network
from parity.networks import build_vit, build_vmoe, load_network, load_stage, to_images

SEED = 0
CLIP_EPS = 1e-6  # the original's factor is clip / (norm + CLIP_EPS)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way of clipping: whether to clip, by which norm, and whether our step does the same."""

    clips: bool
    norm: str
    ours: bool


# Norm of the trained stage's gradient; norm that includes the later stages' piled-up gradients.
TARGET, REACHED = "target", "reached"
VARIANTS = {
    "amp_clip_all_params": Variant(clips=True, norm=REACHED, ours=False),
    "amp_clip_target_only": Variant(clips=True, norm=TARGET, ours=True),
    "amp_no_clip": Variant(clips=False, norm=REACHED, ours=True),
    "no_amp_clip_ignored": Variant(clips=False, norm=REACHED, ours=True),
}


@dataclasses.dataclass
class Trajectory:
    """Loss of every micro-batch, mean loss of every step, gradient norms, final parameters."""

    losses: list[Any] = dataclasses.field(default_factory=list)
    step_losses: list[Any] = dataclasses.field(default_factory=list)
    norms: dict[str, list[Any]] = dataclasses.field(
        default_factory=lambda: {TARGET: [], REACHED: []}
    )
    final: Any = None


@dataclasses.dataclass(frozen=True)
class Training:
    """A network with some trained stages.

    Attributes:
      network: all stages.
      params: their parameters.
      trained: indices of the trained stages.
      reached: indices of the later stages, which gradients pass through.
      sizes: the case's settings.
      images, targets: (micro-batches, B, ...).
    """

    network: Network
    params: Mapping[str, Any]
    trained: tuple[int, ...]
    reached: tuple[int, ...]
    sizes: Mapping[str, Any]
    images: jax.Array
    targets: jax.Array

    def loss(self, params, helpers, batch, rngs, step) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Soft cross entropy of a batch; `helpers` are the frozen stages."""
        stages = {**helpers, **params["module"]}
        logits, _ = self.network.apply(stages, batch["image"], train=True, rngs=rngs)
        return losses.soft_cross_entropy(logits, batch["target"]), {}

    def pick(self, stages: Sequence[int]) -> dict[str, Any]:
        """Parameters of some stages."""
        return {stage_name(i): self.params[stage_name(i)] for i in stages}

    def optim(self, *, clip: float | None, no_decay: str) -> OptimConfig:
        """The optimizer of the case."""
        b1, b2 = self.sizes["betas"]
        return OptimConfig(
            steps=self.sizes["optimizer_steps"],
            batch=self.images.shape[1] * self.sizes["update_freq"],
            accumulate=self.sizes["update_freq"],
            weight_decay=self.sizes["weight_decay"],
            b1=b1,
            b2=b2,
            eps=self.sizes["eps"],
            clip=clip,
            no_decay=no_decay,
        )

    def to_original(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Parameters under the original's root names."""
        return write_network(params, depths=self.sizes["divided_depths"])


def run_train_module(case: Case) -> Iterator[Comparison]:
    """Modular training: the hybrid network, its gradients, steps with each kind of clipping."""
    sizes, arrays = case.config["config"], case.arrays
    idx, depths = sizes["idx"], sizes["divided_depths"]
    meta = build_vit(sizes, depths=tuple(sizes["meta_divided_depths"]))
    network = replace_stage(meta, idx, build_vit(sizes))
    params = load_network(arrays.below("params/"), sizes)
    for i in range(len(network)):
        state = arrays.below(f"params_meta/stages/{i}/")
        if i != idx:
            params |= load_stage(state, sizes, stage=i)
    training = Training(
        network=network,
        params=params,
        trained=(idx,),
        reached=tuple(range(idx + 1, len(network))),
        sizes=sizes,
        images=to_images(arrays["inputs/images"]),
        targets=jnp.asarray(arrays["inputs/soft_targets"]),
    )
    hybrid = training.to_original(params)
    yield from compare_trees("hybrid/", hybrid, arrays.below("params/"), (0, 0))
    logits, _ = network.apply(params, training.images[0])
    want = arrays["outputs/initial_logits"]
    yield "outputs/initial_logits", logits, want, *case.tolerance("logits", "loss")
    yield "blocks of the hybrid", [len(s.blocks) for s in network.stages], depths, 0, 0

    reached = training.to_original(training.pick((idx, *training.reached)))
    with_gradient = case.config["params_with_grad_after_backward"]
    yield compare_lists("params_with_grad_after_backward", sorted(reached), sorted(with_gradient))
    unreached = set(hybrid) - set(reached)
    without = case.config["params_without_grad"]
    yield compare_lists("params_without_grad", sorted(unreached), sorted(without))
    target = training.to_original(training.pick((idx,)))
    yield compare_lists("target_param_keys", target, case.config["target_param_keys"])
    # A single stage has no no-decay list: positions and class token decay too.
    yield from _compare_groups(case, training, no_decay="")

    gradients = _make_gradients(training)
    yield from _compare_first_gradient(case, training, gradients)
    variants = {name.split("/")[0] for name in arrays.below("outputs/") if "/" in name}
    trajectories = {}
    for name in sorted(variants & VARIANTS.keys()):
        variant = VARIANTS[name]
        clip = sizes["clip_grad"] if variant.clips else None
        run = _run_ours if variant.ours else _run_piled_up
        key = (run, clip)
        if key not in trajectories:
            trajectories[key] = run(training, gradients, clip, "")
        prefix = f"outputs/{name}/"
        yield from _compare_trajectory(case, prefix, training, trajectories[key], variant.norm)


def run_end_to_end(case: Case) -> Iterator[Comparison]:
    """End-to-end training of a whole V-MoE: gradients, and steps with clipping."""
    sizes, arrays = case.config["config"], case.arrays
    network = build_vmoe(sizes)
    training = Training(
        network=network,
        params=load_network(arrays.below("params/"), sizes),
        trained=tuple(range(len(network))),
        reached=(),
        sizes=sizes,
        images=to_images(arrays["inputs/images"]),
        targets=jnp.asarray(arrays["inputs/soft_targets"]),
    )
    no_decay = OptimConfig.no_decay
    yield compare_lists("params_without_grad", [], case.config["params_without_grad"])
    yield from _compare_groups(case, training, no_decay=no_decay)
    gradients = _make_gradients(training)
    yield from _compare_first_gradient(case, training, gradients)
    trajectory = _run_ours(training, gradients, sizes["clip_grad"], no_decay)
    yield from _compare_trajectory(case, "outputs/", training, trajectory, TARGET)


def run_lr_schedule(case: Case) -> Iterator[Comparison]:
    """The learning rate in every epoch, for several numbers of steps per epoch."""
    common, tolerance = case.config["config"], case.tolerance()
    for name, settings in case.config["settings"].items():
        config = OptimConfig(
            epochs=settings["epochs"],
            warmup_epochs=settings["warmup_epochs"],
            lr=settings["base_lr"],
            batch=settings["total_batch"],
            lr_per=512 if settings["scaled"] else None,
            warmup_lr=common["warmup_lr"],
            min_lr=common["min_lr"],
        )
        yield f"{name}/peak_lr", config.peak_lr, settings["peak_lr"], *tolerance
        want = case.arrays[f"outputs/{name}"]
        for steps in (1, 3):
            rates = epoch_cosine(config, steps)(jnp.arange(len(want) * steps))
            yield f"outputs/{name}/{steps}", rates, np.repeat(want, steps), *tolerance
        if exact := settings["lr_float64"]:
            rates = epoch_cosine(config, 1)(jnp.arange(len(want)))
            yield f"{name}/lr_float64", rates, exact, *tolerance


def _make_gradients(training: Training):
    """Jitted gradients(trained, reached, image, target) -> loss, gradients of both."""
    fixed = training.pick([i for i in range(len(training.network)) if i not in training.trained])

    def loss(trained, reached, image, target):
        batch = {"image": image, "target": target}
        return training.loss({"module": trained}, {**fixed, **reached}, batch, None, None)[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def _compare_first_gradient(case, training, gradients) -> Iterator[Comparison]:
    """Loss and gradient of the trained stages on the first micro-batch."""
    start = training.pick(training.trained), training.pick(training.reached)
    loss, (gradient, _) = gradients(*start, training.images[0], training.targets[0])
    first = case.arrays["outputs/first_loss"]
    yield "outputs/first_loss", loss, first, *case.tolerance("loss")
    want = case.arrays.below("grads/")
    yield from compare_trees(
        "grads/", training.to_original(gradient), want, case.tolerance("grads")
    )


def _compare_groups(case: Case, training: Training, *, no_decay: str) -> Iterator[Comparison]:
    """Compares which parameters have weight decay."""
    trained = {"module": training.pick(training.trained)}
    mask = decay_mask(trained, no_decay)
    full = jax.tree.map(lambda decays, leaf: np.full(leaf.shape, decays), mask, trained)
    decays = {name: a.all() for name, a in training.to_original(full["module"]).items()}
    groups = case.config["param_groups"]
    for group, decayed in (("decay", True), ("no_decay", False)):
        got = sorted(name for name, value in decays.items() if value == decayed)
        yield compare_lists(f"param_groups/{group}", got, sorted(groups[group]))


def _compare_trajectory(case, prefix, training, trajectory, norm) -> Iterator[Comparison]:
    """Compares what the case has of a trajectory: losses, norms, parameters after the last step."""
    arrays, tolerance = case.arrays, case.tolerance("loss")
    if f"{prefix}loss" in arrays:
        want = arrays[f"{prefix}loss"]
        yield f"{prefix}loss", trajectory.losses, want, *tolerance
        means = want.reshape(len(trajectory.step_losses), -1).mean(axis=1)
        yield f"{prefix}loss of steps", trajectory.step_losses, means, *tolerance
    if f"{prefix}grad_norm" in arrays:
        want = arrays[f"{prefix}grad_norm"]
        yield f"{prefix}grad_norm", trajectory.norms[norm], want, *tolerance
    final = arrays.below(f"{prefix}final/")
    if final:
        got = training.to_original(trajectory.final)
        yield from compare_trees(
            f"{prefix}final/",
            {name: _leave_out_key_bias(name, array) for name, array in got.items()},
            {name: _leave_out_key_bias(name, array) for name, array in final.items()},
            case.tolerance("final"),
        )


def _leave_out_key_bias(name: str, array: np.ndarray) -> np.ndarray:
    """Drops the bias of the keys. It does not change a softmax, so its gradient is rounding noise,
    which Adam scales up to steps the size of the learning rate."""
    if not name.endswith("attn.qkv.bias"):
        return array
    width = len(array) // 3
    return np.concatenate([array[:width], array[2 * width :]])


def _micro_batches(training: Training) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Images and targets of each step, (update_freq, B, ...)."""
    count = training.sizes["update_freq"]
    for step in range(training.sizes["optimizer_steps"]):
        chosen = slice(step * count, (step + 1) * count)
        yield training.images[chosen], training.targets[chosen]


def _backward(gradients, trained, reached, images, targets):
    """Loss of every micro-batch, and the mean of their gradients, in numpy."""
    results = [gradients(trained, reached, *micro) for micro in zip(images, targets, strict=True)]
    mean = jax.tree.map(lambda *g: np.mean(g, axis=0), *(gradient for _, gradient in results))
    return [loss for loss, _ in results], mean


def _global_norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))


def _run_ours(training, gradients, clip: float | None, no_decay: str) -> Trajectory:
    """Our own step, recording the losses and the piled-up norm before each."""
    config = training.optim(clip=clip, no_decay=no_decay)
    others = [i for i in range(len(training.network)) if i not in training.trained]
    helpers, params = training.pick(others), {"module": training.pick(training.trained)}
    rate = training.sizes["lr"]
    step = jax.jit(
        make_step(training.loss, config, lambda _: rate, trainable="module/.*", log_every=1)
    )
    state = init_state(params, config, trainable="module/.*", metrics={})
    trajectory, reached = Trajectory(), training.pick(training.reached)
    piled = jax.tree.map(np.zeros_like, reached)
    for images, targets in _micro_batches(training):
        values, (gradient, later) = _backward(
            gradients, state.params["module"], reached, images, targets
        )
        piled = jax.tree.map(np.add, piled, later)
        # A micro-batch of the step is every update_freq-th example.
        batch = {"image": _interleave(images), "target": _interleave(targets)}
        state, report = step(state, helpers, batch, SEED)
        trajectory.losses += values
        trajectory.step_losses.append(report["loss"])
        trajectory.norms[TARGET].append(report["gradient_norm"])
        trajectory.norms[REACHED].append(_global_norm((gradient, piled)))
    trajectory.final = state.params["module"]
    return trajectory


def _run_piled_up(training, gradients, clip: float, no_decay: str) -> Trajectory:
    """The original's loop: the clip norm includes the later stages' piled-up gradients, which are
    clipped too and carried over to the next step."""
    optimizer = make_optimizer(training.optim(clip=None, no_decay=no_decay))
    params = {"module": training.pick(training.trained)}
    reached, state = training.pick(training.reached), optimizer.init(params)
    rate = training.sizes["lr"]

    @jax.jit
    def update(gradient, state, params):
        direction, state = optimizer.update(gradient, state, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, direction), state

    trajectory, piled = Trajectory(), jax.tree.map(jnp.zeros_like, reached)
    for images, targets in _micro_batches(training):
        values, (gradient, later) = _backward(gradients, params["module"], reached, images, targets)
        piled = jax.tree.map(np.add, piled, later)
        norm = _global_norm((gradient, piled))
        factor = min(1.0, clip / (norm + CLIP_EPS))
        gradient, piled = jax.tree.map(lambda g, f=factor: g * f, (gradient, piled))
        params, state = update({"module": gradient}, state, params)
        trajectory.losses += values
        trajectory.step_losses.append(np.mean(values))
        trajectory.norms[REACHED].append(norm)
    trajectory.final = params["module"]
    return trajectory


def _interleave(x: jax.Array) -> jax.Array:
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
