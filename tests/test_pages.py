"""README.md and reference/*.md against the stored results and the files that they are about.

What shows figures, a table or a paragraph with decimals, says in a comment before it where they are
stored, as paths from reference/, or why they are not: `<!-- stored: PATH[, PATH...] -->`,
`<!-- not stored: WHY -->`. The comment of a paragraph goes on with the labels of its decimals in
order, `: LABEL; LABEL`, "-" for one that is not stored. A page without any stored result has
`<!-- not stored: WHY -->` as its first line. Pages are written by hand: a figure that was mistyped,
or left over from an older run, is only found by reading both. Labels are compared by their words,
without what is in parentheses; `NAMES` has those that differ. A figure must be, rounded to the
decimals that it shows, a stored value with its interval: one whose row, column, part and file have
all words of the figure's labels that are stored at all, and no more others than need be.
"""

import importlib
import json
import re
import runpy
from collections import namedtuple
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

from lib.system import TrainedACBOSystem


ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "reference"
EXAMPLES = [ROOT / "examples" / name for name in ("experiments.csv", "bounds.csv")]
PAGES = [ROOT / "README.md", *sorted(REFERENCE.glob("*.md"))]
NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"
CELL = re.compile(rf"{NUMBER}(?: \[{NUMBER}, {NUMBER}\])?(?: ± {NUMBER})?")
FIGURE = re.compile(r"[-+\d.,e±[\] ]*\d[-+\d.,e±[\] ]*")
DECIMAL = re.compile(r"(?<![\w.,/-])[-+]?\d*\.\d+(?: \[[-+.\d]+, [-+.\d]+\])?")
NOT_TEXT = re.compile(r"`[^`]*`|\]\([^)]*\)|(?:arXiv|Python) [\d.]+")
NAMES = {
    "the policy": "grpo_policy",
    "expert": "parent_scale",
    "known graph": "cbo_known_graph",
    "seconds": "s",
}
PROSE = ["label", "figure"]  # the header of a paragraph's decimals as a table
Table = namedtuple("Table", "comment part header rows")  # part: the heading or bold line above it


def tables_of(text: str) -> list[Table]:
    """The tables of a page, and its paragraphs with decimals as tables of label and figure."""
    tables, comment, part = [], "", ""
    for block in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", text, flags=re.DOTALL).strip()):
        if block.startswith("<!--"):
            comment = " ".join(block[4:-3].split())
            continue
        if block.startswith("|"):
            rows = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in block.splitlines()]
            header, _, *rows = [[cell.strip() for cell in row] for row in rows]
            tables.append(Table(comment, part, header, rows))
        elif re.fullmatch(r"#+ .*|\*\*.*\*\*", block):
            part = block.strip("#* ")
        elif figures := DECIMAL.findall(NOT_TEXT.sub("", " ".join(block.split()))):
            stored, _, labels = comment.removeprefix("stored:").strip().partition(": ")
            named = list(zip(labels.split("; "), figures, strict=False))
            if comment.startswith("stored:"):
                comment = f"stored: {stored}" * (len(labels.split("; ")) == len(figures))
            tables.append(Table(comment, part, PROSE, [list(n) for n in named if n[0] != "-"]))
        comment = ""
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
    # what shipped/cases_<system>.md and shipped/field_<system>.txt end with
    system, last = Path(path).stem.partition("_")[2], text.strip().splitlines()[-1]
    counts = re.findall(r"(\d+) (right|refused|wrong|s)\b", last) if "cases" in path else []
    means = re.findall(r"(\w+) (-?[\d.]+)", last) if path.endswith(".txt") else []
    for value, title in (*counts, *(mean[::-1] for mean in means)):
        found.append(({system, title}, (value, None, None, None)))
    text = re.sub(r"(\d+)%(?= *\|)", lambda share: str(int(share[1]) / 100), text)
    for table in tables_of(text) if path.endswith(".md") else ():
        for row in table.rows if table.header != PROSE else ():
            place = [path, table.part, row[0], *(c for c in row[1:] if not CELL.fullmatch(c))]
            place += [
                f"d = {c}" for title, c in zip(table.header, row, strict=True) if title == "d"
            ]
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
        if not wanted(row[0]) and any(map(FIGURE.fullmatch, row[1:])):
            wrong.append(f"no stored row is called: {row[0]}")
        for title, cell in zip(table.header[1:], row[1:], strict=True):
            need, match = wanted(row[0]) | wanted(title) | corner, CELL.fullmatch(cell)
            near = [(len(named), values) for named, values in stored if need <= named]
            least = min((size for size, _ in near), default=0)
            nearest = [values for size, values in near if match and size == least]
            fits = any(all(map(agrees, match.groups(), values)) for values in nearest)
            if FIGURE.fullmatch(cell) and not fits:
                wrong.append(f"{row[0]} | {title}: {cell}")
    return wrong


def problems(text: str) -> list[str]:
    """Figures of a page that are not what is stored, and those that do not say where they are."""
    without, stored = text.startswith("<!-- not stored:"), "<!-- stored:" in text
    if without or not stored:
        return ["whether anything is stored"] if without == stored else []
    found = []
    for table in tables_of(text):
        if table.comment.startswith("stored:"):
            found += differences(table)
        elif not table.comment.startswith("not stored:"):
            figures = [cell for row in table.rows for cell in row[1:] if FIGURE.fullmatch(cell)]
            found += [f"no comment: {table.header}"] * (figures != [] or table.header == PROSE)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_show_what_is_stored(page):
    assert problems(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_altered_figures_and_comments_that_are_gone_are_reported(page):
    """Every figure with its last digit changed, and every comment left out: each is noticed."""
    other = {str(digit): str((digit + 5) % 10) for digit in range(10)}
    text = page.read_text()
    for table in tables_of(text):
        if table.comment.startswith("stored:"):
            pattern = r"^([-+.\d]*)(\d)(?=$| \[| ±)"
            rows = [
                [r[0], *(re.sub(pattern, lambda m: m[1] + other[m[2]], c) for c in r[1:])]
                for r in table.rows
            ]
            figures = [cell for row in rows for cell in row[1:] if CELL.fullmatch(cell)]
            found = differences(table._replace(rows=rows))
            assert figures and [wrong.rpartition(": ")[2] for wrong in found] == figures
    comments = re.findall(r"<!-- (?:not )?stored:.*?-->\s*", text, flags=re.DOTALL)
    assert comments and all(problems(text.replace(comment, "", 1)) for comment in comments)


def test_every_stored_file_is_in_the_index_and_every_link_leads_to_a_file():
    files = {p.relative_to(REFERENCE).as_posix() for p in REFERENCE.rglob("*") if p.is_file()}
    links = {p.stem: set(re.findall(r"\]\(([^)#:]+)\)", p.read_text())) for p in PAGES[1:]}
    assert files - links["index"] == {"index.md"}
    assert set().union(*links.values()) <= files


def test_readme_names_every_file_and_its_commands_exist():
    """And at most 160 lines; a page's commands exist, or it says where they did."""
    text = (ROOT / "README.md").read_text()
    folders = "", "lib/", "studies/**/", "examples/"
    found = [path for folder in folders for path in ROOT.glob(f"{folder}*.py")]
    files = {p.relative_to(ROOT).as_posix() for p in found} - {"lib/__init__.py"}
    named = set(re.findall(r"(?:(?:lib|studies|examples)/)?[\w/]+\.py\b", text))
    assert named == files and len(text.splitlines()) <= 160
    assert all(name in text for name in ("Makefile", "pyproject.toml", "requirements-dev.txt"))
    for page in PAGES:
        commands = re.findall(r"(\S*)python\s+([\w/]+\.py)", page.read_text())
        assert page in PAGES[1:] or {before.lstrip('`"') for before, _ in commands} == {
            ".venv/bin/"
        }
        gone = {script for _, script in commands if not (ROOT / script).exists()}
        assert not gone or "at commit `b6e223e`" in " ".join(page.read_text().split()), gone


def test_readme_says_the_sizes_and_its_python_runs(monkeypatch):
    text, given = (ROOT / "README.md").read_text(), {}
    monkeypatch.chdir(ROOT)
    snippet = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    assert len(snippet.split("\n")) <= 7  # five, a blank one after the imports, an empty end
    exec(snippet, given)
    deploy, (example, bounds) = importlib.import_module("06_deploy"), EXAMPLES
    wanted = deploy.suggest(deploy.Suggest(example, "yield", "max", bounds))
    assert given["suggestion"].answer == wanted
    printed = re.search(r"\nset .*?\n```", text, flags=re.DOTALL)[0]
    effects = [wanted["nothing"], wanted["recommended_action"], wanted["next_experiment"]]
    numbers = [one[end] for one in effects for end in ("predicted", "low", "high")]
    told = [float(number) for number in re.findall(r"\d+\.\d+", printed)]
    assert all(min(abs(number - x) for x in told) < 0.05 for number in numbers)
    plant = runpy.run_path(str(ROOT / "examples" / "plant.py"))
    chosen, rng = wanted["recommended_action"]["settings"], np.random.default_rng(0)
    truth = [plant["rows"](rng, one, 400_000)[:, -1].mean() for one in (chosen, {})]
    said = re.search(r"`(\S+)` gives `(\S+)`, setting nothing `(\S+)`", text)
    assert chosen == {"catalyst": float(said[1])}
    assert [float(said[2]), float(said[3])] == pytest.approx(truth, abs=0.1)
    for name in ("acbo", "acbo_small"):
        system = TrainedACBOSystem.load(ROOT / "pretrained" / f"{name}.eqx")
        learned = eqx.tree_at(lambda policy: policy.span, system.policy, None)
        for module in (system.surrogate, learned):
            assert f"{sum(leaf.size for leaf in jax.tree.leaves(module)):,}" in text
        sizes = system.surrogate.config
        pattern = rf"{sizes.model_n_layers}\s(?:blocks )?of width {sizes.model_hidden_dim}\b"
        heads = f"{sizes.num_heads} heads of {sizes.head_dim}"
        assert re.search(pattern, text) and heads in text


def test_expert_counts_are_sums_of_its_table():
    """Seeds of ten per system that reach the known-graph optimum, of fifty per kind."""
    text = (REFERENCE / "expert.md").read_text()
    rows = next(t.rows for t in tables_of(text) if "expert, reaches it" in t.header)

    def seeds(kind, column):
        return round(sum(10 * float(row[column]) for row in rows if row[0].endswith(kind)))

    linear = re.search(r"in (\d+) of 50 seeds, and", text)[1]
    expert, known = re.search(r"in (\d+) of 50 seeds, the known graph in (\d+)", text).groups()
    assert (int(linear), int(expert)) == (seeds("_linear", 7), seeds("_nonlinear", 7))
    assert int(known) == seeds("_nonlinear", 8)
