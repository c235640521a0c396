"""The report: its inputs, the panels of a run's metrics, and the page."""

import base64
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from etils import epath
from matplotlib.axes import Axes
from PIL import Image

from common_jax.metrics import read_metrics
from common_jax.report import FAMILIES, Family, Shares, Table, panels, write_report
from common_jax.report.draw import overlay
from common_jax.report.gather import find_runs

WITH_SHARES = (
    *FAMILIES,
    Family("Entropy", "nats", r"train/moe/(.+)/entropy", 1.5),
    Shares("Load", r"train/moe/(.+)/load", item="expert", unit="tokens"),
)
LAYERS = ("stage_0/block_10", "stage_0/block_2", "stage_1/block_1")
HEAT_MAPS = {"Load at the end (% of tokens)", "Load over time"}


def training_line(step, *, experts=0):
    line = {"step": step, "epoch": step / 10, "train/loss": 2 / step, "train/skipped": 0}
    line |= {"train/learning_rate": 1e-3, "train/gradient_norm": 1.5, "train/label_loss": 1.0}
    for layer in LAYERS if experts else ():
        line[f"train/moe/{layer}/load"] = [1 / experts] * experts
        line[f"train/moe/{layer}/entropy"] = math.log(experts)
    return line


def write_run(folder, *, experts=0, steps=(20, 40), done=True):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [training_line(step, experts=experts) for step in steps]
    lines += [{"step": step, "epoch": 1.0, "test/accuracy": 0.5, "test/loss": 1} for step in steps]
    timing = [{"step": step, "examples_per_second": 800.0} for step in steps]
    for name, values in (("metrics.jsonl", lines), ("timing.jsonl", timing)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in values))
    config = {"optim": {"lr": 0.00012345, "betas": [0.9, 0.999]}, "note": "<i>&"}
    (folder / "config.json").write_text(json.dumps(config))
    if done:
        result = {"phase": "teaching", "steps": 440, "test/accuracy": 0.951234}
        (folder / "result.json").write_text(json.dumps(result))


def titles(lines):
    return [panel.title for panel in panels(lines, WITH_SHARES)]


def curves_of(lines, title):
    found = panels(lines, WITH_SHARES)
    return next(curves for panel, curves in found.items() if panel.title == title)


# Reading.


@pytest.mark.parametrize("cut", ['{"step": 3, "train/lo', '{"step": 3, "name": "caf\u00e9', "{"])
def test_last_line_cut_off_by_a_kill_is_ignored(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": NaN}\n{"step": 2}\n' + cut.encode()[:-1])
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2]
    assert math.isnan(lines[0]["a"])


def test_last_line_without_a_newline_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("broken", ['{"step": 2, "tr', "", "[1]", '{"epoch": 1}', '{"step": "2"}'])
@pytest.mark.parametrize("after", ['{"step": 3}\n', ""])
def test_other_broken_lines_are_refused_with_file_and_number(tmp_path, broken, after):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + broken + "\n" + after)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(path)


def test_broken_result_is_refused_by_name(tmp_path):
    write_run(tmp_path)
    (tmp_path / "result.json").write_text('{"steps": ')
    with pytest.raises(ValueError, match=r"result\.json"):
        write_report(tmp_path, title="t")


# Panels.


def test_run_without_shares_has_no_heat_maps():
    found = titles([training_line(20), training_line(40)])
    assert found == ["Loss", "Learning rate", "Gradient norm"]


def test_heat_map_layers_are_in_natural_order():
    lines = [training_line(20, experts=4), training_line(40, experts=4)]
    assert set(titles(lines)) >= HEAT_MAPS | {"Entropy"}
    layers = ["stage_0/block_2", "stage_0/block_10", "stage_1/block_1"]
    for title in (*HEAT_MAPS, "Entropy"):
        assert list(curves_of(lines, title)) == layers
    assert curves_of(lines, "Load over time")[layers[0]][40] == [0.25] * 4


def test_lists_outside_any_family_are_not_drawn():
    lines = [training_line(20, experts=4), training_line(40, experts=4)]
    assert not {panel.title for panel in panels(lines)} & HEAT_MAPS


def test_shares_over_time_need_two_lines():
    assert set(titles([training_line(20, experts=4)])) & HEAT_MAPS == {min(HEAT_MAPS)}


def test_train_and_test_losses_share_a_panel():
    lines = [training_line(20), {"step": 20, "test/loss": 0.5, "test/accuracy": 0.9}]
    assert set(curves_of(lines, "Loss")) == {"train/loss", "train/label_loss", "test/loss"}
    assert curves_of(lines, "Accuracy") == {"test/accuracy": {20: 0.9}}


def test_metric_without_a_family_gets_its_own_panel():
    lines = [{"step": 1, "test/bleu_score": 20.0, "valid/bleu_score": 21.0, "odd": 3}]
    assert curves_of(lines, "bleu score") == {"test": {1: 20.0}, "valid": {1: 21.0}}
    assert curves_of(lines, "odd") == {"": {1: 3}}


def test_skipped_steps_are_drawn_only_if_there_are_any():
    assert "Skipped steps" not in titles([training_line(20)])
    assert "Skipped steps" in titles([training_line(20), {"step": 40, "train/skipped": 2}])


def test_duplicate_steps_keep_the_later_line():
    lines = [{"step": step, "test/loss": loss} for step, loss in ((20, 3.0), (40, 2.0), (20, 1.0))]
    assert list(curves_of(lines, "Loss")["test/loss"].items()) == [(20, 1.0), (40, 2.0)]


def test_step_counters_are_not_drawn():
    line = {"step": 20, "epoch": 2.0, "train/skipped_in_row": 1, "milliseconds_per_step": 5.0}
    assert titles([line | {"examples_per_second": 800.0}]) == ["Throughput"]
    assert titles([line]) == []


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of one method of matplotlib's axes, call by call."""

    def watch(method):
        calls, original = [], getattr(Axes, method)

        def watched(self, *args, **settings):
            calls.append([np.asarray(x, float) for x in args if not isinstance(x, str)])
            return original(self, *args, **settings)

        monkeypatch.setattr(Axes, method, watched)
        return calls

    return watch


def test_heat_maps_show_shares_relative_to_the_fair_share(tmp_path, drawn):
    calls = drawn("pcolorfast")
    loads = {3: [0.5, 0.3, 0.2, 0.0], 7: [0.25, 0.05, 0.1, 0.6]}
    lines = [{"step": step, "train/moe/a/load": load} for step, load in loads.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page_of(tmp_path, families=WITH_SHARES)
    (x, _, last), (time, y, cells) = calls
    np.testing.assert_allclose(last, [[1, 0.25, 0.4, 2.4]])  # at least a quarter
    np.testing.assert_allclose(x, [-0.5, 0.5, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(cells, [[2, 1], [1.2, 0.25], [0.8, 0.4], [0.25, 2.4]])
    np.testing.assert_allclose(time, [-1, 3, 7])  # the columns end at the steps
    np.testing.assert_allclose(y, [-0.5, -0.25, 0, 0.25, 0.5])


def test_overlay_draws_means_and_a_band_over_common_steps(tmp_path, drawn):
    plots, bands = drawn("plot"), drawn("fill_between")
    curves = [[(20, 0.5), (40, 0.7), (60, 0.9)], [(40, 0.1), (20, 0.4)], [(20, 0.3), (40, 1.0)]]
    overlay({"a": curves}, label="accuracy", path=tmp_path / "x.png")
    (steps, low, high), (thin, values), (bold, means) = bands[0], plots[1], plots[-1]
    np.testing.assert_allclose((steps, low, high), ([20, 40], [0.3, 0.1], [0.5, 1.0]))
    np.testing.assert_allclose((thin, values), ([20, 40], [0.4, 0.1]))
    np.testing.assert_allclose((bold, means), ([20, 40], [0.4, 0.6]))


def test_infinite_values_become_gaps():
    curve = curves_of([{"step": 1, "test/loss": math.inf}], "Loss")["test/loss"]
    assert math.isnan(curve[1])


# The page.


def page_of(workdir, **settings):
    path = write_report(workdir, title="A <title>", **settings)
    assert path == workdir / "report.html"
    return path.read_text()


def test_runs_are_listed_in_natural_order(tmp_path):
    names = ["meta", "seed_2/student_0", "seed_10/student_0", "seed_10/student_10"]
    for name in reversed(names):
        write_run(tmp_path / name)
    write_run(tmp_path / "meta/checkpoints/20")
    page = page_of(tmp_path)
    headings = re.findall(r'<section id="(run-\d+)"><h2>(.*?)</h2>', page)
    assert [re.sub("<.*?>", "", heading) for _, heading in headings] == names
    for anchor, heading in headings:
        assert f'<li><a href="#{anchor}">{heading}</a></li>' in page
    for name in names:
        with Image.open(tmp_path / name / "plots" / "curves.png") as image:
            assert image.format == "PNG"
            assert image.width > 1000


def test_symlinked_runs_are_found_once(tmp_path):
    top = tmp_path / "top"
    write_run(top / "run")
    write_run(tmp_path / "elsewhere/run")
    write_run(tmp_path / "data/run")
    for name, target in (
        ("latest", top),
        ("best", top / "run"),
        ("other", tmp_path / "elsewhere/run"),
        ("set", tmp_path / "data"),
    ):
        (top / name).symlink_to(target)
    assert [run.name for run in find_runs(epath.Path(top))] == ["run", "other"]
    (tmp_path / "link").symlink_to(top)
    assert len(find_runs(epath.Path(tmp_path / "link"))) == 2


def test_page_has_all_its_parts_and_is_self_contained(tmp_path):
    write_run(tmp_path / "run")
    picture = tmp_path / "picture.png"
    overlay({"a": [[(1, 0.5)]]}, label="accuracy", path=picture)
    table = Table("Accuracy & more", ("student", "m2mKD"), (("V-MoE <S>", "0.95 ± 0.01"),))
    page = page_of(tmp_path, table=table, figures=[("Two & two", picture)])
    for text in ("A &lt;title&gt;", "Accuracy &amp; more", "<td>V-MoE &lt;S&gt;</td>"):
        assert text in page
    for text in ("<td>0.95 ± 0.01</td>", "teaching", "steps 440", "test/accuracy 0.9512"):
        assert text in page
    for text in ("optim.lr", "<td>0.00012345</td>", "optim.betas", "&lt;i&gt;&amp;", "<details>"):
        assert text in page
    assert page.index("V-MoE") < page.index("Two &amp; two") < page.index("teaching")
    sources = re.findall(r'src="data:image/png;base64,(.*?)"', page)
    plots = (picture, tmp_path / "run/plots/curves.png")
    assert [base64.b64decode(source) for source in sources] == [x.read_bytes() for x in plots]
    assert not re.search(r"https?:|url\(|@import|<link|<script", page)


def test_further_tables_have_their_own_headings_and_pictures(tmp_path):
    write_run(tmp_path / "run")
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "png")
    pictures = Table("Seen & said", ("picture", "text"), ((file.getvalue(), "<b>"), ("", "two")))
    further = (pictures, Table("Last", ("a",), (("c",),)))
    page = page_of(tmp_path, table=Table("", ("first",), (("b",),)), tables=further)
    sections = re.findall(r'<section id="(table.*?)"><h2>(.*?)</h2>', page)
    headings = [(anchor, re.sub("<.*?>", "", heading)) for anchor, heading in sections]
    assert headings == [("table", "Results"), ("table-0", "Seen &amp; said"), ("table-1", "Last")]
    assert all(f'<a href="#{anchor}">' in page for anchor, _ in headings)
    cell = re.search(r'<td><img alt="picture, row 1" src="data:image/png;base64,(.*?)"></td>', page)
    assert base64.b64decode(cell[1]) == file.getvalue()
    assert "<td>&lt;b&gt;</td>" in page
    assert "<td></td><td>two</td>" in page
    assert "td img { height" in page


def test_table_row_shorter_than_its_header_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        page_of(tmp_path, table=Table("", ("a", "b"), (("c",),)))


def test_page_closes_every_tag(tmp_path):
    class Tags(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    write_run(tmp_path / "run")
    tags = Tags()
    table = Table("", ("a",), (("b",),))
    tags.feed(page_of(tmp_path, table=table, tables=[Table("c", ("a",), ((b"png",),))]))
    assert tags.open == []


def test_report_is_reproducible_byte_for_byte(tmp_path):
    write_run(tmp_path, experts=4)  # the folder itself is a run
    pages = []
    for _ in range(2):
        page = write_report(tmp_path, title="t", families=WITH_SHARES).read_bytes()
        pages.append((page, (tmp_path / "plots/curves.png").read_bytes()))
    assert pages[0] == pages[1]


def test_run_that_has_just_begun_is_listed(tmp_path):
    write_run(tmp_path / "running", done=False)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/metrics.jsonl").write_text("")
    page = page_of(tmp_path)
    assert page.count("no metrics yet") == 1
    assert "not finished: last line at step 40" in page
    assert not (tmp_path / "new/plots").exists()


def test_report_says_if_there_are_no_runs(tmp_path):
    assert "No folder here holds metrics.jsonl" in page_of(tmp_path)


@pytest.mark.filterwarnings("error")
def test_unusual_metrics_are_drawn(tmp_path):
    lines = [
        {"step": 7, "test/$loss_{": float("nan"), "test/$a^": -1.0, "train/loss": 0.0},
        {"step": 7, "train/moe/only$/load": [0.0, 1.0]},
        {"step": 9, "train/moe/only$/load": [0.0, float("nan")]},
        {"step": 9, "train/moe/late/load": [1.0, 0.0, 0.0]},
        {"step": 9, "train/histogram": [1, 2], "test/x": float("inf")},
    ]
    lines += [{"step": 9, f"test/loss_{term}": 10.0**-term} for term in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Load over time" in page_of(tmp_path, families=WITH_SHARES)


# The comparison.


@pytest.mark.filterwarnings("error")
def test_overlay_draws_seeds_of_different_lengths(tmp_path):
    seeds = [[(20, 0.5), (40, 0.7), (60, 0.8)], [(40, 0.6), (20, 0.4)], [(20, 0.3), (40, 0.9)]]
    path = tmp_path / "overlay.png"
    overlay({"scratch $": seeds, "m2mKD": [[(20, 0.9)]]}, label="accuracy", path=path)
    drawn = path.read_bytes()
    overlay({"scratch $": seeds[:2], "m2mKD": [[(20, 0.9)]]}, label="accuracy", path=path)
    assert path.read_bytes() != drawn
    overlay({"apart": [[(1, 0.5)], [(2, 0.5)]]}, label="accuracy", path=path)
    with Image.open(path) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("members", [[], [[]], [[(1, 0.5)], []]])
def test_overlay_refuses_a_group_without_points(tmp_path, members):
    with pytest.raises(ValueError, match="group 'from scratch'"):
        overlay({"from scratch": members}, label="accuracy", path=tmp_path / "x.png")
