"""ViTs with timm's tensors compute what timm's do, as the converter reads them."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest
from vit_variants import EPS, VARIANTS, apply, shapes_of, sizes_of

from common_jax.weights import table as tables
from common_jax.weights import write_tensors
from m2mkd_jax import pretrained
from m2mkd_jax.models import encoder, vit
from m2mkd_jax.pretrained.hub import Beside
from m2mkd_jax.pretrained.kinds import KINDS
from m2mkd_jax.pretrained.reading import File, Source

WITH_TIMM = [name for name, (_, arguments) in VARIANTS.items() if arguments is not None]
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh"}  # timm's classes -> our names
# Fields that timm's folders do not state, and that must be given for a CLIP-like network.
GIVEN = ("teacher.norm_eps", "teacher.activation", "data.mean", "data.std")


def write_folder(folder, state, arguments):
    """A folder like the ones timm's push_to_hf_hub writes."""
    folder.mkdir()
    write_tensors(folder / "model.safetensors", state)
    about = {"architecture": "of_no_published_name", "model_args": arguments}
    about["global_pool"] = arguments.get("global_pool", "token")
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("patch", [4, 14])
@pytest.mark.parametrize("name", WITH_TIMM)
def test_vit_matches_timm(name, patch, tmp_path):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm.models.vision_transformer")
    side, sizes = 3 * patch, {"embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.3, "depth": 3}
    arguments = {"img_size": side, "patch_size": patch, "num_classes": 5, **sizes}
    arguments |= VARIANTS[name][1]
    norm = functools.partial(torch.nn.LayerNorm, eps=EPS)
    model = timm.VisionTransformer(norm_layer=norm, **arguments).eval()
    rng = np.random.default_rng(0)
    state = {
        key: rng.normal(0, 0.3, tuple(tensor.shape)).astype(np.float32)
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
    x = rng.normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    folder = write_folder(tmp_path / "timm", state, arguments)
    source = pretrained.find_source(pretrained.read_files(folder))
    config = pretrained.infer_config(source, GIVEN).config
    teacher = dataclasses.replace(config.teacher, norm_eps=EPS)
    found = pretrained.load(source, dataclasses.replace(config, teacher=teacher))
    assert source.kind == "teacher"
    wanted = sizes_of(name, patch=patch, mlp_ratio=teacher.mlp_ratio, depths=(3,))
    if wanted.layer_scale is not None:
        assert teacher.layer_scale > 0  # the tensors hold no initial value
        wanted = dataclasses.replace(wanted, layer_scale=teacher.layer_scale)
    assert teacher == wanted and teacher.encoder.hidden == 36
    assert config.interface == encoder.Interface(side, 3, 5)
    network = vit.build(teacher, config.interface)
    logits = apply(network, found.params["teacher"], x)[0]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    back = pretrained.to_tensors(found)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", vit.PRETRAINED)
def test_pretrained_timm_vits_are_read_by_name(name):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    sizes, side = vit.variant(name)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    state = {  # takes no memory
        key: np.broadcast_to(np.float32(0), tuple(tensor.shape))
        for key, tensor in model.state_dict().items()
    }
    file = File(pathlib.Path("a"), state, {}, Beside(architecture=name))
    config = pretrained.infer_config(Source("teacher", (file,), guessed=False)).config
    assert config.teacher == sizes and config.interface == encoder.Interface(side, 3, 1000)
    assert ACTIVATIONS[type(model.blocks[0].mlp.act).__name__] == sizes.activation
    shapes = shapes_of(vit.build(sizes, config.interface))
    table = KINDS["teacher"].table(config, None)
    params, account = tables.read(table, state, shapes=shapes, file="a")
    assert tables.list_differences(params, shapes) == []
    assert len(account.taken) == len(state) and not account.dropped
