"""benchmarks/decode.py from end to end, with narrow layers."""

import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fp8x.benchmark import timing
from fp8x.models import generate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def decode(monkeypatch):
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("decode")
    for name in ("decode", "mixtures"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_from_end_to_end(decode, tmp_path, capsys, monkeypatch):
    path = tmp_path / "out.json"
    arguments = ["--json", str(path), "--tiny", "--layers", "1", "--context", "5", "--steps", "3", "--batches", "1"]
    arguments += ["--models", "Qwen3", "--who", "^mxfp8_mxfp8"]
    decode.main(arguments)
    (result,) = json.loads(path.read_text())["results"]
    assert set(result["parts"]) == {"attention", "mixtures", "vocabulary"} and min(result["parts"].values()) > 0
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(1)

    monkeypatch.setattr(decode, "decoder", lambda *_: pytest.fail("ran again"))
    decode.main(arguments)  # everything is there
    decode.main([*arguments, "--quick", "--batches", "2", "--seconds", "0"])  # and nothing begins after the end
    assert json.loads(path.read_text())["results"] == [result]
    capsys.readouterr()
    decode.main(["--table", str(path)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and len({row.count("|") for row in rows}) == 1


@pytest.mark.slow
def test_a_cache_in_8_bits(decode, tmp_path):
    arguments = ["--json", str(tmp_path / "out.json"), "--tiny", "--layers", "1", "--context", "5", "--steps", "3"]
    decode.main([*arguments, "--batches", "1", "--models", "Qwen3", "--who", "^bf16", "--cache", "e4m3"])
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["who"] == "bf16, cache e4m3" and "failure" not in result


@pytest.mark.slow
def test_writes_what_generate_does(decode):
    model = decode.decoder(decode.TINY["Mixtral 8x7B"], 2, "fp8_e4m3fn_bf16_block_scale")
    prompt = jnp.asarray([[5], [9]])
    last = decode.decode(model, prompt[:, 0], model.init_cache(2, 4), 4)
    np.testing.assert_array_equal(last, generate(model, prompt, max_new_tokens=4)[:, -1])


def test_floor_of_a_step(decode):
    """By hand: one layer of two of four experts, its attention and the vocabulary."""
    model = decode.decoder(decode.TINY["Mixtral 8x7B"], 1, "bf16")
    setting = decode.Setting(layers=1, context=7, steps=2)
    weights = 2 * 3 * 64 * 96 + 64 * 4 + 2 * 64 * 64 + 2 * 64 * 32 + 61 * 64 + 3 * 64
    keys_and_values = 7 * 2 * 2 * 16
    assert decode.floor_seconds(model, 1, setting, "bf16") == pytest.approx(2 * (weights + keys_and_values) / 4.8e12)
    setting = decode.Setting(layers=1, context=7, steps=2, cache="e4m3")  # a byte, and a scale for 16
    nbytes = 2 * weights + keys_and_values + 4 * keys_and_values // 16
    assert decode.floor_seconds(model, 1, setting, "bf16") == pytest.approx(nbytes / 4.8e12)
