"""Reads the rows of a local file or a Hub dataset one by one, each with its line or row number."""

import codecs
import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sclite.errors import DataError, NetworkError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
OTHER_SUFFIXES = tuple(
    [".txt", ".md", ".xlsx", ".xls", ".ods", ".yaml", ".yml", ".arrow", ".zip", ".zst", ".xz", ".bz2"]
)
"""A name with one of these suffixes, or .gz, is a file and not a Hub dataset."""
FORMATS = "use a .jsonl, .json, .csv, .tsv (each also as .gz) or .parquet file"


class BadRow(DataError):
    """An unusable row: it is skipped and counted by its `reason`; reading continues."""

    def __init__(self, reason: str, message: str, hint: str = "", raw: str = ""):
        super().__init__(message, hint)
        self.reason, self.raw = reason, replace_surrogates(raw.strip())[:2000]


Rows = Iterator[tuple[str, Mapping[str, Any] | BadRow]]
"""("line 7" or "row 7", the row or what is wrong with it)."""


def is_local_source(source: str) -> bool:
    """Whether a source is a local file, by its name or because it exists, and not a Hub dataset."""
    named = source.lower().endswith((*SUFFIXES, *OTHER_SUFFIXES, ".gz")) or source.startswith((".", "/", "~"))
    return named or source == "-" or Path(source).expanduser().exists()


def read_rows(source: str, subset: str = "", split: str = "train", key: str = "problems.source") -> Rows:
    """Iterate over the rows of a local file or a Hub dataset, reading lazily.

    `key` is the configuration key of the source, for hints. Raises DataError with file, position and hint if the whole
    file is unreadable, NetworkError if the Hub is unreachable.
    """
    if not is_local_source(source):
        return _hub_rows(source, subset, split, key)
    path = Path(source).expanduser()
    if source == "-" or path.is_fifo() or path.is_char_device():
        name = "standard input" if source == "-" else str(path)
        raise DataError(
            f"{name} cannot be {key}: later commands read it again", "save the rows to a file and use that"
        )
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {problem}", f"{FORMATS} as {key}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:]).removesuffix(".gz")
    if suffix == ".parquet" and suffixes[-1] != ".gz":
        return _parquet_rows(path)
    if suffix == ".parquet" or suffix in OTHER_SUFFIXES[1:]:
        raise DataError(f"{path}: a {suffixes[-1]} file cannot be read", f"{FORMATS} as {key}")
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if suffix == ".tsv" else ",")
    return _json_rows(path) if suffix == ".json" else _jsonl_rows(path)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its ending) of a text file, gzipped or not: UTF-8, or UTF-16 with a BOM.

    A line ends in LF, CR or CRLF. Invalid UTF-8 bytes become lone surrogates (see `has_invalid_utf8`).
    """
    try:
        with open(path, "rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            wide = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            encoding = "utf-16" if wide else "utf-8-sig"
            yield from enumerate(io.TextIOWrapper(file, encoding, "surrogateescape", newline=""), 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}", "download or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    except UnicodeError as error:
        raise DataError(f"{path} is not valid UTF-16: {error}", "save it as UTF-8") from error


def has_invalid_utf8(text: str) -> bool:
    """Whether a text from `read_lines` has bytes that are not UTF-8."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


def replace_surrogates(text: str) -> str:
    """Replace each lone surrogate, which UTF-8 cannot encode, with U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


_SURROGATE = re.compile("[\ud800-\udfff]")
_ENCODING = "the text is not UTF-8", "convert the file: iconv -f WINDOWS-1252 -t UTF-8"


def _jsonl_rows(path: Path) -> Rows:
    for number, line in read_lines(path):
        if line.strip():
            yield f"line {number}", _parse_object(line)


def _parse_object(line: str) -> Mapping[str, Any] | BadRow:
    """The JSON object of a line, or what is wrong with it."""
    why, hint = "not a JSON object", "each line must be one JSON object"
    if has_invalid_utf8(line):
        why, hint = _ENCODING
    else:
        try:
            row = json.loads(line.rstrip())
            if isinstance(row, dict):
                return row
        except json.JSONDecodeError as error:
            why, hint = f"column {error.colno}: not JSON: {error.msg}", f"fix or remove this line; {hint}"
        except (ValueError, RecursionError) as error:  # a number with too many digits, or nesting too deep
            why = f"not JSON: {error}"
    return BadRow("row_not_readable", why, hint, line)


def _json_rows(path: Path) -> Rows:
    text = "".join(line for _, line in read_lines(path))
    if has_invalid_utf8(text):
        raise DataError(f"{path}: {_ENCODING[0]}", _ENCODING[1])
    try:
        rows: Any = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        hint = "fix this line; name a file with one object per line .jsonl"
        raise DataError(f"{place}: not JSON: {error.msg}", hint) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}", "it must be a list of objects: [{..}, {..}]") from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: not a list of objects", "write [{..}, {..}], or one object per line as .jsonl"
        )
    for number, row in enumerate(rows, 1):
        bad = BadRow("row_not_readable", "not a JSON object", "each row must be one JSON object", str(row))
        yield f"row {number}", row if isinstance(row, dict) else bad


def _csv_rows(path: Path, delimiter: str) -> Rows:
    """Rows of a CSV or TSV file with a header line; quoted fields may contain newlines."""
    csv.field_size_limit(1 << 30)  # a worked solution may exceed the default of 131,072 characters
    rows = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        begin = rows.line_num + 1
        where = f"line {begin}"
        try:
            fields = next(rows, None)
        except csv.Error as error:
            hint = 'write a " inside a quoted field twice'
            # an open quote may have swallowed any number of rows
            if names is None or rows.line_num > begin:
                lines = f"{path}, {where} to {rows.line_num}" if rows.line_num > begin else f"{path}, {where}"
                raise DataError(f"{lines}: not CSV: {error}", hint) from error
            yield where, BadRow("row_not_readable", f"not CSV: {error}", hint)
            continue
        if fields is None:
            return
        if not fields:
            continue
        if names is None:
            names = fields
            continue
        row = dict(zip(names, fields, strict=False))
        if any(map(has_invalid_utf8, fields)):
            yield where, BadRow("row_not_readable", *_ENCODING, str(row))
        elif len(fields) > len(names):
            why, hint = "more fields than the header has names", "put fields with commas into double quotes"
            yield where, BadRow("row_not_readable", why, hint, str(fields))
        else:
            yield where, row


def _parquet_rows(path: Path) -> Rows:
    datasets = _datasets()
    try:  # streaming: no copy in the datasets cache, one batch of rows in memory
        found = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(found, 1):
            yield f"row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} cannot be read: {_first_line(error)}", "it must be a Parquet file"
        ) from error


def _hub_rows(source: str, subset: str, split: str, key: str) -> Rows:
    datasets = _datasets()
    section = key.partition(".")[0]
    hint = f"download it as JSONL on a machine with network access, then use the file as {key}"
    try:
        found = datasets.load_dataset(source, subset or None, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{source} is neither a local file nor a dataset on the Hub", f"check {key}"
        ) from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):  # this disk, not the network
            raise DataError(f"the dataset {source}: {_first_line(error)}", hint) from error
        raise NetworkError(f"the dataset {source} cannot be reached: {_first_line(error)}", hint) from error
    except (ValueError, RuntimeError) as error:
        raise DataError(
            f"the dataset {source}: {_first_line(error)}", f"check {section}.subset and {section}.split"
        ) from error
    return ((f"row {number}", row) for number, row in enumerate(found, 1))


def _datasets() -> ModuleType:
    """The library, imported on first use, without its progress bars and logged retries."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the error is raised
    return datasets


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
