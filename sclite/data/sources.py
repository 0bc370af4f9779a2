"""Reads the rows of a local file or a Hub dataset one by one, each with its line or row number.

CSV and JSON are read with the standard library: `datasets` infers one type per column, which turns the answer 007 into
7.0 and None and NA into nothing, and one bad row makes the whole file unreadable.
"""

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

from sclite.config import Source
from sclite.errors import DataError, NetworkError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
OTHER_SUFFIXES = tuple(".txt .md .xlsx .xls .ods .yaml .yml .arrow .zip .zst .xz .bz2".split())  # noqa: SIM905
"""A name with one of these suffixes, or .gz, is a file and not a Hub dataset. A .txt file is read as .jsonl."""
FORMATS = "use a .jsonl, .json, .csv, .tsv (each also as .gz) or .parquet file"
_SURROGATE = re.compile("[\ud800-\udfff]")
_OBJECTS = "each row must be one JSON object"
_ENCODING = "the text is not UTF-8", "convert the file: iconv -f WINDOWS-1252 -t UTF-8"


class BadRow(DataError):
    """An unusable row: it is skipped and counted by its `reason`; reading continues."""

    def __init__(self, reason: str, message: str, hint: str = "", raw: str = ""):
        super().__init__(message, hint)
        self.reason, self.raw = reason, replace_surrogates(raw.strip())[:2000]


Cells = Mapping[str, object]
"""A row: its cells by column name."""
NumberedRows = Iterator[tuple[str, Cells | BadRow]]
"""("line 7" or "row 7", the row or what is wrong with it)."""


def is_local_source(source: str) -> bool:
    """Whether a source is a local file, by its name or because it exists, and not a Hub dataset."""
    named = source.lower().endswith((*SUFFIXES, *OTHER_SUFFIXES, ".gz")) or source.startswith((".", "/", "~"))
    return named or source == "-" or Path(source).exists()


def read_rows(source: Source, key: str) -> NumberedRows:
    """Iterate over the rows of a source, lazily; `key` is its configuration key. Raises DataError or NetworkError."""
    if not is_local_source(source.source):
        yield from _dataset_rows(source, key, None)
        return
    path = Path(source.source)
    if source.source == "-" or path.is_fifo() or path.is_char_device():
        name = "standard input" if source.source == "-" else str(path)
        why = f"{name} cannot be {key}: later commands read it again"
        raise DataError(why, "save the rows to a file and use that")
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {problem}", f"{FORMATS} as {key}")
    last = path.suffix.lower()
    suffix = Path(path.stem).suffix.lower() if last == ".gz" else last
    if suffix in OTHER_SUFFIXES[1:] or (suffix, last) == (".parquet", ".gz"):
        raise DataError(f"{path}: a {last} file cannot be read", f"{FORMATS} as {key}")
    if suffix == ".parquet":
        yield from _dataset_rows(source, key, path)
    elif suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".json":  # a list of objects
        text = "".join(_read_lines(path))
        rows, issue, fix = _parse_json(text) if text.strip() else ([], "", "")
        if issue or not isinstance(rows, list):
            usual = "write [{..}, {..}], or rename a file with one object per line to .jsonl"
            raise DataError(f"{path}, {issue or 'not a list of objects'}", fix or usual)
        for number, row in enumerate(rows, 1):
            bad = BadRow("row_not_readable", "not a JSON object", _OBJECTS, str(row))
            yield f"row {number}", row if isinstance(row, dict) else bad
    else:  # one object per line
        for number, line in enumerate(_read_lines(path), 1):
            if line.strip():
                row, issue, fix = _parse_json(line.rstrip())
                fix = fix or f"fix or remove this line; {_OBJECTS}"
                bad = BadRow("row_not_readable", issue or "not a JSON object", fix, line)
                yield f"line {number}", row if isinstance(row, dict) else bad


def _read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 or UTF-16 file, gzipped or not; invalid UTF-8 bytes become lone surrogates."""
    try:
        with open(path, "rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            wide = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            encoding = "utf-16" if wide else "utf-8-sig"
            yield from io.TextIOWrapper(file, encoding, "surrogateescape", newline="")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}", "download or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    except UnicodeError as error:
        raise DataError(f"{path} is not valid UTF-16: {error}", "save it as UTF-8") from error


def replace_surrogates(text: str) -> str:
    """Replace each lone surrogate, which UTF-8 cannot encode, with U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _parse_json(text: str) -> tuple[object, str, str]:
    """(the value, "", ""), or (None, what is wrong, how to fix it if that is known)."""
    if _SURROGATE.search(text):
        return None, *_ENCODING
    try:
        return json.loads(text), "", ""
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return None, f"{line}column {error.colno}: not JSON: {error.msg}", ""
    except (ValueError, RecursionError) as error:  # a number with too many digits, or nesting too deep
        return None, f"not JSON: {error}", ""


def _csv_rows(path: Path, delimiter: str) -> NumberedRows:
    """Rows of a CSV or TSV file with a header line; quoted fields may contain newlines."""
    csv.field_size_limit(1 << 30)  # a worked solution may exceed the default of 131,072 characters
    rows = csv.reader(_read_lines(path), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        fields: list[str] = []
        begin, why, hint = rows.line_num + 1, "", ""
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            why, hint = f"not CSV: {error}", 'write a " inside a quoted field twice'
            # an open quote may have swallowed any number of rows
            if not names or rows.line_num > begin:
                lines = f"line {begin}" + (f" to {rows.line_num}" if rows.line_num > begin else "")
                raise DataError(f"{path}, {lines}: {why}", hint) from error
        if not names or not (fields or why):  # the header, a blank line
            names = names or fields
            continue
        if any(map(_SURROGATE.search, fields)):
            why, hint = _ENCODING
        elif len(fields) > len(names):
            why = "more fields than the header has names"
            hint = "put fields with commas into double quotes"
        row = dict(zip(names, fields, strict=False))
        yield f"line {begin}", BadRow("row_not_readable", why, hint, ", ".join(fields)) if why else row


def _dataset_rows(source: Source, key: str, path: Path | None) -> NumberedRows:
    """Rows of a Parquet file, or of a dataset on the Hub if `path` is None; `datasets` is imported on first use."""
    import datasets

    datasets.disable_progress_bars()
    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # the error is raised
    name, section = source.source, key.partition(".")[0]
    hint = f"download it as JSONL on a machine with network access, then use the file as {key}"
    try:
        if path is not None:  # streaming: no copy in the datasets cache, one batch of rows in memory
            found = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            found = datasets.load_dataset(name, source.subset or None, split=source.split)
        for number, row in enumerate(found, 1):
            yield f"row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        if path is not None:
            why = f"{path} cannot be read: {_shorten(error)}"
            raise DataError(why, "it must be a Parquet file") from error
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            if "is a gated dataset" in str(error):
                login = "accept its terms on the Hub, then log in (`hf auth login`) or export HF_TOKEN=..."
                raise DataError(f"the dataset {name} is gated: {_shorten(error)}", login) from error
            why = f"{name} is neither a local file nor a dataset on the Hub"
            raise DataError(why, f"check {key}") from error
        if isinstance(error, OSError) and (error.errno is None or isinstance(error, ConnectionError)):
            raise NetworkError(f"the dataset {name} cannot be reached: {_shorten(error)}", hint) from error
        if not isinstance(error, OSError):  # else the disk is to blame, not the network
            hint = f"set {section}.subset or {section}.split, for example --set {section}.subset=main"
            if key == "problems.avoid":  # it has no subset or split
                hint = "download it as JSONL, and put the path of the file in problems.avoid"
        # `datasets` lists the subsets on its second line
        lines = 2 if not isinstance(error, OSError) and "config" in str(error).lower() else 1
        raise DataError(f"the dataset {name}: {_shorten(error, lines)}", hint) from error


def _shorten(error: BaseException, lines: int = 1) -> str:
    """The first lines of an error's message, as one line."""
    return " ".join(str(error).split("\n")[:lines]).strip() or type(error).__name__
