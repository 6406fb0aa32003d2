"""A text file as a person's program wrote it: its cells, the numbers in them, and ranges."""

import csv
import io
import math
import re
from collections.abc import Sequence
from decimal import Context, Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np


NUMBER = re.compile(
    r"(?P<limit>[<>≤≥]=?)?\s*(?P<digits>[-+−]?(?:\d[\d.,'\s]*|[.,]\d+)(?:e[-+]?\d+)?)"
    r"\s*(?:(?:±|\+/?-)\s*[\d.,]+)?\s*(?P<unit>%|°?[a-zµμΩ][\w/·^%]{0,9})?",
    re.IGNORECASE,
)
OPTIONAL = {"step", "levels", "scale", "cost"}  # columns of a file of bounds
MOST_STEPS = 10_000  # of a range: more are as good as none
THOUSANDS = r"[-+]?[1-9]\d{0,2}(?:%s\d{3})+"
SUMMARY = re.compile(
    r"\W*(mean|average|avg|total|sum|std|stdev|sd|sem|min|max|median|count|\d+ rows)\b.*",
    re.IGNORECASE,
)


class DataError(ValueError):
    """Bad input from a person; each line of the message names file, row and column and says what to
    do.
    """


class Table(NamedTuple):
    """Cells of a file, stripped: the header, and rows with their line numbers."""

    names: list[str]
    lines: list[int]
    rows: list[list[str]]
    comma: bool  # between a number and its decimals
    notes: list[str]
    units: dict[str, str]  # of columns whose cells have one

    def cells(self, i: int) -> list[str]:
        """Of one column."""
        return [row[i] for row in self.rows]


class Bound(NamedTuple):
    """A line of a file of bounds: a column's range, the values in it that are possible (all, if
    none are given), how it is laid out, what an experiment with it costs, and where it says so.
    """

    name: str
    low: float
    high: float
    values: tuple[float, ...]
    scale: str
    cost: float
    where: str


def plain(digits: str, comma: bool) -> str:
    """A number with a decimal point and without thousands; where it has a comma alone, thousands
    are taken for such unless `comma` says that the file has decimal commas.
    """
    digits = re.sub(r"['\s]", "", digits.replace("−", "-"))
    point = "," if digits.rfind(",") > digits.rfind(".") else "."
    if ("," in digits) != ("." in digits):
        grouped = re.fullmatch(THOUSANDS % re.escape(point), digits)
        if grouped and (comma if point == "." else not comma):
            point = "." if point == "," else ","
    return digits.replace("." if point == "," else ",", "").replace(point, ".")


def number_of(cell: str, comma: bool) -> tuple[float, int, str, bool]:
    """The number of a cell (NaN: none below 1e30), its decimals, the unit behind it, and whether it
    is a limit as in `<0.05`; an error as in `53 ± 1` is passed over.
    """
    match = NUMBER.fullmatch(cell)
    text = plain(match["digits"], comma) if match else ""
    try:
        value = float(text)
    except ValueError:
        return math.nan, 0, "", False
    assert match
    usable = abs(value) <= 1e30  # no unit of anything is larger
    return value if usable else math.nan, decimals(text), match["unit"] or "", bool(match["limit"])


def decimals(number: str) -> int:
    """How many decimals a number is written with; negative where its last digit stands for tens or
    more.
    """
    exponent = Decimal(number, Context(traps=[])).as_tuple().exponent
    # no int: an exponent of twenty digits, where float64 has read zero
    return -exponent if isinstance(exponent, int) else 0


def rows_in_words(lines: list[int]) -> str:
    """`row 5`, or `rows 5, 7, 9, ...`."""
    shown = ", ".join(map(str, lines[:8])) + (", ..." if len(lines) > 8 else "")
    return f"row{'s' * (len(lines) > 1)} {shown}"


def read_table(path: Path, strict: bool = False) -> Table:
    """Header and rows of a text file: separated by commas, semicolons, tabs or bars, with decimal
    points or commas; comments, a row of units, summaries at the end and, unless `strict`, few rows
    of another number of cells are left out. Raises `DataError` where it cannot be read or is empty.
    """
    try:
        data = path.read_bytes()
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            text = data.decode("cp1252")
        lines = [x for x in text.splitlines() if x.strip() and not x.lstrip().startswith("#")]
        width = {d: len(next(csv.reader(lines[:1], delimiter=d), ())) for d in ",;\t|"}
        delimiter = max(width, key=width.__getitem__)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        found = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: give the path of a CSV file") from None
    except (OSError, ValueError, csv.Error) as error:  # also a NUL byte in the name
        raise DataError(
            f"{path}: cannot be read as CSV ({getattr(error, 'strerror', None) or error}): "
            "give a file of comma-separated UTF-8 text"
        ) from None
    filled = [(line, row) for line, row in found if any(row) and not row[0].startswith("#")]
    if not filled:
        raise DataError(f"{path}: empty: the first row names the columns")
    notes, (header_line, header), rows = [], filled[0], filled[1:]
    if skipped := [line for line, row in found if row and row[0].startswith("#")]:
        notes.append(f"{rows_in_words(skipped)}: read as comments")
    cells = [cell for _, row in rows for cell in row]
    numbers = [match["digits"] for cell in cells if (match := NUMBER.fullmatch(cell))]
    commas = [x for x in numbers if "," in x and "." not in x]
    points = any("." in x and not re.fullmatch(THOUSANDS % r"\.", x) for x in numbers)
    ungrouped = any(not re.fullmatch(THOUSANDS % ",", x) for x in commas)
    comma = bool(commas) and not points and (ungrouped or delimiter != ",")
    if commas:
        notes.append(f"commas in numbers: read as {'decimal commas' if comma else 'thousands'}")

    def numeric(row):
        return [not math.isnan(number_of(cell, comma)[0]) for cell in row]

    ends = len(rows)
    while ends and not strict and (SUMMARY.fullmatch(next(filter(None, rows[ends - 1][1])))):
        ends -= 1
    if left := [line for line, _ in rows[ends:]]:
        notes.append(f"{rows_in_words(left)}: a summary, left out")
    rows = rows[:ends]
    if len(rows) > 1 and not strict and not any(numeric(rows[0][1])) and any(numeric(rows[1][1])):
        notes.append(f"row {rows[0][0]}: holds no number, read as units")
        rows = rows[1:]
    while header and not header[-1]:
        header = header[:-1]
    for _, row in rows:
        while len(row) > len(header) and not row[-1]:
            row.pop()
    ragged = [f"row {line} has {len(row)}" for line, row in rows if len(row) != len(header)]
    problems = []
    if ragged and (strict or len(ragged) > 0.1 * len(rows)):
        problems = [
            f"{path}, {one} cells, but the header has {len(header)} columns: complete the row, or "
            "name every column"
            for one in ragged
        ]
    elif ragged:
        notes.append(f"{', '.join(ragged)} cells for {len(header)} columns: left out")
        rows = [(line, row) for line, row in rows if len(row) == len(header)]
    for i, name in enumerate(header):
        if name in header[:i] and name:
            problems.append(
                f"{path}, row {header_line}, column name '{name}' is used twice: name every column "
                "once"
            )
        if ";" in name:
            problems.append(
                f"{path}, row {header_line}, column name '{name}' holds ';', which separates "
                "variables that were set together: rename the column"
            )
    if problems:
        raise DataError("\n".join(problems))
    return Table(header, [line for line, _ in rows], [row for _, row in rows], comma, notes, {})


def find(name: str, names: list[str]) -> str | None:
    """The column called `name`, whatever its case and blanks, if there is one alone."""
    same = [one for one in names if " ".join(one.split()).lower() == " ".join(name.split()).lower()]
    return name if name in names else same[0] if len(same) == 1 else None


def read_bounds(path: Path) -> list[Bound]:
    """Ranges from a CSV with columns `variable,low,high`, and perhaps `step`, `levels` (`0;5;10`),
    `scale` (linear or log) and `cost` (1, if none is given). A single possible value has `low` =
    `high`.
    """
    table, found, problems = read_table(path, strict=True), [], []
    columns = [name.lower() for name in table.names]
    if columns[:3] != ["variable", "low", "high"] or set(columns[3:]) - OPTIONAL:
        raise DataError(
            f"{path}, row 1: the columns are {', '.join(table.names)}; write variable,low,high "
            f"and, if need be, {', '.join(sorted(OPTIONAL))}"
        )
    for line, row in zip(table.lines, table.rows, strict=True):
        cells = dict.fromkeys(OPTIONAL, "") | dict(zip(columns, row, strict=True))
        where = f"{path}, row {line}, column"
        levels = [part for part in re.split(r"[;|\s]+", cells["levels"]) if part]
        numbers = {"low": cells["low"], "high": cells["high"], "step": cells["step"] or "0"}
        numbers["cost"] = cells["cost"] or "1"
        numbers |= {f"levels {part}": part for part in levels}
        read = {key: number_of(cell, table.comma)[0] for key, cell in numbers.items()}
        bad = [key for key, value in read.items() if math.isnan(value)]
        for key in bad:
            problems.append(
                f"{where} '{key.split()[0]}': '{numbers[key]}' is not a number below 1e30: "
                "correct it"
            )
        scale = cells["scale"].lower()
        if scale not in ("", "linear", "log"):
            problems.append(f"{where} 'scale': '{cells['scale']}': write linear or log")
        if bad:
            continue
        low, high, step, cost, *values = read.values()
        if low > high or step < 0 or cost <= 0:
            problems.append(
                f"{where}s 'low' and 'high': {cells['low']} is not below {cells['high']}, or step "
                "or cost is negative: correct them"
            )
            continue
        if low == high:
            values = [low]
        elif step and high - low < MOST_STEPS * step:
            values = (low + step * np.arange(math.floor((high - low) / step + 1e-9) + 1)).tolist()
        values = tuple(sorted(value for value in values if low <= value <= high))
        found.append(
            Bound(cells["variable"], low, high, values, scale, cost, f"{path}, row {line}")
        )
    if problems:
        raise DataError("\n".join(problems))
    return found


def bounds_by_name(bounds: Sequence[Bound], names: list[str], problems) -> dict[str, Bound]:
    """The bounds of every column that has some."""
    found = {}
    for bound in bounds:
        name = find(bound.name, names)
        if name is None:
            problems.append(
                f"{bound.where}, column 'variable': '{bound.name}' is not in the data; the "
                f"variables are {', '.join(names)}"
            )
        elif name in found:
            problems.append(
                f"{bound.where}, column 'variable': '{bound.name}' has a range already: keep one "
                "of the two"
            )
        else:
            found[name] = bound
    return found
