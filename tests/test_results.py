"""The numbers in README.md and docs/results.md are those of the runs that they report."""

import functools
import json
import pathlib
import re
import statistics

import pytest
import table_data

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "results.md")
# Data of a table, by the first title in its header.
DATA = {
    "accuracy on digits": "digits.json",
    "a NAC, 500 images a class": "cifar10_nac.json",
    "a NAC, all images": "cifar10_nac_all.json",
    "a NAC, 100 images a class": "cifar10_nac_fiftieth.json",
    "CIFAR-10, 500 images a class": "cifar10_tenth.json",
    "CIFAR-10, all images, three seeds": "cifar10_all.json",
    "CIFAR-10, 100 images a class, three seeds": "cifar10_fiftieth.json",
    "emoji, English to German": "emoji.json",
    "teacher: DINOv2-S": "cifar10_dinov2.json",
    "two small teachers, a and b": "cifar10_two_teachers.json",
    "text tower": "emoji_text_tower.json",
    "Multi30k, texts alone": "multi30k_tiny.json",
    "Multi30k, English to German, from scratch": "multi30k_text_recon.json",
}
# Translations of a test set, and their number.
TRANSLATIONS = {f"multi30k_tiny_{run}.tsv": 1000 for run in ("de_0", "de_1", "fr_0")}
# Tables whose runs are gone, which move to DATA once they are measured again, and those that
# tools/parity.py prints.
WITHOUT_DATA = (
    "CIFAR-10, all images",
    "CIFAR-10, 100 images a class",
    "found among 64, new words (validation set)",
    "exact",
    "case, ViT and V-MoE",
    "case, CLIPTrans",
)
VERDICTS = ("holds", "does not hold", "not testable here")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
CELL = re.compile(r"(-?[\d,]+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?(?: %)?")

Table = list[list[str]]  # the header, then the rows


def tables(page: pathlib.Path) -> list[Table]:
    found, rows = [], []
    for line in [*page.read_text().splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def title(table: Table) -> str:
    return next(cell for cell in table[0] if cell)


def results(page: pathlib.Path) -> list[Table]:
    """A page's tables with a number in some cell, whatever follows the number."""
    return [
        table
        for table in tables(page)
        if any(re.match(r"-?\d", cell) for row in table[1:] for cell in row[1:])
        and title(table) != "claim"
    ]


def differences(table: Table, data: dict) -> list[str]:
    """The cells of a table that are not the mean (with the deviation, if there are several values)
    of its data."""
    titles = [column["title"] for column in data["columns"]]
    if table[0][1:] != titles:
        return [f"the columns are {table[0][1:]} and not {titles}"]
    if [row[0] for row in table[1:]] != list(data["values"]):
        return [f"the rows are {[row[0] for row in table[1:]]} and not {list(data['values'])}"]
    return [
        f"{row[0]}, {column['title']}: {cell!r} and not {values}"
        for row in table[1:]
        for column, cell, values in zip(
            data["columns"], row[1:], data["values"][row[0]], strict=True
        )
        if "file" in column and not shows(cell, values)
    ]


def shows(cell: str, values: list[float]) -> bool:
    match = CELL.fullmatch(cell)
    if match is None or not values:
        return cell == "" and not values
    mean, deviation = match.groups()
    places = len(mean.partition(".")[2])
    if mean.replace(",", "") != f"{statistics.mean(values):.{places}f}":
        return False
    wanted = f"{statistics.stdev(values):.{places}f}" if len(values) > 1 else None
    return deviation == wanted


@functools.cache
def read(name: str) -> dict:
    return json.loads((DOCS / "data" / name).read_text())


def test_every_results_table_has_data_or_is_listed_without():
    found = [[title(table) for table in results(page)] for page in PAGES]
    for titles in found:
        assert len(set(titles)) == len(titles)
    assert {name for titles in found for name in titles} == {*DATA, *WITHOUT_DATA}
    assert not set(DATA) & set(WITHOUT_DATA)
    assert {path.name for path in (DOCS / "data").iterdir()} == {*DATA.values(), *TRANSLATIONS}


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_translations_are_complete(name):
    header, *lines = (DOCS / "data" / name).read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    assert header == "key\toutput" and len(lines) == TRANSLATIONS[name]
    assert all(len(row) == 2 and all(row) for row in cells)
    assert len({key for key, _ in cells}) == len(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_match_their_data(page):
    with_data = [table for table in results(page) if title(table) in DATA]
    assert with_data
    for table in with_data:
        assert differences(table, read(DATA[title(table)])) == []


@pytest.mark.parametrize("name", DATA.values())
def test_data_files_are_as_the_tool_writes_them(name):
    data = read(name)
    assert (DOCS / "data" / name).read_text() == table_data.dump(data)
    assert list(data["values"]) == list(data["rows"])
    for row, values in data["values"].items():
        counts = {len(one) for one in values}
        assert len(values) == len(data["columns"]) and counts <= {0, len(data["rows"][row])}


def test_differing_cell_is_reported():
    columns = [{"title": "BLEU", "file": "scores.json", "key": "bleu"}, {"title": "hours"}]
    data = {"columns": columns, "values": {"a": [[1234.56, 1235.56], []], "b": [[0.5], []]}}
    table = [["x", "BLEU", "hours"], ["a", "1,235.1 ± 0.7 %", "3"], ["b", "0.5", ""]]
    assert differences(table, data) == []
    for place, cell in (((1, 1), "1,235.2 ± 0.7"), ((1, 1), "1,235.1 ± 0.5"), ((2, 1), "")):
        changed = [list(row) for row in table]
        changed[place[0]][place[1]] = cell
        assert len(differences(changed, data)) == 1
    assert not shows("1,235.1", [1234.56, 1235.56]) and not shows("0.5 ± 0.1", [0.5])
    assert "rows" in differences(table[:2], data)[0]
    assert "columns" in differences([["x", "chrF", "hours"], *table[1:]], data)[0]


def test_tool_reads_the_values_of_runs(tmp_path):
    for seed, accuracy in ((0, 0.25), (1, 0.75)):
        run = tmp_path / f"a_{seed}"
        run.mkdir()
        lines = [
            {"step": 4, "epoch": 2.0, "test/accuracy": accuracy / 2},
            {"step": 6, "epoch": 3.0},
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "result.json").write_text(json.dumps({"test/accuracy": accuracy}))
    early = {"title": "early", "file": "metrics.jsonl", "key": "test/accuracy", "epoch": 2}
    end = {"title": "end", "file": "result.json", "key": "test/accuracy", "times": 100}
    none = {"title": "OOD", "file": "result.json", "key": "ood/accuracy"}
    data = {"rows": {"a": ["a_0", "a_1"]}, "columns": [early, end, none, {"title": "hours"}]}
    file = tmp_path / "data.json"
    file.write_text(json.dumps(data))
    table_data.main([str(file), str(tmp_path)])
    assert json.loads(file.read_text()) == data | {
        "values": {"a": [[0.125, 0.375], [25, 75], [], []]}
    }
    with pytest.raises(FileNotFoundError, match=r"row 'a' needs \['.*a_2'\]"):
        table_data.collect(data | {"rows": {"a": ["a_0", "a_2"]}}, tmp_path)
    (tmp_path / "a_1" / "result.json").write_text('{"test/accuracy": null}')
    with pytest.raises(ValueError, match=r"a_1/result\.json has 'test/accuracy': None, which"):
        table_data.collect(data, tmp_path)
    (tmp_path / "a_1" / "result.json").unlink()
    with pytest.raises(ValueError, match=r"row 'a': other runs .* in result\.json, .*\['.*a_1'\];"):
        table_data.collect(data, tmp_path)


@pytest.mark.parametrize("damaged", ["data.json", "a/result.json", "a/metrics.jsonl"])
def test_tool_names_a_damaged_or_missing_file(tmp_path, capsys, damaged):
    columns = [
        {"title": "end", "file": "result.json", "key": "test/accuracy"},
        {"title": "early", "file": "metrics.jsonl", "key": "loss", "epoch": 2},
    ]
    (tmp_path / "a").mkdir()
    file = tmp_path / "data.json"
    file.write_text(json.dumps({"rows": {"a": ["a"]}, "columns": columns}))
    (tmp_path / "a" / "result.json").write_text('{"test/accuracy": 0.5}')
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "epoch": 2, "loss": 1.0}\n')
    table_data.main([str(file), str(tmp_path)])
    whole = (tmp_path / damaged).read_text()
    (tmp_path / damaged).write_text(whole[:12] + "\n")
    before = file.read_text()
    for name in (damaged, "missing.json"):
        with pytest.raises(SystemExit) as end:
            table_data.main([str(file if name == damaged else tmp_path / name), str(tmp_path)])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(tmp_path / name) in error
        assert file.read_text() == before


# The page's first table.


def section(link: str) -> str:
    """The text of the section that a link in docs/results.md points to."""
    file, _, anchor = link.partition("#")
    text = (DOCS / (file or "results.md")).read_text()
    parts = re.split(r"(?m)^#+ ", text)
    anchors = [re.sub(r"[^\w -]", "", part.partition("\n")[0]).lower() for part in parts]
    return parts[[one.replace(" ", "-") for one in anchors].index(anchor)] if anchor else text


def test_results_begin_with_claims_and_verdicts():
    claims = tables(DOCS / "results.md")[0]
    assert claims[0] == ["claim", "paper", "here, small scale", "verdict"]
    for claim, _, here, verdict in claims[1:]:
        link = re.search(r"\]\(([^)]+)\)", claim)
        assert link and verdict in VERDICTS, claim
        missing = set(NUMBER.findall(here)) - set(NUMBER.findall(section(link[1])))
        assert not missing, f"{claim}: its section has no {missing}"
    assert {row[3] for row in claims[1:]} == set(VERDICTS)
