"""The curves of CLIPTrans' metrics in a report."""

from common_jax.report import ACCURACY, LOSS, OF_TRAINING, Family

CURVES = (
    LOSS,
    ACCURACY,
    Family("BLEU", "BLEU, 0 to 100", r"((?:.*/)?bleu(?:_lower)?)", 2.2),
    Family("chrF, METEOR, exact matches", "0 to 100", r"((?:.*/)?(?:chrf|meteor|exact))", 2.2),
    *OF_TRAINING,
)
