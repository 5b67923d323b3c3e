"""What `generate` and `stream` are given, checked and made into arrays."""

import dataclasses
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Int, Int32, UInt32

from fp8x.errors import DataError
from fp8x.models.decoder import Decoder
from fp8x.models.decoding import Controls, Prefill, Step
from fp8x.models.inputs import check_length, read_ids
from fp8x.models.kv_quantizer import as_scheme
from fp8x.models.sampling import Sampling
from fp8x.models.stop import Stops
from fp8x.nn.walk import check_calibrated
from fp8x.scheme import Scheme
from fp8x.sharding.run import batch_spec, check_batch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Prompts = Int[np.ndarray, "b t"] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Request:
    """Texts to be continued.

    Attributes:
        prefill: what is compiled in.
        args: prompts, with zeros behind; their lengths, one for all where they are alike; and what is not compiled in.
    """

    prefill: Prefill
    args: tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, "*b"], Controls]

    def specs(self, model: Decoder) -> tuple[P, P, Controls]:
        """How `args` lie on the model's mesh."""
        rows = batch_spec(model.placement)
        sampling = Sampling(P(), P(), P(), rows, rows)
        return rows, rows if self.args[1].ndim else P(), Controls(P(), sampling, P(), P())

    def texts(self, new: Int32[np.ndarray, "b capacity"]) -> Int32[np.ndarray, "b longest_and_new"]:
        """Prompts, the new tokens of each directly behind, and the filler."""
        prompts, lengths, controls = self.args
        lengths, count = np.broadcast_to(lengths, len(prompts)), int(controls.max_new_tokens)
        filler = 0 if controls.ends is None else controls.ends[0]
        texts = np.full((len(prompts), lengths.max() + count), filler, np.int32)
        for text, prompt, length, tokens in zip(texts, prompts, lengths, new, strict=True):
            text[:length], text[length : length + count] = prompt[:length], tokens[:count]
        return texts


def make_request(
    model: Decoder,
    ids: Prompts,
    *,
    lengths: Sequence[int] | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | Sequence[int],
    eos_id: int | Sequence[int] | None,
    stop_strings: Sequence[str] | None,
    tokenizer: "Tokenizer | None",
    prefill_chunk: int | None,
    cache_dtype: Scheme | str | DTypeLike | None,
) -> Request:
    """Arguments and errors as `generate`'s."""
    _check_not_compiling(model, ids)
    vocab_size = model.config.vocab_size
    prompt, lengths = _read_prompts(ids, lengths, vocab_size)
    batch, longest = prompt.shape
    if model.placement is not None:
        check_batch(model.placement, batch, "ids")
    _check_positive("max_new_tokens", max_new_tokens)
    if prefill_chunk is not None:
        _check_positive("prefill_chunk", prefill_chunk, "whole prompts at once")
    sampling, top_k = _read_sampling(temperature, top_k, top_p, min_p, seed, batch, vocab_size)
    ends = read_ids("eos_id", () if eos_id is None else eos_id, vocab_size).reshape(-1)
    stops = _read_stops(stop_strings, tokenizer, vocab_size)
    check_length(longest, max_new_tokens, model.config.context)
    check_calibrated(model)
    if cache_dtype is not None:
        cache_dtype = as_scheme(cache_dtype, model.kv_cache, "cache_dtype")
    model.init_cache(0, 0, cache_dtype)  # raises where scales are missing, which a compiled function can't see
    width, capacity, chunk = _room(longest, max_new_tokens, prefill_chunk, model.config.context)
    prompt = np.pad(prompt, ((0, 0), (0, width - longest)))
    if (lengths == longest).all():
        lengths = lengths[0]
    controls = Controls(np.int32(max_new_tokens), sampling, ends if ends.size else None, stops)
    prefill = Prefill(Step(top_k), capacity, chunk, cache_dtype)
    return Request(prefill, (prompt, lengths, controls))


def _check_not_compiling(model: Decoder, ids: Prompts) -> None:
    # Inside jit whatever is computed is a tracer, though no argument is.
    computed = jnp.zeros(())
    if any(isinstance(x, jax.core.Tracer) for x in (computed, ids, model.embed_tokens.embedding[...])):
        raise DataError(
            "ids: generate and stream compile a loop of their own, and can't be called inside jax.jit, nnx.jit, vmap "
            "or grad; call them outside, or loop over model.extend inside"
        )


def length_class(tokens: int) -> int:
    """The next of 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, ...: four an octave.

    What is compiled for it serves every length up to it. Powers of two would be compiled half as often, but make the
    largest caches up to twice as large, and a step has to read them; here that is a quarter.
    """
    if tokens <= 32:
        return 32
    step = max(64, 1 << ((tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def _room(longest: int, max_new_tokens: int, prefill_chunk: int | None, context: int | None) -> tuple[int, int, int]:
    """Of prompts the width and how much is read at a time, which divides it, and of a cache the capacity."""
    width, capacity = length_class(longest), length_class(longest + max_new_tokens)
    if context is not None:
        width, capacity = min(width, context), min(capacity, context)
    chunk = width if prefill_chunk is None else min(prefill_chunk, width)
    width = -(-width // chunk) * chunk
    return width, max(width, capacity), chunk


def _read_prompts(
    ids: Prompts, lengths: Sequence[int] | None, vocab_size: int
) -> tuple[Int32[np.ndarray, "b longest"], Int32[np.ndarray, " b"]]:
    """Prompts, zeros behind them, and their lengths."""
    if ids is None or isinstance(ids, str | bytes | Mapping) or np.isscalar(ids):
        raise DataError(f"ids: {ids!r:.40} is no list of prompts; give token ids [B, T], or lists of ids, one a prompt")
    try:
        array = np.asarray(ids)
    except ValueError:
        array = None
    if array is None:
        if lengths is not None:
            raise DataError("lengths: ids are rows of different lengths already; leave lengths out")
        return _read_rows(ids, vocab_size)
    if array.ndim != 2 or not array.size:
        raise DataError(
            f"ids: shape is {list(array.shape)}; give at least one prompt of at least one token as [B, T], or lists of "
            f"different lengths{', for one prompt [ids]' if array.ndim == 1 and array.size else ''}"
        )
    batch, width = array.shape
    if lengths is None:
        return read_ids("ids", array, vocab_size), np.full(batch, width, np.int32)
    given = np.asarray(lengths)
    if given.shape != (batch,) or not np.issubdtype(given.dtype, np.integer):
        raise DataError(f"lengths: {given.dtype} of shape {list(given.shape)} does not fit; give {batch} integers")
    if bad := given[(given < 1) | (given > width)].tolist():
        raise DataError(f"lengths: {bad[0]} does not fit; ids are {width} wide, so use 1 to {width}")
    is_read = np.arange(width) < given[:, None]
    # Whatever is behind a prompt, be it a pad token outside the vocabulary.
    array = read_ids("ids", np.where(is_read, array, 0), vocab_size)
    return array[:, : given.max()], given.astype(np.int32)


def _read_rows(
    rows: Sequence[Sequence[int]], vocab_size: int
) -> tuple[Int32[np.ndarray, "b longest"], Int32[np.ndarray, " b"]]:
    """`_read_prompts` of lists of different lengths."""
    arrays = [read_ids(f"ids[{number}]", row, vocab_size) for number, row in enumerate(rows)]
    for number, row in enumerate(arrays):
        if row.ndim != 1 or not row.size:
            raise DataError(
                f"ids[{number}]: shape is {list(row.shape)}; give each prompt as a list of at least one token"
            )
    lengths = np.array([*map(len, arrays)], np.int32)
    return np.stack([np.pad(row, (0, lengths.max() - len(row))) for row in arrays]), lengths


def _read_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | Sequence[int],
    batch: int,
    vocab_size: int,
) -> tuple[Sampling, int | None]:
    """How tokens are drawn, and of how many; options of drawing are None where nothing is drawn."""
    if not isinstance(temperature, int | float | np.number) or not 0 <= temperature < float("inf"):
        raise DataError(f"temperature: {temperature} does not fit; use 0 for greedy decoding, or a positive number")
    if top_k is not None:
        _check_positive("top_k", top_k, "all tokens")
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None and not 0 <= share <= 1:
            raise DataError(f"{name}: {share} does not fit; use 0 to 1, or None for all tokens")
    seeds, streams = _read_seeds(seed, batch)
    if temperature < np.finfo(np.float32).tiny:
        options = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        if given := [name for name, value in options.items() if value is not None]:
            warnings.warn(f"{', '.join(given)}: not used, since nothing is drawn at temperature 0", stacklevel=4)
        return Sampling(None, None, None, seeds, streams), None
    numbers = (None if number is None else np.float32(number) for number in (temperature, top_p, min_p))
    return Sampling(*numbers, seeds, streams), None if top_k is None else min(top_k, vocab_size)


def _read_seeds(seed: int | Sequence[int], batch: int) -> tuple[UInt32[np.ndarray, " b"], UInt32[np.ndarray, " b"]]:
    """The seed of each text, and its number among those of one seed."""
    seeds = np.asarray(seed)
    if seeds.dtype.kind not in "iu" or seeds.shape not in ((), (batch,)):
        raise DataError(f"seed: {seed!r} does not fit; use an integer, or one for each of {batch} prompts")
    if bad := seeds[(seeds < 0) | (seeds >= 2**32)].tolist():
        raise DataError(f"seed: {bad[0]} does not fit; use 0 to 2**32 - 1")
    streams = np.zeros(batch, np.uint32) if seeds.ndim else np.arange(batch, dtype=np.uint32)
    return np.broadcast_to(seeds, batch).astype(np.uint32), streams


def _read_stops(stop_strings: Sequence[str] | None, tokenizer: "Tokenizer | None", vocab_size: int) -> Stops | None:
    if stop_strings is None:
        return None
    if isinstance(stop_strings, str) or not all(isinstance(string, str) for string in stop_strings):
        raise DataError(f"stop_strings: {stop_strings!r} does not fit; give a list of strings")
    if any(string != string.encode(errors="replace").decode() for string in stop_strings):
        raise DataError("stop_strings: one is not UTF-8")
    if "" in stop_strings:
        raise DataError("stop_strings: one is empty, which would end every text; leave it out")
    if not stop_strings:
        return None
    if not hasattr(tokenizer, "get_vocab"):
        given = "missing" if tokenizer is None else f"is a {type(tokenizer).__name__}"
        raise DataError(f"tokenizer: {given}; stop_strings need the tokenizers.Tokenizer that gives tokens their bytes")
    return Stops.of(stop_strings, tokenizer, vocab_size)


def _check_positive(name: str, value: int, none: str | None = None) -> None:
    try:
        is_positive = operator.index(value) >= 1
    except TypeError:
        is_positive = False
    if not is_positive:
        raise DataError(f"{name}: {value!r} does not fit; use 1 or more{f', or None for {none}' if none else ''}")
