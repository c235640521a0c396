"""The curves of m2mKD's metrics in a report, on top of those that every run has."""

from common_jax.report import ACCURACY, OF_TRAINING, Family, Shares

CURVES = (
    Family("Loss", "loss", r"(.*(?:loss|distillation).*)", 2.2, by_split=True, log=True),
    ACCURACY,
    *OF_TRAINING,
    Family("Tokens dropped by experts", "share", r"train/moe/(.+)/dropped", 1.5),
    Family("Router entropy", "nats", r"train/moe/(.+)/entropy", 1.5),
    Shares("Expert load", r"train/moe/(.+)/load", item="expert", unit="tokens"),
)
