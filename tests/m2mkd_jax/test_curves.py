"""Panels of an m2mKD report."""

from common_jax.report import panels
from m2mkd_jax.curves import CURVES


def test_panels_of_a_run_with_experts():
    layer = "train/moe/stage_1/block_2"
    lines = [
        {
            "step": step,
            "train/distillation": 2.0,
            "train/label_loss": 1.0,
            f"{layer}/dropped": 0.1,
            f"{layer}/entropy": 1.0,
            f"{layer}/load": [0.5, 0.5],
        }
        for step in (20, 40)
    ]
    found = {panel.title: list(curves) for panel, curves in panels(lines, CURVES).items()}
    assert found.pop("Loss") == ["train/distillation", "train/label_loss"]
    titles = ("Tokens dropped by experts", "Router entropy")
    titles += ("Expert load at the end (% of tokens)", "Expert load over time")
    assert found == {title: ["stage_1/block_2"] for title in titles}
