"""Documents out of files, and rows that are not documents."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsmoe_ray.data.bad_rows import BadRows, SliceAccount, read_documents, tally
from dsmoe_ray.data.documents import plan_units
from dsmoe_ray.data.sources import list_sources
from dsmoe_ray.errors import DataError


def read_all(
    path: Path, *, text_format: str, field: str = "text", unit_bytes: int = 1 << 20
) -> tuple[list[str], BadRows]:
    units = plan_units(list_sources([str(path)]), text_format=text_format, field=field, unit_bytes=unit_bytes)
    accounts: list[SliceAccount] = []
    texts = [
        document.text
        for unit in units
        for piece in unit
        for document in read_documents(piece, text_format=text_format, field=field, accounts=accounts)
    ]
    return texts, tally(accounts)


def test_text_files_that_are_empty_not_utf8_or_unreadable_are_counted_and_the_rest_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "e.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    texts, bad_rows = read_all(tmp_path, text_format="text")
    assert texts == ["hello", "with a mark"]
    assert bad_rows.counts == {"not valid UTF-8": 1, "empty text": 1, "unreadable file": 1}
    assert bad_rows.examples["empty text"] == [str(tmp_path / "c.txt")]
    assert "byte 0xe9 in position 3" in bad_rows.examples["not valid UTF-8"][0]
    assert "No such file" in bad_rows.examples["unreadable file"][0]


BAD_LINES = {
    b'{"text": "cut of': "not valid JSON",
    b"[" * 100_000: "not valid JSON",
    b'{"text": "caf\xe9"}': "not valid UTF-8",
    b'{"text": "half \\ud800 pair"}': "not valid UTF-8",
    b'["text"]': "not a JSON object",
    b'{"body": "x", "id": 1}': "field missing",
    b'{"text": null}': "field is null",
    b'{"text": 7}': "field is not a string",
    b'{"text": ""}': "empty text",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_jsonl_line_is_counted_with_its_reason_and_line_number(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}')
    texts, bad_rows = read_all(path, text_format="jsonl")
    assert texts == ["one", "two"]
    assert bad_rows.counts == {reason: 1}
    assert bad_rows.examples[reason][0].startswith(f"{path}:3")


def test_a_missing_field_tells_the_fields_that_are_there(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "x", "id": 1}\n')
    _, bad_rows = read_all(tmp_path / "rows.jsonl", text_format="jsonl")
    assert bad_rows.describe().endswith("it has body, id")


@pytest.mark.parametrize("unit_bytes", [1, 7, 20, 64, 1 << 20])
def test_a_jsonl_file_gives_the_same_rows_and_line_numbers_however_it_is_cut(tmp_path, unit_bytes):
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"text": "x" * (number % 13 + 1) + str(number)}) for number in range(50)]
    rows[20], rows[30], rows[40] = "broken", "", "broken too"
    path.write_text("\n".join(rows) + "\n")
    texts, bad_rows = read_all(path, text_format="jsonl", unit_bytes=unit_bytes)
    assert texts == [json.loads(row)["text"] for row in rows if row.startswith("{")]
    places = [example.split(": ")[0] for example in bad_rows.examples["not valid JSON"]]
    assert places == [f"{path}:21", f"{path}:41"]


def write_parquet(path: Path, column: pa.Array, *, name: str = "text", row_group_size: int = 2) -> None:
    pq.write_table(pa.table({name: column, "id": pa.array(range(len(column)))}), path, row_group_size=row_group_size)


def test_parquet_rows_are_read_in_order_and_nulls_and_bad_bytes_are_counted(tmp_path):
    column = pa.array([b"a", b"b", None, b"caf\xe9", b"c", b""], type=pa.binary())
    write_parquet(tmp_path / "rows.parquet", column)
    texts, bad_rows = read_all(tmp_path / "rows.parquet", text_format="parquet", unit_bytes=1)
    assert texts == ["a", "b", "c"]
    assert bad_rows.counts == {"field is null": 1, "not valid UTF-8": 1, "empty text": 1}
    assert bad_rows.examples["field is null"] == [f"{tmp_path / 'rows.parquet'}:3"]
    assert bad_rows.examples["empty text"] == [f"{tmp_path / 'rows.parquet'}:6"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_kind_of_string_column_is_text(tmp_path, kind):
    write_parquet(tmp_path / "rows.parquet", pa.array(["one", "two"]).cast(kind))
    assert read_all(tmp_path / "rows.parquet", text_format="parquet")[0] == ["one", "two"]


def test_a_parquet_column_that_is_missing_or_holds_no_text_is_refused_by_name(tmp_path):
    write_parquet(tmp_path / "rows.parquet", pa.array(["a"]))
    with pytest.raises(DataError, match=r"no column 'body'; it has text, id\. Set data\.field"):
        read_all(tmp_path, text_format="parquet", field="body")
    with pytest.raises(DataError, match=r"column 'id' of .* holds int64, not strings"):
        read_all(tmp_path, text_format="parquet", field="id")


def test_a_file_that_is_not_parquet_is_counted_and_the_next_one_read(tmp_path):
    (tmp_path / "a.parquet").write_text("not parquet")
    write_parquet(tmp_path / "b.parquet", pa.array(["good"]))
    texts, bad_rows = read_all(tmp_path, text_format="parquet")
    assert texts == ["good"]
    assert bad_rows.counts == {"unreadable file": 1}


def test_units_follow_corpus_order_and_their_sizes_add_up(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 10)
    units = plan_units(list_sources([str(tmp_path)]), text_format="text", field="text", unit_bytes=25)
    assert [[piece.name[0] for piece in unit] for unit in units] == [list("012"), list("345"), list("678"), ["9"]]
    assert sum(piece.size_bytes for unit in units for piece in unit) == 100


def test_only_the_first_few_examples_of_a_reason_are_kept(tmp_path):
    (tmp_path / "rows.jsonl").write_text("broken\n" * 1000)
    _, bad_rows = read_all(tmp_path / "rows.jsonl", text_format="jsonl", unit_bytes=100)
    assert bad_rows.counts == {"not valid JSON": 1000}
    assert [example.split(":")[1] for example in bad_rows.examples["not valid JSON"]] == ["1", "2", "3"]
    assert BadRows.from_fields(json.loads(json.dumps(bad_rows.to_fields()))) == bad_rows
