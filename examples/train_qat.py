"""Quantization-aware training: a small language model that learns with its weights and activations in 8 bits.

    python examples/train_qat.py

A model in float32 is trained on English text. From there it is trained further twice, on the same batches: in float32,
and through FP8. The recipe is a coarse one (e5m2, with two bits of mantissa), so that there is something to see. The
losses, in bits per byte of held-out text, are of

    float32                   the model that was trained in float32 to the end
    float32, then quantized   the same in 8 bits
    trained in 8 bits         the quantized model that `fp8x.nn.finish_training` made of the other
"""

import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fp8x

EXAMPLES = Path(__file__).parent
E5M2 = fp8x.Scheme("e5m2", block=(None, None))
CONTEXT, FEATURES, HIDDEN, BATCH = 16, 16, 256, 512


class NextByte(nnx.Module):
    """Logits of the byte that follows `CONTEXT` others."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, FEATURES, rngs=rngs)
        self.up = nnx.Linear(CONTEXT * FEATURES, HIDDEN, rngs=rngs)
        self.middle = nnx.List([nnx.Linear(HIDDEN, HIDDEN, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(HIDDEN, 256, rngs=rngs)

    def __call__(self, ids):
        x = nnx.relu(self.up(self.embed(ids).reshape(*ids.shape[:-1], -1)))
        for linear in self.middle:
            x = x + nnx.relu(linear(x))
        return self.out(x).astype(jnp.float32)


def batches(name: str, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Bytes of text with those before them, `[BATCH, CONTEXT + 1]`; the same ones every time."""
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    text = np.frombuffer("\n".join(json.loads(line)["text"] for line in lines).encode(), np.uint8)
    rng = np.random.default_rng(seed)
    for _ in range(count):
        starts = rng.integers(len(text) - CONTEXT, size=BATCH)
        yield text[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)


def bits(model: NextByte, batch):
    """The loss in bits per byte."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch[:, :-1]), batch[:, -1])
    return jnp.mean(losses) / np.log(2)


@nnx.jit
def step(model: NextByte, optimizer: nnx.Optimizer, batch):
    """One step of the optimizer, which sees `nnx.Param`s and nothing of the quantization."""
    loss, gradients = nnx.value_and_grad(bits)(model, batch)
    optimizer.update(model, gradients)
    return loss


def train(model: NextByte, learning_rate: float, steps: int, seed: int) -> None:
    """Trains a model, quantization-aware or not."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    for batch in batches("calibration.jsonl", steps, seed):
        step(model, optimizer, batch)


def heldout(model: NextByte) -> float:
    """Bits per byte of text that the model has not seen."""
    evaluate = nnx.jit(bits)
    return float(np.mean([evaluate(model, batch) for batch in batches("heldout.jsonl", 50)]))


def main(steps: int = 500) -> dict[str, float]:
    """Trains one model in float32 and one through FP8, from the same start; held-out losses."""
    start = NextByte(rngs=nnx.Rngs(0))
    train(start, 3e-3, steps, seed=0)
    plain, aware = nnx.clone(start), nnx.clone(start)

    train(plain, 3e-4, steps // 2, seed=1)
    losses = {"float32": heldout(plain)}
    fp8x.quantize_model(plain, fp8x.Recipe(E5M2, E5M2, "dynamic"))
    losses["float32, then quantized"] = heldout(plain)

    fp8x.quantize_model(aware, fp8x.Recipe(E5M2, E5M2, "dynamic", master_weights=True))
    train(aware, 3e-4, steps // 2, seed=1)
    losses["trained in 8 bits"] = heldout(fp8x.nn.finish_training(aware))
    return losses


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name:25} {loss:.4f} bits per byte")
