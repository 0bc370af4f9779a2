"""Files of every format, gzipped or not, with every line ending; whatever the bytes, only our own errors are raised."""

import csv
import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclite.config import Source
from sclite.data.problems import load_problems
from sclite.errors import DataError, ScliteError, UsageError
from sclite.records import Drop, Problem

ROWS = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(3)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)


def load(path, drops=None, **columns) -> list[Problem]:
    return load_problems(Source(source=str(path), **columns), drops=drops)


def refused(source) -> DataError:
    with pytest.raises(DataError) as caught:
        load(source)
    assert caught.value.code == 3
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("p.jsonl p.txt", JSONL),
        ("p.csv", CSV),
        ("p.tsv", CSV.replace(",", "\t")),
        ("p.json P.JSON", json.dumps(ROWS)),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_files_are_read_gzipped_with_any_line_ending_and_bom(tmp_path, names, text, end, encoding):
    plain = text.replace("\n", end).encode(encoding)
    for name in names.split():
        for file in (name, f"{name}.gz"):
            (tmp_path / file).write_bytes(plain if file == name else gzip.compress(plain))
            assert [problem.answer for problem in load(tmp_path / file)] == ["1", "2", "3"]


def test_all_formats_give_the_same_problems_from_configured_columns(tmp_path):
    rows = [{"n": f"x{i}", "say": f"{i}?", "gold": f"00{i}", "work": f"so {i}\n#### {i}"} for i in (1, 2, 3)]
    columns = dict(question_column="say", answer_column="gold", solution_column="work", id_column="n")
    expected = [Problem(id=f"x{i}", question=f"{i}?", answer=f"00{i}", solution=f"so {i}") for i in (1, 2, 3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    with open(tmp_path / "p.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert load(tmp_path / f"p.{suffix}", **columns) == expected


def test_csv_may_have_bom_newlines_and_quotes_but_no_open_quote(tmp_path):
    text = '\ufeffquestion,answer\r\n"How many,\r\n""in all""?",5\r\nOne\u2028line?,NA\r\n'
    path = tmp_path / "p.csv"
    path.write_bytes(text.encode())
    first, second = load(path)
    assert (first.question, first.answer) == ('How many,\r\n"in all"?', "5")
    assert (second.question, second.answer) == ("One\u2028line?", "NA")
    path.write_text('question,answer\nq,1\n"open,2\nr,3\n')
    assert "p.csv, line 4: not CSV: unexpected end of data" in refused(path).message


def test_missing_and_other_files_and_folders_are_rejected(tmp_path):
    for name in ("nothing.jsonl", "nothing.txt", "nothing.jsonl.gz", "./nothing", "~nobody-here/p.jsonl"):
        error = refused(name)
        assert f"{Path(name)} does not exist" in error.message
        assert ".jsonl, .json, .csv, .tsv" in error.hint
    assert "is not a file" in refused(tmp_path).message
    with pytest.raises(UsageError, match=r"problems\.source"):
        load("")


def test_empty_or_damaged_files_are_reported(tmp_path):
    for name in ("p.jsonl", "p.json", "p.csv", "p.tsv"):
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            path.write_bytes(b"\n" if path.suffix != ".gz" else gzip.compress(b"\xef\xbb\xbf"))
            assert refused(path).message == f"{path} is empty"
    path = tmp_path / "p.parquet"
    datasets.Dataset.from_list(ROWS).select([]).to_parquet(path)
    assert refused(path).message == f"{path} is empty"
    whole = gzip.compress(os.urandom(4000).hex().encode())
    damaged = {"p.parquet": b"PAR1 but not really", "p.jsonl.gz": whole[:-9]}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        assert f"{name} cannot be read" in refused(tmp_path / name).message


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.json", '[\n{"question": "q", "answer": "1"},\n{]', "line 3, column 2: not JSON"),
        ("p.json", '{"rows": []}', "not a list of objects"),
        ("p.json", "[" * 100_000, "not JSON"),
        ("p.jsonl", '{"question": "caf\udce9"}', "not UTF-8"),
        ("p.csv", "caf\udce9,1", "not UTF-8"),
        ("p.csv", 'question,answer\n"a"b,2', "p.csv, line 2: not CSV: ',' expected after '\"'"),
    ],
)
def test_unreadable_file_is_reported(tmp_path, name, text, said):
    (tmp_path / name).write_text(text, errors="surrogateescape")
    assert said in refused(tmp_path / name).message


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("p.jsonl", '{"question": "half', "column 14: not JSON: Unterminated string"),
        ("p.jsonl", "[1, 2]", "not a JSON object"),
        ("p.jsonl", "[" * 100_000, "not JSON"),
        ("p.csv", "q, with a comma,2", "more fields than the header has names"),
        ("p.csv", "q,", "no answer"),
    ],
)
def test_invalid_row_is_dropped_with_its_line_and_the_others_are_read(tmp_path, name, line, said):
    drops: list[Drop] = []
    before, after = ('question,answer\n"a\nb",1\n', "c,3\n") if name == "p.csv" else (JSONL, JSONL)
    (tmp_path / name).write_text(f"{before}{line}\n{after.replace('What', 'So what')}")
    assert len(load(tmp_path / name, drops)) == (2 if name == "p.csv" else 6)
    (drop,) = drops
    assert f"{name}, line 4: {said}" in drop.detail
    assert name == "p.csv" or drop.raw == line[:2000]


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
    drops: list[Drop] = []
    try:
        problems = load(path, drops)
    except ScliteError as error:
        said, code = (error.message + error.hint).encode(), error.code
    else:
        said, code = b"read", 3 if problems else None
        for row in (*problems, *drops):
            type(row).model_validate_json(row.model_dump_json())
            assert not isinstance(row, Problem) or (row.question and row.answer)
    assert (bool(said), code) == (True, 3)
