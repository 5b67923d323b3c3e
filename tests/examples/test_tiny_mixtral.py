"""The committed checkpoint, the data beside it, and how that data is split."""

import importlib
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import fp8x
from fp8x.models.evaluate import evaluate

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "tiny_mixtral"


@pytest.fixture
def english(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("stdlib_english")


@pytest.fixture(scope="module")
def report():
    return json.loads((CHECKPOINT / "training.json").read_text())


@pytest.fixture(scope="module")
def heldout():
    return _texts(EXAMPLES / "heldout.jsonl")


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_split_keeps_documents_whole_and_ignores_the_order(english):
    corpus = [english.Document(f"module {i}", "module", f"Text number {i}. " * (10 + i)) for i in range(60)]
    training, heldout = english.split(corpus, 0.2)
    assert sorted(document.name for document in training + heldout) == sorted(document.name for document in corpus)
    assert 0.15 < sum(map(_size, heldout)) / sum(map(_size, corpus)) <= 0.2
    assert english.split(corpus[::-1], 0.2) == (training, heldout)


def test_no_heldout_paragraph_is_trained_on(english):
    shared = "This paragraph is longer than sixty-four characters and stands in every one of the documents."
    corpus = [
        english.Document(f"module {i}", "module", f"Only number {i} says this.\n\n{shared}\n\nOr this: {i}.")
        for i in range(20)
    ]
    training, heldout = english.split(corpus, 0.3)
    assert heldout and english.shared_with(training, heldout, english.MAX_COPY) == 0
    assert english.shared_with(corpus, heldout, english.MAX_COPY) > 0.5
    assert all(shared in document.text for document in heldout)
    assert not any(shared in document.text for document in training)


def test_a_copy_across_line_breaks_and_paragraphs_is_found(english):
    parts = ["First of all, it reads the file.", "Then it writes what it has read.", "At last it closes both of them."]
    one = english.Document("one", "module", "\n\n".join(parts))
    other = english.Document("other", "module", " ".join(parts).replace(", ", ",\n    "))
    assert english.shared_with([one], [other], 64) == 1


def test_checkpoint_is_small_enough_to_be_committed():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 10_000_000


def test_heldout_texts_are_those_of_the_report(english, report, heldout):
    documents = [english.Document(str(i), "module", text) for i, text in enumerate(heldout)]
    assert english.sha256(documents) == report["heldout"]["sha256"]
    assert sum(map(_size, documents)) == report["heldout"]["bytes"] > 100_000


def test_calibration_texts_are_no_heldout_texts(english, heldout):
    calibration = _texts(EXAMPLES / "calibration.jsonl")
    assert 64 <= len(calibration) <= 128
    as_documents = [[english.Document("", "module", text) for text in texts] for texts in (calibration, heldout)]
    assert english.shared_with(*as_documents, english.MAX_COPY) == 0


def test_tokenizer_loses_nothing(heldout):
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    for text in [*heldout, "naïve ☃ 漢字\r\n\t\0 <|endoftex"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_it_has_learned_english(report, heldout):
    assert report["bits_per_byte"] < 0.9 * report["xz_bits_per_byte"]
    model = fp8x.load(CHECKPOINT)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    result = evaluate(model, tokenizer, heldout[:12])
    assert result.bits_per_byte < report["xz_bits_per_byte"]


def test_every_expert_is_used(report):
    for layer in report["expert_load_on_heldout"]:
        assert sum(layer) == pytest.approx(1, abs=1e-3)
        assert min(layer) > 0.02


def _size(document) -> int:
    return document.num_bytes
