"""Broken checkpoints, by the hundred: nothing but the documented errors, at once, and in little memory."""

import json
import random
import resource
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import Files, mutate
from synthetic import write_mixtral

import fp8x
from fp8x.checkpoint import Reader
from fp8x.checkpoint.inspect import inspect
from fp8x.checkpoint.plan import Plan
from fp8x.checkpoint.reader import CONFIG, INDEX
from fp8x.errors import Fp8xError

SECONDS = 5  # of processor time for one case, which compiles at most a few programs
ROOM = 2 * 2**30  # of address space: an array made by a lying header is larger
GOLDENS = Path(__file__).parents[1] / "goldens"
BASES = {
    "bf16": (None, None),
    "compressed-tensors": ("e4m3_e4m3_bf16_dynamic", "compressed-tensors"),
    "fp8": ("fp8_e4m3fn_bf16_block_scale", "fp8"),
    "modelopt": ("mxfp8_mxfp8_bf16", "modelopt"),
}
# Of other tools, each in a file or two.
OTHERS = {
    **{name: f"fp8/{name}" for name in ("fbgemm_fp8", "quark_fp8_kv", "torchao_mixed", "torchao_mxfp8")},
    **{name: f"fp8/{name}" for name in ("compressed_tensors_mxfp4", "fp8_fp4_experts")},
    "gpt_oss_mxfp4": "gpt_oss_mxfp4",
}


# A field whose name is damaged is unknown, which is a warning; so are a bound of activations, a KV cache that is not
# declared as fp8x knows it, or can't be in 16 bits, values in e4m3fnuz that e4m3fn lacks, activations in 4 bits, values
# that float32 has only as subnormal numbers, an origin that says something else, and models of no family.
WARNINGS = (
    "config.json of a .* not read",
    ".* it bounds the amax",
    ".*keys and values stay in the model's type",
    ".*there are no scales for it",
    ".*fp8x multiplies",
    ".*lie between two of e4m3fn",
    ".*activations in 4 bits there",
    ".*lie below 2.-126",
    ".*it is not used",
    ".*fp8x.load could not build this model",
    ".*nothing in it becomes 8 bits",
    ".*the scales of its KV cache are left out",
)
pytestmark = [
    pytest.mark.own_process,
    pytest.mark.filterwarnings(*(f"ignore:{message}:UserWarning" for message in WARNINGS)),
]


def files_of(base: str, path: Path) -> Files:
    """A checkpoint of one layer and two experts, in several files with an index; or one of another tool, in one."""
    if base in OTHERS:
        directory = GOLDENS / OTHERS[base]
        assert check(directory) == 0
        return {file.name: file.read_bytes() for file in directory.iterdir() if "golden" not in file.name}
    recipe, format = BASES[base]
    write_mixtral(path / "bf16", 32, 32, layers=1, experts=2, heads=2, vocab=32)
    fp8x.save(fp8x.load(path / "bf16", recipe), path / "base", format, max_shard_bytes=10_000)
    assert (path / "base" / INDEX).is_file() and check(path / "base") == 0
    return {file.name: file.read_bytes() for file in (path / "base").iterdir()}


def plans(path: Path) -> None:
    """Plans to copy, to dequantize and to quantize anew; says each in all ways, does what copies, and reads that."""
    refused = []
    for code in (None, "bf16", "e4m3_bf16"):
        try:
            plan = fp8x.plan(path, code)
        except Fp8xError as error:
            refused.append(error)
            continue
        str(plan).encode(errors="surrogatepass")
        json.dumps(plan.to_json())
        assert sum(row.count for row in plan.groups) == len(plan.rows)
        assert all(row.reason for row in plan.rows if row.after is None)
        if code is None:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    converted(plan, Path(folder, "result"))
                except Fp8xError as error:
                    assert not any(Path(folder).iterdir())
                    refused.append(error)
    if refused:
        raise refused[0]


def converted(plan: Plan, result: Path) -> None:
    fp8x.convert(plan, result)
    written = Reader(result)
    assert {row.name for row in plan.rows if row.after is not None} <= {*written, *written.fused}


def check(path: Path, also: tuple[Callable, ...] = ()) -> int:
    """Reads, inspects and loads, and more; the number of these that refused."""
    refused = 0
    for read in (Reader, inspect, fp8x.load, *also):
        try:
            read(path)
        except Fp8xError as error:
            str(error).encode()  # can be printed
            refused += 1
    return refused


def run(files: Files, seeds: range, path: Path) -> None:
    path.mkdir()

    def too_long(*_):
        raise TimeoutError(f"over {SECONDS} s")

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGVTALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    refused = 0
    try:
        for seed in seeds:
            case = mutate(files, random.Random(seed))
            for file in path.iterdir():
                file.unlink()
            for name, content in case.items():
                (path / name).write_bytes(content)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                refused += check(path, (plans,) if seed % 4 == 0 else ()) > 0
            except Exception as error:
                error.add_note(f"seed {seed}, files in {path}")
                raise
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        signal.signal(signal.SIGVTALRM, handler)
    assert refused > len(seeds) / 2


@pytest.mark.sample
@pytest.mark.parametrize("base", [*BASES, *OTHERS])
def test_broken_checkpoints_raise_documented_errors(base, tmp_path):
    run(files_of(base, tmp_path), range(150 if base in BASES else 40), tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("base", [*BASES, *OTHERS])
def test_many_broken_checkpoints_raise_documented_errors(base, tmp_path):
    run(files_of(base, tmp_path), range(10_000, 15_000), tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("directory", sorted(str(file.parent.relative_to(GOLDENS)) for file in GOLDENS.rglob(CONFIG)))
def test_broken_checkpoints_of_other_tools_raise_documented_errors(directory, tmp_path):
    names = [file for file in (GOLDENS / directory).iterdir() if file.name != "golden.safetensors"]
    run({file.name: file.read_bytes() for file in names}, range(2_000), tmp_path / "broken")
