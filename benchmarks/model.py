"""What a decoding step's MoE block is expected to take on an H200, before any measurement: a table in Markdown.

    python benchmarks/model.py                  # Mixtral 8x7B and Qwen3-30B-A3B, 1 to 64 tokens
    python benchmarks/model.py --launches       # and the block's launches, counted from XLA's program (a minute)

For each product: the matrices of the experts that tokens visit, on average, over 4.8 TB/s (the floor); the tiling that
the kernel takes, how evenly its tiles lie on 132 SMs; and the longer of the floor and of what swapped_tiling.py
estimates for the busiest SM, plus the beginning and the end of one task, when memory has nothing to do.
"""

import argparse
import dataclasses
import math

from launches import launches_of_moe
from mixtures import MIXTURES, Mixture

import fp8x
from fp8x.benchmark import H200
from fp8x.pallas.sm90 import BLOCK_K, CLOCK, SMS
from fp8x.pallas.swapped_tiling import TASK, Tiling, estimates, slots

LATENCY = 800e-9  # seconds from a request to memory to its answer: assumed
LAUNCH = 2e-6  # seconds that a small kernel takes from the one before to the one after: assumed
TOKENS = (1, 4, 16, 64)
RECIPES = ("fp8_e4m3fn_bf16_block_scale", "mxfp8_bf16")


@dataclasses.dataclass(frozen=True)
class Product:
    """One of a block's two products, for some tokens.

    Attributes:
        active: experts that tokens visit, on average.
        nbytes: of their matrices and scales.
        tiling: what the kernel takes.
        tasks: tiles, of a row tile an expert, and parts of K.
        ring: bytes of weights that a block requests ahead.
        seconds: estimated.
    """

    active: float
    nbytes: float
    tiling: Tiling
    tasks: int
    ring: int
    seconds: float

    @property
    def floor(self) -> float:
        return self.nbytes / H200.bandwidth

    @property
    def balance(self) -> float:
        """The mean SM's share of the busiest one's tasks."""
        return self.tasks / (SMS * math.ceil(self.tasks / SMS))


def product(mixture: Mixture, code: str, tokens: int, n: int, k: int) -> Product:
    """The model of `[tokens · top_k, k] x [experts, n, k]`."""
    recipe = fp8x.recipe(code)
    active = mixture.active_experts(tokens)
    scales = math.prod(recipe.weight.scale_shape((n, k))) * recipe.weight.scale_dtype.itemsize
    x_bytes = 2 if recipe.activation is None or recipe.weight.is_mx else 1
    form = dict(widest=192, waves=(1,)) if x_bytes == 2 else dict(widest=64, waves=(1, 2))
    options = dict(x_bytes=x_bytes, by_expert=tokens == 1, **form)
    rows = tokens * mixture.top_k
    choices = estimates(rows, n, k, mixture.experts, **options)
    tiling = min(choices, key=choices.get)
    ring = slots(tiling, BLOCK_K, x_bytes, out_bytes=2 if tiling.splits == 1 else 4) * tiling.rows * BLOCK_K
    visited = math.ceil(active - 1e-9)
    tasks = visited * math.ceil(n / tiling.rows) * tiling.splits
    busiest = estimates(rows, n, k, visited, **options)[tiling]
    nbytes = active * (n * k + scales)
    seconds = max(nbytes / H200.bandwidth, busiest) + TASK / CLOCK
    return Product(active, nbytes, tiling, tasks, ring, seconds)


def in_flight() -> float:
    """Bytes that an SM has to have requested for memory to be busy: Little's law."""
    return H200.bandwidth / SMS * LATENCY


COLUMNS = (
    "mixture",
    "recipe",
    "tokens",
    "experts",
    "product",
    "floor",
    "tiling",
    "tasks",
    "balance",
    "ring",
    "expected",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, default=["Mixtral 8x7B", "Qwen3-30B-A3B"])
    options = parser.parse_args()
    print(f"Little's law, {LATENCY * 1e9:.0f} ns: {in_flight() / 1e3:.0f} kB in flight an SM.\n")
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|" + "--:|" * (len(COLUMNS) - 2))
    blocks = []
    for name in options.mixtures:
        mixture = MIXTURES[name]
        shapes = {"w13": (2 * mixture.intermediate, mixture.hidden), "w2": (mixture.hidden, mixture.intermediate)}
        for code in RECIPES:
            for tokens in TOKENS:
                products = {part: product(mixture, code, tokens, *shape) for part, shape in shapes.items()}
                for part, found in products.items():
                    print(_row(name, code, tokens, part, found))
                blocks.append((name, code, tokens, list(products.values())))
    columns = ["mixture", "recipe", "tokens", "floor", "products, expected", "floor / products"]
    columns += ["launches", "block, expected"] if options.launches else []
    print(f"\n| {' | '.join(columns)} |\n|---|---|" + "--:|" * (len(columns) - 2))
    for name, code, tokens, products in blocks:
        floor, seconds = sum(p.floor for p in products), sum(p.seconds for p in products)
        cells = [name, code, tokens, f"{floor * 1e6:.1f} µs", f"{seconds * 1e6:.1f} µs", f"{floor / seconds:.0%}"]
        if options.launches:
            m = MIXTURES[name]
            sizes = (m.hidden, m.intermediate, m.experts, m.top_k)
            count = len(launches_of_moe(*sizes, tokens, code, "mosaic_gpu"))
            cells += [count, f"{(seconds + (count - 2) * LAUNCH) * 1e6:.0f} µs"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _row(name: str, code: str, tokens: int, part: str, found: Product) -> str:
    tiling = f"{found.tiling.rows}×{found.tiling.tokens}" + f", K in {found.tiling.splits}" * (found.tiling.splits > 1)
    cells = [name, code, tokens, f"{found.active:.1f}", part, f"{found.floor * 1e6:.1f} µs", tiling, found.tasks]
    cells += [f"{found.balance:.0%}", f"{found.ring / 1e3:.0f} kB", f"{found.seconds * 1e6:.1f} µs"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
