"""Rows of a file or of a hub data set, one after the other, with the place of each; what the rows mean is said elsewhere."""

import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sclite.errors import DataFault, NetworkFault

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
OTHER_SUFFIXES = (".txt", ".tsv", ".md", ".xlsx", ".yaml", ".yml", ".arrow", ".gz", ".zip", ".zst")
"""A name that ends so means a file and no hub data set."""
Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""("line 7" or "row 7", the row)."""


def is_local(source: str) -> bool:
    """Whether a source is a file here, by its name or because it exists, and not a hub data set."""
    named = source.lower().endswith((*SUFFIXES, *OTHER_SUFFIXES)) or source.startswith((".", "/", "~"))
    return named or Path(source).expanduser().exists()


def rows_of(source: str, subset: str = "", split: str = "train", key: str = "problems.source") -> Rows:
    """The rows of a .jsonl, .json, .csv or .parquet file, or of a hub data set; read as they are asked for.

    `key` is the configuration's name for the source (its section's other keys are named in remedies). Raises DataFault
    with file, place and remedy, at once or at the row that cannot be read; NetworkFault where the hub is out of reach.
    """
    if not is_local(source):
        return _hub_rows(source, subset, split, key)
    path = Path(source).expanduser()
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "does not exist"
        raise DataFault(f"{path} {there}", f"give a .jsonl, .json, .csv or .parquet file as {key}")
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".json": _json_rows}
    return readers.get(path.suffix.lower(), _jsonl_rows)(path)


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a UTF-8 text, with or without a byte order mark. Only a newline ends a line."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise DataFault(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataFault(f"{path} cannot be read: {error}", "it must be UTF-8 text") from error


def _jsonl_rows(path: Path) -> Rows:
    for number, line in lines_of(path):
        if line.strip():
            yield f"line {number}", _object(path, line, number)


def _object(path: Path, line: str, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        place = f"{path}, line {number}, column {error.colno}"
        raise DataFault(
            f"{place}: not JSON: {error.msg}", "mend or remove this line; each is one JSON object"
        ) from error
    except ValueError as error:  # a number of more digits than Python reads
        raise DataFault(f"{path}, line {number}: {error}", "mend or remove this line") from error
    if not isinstance(row, dict):
        raise DataFault(f"{path}, line {number}: not a JSON object", "each line is one JSON object")
    return row


def _json_rows(path: Path) -> Rows:
    text = "".join(line for _, line in lines_of(path))
    try:
        rows: Sequence[Any] = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise DataFault(f"{place}: not JSON: {error.msg}", "mend this line") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataFault(
            f"{path}: not a list of objects", "write [{..}, {..}], or one object per line as .jsonl"
        )
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _csv_rows(path: Path) -> Rows:
    """Rows of a CSV whose first line names the columns; texts in quotes may hold newlines."""
    csv.field_size_limit(1 << 30)  # a worked solution may pass the default of 131,072 characters
    reader = csv.DictReader((line for _, line in lines_of(path)), strict=True)
    begin = 1
    try:
        while True:
            begin = reader.line_num + 1 if reader.line_num else 2
            row = next(reader, None)
            if row is None:
                return
            if None in row:
                raise DataFault(
                    f"{path}, line {begin}: more fields than the first line has names",
                    "put texts with commas into double quotes",
                )
            yield f"line {begin}", row
    except csv.Error as error:
        raise DataFault(
            f"{path}, line {begin}: not CSV: {error}", 'a " inside a quoted text is written twice'
        ) from error


def _parquet_rows(path: Path) -> Rows:
    datasets = _datasets()
    try:  # streamed: no copy in the cache of the library, and one batch of rows in memory
        found = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(found, 1):
            yield f"row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        raise DataFault(f"{path} cannot be read: {_line(error)}", "it must be a Parquet file") from error


def _hub_rows(source: str, subset: str, split: str, key: str) -> Rows:
    datasets = _datasets()
    section = key.partition(".")[0]
    remedy = f"download it as JSONL where there is a net, and give the file as {key}"
    try:
        found = datasets.load_dataset(source, subset or None, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataFault(
            f"{source} is neither a file here nor a data set on the hub", f"check {key}"
        ) from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):  # this disk, not the net
            raise DataFault(f"the data set {source}: {_line(error)}", remedy) from error
        raise NetworkFault(f"the data set {source} cannot be reached: {_line(error)}", remedy) from error
    except (ValueError, RuntimeError) as error:
        raise DataFault(
            f"the data set {source}: {_line(error)}", f"check {section}.subset and {section}.split"
        ) from error
    return ((f"row {number}", row) for number, row in enumerate(found, 1))


def _datasets():
    """The library, imported when it is first needed, without its bars and its logged retries."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they say is told as a fault
    return datasets


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
