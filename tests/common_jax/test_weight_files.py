"""Weight files, read and written, including PyTorch's without PyTorch."""

import json
import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_files
from safetensors.numpy import load_file, save_file
from same import assert_same
from torch_files import Call, Global, New, Persistent, Raw, state_dict, storage, tensor

from common_jax.weights import read_plain, read_tensors, write_tensors

NO_TORCH = "the files are written by torch, which is not installed"
RNG = np.random.default_rng(0)
ARRAYS = {
    "single": RNG.normal(size=(2, 3)).astype(np.float32),
    "half": RNG.normal(size=(4,)).astype(np.float16),
    "brain": RNG.normal(size=(3, 1)).astype(ml_dtypes.bfloat16),
    "double": RNG.normal(size=(2, 2, 2)),
    "count": np.array(7, np.int64),
    "mask": np.array([True, False]),
    "bytes": np.arange(5, dtype=np.uint8),
    "none": np.zeros((0, 3), np.float32),
}
ONES = tensor(storage("FloatStorage", "0", 2), (2,), (1,))


def archive(tmp_path, value, *, extra=None):
    """A file whose storage 0 holds two ones."""
    path = tmp_path / "weights.pth"
    torch_files.write_archive(path, value, {"0": np.ones(2, np.float32)}, extra=extra)
    return path


def test_tensors_keep_dtype_and_shape(tmp_path):
    torch_files.save(tmp_path / "weights.pth", ARRAYS)
    assert_same(read_tensors(tmp_path / "weights.pth"), ARRAYS)


def test_views_of_a_shared_storage_are_sliced_from_it(tmp_path):
    numbers = np.arange(12, dtype=np.float32)
    held = storage("FloatStorage", "a", 12)
    value = {
        "rows": tensor(held, (3, 4), (4, 1)),
        "columns": tensor(held, (4, 3), (1, 4)),
        "inner": tensor(held, (2, 2), (4, 1), offset=5),
        "spread": tensor(held, (3, 2), (0, 1), offset=10),
        "last": tensor(held, (), (), offset=11),
        "parameter": Call(
            Global("torch._utils", "_rebuild_parameter"), (tensor(held, (2,), (6,)), True, {})
        ),
        "untyped": Call(
            Global("torch._utils", "_rebuild_tensor_v3"),
            (
                Persistent(("storage", Global("torch.storage", "UntypedStorage"), "b", "cpu", 8)),
                *(1, (3,), (1,), False, {}),
                Global("torch", "uint16"),
            ),
        ),
    }
    path = tmp_path / "weights.pt"
    small = np.array([5, 6, 7, 65535], np.uint16)
    torch_files.write_archive(path, value, {"a": numbers, "b": small})
    table = numbers.reshape(3, 4)
    want = {
        "rows": table,
        "columns": table.T,
        "inner": table[1:, 1:3],
        "spread": np.tile(numbers[10:], (3, 1)),
        "last": numbers[11],
        "parameter": numbers[::6],
        "untyped": small[1:],
    }
    assert_same(read_tensors(path), want)


def test_optimizer_state_of_a_checkpoint_is_not_read(tmp_path):
    storages = {}
    model = state_dict({f"module.{name}": array for name, array in ARRAYS.items()}, storages)
    moments = tensor(storage("FloatStorage", "99", 1 << 40), (1 << 40,), (1,))
    number = Call(
        Global("numpy.core.multiarray", "scalar"),
        (Call(Global("numpy", "dtype"), ("f8", False, True)), "12345678"),
    )
    value = {
        "model": model,
        "optimizer": {
            "state": {0: {"exp_avg": moments, "step": 3.0}},
            "param_groups": [{"betas": (0.9, 0.99), "device": Call(Global("torch", "device"), ())}],
        },
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "epoch": 4,
        "best_bleu_test": number,
    }
    path = tmp_path / "model_best_test.pth"
    torch_files.write_archive(path, value, storages)
    assert_same(read_tensors(path), ARRAYS)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "exec"),
        ("subprocess", "Popen"),
    ],
)
@pytest.mark.parametrize("place", ["model", "optimizer"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, module, name, place):
    monkeypatch.chdir(tmp_path)
    code = "open('ran', 'w').close()" if name in ("eval", "exec") else "touch ran"
    value = {"model": {"a": ONES}, place: {"a": Call(Global(module, name), (code,))}}
    with pytest.raises(ValueError, match=rf"weights\.pth holds {module}\.{name}, .*code to run"):
        read_tensors(archive(tmp_path, value))
    assert not pathlib.Path("ran").exists()


# Importing it would write a file.
SPY = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Module: pass\n"
TRACES = [
    Call(Global("spy", "Module"), ()),
    New(Global("spy", "Module"), {"weight": ONES}),
    Raw(b"(cspy\nModule\no"),
    Raw(b"(ispy\nModule\n"),
    Raw(b"\x8c\x03spy\x8c\x06Module\x93)}\x92"),  # NEWOBJ_EX
    Raw(b"cspy\nModule\n)\x81(Va\nK\x01u(K\x01eK\x02a"),  # SETITEMS, APPENDS, APPEND
    Global("spy", "Module"),
]


@pytest.mark.parametrize("trace", TRACES, ids=range(len(TRACES)))
def test_other_contents_of_a_training_file_are_ignored(tmp_path, monkeypatch, trace):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "spy.py").write_text(SPY)
    training = {
        "args": New(Global("argparse", "Namespace"), {"lr": 0.1, "path": trace}),
        "scheduler": {"milestones": Call(Global("collections", "Counter"), ({3: 1},)), "t": trace},
        "arch": "vit_base",
        "epoch": 3,
    }
    path = archive(tmp_path, {"model": {"a": ONES}, **training})
    assert_same(read_tensors(path), {"a": np.ones(2, np.float32)})
    assert read_plain(path) == {"arch": "vit_base", "epoch": 3}
    with pytest.raises(
        ValueError, match=r"weights\.pth holds 'b', a spy\.Module, where only tensors"
    ):
        read_tensors(archive(tmp_path, {"model": {"a": ONES, "b": trace}}))
    with pytest.raises(ValueError, match=r"weights\.pth holds a spy\.Module, not tensors"):
        read_tensors(archive(tmp_path, trace))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.pth.tar", "a.ckpt", "a.tar", "a", "a.bin", "a.safetensors"])
def test_file_format_is_detected_from_the_content(tmp_path, name):
    torch_files.save(tmp_path / "a.pth", ARRAYS)
    (tmp_path / "a.pth").rename(tmp_path / name)
    assert_same(read_tensors(tmp_path / name), ARRAYS)
    save_file(ARRAYS, tmp_path / name)
    assert_same(read_tensors(tmp_path / name), ARRAYS)


@pytest.mark.parametrize(
    "opcodes",
    [
        b"(Vtouch ran\nios\nsystem\n",  # INST
        b"(cos\nsystem\nVtouch ran\no",  # OBJ
        b"\x8c\x02os\x8c\x06system\x93Vtouch ran\n\x85R",  # STACK_GLOBAL
    ],
)
def test_other_opcodes_run_no_code(tmp_path, monkeypatch, opcodes):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"holds os\.system, which is code to run"):
        read_tensors(archive(tmp_path, {"a": ONES, "b": Raw(opcodes)}))
    assert not pathlib.Path("ran").exists()


def test_pickle_cannot_affect_the_next_read(tmp_path):
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    slots = torch_files.encode((None, {"__defaults__": ()})) + b"b"
    with pytest.raises(ValueError, match="holds 'b'"):
        read_tensors(archive(tmp_path, {"b": Raw(torch_files.encode(rebuild) + slots)}))
    assert_same(read_tensors(archive(tmp_path, {"a": ONES})), {"a": np.ones(2, np.float32)})


FLOATS = storage("FloatStorage", "0", 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (ONES, "holds one tensor, not tensors by name"),
        ([ONES], "holds a list, not"),
        ({}, "holds no tensors"),
        ({"a": ONES, "lr": 0.1}, "holds 'lr', a float, where only tensors .*'model'"),
        ({"a": {"b": ONES}}, "holds 'a', a dict, where"),
        ({3: ONES}, "holds 3, a Tensor, where"),
        ({"a": tensor(FLOATS, (3,), (1,))}, r"has too few values for a \(3,\), 2"),
        ({"a": tensor(FLOATS, (2,), (1,), offset=1)}, "too few"),
        ({"a": tensor(FLOATS, (2, 2), (2, 1))}, "too few"),
        ({"a": tensor(FLOATS, (2,), (-1,), offset=1)}, r"gives a the shape \(2,\) with strides"),
        ({"a": tensor(FLOATS, (2,), (1, 1))}, "gives a the shape"),
        ({"a": tensor(3, (2,), (1,))}, "a tensor without a storage"),
        ({"a": tensor(FLOATS, (2,), (1,), more=({"x": 1},))}, r"'a', a tensor with \{'x': 1\}, wh"),
        ({"a": tensor(storage("FloatStorage", "7", 2), (2,), (1,))}, "lacks weights/data/7"),
        ({"a": tensor(storage("FloatStorage", "0", 3), (2,), (1,))}, "8 bytes .* should be 12"),
        ({"a": tensor(storage("FloatStorage", "0", -2), (2,), (1,))}, "a storage '0' of -2"),
        ({"a": tensor(storage("Size", "0", 2), (2,), (1,))}, "a storage '0' of 2 values of"),
        (
            {"a": tensor(storage("QInt8Storage", "0", 2), (2,), (1,))},
            r"'a', a quantised tensor; save",
        ),
        ({"a": Persistent("module")}, "refers to 'module', which is not a storage"),
        ({"a": Raw(b"\x8a")}, "has a damaged data.pkl .*download it again"),
        ({"a": Raw(b"h\x07")}, "has a damaged data.pkl"),
    ],
)
def test_files_without_a_tensor_dictionary_are_reported(tmp_path, value, message):
    with pytest.raises(ValueError, match=rf"weights\.pth .*{message}"):
        read_tensors(archive(tmp_path, value))


@pytest.mark.parametrize(
    ("value", "kind", "way_out"),
    [
        (tensor(FLOATS, (2,), (1,), more=({"conj": True},)), "conjugate", r"x\.resolve_conj\(\)"),
        (tensor(FLOATS, (2,), (1,), more=({"neg": True},)), "negative", r"x\.resolve_neg\(\)"),
        (Call(Global("torch._utils", "_rebuild_qtensor"), (1,)), "quantised", r"x\.dequantize"),
        (Call(Global("torch._utils", "_rebuild_sparse_tensor"), (1,)), "sparse", r"x\.to_dense"),
        (Call(Global("torch._utils", "_rebuild_nested_tensor"), (1,)), "nested", r"x\.unbind"),
        (Call(Global("torch._utils", "_rebuild_meta_tensor_no_storage"), (1,)), "meta", "loaded"),
        (Call(Global("torch._tensor", "_rebuild_from_type_v2"), (1,)), "subclass", "x.as_subcl"),
    ],
)
def test_tensor_in_another_form_is_named_with_the_way_to_a_plain_one(
    tmp_path, value, kind, way_out
):
    for content in ({"ok": ONES, "a.weight": value}, {"model": {"ok": ONES, "a.weight": value}}):
        with pytest.raises(ValueError, match=rf"holds 'a\.weight', a .*{kind}.*: .*{way_out}"):
            read_tensors(archive(tmp_path, content))


def test_incomplete_archive_error_says_what_to_do(tmp_path):
    whole = archive(tmp_path, {"a": ONES}).read_bytes()
    legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    damaged = whole.replace(np.ones(2, np.float32).tobytes(), bytes(8))
    cases = (
        *((whole[:size], "is damaged or cut off .*download it again") for size in (3, 90, -5)),
        (damaged, "is damaged or cut off .*CRC"),
        (legacy, r"format from before 1\.6.*torch\.save\(torch\.load\(FILE"),
        (b"\x80\x02}q\x00.", r"is not a zip archive of PyTorch, it starts with .*state_dict\(\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer.*git lfs pull"),
        (b"", "is empty"),
    )
    path = tmp_path / "other.bin"
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"other\.bin .*{message}"):
            read_tensors(path)
    with zipfile.ZipFile(path, "w") as other:
        other.writestr("model.json", "{}")
    with pytest.raises(ValueError, match=r"without PyTorch's data\.pkl; it holds \['model.json'\]"):
        read_tensors(path)
    with pytest.raises(ValueError, match="big-endian"):
        read_tensors(archive(tmp_path, {"a": ONES}, extra={"byteorder": b"big"}))


@pytest.mark.parametrize("with_code", [True, False])
def test_torchscript_yields_parameters_and_buffers(tmp_path, with_code):
    def module(path, **state):
        name = f"__torch__.{path}".rsplit(".", 1)
        return New(Global(*name), state)

    norm = module("nets.___torch_mangle_3.Norm", weight=ONES, mean=ONES, eps=0.1)
    sizes = Call(Global("torch.jit._pickle", "build_intlist"), ([3, 4],))
    value = module("Net", training=False, bias=None, sizes=sizes, norm=norm, mask=ONES, scale=ONES)
    heading = "class {}(Module):\n  __parameters__ = [{}]\n  __buffers__ = [{}]\n  x : Tensor\n"
    code = {
        "code/__torch__.py": heading.format("Net", '"bias", "scale", ', ""),
        "code/__torch__/nets/___torch_mangle_3.py": heading.format(
            "Norm", '"weight", ', '"mean", '
        ),
    }
    path = archive(tmp_path, value, extra={"constants.pkl": b""} | (code if with_code else {}))
    want = ["norm.weight", "norm.mean", "scale"] + ([] if with_code else ["mask"])
    assert_same(read_tensors(path), dict.fromkeys(want, np.ones(2, np.float32)))


def test_invalid_torchscript_is_refused(tmp_path):
    scripted = {"constants.pkl": b""}
    with pytest.raises(ValueError, match="TorchScript without a module"):
        read_tensors(archive(tmp_path, {"a": ONES}, extra=scripted))
    value = New(Global("__torch__", "Net"), {"a": Call(Global("os", "system"), ("touch ran",))})
    with pytest.raises(ValueError, match=r"holds os\.system"):
        read_tensors(archive(tmp_path, value, extra=scripted))


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "model.safetensors"
    columns = {"columns": ARRAYS["single"].T}
    write_tensors(path, ARRAYS | columns)
    assert_same(read_tensors(path), ARRAYS | columns)
    assert_same(read_tensors(tmp_path), ARRAYS | columns)
    write_tensors(path, ARRAYS | columns)  # and once more
    before = path.read_bytes()
    whole = {name: np.asarray(x, order="C") for name, x in (ARRAYS | columns).items()}
    save_file(whole, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "library").read_bytes() == before
    (tmp_path / "library").unlink()
    with pytest.raises(FileExistsError, match=r"model\.safetensors exists and holds something"):
        write_tensors(path, ARRAYS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"weights\.bin must end in \.safetensors"):
        write_tensors(tmp_path / "weights.bin", ARRAYS)
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        write_tensors(tmp_path / "missing" / "a.safetensors", ARRAYS)
    for size in (-1, 30, 4):
        path.write_bytes(before[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut off"):
            read_tensors(path)


def index(folder, name, where):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_are_read_through_their_index(tmp_path, form):
    stem = {"safetensors": "model", "bin": "pytorch_model"}[form]
    write = {"safetensors": lambda path, x: save_file(x, path), "bin": torch_files.save}[form]
    single = {"single": ARRAYS["single"]}
    rest = {name: ARRAYS[name] for name in ARRAYS if name != "single"}
    where = {}
    for number, part in enumerate((single, rest)):
        name = f"{stem}-{number}-of-2.{form}"
        write(tmp_path / name, part)
        where |= dict.fromkeys(part, name)
    index(tmp_path, f"{stem}.{form}.index.json", where)
    assert_same(read_tensors(tmp_path), ARRAYS)
    assert_same(read_tensors(tmp_path / f"{stem}.{form}.index.json"), ARRAYS)


def test_invalid_index_is_reported(tmp_path):
    name = "model.safetensors.index.json"
    save_file({"a": np.ones(2)}, tmp_path / "x.safetensors")
    for where, error, message in (
        ({"a": "y.safetensors"}, FileNotFoundError, r"names y\.safetensors, missing"),
        ({"a": "../x.safetensors"}, ValueError, r"names '\.\./x\.safetensors', which is not in"),
        ({"b": "x.safetensors"}, ValueError, r"do not hold: \['b'\]"),
        (["a"], ValueError, "is not an index of shards"),
    ):
        index(tmp_path, name, where)
        with pytest.raises(error, match=rf"index\.json .*{message}"):
            read_tensors(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not an index of shards"):
        read_tensors(tmp_path)


def test_numbered_shards_replace_a_missing_file(tmp_path):
    names = list(ARRAYS)
    path = tmp_path / "model_best_test.pth"
    for i in range(10):  # 10 sorts before 2 as text
        part = {f"module.{name}": ARRAYS[name] for name in names[i : i + 1]}
        part["module.single"] = ARRAYS["single"]  # once more in each
        torch_files.save(tmp_path / f"model_best_test_{i + 1}.pth", part)
    assert_same(read_tensors(path), ARRAYS)
    torch_files.save(tmp_path / "model_best_test_10.pth", {"module.single": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"test_10\.pth holds module\.single with other values"):
        read_tensors(path)
    for number in (1, 10):  # NaN is equal to itself here; it is refused with its name elsewhere
        nan = {"module.single": np.full(2, np.nan, np.float32)}
        torch_files.save(tmp_path / f"model_best_test_{number}.pth", nan)
    for number in range(2, 10):
        torch_files.save(tmp_path / f"model_best_test_{number}.pth", {"module.x": np.ones(2)})
    assert np.isnan(read_tensors(path)["single"]).all()
    (tmp_path / "model_best_test_4.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"are missing: model_best_test_4\.pth"):
        read_tensors(path)
    torch_files.save(path, {"whole": ARRAYS["single"]})
    assert list(read_tensors(path)) == ["whole"]


def test_missing_source_is_reported(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no .*a\.pth, and it has no shards a_1\.pth"
    ):
        read_tensors(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_tensors(tmp_path / "missing" / "a")
    (tmp_path / "flax_model.msgpack").touch()
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors, .* flax_model\.msg"):
        read_tensors(tmp_path)
    with pytest.raises(ValueError, match=r"flax_model\.msgpack must end in one of \.safetensors"):
        read_tensors(tmp_path / "flax_model.msgpack")
    torch_files.save(tmp_path / "a.pt", {"module.a": np.ones(2), "a": np.ones(3)})
    with pytest.raises(ValueError, match=r"a\.pt .* both with and without the prefix 'module\.'"):
        read_tensors(tmp_path / "a.pt")


def test_torch_files_are_read_as_torch_reads_them(tmp_path):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    torch.manual_seed(0)
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.float8_e4m3fn)
    tensors = {str(kind): torch.randn(3, 4).to(kind) for kind in kinds}
    tensors |= {
        "turned": torch.randn(3, 4).T,
        "row": torch.randn(3, 4)[1],
        "spread": torch.randn(2, 1).expand(2, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    path = tmp_path / "weights.pth"
    torch.save({"model": tensors, "optimizer": optimizer.state_dict(), "epoch": 1}, path)
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    for name, want in tensors.items():
        assert str(found[name].dtype) == str(want.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].astype(np.float64), want.detach().double())
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).half()
    torch.jit.script(model).save(path)
    assert_same(read_tensors(path), {k: v.numpy() for k, v in model.state_dict().items()})
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before 1\.6"):
        read_tensors(path)


def test_written_safetensors_have_the_standard_layout(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": np.ones(2, np.float32)})
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    assert_same(load_file(tmp_path / "a.safetensors"), {"a": np.ones(2, np.float32)})


def test_url_is_refused():
    with pytest.raises(ValueError, match=r"^https://x/y\.safetensors must be on a local disk;"):
        read_tensors("https://x/y.safetensors")
