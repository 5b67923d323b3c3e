"""Reading texts and packing them into rows."""

import json

import numpy as np
import pytest

from fp8x.calibrate.data import batches, pack, read_texts, tokenize
from fp8x.errors import DataError

BOS = 256


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(path):
    reports = []
    return read_texts(path, report=reports.append), reports


def test_every_form_of_a_line(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"text": "plain"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}]},
        {"ids": [1, 2, 3]},
        "",
        {"input_ids": [4]},
        [5, 6],
    )
    texts, reports = read(path)
    assert texts == ["plain", "hi\n\nhello", "one", "a\nb", [1, 2, 3], [4], [5, 6]]
    assert reports == []


def test_an_array_file(tmp_path):
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": [{"value": "x"}]}, {"id": 3}, {"text": "y"}], indent=1))
    texts, reports = read(path)
    assert texts == ["x", "y"]
    assert len(reports) == 1 and "item 2: it has none of 'text'" in reports[0]


def test_lists_of_token_ids_by_line_and_in_an_array(tmp_path):
    assert read(write(tmp_path / "d.jsonl", [1, 2], "[true]", [3])) == (
        [[1, 2], [3]],
        [f"{tmp_path}/d.jsonl: line 2: entry 1 of the record is True, not a token id; skipped"],
    )
    assert read(write(tmp_path / "one.jsonl", [1, 2])) == ([[1, 2]], [])
    assert read(write(tmp_path / "array.json", [[1, 2], [3]])) == ([[1, 2], [3]], [])


def test_byte_order_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read(path) == (["a", "b"], [])


MALFORMED = {
    '{"text": "cut': "not JSON",
    '["a"]': "entry 1 of the record is 'a', not a token id",
    "3": "a number, not an object",
    '{"text": 3}': "'text' is a number",
    '{"text": ""}': "'text' is empty",
    '{"text": "\\ud800"}': "surrogate",
    '{"words": "x"}': "none of 'text'",
    '{"messages": "x"}': "'messages' is a string, not a list",
    '{"messages": [{"role": "user"}]}': "turn 1 of 'messages' has no 'content'",
    '{"messages": [{"content": 3}]}': "'content' of turn 1 of 'messages' is a number",
    '{"messages": []}': "'messages' is empty",
    '{"conversations": ["x"]}': "turn 1 of 'conversations' has no 'value'",
    '{"ids": []}': "'ids' is empty",
    '{"ids": [1, true]}': "entry 2 of 'ids' is True",
    '{"ids": [-1]}': "entry 1 of 'ids' is -1",
    '{"ids": [99999999999]}': "entry 1 of 'ids'",
    "[" * 100_000: "",
}


@pytest.mark.parametrize("line", MALFORMED, ids=lambda line: line[:30])
def test_a_malformed_line_is_reported_by_number_and_skipped(tmp_path, line):
    texts, reports = read(write(tmp_path / "d.jsonl", {"text": "good"}, line, {"text": "too"}))
    assert texts == ["good", "too"]
    assert len(reports) == 1
    assert "d.jsonl: line 2: " in reports[0] and MALFORMED[line] in reports[0]


def test_a_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    texts, reports = read(path)
    assert texts == ["a"] and "line 2: not UTF-8 (byte 10)" in reports[0]


def test_reports_default_to_warnings(tmp_path):
    with pytest.warns(UserWarning, match="line 2"):
        read_texts(write(tmp_path / "d.jsonl", {"text": "good"}, "{"))


def test_many_malformed_lines_are_counted(tmp_path):
    _, reports = read(write(tmp_path / "d.jsonl", {"text": "good"}, *["{"] * 15))
    assert len(reports) == 11 and "5 more are malformed" in reports[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n \n", "it is empty"),
        (b"[]", "it is empty"),
        (b"{}\nnull\n", "all 2 records are malformed"),
        (b"[{}, ", "begins like a JSON array, but is none"),
        (b"\x1f\x8b\x08\x00\x00", "binary"),
        (bytes(range(1, 256)) * 9, "malformed"),
    ],
)
def test_nothing_usable_names_the_file(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"data.jsonl: .*{message}"):
        read(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match=r"absent.jsonl: No such file"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="Is a directory"):
        read(tmp_path)


def test_tokenize_puts_bos_first_once(byte_tokenizer):
    assert byte_tokenizer.decode(tokenize("hé", byte_tokenizer, BOS), skip_special_tokens=False) == "<s>hé"
    assert tokenize([5, 6], byte_tokenizer, BOS) == [BOS, 5, 6]
    assert tokenize([BOS, 6], byte_tokenizer, BOS) == [BOS, 6]


def test_pack_lays_documents_end_to_end(byte_tokenizer):
    rows = pack([[1, 2, 3], [4, 5, 6]], byte_tokenizer, 3, 8, seed=0, bos_id=BOS)
    assert rows.dtype == np.int32 and rows.shape == (2, 3)
    documents = [[BOS, 1, 2, 3], [BOS, 4, 5, 6]]
    assert rows.ravel().tolist() in [[*a, *b][:6] for a, b in (documents, documents[::-1])]


def test_pack_of_less_than_a_row_is_a_shorter_row(byte_tokenizer):
    assert pack([[1, 2, 3]], byte_tokenizer, 16, 8, bos_id=BOS).tolist() == [[BOS, 1, 2, 3]]


def test_pack_is_decided_by_the_seed(byte_tokenizer):
    texts = [f"document {i}" for i in range(50)]
    rows = [pack(texts, byte_tokenizer, 16, 4, seed, bos_id=BOS) for seed in (0, 0, 1)]
    assert rows[0].shape == (4, 16)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()


def test_pack_of_nothing(byte_tokenizer):
    with pytest.raises(DataError, match="none to pack"):
        pack([], byte_tokenizer, 16, 4, bos_id=BOS)


def test_batches_hold_every_row_once():
    rows = np.arange(15, dtype=np.int32).reshape(5, 3)
    found = list(batches(rows, 2))
    assert [len(b) for b in found] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(found), rows)
