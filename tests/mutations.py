"""Ways of corrupting and forging files: bytes, JSON, zip archives, pickles and npy headers. All are
functions of a random generator, so that a seed and a number identify a mutant."""

import copy
import io
import itertools
import json
import pickletools
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable

Mutate = Callable[[random.Random, bytes], bytes]

EXTREMES = (0, 1, 127, 128, 255, 256, 65535, 1 << 24, 1 << 28, (1 << 31) - 1, 1 << 31)
EXTREMES += ((1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def flip(rng: random.Random, data: bytes) -> bytes:
    """Flips some bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    """Truncates the data."""
    return data[: rng.randrange(len(data) + 1)]


def drop(rng: random.Random, data: bytes) -> bytes:
    """Removes a piece."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 4, 64, 512)) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Inserts a piece."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice((1, 4, 64))) + data[start:]


def splice(rng: random.Random, data: bytes) -> bytes:
    """Copies a piece of the data to another place."""
    size = rng.choice((4, 30, 200))
    source, target = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    return data[:target] + data[source : source + size] + data[target + size * rng.randrange(2) :]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """Overwrites a piece with a repeated byte or with noise."""
    start, size = rng.randrange(len(data) + 1), rng.choice((1, 8, 100))
    piece = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), b"(" * size))
    return data[:start] + piece + data[start + size :]


def extreme(rng: random.Random, data: bytes) -> bytes:
    """Writes an extreme number somewhere, in the encoding of lengths and offsets."""
    width = rng.choice((1, 2, 4, 8))
    number = rng.choice(EXTREMES) % (1 << 8 * width)
    start = rng.randrange(len(data) + 1)
    return (
        data[:start] + number.to_bytes(width, rng.choice(("little", "big"))) + data[start + width :]
    )


def digits(rng: random.Random, data: bytes) -> bytes:
    """Replaces a number that is written out in digits."""
    found = [*re.finditer(rb"\d+", data)]
    if not found:
        return flip(rng, data)
    place = rng.choice(found)
    texts = ("-1", "1e999", "NaN", "0", "true", "1.5", '"x"', "9" * 30, "9" * 5000, "[[]]")
    text = rng.choice((*texts, *map(str, EXTREMES)))
    return data[: place.start()] + text.encode() + data[place.end() :]


def replace_all(rng: random.Random, data: bytes) -> bytes:
    """Replaces the whole content."""
    others = (b"", b"{}", b"[]", b"null", b"PK\x05\x06" + bytes(18), b"\x80\x02}.", b"\x00" * 300)
    deep = (b"[" * 50_000, b'{"a":' * 50_000, b"version https://git-lfs.github.com/spec/v1\n")
    return rng.choice((*others, *deep, b"\xef\xbb\xbf" + data, data + data, data[::-1]))


BYTES: tuple[Mutate, ...] = (
    *(flip, flip, flip, cut, drop, insert, splice, overwrite, extreme, extreme, digits),
    replace_all,
)
ODD_JSON = (
    *(None, True, False, -1, 0, 1 << 40, 1 << 70, 1.5, float("nan"), float("inf"), "", "x", "../x"),
    *([], {}, [[]], [None], {"a": 1}, "\ud800", "x" * 5000, "a\x00b", "/etc/passwd", [-1], ["x"]),
    *([1 << 62, 1 << 62], [0, 1 << 62], [1] * 70, [1.0], [True], list(range(3)), "\n\x1b[31m"),
)


def edit_json(rng: random.Random, value):
    """Changes one place in a JSON value, in place if possible."""
    spots = []

    def visit(holder):
        entries = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, inner in list(entries):
            spots.append((holder, key))
            if isinstance(inner, dict | list):
                visit(inner)

    if isinstance(value, dict | list):
        visit(value)
    if not spots or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(ODD_JSON))
    holder, key = rng.choice(spots)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "\ud800", "y" * 3000, "__metadata__", "a\n"))] = holder.pop(key)
    elif kind == 2:
        other, place = rng.choice(spots)
        if isinstance(other, dict) or (isinstance(other, list) and place < len(other)):
            holder[key] = json.loads(json.dumps(other.get(place) if isinstance(other, dict) else 0))
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD_JSON))
    return value


def json_text(rng: random.Random, text: bytes) -> bytes:
    """JSON with changed values, duplicate keys, or other spelling."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return flip(rng, text)
    for _ in range(rng.choice((1, 1, 2))):
        value = edit_json(rng, value)
    written = json.dumps(value, indent=rng.choice((None, None, 2))).encode()
    if rng.random() < 0.1:
        written = re.sub(rb'("[^"]*": ?[^,{}\[\]]*),', rb"\1, \1,", written, count=1)
    return written


# ----- zip archives -----


def read_zip(data: bytes) -> dict[str, bytes]:
    """The entries of a whole archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(entries, *, compressed: bool = False) -> bytes:
    """An archive of (name, content) pairs, with valid sizes and checksums."""
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return file.getvalue()


def zip_fields(rng: random.Random, data: bytes) -> bytes:
    """Writes an extreme number to a field of the zip format."""
    found = [m.start() for m in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06)", data)]
    if not found:
        return extreme(rng, data)
    start = rng.choice(found) + 4 + rng.randrange(42)
    width = rng.choice((1, 2, 4))
    number = rng.choice(EXTREMES) % (1 << 8 * width)
    return data[:start] + number.to_bytes(width, "little") + data[start + width :]


def zip_entries(inner: Mutate | None = None, *, only: str = "") -> Mutate:
    """An archive with an entry changed, removed, doubled, renamed, compressed or made huge.

    Args:
      inner: changes the content of an entry.
      only: changes only entries whose names contain this.
    """

    def mutate(rng: random.Random, data: bytes) -> bytes:
        try:
            entries = [*read_zip(data).items()]
        except (zipfile.BadZipFile, ValueError, EOFError, zlib.error, OSError, RuntimeError):
            return flip(rng, data)
        except (NotImplementedError, struct.error):
            return flip(rng, data)
        places = [i for i, (name, _) in enumerate(entries) if only in name]
        if not places:
            return flip(rng, data)
        place, compressed = rng.choice(places), rng.random() < 0.1
        name, content = entries[place]
        kind = rng.randrange(12)
        if kind == 0:
            del entries[place]
        elif kind == 1:
            entries.append((name, rng.choice((content, b""))))
        elif kind == 2:
            entries[place] = (rng.choice(("", "../x", name + "x", "x/" + name)), content)
        elif kind == 3:
            entries[place], compressed = (name, bytes(rng.choice((1 << 20, 1 << 24)))), True
        elif kind == 4:
            entries[place] = (name, content + bytes(rng.choice((1, 4, 1000))))
        else:
            entries[place] = (name, (inner or rng.choice(BYTES))(rng, content))
        return write_zip(entries, compressed=compressed)

    return mutate


# ----- pickles -----


def doubled_lists(depth: int) -> bytes:
    """Opcodes for nested lists, each of which holds the one before twice."""
    lists = (b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(depth))
    return b"]q\x000" + b"".join(lists) + b"h%c" % depth


def doubled_tuples(depth: int) -> bytes:
    """The same with tuples, which can be hashed."""
    pairs = (b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(depth))
    return b")q\x000" + b"".join(pairs) + b"h%c" % depth


def _bomb(rng: random.Random) -> bytes:
    """Opcodes that take much memory or time when executed."""
    depth = rng.choice((40, 60))
    tuples = doubled_tuples(depth)
    return rng.choice(
        (
            b"]r" + struct.pack("<I", rng.choice(EXTREMES) % (1 << 32)),  # a memo index
            doubled_lists(depth),
            tuples,
            b"}" + tuples + b"Ns",  # as a key
            b"]" * 3000 + b"a" * 2000,
            b"\x8e" + struct.pack("<Q", rng.choice(EXTREMES) % (1 << 64)),  # BINBYTES8
            b"\x95" + struct.pack("<Q", rng.choice(EXTREMES) % (1 << 64)),  # FRAME
            b"\x8b\xff\xff\xff\x7f",  # LONG4
            b"L" + b"9" * 4000 + b"L\n",
            b"(" * 5000,
            b"cos\nsystem\n(Vtrue\ntR",
            b"cbuiltins\neval\n(V1\ntR",
            b"cargparse\nNamespace\n)\x81}b",
            b"ccollections\nOrderedDict\n]\x85R",
            b"ctorch\nSize\n](K\x01Me\xff\x8a\x08" + b"\xff" * 8 + b"e\x85R",
        )
    )


def pickled(rng: random.Random, data: bytes) -> bytes:
    """A pickle with opcodes changed, removed, doubled, swapped or added."""
    try:
        starts = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    except Exception:
        return flip(rng, data)
    ops = [data[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        if len(ops) < 3:
            break
        place = rng.randrange(1, len(ops) - 1)
        kind = rng.randrange(9)
        if kind == 0:
            del ops[place]
        elif kind == 1:
            ops.insert(place, ops[place])
        elif kind == 2:
            other = rng.randrange(1, len(ops) - 1)
            ops[place], ops[other] = ops[other], ops[place]
        elif kind == 3:
            ops[place] = bytes([rng.choice(pickletools.opcodes).code.encode("latin-1")[0]])
        elif kind == 4:
            ops.insert(place, _bomb(rng))
        elif kind in (5, 6):
            numbers = [i for i, op in enumerate(ops) if op[:1] in b"KMJ\x8a" and op]
            if numbers:
                number = rng.choice((*EXTREMES, -1, -(1 << 40)))
                raw = number.to_bytes(9, "little", signed=True)
                ops[rng.choice(numbers)] = rng.choice(
                    (
                        b"\x8a\x09" + raw,
                        b"K" + raw[:1],
                        b"N",
                        b"\x88",
                        b"]",
                        b"G" + raw[:8],
                        b"Va\n",
                    )
                )
        elif kind == 7:
            names = [i for i, op in enumerate(ops) if op[:1] == b"c"]
            if names:
                ops[rng.choice(names)] = b"c" + rng.choice(
                    (
                        *(b"torch\nQInt8Storage\n", b"torch\nHalfStorage\n", b"torch\nfloat32\n"),
                        *(b"os\nsystem\n", b"collections\nOrderedDict\n", b"torch\nSize\n"),
                        *(b"torch._utils\n_rebuild_sparse_tensor\n", b"__torch__\nNet\n", b"a\n\n"),
                        *(b"x" * 3000 + b"\ny\n", b"torch._utils\n_rebuild_parameter\n"),
                    )
                )
        else:
            ops[place] = flip(rng, ops[place])
    return b"".join(ops)


# ----- npy -----


def npy(rng: random.Random, data: bytes) -> bytes:
    """An npy file with another header, of a valid length."""
    if not data.startswith(b"\x93NUMPY") or len(data) < 10:
        return flip(rng, data)
    length = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + length].decode("latin-1"), data[10 + length :]
    shapes = ("(1099511627776,)", "(0, 4611686018427387904)", "(-1,)", "()", "(2, 3)", "('a',)")
    types = ("'<f8'", "'|O'", "'<U0'", "'<U99999999'", "[('a', '<f4')]", "'>f4'", "'<M8[s]'", "3")
    kind = rng.randrange(5)
    if kind == 0:
        header = re.sub(r"'shape': .*?\), ", f"'shape': {rng.choice(shapes)}, ", header)
    elif kind == 1:
        header = re.sub(r"'descr': '.*?', ", f"'descr': {rng.choice(types)}, ", header)
    elif kind == 2:
        header = header.replace("False", rng.choice(("True", "None", "0", "(" * 60)))
    elif kind == 3:
        header = rng.choice(("", "{}", "-" * 900 + "1", "{'a': 1}", "[" * 300, "\n", header * 9))
    else:
        body = rng.choice((body[:-1], body + b"\x00", flip(rng, body)))
    raw = header.encode("latin-1")
    return data[:8] + len(raw).to_bytes(2, "little") + raw + body
