"""Files of every format, gzipped or not, with every line ending; any bytes raise only our own errors."""

import gzip
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclite.data.problems import load_problems
from sclite.errors import DataError, ScliteError
from sclite.records import Problem

ROWS = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(3)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)


def answers(path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [problem.answer for problem in load_problems(str(path))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", JSONL),
        ("p.txt", JSONL),
        ("p.csv", CSV),
        ("p.tsv", CSV.replace(",", "\t")),
        ("p.json", json.dumps(ROWS)),
        ("P.JSON", json.dumps(ROWS)),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_are_read_gzipped_with_any_line_ending_and_bom(tmp_path, name, text, end, encoding):
    content = text.replace("\n", end).encode(encoding)
    assert answers(tmp_path / name, content) == ["1", "2", "3"]
    assert answers(tmp_path / f"{name}.gz", gzip.compress(content)) == ["1", "2", "3"]
    assert answers(tmp_path / f"also-{name}", gzip.compress(content)) == ["1", "2", "3"]


def refused(source) -> DataError:
    with pytest.raises(DataError) as caught:
        load_problems(str(source))
    assert caught.value.code == 3
    assert caught.value.hint
    return caught.value


def test_standard_input_and_pipes_are_rejected(tmp_path):
    assert "standard input cannot be problems.source" in refused("-").message
    os.mkfifo(tmp_path / "pipe.jsonl")
    found = refused(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl cannot be problems.source" in found.message
    assert "save the rows to a file" in found.hint


@pytest.mark.parametrize("name", ["p.xlsx", "p.zip", "p.yaml", "p.jsonl.zst", "p.parquet.gz"])
def test_unsupported_suffixes_are_rejected(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    found = refused(tmp_path / name)
    assert f"a .{name.rpartition('.')[2]} file cannot be read" in found.message
    assert ".jsonl, .json, .csv, .tsv" in found.hint


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.tsv"])
@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf"])
def test_empty_files_are_reported_as_empty(tmp_path, name, content):
    for path, data in ((tmp_path / name, content), (tmp_path / f"{name}.gz", gzip.compress(content))):
        path.write_bytes(data)
        assert refused(path).message == f"{path} is empty"


def test_empty_parquet_file_is_reported_as_empty(tmp_path):
    import datasets

    path = tmp_path / "p.parquet"
    datasets.Dataset.from_list(ROWS).select([]).to_parquet(path)
    assert refused(path).message == f"{path} is empty"
    path.write_bytes(b"")
    assert "p.parquet cannot be read" in refused(path).message


def test_damaged_gzip_file_is_reported_as_damaged(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    whole = gzip.compress(os.urandom(4000).hex().encode())
    for content in (whole[:-9], whole[:200] + b"xxxx" + whole[204:]):
        path.write_bytes(content)
        assert "is a damaged gzip file" in refused(path).message


def test_json_nested_too_deeply_is_one_unusable_row(tmp_path):
    drops = []
    (tmp_path / "p.jsonl").write_text("[" * 100_000 + "\n" + JSONL)
    assert len(load_problems(str(tmp_path / "p.jsonl"), drops=drops)) == 3
    assert [drop.reason for drop in drops] == ["row_not_readable"]
    (tmp_path / "p.json").write_text("[" * 100_000)
    assert "not JSON" in refused(tmp_path / "p.json").message


PIECES = st.sampled_from(
    [b'{"question": "q", "answer": ', b'"5"', b"NaN", b"1e999", b"[1]", b"}", b"\n", b"\r", b'"', b",", b"\t", b"\x00",
     b"question,answer", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b\x08\x00", b'"\\ud83d"', b'{"problem": ', b'"solution": ',
     b'"\\\\boxed 2 #### 5"', b'"#### "', b"[" * 3000, b"9" * 5000, b"\xe2\x80\xa8", b"PAR1"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "jsonl.gz", "parquet"]),
    st.booleans(),
    st.binary() | st.lists(PIECES | st.binary(max_size=4), max_size=30).map(b"".join),
)
def test_any_bytes_raise_only_errors_of_our_own(tmp_path_factory, suffix, packed, content):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    path.write_bytes(gzip.compress(content) if packed and suffix != "parquet" else content)
    drops = []
    try:
        problems = load_problems(str(path), drops=drops)
    except ScliteError as error:
        said, code = (error.message + error.hint).encode(), error.code
    else:
        said, code = b"read", 3 if problems else None
        for row in (*problems, *drops):
            type(row).model_validate_json(row.model_dump_json())
            assert not isinstance(row, Problem) or (row.question and row.answer)
    assert (bool(said), code) == (True, 3)
