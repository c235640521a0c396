"""Tensor names of CLIP's ResNet in OpenAI's files."""

from cliptrans_jax.towers.clip_names import OPENAI_LEFT_OUT, OPENAI_TEXT_TOWER
from cliptrans_jax.towers.resnet import ResNetConfig
from common_jax.weights.entries import Entry, convolution, copy, linear, norm
from common_jax.weights.table import Table

LEFT_OUT = (
    OPENAI_LEFT_OUT
    | OPENAI_TEXT_TOWER
    | {r"visual\..*\.num_batches_tracked": "a count of training batches"}
)


def table(config: ResNetConfig) -> Table:
    """Names of `towers.resnet.ClipResNet`."""
    entries = {}
    for i in (1, 2, 3):
        entries[f"stem/conv_{i}/kernel"] = convolution(f"visual.conv{i}.weight")
        entries |= _batch_norm(f"visual.bn{i}", f"stem/norm_{i}")
    for stage, depth in enumerate(config.layers):
        for i in range(depth):
            source, target = f"visual.layer{stage + 1}.{i}", f"stage_{stage}_block_{i}"
            for j in (1, 2, 3):
                entries[f"{target}/conv_{j}/kernel"] = convolution(f"{source}.conv{j}.weight")
                entries |= _batch_norm(f"{source}.bn{j}", f"{target}/norm_{j}")
            if i == 0:
                shortcut = convolution(f"{source}.downsample.0.weight")
                entries[f"{target}/shortcut/kernel"] = shortcut
                entries |= _batch_norm(f"{source}.downsample.1", f"{target}/shortcut_norm")
    source, target = "visual.attnpool", "attention_pool"
    entries[f"{target}/positions"] = copy(f"{source}.positional_embedding")
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("c", "out")):
        entries |= linear(f"{source}.{theirs}_proj", f"{target}/{ours}")
    return Table(entries, left_out=LEFT_OUT)


def _batch_norm(source: str, target: str) -> dict[str, Entry]:
    return {
        **norm(source, target),
        f"{target}/mean": copy(f"{source}.running_mean"),
        f"{target}/var": copy(f"{source}.running_var"),
    }
