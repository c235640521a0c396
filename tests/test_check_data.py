"""tools/check_data.py: the command that says what is missing before a run starts."""

import errno
import itertools
import pathlib
import re
import shlex
import signal
import zipfile
from unittest import mock

import check_data
import numpy as np
import pytest
from PIL import Image

from common_jax import start_up
from common_jax.commands import check as program

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = f"--config={ROOT}/configs/m2mkd/digits.py:phase=end_to_end"
SENTENCES = f"--config={ROOT}/configs/cliptrans/multi30k.py"
LINES = {"en": ("a dog", "a cat", "a red car"), "de": ("ein Hund", "eine Katze", "ein rotes Auto")}


def check(capsys, *flags):
    """(exit status, output, problems)."""
    with pytest.raises(SystemExit) as end:
        check_data.main(["check_data.py", *map(str, flags)])
    printed = capsys.readouterr().out
    _, _, tail = printed.partition("from starting:\n")
    problems = [line for line in tail.splitlines() if line.strip()]
    assert (end.value.code == 0) == (not problems), printed
    return end.value.code, printed, problems


def draw(path, seed, size=(24, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def image_set(root, classes=("ant", "bee", "cat"), each=4):
    for split, (i, name) in itertools.product(("train", "test"), enumerate(classes)):
        for number in range(each + i):
            draw(root / split / name / f"{number}.png", (i, number))
    return root


def image_flags(root, **settings):
    settings = {
        "data.source": "folder",
        "data.path": root,
        "data.image_size": 24,
        "data.channels": 3,
        "data.labels": 3,
        "data.mean": "(0.5,0.5,0.5)",
        "data.std": "(0.5,0.5,0.5)",
        "optim.batch": 8,
    } | settings
    return [IMAGES, *(f"--config.{key}={value}" for key, value in settings.items())]


def test_valid_image_set_is_described(tmp_path, capsys):
    flags = image_flags(image_set(tmp_path))
    status, printed, _ = check(capsys, *flags, "--sample=5")
    assert status == 0 and "a run could start" in printed
    assert "15 images of 3 classes, 4 to 6 per class, median 5" in printed
    assert "fewest: ant 4, bee 5, cat 6" in printed
    assert "sizes of 5 images, rows x columns: 24 x 24 (5)" in printed
    assert "unreadable: 0 of 5" in printed
    assert "sizes of 15 images" in check(capsys, *flags, "--all")[1]
    assert "sizes of 5 images" in check(capsys, *flags, "--sample", "5")[1]


def test_training_split_to_test_on_is_no_problem_but_warned_of(tmp_path, capsys):
    flags = image_flags(image_set(tmp_path), **{"data.test_split": "train"})
    with pytest.raises(SystemExit) as end:
        check_data.main(["check_data.py", *flags])
    warned = "config.data.test_split='train' is also the training split"
    assert end.value.code == 0 and warned in capsys.readouterr().err


def test_stopped_check_does_not_exit_as_one_without_problems(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "choose", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        check_data.main(["check_data.py", *image_flags(tmp_path)])
    assert end.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped as requested: the data were not checked to the end\n"


def test_check_on_one_worker_of_a_pod_does_not_wait_for_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(start_up, "cluster", lambda: "SLURM")
    monkeypatch.setattr(start_up.jax.distributed, "initialize", lambda *_, **__: pytest.fail())
    assert check(capsys, *image_flags(image_set(tmp_path)))[0] == 0


def test_sample_must_be_at_least_one_picture(capsys):
    with pytest.raises(SystemExit) as end:
        check_data.main(["check_data.py", IMAGES, "--sample=0"])
    assert end.value.code == 2
    assert "--sample: '0' must be a whole number from 1" in capsys.readouterr().err


def test_every_problem_of_an_image_set_is_reported(tmp_path, capsys):
    root = image_set(tmp_path)
    (root / "train/ant/0.png").write_bytes(b"")
    content = (root / "train/bee/1.png").read_bytes()
    (root / "train/bee/1.png").write_bytes(content[: len(content) // 2])
    draw(root / "train/ant/1.png", 0, (20, 25))
    for number in (2, 3):
        draw(root / f"train/cat/{number}.png", 0, (20, 30))
    (root / "test/cat").rename(root / "test/eel")
    flags = image_flags(root, **{"optim.batch": 100})
    status, printed, problems = check(capsys, *flags, "--all")
    assert status == 1 and "unreadable: 2 of 15" in printed
    expected = (
        r"train: 2 of 15 images cannot be read, .*ant/0\.png.*bee/1\.png.*config\.data\.bad_share",
        r"config\.data\.image_size=24, .* other sizes: 20 x 25 \(.*/train/ant/1\.png\), 20 x 30 "
        r"\(.*/train/cat/2\.png\); ",
        r"split 'test' .* has 3 classes, but config\.data lacks 1 of them: eel; .*ant, bee",
        r"config\.optim\.batch=100 is more than the 15 images",
    )
    assert len(problems) == len(expected)
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.search(pattern, problem), problem


def test_sample_with_many_bad_images_suggests_reading_all(tmp_path, capsys):
    root = image_set(tmp_path)
    (root / "train/ant/0.png").write_bytes(b"")
    flags = image_flags(root, **{"data.bad_share": 0.1})
    said = "1 of the 5 images read are bad, and a run stops at config.data.bad_share=0.1 of all 15"
    status, printed, _ = check(capsys, *flags, "--sample=5")
    assert status == 0 and said in printed
    status, printed, _ = check(capsys, *flags, "--all")
    assert status == 0 and "images read are bad" not in printed


def test_pipeline_episodes_need_enough_classes(tmp_path, capsys):
    image_set(tmp_path, each=20)
    config = IMAGES.replace("end_to_end", "pipeline")
    flags = [flag for flag in image_flags(tmp_path)[1:] if "config.optim" not in flag]
    status, _, problems = check(capsys, config, *flags)
    assert status == 1
    assert any("config.few_shot.ways=4 must be from 1 to the number of" in x for x in problems)
    problems = check(capsys, config, *flags, "--config.few_shot.ways=3")[2]
    assert any("few_shot.optim.batch=20 is more than the 15 images of" in x for x in problems)


def test_every_episode_needs_enough_images(tmp_path, capsys):
    """With seed 1 the episode has the classes a and b, with seed 4 b and the smaller c."""
    root = image_set(tmp_path, classes="ecdba", each=6)
    for number in range(2, 7):
        (root / f"train/c/{number}.png").unlink()
    config = IMAGES.replace("end_to_end", "few_shot")
    settings = {"ways": 2, "shots": 3, "test_shots": 2, "seed": 1}
    flags = image_flags(root, **{"data.labels": 5, "optim.batch": 6})[1:]
    flags += [f"--config.few_shot.{key}={value}" for key, value in settings.items()]
    assert check(capsys, config, *flags)[0] == 0
    (problem,) = check(capsys, config, *flags, "--config.few_shot.episodes=9")[2]
    assert re.search(r"shots=3, but class c, which .*seed=4 draws, has 2 images in the tr", problem)


def test_missing_splits_and_empty_classes_are_both_reported(tmp_path, capsys):
    root = image_set(tmp_path)
    (root / "train/fly").mkdir()
    status, _, problems = check(capsys, *image_flags(root, **{"data.test_split": "val"}))
    assert status == 1 and len(problems) == 2
    assert "no image for class fly" in problems[0]
    assert "no split 'val', only: test, train" in problems[1]
    status, _, problems = check(capsys, *image_flags(root, **{"data.bad_share": 2.0}))
    assert status == 1 and "config.data.bad_share=2.0 must be in [0, 1)" in problems[0]


def test_truncated_zip_is_reported(tmp_path, capsys):
    root = image_set(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in root.rglob("*.png"):
            archive.write(file, file.relative_to(root))
    assert check(capsys, *image_flags(tmp_path / "set.zip"))[0] == 0
    (tmp_path / "set.zip").write_bytes((tmp_path / "set.zip").read_bytes()[:-50])
    status, _, problems = check(capsys, *image_flags(tmp_path / "set.zip"))
    assert status == 1 and len(problems) == 1 and "make the zip again" in problems[0]


def test_ood_set_is_checked_too(tmp_path, capsys):
    root = image_set(tmp_path / "set")
    (image_set(tmp_path / "r", ("bee", "cat")) / "test").rename(tmp_path / "renditions")
    ood = {"ood.source": "imagenet_r", "ood.path": tmp_path / "renditions"}
    status, printed, _ = check(capsys, *image_flags(root, **ood))
    assert status == 0 and "tested among 2 of the 3 classes of training" in printed
    (tmp_path / "renditions/cat").rename(tmp_path / "renditions/eel")
    status, _, problems = check(capsys, *image_flags(root, **ood))
    assert status == 1 and "config.data lacks 1 of them: eel" in problems[0]


def multi30k(root, *, pictures=True):
    for split, language in itertools.product(("train", "val", "test_2016_flickr"), LINES):
        (root / "raw").mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in LINES[language])
        (root / f"raw/{split}.{language}").write_text(text)
        (root / "image_splits").mkdir(exist_ok=True)
        names = [f"{split}_{i}.jpg" for i in range(3)]
        (root / f"image_splits/{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for number, name in enumerate(names if pictures else ()):
            draw(root / "images" / name, number)
    return [
        f"--config.data.path={root}",
        "--config.recipes.caption.optim.batch=3",
        "--config.recipes.caption.optim.accumulate=1",
        "--config.recipes.translate.optim.batch=3",
        "--config.recipes.translate.optim.accumulate=1",
    ]


def test_sentences_and_pictures_are_counted(tmp_path, capsys):
    flags = multi30k(tmp_path)
    (tmp_path / "raw/val.de").write_text("ein Hund\n\nein rotes Auto\n")
    status, printed, _ = check(capsys, SENTENCES, *flags)
    assert status == 0, printed
    assert "en: 3 lines, 0 of them empty" in printed
    assert "de: 3 lines, 1 of them empty" in printed
    assert "3 pictures, 0 of them missing" in printed and "24 x 24 (3)" in printed


def test_every_problem_of_a_corpus_is_reported(tmp_path, capsys):
    flags = multi30k(tmp_path)
    (tmp_path / "images/train_1.jpg").unlink()
    (tmp_path / "images/train_2.jpg").write_bytes(b"")
    (tmp_path / "raw/val.de").write_bytes(b"ein Hund\nzwei M\xe4nner\nein rotes Auto\n")
    (tmp_path / "raw/test_2016_flickr.de").write_text("ein Hund\n")
    status, printed, problems = check(capsys, SENTENCES, *flags)
    assert status == 1 and "3 pictures, 1 of them missing" in printed
    text = "\n".join(problems)
    assert "multi30k train lacks 2 of 3 pictures" in text and "train_1.jpg" in text
    assert "raw/val.de, line 2 is not UTF-8" in text
    assert "raw/test_2016_flickr.de" in text and "image_splits/test_2016_flickr.txt" in text
    assert "different numbers of lines" in printed


def test_pictures_matter_only_for_stages_that_use_them(tmp_path, capsys):
    flags = multi30k(tmp_path, pictures=False)
    status, _, problems = check(capsys, SENTENCES, *flags)
    assert status == 1 and len(problems) == 3 and "has no images" in problems[0]
    translate = f"{SENTENCES}:stage=translate"
    batch = ["--config.optim.batch=3", "--config.optim.accumulate=1"]
    assert check(capsys, translate, flags[0], *batch)[0] == 0
    status, _, problems = check(capsys, translate, flags[0], "--config.optim.batch=4")
    assert status == 1 and "a batch of 4 is more than the 3 examples" in problems[0]


def test_further_tests_are_checked_too(tmp_path, capsys):
    flags = multi30k(tmp_path, pictures=False)
    stage = [f"{SENTENCES}:stage=translate", flags[0], "--config.optim.batch=3"]
    tests = "--config.data.further_tests=('val','mscoco')"
    status, printed, problems = check(capsys, *stage, "--config.optim.accumulate=1", tests)
    assert status == 1 and "val (config.data.further_tests)" in printed
    assert len(problems) == 2 and all("mscoco" in problem for problem in problems)


def pasted(printed):
    """The flags that the command prints for training."""
    _, found, flags = printed.partition("flags that train on ")
    assert found
    flags = flags.partition(":\n")[2].replace("\\\n", " ")
    return shlex.split(flags.partition("\n")[0])


def test_suggested_flags_train_on_own_images(tmp_path, capsys):
    (image_set(tmp_path / "set") / "train").rename(tmp_path / "whole")
    status, printed, _ = check(capsys, IMAGES, f"--config.data.path={tmp_path / 'whole'}")
    assert "--config.data.test_share=0.2" in pasted(printed)
    status, printed, problems = check(
        capsys, IMAGES, "--config.optim.batch=8", *pasted(printed), "--config.data.source=folder"
    )
    assert (status, problems) == (0, [])
    assert "12 images of 3 classes" in printed and "3 images of 3 classes" in printed


def test_unusable_own_images_are_explained(tmp_path, capsys):
    (tmp_path / "own.csv").write_text("path,label\na.png,\n")
    flags = [*image_flags(tmp_path / "own.csv"), "--config.data.source=folder"]
    assert "own.csv, line 2, column 'label' is empty" in check(capsys, *flags)[1]


def test_suggested_flags_train_on_own_sentences(tmp_path, capsys):
    rows = zip(*LINES.values(), ("train", "val", "test"), strict=True)
    lines = ("en\tde\tsplit", *("\t".join(row) for row in rows))
    (tmp_path / "own.tsv").write_text("".join(f"{line}\n" for line in lines))
    translate = f"{SENTENCES}:stage=translate,prefix=0"
    flags = [translate, "--config.optim.batch=1", "--config.optim.accumulate=1"]
    status, printed, _ = check(capsys, *flags, f"--config.data.path={tmp_path / 'own.tsv'}")
    assert status == 1
    status, printed, problems = check(capsys, *flags, *pasted(printed))
    assert (status, problems) == (0, []) and "en: 1 lines, 0 of them empty" in printed


def test_rows_of_unnamed_splits_are_reported(tmp_path, capsys):
    rows = ((f"train/{name}/0.png", name, "train") for name in ("ant", "bee", "cat"))
    root = image_set(tmp_path / "set")
    lines = ("path,label,split", *map(",".join, rows), "train/ant/1.png,ant,trian")
    (root / "own.csv").write_text("".join(f"{line}\n" for line in lines))
    flags = [*image_flags(root / "own.csv"), "--config.data.source=table"]
    assert "rows of splits that no field names: trian (1)\n" in check(capsys, *flags)[1]
    (root / "own.tsv").write_text("en\tde\tsplit\na\tb\ttrain\na\tb\ttrian\n")
    flags = [SENTENCES, "--config.data.source=table", f"--config.data.path={root / 'own.tsv'}"]
    assert "rows of splits that no field names: trian (1)\n" in check(capsys, *flags)[1]


def test_invalid_command_line_exits_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        check_data.main(["check_data.py", IMAGES, "--everything"])
    assert end.value.code == 2 and "everything" in capsys.readouterr().err


def test_only_lines_with_both_sentences_count_for_translation(tmp_path, capsys):
    rows = {"train": [("a", ""), ("", "b"), ("a", "b"), ("c", "d")], "val": [("a", ""), ("", "b")]}
    for split, pairs in rows.items():
        for place, language in enumerate(("en", "de")):
            text = "".join(f"{pair[place]}\n" for pair in pairs)
            (tmp_path / f"{split}.{language}").write_text(text)
    flags = [
        f"--config={ROOT}/configs/cliptrans/emoji.py:stage=translate,model=text_only",
        "--config.data.source=text",
        f"--config.data.path={tmp_path}",
        "--config.data.train_split=train",
        "--config.data.test_split=train",
        "--config.data.further_tests=()",
        "--config.languages=('en','de')",
        "--config.optim.batch=3",
    ]
    status, printed, problems = check(capsys, *flags)
    assert "note: config.data.test_split='train' is also the training split" in printed
    assert status == 1 and "en: 4 lines, 1 of them empty" in printed
    assert "en and de: 2 lines with both" in printed
    assert len(problems) == 2, problems
    assert "a batch of 3 is more than the 2 examples of" in problems[0]
    assert "has no line with both en and de" in problems[1]


def own_table(root, rows):
    """Flags for a pipeline on a table; `rows` are (split, en, de, whether it has a picture)."""
    lines = ["split\ten\tde\tpicture"]
    for number, (split, english, german, pictured) in enumerate(rows):
        name = f"{number}.png" if pictured else ""
        if pictured:
            draw(root / name, number)
        lines.append(f"{split}\t{english}\t{german}\t{name}")
    (root / "own.tsv").write_text("".join(f"{line}\n" for line in lines))
    return [
        f"--config={ROOT}/configs/cliptrans/emoji.py:stage=pipeline",
        "--config.data.source=table",
        f"--config.data.path={root / 'own.tsv'}",
        "--config.languages=('en','de')",
        "--config.data.train_split=train",
        "--config.data.further_tests=()",
        *(f"--config.recipes.{name}.optim.batch=4" for name in ("clip", "caption")),
        "--config.recipes.translate.optim.batch=8",
    ]


TESTED = [("val", "a", "b", True), ("test", "a", "b", True)]


def test_each_stage_is_judged_by_the_examples_that_it_reads(tmp_path, capsys):
    rows = [("train", f"a {n}", f"b {n}", n < 4) for n in range(8)]
    flags = own_table(tmp_path, [*rows, *TESTED])
    status, printed, _ = check(capsys, *flags)
    assert status == 0 and "  en: 8 lines, 0 of them empty" in printed
    assert "  en: 4 lines with a picture, 0 of them empty" in printed
    problems = check(capsys, *flags, "--config.recipes.clip.optim.batch=5")[2]
    assert len(problems) == 1
    assert "a batch of 5 is more than the 4 examples with a picture of table train" in problems[0]
    problems = check(capsys, *flags, "--config.recipes.translate.optim.batch=9")[2]
    assert len(problems) == 1 and "a batch of 9 is more than the 8 examples of" in problems[0]


def test_language_that_only_lines_without_pictures_have_is_named_as_such(tmp_path, capsys):
    rows = [("train", f"a {n}", "" if n < 4 else f"b {n}", n < 4) for n in range(12)]
    flags = own_table(tmp_path, [*rows, *TESTED])
    _, _, problems = check(capsys, *flags)
    assert len(problems) == 1
    assert "table train has no sentence in 'de' with a picture" in problems[0]
    flags[0] = flags[0].replace("pipeline", "caption")
    flags = [flag for flag in flags if ".recipes." not in flag]
    english = ["--config.all_languages=False", "--config.optim.batch=4"]
    assert check(capsys, *flags, *english)[0] == 0
    problems = check(capsys, *flags, "--config.all_languages=True", "--config.optim.batch=4")[2]
    assert len(problems) == 1 and "no sentence in 'de' with a picture" in problems[0]


def test_table_without_pictures_is_said_to_lack_these_alone(tmp_path, capsys):
    rows = [("train", f"a {n}", f"b {n}", False) for n in range(8)]
    flags = own_table(tmp_path, [*rows, *TESTED])
    problems = check(capsys, *flags)[2]
    assert len(problems) == 1
    assert "no row of split 'train' has a picture (column 'picture' is empty" in problems[0]


def test_table_that_cannot_be_read_is_one_problem(tmp_path, capsys, monkeypatch):
    flags = own_table(tmp_path, TESTED)
    closed = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "own.tsv"))
    monkeypatch.setattr(pathlib.Path, "read_bytes", mock.Mock(side_effect=closed))
    _, _, problems = check(capsys, *flags)
    assert len(problems) == 1 and "own.tsv' cannot be read (Permission denied)" in problems[0]
