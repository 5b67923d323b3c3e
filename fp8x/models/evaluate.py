"""`evaluate`: how well a decoder predicts text, in bits per byte and perplexity."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int
from tokenizers import Tokenizer

from fp8x.calibrate.data import tokenize
from fp8x.errors import ConfigError, DataError
from fp8x.models.config import DecoderConfig
from fp8x.models.decoder import Decoder
from fp8x.models.inputs import check_context, check_tokens, read_ids
from fp8x.nn.walk import check_calibrated
from fp8x.sharding.run import batch_spec, call, fill_batch

DEFAULT_CONTEXT = 2048
IGNORED = -1  # a target that counts nothing


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts texts; lower is better.

    Attributes:
        bits_per_byte: the information in a byte of UTF-8 text, to this model; comparable between tokenizers.
        perplexity: `exp` of the mean negative log-likelihood of a token; comparable with the same tokenizer only.
        tokens: tokens predicted.
        bytes: UTF-8 bytes of the documents.
    """

    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    context: int | None = None,
    batch_size: int = 8,
    bos_id: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Bits per byte and perplexity of a decoder on documents.

    The rule: each document stands alone, after `bos_id`. It is cut into windows of `context` tokens which the model
    reads one by one; each window begins with the last token of the one before, so that every token of the document is
    predicted exactly once, from what its window holds before it. Bits per byte is `-log2 p` summed over all tokens of
    all documents, divided by their bytes in UTF-8; `bos_id` itself is not predicted. Log-softmax is in float32.

    Arguments:
        model: the decoder.
        tokenizer: its tokenizer.
        texts: the documents. Empty ones are passed over.
        context: tokens in a window; by default the model's context, 2048 at most.
        batch_size: windows at a time. One shape is compiled, whatever the documents' lengths.
        bos_id: what stands before a document; by default the config's `bos_token_id`, or else `eos_token_id`.
        progress: called with the windows done and the windows in all.

    Raises:
        DataError: nothing to predict; windows beyond the model's context (`Decoder.set_context`); a document that is
            token ids; or ids beyond the vocabulary, which come from another model's tokenizer.
        ConfigError: the config names no token to begin with, and none is given.
        CalibrationError: a layer's static activation scale is missing, or the layer is in calibration.
    """
    context = default_context(model.config) if context is None else context
    check_context("context", context, model.config.context)
    bos_id = first_token(model.config) if bos_id is None else bos_id
    read_ids("bos_id", bos_id, model.config.vocab_size)
    if context < 1 or batch_size < 1:
        raise DataError(f"context {context} and batch_size {batch_size} do not fit; both have to be positive")
    documents = [_tokens(text, tokenizer, bos_id, model.config.vocab_size) for text in texts if text]
    check_calibrated(model)
    tokens = sum(len(ids) - 1 for ids in documents)
    if not tokens:
        raise DataError(f"texts: {len(texts)} documents hold no token to predict")
    windows = list(_windows(documents, context))
    rows = min(batch_size, len(windows))
    if model.placement is not None:
        rows = fill_batch(model.placement, rows)
    nats, done = 0.0, 0
    for inputs, targets in _batches(windows, rows):
        nats += float(np.asarray(_negative_log_likelihood(model, inputs, targets), np.float64).sum())
        done = min(done + len(inputs), len(windows))
        if progress is not None:
            progress(done, len(windows))
    size = sum(len(text.encode()) for text in texts)
    return Evaluation(nats / math.log(2) / size, _exp(nats / tokens), tokens, size)


def default_context(config: DecoderConfig) -> int:
    """The tokens that a decoder may read at once, 2048 at most."""
    return DEFAULT_CONTEXT if config.context is None else min(config.context, DEFAULT_CONTEXT)


def first_token(config: DecoderConfig) -> int:
    """The token that a text begins after: `bos_token_id`, or `eos_token_id` for models without one.

    Raises:
        ConfigError: the config names neither.
    """
    bos = config.hf.get("bos_token_id")
    bos = config.eos_token_id[0] if bos is None and config.eos_token_id else bos
    if not isinstance(bos, int) or not 0 <= bos < config.vocab_size:
        raise ConfigError(
            f"config.json: bos_token_id is {bos!r}, and a text has to begin after a token; "
            f"name one in 0..{config.vocab_size - 1}"
        )
    return bos


def _tokens(text: str, tokenizer: Tokenizer, bos_id: int, vocab_size: int) -> list[int]:
    if not isinstance(text, str):
        raise DataError("texts: a document is token ids, and bits per byte needs its text; give documents with 'text'")
    ids = tokenize(text, tokenizer, bos_id)
    check_tokens("tokenizer", ids, tokenizer, vocab_size)
    return ids


def _windows(documents: Iterable[Sequence[int]], context: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """What the model reads and what it is to predict: as many of one as of the other, `context` at most."""
    for ids in documents:
        for start in range(0, len(ids) - 1, context):
            targets = ids[start + 1 : start + 1 + context]
            yield ids[start : start + len(targets)], targets


def _batches(
    windows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
) -> Iterator[tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"]]]:
    """Inputs (padded by 0, which is after every target) and targets (by `IGNORED`), in batches of one shape."""
    length = max(len(targets) for _, targets in windows)
    for first in range(0, len(windows), batch_size):
        inputs = np.zeros((batch_size, length), np.int32)
        targets = np.full((batch_size, length), IGNORED, np.int32)
        for row, (source, target) in enumerate(windows[first : first + batch_size]):
            inputs[row, : len(source)] = source
            targets[row, : len(target)] = target
        yield inputs, targets


def _negative_log_likelihood(
    model: Decoder, inputs: Int[np.ndarray, "b t"], targets: Int[np.ndarray, "b t"]
) -> Float32[Array, " b"]:
    """Nats of each window's targets; those equal to `IGNORED` count nothing."""
    if model.placement is None:
        return _on_one_device(model, inputs, targets)
    rows = batch_spec(model.placement)
    function = _of_all_rows if model.placement.batch else _of_rows
    return call(function, model, inputs, targets, in_specs=(rows, rows), out_specs=P())


def _of_all_rows(model: Decoder, inputs: Int[Array, "b t"], targets: Int[Array, "b t"]) -> Float32[Array, " all"]:
    return jax.lax.all_gather(_of_rows(model, inputs, targets), "data", tiled=True)


def _of_rows(model: Decoder, inputs: Int[Array, "b t"], targets: Int[Array, "b t"]) -> Float32[Array, " b"]:
    log_p = jax.nn.log_softmax(model(inputs).astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(targets == IGNORED, 0.0, picked), axis=-1)


_on_one_device = nnx.jit(_of_rows)


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)  # of NaN, NaN
