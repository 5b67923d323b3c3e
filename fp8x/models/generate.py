"""`generate` and `stream`: continue prompts, greedily or by sampling, in compiled functions."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

from fp8x.errors import MeshError
from fp8x.models.decoder import Decoder
from fp8x.models.decoding import Generate, Running
from fp8x.models.request import Prompts, Request, make_request
from fp8x.scheme import Scheme
from fp8x.sharding.run import batch_spec, call, to_mesh

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def generate(
    model: Decoder,
    ids: Prompts,
    *,
    lengths: Sequence[int] | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    eos_id: int | Sequence[int] | None = None,
    stop_strings: Sequence[str] | None = None,
    tokenizer: "Tokenizer | None" = None,
    prefill_chunk: int | None = None,
    cache_dtype: Scheme | str | DTypeLike | None = None,
) -> Int32[Array, "b longest_and_new"]:
    """Prompts, each with up to `max_new_tokens` more tokens directly behind it, then the first of `eos_id`, or 0.

    Prefill and decoding are one compiled function with the keys and values of what was read in a cache. Lengths fall
    into classes (`fp8x.models.request.length_class`): it is compiled once for each class of the longest prompt, class
    of the longest text and number of prompts (and whether their lengths differ), `top_k`, `prefill_chunk` and
    `cache_dtype`, for the number of ends and stop strings, and for which options are None; their values may change
    freely.

    Arguments:
        model: the decoder.
        ids: prompts: `[B, T]`, or B lists of different lengths.
        lengths: of `[B, T]`, how many ids of each row are its prompt, from the first; by default all.
        max_new_tokens: tokens to add.
        temperature: 0 takes the most likely token, and nothing is drawn; otherwise tokens are drawn from
            `softmax(logits / temperature)`, of those that `top_k`, then `top_p`, then `min_p` leave: transformers' way.
        top_k: draw among the k most likely tokens only.
        top_p: draw among the fewest tokens whose probabilities add up to `top_p` only.
        min_p: draw among tokens at least `min_p` times as likely as the likeliest only.
        seed: of the draws, which depend on no other text: with seeds of their own, texts are drawn as each alone.
        eos_id: tokens that end a text, such as `model.config.eos_token_id`. By default none does.
        stop_strings: a text ends with the token that completes one of them in what is new of it, special tokens as they
            are written.
        tokenizer: what gives tokens their text, for `stop_strings`.
        prefill_chunk: reads so many tokens of the prompts at a time, which bounds the memory of attention's scores;
            prompts of as many chunks share a compilation.
        cache_dtype: what the cache holds, as `Decoder.init_cache` takes it: "e4m3" for 8 bits.

    Raises:
        DataError: texts that may become longer than the model's context (`Decoder.set_context`), an empty prompt, token
            ids outside the vocabulary, an option out of range, or a tokenizer whose tokens have no bytes of their own.
        CalibrationError: a layer's static activation scale is missing, or the cache's, or the layer is in calibration.
        MeshError: a number of prompts that the devices along the axis `data` can't share evenly.
        RecipeError: a `cache_dtype` that does not fit keys and values.
    """
    request = make_request(
        model,
        ids,
        lengths=lengths,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        eos_id=eos_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        prefill_chunk=prefill_chunk,
        cache_dtype=cache_dtype,
    )
    if model.placement is None:
        new = _compiled(Generate(request.prefill), model)(*request.args)
    else:
        program = Generate(request.prefill, model.placement.batch)
        new = call(program, model, *request.args, in_specs=request.specs(model), out_specs=P())
    # By numpy, and as they are: operations of JAX would be compiled for every length.
    return jax.device_put(request.texts(np.asarray(new)))


def stream(
    model: Decoder,
    ids: Prompts,
    *,
    lengths: Sequence[int] | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    eos_id: int | Sequence[int] | None = None,
    stop_strings: Sequence[str] | None = None,
    tokenizer: "Tokenizer | None" = None,
    prefill_chunk: int | None = None,
    cache_dtype: Scheme | str | DTypeLike | None = None,
) -> Iterator[Int32[np.ndarray, " b"]]:
    """The new tokens of `generate`, as they come: of all texts the first, then of all the second, and so on.

    Ends when all texts have ended; those that end before others give the first of `eos_id`, or 0. The prefill and a
    step are compiled, each as often as `generate`.

    Arguments and errors are those of `generate`; they come with the call, before the first token.

    Raises:
        MeshError: also for a model on devices of several processes.
    """
    request = make_request(
        model,
        ids,
        lengths=lengths,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        eos_id=eos_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        prefill_chunk=prefill_chunk,
        cache_dtype=cache_dtype,
    )
    if model.placement is not None and jax.process_count() > 1:
        raise MeshError(f"model: it lies on devices of {jax.process_count()} processes; use generate")
    return _stream(model, request, max_new_tokens)


def _stream(model: Decoder, request: Request, max_new_tokens: int) -> Iterator[Int32[np.ndarray, " b"]]:
    prompt, lengths, controls = request.args
    if model.placement is None:
        prefill = _compiled(request.prefill, model)
        step = _compiled(request.prefill.step, model, num_donated=1)
        controls = jax.device_put(controls)
    else:
        rows = batch_spec(model.placement)
        specs, cache_specs = request.specs(model), model.cache_specs(lengths.ndim)
        after = (cache_specs, Running(P(), rows, rows, rows))
        prefill = functools.partial(call, request.prefill, model, in_specs=specs, out_specs=after)
        options = {"in_specs": (*after, specs[-1]), "out_specs": after, "num_donated": 1}
        step = functools.partial(call, request.prefill.step, model, **options)
        controls = to_mesh(model.placement, controls, specs[-1])
    cache, running = prefill(prompt, lengths, controls)
    for remaining in reversed(range(max_new_tokens)):
        tokens, done = jax.device_get((running.last, running.done))
        yield tokens
        if done.all() or not remaining:
            return
        cache, running = step(cache, running, controls)


def _compiled(program: Callable, model: Decoder, num_donated: int = 0) -> Callable[..., Any]:
    """`program(model, *args)` as a compiled function of `args`; results may take the place of the first of these."""
    graphdef, state = nnx.split(model)
    return lambda *args: _run(program, graphdef, state, args[:num_donated], args[num_donated:])


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _run(program: Callable, graphdef: nnx.GraphDef, state: nnx.State, donated: tuple, args: tuple) -> Any:
    return program(nnx.merge(graphdef, state), *donated, *args)
