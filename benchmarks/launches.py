"""What one MoE block launches on an H200 for some tokens: counted from XLA's program for it, where there is none.

    python benchmarks/launches.py --hidden 2048 --intermediate 768 --experts 128 --top-k 8 --tokens 1 \
        --recipe fp8_e4m3fn_bf16_block_scale --backend mosaic_gpu
"""

import argparse
import collections
import contextlib

import jax
import jax.numpy as jnp
from flax import nnx

import fp8x
from fp8x.benchmark.program import Launch, launches


def launches_of_moe(
    hidden: int, intermediate: int, experts: int, top_k: int, tokens: int, recipe: str | None, backend: str | None
) -> list[Launch]:
    moe = nnx.eval_shape(
        lambda: fp8x.nn.MoE(
            hidden, intermediate, experts, top_k, recipe=recipe, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
    )
    graph, state = nnx.split(moe)
    x = jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16)
    with fp8x.backend(backend) if backend else contextlib.nullcontext():
        return launches(lambda state, x: nnx.merge(graph, state)(x), state, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hidden", "intermediate", "experts", "top-k", "tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--recipe", help="none: experts in bfloat16")
    parser.add_argument("--backend", choices=("xla", "mosaic_gpu"))
    found = launches_of_moe(**vars(parser.parse_args()))
    for launch in found:
        print(f"{launch.bytes:>12,} B  {launch}")
    print(len(found), dict(collections.Counter(launch.kind for launch in found)))


if __name__ == "__main__":
    main()
