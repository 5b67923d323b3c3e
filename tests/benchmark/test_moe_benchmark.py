"""benchmarks/moe.py from end to end, at small shapes; random layers, and how tokens spread over experts."""

import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import fp8x
from fp8x.benchmark import timing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def moe(monkeypatch):
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("moe")
    for name in ("moe", "mixtures"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("tokens", "who", "parts"),
    [("8", "torch|mxfp8_mxfp8", []), pytest.param("1", "ragged|e5m2|block_scale", ["--parts"], marks=pytest.mark.slow)],
)
def test_from_end_to_end(moe, tmp_path, capsys, monkeypatch, tokens, who, parts):
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--json", str(path), "--tiny", "--tokens", tokens, "--mixtures", "Mixtral", "--who", who, *parts]
    moe.main(arguments)
    results = json.loads(path.read_text())["results"]
    for result in results:
        assert ("seconds" in result) == (result["who"] != moe.TORCH)
        assert "seconds" in result or "No module named 'torch'" in result["failure"]
        assert set(result.get("parts", {})) == ({"routing", "w13", "gate", "w2", "combine"} if parts else set())

    assert not any(name not in moe.MIXTURES for name in moe.QUICK["mixtures"])
    assert not any(name not in (moe.BF16, moe.TORCH, *moe.RECIPES) for name in moe.QUICK["who"])
    monkeypatch.setattr(moe.Mixture, "layer", lambda *_: pytest.fail("ran again"))
    moe.main(arguments)  # everything is there
    moe.main([*arguments, "--quick", "--load", "hot", "--seconds", "0"])  # and nothing begins after the end
    assert json.loads(path.read_text())["results"] == results
    capsys.readouterr()
    moe.main(["--table", str(path), "--plot", str(picture)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(results) and len({row.count("|") for row in rows}) == 1
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_a_wrong_block_is_not_timed(moe, monkeypatch):
    monkeypatch.setattr(moe, "time_calls", lambda fn, inputs: (None, [2 * fn(*inputs[0])]))
    mixture = moe.TINY["Mixtral 8x7B"]
    found = moe._measure(mixture, mixture.layer("e4m3_bf16"), 8, "e4m3_bf16", "uniform", False)
    assert found["failure"] == "wrong: relative error 1 is over 0.04" and "seconds" not in found


def test_experts_that_tokens_visit(moe):
    """The mean of simulated draws; and what a random layer's router does."""
    for load, mixture, tokens in [("uniform", moe.Mixture(64, 32, 16, 3), 7), ("hot", moe.Mixture(64, 32, 16, 3), 7)]:
        rng, always = np.random.default_rng(0), load == "hot"
        scores = rng.random((4000, tokens, 16))
        scores[..., 0] += always
        visited = np.sort(scores.argsort(-1)[..., -3:].reshape(4000, -1), axis=-1)
        mean = np.mean(1 + np.count_nonzero(np.diff(visited), axis=-1))
        assert abs(mixture.active_experts(tokens, load) - mean) < 0.05
        layer = mixture.layer(None, load)
        _, experts = layer.route(mixture.tokens(64, 0))
        assert (np.bincount(experts.ravel(), minlength=16).max() == 64) == always
    assert moe.Mixture(64, 32, 1, 1).active_experts(5, "hot") == 1


def test_floor_of_a_block(moe):
    qwen = moe.MIXTURES["Qwen3-30B-A3B"]
    assert qwen.expert_bytes(None) == 2 * 3 * 768 * 2048
    assert qwen.expert_bytes("mxfp8_bf16") == 3 * 768 * 2048 * 33 // 32
    assert qwen.expert_bytes("fp8_e4m3fn_bf16_block_scale") == 3 * (768 * 2048 + 4 * 6 * 16)
    floor = qwen.floor("e4m3_e4m3_bf16", 4, 30)
    assert floor.bytes == 30 * 3 * (768 * 2048 + 4) + 4 * 4 * 2048 and floor.flops == 2 * 4 * 8 * 3 * 768 * 2048


@pytest.mark.parametrize("code", ["e5m2_e5m2_bf16", pytest.param("mxfp8_bf16", marks=pytest.mark.slow)])
def test_random_weights_are_finite_and_of_variance_one_over_k(moe, code):
    layer = moe.Mixture(256, 128, 4, 2).layer(code)
    for part in (layer.w13, layer.w2):
        assert part.weight.dtype == part.recipe.weight.dtype
        deviation = jnp.std(part.quantized_weight.dequantize()) * part.weight.shape[-1] ** 0.5
        assert 0.5 < deviation < 2
        assert part.input_scale is None or np.isfinite(part.input_scale[...]).all()
    assert isinstance(layer.w13, fp8x.nn.GroupedLinear) and layer.router.kernel.dtype == jnp.bfloat16
