"""Texts to calibrate and evaluate on: read from JSON and JSONL, tokenized, packed into rows of one length."""

import collections
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from fp8x.calibrate.compressed import decompressed
from fp8x.errors import DataError

Text = str | list[int]

MAX_REPORTS = 10
DOCUMENT_ROWS = 1
DOMINANT = 0.25  # a share of all tokens that one document gives only with a word
_FORMS = "'text', 'messages', 'conversations', 'ids' or 'input_ids'"
_WHERE = "JSONL, or a JSON array, of lists of token ids or objects with"


def read_texts(
    path: str | Path, *, report: Callable[[str], None] = warnings.warn, limit: int | None = MAX_REPORTS
) -> list[Text]:
    """The documents of a data file, in its order: strings, or lists of token ids.

    A file is JSONL (one record a line) or one JSON array of records, as it is or compressed by gzip or Zstandard. A
    record is a list of token ids, or an object, which is read by the first of these it has:
        `text`: a string.
        `messages`: chat turns; their `content` is a string, or a list of parts of which `text` ones count.
        `conversations`: ShareGPT turns, with their words in `value`.
        `ids`, `input_ids`: token ids.
    The turns of one conversation become one text, their words alone, a blank line between them. No chat template is
    applied: where the model is to see its own, give `text` or `ids` to which it has been.

    Arguments:
        path: the file.
        report: called with a message for each malformed line (or item of an array), which is skipped: its number and
            what is wrong with it; those over `limit` are only counted.
        limit: None has every one reported.

    Raises:
        DataError: the file can't be read, or holds nothing that can be used.
    """
    path = Path(path)
    texts, malformed = [], []
    for where, record in _records(path):
        try:
            texts.append(_text_of(record()))
        # RecursionError: JSON nested thousands deep.
        except (ValueError, RecursionError) as error:
            malformed.append(f"{path}: {where}: {error}; skipped")
    for message in malformed[:limit]:
        report(message)
    if limit is not None and len(malformed) > limit:
        report(f"{path}: {len(malformed) - limit:,} more are malformed; skipped")
    if not texts:
        found = f"all {len(malformed)} records are malformed" if malformed else "it is empty"
        raise DataError(f"{path}: {found}; use {_WHERE} {_FORMS}")
    return texts


def tokenize(text: str | Sequence[int], tokenizer: Tokenizer, bos_id: int) -> list[int]:
    """The ids of one document, `bos_id` first; ids that begin with it already stay as they are."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids if isinstance(text, str) else text
    return list(ids) if not isinstance(text, str) and ids[0] == bos_id else [bos_id, *ids]


def pack(
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    length: int,
    num_samples: int,
    seed: int = 0,
    *,
    bos_id: int,
    document_rows: int = DOCUMENT_ROWS,
    report: Callable[[str], None] = warnings.warn,
) -> Int32[np.ndarray, "samples length"]:
    """Rows of `length` tokens: the documents in an order drawn from `seed`, each after `bos_id`, end to end.

    Of a document that is longer than `document_rows` rows, a piece of that size is taken, the one drawn from `seed`:
    so no document crowds out others, as in GPTQ and llm-compressor, whose samples are of one document each. Only when
    all have given one and rows are missing come the next pieces of the long ones. A document that is there several
    times counts once.

    Returns at most `num_samples` rows, fewer where the texts end earlier. Nothing is padded, since padding would enter
    the amax: what does not fill a row is left out, and texts shorter than one row make one shorter row.

    Arguments:
        report: called with a message for each of these: documents that are there several times, fewer tokens than were
            asked for, and a document that gives a quarter of them, and more than `document_rows` rows.

    Raises:
        DataError: there is no text, or a number below 1.
    """
    for name, value in {"length": length, "num_samples": num_samples, "document_rows": document_rows}.items():
        if value < 1:
            raise DataError(f"{name}: {value} does not fit; use 1 or more")
    documents = list(dict.fromkeys(text if isinstance(text, str) else tuple(text) for text in texts))
    if copies := len(texts) - len(documents):
        report(f"{copies:,} of {len(texts):,} documents are copies of others; each counts once")
    if not documents:
        raise DataError("texts: there are none to pack")
    draw, needed, ids, given = random.Random(seed), num_samples * length, [], collections.Counter()
    order = draw.sample(range(len(documents)), len(documents))
    tokenized = ((number, tokenize(documents[number], tokenizer, bos_id)) for number in order)
    for number, piece in _pieces(tokenized, document_rows * length, draw):
        given[number] += min(len(piece), needed - len(ids))
        ids += piece
        if len(ids) >= needed:
            break
    tokens = min(len(ids), needed)
    if tokens < needed:
        asked = f"{num_samples:,} rows of {length:,} tokens ({needed:,}) were asked for"
        report(f"{asked}, but the texts give {tokens:,} tokens; give more, or ask for fewer or shorter rows")
    ((longest, most),) = given.most_common(1)
    if most > max(document_rows * length, DOMINANT * tokens):
        report(
            f"one document{_beginning(documents[longest])} gives {most:,} of {tokens:,} tokens: the texts hold "
            f"{len(documents):,} documents, too few or too short for {num_samples:,} rows; give more"
        )
    length = min(length, tokens)
    count = tokens // length
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def _pieces(
    documents: Iterable[tuple[int, list[int]]], size: int, draw: random.Random
) -> Iterator[tuple[int, list[int]]]:
    """Pieces of `size` ids with their document's number: of each document one, then of the longer ones the next, and
    so on, until they are at an end. Each begins with the document's first id.
    """
    longer = []
    for number, (bos_id, *ids) in documents:
        step = max(1, size - 1)
        pieces = [[bos_id, *ids[start : start + step]] for start in range(0, len(ids), step)] or [[bos_id]]
        first = draw.randrange(max(1, len(ids) // step))  # a whole one
        yield number, pieces[first]
        if len(pieces) > 1:
            longer.append((number, [*pieces[first + 1 :], *pieces[:first]]))
    while longer:
        for number, pieces in longer:
            yield number, pieces.pop(0)
        longer = [(number, pieces) for number, pieces in longer if pieces]


def _beginning(text: str | Sequence[int]) -> str:
    """By which the user knows a document."""
    words = " ".join(text[:200].split()) if isinstance(text, str) else ""
    return f" ({words[:40]!r} …)" if words else ""


def batches(rows: Int32[np.ndarray, "samples length"], batch_size: int) -> Iterator[Int32[np.ndarray, "batch length"]]:
    """The rows in batches; the last may be smaller."""
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def _records(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Where each record of a file is, and a function that parses it or raises ValueError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give a JSONL or JSON file") from None
    raw = decompressed(path, raw)
    if b"\0" in raw[:8192]:
        raise DataError(f"{path}: it is binary; give a JSONL or JSON file in UTF-8, as it is or in gzip or Zstandard")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    # One array, unless it is the first of several lines: those are lists of token ids.
    if raw.lstrip()[:1] == b"[" and not _is_ids(raw.lstrip().split(b"\n", 1)[0]):
        try:
            items = _parse(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: it begins like a JSON array, but is none: {error}") from None
        for number, item in enumerate(items, 1):
            yield f"item {number}", lambda item=item: item
    else:
        for number, line in enumerate(raw.split(b"\n"), 1):
            if line.strip():
                yield f"line {number}", lambda line=line: _parse(line)


def _is_ids(line: bytes) -> bool:
    try:
        items = _parse(line)
    except (ValueError, RecursionError):
        return False
    return bool(items) and all(type(item) is int for item in items)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None


def _text_of(record: Any) -> Text:
    """The document in one record; ValueError says why there is none."""
    if isinstance(record, list):
        return _ids(record, "the record")
    if not isinstance(record, dict):
        raise ValueError(f"it is {_kind(record)}, not an object with {_FORMS}")
    if "text" in record:
        return _checked(record["text"], "text")
    for field, words in (("messages", "content"), ("conversations", "value")):
        if field in record:
            return _checked("\n\n".join(_turns(record[field], field, words)), field)
    for field in ("ids", "input_ids"):
        if field in record:
            return _ids(record[field], repr(field))
    raise ValueError(f"it has none of {_FORMS}")


def _turns(turns: Any, field: str, words: str) -> Iterator[str]:
    if not isinstance(turns, list):
        raise ValueError(f"{field!r} is {_kind(turns)}, not a list of turns")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or words not in turn:
            raise ValueError(f"turn {number} of {field!r} has no {words!r}")
        content = turn[words]
        if isinstance(content, list):
            content = "\n".join(_parts(content))
        # A turn that only calls a tool has null for its content.
        if content is not None and not isinstance(content, str):
            raise ValueError(f"{words!r} of turn {number} of {field!r} is {_kind(content)}, not a string")
        if content:
            yield content


def _parts(parts: list) -> Iterator[str]:
    """The text parts of a message; images and the like are left out."""
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            yield text


def _checked(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{field!r} is {_kind(text)}, not a string")
    if not text:
        raise ValueError(f"{field!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field!r} holds half of a surrogate pair, which is no character") from None
    return text


def _ids(ids: Any, field: str) -> list[int]:
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{field} is {_kind(ids) if ids else 'empty'}, not a list of token ids")
    for number, token in enumerate(ids, 1):
        # JSON's true is an int in Python.
        if type(token) is not int or not 0 <= token < 2**31:
            raise ValueError(f"entry {number} of {field} is {token!r:.40}, not a token id")
    return ids


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
