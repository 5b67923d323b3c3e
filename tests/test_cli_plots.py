"""How errors are drawn, and said in words."""

import math
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_cli import invoke

from fp8x.checkpoint.measure import TensorRow
from fp8x.checkpoint.rows import decibels, mean_decibels
from fp8x.cli import plots, terminal


def row(name: str, noise: float = 0.01, signal: float = 1.0) -> TensorRow:
    return TensorRow(f"model.layers.{name}.weight", "e4m3", (4, 4), 16, 1.0, 0, signal, noise)


@pytest.fixture
def figures(monkeypatch):
    """What has been drawn."""
    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    return drawn


DENSE = [row(f"{layer}.mlp.up_proj") for layer in range(2)]
EXPERTS = [row(f"{layer}.mlp.experts.{expert}.up_proj") for layer in range(2) for expert in range(2)]


@pytest.mark.parametrize(
    ("rows", "title"), [(DENSE, ""), (EXPERTS, "band: experts"), (DENSE + EXPERTS, "band: experts")]
)
def test_a_band_is_explained_where_there_is_one(figures, tmp_path, rows, title):
    plots.draw(rows, "title", tmp_path / "out.png")
    assert figures[0].legends[0].get_title().get_text() == title


def test_what_is_exact_is_not_drawn(figures, tmp_path):
    exact = row("0.mlp.down_proj", noise=0.0)
    plots.draw([*DENSE, exact, row("1.mlp.down_proj", noise=0.001)], "title", tmp_path / "out.png")
    snr, amax = figures[0].axes
    assert snr.get_ylabel() == "SNR (dB), without what is exact"
    lines = {line.get_label(): line.get_xydata().tolist() for line in snr.lines}
    assert lines == {"up_proj": [[0, 20], [1, 20]], "down_proj": [[1, pytest.approx(30)]]}
    assert len(amax.lines[1].get_xydata()) == 2
    plots.draw([exact], "title", tmp_path / "out.png")
    assert [axis.get_ylabel() for axis in figures[1].axes] == ["amax"]


def test_means_and_words():
    inf = math.inf
    assert [decibels(*energies) for energies in ((1, 0.01), (1, 0), (0, 0), (0, 1), (1, inf))] == [
        pytest.approx(20),
        *(inf, inf, -inf, -inf),
    ]
    means = [mean_decibels(snrs) for snrs in ([20, inf, None, 30], [inf, inf], [None], [], [20, -inf])]
    assert means == [25, inf, None, None, -inf]
    assert [terminal.decibels(mean) for mean in means] == ["25.0 dB", "exact", "–", "–", "lost"]


def test_no_table_says_nan_or_inf(tmp_path):
    """A matrix of zeros, one that is exact, and two with a value that is not finite, whose other values count."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((32, 32)).astype(ml_dtypes.bfloat16)
    nan, inf = drawn.copy(), drawn.copy()
    nan[0, 0], inf[1, 1] = np.nan, np.inf
    matrices = {"q_proj": np.zeros_like(drawn), "k_proj": np.ones_like(drawn), "v_proj": nan, "o_proj": inf}

    def write(name, matrices):
        (tmp_path / name).mkdir()
        tensors = {f"model.layers.0.self_attn.{kind}.weight": matrix for kind, matrix in matrices.items()}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"architectures": ["Other"]}')
        options = ("--recipe", "mxfp8_bf16", "--allow-nonfinite", "--verify")
        quantized = invoke("quantize", tmp_path / name, tmp_path / f"{name}-mx", *options).stdout
        inspected = invoke("inspect", tmp_path / f"{name}-mx", "--reference", tmp_path / name).stdout
        assert not re.search(r"\b(nan|inf)\b", quantized + inspected)
        return quantized, [line.split()[-2:] for line in inspected.splitlines() if "_proj" in line or " all " in line]

    quantized, lines = write("some", matrices)
    assert [line[-1] for line in lines] == ["exact", "dB", "exact", "dB", "dB"]  # k, o, q, v, all
    of_nan, of_inf, of_all = (float(lines[index][0]) for index in (3, 1, 4))
    assert 28 < of_nan < 36 and 28 < of_inf < 36 and of_all == pytest.approx((of_nan + of_inf) / 2, abs=0.11)
    assert f"{of_all} dB" in quantized
    quantized, lines = write("lossless", {"q_proj": matrices["q_proj"], "k_proj": matrices["k_proj"]})
    assert [line[-1] for line in lines] == ["exact"] * 3 and quantized.count("exact") == 1
