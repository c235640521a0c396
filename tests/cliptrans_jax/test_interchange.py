"""Published weights from the hub to the devices, compared with Hugging Face's loading."""

import dataclasses
import json

import huggingface_hub
import jax
import numpy as np
import pytest
import torch_files
from hugging_face import NO_TORCH, random_translator
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_cliptrans import UNEVEN

from cliptrans_jax import pretrained
from cliptrans_jax.tensors import config_json, kinds
from cliptrans_jax.tensors.config_json import clip_text_config, clip_vision_config, mclip_config
from cliptrans_jax.towers import clip, clip_names, mclip, mclip_names, siglip
from cliptrans_jax.towers.table import tower_of
from cliptrans_jax.translators import mbart, transformer_names
from cliptrans_jax.translators.mbart import MBart, MBartConfig
from common_jax.mesh import MeshConfig, make_mesh, match_rules
from common_jax.weights import table as tables

# What mBART-50's config.json on the hub says about its network, and some other keys.
MBART50 = {
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "add_bias_logits": False,
    "add_final_layer_norm": True,
    "architectures": ["MBartForConditionalGeneration"],
    "attention_dropout": 0.0,
    "d_model": 1024,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 12,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 12,
    "eos_token_id": 2,
    "max_length": 200,
    "max_position_embeddings": 1024,
    "model_type": "mbart",
    "normalize_before": True,
    "num_beams": 5,
    "pad_token_id": 1,
    "scale_embedding": True,
    "vocab_size": 250054,
}
IDS, F32 = jnp.zeros((1, 4), jnp.int32), jnp.float32
SOURCE = np.array([[4, 9, 7, 2], [4, 8, 2, 1]])
TARGET = np.array([[2, 5, 30, 21, 2], [2, 5, 11, 2, 1]])


@pytest.fixture(scope="module")
def reference():
    """A small Hugging Face mBART with random parameters."""
    return random_translator("MBart", config_json.mbart_hf_config(UNEVEN), spread=0.3)


@pytest.fixture(scope="module")
def logits_of():
    network = MBart(UNEVEN, jnp.float32)
    arrays = jnp.asarray(SOURCE), jnp.asarray(UNEVEN.pad != SOURCE), jnp.asarray(TARGET)
    return jax.jit(lambda params: network.apply({"params": params}, *arrays))


def reference_logits(model):
    import torch

    source, target = torch.tensor(SOURCE), torch.tensor(TARGET)
    mask = (source != UNEVEN.pad).long()
    with torch.no_grad():
        given = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
        return model(**given).logits.numpy()


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_hugging_face_folder_gives_the_same_logits(reference, logits_of, tmp_path, form):
    reference.save_pretrained(tmp_path, max_shard_size="10KB" if form == "shards" else "1GB")
    if form == "bin":
        import torch

        (tmp_path / "model.safetensors").unlink()
        torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    names_there = {path.name for path in tmp_path.iterdir()}
    assert ("model.safetensors.index.json" in names_there) == (form == "shards")
    found = pretrained.load(tmp_path)
    assert (found.kind, found.config) == ("mbart", UNEVEN)
    aliases = {alias for alias, _ in found.account.aliases}
    assert aliases == (set(transformer_names.ALIASES) if form == "bin" else set())
    np.testing.assert_allclose(
        logits_of(found.params), reference_logits(reference), rtol=1e-5, atol=1e-5
    )


def test_hugging_face_reads_saved_folders(reference, logits_of, tmp_path):
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    params = make_params()
    pretrained.save(tmp_path / "saved", params, UNEVEN)
    model, report = transformers.MBartForConditionalGeneration.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report.values()), report
    np.testing.assert_allclose(
        reference_logits(model.eval()), logits_of(params), rtol=1e-5, atol=1e-5
    )
    model.save_pretrained(tmp_path / "again")
    again = pretrained.load(tmp_path / "again")
    assert again.config == UNEVEN
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def make_params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), kinds.MBART.shapes(UNEVEN)
    )


def hub(folder, fetched, *, files):
    """Stands in for the hub's client: records the patterns and fills a folder accordingly."""

    def snapshot_download(repo_id, allow_patterns):
        fetched.append((repo_id, allow_patterns))
        for name, write in files.items():
            if name in allow_patterns:
                write(folder / name)
        return str(folder)

    return snapshot_download


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_hub_model_is_fetched_only_on_request(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    params, folder, fetched = make_params(), tmp_path / "cache", []
    pretrained.save(tmp_path / "there", params, UNEVEN)
    folder.mkdir()
    config = (tmp_path / "there" / "config.json").read_bytes()
    tensors = tables.write(kinds.MBART.table(UNEVEN), params)
    weights = {
        "safetensors": {"model.safetensors": lambda path: pretrained.write_tensors(path, tensors)},
        "bin": {"pytorch_model.bin": lambda path: torch_files.save(path, tensors)},
    }[form]
    files = {"config.json": lambda path: path.write_bytes(config)} | weights
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub(folder, fetched, files=files))
    with pytest.raises(FileNotFoundError, match=r"no facebook/mbart.*fetch=True to download"):
        pretrained.load("facebook/mbart")
    with pytest.raises(FileNotFoundError, match="no a/b/c; give a folder"):
        pretrained.load("a/b/c", fetch=True)
    with pytest.raises(ValueError, match="gs://a/b must be on a local disk"):
        pretrained.load("gs://a/b", fetch=True)
    assert not fetched
    found = pretrained.load("facebook/mbart", fetch=True)
    assert (found.config, found.source) == (UNEVEN, "facebook/mbart")
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    asked = [patterns for name, patterns in fetched if name == "facebook/mbart"]
    assert len(asked) == {"safetensors": 1, "bin": 2}[form]
    about = {"config.json", "preprocessor_config.json", "processor_config.json"}
    assert all(about <= {*patterns} for patterns in asked)
    # The search is that of the run, whatever the model's makers used.
    assert not any("generation_config.json" in patterns for patterns in asked)
    assert not any(pattern[0] == "*" for patterns in asked for pattern in patterns)
    pretrained.load(tmp_path / "there", fetch=True)  # already there
    assert len(fetched) == len(asked)


def test_unreachable_hub_model_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def snapshot_download(repo_id, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = "facebook/mbart cannot be fetched .*no connection.*copy the folder here"
    with pytest.raises(FileNotFoundError, match=message):
        pretrained.load("facebook/mbart", fetch=True)


def test_each_device_receives_only_its_shard():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params, shapes = make_params(), kinds.MBART.shapes(UNEVEN)
    shardings = match_rules(mbart.PARTITION_RULES, shapes, mesh)
    wanted = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    placed = pretrained.place(params, wanted)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    parts = placed["embedding"].addressable_shards
    assert {part.data.shape for part in parts} == {(40, 4)}
    here = NamedSharding(mesh, P("fsdp"))
    half = {"a": {"b": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=here)}}
    source = np.arange(8, dtype=np.float32)
    moved = pretrained.place({"a": {"b": source}}, half)["a"]["b"]
    source[:] = -1  # the result no longer depends on them
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved.astype(np.float32), np.arange(8))
    for params, message in (
        ({"a": {"b": np.zeros(9)}}, r"a/b is \(9,\) and should be \(8,\)"),
        ({"a": {"c": np.zeros(8)}}, r"a/b \(8,\) is missing\n  a/c \(8,\) has no place"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrained.place(params, half)


def test_account_is_a_short_table(tmp_path):
    params = make_params()
    tensors = tables.write(kinds.MBART.table(UNEVEN), params)
    tensors |= {alias: tensors[name] for alias, name in transformer_names.ALIASES.items()}
    extra = {f"old.{i}.weight": np.zeros(1) for i in range(12)}
    names = dataclasses.replace(kinds.MBART.table(UNEVEN), left_out={r"old\..*": "of another time"})
    shapes = kinds.MBART.shapes(UNEVEN)
    _, account = tables.read(names, tensors | extra, shapes=shapes, file="model.bin")
    table = pretrained.format_account(account)
    lines = [line.split() for line in table.splitlines()]
    total = sum(x.size for x in jax.tree.leaves(params))
    layer = sum(x.size for x in jax.tree.leaves(params["encoder"]["layer_0"]))
    assert lines[0] == ["taken", "tensors", "numbers", "from"]
    assert ["embedding", "1", "640", "model.shared.weight"] in lines
    assert ["encoder/layer_*", "32", f"{2 * layer:,}", "model.encoder.layers.*"] in lines
    assert ["all", "70", f"{total:,}"] in lines
    assert "lm_head.weight the same as model.shared.weight" in table
    assert "old.*.weight dropped: of another time (12 tensors)" in table
    assert len(lines) == 16


def test_mbart50_config_is_the_default():
    assert config_json.mbart_config(MBART50) == MBartConfig()
    assert config_json.mbart_config(config_json.mbart_hf_config(UNEVEN)) == UNEVEN
    for start, want in ((None, 5), (7, 7)):
        told = {"eos_token_id": 5, "decoder_start_token_id": start}
        assert config_json.mbart_config(MBART50 | told).start == want


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("tie_word_embeddings", False),
        ("architectures", ["MBartModel"]),
        ("model_type", "m2m_100"),
        ("normalize_before", False),
        ("static_position_embeddings", True),
        ("quantization_config", {"bits": 8}),
    ],
)
def test_unsupported_setting_is_reported(key, value):
    with pytest.raises(ValueError) as raised:
        config_json.mbart_config(MBART50 | {key: value})
    said = str(raised.value)
    assert f"{key}={value!r} of mBART's config.json is not supported: it must be " in said
    assert "None" not in said and "left out; " in said
    assert ("model.dequantize()" in said) == (key == "quantization_config")
    with pytest.raises(ValueError, match=r"config\.json lacks d_model"):
        config_json.mbart_config({key: x for key, x in MBART50.items() if key != "d_model"})


def randomize(torch, module):
    """Random numbers in every parameter and every statistic, so that each of them matters."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0, 0.3)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module.eval()


def saved(model, folder):
    """Saves a model the way Hugging Face does: its tensors and its config."""
    safetensors = pytest.importorskip("safetensors.numpy", reason=NO_TORCH)
    model.save_pretrained(folder, safe_serialization=True)
    tensors = safetensors.load_file(folder / "model.safetensors")
    return tensors, json.loads((folder / "config.json").read_text())


def read_with(network, table, tensors, *arrays):
    shapes = jax.eval_shape(network.init, jax.random.key(0), *arrays)["params"]
    return tables.read(table, tensors, shapes=shapes, file="saved")[0]


@pytest.mark.parametrize("base", ["XLMRoberta", "Bert"])
def test_mclip_matches_its_hugging_face_base(base, tmp_path):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    torch.manual_seed(0)
    pad = {"XLMRoberta": 1, "Bert": 0}[base]
    sizes = getattr(transformers, f"{base}Config")(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=14,
        type_vocab_size=2,
        layer_norm_eps=1e-5,
        pad_token_id=pad,
    )
    network = randomize(torch, getattr(transformers, f"{base}Model")(sizes))
    linear = randomize(torch, torch.nn.Linear(16, 6))
    tensors, hf = saved(network, tmp_path)
    tensors = {f"transformer.{name}": x for name, x in tensors.items()} | {
        f"LinearTransformation.{name}": x.detach().numpy() for name, x in linear.named_parameters()
    }
    about = {"modelBase": "some", "transformerDimensions": 16, "numDims": 6}
    config = mclip_config(about, hf)
    assert tower_of(config).sentences.tokenizer == {"XLMRoberta": "xlmr", "Bert": "labse"}[base]
    tower = mclip.MClip(config, F32)
    table = mclip_names.table(config)
    params = read_with(tower, table, tensors, IDS, IDS)
    ids = np.array([[4, 7, 49, 30, 2, pad], [4, 12, pad, 9, 2, pad], [4, 2, pad, pad, pad, pad]])
    mask = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        visible = torch.tensor(mask)
        states = network(torch.tensor(ids), attention_mask=visible).last_hidden_state
        mean = (states * visible[:, :, None]).sum(1) / visible.sum(1, keepdim=True)
        want = linear(mean).numpy()
    found = tower.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_matches_hugging_face(activation, tmp_path):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "hidden_act": activation,
    }
    text = {"vocab_size": 50, "hidden_size": 16, "max_position_embeddings": 10, "eos_token_id": 49}
    vision = {"hidden_size": 20, "image_size": 12, "patch_size": 4}
    config = transformers.CLIPConfig(
        text_config=sizes | text, vision_config=sizes | vision, projection_dim=6
    )
    model = randomize(torch, transformers.CLIPModel(config))
    tensors, hf = saved(model, tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    ids = np.array([[48, 7, 9, 30, 49, 1], [48, 12, 49, 1, 1, 1]])
    mask = (ids != 1).astype(np.int64)
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        vision = model.vision_model(pixel_values=pixels).pooler_output
        text = model.text_model(torch.tensor(ids), attention_mask=torch.tensor(mask)).pooler_output
        want = (model.visual_projection(vision).numpy(), model.text_projection(text).numpy())
    vision, text = clip_vision_config(hf), clip_text_config(hf)
    image_tower, text_tower = clip.ClipVision(vision, F32), clip.ClipText(text, F32)
    for network, table, arrays, features in (
        (image_tower, clip_names.vision_table(vision), (images,), want[0]),
        (text_tower, clip_names.text_table(text), (ids, mask), want[1]),
    ):
        arrays = tuple(map(jnp.asarray, arrays))
        params = read_with(network, table, tensors, *arrays)
        found = network.apply({"params": params}, *arrays)
        np.testing.assert_allclose(found, features, rtol=1e-5, atol=1e-5)


def test_siglip_matches_hugging_face(tmp_path):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    text = {"vocab_size": 50, "hidden_size": 16, "max_position_embeddings": 8}
    vision = {"hidden_size": 20, "image_size": 14, "patch_size": 4}  # the last pixels fill no patch
    config = transformers.SiglipConfig(
        text_config=sizes | text | {"projection_size": 20}, vision_config=sizes | vision
    )
    model = randomize(torch, transformers.SiglipModel(config))
    saved(model, tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 14, 14, 3)).astype(np.float32)
    ids = np.array([[48, 7, 9, 30, 1], [12, 1, 0, 0, 0]])
    with torch.no_grad():
        pixels, padded = torch.tensor(images.transpose(0, 3, 1, 2)), np.pad(ids, ((0, 0), (0, 3)))
        want = (
            model.text_model(torch.tensor(padded)).pooler_output.numpy(),
            model.vision_model(pixel_values=pixels).pooler_output.numpy(),
        )
    towers = (siglip.TEXT, siglip.VISION)
    for tower, arrays, features in zip(towers, (ids, images), want, strict=True):
        read = pretrained.load(tmp_path, kind=tower.kind)
        found = tower.apply(read.config, F32, read.params, jnp.asarray(arrays))
        assert found.shape == (2, 20)
        np.testing.assert_allclose(found, features, rtol=1e-5, atol=1e-5)
