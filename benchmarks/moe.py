"""MoE blocks of real models on a GPU, in every recipe, beside bfloat16 and their floors.

    python benchmarks/moe.py --json moe.json                     # every mixture, number of tokens and recipe
    python benchmarks/moe.py --json moe.json --tokens 1 16 64 --mixtures Qwen3-30B --parts
    python benchmarks/moe.py --table moe.json --plot moe.png     # Markdown, and the fraction of the floor over tokens

The first goes on where a run before it stopped.

A block is what `fp8x.nn.MoE` computes from the hidden states of some tokens: routing, sorting, w13, gate, w2, the sum
over experts. Weights are random and made in the bits that they are stored in; the router's are random too, so tokens
spread evenly over experts, or (`--load hot`) one expert is every token's first. Each result is compared with the XLA
path's before it is timed. The floor is the visited experts' bytes at 4.8 TB/s, or the FLOPs at the tensor cores' peak.
How times are taken: fp8x/benchmark/timing.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from mixtures import MIXTURES, RECIPES, TINY, Load, Mixture

import fp8x
from fp8x.benchmark import Results, copy_bandwidth, facts, time_calls, time_queue
from fp8x.benchmark.timing import alone, sets_needed
from fp8x.nn import MoE
from fp8x.nn.routing import sort_by_expert
from fp8x.ops.dispatch import BACKENDS
from fp8x.ops.gate import gated

TOKENS = [2**i for i in range(15)]
BF16, TORCH = "bf16, jax.lax.ragged_dot", "bf16, torch._grouped_mm"
QUICK = {
    "mixtures": ["Qwen3-30B-A3B", "Mixtral 8x7B"],
    "tokens": [1, 16, 64],
    "who": ["fp8_e4m3fn_bf16_block_scale", "e4m3_bf16", "mxfp8_mxfp8_bf16", TORCH, BF16],
}
CHECKED = 256  # tokens whose result is compared
LIMIT = 4e-2  # of the relative error: 16-bit roundings between the products put some inputs of w2 to another 8-bit step


def run(
    results: Results,
    mixtures: dict[str, Mixture],
    tokens: list[int],
    who: list[str],
    load: Load,
    parts: bool,
    end: float,
) -> None:
    """Adds the result of every case that is not there yet, until the time `end`."""
    for name, mixture in mixtures.items():
        for peer in who:
            # One layer at a time is in memory, made where the first case needs it.
            @functools.cache
            def layer(mixture=mixture, peer=peer) -> MoE:
                with alone():
                    return jax.block_until_ready(mixture.layer(_code(peer), load))

            for count in tokens:
                if time.monotonic() > end:
                    return
                key = {"mixture": name, "tokens": count, "load": load, "who": peer}
                results.attempt(key, lambda: _measure(mixture, layer(), count, peer, load, parts))  # noqa: B023


def _code(who: str) -> str | None:
    return None if who in (BF16, TORCH) else who


def _measure(mixture: Mixture, moe: MoE, count: int, who: str, load: Load, parts: bool) -> dict[str, Any]:
    expected = mixture.floor(_code(who), count, mixture.active_experts(count, load))
    sets = sets_needed(expected.bytes) if jax.default_backend() == "gpu" else 1
    inputs = [mixture.tokens(count, seed) for seed in range(sets)]
    active = float(np.mean([np.unique(moe.route(x)[1]).size for x in inputs]))
    floor = mixture.floor(_code(who), count, active)
    found = {"active": round(active, 2), "bytes": floor.bytes, "flops": floor.flops, "floor_seconds": floor.seconds}
    if who == TORCH:
        with alone():
            return found | _torch(moe, inputs)
    graphdef, state = nnx.split(moe)
    timing, (y, *_) = time_calls(lambda state, x: nnx.merge(graphdef, state)(x), [(state, x) for x in inputs])
    if error := _error(moe, inputs[0], y):
        return found | error
    found |= dataclasses.asdict(timing)
    if parts:
        found["parts"] = {
            name: time_calls(fn, [(state, *arguments)])[0].seconds
            for name, fn, arguments in _parts(graphdef, state, inputs[0])
        }
    return found


def _error(moe: MoE, x, y) -> dict[str, str] | None:
    """A failure where some tokens differ from what the XLA path gives them."""
    with fp8x.backend("xla"):
        expected = np.asarray(nnx.jit(lambda moe, x: moe(x))(moe, x[:CHECKED]), np.float64)
    difference = np.asarray(y[:CHECKED], np.float64) - expected
    error = np.linalg.norm(difference) / np.linalg.norm(expected)
    return None if error <= LIMIT else {"failure": f"wrong: relative error {error:.3g} is over {LIMIT}"}


def _parts(graphdef, state, x) -> Iterator[tuple[str, Callable, tuple]]:
    """The parts of a block in order: name, function of the state and more arguments, and these."""

    def part(name: str, fn: Callable, *arguments):
        call = lambda state, *arguments: fn(nnx.merge(graphdef, state), *arguments)  # noqa: E731
        return (name, call, arguments), jax.jit(call)(state, *arguments)

    def route(moe, x):
        weights, experts = moe.route(x)
        order = sort_by_expert(experts.reshape(-1), moe.num_experts)
        return weights, experts.reshape(-1), order.group_sizes, order.source // moe.top_k, order.row

    one = x.shape[0] == 1 and hasattr(nnx.merge(graphdef, state).w13, "by_expert")
    found, (weights, experts, sizes, rows, row) = part("routing", route, x)
    yield found
    if one:
        found, gate_up = part("w13", lambda moe, x, *visited: moe.w13.by_expert(x, *visited), x, experts, rows)
    else:
        found, gate_up = part("w13", lambda moe, x, sizes, rows: moe.w13(x, sizes, rows), x, sizes, rows)
    yield found
    found, h = part("gate", lambda moe, gate_up: gated(gate_up, moe.activation), gate_up)
    yield found
    if one:
        found, y = part("w2", lambda moe, h, experts: moe.w2.by_expert(h, experts), h, experts)
    else:
        found, y = part("w2", lambda moe, h, sizes: moe.w2(h, sizes), h, sizes)
    yield found

    def combine(moe, y, row, weights):
        y = (y if one else y[row]).reshape(*weights.shape, -1).astype(jnp.float32)
        return jnp.sum(y * weights[..., None], axis=1).astype(x.dtype)

    yield part("combine", combine, y, row, weights)[0]


def _torch(moe: MoE, inputs: list) -> dict[str, Any]:
    """The same block by PyTorch's operators, as a CUDA graph."""
    torch = importlib.import_module("torch")
    tensor = torch.from_dlpack
    router, w13, w2 = (tensor(leaf[...]) for leaf in (moe.router.kernel, moe.w13.weight, moe.w2.weight))
    w13 = w13.reshape(w13.shape[0], -1, w13.shape[-1]).transpose(1, 2)
    w2 = w2.transpose(1, 2)

    def block(x):
        logits = (x @ router).float()
        scores = logits.softmax(-1) if moe.scores == "softmax" else logits.sigmoid()
        weights, experts = scores.topk(moe.top_k)
        weights = weights / weights.sum(-1, keepdim=True) * moe.routed_scale
        expert, order = experts.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(moe.num_experts, device=x.device), right=True).int()
        gate, up = torch._grouped_mm(x[order // moe.top_k], w13, offs=ends).chunk(2, dim=-1)
        y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2, offs=ends)
        y = torch.empty_like(y).index_copy_(0, order, y).view(*weights.shape, -1)
        return (y.float() * weights[..., None]).sum(1).to(x.dtype)

    tensors = [tensor(x) for x in inputs]
    results = [block(x) for x in tensors]  # also what a graph's capture wants to have been done before
    if error := _error(moe, inputs[0], jnp.from_dlpack(results[0])):
        return error
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        for x in tensors:
            block(x)
    return dataclasses.asdict(time_queue(graph.replay, lambda _: torch.cuda.synchronize(), len(inputs)))


COLUMNS = ("who", "tokens", "experts", "time", "floor", "floor / time", "TFLOP/s", "GB/s", "bf16 / time", "parts")


def table(document: dict[str, Any]) -> str:
    """Markdown: what it was measured on, and a table for each mixture and load."""
    facts, results = document["facts"], document["results"]
    lines = [", ".join(f"{name} {value}" for name, value in facts.items() if name != "copy_bandwidth")]
    lines += [f"A copy: {facts['copy_bandwidth'] / 1e9:.0f} GB/s."]
    for mixture, load in dict.fromkeys((result["mixture"], result["load"]) for result in results):
        rows = [result for result in results if (result["mixture"], result["load"]) == (mixture, load)]
        bf16 = {row["tokens"]: row["seconds"] for row in rows if row["who"] == BF16 and "seconds" in row}
        lines += ["", f"### {mixture}, {load} load", "", f"| {' | '.join(COLUMNS)} |"]
        lines += ["|---|" + "--:|" * (len(COLUMNS) - 2) + "---|"]
        lines += [_row(row, bf16.get(row["tokens"])) for row in rows]
    return "\n".join(lines)


def _row(result: dict[str, Any], bf16: float | None) -> str:
    cells = [result["who"], f"{result['tokens']}"]
    if "failure" in result:
        return f"| {' | '.join([*cells, result['failure'].splitlines()[0][:160], *[''] * (len(COLUMNS) - 3)])} |"
    seconds = result["seconds"]
    cells += [f"{result['active']:g}"]
    cells += [f"{seconds * 1e6:.1f} µs{' (host)' if result['host_seconds'] > 0.8 * seconds else ''}"]
    cells += [f"{result['floor_seconds'] * 1e6:.1f} µs", f"{result['floor_seconds'] / seconds:.0%}"]
    cells += [f"{result['flops'] / seconds / 1e12:.0f}", f"{result['bytes'] / seconds / 1e9:.0f}"]
    cells += ["" if bf16 is None else f"{bf16 / seconds:.2f}"]
    cells += [", ".join(f"{name} {part * 1e6:.1f}" for name, part in result.get("parts", {}).items())]
    return f"| {' | '.join(cells)} |"


def plot(document: dict[str, Any], path: Path) -> None:
    """Draws floor / time over tokens: a panel for each mixture and load, a line for each recipe or peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [result for result in document["results"] if "seconds" in result]
    panels = list(dict.fromkeys((result["mixture"], result["load"]) for result in results))
    figure, axes = plt.subplots(
        len(panels), squeeze=False, sharex=True, figsize=(9, 1 + 2.6 * len(panels)), layout="constrained"
    )
    everyone = list(dict.fromkeys(result["who"] for result in results))
    for axis, (mixture, load) in zip(axes[:, 0], panels):
        for index, who in enumerate(everyone):
            of = {r["tokens"]: r for r in results if (r["mixture"], r["load"], r["who"]) == (mixture, load, who)}
            line = [of[count]["floor_seconds"] / of[count]["seconds"] for count in sorted(of)]
            axis.plot(sorted(of), line, marker="osD^vP*X<>"[index % 10], ms=4, lw=1.3, color=f"C{index}", label=who)
        axis.set_title(f"{mixture}, {load} load", loc="left", fontsize="medium")
        axis.set_ylabel("floor / time")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xscale("log", base=2)
    axes[-1, 0].xaxis.set_major_formatter("{x:g}")
    axes[-1, 0].set_xlabel("tokens")
    handles = {label: handle for axis in axes[:, 0] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.suptitle(f"{document['facts']['device']}, jax {document['facts']['jax']}, {document['facts']['commit']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results here, and go on where they are")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print results as Markdown, and measure nothing")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --table: draw them too")
    parser.add_argument("--mixtures", default="", metavar="REGEX", help="only those in whose name it is found")
    parser.add_argument("--who", default="", metavar="REGEX", help="likewise: recipes, and bf16 peers")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK}")
    parser.add_argument("--load", choices=("uniform", "hot"), default="uniform")
    parser.add_argument("--parts", action="store_true", help="time each part by itself too")
    parser.add_argument("--backend", choices=BACKENDS, help="by default what fp8x.ops chooses")
    parser.add_argument("--tiny", action="store_true", help="small shapes under the same names, to try this script")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    options = parser.parse_args(arguments)
    if options.table:
        document = json.loads(options.table.read_text())
        if options.plot:
            plot(document, options.plot)
        return print(table(document))
    if not options.json:
        parser.error("--json or --table is needed")
    end = time.monotonic() + options.seconds
    known = TINY if options.tiny else MIXTURES
    names, who, tokens = list(known), [BF16, TORCH, *RECIPES], TOKENS
    if options.quick:
        names, who, tokens = (QUICK[name] for name in ("mixtures", "who", "tokens"))
    mixtures = {name: known[name] for name in names if name in known and re.search(options.mixtures, name)}
    who = [name for name in who if re.search(options.who, name)]
    nbytes = 2**20 if options.tiny else 2**31
    header = lambda: facts() | {"backend": options.backend, "copy_bandwidth": copy_bandwidth(nbytes)}  # noqa: E731
    with fp8x.backend(options.backend) if options.backend else contextlib.nullcontext():
        run(Results(options.json, header), mixtures, options.tokens or tokens, who, options.load, options.parts, end)


if __name__ == "__main__":
    main()
