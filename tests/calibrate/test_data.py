"""Reading texts and packing them into rows."""

import gzip
import json

import numpy as np
import pytest
import zstandard

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
    every = []
    read_texts(tmp_path / "d.jsonl", report=every.append, limit=None)
    assert [report.split(": ")[1] for report in every] == [f"line {number}" for number in range(2, 17)]


TEXTS = ['{"messages": [{"content": "a"}]}\n', '{"text": "b"}\n']
COMPRESS = {"gz": gzip.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_compressed_file(tmp_path, kind):
    whole, parts = (tmp_path / f"{name}.jsonl.{kind}" for name in ("whole", "parts"))
    whole.write_bytes(COMPRESS[kind]("".join(TEXTS).encode()))
    parts.write_bytes(b"".join(COMPRESS[kind](text.encode()) for text in TEXTS))
    array = tmp_path / f"array.json.{kind}"
    array.write_bytes(COMPRESS[kind](b'[{"text": "a"}, {"text": "b"}]'))
    for path in (whole, parts, array):
        assert read(path) == (["a", "b"], [])


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_compressed_file_that_is_cut_or_damaged(tmp_path, kind):
    rng = np.random.default_rng(0)
    words = "".join(json.dumps({"text": str(number)}) + "\n" for number in rng.integers(0, 10**9, 1000))
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}[kind]
    whole = compress(words.encode())
    path = tmp_path / f"d.jsonl.{kind}"
    for size in (5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=f"d.jsonl.{kind}: it is compressed, and cut short; get it again"):
            read(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for content in (bytes(damaged), whole + b"garbage"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"d.jsonl.{kind}: it is compressed, and damaged \(.+\); get it again"):
            read(path)


def test_the_name_says_nothing(tmp_path):
    path = tmp_path / "plain.jsonl.gz"
    path.write_text("".join(TEXTS))
    assert read(path) == (["a", "b"], [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n \n", "it is empty"),
        (b"[]", "it is empty"),
        (b"{}\nnull\n", "all 2 records are malformed"),
        (b"[{}, ", "begins like a JSON array, but is none"),
        (b"\x00\x01", "binary"),
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


@pytest.fixture
def packed(byte_tokenizer):
    """The rows of texts, and what was reported."""

    def packed(texts, length, num_samples, seed=0, **options):
        reports = []
        rows = pack(texts, byte_tokenizer, length, num_samples, seed, bos_id=BOS, report=reports.append, **options)
        return rows, reports

    return packed


def test_pack_lays_documents_end_to_end(packed):
    rows, reports = packed([[1, 2], [4, 5]], 3, 2)
    assert rows.dtype == np.int32 and rows.shape == (2, 3) and reports == []
    documents = [[BOS, 1, 2], [BOS, 4, 5]]
    assert rows.ravel().tolist() in [[*a, *b] for a, b in (documents, documents[::-1])]
    rows, _ = packed([[1, 2, 3], [4, 5, 6]], 5, 1)
    assert rows.tolist() in [[[BOS, 1, 2, 3, BOS]], [[BOS, 4, 5, 6, BOS]]]


def test_pack_of_less_than_a_row_is_a_shorter_row(packed):
    rows, reports = packed([[1, 2, 3]], 16, 8)
    assert rows.tolist() == [[BOS, 1, 2, 3]]
    (report,) = reports
    assert report.startswith("8 rows of 16 tokens (128) were asked for, but the texts give 4 tokens; give more")


def test_pack_is_decided_by_the_seed(packed):
    texts = [f"document {i} " * (1 + i % 9) for i in range(50)]  # some longer than a row
    rows = [packed(texts, 16, 4, seed)[0] for seed in (0, 0, 1)]
    assert rows[0].shape == (4, 16)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()


@pytest.mark.parametrize("document_rows", [1, 3])
def test_a_long_document_gives_no_more_than_its_rows(packed, document_rows):
    short = [[1, *divmod(i, 100)] * 7 for i in range(200)]
    counts = set()
    for seed in range(8):
        rows, reports = packed([[200] * 10_000, *short], 16, 200, seed, document_rows=document_rows)
        assert len(rows) == 200 and reports == []
        counts.add(int((rows == 200).sum()))
    assert max(counts) == 16 * document_rows - 1  # and the first token


def test_all_have_a_turn_before_the_next_pieces_of_long_documents(packed):
    texts = [[*range(28)], [*range(100, 128)], [*range(90, 97)]]
    rows, reports = packed(texts, 8, 9)  # pieces are as long as rows
    assert rows[:, 0].tolist() == [BOS] * 9
    assert sorted(rows[:, 1:].ravel().tolist()) == sorted(token for text in texts for token in text)
    of = [next(number for number, text in enumerate(texts) if row[1] in text) for row in rows.tolist()]
    assert sorted(of[:3]) == [0, 1, 2]
    assert of[3:] == [number for number in of[:3] if number != 2] * 3
    for number in (0, 1):  # one after the other, from any on
        starts = [row[1] - 100 * number for row, each in zip(rows.tolist(), of) if each == number]
        assert [(start - starts[0]) % 28 for start in starts] == [0, 7, 14, 21]
    (report,) = reports
    assert "gives 32 of 72 tokens: the texts hold 3 documents" in report


def test_one_long_document_still_fills_all_rows(packed):
    text = " ".join(map(str, range(3000)))
    rows, reports = packed([text], 16, 64)
    assert rows.shape == (64, 16) and (rows[:, 0] == BOS).all()
    assert len({tuple(row) for row in rows.tolist()}) == 64
    (report,) = reports
    assert report.startswith("one document ('") and report.endswith(
        "…) gives 1,024 of 1,024 tokens: the texts hold 1 documents, too few or too short for 64 rows; give more"
    )


def test_copies_count_once(packed, byte_tokenizer):
    rows, reports = packed(["x", [5, 6], "x", [5, 6], "x", "y"], 7, 1)
    assert sorted(rows[0].tolist()) == sorted([5, 6, BOS, BOS, BOS, *byte_tokenizer.encode("xy").ids])
    assert reports == ["3 of 6 documents are copies of others; each counts once"]


@pytest.mark.parametrize("option", ["length", "num_samples", "document_rows"])
def test_pack_refuses(packed, option):
    with pytest.raises(DataError, match=f"{option}: 0 does not fit; use 1 or more"):
        packed(["a"], **({"length": 2, "num_samples": 2} | {option: 0}))


def test_pack_of_nothing(packed):
    with pytest.raises(DataError, match="none to pack"):
        packed([], 16, 4)


def test_batches_hold_every_row_once():
    rows = np.arange(15, dtype=np.int32).reshape(5, 3)
    found = list(batches(rows, 2))
    assert [len(b) for b in found] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(found), rows)
