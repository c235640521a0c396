"""The panels of a CLIPTrans report."""

from cliptrans_jax.curves import CURVES
from common_jax.report import panels


def test_translation_scores_share_two_panels():
    names = ("bleu", "bleu_lower", "chrf", "meteor", "exact")
    line = {"step": 1} | {f"{split}/{name}": 20.0 for name in names for split in ("val", "flickr")}
    found = {panel.title: curves for panel, curves in panels([line], CURVES).items()}
    assert list(found) == ["BLEU", "chrF, METEOR, exact matches"]
    splits = ("flickr", "val")
    assert list(found["BLEU"]) == [f"{x}/{y}" for x in splits for y in names[:2]]
    others = {f"{x}/{y}" for x in splits for y in names[2:]}
    assert set(found["chrF, METEOR, exact matches"]) == others
