"""What several tests need: a tokenizer of bytes, and a tiny random checkpoint in Hugging Face's format.

And how all are run: `quick`, `own_process`, `--no-skips`, and the time of a run beside that of `import jax`.
"""

import json
import math
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# For the tests over many devices; the others run on the first.
jax.config.update("jax_num_cpu_devices", 8)

_IN_ITS_OWN_PROCESS = "FP8X_TEST_IN_ITS_OWN_PROCESS"


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped has failed")
    parser.addoption("--one-in", type=int, default=8, help="cases of a test marked `sample`, of which one is not slow")


_START = pytest.StashKey[float]()


def pytest_configure(config):
    """What XLA compiles for one test, or process, or run, is kept for the next: most of the time goes into that.

    `pytest --cache-clear` begins anew.
    """
    config.stash[_START] = time.monotonic()
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    kept = str(config.cache.mkdir("compiled"))
    for name, value in {"compilation_cache_dir": kept, "persistent_cache_min_compile_time_secs": 0.1}.items():
        jax.config.update(f"jax_{name}", value)
        os.environ[f"JAX_{name.upper()}"] = str(value)  # of the processes that tests start


# Something of each room, in two minutes together.
QUICK = {
    "": ("test_array", "test_scheme", "test_recipe", "test_cli_options", "test_setup"),
    "ops": ("test_dispatch", "test_operand", "test_groups"),
    "nn": ("test_routing", "test_convert"),
    "pallas": ("test_schedule", "test_tuning"),
    "ptx": ("test_tensor_cores",),
    "calibrate": ("test_data", "test_methods", "test_sidecar"),
    "checkpoint": ("test_reader", "test_formats"),
    "models": ("test_hf_names", "test_decoder_config"),
    "sharding": ("test_split",),
    "benchmark": ("test_supervise",),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    _thin(items, config.getoption("one_in"))
    quick = {Path(__file__).parent / room / f"{name}.py" for room, names in QUICK.items() for name in names}
    for item in items:
        if item.path in quick and not any(item.iter_markers("slow")):
            item.add_marker("quick")


def _thin(items, one_in: int) -> None:
    """Of a test marked `sample` one case in eight, rounded up, runs by default, chosen by their names; the others are
    `slow`. Together such tests still see every recipe."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if any(item.iter_markers("sample")) and not any(item.iter_markers("slow")):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in cases.values():
        group.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in group[math.ceil(len(group) / one_in) :]:
            item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs a test that is marked `own_process` in one: what others leave in memory has no part in it."""
    if pyfuncitem.get_closest_marker("own_process") is None or _IN_ITS_OWN_PROCESS in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-n0", "-m", "", pyfuncitem.nodeid]
    run = subprocess.run(
        command,
        cwd=pyfuncitem.config.rootpath,
        env=os.environ | {_IN_ITS_OWN_PROCESS: "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        pytest.fail(run.stdout + run.stderr, pytrace=False)
    return True


# Of the 65,530 that Linux allows a process by default. A compiled function takes some 30; without one XLA crashes.
MAX_MAPS = 20_000


def pytest_runtest_teardown(item, nextitem):
    """Between two modules, forgets what was compiled where it takes too many of the process' maps of memory."""
    maps = Path("/proc/self/maps")
    if nextitem is not None and nextitem.path != item.path and maps.exists():
        with maps.open() as lines:
            if sum(1 for _ in lines) > MAX_MAPS:
                jax.clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome, report.longrepr = "failed", f"skipped, which --no-skips forbids: {report.longrepr[-1]}"
    return report


def pytest_terminal_summary(terminalreporter, config):
    """The order, and the time: machines differ by the day, so beside another time of the same machine."""
    if _IN_ITS_OWN_PROCESS in os.environ:
        return
    took = time.monotonic() - config.stash[_START]
    before = time.monotonic()
    subprocess.run([sys.executable, "-c", "import jax"], check=True)
    reference = time.monotonic() - before
    seed = config.getoption("randomly_seed", None)
    terminalreporter.write_line(
        f"--randomly-seed={seed}: {took:.0f} s, {took / reference:.0f} times `import jax` ({reference:.2f} s here)"
    )


TINY_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def _float32_in_float32(request):
    """What is not quantized JAX multiplies in 19 bits (TF32) on a GPU, unless told otherwise. Ops are not told: theirs
    are quantized."""
    whole_models = request.path.parent.name in ("nn", "models")
    with jax.default_matmul_precision("highest" if whole_models else None):
        yield


@pytest.fixture
def no_gpu(monkeypatch):
    """What a process takes that sees its CPU alone."""
    cpus = jax.devices("cpu")
    monkeypatch.setattr(jax, "devices", lambda: cpus)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token a byte of UTF-8, then `<s>` (256) and `</s>` (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, byte_tokenizer) -> Path:
    """A Mixtral of two layers and four experts in bf16, with random weights."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(path, TINY_MIXTRAL, byte_tokenizer)
    return path


def write_checkpoint(path: Path, config: dict, tokenizer: Tokenizer, seed: int = 0) -> None:
    from fp8x.models.config import DecoderConfig
    from fp8x.models.hf_names import linear_names, param_names

    rng = np.random.default_rng(seed)
    decoder = DecoderConfig.from_hf(config)
    shapes = _shapes(decoder, linear_names(decoder)) | {
        name: (decoder.vocab_size, decoder.hidden_size) if "embed" in name else (decoder.hidden_size,)
        for name in param_names(decoder).values()
    }
    tensors = {}
    for name, shape in shapes.items():
        value = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * shape[-1] ** -0.5
        tensors[name] = np.asarray(jax.numpy.asarray(value, "bfloat16"))
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(path / "tokenizer.json"))


def _shapes(config, names) -> dict[str, tuple[int, int]]:
    hidden, inner = config.hidden_size, config.mixture.intermediate
    keys = config.num_key_value_heads * config.head_dim
    outputs = {"k_proj": (keys, hidden), "v_proj": (keys, hidden), "router": (config.num_experts, hidden)}
    outputs |= {"w13": (inner, hidden), "w2": (hidden, inner), "lm_head": (config.vocab_size, hidden)}
    shapes = {}
    for path, tree in names.items():
        for prefix in jax.tree.leaves(tree):
            shapes[f"{prefix}.weight"] = outputs.get(path.split(".")[-1], (hidden, hidden))
    return shapes
