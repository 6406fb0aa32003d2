"""The tables of README.md and of reference/*.md against the stored results that they were made from.

A table says in a comment before it where its numbers are: `<!-- stored: PATH[, PATH...] -->`, from
reference/. Pages are written by hand, so a figure that was mistyped, or left behind by a newer run,
is only found by reading both. A label of a page names a stored one if the words are the same once
remarks in parentheses are left out; `NAMES` has those that differ. A cell must agree, rounded to the
decimals it shows, with a stored value (and interval) that carries all stored labels among its own.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "reference"
PAGES = sorted(REFERENCE.glob("*.md"))
NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"
CELL = re.compile(rf"{NUMBER}(?: \[{NUMBER}, {NUMBER}\])?")  # `v` or `v [low, high]`
STORED_CELL = re.compile(CELL.pattern + rf"(%?)(?: ± {NUMBER})?")  # also `v ± deviation` and `30%`
NAMES = {
    "the policy": ("grpo_policy",),
    "expert": ("parent_scale",),
    "known graph": ("cbo_known_graph",),
    "nonlinear": ("fourier",),
    "easier problems": ("narrow",),
    "scale-free": ("scale_free",),
    "demonstrations": ("demos",),
    "small above f_test": ("small", "f_test", "F1 below acbo's"),
    "hour above f_test": ("hour", "f_test", "F1 below acbo's"),
}


class Table(NamedTuple):
    """A table, the text of the comment before it and the headings it stands under."""

    comment: str
    part: str
    header: list[str]
    rows: list[list[str]]


class Stored(NamedTuple):
    """A stored number with everything that says what it is."""

    labels: set[str]
    values: tuple[float | None, ...]


def tables_of(text: str) -> list[Table]:
    """The tables of a Markdown text; a heading or a bold line on its own is the part below it."""
    tables, comment, part, open_table = [], "", "", False
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
            if not open_table:
                tables.append(Table(comment, part, cells, []))
            elif set(line) - set("|-: "):
                tables[-1].rows.append(cells)
        elif line.strip():
            comment = line[4:-3].strip() if line.startswith("<!--") else ""
            if found := re.fullmatch(r"(?:#+ (.*)|\*\*(.*)\*\*)", line):
                part = found[1] or found[2]
        open_table = line.startswith("|")
    return tables


def labels(text: str) -> set[str]:
    """The names in a heading or a label; sizes and numbers of experiments are written in many ways."""
    text = re.sub(r" ?\([^)]*\)|[*`]", "", text)
    text = re.sub(r"\bd ?= ?(\d+)", r"\1 variables", text)
    text = re.sub(r"\b(?:(?:regret|share)@|t = )(\d+)", r"after \1", text)
    return {word.strip() for word in re.split(r", |/", text)} - {""}


def stored_in(path: str) -> list[Stored]:
    """All numbers of a stored file: a list of records, or tables as `lib.metrics.render` has them."""
    text, place, found = (REFERENCE / path).read_text(), labels(path), []
    if path.endswith(".json"):
        for r in json.loads(text):
            named = place.union(*(labels(r[key]) for key in ("table", "task", "method", "metric")))
            found.append(Stored(named, (r["value"], r["low"], r["high"])))
            found.append(Stored(named | {"n"}, (r["n"], None, None)))
        return found
    for table in tables_of(text):
        for row in table.rows:
            named = [cell for i, cell in enumerate(row) if not i or not STORED_CELL.fullmatch(cell)]
            for title, cell in zip(table.header[1:], row[1:], strict=True):
                if match := STORED_CELL.fullmatch(cell):
                    share = 0.01 if match[4] else 1.0
                    values = tuple(None if v is None else share * float(v) for v in match.groups()[:3])
                    all_labels = place.union(labels(table.part), labels(title), *map(labels, named))
                    found.append(Stored(all_labels, values))
    return found


def agrees(shown: str | None, stored: float | None) -> bool:
    """Whether `shown` is `stored` rounded; no interval need be shown, but one that is shown must be stored."""
    if shown is None or stored is None:
        return shown is None
    decimals = len(shown.partition(".")[2])
    return abs(float(shown) - stored) <= 0.5 * 10**-decimals + 1e-9  # of a tie, either neighbour


def differences(table: Table) -> list[str]:
    """The cells of a table that are not what its stored files have, and rows that name nothing there."""
    stored = [number for path in table.comment[len("stored:") :].split(",") for number in stored_in(path.strip())]
    known = set().union(*(number.labels for number in stored))

    def wanted(text):
        return {name for word in labels(text) for name in ((word,) if word in known else NAMES.get(word, ())) if name in known}

    wrong = [] if stored else ["nothing is stored"]
    for row in table.rows:
        if not wanted(row[0]):
            wrong.append(f"no stored row is called '{row[0]}'")
        for title, cell in zip(table.header[1:], row[1:], strict=True):
            match = CELL.fullmatch(cell)
            need = wanted(row[0]) | wanted(title) | wanted(table.header[0])
            if match and not any(need <= s.labels and all(map(agrees, match.groups(), s.values)) for s in stored):
                wrong.append(f"{row[0]} | {title}: {cell}")
    return wrong


def checked(page: Path) -> list[Table]:
    return [table for table in tables_of(page.read_text()) if table.comment.startswith("stored:")]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_tables_show_what_is_stored(page):
    assert [wrong for table in checked(page) for wrong in differences(table)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_table_with_intervals_says_where_its_numbers_are(page):
    for table in tables_of(page.read_text()):
        if any(" [" in cell and CELL.fullmatch(cell) for row in table.rows for cell in row):
            assert table.comment.startswith(("stored:", "not stored:")), table.header


def test_a_figure_that_was_altered_is_reported():
    """The comparison can fail: otherwise the test above would say nothing."""
    page = REFERENCE / "protocol.md"
    assert checked(page)
    for table in checked(page):
        for i, row in enumerate(table.rows):
            j = next(j for j, cell in enumerate(row) if j and CELL.fullmatch(cell))
            other = re.sub(r"(\d)(?=\D*$)", lambda digit: str((int(digit[1]) + 5) % 10), row[j].split(" [")[0])
            altered = [*row[:j], other + row[j][len(other) :], *row[j + 1 :]]
            rows = [*table.rows[:i], altered, *table.rows[i + 1 :]]
            assert differences(table._replace(rows=rows)) == [f"{row[0]} | {table.header[j]}: {altered[j]}"]


def test_every_stored_file_is_in_the_index():
    index = (REFERENCE / "index.md").read_text()
    files = {path.relative_to(REFERENCE).as_posix() for path in REFERENCE.rglob("*") if path.is_file()}
    assert {file for file in files - {"index.md"} if f"]({file})" not in index} == set()
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (REFERENCE / link).is_file(), f"{page.name}: {link}"
