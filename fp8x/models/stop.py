"""Stop strings inside a compiled loop: the bytes of every token in a table, and the last bytes of each text carried."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int16, Int32, UInt8

from fp8x.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Strings are padded to a multiple of this many bytes, so that others of about their length need no new compilation.
LENGTH_STEP = 16


class Stops(NamedTuple):
    """Stop strings, and what they are looked for in.

    Attributes:
        tokens: the bytes of each token, from the left.
        token_lengths: how many bytes a token has.
        strings: the bytes of each stop string, from the right.
        string_lengths: how many bytes a stop string has.
    """

    tokens: UInt8[Array, "vocab longest"]
    token_lengths: Int32[Array, " vocab"]
    strings: UInt8[Array, "n length"]
    string_lengths: Int32[Array, " n"]

    @classmethod
    def of(cls, strings: Sequence[str], tokenizer: "Tokenizer", vocab_size: int) -> "Stops":
        """
        Raises:
            DataError: the tokenizer is of a kind whose tokens have no bytes of their own.
        """
        encoded = [string.encode() for string in strings]
        length = -(-max(map(len, encoded)) // LENGTH_STEP) * LENGTH_STEP
        from_the_right = np.array([list(string.rjust(length, b"\0")) for string in encoded], np.uint8)
        # Tokens that are added later are seen by their number.
        tokens, token_lengths = _token_table(tokenizer, tokenizer.get_vocab_size(), vocab_size)
        return cls(tokens, token_lengths, from_the_right, np.array([*map(len, encoded)], np.int32))

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.tokens[token, : self.token_lengths[token]].tobytes()

    def empty_tail(self, batch: int) -> Int16[Array, "b length"]:
        """The last bytes of texts that have none yet."""
        return jnp.full((batch, self.strings.shape[1]), -1, jnp.int16)

    def read(
        self, tail: Int16[Array, "b length"], token: Int32[Array, " b"]
    ) -> tuple[Bool[Array, " b"], Int16[Array, "b length"]]:
        """Whether a stop string ends inside `token` after the bytes `tail`, and the last bytes with the token's."""
        length, longest = self.strings.shape[1], self.tokens.shape[1]
        text = jnp.concatenate([tail, self.tokens[token].astype(tail.dtype)], axis=1)
        count = self.token_lengths[token]
        ends = 1 + jnp.arange(longest)
        windows = text[:, ends[:, None] + jnp.arange(length)]  # [b, longest, length]: up to each of the token's bytes
        is_padding = jnp.arange(length) < length - self.string_lengths[:, None]
        is_equal = (windows[:, :, None] == self.strings) | is_padding
        is_stopped = jnp.any(jnp.all(is_equal, axis=-1) & (ends <= count[:, None])[..., None], axis=(1, 2))
        cut = jax.vmap(lambda text, start: jax.lax.dynamic_slice_in_dim(text, start, length))
        return is_stopped, cut(text, count)


# Of 150,000 tokens the table takes a third of a second.
@functools.lru_cache(maxsize=1)
def _token_table(
    tokenizer: "Tokenizer", count: int, vocab_size: int
) -> tuple[UInt8[np.ndarray, "vocab longest"], Int32[np.ndarray, " vocab"]]:
    bytes_of = _token_reader(tokenizer)
    every = [b""] * vocab_size
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number < vocab_size:
            every[number] = bytes_of(token)
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if number < vocab_size:
            every[number] = token.content.encode()
    lengths = np.array([*map(len, every)], np.int32)
    longest = max(1, lengths.max())
    return np.array(every, f"S{longest}").view(np.uint8).reshape(vocab_size, longest), lengths


def _token_reader(tokenizer: "Tokenizer") -> Callable[[str], bytes]:
    """What tells the bytes of a token that is in the middle of a text, by the kind of the tokenizer's decoder."""
    decoder = {} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    parts = decoder.get("decoders", [decoder])
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        is_spelled = alphabet.keys().__ge__
        return lambda token: bytes(map(alphabet.get, token)) if is_spelled(set(token)) else token.encode()
    has_spaces = any(part.get("type") == "Replace" and part.get("pattern") == {"String": "▁"} for part in parts)
    if not (has_spaces or kinds & {"Metaspace", "ByteFallback"}):
        kind = ", ".join(sorted(filter(None, kinds))) or "none"
        raise DataError(
            f"stop_strings: the tokenizer's decoder is {kind}, whose tokens have no bytes of their own; use a "
            "tokenizer with byte-level or SentencePiece tokens, or eos_id"
        )

    def read(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(byte[1])
        return token.replace("▁", " ").encode()

    return read


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character in byte-level tokens: GPT-2's `bytes_to_unicode`, the other way round."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
