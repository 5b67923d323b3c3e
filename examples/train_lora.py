"""LoRA on a base in 8 bits: adapters teach a language model another kind of text, and the base stays as it is.

    python examples/train_lora.py

The base is `examples/tiny_mixtral`, which has read English documentation; the adapters learn Python source. They are
trained twice from the same start, beside the base in bf16 and beside the base in MXFP8. The loss
is in nats per token, mean over the first and over the last quarter of the steps.
"""

import argparse
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

import fp8x
from fp8x.models import Decoder

CHECKPOINT = Path(__file__).parent / "tiny_mixtral"
RECIPE = "mxfp8_bf16"
STEPS, BATCH, LENGTH, RANK = 40, 4, 64, 8


def add_adapters(model: Decoder) -> Decoder:
    """Puts an adapter beside the projections that make queries and outputs of attention; bases stay what they are."""
    rngs = nnx.Rngs(0)
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads * model.config.head_dim
    for layer in model.layers:
        attention = layer.self_attn
        attention.q_proj = nnx.LoRA(hidden, RANK, heads, base_module=attention.q_proj, rngs=rngs)
        attention.o_proj = nnx.LoRA(heads, RANK, hidden, base_module=attention.o_proj, rngs=rngs)
    return model


def batches(count: int) -> list[np.ndarray]:
    """Windows of Python source. None comes twice, so a step's loss is of text that the model has not seen."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    ids = np.array(tokenizer.encode(inspect.getsource(argparse)).ids, np.int32)
    ids = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    order = np.random.default_rng(0).permutation(len(ids))[: count * BATCH]
    return list(ids[order].reshape(count, BATCH, LENGTH + 1))


def loss_of(model, batch):
    """Nats per token."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(batch[:, :-1]), batch[:, 1:]))


@nnx.jit(donate_argnums=(0, 1))
def step(model, optimizer, batch):
    """One step of the optimizer, over the adapters alone."""
    loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
    optimizer.update(model, gradients)
    return loss


def adapt(model: Decoder, steps: int) -> list[float]:
    """Trains adapters; the loss of every step."""
    add_adapters(model)
    optimizer = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.LoRAParam)
    return [float(step(model, optimizer, batch)) for batch in batches(steps)]


def main(steps: int = STEPS) -> dict[str, tuple[float, float, int]]:
    """Trains adapters beside both bases; the loss of the first and the last quarter, and the bytes of the base."""
    results = {}
    for name, recipe in {"bf16": None, RECIPE: RECIPE}.items():
        model = fp8x.load(CHECKPOINT, recipe)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
        losses, quarter = adapt(model, steps), steps // 4
        results[name] = (float(np.mean(losses[:quarter])), float(np.mean(losses[-quarter:])), nbytes)
    return results


if __name__ == "__main__":
    for base, (first, last, nbytes) in main().items():
        print(f"base in {base:10} {nbytes / 1e6:.2f} MB   {first:.3f} -> {last:.3f} nats per token")
