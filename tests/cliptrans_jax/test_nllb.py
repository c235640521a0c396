"""NLLB-200 and M2M-100: compared with transformers in torch, and their published files."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch_files
from hugging_face import NO_TORCH, random_translator
from jax import numpy as jnp
from meshes import idle_rules
from published_files import make_params, write_folder
from same import assert_same

from cliptrans_jax import pretrained
from cliptrans_jax.decode import DecodeConfig, Search
from cliptrans_jax.models import cliptrans_names
from cliptrans_jax.models.cliptrans import ModelConfig, Translator, partition_rules
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.tensors import config_json, kinds
from cliptrans_jax.translators import nllb, transformer_names
from cliptrans_jax.translators.nllb import NllbConfig
from cliptrans_jax.translators.transformer import sinusoids
from common_jax.mesh import MeshConfig, make_mesh, match_rules
from common_jax.weights import table as tables

# All sizes differ, so that no weight layout can mix them up.
UNEVEN = NllbConfig(
    vocab=40,
    width=16,
    encoder_layers=2,
    decoder_layers=1,
    encoder_heads=4,
    decoder_heads=2,
    encoder_hidden=24,
    decoder_hidden=20,
    positions=24,
)
MODEL = ModelConfig(translator="nllb", nllb=UNEVEN, mapper=MapperConfig(prefix=0))
# NLLB-200-distilled-600M's config.json on the hub, without the decoding settings.
NLLB_600M = {
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["M2M100ForConditionalGeneration"],
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "d_model": 1024,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "decoder_layerdrop": 0,
    "decoder_layers": 12,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "encoder_layerdrop": 0,
    "encoder_layers": 12,
    "eos_token_id": 2,
    "is_encoder_decoder": True,
    "max_position_embeddings": 1024,
    "model_type": "m2m_100",
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "scale_embedding": True,
    "vocab_size": 256206,
}
PAD, EOS = 1, 2
SOURCE = np.array([[30, 9, 7, 12, EOS], [30, 8, EOS, PAD, PAD], [31, 5, 6, EOS, PAD]], np.int32)
LABELS = np.array([[33, 5, 37, 21, EOS], [33, 11, EOS, PAD, PAD], [34, 4, 4, 9, EOS]], np.int32)
LANGUAGES = np.array([33, 33, 34], np.int32)


@pytest.fixture(scope="module")
def reference():
    """A small Hugging Face M2M-100 with random parameters."""
    model = random_translator("M2M100", config_json.nllb_hf_config(UNEVEN), spread=0.4)
    # So that no search writes a pad, which has no position there.
    model.model.shared.weight.data[PAD] = -3 * model.model.decoder.layer_norm.bias.data
    return model


def reference_logits(model):
    """The reference's logits; it shifts the labels itself."""
    import torch

    source, labels = torch.tensor(SOURCE).long(), torch.tensor(LABELS).long()
    with torch.no_grad():
        output = model(source, attention_mask=(source != PAD).long(), labels=labels)
    return output.logits.numpy()


def our_logits(params):
    return Translator(MODEL).train_logits(
        {"nllb": params}, None, *map(jnp.asarray, (SOURCE, LABELS))
    )


def assert_same_logits(found, expected):
    """Compares all labels except pads, which have no position in the reference and predict
    nothing."""
    real = LABELS != PAD
    assert real.sum() == 13
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_hugging_face_folder_gives_the_same_logits(reference, tmp_path, form):
    reference.save_pretrained(tmp_path)
    if form == "bin":
        import torch

        (tmp_path / "model.safetensors").unlink()
        sinusoid = {"model.encoder.embed_positions.weights": torch.zeros(26, 16)}
        torch.save(reference.state_dict() | sinusoid, tmp_path / "pytorch_model.bin")
    found = pretrained.load(tmp_path)
    assert (found.kind, found.config) == ("nllb", UNEVEN)
    if form == "bin":
        assert {alias for alias, _ in found.account.aliases} == set(transformer_names.ALIASES)
        assert [name for name, _ in found.account.dropped] == list(sinusoid)
    expected = reference_logits(reference)
    assert_same_logits(our_logits(found.params), expected)


@pytest.fixture(scope="module")
def search():
    search = Search(Translator(MODEL), DecodeConfig(beams=5, max_new_tokens=10, growth=2))
    return jax.jit(search.run)


@pytest.mark.parametrize(("likely", "last"), [(0.4, 10), (0.6, 6)])
def test_beam_search_matches_hugging_face(reference, search, tmp_path, likely, last):
    """With rare ends, so that the limit forces most of them, and with frequent ones."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    with torch.no_grad():
        reference.model.shared.weight[EOS] = likely * reference.model.decoder.layer_norm.bias
    reference.save_pretrained(tmp_path)
    params, lengths = {"nllb": pretrained.load(tmp_path).params}, set()
    found = jax.device_get(search(params, None, SOURCE, LANGUAGES))
    for row, language in enumerate(LANGUAGES.tolist()):
        source = torch.tensor(SOURCE[row : row + 1]).long()
        with torch.no_grad():
            expected = reference.generate(
                source,
                attention_mask=(source != PAD).long(),
                num_beams=5,
                num_return_sequences=5,
                max_new_tokens=10,
                early_stopping=True,
                length_penalty=1.0,
                forced_bos_token_id=language,
                forced_eos_token_id=EOS,
                return_dict_in_generate=True,
                output_scores=True,
            )
        for beam, (ids, score) in enumerate(
            zip(expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True)
        ):
            length = found.lengths[row, beam]
            lengths.add(int(length))
            assert [*found.tokens[row, beam, :length], EOS] == ids[: length + 1]
            assert set(ids[length + 1 :]) <= {PAD}
            np.testing.assert_allclose(found.scores[row, beam], score, rtol=1e-5, atol=1e-5)
    assert min(lengths) == 2 and max(lengths) == last


def test_hugging_face_reads_saved_folders(tmp_path):
    transformers = pytest.importorskip("transformers", reason=NO_TORCH)
    pytest.importorskip("torch", reason=NO_TORCH)
    params = jax.tree.map(lambda x: 0.4 * x, make_params(kinds.NLLB, UNEVEN))
    pretrained.save(tmp_path / "saved", params, UNEVEN)
    model, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(model).__name__ == "M2M100ForConditionalGeneration"
    expected = reference_logits(model.eval())
    assert_same_logits(our_logits(params), expected)
    model.save_pretrained(tmp_path / "again")
    again = pretrained.load(tmp_path / "again")
    assert again.config == UNEVEN
    assert_same(again.params, params)


def test_sinusoids_match_their_formula():
    found = np.asarray(sinusoids(jnp.asarray([[2, 3], [900, 7]]), width=8, dtype=jnp.float32))
    assert found.shape == (2, 2, 8)
    for place, position in (((0, 0), 2), ((0, 1), 3), ((1, 0), 900)):
        angles = [position / 10_000 ** (i / 3) for i in range(4)]
        expected = [*map(math.sin, angles), *map(math.cos, angles)]
        np.testing.assert_allclose(found[place], expected, atol=1e-4)
    rounded = sinusoids(jnp.asarray([901]), width=8, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    exact = sinusoids(jnp.asarray([901]), width=8, dtype=jnp.float32)
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=4e-3)


def test_first_position_follows_the_pad_id():
    for pad in (1, 3):
        assert dataclasses.replace(UNEVEN, pad=pad).first_row == pad + 1


def test_labels_are_shifted_behind_the_start_token():
    config = dataclasses.replace(UNEVEN, start=7)
    labels = jnp.array([[31, 5, EOS, -1, PAD], [31, 5, 8, 9, EOS]])
    expected = [[7, 31, 5, EOS, PAD], [7, 31, 5, 8, 9]]
    assert nllb.shift_right(labels, config).tolist() == expected


@pytest.mark.parametrize("width", [15, 2])
def test_width_without_sinusoids_is_refused(width):
    heads = {"encoder_heads": 1, "decoder_heads": 1}
    with pytest.raises(ValueError, match=rf"^width={width} must be even and at least 4"):
        NllbConfig(width=width, **heads)


def test_partition_rules_shard_every_matrix_and_none_is_idle():
    mesh, config = make_mesh(MeshConfig(fsdp=8)), dataclasses.replace(MODEL, mapper=MapperConfig())
    shapes = jax.eval_shape(Translator(config).init, jax.random.key(0))
    rules = partition_rules(config)
    shardings = match_rules(rules, shapes, mesh)
    assert tuple(shardings["nllb"]["embedding"].spec) == (None, "fsdp")
    assert [regex for regex in idle_rules(rules, shapes) if "nllb" in regex] == []


def test_published_configs_match_the_hub():
    assert config_json.nllb_config(NLLB_600M) == NllbConfig()
    assert config_json.nllb_config(config_json.nllb_hf_config(UNEVEN)) == UNEVEN
    old = {"normalize_before": True, "add_final_layer_norm": True, "encoder_layerdrop": 0.05}
    assert config_json.nllb_config(NLLB_600M | old) == NllbConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mbart"),
        ("architectures", ["M2M100Model"]),
        ("activation_function", "gelu"),
        ("tie_word_embeddings", False),
        ("quantization_config", {"bits": 8}),
    ],
)
def test_unsupported_setting_is_reported(key, value):
    with pytest.raises(ValueError) as raised:
        config_json.nllb_config(NLLB_600M | {key: value})
    assert f"{key}={value!r} of NLLB's config.json is not supported" in str(raised.value)


def save(folder, **changes):
    params = make_params(kinds.NLLB, UNEVEN)
    tensors = tables.write(kinds.NLLB.table(UNEVEN), params)
    return write_folder(folder, config_json.nllb_hf_config(UNEVEN) | changes, tensors), params


def test_ineffective_dropout_rates_are_noted(tmp_path):
    folder, params = save(tmp_path / "a", attention_dropout=0.1, encoder_layerdrop=0.05)
    found = pretrained.load(folder, kind="nllb")
    assert_same(found.params, params)
    assert found.account.notes == (
        "attention_dropout=0.1 in its config.json has no effect here, not even in training; "
        "config.model.nllb.dropout sets the dropout",
        "encoder_layerdrop=0.05 in its config.json has no effect here, not even in training; "
        "config.model.nllb.dropout sets the dropout",
    )


@pytest.mark.parametrize("kind", [None, "nllb"])
def test_moe_checkpoint_is_refused_before_its_weights_are_read(tmp_path, kind):
    folder, _ = save(tmp_path / "a", model_type="nllb-moe")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mixture of experts \(54B\), .*600M to 3\.3B.*nllb-moe"):
        pretrained.load(folder, kind=kind)


def test_kind_and_published_sizes_are_inferred_from_tensors(tmp_path):
    shapes = {
        "model.shared.weight": (7, 2048),
        **{f"model.encoder.layers.{i}.fc1.weight": (5, 2048) for i in range(2)},
        **{f"model.decoder.layers.{i}.fc1.weight": (6, 2048) for i in range(3)},
    }
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    found = kinds.NLLB.config(tensors, None, "a.bin")
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_hidden": 5, "decoder_hidden": 6}
    assert found == NllbConfig(vocab=7, width=2048, **sizes)
    params = make_params(kinds.NLLB, UNEVEN)
    torch_files.save(tmp_path / "a.bin", tables.write(kinds.NLLB.table(UNEVEN), params))
    with pytest.raises(
        ValueError, match=r"width 16, and its tensors.*of width 1024 or 2048, have 16"
    ):
        pretrained.load(tmp_path / "a.bin")
    found = pretrained.load(tmp_path / "a.bin", config=UNEVEN)
    assert found.kind == "nllb"
    assert_same(found.params, params)


def test_cliptrans_checkpoints_only_hold_an_mbart():
    with pytest.raises(ValueError, match=r"model\.translator='nllb': CLIPTrans' own checkpoints"):
        cliptrans_names.table(MODEL)
