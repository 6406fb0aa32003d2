"""What came of an experiment, added to a person's table: to a file, whole or not at all, or to
columns in memory; and an experiment that a command makes.
"""

import contextlib
import csv
import fcntl
import io
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.artifacts import replace_file
from lib.table import (
    INTERVENED,
    SET,
    DataError,
    Table,
    bytes_of,
    columns_in,
    decoded,
    demand,
    find,
    number_of,
    parse_table,
    read_table,
    refuse,
    told,
)


def observe(path: Path, row: Mapping[str, Any]) -> int:
    """Write `row` behind the last row of a file, and return its line. A value for every column by
    name, None for what was not measured; `intervened` names what was set by hand, none if left out.

    The file keeps its form (separator, decimal commas, encoding, comments), and others wait while
    it is written; it is replaced by one under a temporary name, so that a full disk or a stop
    leaves it as it was. Raises `DataError` for a file that cannot be read or written, and a line
    for each name or value that does not fit.
    """
    bytes_of(path)  # a path that leads nowhere has no folder to be alone in
    path = path.resolve()
    with locked(path.parent):
        data = bytes_of(path)
        table = parse_table(path, data)
        cells, acted = cells_of(table, row)
        longer = with_line(table, data, cells, acted)
        after = parse_table(path, longer)
        before = table.names, table.comma, [*table.rows, cells]
        demand(
            (after.names, after.comma, after.rows) == before and after.acted[-1:] in ([acted], []),
            f"{path}: a row behind the last one would change how others are read: add it by hand",
        )
        mode = path.stat().st_mode
        try:
            replace_file(path, longer)
            path.chmod(mode)  # whoever could write it still can
        except OSError as error:
            with contextlib.suppress(OSError):
                path.with_name(path.name + ".tmp").unlink()
            raise DataError(
                f"{path}: cannot be written ({error.strerror}): nothing was changed"
            ) from None
        return int(after.lines[-1])


def with_row(source: Any, row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Columns in memory, and `row` as their last, as `observe` takes it; `source` stays as it is.
    Raises `DataError` as that does.
    """
    columns, table = columns_in(source), read_table(source)
    _, acted = cells_of(table, row)
    given = {find(name, list(columns)): value for name, value in row.items()}
    named = list(columns)[table.place] if table.place >= 0 else INTERVENED
    if acted and table.place < 0:
        columns[named] = [""] * len(next(iter(columns.values())))
    return {
        name: [*column, acted if name == named else given.get(name)]
        for name, column in columns.items()
    }


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone in a folder, among those who ask; whoever comes second waits. The lock is on the folder
    because the file itself is replaced, and ends with the process.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def cells_of(table: Table, row: Mapping[str, Any]) -> tuple[list[str], str]:
    """The cells of a new row in the table's columns and with its marks, and that of what was set;
    `DataError` with a line for each name or value that does not fit.
    """
    where, known = f"{table.where}, new row", [*table.names, INTERVENED]
    given = {find(name, known): value for name, value in row.items()}
    acted = given.pop(INTERVENED, None) or ()
    acted = acted.split(";") if isinstance(acted, str) else acted
    settings = [find(str(name).strip(), table.names) for name in acted]

    def cell(value: Any) -> str:
        text = "" if value is None else str(value).strip()
        return text if isinstance(value, str) or not table.comma else text.replace(".", ",")

    def is_number(text: str) -> bool:
        return not np.isnan(number_of(text, table.comma)[0])

    cells = [cell(given.get(name)) for name in table.names]
    columns = [[old[i] for old in table.rows if old[i]] for i in range(len(cells))]
    fits = [
        not text or text in column or (is_number(text) and any(map(is_number, column)))
        for text, column in zip(cells, columns, strict=True)
    ]
    missing = [name for name in table.names if name not in given]
    variables = ", ".join(table.names)
    refuse(
        [
            f"{where}: '{name}' is no column; the columns are {variables}"
            for name in row
            if not find(name, known)
        ]
        + [
            f"{where}, column '{INTERVENED}': '{name}' is no column; the columns are {variables}"
            for name, found in zip(acted, settings, strict=True)
            if not found
        ]
        + told((missing, f"{where}: no value of {', '.join(missing)}: null if not measured"))
        + [
            f"{where}, column '{name}': '{text}' is no number below 1e30, and no word of its other "
            "rows: correct it"
            for name, text, fit in zip(table.names, cells, fits, strict=True)
            if not fit
        ]
        + told(
            (
                settings and any(table.is_mark(cell, SET) for cell in table.acted),
                f"{where}, column '{INTERVENED}': the rows above say 0 or 1: write the names there",
            )
        )
        + [
            f"{where}, column '{name}': it was set, but to what is missing"
            for name, text in zip(table.names, cells, strict=True)
            if name in settings and not text
        ]
    )
    return cells, ";".join(settings)


def with_line(table: Table, data: bytes, cells: Sequence[str], acted: str) -> bytes:
    """The bytes of a file with a line behind the last of its rows, and with a column of what was
    set, if there is none and something was.
    """
    text, encoding = decoded(data)
    lines = io.StringIO(text, newline="").readlines()
    end = "\r\n" if lines[0].endswith("\r\n") else "\n"
    last, place = int(table.lines[-1]), table.place
    if acted and place < 0:
        place = len(cells)
        rows = [table.header, *table.lines]
        for line, added in zip(rows, [INTERVENED] + [""] * len(table.lines), strict=True):
            lines[line - 1] = lines[line - 1].rstrip("\r\n") + table.delimiter + added + end
    written = io.StringIO()
    row = [*cells[:place], acted, *cells[place:]] if place >= 0 else cells
    csv.writer(written, delimiter=table.delimiter, lineterminator=end).writerow(row)
    lines[last - 1] = lines[last - 1].rstrip("\r\n") + end
    return "".join([*lines[:last], written.getvalue(), *lines[last:]]).encode(encoding)


def row_of(text: str, where: str) -> dict[str, Any]:
    """The row in a JSON object; `DataError` for anything else."""

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON: write null")

    try:
        row = json.loads(text, parse_constant=refused)
    except ValueError as error:
        raise DataError(f"{where}: {text.strip()[:200]!r} is no JSON object ({error})") from None
    demand(isinstance(row, dict), f"{where}: {text.strip()[:200]!r} is no JSON object")
    return row


def made_by(command: str, settings: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """What came of an experiment that a command makes: it gets `settings` as a line of JSON on
    standard input and prints one JSON object with a value for every column.

    Raises `DataError` where it cannot be started, fails, takes more than `timeout` seconds, or
    prints something else. It is stopped with all that it started if this process is.
    """
    try:
        process = subprocess.Popen(
            shlex.split(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"--experiment '{command}': cannot be started ({error})") from None
    try:
        with process:
            try:
                printed, _ = process.communicate(json.dumps(settings) + "\n", timeout)
            except BaseException:  # an interrupt too
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    except subprocess.TimeoutExpired:
        raise DataError(
            f"--experiment '{command}': no answer within {timeout:g} seconds: raise --timeout"
        ) from None
    demand(
        process.returncode == 0,
        f"--experiment '{command}': failed with status {process.returncode}",
    )
    demand(printed.strip(), f"--experiment '{command}': printed nothing")
    return row_of(printed, f"--experiment '{command}'")
