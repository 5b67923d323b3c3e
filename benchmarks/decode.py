"""Decoders of real layer shapes writing token after token, in bfloat16 and in every recipe.

    python benchmarks/decode.py --json decode.json                        # both models, batches of 1 to 64
    python benchmarks/decode.py --json decode.json --batches 1 --who mxfp8
    python benchmarks/decode.py --json decode.json --batches 64 --cache e4m3 --context 8192
    python benchmarks/decode.py --table decode.json                       # Markdown

The first goes on where a run before it stopped. Layers are as wide as the model's, but few (`--layers`); weights are
random, made in the bits that they are stored in. `--steps` tokens are decoded by one compiled function, greedily, after
a context of random keys and values; a step's time is a share of that. Parts are timed alone, each in a function of its
own over all layers: what attention, mixtures and the vocabulary take does not add up to a step, of which the rest is
norms, residuals and what one function saves over several. The floor is the bytes of all parameters but the experts that
no token visits, on average, and of the keys and values, at 4.8 TB/s.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int
from mixtures import RECIPES, Mixture, randomize

import fp8x
from fp8x.benchmark import H200, Results, copy_bandwidth, facts, time_queue
from fp8x.models import Decoder, DecoderConfig
from fp8x.models.attention import causal_mask
from fp8x.models.kv_cache import Cache, KeyValues
from fp8x.models.rotary import Rotary
from fp8x.ops.dispatch import BACKENDS

BF16 = "bf16"
CONFIGS = {
    "Mixtral 8x7B": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "dtype": "bfloat16",
    },
}  # fmt: skip
_TINY = {
    "vocab_size": 61, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "moe_intermediate_size": 96, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
TINY = {
    name: config | {"head_dim": 16} | {field: value for field, value in _TINY.items() if field in config}
    for name, config in CONFIGS.items()
}
BATCHES = [1, 8, 64]
QUICK = {"batches": [1, 16], "who": ["fp8_e4m3fn_bf16_block_scale", "mxfp8_mxfp8_bf16", BF16]}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How much is decoded: layers of the model, tokens before and tokens new, for each text of the batch; and what the
    cache holds."""

    layers: int
    context: int
    steps: int
    cache: str = BF16


def decoder(config: dict[str, Any], layers: int, who: str) -> Decoder:
    """A decoder with random weights, of which those in 8 bits never were in more."""
    shape = DecoderConfig.from_hf(config | {"num_hidden_layers": layers})

    def build() -> Decoder:
        model = Decoder(shape, rngs=nnx.Rngs(0))
        return model if who == BF16 else fp8x.quantize_model(model, who)

    model = nnx.eval_shape(build)
    randomize(model)
    return model


def full_cache(model: Decoder, batch: int, setting: Setting) -> Cache:
    """A cache in which `context` random tokens are, with room for the new ones."""
    empty = model.init_cache(batch, setting.context + setting.steps, setting.cache)

    @jax.jit
    def filled(room: KeyValues, key: Array) -> KeyValues:
        random = KeyValues(*(jax.random.normal(each, room.keys.shape, jnp.bfloat16) for each in jax.random.split(key)))
        return room.write(random, jnp.int32(0))

    layers = [filled(room, jax.random.key(i)) for i, room in enumerate(empty.layers)]
    return Cache(tuple(layers), jnp.int32(setting.context))


def decode(model: Decoder, ids: Int[Array, " b"], cache: Cache, steps: int) -> Int[Array, " b"]:
    """The last of `steps` tokens, each the likeliest after the one before."""

    def step(_, carry):
        ids, cache = carry
        hidden, cache = model.extend(ids[:, None], cache)
        return jnp.argmax(model.logits(hidden[:, 0]), axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, steps, step, (ids, cache))[0]


def attend(model: Decoder, x, cache: Cache):
    """The attention of every layer, one after another."""
    config, positions = model.config, cache.length + jnp.arange(1)[None]
    rotary = Rotary.at(positions, config.rope, x.dtype)
    mask = causal_mask(positions, jnp.arange(cache.layers[0].keys.shape[1]), config.sliding_window)
    for layer, cached in zip(model.layers, cache.layers):
        x, _ = layer.self_attn(layer.input_layernorm(x), rotary, mask, cached, cache.length)
    return x


def mix(model: Decoder, x, _: Cache):
    """The mixture of every layer, one after another."""
    for layer in model.layers:
        x = layer.mlp(layer.post_attention_layernorm(x)).astype(x.dtype)
    return x


def choose(model: Decoder, x, _: Cache):
    """The likeliest token."""
    return jnp.argmax(model.logits(x[:, 0]), axis=-1)


PARTS: dict[str, Callable] = {"attention": attend, "mixtures": mix, "vocabulary": choose}


def floor_seconds(model: Decoder, batch: int, setting: Setting, who: str) -> float:
    """The least time of a step, by the bytes that it has to read."""
    config = model.config
    size = lambda tree: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    sizes = (config.hidden_size, config.mixture.intermediate, config.num_experts, config.mixture.top_k)
    mixture = Mixture(*sizes)
    idle = config.num_experts - mixture.active_experts(batch)
    nbytes = size(nnx.state(model)) - size(nnx.state(model.embed_tokens))  # of which a row a text is read
    nbytes -= setting.layers * idle * mixture.expert_bytes(None if who == BF16 else who)
    cache = jax.eval_shape(lambda: model.init_cache(batch, setting.context, setting.cache).layers)
    nbytes += size(cache)
    return nbytes / H200.bandwidth


def measure(model: Decoder, batch: int, setting: Setting, who: str) -> dict[str, Any]:
    """The time of a step, and of each part of it."""
    graphdef, state = nnx.split(model)
    cache, ids = full_cache(model, batch, setting), jnp.arange(batch, dtype=jnp.int32) % model.config.vocab_size
    x = jax.random.normal(jax.random.key(0), (batch, 1, model.config.hidden_size), jnp.bfloat16)

    def time_of(fn: Callable, calls: int, *arguments):
        program = jax.jit(lambda state, *arguments: fn(nnx.merge(graphdef, state), *arguments))
        return time_queue(lambda: program(state, *arguments), jax.block_until_ready, calls)

    timing = time_of(lambda model, ids, cache: decode(model, ids, cache, setting.steps), setting.steps, ids, cache)
    floor = floor_seconds(model, batch, setting, who)
    rates = {"tokens_per_second": batch / timing.seconds, "floor_seconds": floor}
    parts = {name: time_of(fn, 1, x, cache).seconds for name, fn in PARTS.items()}
    return dataclasses.asdict(setting) | dataclasses.asdict(timing) | rates | {"parts": parts}


def run(
    results: Results, configs: dict[str, Any], batches: Sequence[int], who: Sequence[str], setting: Setting, end: float
) -> None:
    """Adds the result of every case that is not there yet, until the time `end`."""
    for name, config in configs.items():
        for recipe in who:
            model = None
            for batch in batches:
                if time.monotonic() > end:
                    return

                def attempt(config=config, recipe=recipe, batch=batch) -> dict[str, Any]:
                    nonlocal model
                    model = model or decoder(config, setting.layers, recipe)
                    return measure(model, batch, setting, recipe)

                who_and_cache = recipe if setting.cache == BF16 else f"{recipe}, cache {setting.cache}"
                results.attempt({"model": name, "who": who_and_cache, "batch": batch}, attempt)


COLUMNS = ("who", "batch", "tokens a second", "a step", "floor", "floor / step", "over bf16", *PARTS)


def table(document: dict[str, Any]) -> str:
    """Markdown: what it was measured on, and a table for each model."""
    facts, results = document["facts"], document["results"]
    lines = [", ".join(f"{name} {value}" for name, value in facts.items())]
    for model in dict.fromkeys(result["model"] for result in results):
        rows = [result for result in results if result["model"] == model]
        bf16 = {row["batch"]: row["seconds"] for row in rows if row["who"] == BF16 and "seconds" in row}
        lines += ["", f"### {model}", "", f"| {' | '.join(COLUMNS)} |", "|---|" + "--:|" * (len(COLUMNS) - 1)]
        lines += [_row(row, bf16.get(row["batch"])) for row in rows]
    return "\n".join(lines)


def _row(result: dict[str, Any], bf16: float | None) -> str:
    cells = [result["who"], f"{result['batch']}"]
    if "failure" in result:
        return f"| {' | '.join([*cells, result['failure'].splitlines()[0][:160], *[''] * (len(COLUMNS) - 3)])} |"
    seconds = result["seconds"]
    cells += [
        f"{result['tokens_per_second']:.0f}",
        f"{seconds * 1e6:.0f} µs",
        f"{result['floor_seconds'] * 1e6:.0f} µs",
    ]
    cells += [f"{result['floor_seconds'] / seconds:.0%}", "" if bf16 is None else f"{bf16 / seconds:.2f}"]
    cells += [f"{part * 1e6:.0f} µs ({part / seconds:.0%})" for part in result["parts"].values()]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results here, and go on where they are")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print results as Markdown, and measure nothing")
    parser.add_argument("--models", default="", metavar="REGEX", help="only those in whose name it is found")
    parser.add_argument("--who", default="", metavar="REGEX", help="likewise: recipes, and bf16")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--cache", default=BF16, help="keys and values in bf16 (the default), e4m3 or e5m2")
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK}")
    parser.add_argument("--backend", choices=BACKENDS, help="by default what fp8x.ops chooses")
    parser.add_argument("--tiny", action="store_true", help="narrow layers under the same names, to try this script")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    options = parser.parse_args(arguments)
    if options.table:
        return print(table(json.loads(options.table.read_text())))
    if not options.json:
        parser.error("--json or --table is needed")
    end = time.monotonic() + options.seconds
    batches, who = (QUICK["batches"], QUICK["who"]) if options.quick else (BATCHES, [BF16, *RECIPES])
    known = TINY if options.tiny else CONFIGS
    configs = {name: config for name, config in known.items() if re.search(options.models, name)}
    who = [name for name in who if re.search(options.who, name)]
    setting = Setting(options.layers, options.context, options.steps, options.cache)
    nbytes = 2**20 if options.tiny else 2**31
    header = lambda: facts() | {"backend": options.backend, "copy_bandwidth": copy_bandwidth(nbytes)}  # noqa: E731
    with fp8x.backend(options.backend) if options.backend else contextlib.nullcontext():
        run(Results(options.json, header), configs, options.batches or batches, who, setting, end)


if __name__ == "__main__":
    main()
