"""What moves between devices, per token and layer, from the compiled HLO of models that nobody has to hold.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/sharding.py            # a table in Markdown

Decoders are abstract (shapes alone); a layer's bytes are the difference of two layers and one. Bytes are what a
collective returns on a device, per token of its batch; what a ring sends is below 2 (all-reduce) or 1 (all-gather)
times as much. XLA's CPU backend adds bfloat16 in float32, so bytes of the embedding's sum are halved here.
"""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

import fp8x
from fp8x.models import Decoder, DecoderConfig
from fp8x.sharding import shard

MIXTRAL_8X7B = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "rope_theta": 1e6, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
}  # fmt: skip
MESHES = [{}, {"tensor": 2}, {"tensor": 4}, {"tensor": 8}, {"expert": 8}, {"expert": 2, "tensor": 4},
          {"data": 2, "expert": 4}, {"data": 2, "expert": 2, "tensor": 2}]  # fmt: skip
RECIPES = ("fp8_e4m3fn_bf16_block_scale", "e4m3_e4m3_bf16_dynamic")
BATCH, LENGTH = 8, 16
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4}
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def moved(recipe: str, axes: dict[str, int], layers: int) -> tuple[Counter, Counter, int]:
    """Collectives by kind, their bytes by kind, and the bytes of parameters on a device."""
    config = DecoderConfig.from_hf(MIXTRAL_8X7B | {"num_hidden_layers": layers})
    model = nnx.eval_shape(lambda: fp8x.quantize_model(Decoder(config, rngs=nnx.Rngs(0)), recipe))
    types = (AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=jax.devices()[: math.prod(axes.values())])
    shard(model, mesh)
    leaves = jax.tree.leaves(nnx.state(model))
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    text = nnx.jit(lambda model, ids: model(ids)).lower(model, ids).compile().as_text()
    counts, sizes = Counter(), Counter()
    for dtype, shape, kind in re.findall(rf"= (\w+)\[([\d,]*)\]\S* ({KINDS})(?:-start)?\(", text):
        counts[kind] += 1
        sizes[kind] += SIZES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
    return counts, sizes, held


def main() -> None:
    print("| recipe | mesh | collectives a layer | bytes a token and layer | logits, a token | weights a layer |")
    print("|---|---|---|---:|---:|---:|")
    for recipe in RECIPES:
        for axes in MESHES:
            axes = axes or {"data": 1}
            one, two = moved(recipe, axes, 1), moved(recipe, axes, 2)
            tokens = BATCH * LENGTH // axes.get("data", 1)
            counts = ", ".join(f"{n} {kind}" for kind, n in (two[0] - one[0]).items()) or "none"
            layer, logits = (two[1] - one[1])["all-reduce"] // tokens, one[1]["all-gather"] // tokens
            name = ", ".join(f"{axis} {size}" for axis, size in axes.items())
            print(
                f"| {recipe} | {name} | {counts} | {layer:,} | {logits:,} | {(two[2] - one[2]) / 1e6:.1f} MB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
