"""Stop strings against a plain search in the text."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from fp8x.errors import DataError
from fp8x.models.stop import Stops


def byte_level(*tokens: str) -> Tokenizer:
    """Of tokens as GPT-2 spells them, with `Ġ` for a space."""
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(*tokens: str, decoder: decoders.Decoder | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoder or decoders.Sequence(parts)
    return tokenizer


def first_stop(tokenizer: Tokenizer, strings: list[str], tokens: list[str]) -> int | None:
    """The number of the token with which a text ends."""
    stops = Stops(*map(jnp.asarray, Stops.of(strings, tokenizer, tokenizer.get_vocab_size() + 3)))
    tail = stops.empty_tail(1)
    for number, token in enumerate(tokens):
        is_stopped, tail = stops.read(tail, jnp.array([tokenizer.token_to_id(token)]))
        if is_stopped[0]:
            return number
    return None


def test_strings_may_begin_and_end_inside_tokens():
    tokenizer = byte_level("st", "op", "stop", "opera", "sto", "pper", "las", "topper", "s", "to", "pped", "at", "Ġ")
    for tokens in (["st", "op"], ["st", "opera"], ["sto", "pper"], ["las", "topper"], ["s", "to", "pped"], ["stop"]):
        assert first_stop(tokenizer, ["stop"], [*tokens, "at"]) == len(tokens) - 1
    assert first_stop(tokenizer, ["stop"], ["st", "Ġ", "op", "sto", "at", "to"]) is None
    assert first_stop(tokenizer, ["never", "o o", "stop"], ["s", "to", "Ġ", "op", "stop"]) == 3


def test_random_texts():
    rng = np.random.default_rng(0)
    words = sorted({"".join(rng.choice([*"ab"], size)) for size in rng.integers(1, 5, 12)})
    tokenizer = byte_level(*words)
    strings = ["abbab", "b" * 5, "aabaabaabaabaabaa"]  # the last is longer than LENGTH_STEP
    stops = Stops(*map(jnp.asarray, Stops.of(strings, tokenizer, len(words))))
    ids = rng.integers(0, len(words), (64, 12))
    tail, found = stops.empty_tail(64), []
    for column in ids.T:
        is_stopped, tail = stops.read(tail, jnp.asarray(column))
        found.append(np.asarray(is_stopped))
    for row, stopped in zip(ids, np.array(found).T):
        texts = ["".join(words[number] for number in row[:count]) for count in range(len(row) + 1)]
        # A string that ends in the last token is found, whatever came before.
        expected = [
            any(string in after[max(0, len(before) - len(string) + 1) :] for string in strings)
            for before, after in itertools.pairwise(texts)
        ]
        assert stopped.tolist() == expected
    assert 0 < np.sum(found) < np.size(found)


def test_a_character_of_several_tokens():
    tokenizer = byte_level("Ã", "©", "caf", "Ċ")  # é is C3 A9
    assert first_stop(tokenizer, ["fé\n"], ["caf", "Ã", "©", "Ċ", "Ċ"]) == 3


def test_sentencepiece():
    tokenizer = sentencepiece("<s>", "▁the", "▁end", "<0x0A>", "<0xC3>", "<0xA9>", "e")
    assert first_stop(tokenizer, ["e end\n"], ["<s>", "▁the", "▁end", "<0x0A>"]) == 3
    assert first_stop(tokenizer, [" the"], ["▁the"]) == 0
    assert first_stop(tokenizer, ["é"], ["e", "<0xC3>", "<0xA9>"]) == 2
    metaspace = sentencepiece("▁the", "▁end", decoder=decoders.Metaspace())
    assert first_stop(metaspace, ["he end"], ["▁the", "▁end"]) == 1


def test_added_tokens_are_text():
    tokenizer = byte_level("a", "Ġ", "Ċ")
    tokenizer.add_tokens([AddedToken("  é", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    assert first_stop(tokenizer, ["a  é"], ["a", "  é"]) == 1
    assert first_stop(tokenizer, ["|>\n"], ["<|end|>", "Ċ"]) == 1


def test_tokens_beyond_the_model_are_left_out():
    assert Stops.of(["ab"], byte_level("a", "b", "longer"), 2).tokens.shape == (2, 1)


@pytest.mark.parametrize(("decoder", "name"), [(decoders.WordPiece(), "WordPiece"), (None, "none")])
def test_tokenizers_without_bytes_are_refused(decoder, name):
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "##s": 1}, unk_token="[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(DataError, match=f"stop_strings: the tokenizer's decoder is {name}, whose tokens have no bytes"):
        Stops.of(["s"], tokenizer, 2)
