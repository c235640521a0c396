"""The loss and evaluation of every phase, worked out by hand from given logits."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tiny import tiny_config

from m2mkd_jax.config import DistillConfig, EvaluationConfig
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.phases.objective import Outputs, make_loss, make_sums, whole_forward

B, L = 4, 10
LOGITS, OTHER, TEACHER, TAUGHT = np.random.default_rng(0).normal(0, 2, (4, B, L)).astype(np.float32)
LABELS = np.asarray([3, 0, 9, 3], np.int32)
BATCH = {"image": np.full((B, 8, 8, 1), 255, np.uint8), "label": LABELS}
RNGS = {name: jax.random.key(0) for name in ("augment", "mix", "gate")}
NONE = DistillConfig(kind="none")
CONFIG = dataclasses.replace(tiny_config("end_to_end"), augment=AugmentConfig())


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def label_loss(logits, *, smoothing=0.0):
    log_p = log_softmax(logits)
    own = log_p[np.arange(B), LABELS]
    return -np.mean((1 - smoothing) * own + smoothing * log_p.mean(axis=-1))


def divergence(student, teacher, tau):
    """tau^2 sum_l t_l (log t_l - log s_l), per example."""
    log_s, log_t = log_softmax(student / tau), log_softmax(teacher / tau)
    return tau**2 * np.sum(np.exp(log_t) * (log_t - log_s), axis=-1)


DISTILLATIONS = {
    "soft": lambda student, teacher, tau: np.mean(divergence(student, teacher, tau)) / L,
    "soft_batch_mean": lambda student, teacher, tau: np.mean(divergence(student, teacher, tau)),
    "hard": lambda student, teacher, tau: (
        -np.mean(log_softmax(student)[np.arange(B), teacher.argmax(axis=-1)])
    ),
}


def loss_of(outputs, distill=NONE, *, config=CONFIG, **settings):
    """Loss and metrics of a forward pass that returns `outputs`."""
    outputs = jax.tree.map(jnp.asarray, outputs)
    loss = make_loss(lambda *_: outputs, config, distill, **settings)
    value, metrics = loss({}, {}, BATCH, RNGS, jnp.int32(3))
    return float(value), {name: float(metric) for name, metric in metrics.items()}


@pytest.mark.parametrize("kind", DISTILLATIONS)
@pytest.mark.parametrize(("alpha", "tau"), [(0.3, 2.0), (0.5, 1.0), (1.0, 0.5)])
def test_label_loss_and_distillation_are_blended(kind, alpha, tau):
    value, metrics = loss_of(
        {"student": Outputs(LOGITS, TEACHER, {})}, DistillConfig(kind, alpha, tau)
    )
    label, term = label_loss(LOGITS), DISTILLATIONS[kind](LOGITS, TEACHER, tau)
    assert value == pytest.approx((1 - alpha) * label + alpha * term, rel=1e-5)
    assert set(metrics) == {"label_loss", "distillation"}
    assert metrics["label_loss"] == pytest.approx(label, rel=1e-5)
    assert metrics["distillation"] == pytest.approx(term, rel=1e-5)


def test_without_distillation_the_loss_is_the_label_loss():
    value, metrics = loss_of({"student": Outputs(LOGITS, TEACHER, {})})
    assert value == pytest.approx(label_loss(LOGITS), rel=1e-5)
    assert set(metrics) == {"label_loss"}


def test_label_smoothing_comes_from_config():
    config = dataclasses.replace(CONFIG, augment=AugmentConfig(smoothing=0.2))
    value, _ = loss_of({"student": Outputs(LOGITS, None, {})}, config=config)
    assert value == pytest.approx(label_loss(LOGITS, smoothing=0.2), rel=1e-5)


def test_network_losses_are_summed_and_their_metrics_averaged():
    outputs = {"a": Outputs(LOGITS, TEACHER, {}), "b": Outputs(OTHER, TAUGHT, {})}
    value, metrics = loss_of(outputs, DistillConfig("soft_batch_mean", 0.3, 2.0))
    labels = [label_loss(LOGITS), label_loss(OTHER)]
    terms = [
        np.mean(divergence(student, teacher, 2.0))
        for student, teacher in ((LOGITS, TEACHER), (OTHER, TAUGHT))
    ]
    assert value == pytest.approx(0.7 * sum(labels) + 0.3 * sum(terms), rel=1e-5)
    want = {
        "label_loss": np.mean(labels),
        "distillation": np.mean(terms),
        "a/label_loss": labels[0],
        "b/label_loss": labels[1],
        "a/distillation": terms[0],
        "b/distillation": terms[1],
    }
    assert metrics == pytest.approx(want, rel=1e-5)


def layer(**values):
    return {"moe": {name: jnp.float32(value) for name, value in values.items()}}


RECORDED = {
    "stage_0": {"moe": {"block_1": layer(load=0.5, dropped=0.1, entropy=1.2, balance_loss=2.0)}},
    "stage_2": {
        "moe": {
            "block_0": layer(load=0.2, dropped=0.0, entropy=1.3, balance_loss=0.25),
            "block_3": layer(load=0.4, dropped=0.3, entropy=1.4, balance_loss=0.5),
        }
    },
}


def test_balance_losses_are_added_and_moe_metrics_reported_by_layer():
    outputs = {"student": Outputs(LOGITS, TEACHER, RECORDED)}
    plain, few = loss_of({"student": Outputs(LOGITS, TEACHER, {})}, DistillConfig("soft", 0.4, 1.0))
    value, metrics = loss_of(outputs, DistillConfig("soft", 0.4, 1.0))
    assert value == pytest.approx(plain + 2.75, rel=1e-5)
    want = {
        f"moe/{stage}/{block}/{name}": float(found)
        for stage, records in RECORDED.items()
        for block, layer in records["moe"].items()
        for name, found in layer["moe"].items()
        if name != "balance_loss"
    }
    assert metrics == pytest.approx(few | want) and len(want) == 9


def test_balance_losses_of_all_networks_are_added():
    outputs = {
        "a": Outputs(LOGITS, None, {"stage_0": RECORDED["stage_0"]}),
        "b": Outputs(OTHER, None, {"stage_2": RECORDED["stage_2"]}),
    }
    value, metrics = loss_of(outputs)
    assert value == pytest.approx(label_loss(LOGITS) + label_loss(OTHER) + 2.75, rel=1e-5)
    assert {"moe/stage_0/block_1/load", "moe/stage_2/block_3/load"} <= set(metrics)


def test_regularizer_gets_parameters_and_step():
    def regularizer(params, step):
        return 2.0 * step + params["a"], {"step": step}

    loss = make_loss(
        lambda *_: {"net": Outputs(jnp.asarray(LOGITS), None, {})},
        CONFIG,
        NONE,
        regularizer=regularizer,
    )
    value, metrics = loss({"a": 0.5}, {}, BATCH, RNGS, jnp.int32(3))
    assert float(value) == pytest.approx(label_loss(LOGITS) + 6.5, rel=1e-5)
    assert metrics["step"] == 3


def test_forward_gets_normalised_images_and_all_keys():
    seen = []

    def forward(*arguments):
        seen.append(arguments)
        return {"net": Outputs(jnp.asarray(LOGITS), None, {})}

    make_loss(forward, CONFIG, NONE)({"a": 1}, {"b": 2}, BATCH, RNGS, jnp.int32(0))
    ((params, helpers, images, train, rngs),) = seen
    assert (params, helpers, train, rngs) == ({"a": 1}, {"b": 2}, True, RNGS)
    np.testing.assert_array_equal(images, np.ones((B, 8, 8, 1)))  # (255 / 255 - 0.5) / 0.5


@dataclasses.dataclass
class Spy:
    """Stands in for a network, and records its arguments."""

    calls: list = dataclasses.field(default_factory=list)

    def apply(self, params, images, *, train, rngs):
        self.calls.append((params, images, train, rngs))
        return LOGITS, RECORDED


@pytest.mark.parametrize("train", [False, True])
def test_whole_forward_uses_parameters_of_its_role(train):
    network = Spy()
    forward = whole_forward(network, "teacher")
    outputs = forward({"teacher": 1, "student": 2}, {"teacher": 3}, 4, train, 5)
    assert network.calls == [(1, 4, train, 5)]
    assert outputs == {"teacher": Outputs(LOGITS, None, RECORDED)}


def sums_of(outputs, mask, **settings):
    batch = jax.tree.map(jnp.asarray, BATCH | {"_mask": np.asarray(mask, np.float32)})
    outputs = jax.tree.map(jnp.asarray, outputs)
    config = dataclasses.replace(CONFIG, evaluation=EvaluationConfig("mean"))
    sums = make_sums(lambda *_: outputs, config, ["classification"], **settings)
    return {name: float(v) for name, v in sums({}, {}, batch, jax.random.key(0)).items()}


def test_totals_of_one_network():
    logits = np.zeros((B, L), np.float32)
    logits[0, 3] = 1  # a hit
    logits[1, 1:7] = 1  # lower than six others
    logits[2, :4], logits[2, 9] = 2, 1  # fifth
    logits[3, 3] = 9
    found = sums_of({"net": Outputs(logits, None, {})}, [1, 1, 1, 0])
    losses = [-row[label] for row, label in zip(log_softmax(logits), LABELS, strict=True)]
    want = {"accuracy": 1, "accuracy_top5": 2, "count": 3, "loss": sum(losses[:3])}
    assert found == pytest.approx(want, rel=1e-5)


def test_totals_average_over_networks_and_count_examples_once():
    right = 9 * np.eye(L, dtype=np.float32)[LABELS]
    outputs = {"a": Outputs(right, None, {}), "b": Outputs(-right, None, {})}
    found = sums_of(outputs, [1, 1, 1, 0])
    assert found["count"] == 3
    assert (found["a/accuracy"], found["b/accuracy"], found["accuracy"]) == (3, 0, 1.5)
    assert found["loss"] == pytest.approx((found["a/loss"] + found["b/loss"]) / 2)
    assert set(found) == {"count"} | {
        f"{name}{metric}"
        for name in ("", "a/", "b/")
        for metric in ("accuracy", "accuracy_top5", "loss")
    }


def test_labels_index_into_the_evaluated_classes():
    logits = np.zeros((B, 12), np.float32)
    classes = (11, 2, 7, 5, 0, 1, 3, 4, 6, 8)
    logits[0, 5], logits[1, 11], logits[2, 8] = 1, 1, 1  # of labels 3, 0 and 9
    logits[:, 10] = 5  # a class that does not count
    found = sums_of({"net": Outputs(logits, None, {})}, [1] * B, classes=classes)
    assert found["accuracy"] == 3
