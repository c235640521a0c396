"""A large text corpus: encoding against `tokenizers.encode_batch`, and starting a run on it.

Ours is `encode` of this project's tokenizers, which also checks the ids, adds special tokens and
makes one array. The peer is `encode_batch` of the `tokenizers` library with the same vocabulary.
Their ids are compared first. Both use all threads. "bpe" is a tokenizer trained here, "unigram" a
SentencePiece model in the format of mBART-50.

Then two processes, one after the other, start a run of stage "translate" on --pairs pairs: the
first writes the file with ids, the second finds it. Both read the corpus as a run does, and make a
batch. Memory is the peak growth since the imports: of the process's anonymous memory, and of all
its memory, including pages of mapped files that the kernel may drop.

    python benchmarks/corpus.py --multi30k FOLDER
"""

import argparse
import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece
import timing
import tokenizers
from etils import epath
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models, normalizers, pre_tokenizers

from cliptrans_jax.config import Config
from cliptrans_jax.data import emoji_set
from cliptrans_jax.data.corpora import DataConfig
from cliptrans_jax.data.feed import TrainFeed
from cliptrans_jax.data.tokenizers.framing import SPECIAL, Tokenizer
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, load_tokenizer
from cliptrans_jax.runs.run_data import RunData
from common_jax.inputs.ragged import Ragged
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.signals import ends_quietly

PAIR = ("en", "de")
BATCH = 256
PIECES = 8000
SAME = 0.999  # of the sentences; two segmentations into pieces may be equally likely
PART = 20_000  # sentences per call of the peer, which returns kilobytes per sentence


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__, repeats=5)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs in the large corpus")
    parser.add_argument("--sentences", type=int, default=40_000, help="sentences to time encoding")
    parser.add_argument(
        "--multi30k",
        type=pathlib.Path,
        help="folder of Multi30k, whose training sentences are repeated with one word changed; "
        "without it, sentences are lists of emoji names",
    )
    parser.add_argument("--start", nargs=2, metavar="FOLDER", help="internal: only start a run")
    return parser.parse_args()


def base_sentences(multi30k: pathlib.Path | None) -> dict[str, list[str]]:
    """Aligned sentences by language, from which the corpus is made."""
    if multi30k is None:
        names = emoji_set.load_emoji("train", PAIR, size=None, flags=False).texts
        return {
            code: [", ".join(names[code][row : row + 5]) for row in range(len(names[code]) - 5)]
            for code in PAIR
        }
    files = {code: multi30k / "raw" / f"train.{code}.gz" for code in PAIR}
    return {code: gzip.open(path).read().decode().splitlines() for code, path in files.items()}


def vary(sentences: list[str], count: int) -> "itertools.chain[str]":
    """Yields `count` sentences, with one word of each repetition replaced by its number."""
    for number, sentence in zip(range(count), itertools.cycle(sentences), strict=False):
        turn, words = number // len(sentences), sentence.split()
        if turn:
            words[turn % len(words)] = str(turn)
        yield " ".join(words)


def write_corpus(folder: pathlib.Path, sentences: dict[str, list[str]], pairs: int) -> None:
    """Writes splits train, val and test in the layout of source `wmt`."""
    root = folder / f"wmt_{'_'.join(PAIR)}"
    root.mkdir(parents=True)
    for code, (split, count) in itertools.product(
        PAIR, {"train": pairs, "val": BATCH, "test": BATCH}.items()
    ):
        with open(root / f"{split}.{code}", "w") as file:
            file.writelines(f"{text}\n" for text in vary(sentences[code], count))


def write_unigram(folder: pathlib.Path, texts: list[str]) -> pathlib.Path:
    """Trains a SentencePiece unigram model; returns its path, which has mBART-50's file name."""
    folder.mkdir()
    path = folder / "sentencepiece.bpe.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=PIECES,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def peer_of_unigram(path: pathlib.Path) -> tokenizers.Tokenizer:
    """The same model in the `tokenizers` library."""
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    peer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    peer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    peer.pre_tokenizer = pre_tokenizers.Metaspace()
    return peer


def encode_parts(
    peer: tokenizers.Tokenizer, texts: list[str]
) -> Iterator[list[tokenizers.Encoding]]:
    for first in range(0, len(texts), PART):
        yield peer.encode_batch(texts[first : first + PART], add_special_tokens=False)


def check_ids(name: str, ours: Ragged, theirs: Iterable[list[tokenizers.Encoding]]) -> None:
    """Fails unless both give (nearly) all sentences the same ids."""
    ids = [np.asarray(sentence.ids) for part in theirs for sentence in part]
    if name == "unigram":  # mBART-50's ids are one higher, except that of unknown pieces
        ids = [np.where(row == 0, SPECIAL.index("<unk>"), row + 1) for row in ids]
    # Ours start with the language and end with </s>.
    pairs = zip(ours, ids, strict=True)
    same = np.mean([np.array_equal(row[1:-1], wanted) for row, wanted in pairs])
    print(f"{name}: both give {same:.2%} of the sentences the same ids")
    assert same >= SAME, f"{name}: only {same:.2%} of the sentences have the peer's ids"


def compare_encoding(
    name: str, ours: Tokenizer, peer: tokenizers.Tokenizer, texts: list[str], repeats: int
) -> tuple[timing.Times, timing.Claim]:
    """Times both in turns; returns the times and the claim."""
    spaced = [f" {text}" for text in texts] if name == "bpe" else texts

    def encode_batches() -> list[int]:
        counts = []
        for part in encode_parts(peer, spaced):
            counts += map(len, part)
        return counts

    check_ids(name, ours.encode(texts, "de"), encode_parts(peer, spaced))
    cases = {
        f"{name}, ours": lambda: ours.encode(texts, "de").flat,
        f"encode_batch, {name}": encode_batches,
    }
    times = timing.take_turns(cases, repeats)
    claim = f"ids of sentences, {name}"
    return times, timing.compare(times, *cases, claim=claim, target=1.0)


class Peaks(threading.Thread):
    """Tracks this process's peak memory in bytes: `anonymous` and `all`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first = self.largest = self.now()
        self.start()

    def run(self) -> None:
        while True:
            self.largest = {key: max(self.largest[key], size) for key, size in self.now().items()}
            time.sleep(0.01)

    @property
    def growth(self) -> dict[str, int]:
        return {key: size - self.first[key] for key, size in self.largest.items()}

    @staticmethod
    def now() -> dict[str, int]:
        """Memory in use now."""
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        pairs = (line.split(":") for line in lines if line.endswith(" kB"))
        sizes = {key: 1024 * int(size.split()[0]) for key, size in pairs}
        return {"anonymous": sizes["RssAnon"], "all": sizes["VmRSS"]}


def start_run(corpus: str, workdir: str) -> None:
    """Starts a run up to its first batch, and prints the seconds and memory it took as JSON."""
    import jax

    base = Config()
    sizes = dataclasses.replace(base.model.mbart, vocab=2 * PIECES)
    mapper = dataclasses.replace(base.model.mapper, prefix=0)
    config = dataclasses.replace(
        base,
        data=DataConfig(source="wmt", path=corpus),
        tokenizer=TokenizerConfig("mbart50", f"{corpus}/unigram"),
        model=dataclasses.replace(base.model, mapper=mapper, mbart=sizes),
    )
    mesh, peaks = make_mesh(MeshConfig(), jax.devices()[:1]), Peaks()
    clock, processor = time.perf_counter(), time.process_time()
    data = RunData(config, epath.Path(workdir), mesh)
    pairs = data.check(train=True)
    inputs = data.load(config.data.train_split, train=True).inputs
    batching = dataclasses.replace(config.batching, window=16)
    feed = TrainFeed(inputs, config.noise, batching, BATCH, config.seed, (0, 1))
    next(feed.batches(0))
    seconds = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
    print(json.dumps(seconds | {key: size / pairs for key, size in peaks.growth.items()}))


def start_twice(folder: pathlib.Path, threads: int) -> dict[str, dict[str, float]]:
    """Starts a run in its own process, twice."""
    starts = {}
    for name in ("first", "second"):
        flags = [f"--threads={threads}", "--start", str(folder), str(folder / "run")]
        done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        starts[name] = json.loads(done.stdout.splitlines()[-1])
        print(
            "{} start: {clock:.1f} s, {processor:.1f} s of CPU time; bytes per pair: "
            "{anonymous:.0f}, {all:.0f} with mapped files".format(name, **starts[name])
        )
    return starts


@ends_quietly
def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads)
    os.environ["RAYON_NUM_THREADS"] = str(sizes.threads)
    if sizes.start:
        start_run(*sizes.start)
        return
    sentences = base_sentences(sizes.multi30k)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        texts = list(vary(sentences["de"], sizes.sentences))
        bpe = load_tokenizer(
            TokenizerConfig(vocab=PIECES), sentences=texts, languages=PAIR, path=folder / "bpe.json"
        )
        record = json.loads((folder / "bpe.json").read_text())
        bpe_peer = tokenizers.Tokenizer.from_str(record["bpe"])
        path = write_unigram(folder / "unigram", texts)
        unigram = load_tokenizer(TokenizerConfig("mbart50", str(path.parent)))
        times, claims = {}, []
        for case in (("bpe", bpe, bpe_peer), ("unigram", unigram, peer_of_unigram(path))):
            own_times, claim = compare_encoding(*case, texts, sizes.repeats)
            times, claims = times | own_times, [*claims, claim]
        write_corpus(folder, sentences, sizes.pairs)
        starts = start_twice(folder, sizes.threads)
    timing.report("corpus", claims, times=times, starts=starts, pairs=sizes.pairs)


if __name__ == "__main__":
    main()
