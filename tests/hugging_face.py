"""Small Hugging Face models with random parameters, as references for ours."""

import pytest

NO_TORCH = "the reference is computed by torch and transformers, which are not installed"


def random_translator(kind, sizes, *, spread):
    """A `{kind}ForConditionalGeneration` with random numbers in all parameters; skips the test if
    torch or transformers is not installed.

    Args:
      kind: prefix of the class name, such as "MBart".
      sizes: the content of its config.json.
      spread: standard deviation of the random numbers.
    """
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(0, spread)
    return model.eval()
