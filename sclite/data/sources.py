"""Reads the rows of a local file or a Hub dataset one by one, each with its line or row number.

CSV and JSON are read with the standard library: `datasets` infers one type per column, which turns the answer 007 into
7.0 and None and NA into nothing, and one bad row makes the whole file unreadable.
"""

import csv
import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from sclite.config import Source
from sclite.errors import DataError, NetworkError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz")
"""A name with one of these suffixes is a file and not a Hub dataset. Other files are read as .jsonl."""
FORMATS = "use a .jsonl, .json, .csv, .tsv (each also as .gz) or .parquet file"
_OBJECTS = "each row must be one JSON object"


class BadRow(DataError):
    """An unusable row: it is skipped and counted by its `reason`; reading continues."""

    def __init__(self, reason: str, message: str, hint: str = "", raw: str = ""):
        super().__init__(message, hint)
        self.reason, self.raw = reason, raw.strip()[:2000]


Cells = Mapping[str, object]
"""A row: its cells by column name."""
NumberedRows = Iterator[tuple[str, Cells | BadRow]]
"""("line 7" or "row 7", the row or what is wrong with it)."""


def is_local_source(source: str) -> bool:
    """Whether a source is a local file, by its name or because it exists, and not a Hub dataset."""
    return source.lower().endswith(SUFFIXES) or source.startswith((".", "/", "~")) or Path(source).exists()


def read_rows(source: Source, key: str) -> NumberedRows:
    """Iterate over the rows of a source, lazily; `key` is its configuration key. Raises DataError or NetworkError."""
    if not is_local_source(source.source):
        yield from _dataset_rows(source, key, None)
        return
    path = Path(source.source)
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {problem}", f"{FORMATS} as {key}")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from _dataset_rows(source, key, path)
        return
    packed = path.suffix.lower() == ".gz"
    try:
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline="") as file:  # type: ignore[operator]
            if name.endswith((".csv", ".tsv")):
                # a worked solution may exceed the default of 131,072 characters
                csv.field_size_limit(1 << 30)
                delimiter = "\t" if name.endswith(".tsv") else ","
                reader = csv.DictReader(file, delimiter=delimiter, strict=True)
                why = "more fields than the header has names"
                hint = "put fields with commas into double quotes"
                for cells in reader:  # whose line is its last one: quoted fields may contain newlines
                    bad = BadRow("row_not_readable", why, hint, delimiter.join(map(str, cells.values())))
                    yield f"line {reader.line_num}", bad if None in cells else cells
            elif name.endswith(".json"):  # a list of objects
                rows, issue = _parse_json(file.read().strip() or "[]")
                if not isinstance(rows, list):
                    hint = "write [{..}, {..}], or rename a file with one object per line to .jsonl"
                    raise DataError(f"{path}: {issue or 'not a list of objects'}", hint)
                for number, row in enumerate(rows, 1):
                    bad = BadRow("row_not_readable", "not a JSON object", _OBJECTS, json.dumps(row))
                    yield f"row {number}", row if isinstance(row, dict) else bad
            else:  # one object per line
                for number, line in enumerate(file, 1):
                    if line.strip():
                        row, issue = _parse_json(line)
                        hint = f"fix or remove this line; {_OBJECTS}"
                        bad = BadRow("row_not_readable", issue or "not a JSON object", hint, line)
                        yield f"line {number}", row if isinstance(row, dict) else bad
    except csv.Error as error:
        hint = 'write a " inside a quoted field twice'
        raise DataError(f"{path}, line {reader.reader.line_num}: not CSV: {error}", hint) from error
    except UnicodeDecodeError as error:
        hint = "convert the file: iconv -f WINDOWS-1252 -t UTF-8"
        raise DataError(f"{path}: the text is not UTF-8: {error}", hint) from error
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}", f"check the file, and {FORMATS}") from error


def _parse_json(text: str) -> tuple[object, str]:
    """(the value, ""), or (None, what is wrong)."""
    try:
        return json.loads(text.strip()), ""
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return None, f"{line}column {error.colno}: not JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number with too many digits, or nesting too deep
        return None, f"not JSON: {error}"


def _dataset_rows(source: Source, key: str, path: Path | None) -> NumberedRows:
    """Rows of a Parquet file, or of a dataset on the Hub if `path` is None; `datasets` is imported on first use."""
    import datasets

    datasets.disable_progress_bars()
    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # the error is raised
    name, section = source.source, key.partition(".")[0]
    try:
        if path is not None:  # streaming: no copy in the datasets cache, one batch of rows in memory
            found = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            found = datasets.load_dataset(name, source.subset or None, split=source.split)
        for number, row in enumerate(found, 1):
            yield f"row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        # `datasets` lists the subsets on its second line
        said = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
        if path is not None:
            raise DataError(f"{path} cannot be read: {said}", "it must be a Parquet file") from error
        not_found = isinstance(error, datasets.exceptions.DatasetNotFoundError)  # an OSError as well
        if isinstance(error, OSError) and not not_found and not error.errno:
            hint = f"download it as JSONL on a machine with network access, then use the file as {key}"
            raise NetworkError(f"the dataset {name} cannot be reached: {said}", hint) from error
        hint = f"check {key}, {section}.subset and {section}.split, for example --set {section}.subset=main; if the dataset is gated"
        hint += ", accept its terms on the Hub and log in (`hf auth login`)"
        raise DataError(f"{name} is no local file, and the dataset cannot be read: {said}", hint) from error
