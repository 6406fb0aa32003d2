"""A person's table, a text file as some program wrote it or columns in memory: its cells, the
numbers in them, and ranges.
"""

import codecs
import csv
import hashlib
import io
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from decimal import Context, Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


NUMBER = re.compile(
    r"[~≈]?(?P<limit>[<>≤≥]=?)?\s*"
    r"(?P<digits>[-+−]?(?:\d{1,3}(?:['\s]\d{3})+(?:[.,]\d+)?|\d[\d.,]*|[.,]\d+)(?:e[-+]?\d+)?)"
    r"\s*(?:(?:±|\+/?-)\s*[\d.,]+)?\s*(?P<unit>%|°?[a-zµμΩ][\w/·^%]{0,9})?\s*\**",
    re.IGNORECASE,
)
EMPTY = {"", "na", "n/a", "#n/a", "nan", "null"}  # cells of a column of words that are no level
NOT_SET = {
    *EMPTY,
    *("0", "-", "no", "none", "false", "n"),
    *("control", "ctrl", "baseline", "observed", "observation"),
}
SET = {"1", "yes", "true", "y", "x"}  # as cells of that column, unless a variable is called so
INTERVENED = "intervened"  # the column of what was set by hand, however it is called
ACTED = re.compile(r"interven\w*( on)?|manipulated|perturbed|set by hand", re.IGNORECASE)
# columns of a file of bounds, the last four optional, and what an empty cell stands for
COLUMNS = {
    "variable": "",
    "low": "",
    "high": "",
    "step": "0",
    "levels": "",
    "scale": "",
    "cost": "1",
}
MOST_STEPS = 10_000  # of a range: more are as good as none
MOST_SUMMARIES = 6  # rows at the end of a file
# a comment, neither an error of Excel nor an id
COMMENT = re.compile(r"#(?!N/?A|DIV|VALUE|REF|NAME|NUM|\d|$)")
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}([.,])\d{3}(\1\d{3})*")  # as such a number is marked
SUMMARY = re.compile(
    r"\W*(mean|average|avg|total|sum|std|stdev|sd|sem|min|max|median|count|n|\d+ rows)\W*",
    re.IGNORECASE,
)


class DataError(ValueError):
    """Bad input from a person; each line of the message names file, row and column and says what to
    do.
    """


def told(*cases: tuple[object, str]) -> list[str]:
    """The sentences of those cases that hold."""
    return [sentence for holds, sentence in cases if holds]


def demand(fits: object, otherwise: str) -> None:
    """Raise `DataError` with what is `otherwise` wrong, unless it `fits`."""
    if not fits:
        raise DataError(otherwise)


def refuse(problems: list[str]) -> None:
    """Raise `DataError` with a line for each problem, if there is one."""
    demand(not problems, "\n".join(problems))


class Table(NamedTuple):
    """Cells of a table, stripped: the header, and rows with their line numbers; apart from these,
    the cells that name what was set by hand, none where there is no column of them.
    """

    names: list[str]
    lines: np.ndarray
    rows: list[list[str]]
    acted: list[str]
    comma: bool  # between a number and its decimals
    notes: list[str]
    where: str  # the file
    delimiter: str  # between cells
    header: int  # its line
    place: int  # of the column of what was set by hand, -1 if there is none
    sha256: str  # of the file's bytes, or of the cells of columns in memory

    def is_mark(self, cell: str, marks: set[str]) -> bool:
        """Whether a cell of what was set is one of `marks`, and no variable's name."""
        return cell.lower() in marks and not find(cell, self.names)

    @property
    def num_experiments(self) -> int:
        """Rows in which something was set."""
        return sum(not self.is_mark(cell, NOT_SET) for cell in self.acted)


class Bound(NamedTuple):
    """A line of a file of bounds: a column's range, the values in it that are possible (all, if
    none are given), how it is laid out, what an experiment with it costs, and where it says so.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    values: tuple[float, ...] = ()
    scale: str = ""
    cost: float = 1.0
    where: str = ""
    words: tuple[str, ...] | None = None  # instead of a range: its levels, all if empty


def plain(digits: str, comma: bool) -> str:
    """A number with a decimal point and without thousands; where it has one kind of mark alone that
    could be of thousands, `comma` says whether the file has decimal commas.
    """
    digits = re.sub(r"['\s]", "", digits.replace("−", "-"))
    point = max(".,", key=digits.rfind)  # the last of both
    if THOUSANDS.fullmatch(digits) and (point != ".,"[comma] or digits.count(point) > 1):
        return digits.replace(point, "")
    return digits.replace(",."[point == ","], "").replace(point, ".")


def marked(cells: Iterable[str]) -> list[list[str]]:
    """The numbers of some cells that have one comma and no point, those of one point alone, and of
    both those whose mark cannot be of thousands.
    """
    digits = [match["digits"] for cell in cells if (match := NUMBER.fullmatch(cell))]
    alone = [[x for x in digits if x.count(m) == 1 and o not in x] for m, o in (",.", ".,")]
    return alone + [[x for x in some if not THOUSANDS.fullmatch(x)] for some in alone]


def decimal_comma(cells: Sequence[str], comma: bool) -> bool:
    """Whether a column has decimal commas; `comma` says whether its file has them, where it does
    not tell. Marks that could all be of thousands are, beside whole numbers of hundreds.
    """
    commas, points, decimal_commas, decimal_points = map(bool, marked(cells))
    if decimal_commas != decimal_points:
        return decimal_commas
    hundreds = any(re.fullmatch(r"[-+]?\d{3}", cell) for cell in cells)
    return points if hundreds and not decimal_commas and commas != points else comma


def number_of(cell: str, comma: bool) -> tuple[float, int, str, bool]:
    """The number of a cell (NaN: none below 1e30), its decimals, the unit behind it, and whether it
    is a limit as in `<0.05`; an error as in `53 ± 1` is passed over.
    """
    match = NUMBER.fullmatch(cell)
    limit, digits, unit = match.group("limit", "digits", "unit") if match else ("", "", "")
    text = plain(digits, comma)
    value = float(Decimal(text, Context(traps=[])))  # NaN where that is no number, as `1.2.3`
    value = value if abs(value) <= 1e30 else math.nan  # no unit of anything is larger
    return value, decimals(text), unit or "", bool(limit)


def decimals(number: str) -> int:
    """How many decimals a number is written with; negative where its last digit stands for tens or
    more.
    """
    exponent = Decimal(number, Context(traps=[])).as_tuple().exponent
    # no int: no number, or an exponent of twenty digits
    return -exponent if isinstance(exponent, int) else 0


def rows_in_words(lines: Sequence[int] | np.ndarray) -> str:
    """`row 5`, or `rows 5, 7, 9, ...`."""
    shown = ", ".join(map(str, lines[:8])) + (", ..." if len(lines) > 8 else "")
    return f"row{'s' * (len(lines) > 1)} {shown}"


def bytes_of(path: Path) -> bytes:
    """What is in a file; `DataError` where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: give the path of a CSV file") from None
    except (OSError, ValueError) as error:  # also a NUL byte in the name
        raise unreadable(path, error) from None


def unreadable(path: Path | str, error: Exception) -> DataError:
    """The error for a file that is no table."""
    return DataError(
        f"{path}: cannot be read as CSV ({getattr(error, 'strerror', None) or error}): "
        "give a file of comma-separated UTF-8 text"
    )


def decoded(data: bytes) -> tuple[str, str]:
    """The text of a file, and its encoding."""
    encoding = "utf-8-sig" if data.startswith(codecs.BOM_UTF8) else "utf-8"
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError:
        return data.decode("cp1252"), "cp1252"


def written_rows(path: Path, data: bytes) -> tuple[str, list[tuple[int, list[str]]]]:
    """What separates the cells of a text file, and its rows with their line numbers, cells
    stripped. Raises `DataError` where it is no text.
    """
    try:
        text = re.sub(r"\A\s*sep=.[ \t]*\r?\n", "\n", decoded(data)[0])
        written = [x for x in text.splitlines() if x.strip() and not COMMENT.match(x.lstrip())]

        def regular(delimiter):
            """How many lines have the number of cells that most have, and that number."""
            widths = [len(row) for row in csv.reader(written[:60], delimiter=delimiter)]
            most = max(widths, key=widths.count, default=0)
            return most > 1, widths.count(most), most

        delimiter = max(";\t|,", key=regular)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        return delimiter, [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (ValueError, csv.Error) as error:
        raise unreadable(path, error) from None


def columns_in(source: Any) -> dict[str, list[Any]]:
    """Columns in memory by name: of a dict, of an array with named fields, or of a data frame
    (pandas, polars, pyarrow and others that give a column as `frame[name]`; their common
    `__dataframe__` is on its way out). `DataError` for anything else.
    """
    fields = source.dtype.names if isinstance(source, np.ndarray) else None
    listed = getattr(source, "column_names", None) or getattr(source, "columns", None)
    names = source if isinstance(source, Mapping) else fields if listed is None else listed
    demand(
        names is not None,
        f"{type(source).__name__} is no table: give the path of a CSV file, a dict of columns, an "
        "array with named fields or a data frame",
    )
    return {str(name): list(source[name]) for name in (() if names is None else names)}


def as_csv(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Columns as the bytes of a file; several names in a cell are joined by semicolons. `DataError`
    where they are not all as long.
    """

    def cell(value: Any) -> str:
        joined = isinstance(value, (list, tuple, set, frozenset))
        return ";".join(map(str, value)) if joined else "" if value is None else str(value)

    lengths = {name: len(column) for name, column in columns.items()}
    demand(len(set(lengths.values())) <= 1, f"columns of different length: {lengths}")
    text = io.StringIO()
    rows = zip(*columns.values(), strict=True)
    csv.writer(text).writerows([list(columns), *(map(cell, row) for row in rows)])
    return text.getvalue().encode()


def apart_from_frame(rows: list, comma: bool) -> tuple[list, list, list]:
    """A first row of units, the rows of data, and the summaries at the end."""
    ends = itertools.takewhile(
        lambda one: SUMMARY.fullmatch(next(filter(None, one[1]))), rows[::-1]
    )
    count = len(rows) - len(list(ends))
    count = count if 0 < count >= len(rows) - MOST_SUMMARIES else len(rows)
    numeric = [any(number_of(cell, comma)[0] < np.inf for cell in row) for _, row in rows[:2]]
    first = int(numeric[:count] == [False, True])
    return rows[:first], rows[first:count], rows[count:]


def read_table(source: Any, strict: bool = False) -> Table:
    """Header and rows of a text file, or of columns in memory (`columns_in`), which are called
    `table` and read like the file that they would make: its header is row 1. Raises `DataError`
    where it cannot be read, and as `parse_table` does.
    """
    if isinstance(source, (str, Path)):
        return parse_table(Path(source), bytes_of(Path(source)), strict)
    return parse_table(Path("table"), as_csv(columns_in(source)), strict)


def parse_table(path: Path, data: bytes, strict: bool = False) -> Table:
    """Header and rows of a text file: separated by commas, semicolons, tabs or bars, with decimal
    points or commas; comments, a row of units, summaries at the end and, unless `strict`, few rows
    of another number of cells are left out. Raises `DataError` where it is empty, or not a table.
    """
    delimiter, found = written_rows(path, data)
    comments = [line for line, row in found if row and COMMENT.match(row[0])]
    filled = [(line, row) for line, row in found if any(row) and not COMMENT.match(row[0])]
    demand(filled, f"{path}: empty: the first row names the columns")
    widths = [len(row) for _, row in filled]
    head = 0 if strict else widths.index(statistics.mode(widths))
    title, (header_line, header), rows = filled[:head], filled[head], filled[head + 1 :]
    commas, _, decimal, points = marked(cell for _, row in rows for cell in row)
    # where all commas could be of thousands, they are if there is a point or they stand in quotes
    comma = bool(commas) and (
        len(decimal) >= len(points) if decimal else delimiter != "," and not points
    )
    units, rows, footer = ([], rows, []) if strict else apart_from_frame(rows, comma)
    width = max(i for i, name in enumerate(header, 1) if name)
    header = [name or f"column {i}" for i, name in enumerate(header[:width], 1)]
    beyond = [line for line, row in rows if any(row[width:])]
    for _, row in rows:
        if not (strict and any(row[width:])):
            del row[width:]
        if len(row) == width - 1 and header[-1].lower() == INTERVENED:
            row.append("")  # an empty last cell, which some programs do not write
    ragged = [f"row {line} has {len(row)}" for line, row in rows if len(row) != width]
    where, many = f"{path}, row {header_line}, column name", len(ragged) > 0.1 * len(rows)
    refuse(
        [
            f"{path}, {one} cells, but the header has {width} columns: complete the row, or name "
            "every column"
            for one in (ragged[:3] if strict or many else ())
        ]
        + [
            f"{where} '{name}' is used twice: name every column once"
            for i, name in enumerate(header)
            if name in header[:i]
        ]
        + [
            f"{where} '{name}' holds ';', which separates variables that were set together: rename "
            "the column"
            for name in header
            if ";" in name
        ]
    )
    notes = told(
        (comments, f"{rows_in_words(comments)}: read as comments"),
        (title, f"{rows_in_words([line for line, _ in title])}: above the header, left out"),
        (beyond, f"{rows_in_words(beyond)}: cells right of the last column are left out"),
        (commas, f"commas in numbers: read as {'decimal commas' if comma else 'thousands'}"),
        (footer, f"{rows_in_words([line for line, _ in footer])}: a summary, left out"),
        (units, f"{rows_in_words([line for line, _ in units])}: holds no number, read as units"),
        (ragged, f"{', '.join(ragged)} cells for {width} columns: left out"),
    )
    lines = np.array([line for line, row in rows if len(row) == width])
    cells = [row for _, row in rows if len(row) == width]
    acting = [i for i, name in enumerate(header) if name.lower() == INTERVENED] or [
        i
        for i, name in enumerate(header)
        if ACTED.fullmatch(name) and any(find(row[i], header) for row in cells)
    ]
    acted = [row[acting[0]] for row in cells] if acting else []
    names, *rest = ([x for i, x in enumerate(row) if i not in acting] for row in (header, *cells))
    return Table(
        *(names, lines, rest, acted, comma, notes),
        where=f"{path}",
        delimiter=delimiter,
        header=header_line,
        place=acting[0] if acting else -1,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def find(name: str, names: Sequence[str]) -> str:
    """The column called `name`, whatever its case and blanks, if there is one alone; else ''."""
    wanted = " ".join(name.lower().split())
    alike = [one for one in names if " ".join(one.lower().split()) == wanted]
    return name if name in names else alike[0] if len(alike) == 1 else ""


def read_bounds(source: Any) -> list[Bound]:
    """Ranges from a table with columns `variable,low,high`, and perhaps `step`, `levels`
    (`0;5;10`), `scale` (linear or log) and `cost` (1, if none is given), or a dict of names and
    `(low, high)`. A single possible value has `low` = `high`; a column of words has neither, and
    perhaps `levels` (`ethanol;water`).
    """
    if isinstance(source, Mapping) and "variable" not in source:
        lows, highs = ([pair[end] for pair in source.values()] for end in (0, 1))
        source = {"variable": list(source), "low": lows, "high": highs}
    table, found, problems = read_table(source, strict=True), [], []
    path = table.where
    columns, known = [name.lower() for name in table.names], list(COLUMNS)
    demand(
        columns[:3] == known[:3] and set(columns[3:]) <= set(known[3:]),
        f"{path}, row 1: the columns are {', '.join(table.names)}; write variable,low,high and, if "
        f"need be, {', '.join(sorted(known[3:]))}",
    )
    between = r"[;|\s]+" if table.comma else r"[;|,\s]+"
    for line, row in zip(table.lines, table.rows, strict=True):
        cells = COLUMNS | {name: cell for name, cell in zip(columns, row, strict=True) if cell}
        scale, where, words = cells["scale"].lower(), f"{path}, row {line}", None
        if not (cells["low"] or cells["high"] or cells["step"] != "0"):
            words = tuple(filter(None, map(str.strip, re.split("[;|]", cells["levels"]))))
            cells |= {"low": "0", "high": "1", "levels": ""}
        numbers = {name: cells[name] for name in ("low", "high", "step", "cost")}
        numbers |= {f"levels {x}": x for x in re.split(between, cells["levels"]) if x}
        read = {name: number_of(cell, table.comma)[0] for name, cell in numbers.items()}
        low, high, step, cost, *values = read.values()
        if 0 <= high - low <= MOST_STEPS * step:  # a single value as well, with no step
            steps = range(math.floor((high - low) / (step or 1.0) + 1e-9) + 1)
            values = [float(f"{low + step * i:.12g}") for i in steps]
        inside = tuple(sorted(x for x in values if low <= x <= high))
        problems += told(
            *(
                (
                    math.isnan(value),
                    f"{where}, column '{name.split()[0]}': '{numbers[name]}' is not a number below "
                    "1e30: correct it",
                )
                for name, value in read.items()
            ),
            (
                scale not in ("", "linear", "log"),
                f"{where}, column 'scale': '{cells['scale']}': write linear or log",
            ),
            (
                low > high or step < 0 or cost <= 0,
                f"{where}, columns 'low' and 'high': {cells['low']} is not below {cells['high']}, "
                "or step or cost is negative: correct them",
            ),
            (
                len(inside) < len(values),
                f"{where}, column 'levels': some lie outside {low:g} to {high:g}: correct them",
            ),
        )
        found.append(Bound(cells["variable"], low, high, inside, scale, cost, where, words))
    refuse(problems)
    return found
