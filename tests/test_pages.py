"""The tables of README.md and reference/*.md against the stored results they were made from.

A table says in a comment before it where its numbers are: `<!-- stored: PATH[, PATH...] -->`, from
reference/. Pages are written by hand: a figure that was mistyped, or left over from an older run,
is only found by reading both. Labels are compared by their words, without what is in parentheses;
`NAMES` has those that differ. A cell must be, rounded to the decimals that it shows, a stored value
with its interval: one whose row, column, part and file have all words of the cell's labels that are
stored at all, and no more others than need be.
"""

import json
import re
from collections import namedtuple
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "reference"
PAGES = sorted(REFERENCE.glob("*.md"))
NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"
CELL = re.compile(rf"{NUMBER}(?: \[{NUMBER}, {NUMBER}\])?(?: ± {NUMBER})?")
NAMES = {"the policy": "grpo_policy", "expert": "parent_scale", "known graph": "cbo_known_graph"}
Table = namedtuple("Table", "comment part header rows")  # part: the heading or bold line above it


def tables_of(text: str) -> list[Table]:
    tables, comment, part, inside = [], "", "", False
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
        if line.startswith("|") and not inside:
            tables.append(Table(comment, part, cells, []))
            comment = ""
        elif line.startswith("|") and set(line) - set("|-: "):
            tables[-1].rows.append(cells)
        elif line and not line.startswith("|"):
            comment = line[4:-3].strip() if line.startswith("<!--") else ""
            part = line.strip("#* ") if re.fullmatch(r"#+ .*|\*\*.*\*\*", line) else part
        inside = line.startswith("|")
    return tables


def words(label: str) -> set[str]:
    """The words of a label; numbers of variables and of experiments are written in many ways."""
    label = re.sub(r" ?\([^)]*\)|[*`]", "", label)
    label = re.sub(r"\bd ?= ?(\d+)", r"\1 variables", label)
    label = re.sub(r"\b(?:(?:regret|share)@|t = )(\d+)", r"after \1", label)
    return {word.strip() for word in re.split(r", |: |/", label)} - {""}


def stored_in(path: str) -> list[tuple[set[str], tuple]]:
    """Words, and value, low, high and deviation, of all numbers in a list of records or tables."""
    text, found = (REFERENCE / path).read_text(), []
    for r in json.loads(text) if path.endswith(".json") else ():
        named = words(path).union(*(words(r[k]) for k in ("table", "task", "method", "metric")))
        found.append((named, (r["value"], r["low"], r["high"], None)))
        found.append((named | {"n"}, (r["n"], None, None, None)))
    text = re.sub(r"(\d+)%(?= *\|)", lambda share: str(int(share[1]) / 100), text)
    for table in tables_of(text) if path.endswith(".md") else ():
        for row in table.rows:
            place = [path, table.part, row[0], *(c for c in row[1:] if not CELL.fullmatch(c))]
            for title, cell in zip(table.header[1:], row[1:], strict=True):
                if match := CELL.fullmatch(cell):
                    found.append((words(title).union(*map(words, place)), match.groups()))
    return found


def agrees(shown: str | None, stored: str | float | None) -> bool:
    """Whether `shown`, if anything, is `stored` rounded; either neighbour if half-way between."""
    if shown is None or stored is None:
        return shown is None
    decimals = len(shown.partition(".")[2])
    return abs(float(shown) - float(stored)) <= 0.5 * 10**-decimals + 1e-9


def differences(table: Table) -> list[str]:
    """Cells that are not what the stored files have, and rows that no stored row is called."""
    paths = table.comment.removeprefix("stored:").split(",")
    stored = [number for path in paths for number in stored_in(path.strip())]
    known, wrong = set().union(*(named for named, _ in stored)), []

    def wanted(label):
        return known & {word if word in known else NAMES.get(word) for word in words(label)}

    corner = wanted(table.header[0])
    for row in table.rows:
        if not wanted(row[0]):
            wrong.append(f"no stored row is called: {row[0]}")
        for title, cell in zip(table.header[1:], row[1:], strict=True):
            need, match = wanted(row[0]) | wanted(title) | corner, CELL.fullmatch(cell)
            near = [(len(named), values) for named, values in stored if need <= named]
            least = min((size for size, _ in near), default=0)
            nearest = [values for size, values in near if match and size == least]
            fits = any(all(map(agrees, match.groups(), values)) for values in nearest)
            if re.fullmatch(r"[-+\d.,e±[\] ]+", cell) and not fits:
                wrong.append(f"{row[0]} | {title}: {cell}")
    return wrong


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_tables_show_what_is_stored(page):
    """Tables with intervals must say where their numbers are; README.md's not yet."""
    for table in tables_of(page.read_text()):
        if table.comment.startswith("stored:"):
            assert differences(table) == []
        elif page in PAGES and not table.comment.startswith("not stored:"):
            cells = [cell for row in table.rows for cell in row if CELL.fullmatch(cell)]
            assert not any("[" in cell for cell in cells), table.header


def test_altered_figures_are_reported():
    """Every figure of a page with its last digit changed: the comparison is able to fail."""
    other = {str(digit): str((digit + 5) % 10) for digit in range(10)}
    tables = tables_of((REFERENCE / "protocol.md").read_text())
    tables = [table for table in tables if table.comment.startswith("stored:")]
    assert tables
    for table in tables:
        pattern = r"^([-+.\d]*)(\d)(?=$| \[)"
        rows = [[re.sub(pattern, lambda m: m[1] + other[m[2]], c) for c in r] for r in table.rows]
        figures = [cell for row in rows for cell in row[1:] if CELL.fullmatch(cell)]
        found = differences(table._replace(rows=rows))
        assert figures and [wrong.rpartition(": ")[2] for wrong in found] == figures


def test_every_stored_file_is_in_the_index_and_every_link_leads_to_a_file():
    files = {p.relative_to(REFERENCE).as_posix() for p in REFERENCE.rglob("*") if p.is_file()}
    links = {p.stem: set(re.findall(r"\]\(([^)#:]+)\)", p.read_text())) for p in PAGES}
    assert files - links["index"] == {"index.md"}
    assert set().union(*links.values()) <= files
