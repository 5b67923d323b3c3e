"""Trains `examples/tiny_mixtral`: a Mixtral of 4.3 million parameters that has read Python's own documentation.

    python examples/train_tiny_mixtral.py            # two cores, under 30 minutes; overwrites examples/tiny_mixtral

The text is not in the repository: `stdlib_english` rebuilds it from the running Python, and `training.json` beside the
weights holds its sha256 and the Python version that it came from. Beside the checkpoint this writes

    examples/heldout.jsonl       the held-out documents, for `fp8x eval`
    examples/calibration.jsonl   a small sample of the training documents, for `fp8x quantize --calibrate`

Bits per byte on held-out text follow the rule of `fp8x.models.evaluate`, from the bf16 weights as written. The figure
to compare with is that of xz: how much longer `xz -9e` of training and held-out text together is than of training
text.
"""

import argparse
import dataclasses
import json
import lzma
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree
from stdlib_english import Document, documents, sha256, shared_with, split
from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from tokenizers import models as token_models

import fp8x
from fp8x.models import Decoder, DecoderConfig
from fp8x.models.evaluate import evaluate

EXAMPLES = Path(__file__).parent
SEPARATOR = "<|endoftext|>"  # stands before every document; begins and ends a text
SEPARATOR_ID = 0
CALIBRATION_TEXTS = 96
REPORT_SECONDS = 20.0
SAVE_SECONDS = 240.0

# Sizes are multiples of 32, which MXFP8 needs, and none of 128, so that 128×128 blocks are ragged.
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,  # transformers 4
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},  # transformers 5
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.01,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": SEPARATOR_ID,
    "eos_token_id": SEPARATOR_ID,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How the checkpoint is trained.

    Attributes:
        steps: of the optimizer; the time that training takes is proportional to them.
        batch_tokens: tokens a step.
        contexts: `(tokens, steps in all)`: how long the windows of text are that the model reads, and the part of the
            steps after which the next entry takes over. Short ones are cheaper and serve just as well at first.
        learning_rate: its peak, after a linear warmup over `warmup` steps; then it falls linearly to zero.
        weight_decay: of matrices, multiplied by the learning rate.
        dropout: of what attention and experts add to the residual stream.
        seed: of the initial weights, the order of the text and dropout.
    """

    steps: int = 740
    batch_tokens: int = 4096
    contexts: tuple[tuple[int, float], ...] = ((128, 0.5), (256, 0.8), (512, 1.0))
    learning_rate: float = 0.01
    warmup: int = 60
    weight_decay: float = 0.1
    dropout: float = 0.15
    seed: int = 0

    def context(self, step: int) -> int:
        """Tokens in a window at a step."""
        return next(length for length, until in self.contexts if step < until * self.steps)


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE: any text in UTF-8 goes through it without loss."""
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, SEPARATOR_ID)]
    )
    return tokenizer


def xz_bits_per_byte(training: Sequence[str], heldout: Sequence[str]) -> float:
    """Bits that each byte of `heldout` adds to a raw LZMA2 stream (preset 9e) whose dictionary spans all text."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 << 20}]

    def size(texts: Sequence[str]) -> int:
        return len(lzma.compress("\n\n".join(texts).encode(), lzma.FORMAT_RAW, filters=filters))

    added = size([*training, *heldout]) - size(training)
    return 8 * added / sum(len(text.encode()) for text in heldout)


def batches(texts: Sequence[Sequence[int]], options: Training) -> Iterator[Int[np.ndarray, "b t+1"]]:
    """Windows of the documents laid end to end, in another order and cut at other places in each epoch; one a step."""
    rng = np.random.default_rng(options.seed)
    windows: list[np.ndarray] = []
    length = 0
    for step in range(options.steps):
        if options.context(step) != length:
            length, windows = options.context(step), []
        size = options.batch_tokens // length
        while len(windows) < size:
            ids = np.concatenate([texts[i] for i in rng.permutation(len(texts))])
            starts = np.arange(rng.integers(length), len(ids) - length, length)
            windows += [ids[start : start + length + 1] for start in rng.permutation(starts)]
        yield np.stack([windows.pop() for _ in range(size)])


def initial_model(config: DecoderConfig, seed: int) -> Decoder:
    """Random float32 weights; what writes to the residual stream is smaller (GPT-2, section 2.3)."""
    model = Decoder(config, rngs=nnx.Rngs(seed), param_dtype=jnp.float32)
    for layer in model.layers:
        for weight in (layer.self_attn.o_proj.kernel, layer.mlp.w2.weight):
            weight[...] /= (2 * config.num_hidden_layers) ** 0.5
    return model


def tap_routers(model: Decoder) -> list[Float[Array, "tokens experts"]]:
    """A list that each layer appends its router's logits to when the model, which is changed, is called."""
    seen = []

    def tapped(router: Callable) -> Callable:
        def call(x):
            seen.append(router(x).astype(jnp.float32))
            return seen[-1]

        return call

    for layer in model.layers:
        layer.mlp.router = tapped(layer.mlp.router)
    return seen


def add_dropout(model: Decoder, rate: float, key: Array) -> None:
    """Changes the model to drop parts of what its blocks add to the residual stream."""

    def dropped(block: Callable, key: Array) -> Callable:
        def call(x):
            y = block(x)
            # Eight random bits an element are enough, and the generator is what costs time.
            dropped_codes = round(256 * rate)
            kept = jax.random.bits(key, y.shape, jnp.uint8) >= dropped_codes
            return jnp.where(kept, y / (1 - dropped_codes / 256), 0)

        return call

    keys = iter(jax.random.split(key, 2 * len(model.layers)))
    for layer in model.layers:
        layer.self_attn.o_proj = dropped(layer.self_attn.o_proj, next(keys))
        layer.mlp = dropped(layer.mlp, next(keys))


def load_shares(logits: Float[Array, "tokens experts"], top_k: int) -> Float[Array, " experts"]:
    """The part of all visits that goes to each expert."""
    _, chosen = jax.lax.top_k(logits, top_k)
    return jnp.bincount(chosen.reshape(-1), length=logits.shape[-1]) / chosen.size


def balance_loss(logits: Float[Array, "tokens experts"], top_k: int) -> Float[Array, ""]:
    """1 where visits and router probabilities are even, more where both favour the same experts.

    Switch Transformer (arXiv:2101.03961), equation 4, over the top-k visits as Mixtral counts them.
    """
    probability = jax.nn.softmax(logits, axis=-1).mean(axis=0)
    return logits.shape[-1] * jnp.sum(load_shares(logits, top_k) * probability)


def make_optimizer(options: Training) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for embedding, routers and norms.

    After the first 307,200 tokens it was at 5.14 nats a token, AdamW (rate 3e-3, twice the steps) at 5.58.
    """
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, options.learning_rate, options.warmup),
            optax.linear_schedule(options.learning_rate, 0.0, options.steps - options.warmup),
        ],
        [options.warmup],
    )

    def matrices(params: PyTree) -> PyTree:
        """Which axes Muon takes as inputs and outputs; None leaves a parameter to Adam."""

        def axes(path, param) -> optax.contrib.MuonDimensionNumbers | None:
            name = jax.tree_util.keystr(path)
            if param.ndim < 2 or "embed_tokens" in name or "router" in name:
                return None
            if "kernel" in name:
                return optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
            return optax.contrib.MuonDimensionNumbers(reduction_axis=param.ndim - 1, output_axis=param.ndim - 2)

        return jax.tree_util.tree_map_with_path(axes, params)

    muon = optax.contrib.muon(
        schedule,
        weight_decay=options.weight_decay,
        adam_b2=0.95,
        consistent_rms=0.2,  # updates as large as Adam's (arXiv:2502.16982, section 2.2), so that one rate serves both
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def train(
    model: Decoder, texts: Sequence[Sequence[int]], options: Training, save: Callable[[Decoder], None]
) -> dict[str, float]:
    """Trains the model in place; calls `save` every few minutes. Returns what it measured."""
    graph, params = nnx.split(model, nnx.Param)
    top_k = model.config.num_experts_per_tok
    optimizer = make_optimizer(options)

    def loss(params, ids, key):
        model = nnx.merge(graph, params)
        router_logits = tap_routers(model)
        if options.dropout:
            add_dropout(model, options.dropout, key)
        logits = model(ids[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
        balance = sum(balance_loss(logits, top_k) for logits in router_logits) / len(router_logits)
        return nats + CONFIG["router_aux_loss_coef"] * balance, (nats, balance)

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, ids, key):
        (_, measured), gradient = jax.value_and_grad(loss, has_aux=True)(params, ids, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, measured

    state = optimizer.init(params)
    key = jax.random.key(options.seed)
    began = reported = saved = time.monotonic()
    began_cpu = time.process_time()
    recent: list[tuple[Array, Array]] = []
    for count, ids in enumerate(batches(texts, options), 1):
        params, state, measured = step(params, state, ids, jax.random.fold_in(key, count))
        recent.append(jax.device_get(measured))
        now = time.monotonic()
        if now - reported > REPORT_SECONDS or count == options.steps:
            nats, balance = np.mean(recent, axis=0)
            speed = len(recent) * options.batch_tokens / (now - reported)
            print(
                f"step {count}/{options.steps}, {now - began:.0f} s: {nats:.4f} nats a token, "
                f"balance {balance:.3f}, {speed:.0f} tokens/s",
                flush=True,
            )
            recent, reported = [], now
        if now - saved > SAVE_SECONDS:
            save(nnx.merge(graph, params))
            saved = now
    nnx.update(model, params)
    seconds = time.monotonic() - began
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
        "tokens": options.steps * options.batch_tokens,
        "tokens_per_second": round(options.steps * options.batch_tokens / seconds),
        "last_nats_per_token": round(float(nats), 4),
    }


def save_checkpoint(model: Decoder, tokenizer: Tokenizer, path: Path) -> None:
    """Writes a Hugging Face directory in bfloat16, replacing the files of the same names that lie there."""
    graph, params = nnx.split(model, nnx.Param)
    rounded = nnx.merge(graph, jax.tree.map(lambda param: param.astype(jnp.bfloat16), params))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    with tempfile.TemporaryDirectory() as scratch:
        fp8x.save(rounded, scratch)
        tokenizer.save(f"{scratch}/tokenizer.json")
        write_json(Path(scratch, "tokenizer_config.json"), tokenizer_config)
        write_json(
            Path(scratch, "generation_config.json"), {"bos_token_id": SEPARATOR_ID, "eos_token_id": SEPARATOR_ID}
        )
        shutil.copytree(scratch, path, dirs_exist_ok=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def calibration_sample(training: Sequence[Document], seed: int) -> list[str]:
    """`CALIBRATION_TEXTS` pieces of training documents, of whole paragraphs and about a thousand bytes each."""
    rng = random.Random(seed)
    pieces = []
    for document in training:
        piece = ""
        for paragraph in document.text.split("\n\n"):
            piece = f"{piece}\n\n{paragraph}" if piece else paragraph
            if len(piece) >= 800:
                if len(piece) <= 2400:
                    pieces.append(piece)
                piece = ""
    return rng.sample(pieces, CALIBRATION_TEXTS)


def expert_load(model: Decoder, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Per layer, the part of all visits that each expert got."""
    graph, params = nnx.split(model, nnx.Param)
    length = CONFIG["max_position_embeddings"]
    ids = np.concatenate(texts)
    ids = ids[: len(ids) // length * length].reshape(-1, length)

    @jax.jit
    def shares(params, ids):
        model = nnx.merge(graph, params)
        router_logits = tap_routers(model)
        model(ids)
        return jnp.stack([load_shares(logits, model.config.num_experts_per_tok) for logits in router_logits])

    mean = np.mean([shares(params, row[None]) for row in ids], axis=0)
    return [[round(float(share), 4) for share in layer] for layer in mean]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EXAMPLES / "tiny_mixtral", help="where the checkpoint goes")
    parser.add_argument("--data", type=Path, default=EXAMPLES, help="where the two .jsonl files go")
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--seed", type=int, default=Training.seed)
    arguments = parser.parse_args()
    options = Training(steps=arguments.steps, seed=arguments.seed)

    training, heldout = split(documents())
    training_texts, heldout_texts = [[document.text for document in part] for part in (training, heldout)]
    arguments.data.mkdir(parents=True, exist_ok=True)
    write_jsonl(arguments.data / "heldout.jsonl", heldout_texts)
    write_jsonl(arguments.data / "calibration.jsonl", calibration_sample(training, options.seed))
    xz = xz_bits_per_byte(training_texts, heldout_texts)
    tokenizer = train_tokenizer(training_texts)
    training_ids, heldout_ids = [
        [tokenizer.encode(text).ids for text in texts] for texts in (training_texts, heldout_texts)
    ]
    for text, ids in zip(heldout_texts, heldout_ids, strict=True):
        if tokenizer.decode(ids[1:]) != text:
            raise AssertionError(f"the tokenizer changes {text[:60]!r}, so bits per byte have no meaning")
    print(f"training: {sum(map(len, training_ids))} tokens; held-out: xz reaches {xz:.4f} bits per byte", flush=True)

    def save(model: Decoder) -> None:
        save_checkpoint(model, tokenizer, arguments.out)

    model = initial_model(DecoderConfig.from_hf(CONFIG), options.seed)
    measured = train(model, training_ids, options, save)
    save(model)
    model = fp8x.load(arguments.out)
    result = evaluate(model, tokenizer, heldout_texts)
    report = {
        "bits_per_byte": round(result.bits_per_byte, 4),
        "xz_bits_per_byte": round(xz, 4),
        "perplexity": round(result.perplexity, 3),
        "heldout": describe(heldout) | {"tokens": result.tokens, "context": CONFIG["max_position_embeddings"]},
        "training": describe(training) | {"tokens": sum(map(len, training_ids))},
        "heldout_in_copies_of_32_characters": round(shared_with(training, heldout, 32), 4),
        "heldout_in_copies_of_64_characters": round(shared_with(training, heldout, 64), 4),
        "expert_load_on_heldout": expert_load(model, heldout_ids),
        "options": dataclasses.asdict(options),
        "measured": measured,
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "tokenizers", "numpy")}
        | {"python": platform.python_version()},
    }
    write_json(arguments.out / "training.json", report)
    print(f"held-out: {result.bits_per_byte:.4f} bits per byte; xz -9e after the training text: {xz:.4f}")


def describe(part: Sequence[Document]) -> dict[str, Any]:
    size = sum(document.num_bytes for document in part)
    return {"documents": len(part), "bytes": size, "sha256": sha256(part)}


if __name__ == "__main__":
    sys.exit(main())
