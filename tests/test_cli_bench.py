"""`fp8x bench`: on XLA, and with a kernel of its own that has tilings."""

import dataclasses
import json

import jax
import pytest
from test_cli import error, invoke, read_json

from fp8x.benchmark import timing
from fp8x.benchmark import tune as module
from fp8x.ops import dispatch, xla
from fp8x.pallas import tuning
from fp8x.recipe import recipe

SHAPE = ("bench", "grouped", "-n", 32, "-k", 128, "--tokens", 8)
WEIGHT_ONLY = "e4m3_bf16"


@dataclasses.dataclass(frozen=True)
class Rows:
    rows: int


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)


@pytest.fixture
def kernel(monkeypatch):
    """A dense kernel before all others, whose tiling of 2 rows is wrong and whose tiling of 3 does not compile."""

    def run(x, w, bias, out_dtype):
        problem = tuning.Problem("sm90_rows", x.shape[0], *w.shape, 1)
        rows = tuning.choose(problem, {Rows(1): 2e-6, Rows(2): 1e-6, Rows(3): 3e-6, Rows(4): 4e-6}).rows
        if rows == 3:
            raise NotImplementedError("3 rows")
        return xla.matmul(x, w, bias, out_dtype) * (1 if rows != 2 else 1.1)

    found = dispatch.Kernel("matmul", "sm90_rows", "mosaic_gpu", lambda call: None, run)
    monkeypatch.setattr(dispatch, "KERNELS", (found, *dispatch.KERNELS))


def test_measure():
    (found,) = read_json(*SHAPE, "--recipe", WEIGHT_ONLY)["results"]
    assert (found["recipe"], found["tokens"], found["experts"], found["kernel"]) == (WEIGHT_ONLY, 8, 1, "xla_matmul")
    assert found["seconds"] > found["floor_seconds"] > 0 and found["relative_error"] < 2**-8
    assert found["bytes"] == 2 * 8 * 128 + 32 * 128 + 4 * 32 + 2 * 8 * 32


def test_measure_shows_a_row_a_case():
    grouped = ("--experts", 4, "--top-k", 2)
    lines = invoke(*SHAPE, *grouped, "-r", WEIGHT_ONLY).stdout.splitlines()
    assert lines[0] == "[tokens, 128] x [32, 128] x 4 experts, top 2 on cpu; floors are an H200's"
    assert [line.split()[:3] for line in lines if "xla" in line] == [[WEIGHT_ONLY, "8", "xla_grouped_matmul"]]


def test_wrong_results_are_not_timed(kernel):
    line = next(line for line in invoke(*SHAPE, "-r", WEIGHT_ONLY).stdout.splitlines() if "sm90" in line)
    assert line.split()[:5] == [WEIGHT_ONLY, "8", "sm90_rows", "rows", "2"] and " wrong " in line and "–" in line


def test_explain(kernel):
    (found,) = read_json(*SHAPE, "-r", WEIGHT_ONLY, "--explain")
    assert found["kernel"] == "sm90_rows" and found["tiling"] == {"rows": 2} and found["measured_seconds"] is None
    assert found["estimates"][0] == {"tiling": {"rows": 1}, "seconds": 2e-6}
    out = invoke(*SHAPE, "-r", WEIGHT_ONLY, "--explain").stdout
    assert f"{WEIGHT_ONLY}, 8 tokens: sm90_rows" in out and "1.0 µs   taken, estimated" in out
    assert "a kernel without tilings" in invoke(*SHAPE, "-r", WEIGHT_ONLY, "--explain", "--backend", "xla").stdout


def test_tune(kernel, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    tuned = read_json(*SHAPE, "-r", WEIGHT_ONLY, "--tune", "--table", path)
    (result,) = tuned["results"]
    trials = {trial["tiling"]["rows"]: trial for trial in result["trials"]}
    assert trials[1]["seconds"] > 0 and trials[4]["seconds"] > 0 and trials[4]["estimate"] == 4e-6
    assert trials[2]["failure"].startswith("wrong: ") and trials[3]["failure"] == "NotImplementedError: 3 rows"
    (entry,) = json.loads(path.read_text())["entries"]
    best = result["trials"][0]
    assert entry["tiling"] == best["tiling"] and entry["seconds"] == best["seconds"] and entry["jax"] == jax.__version__
    monkeypatch.setenv("FP8X_TUNING", str(path))
    out = invoke(*SHAPE, "-r", WEIGHT_ONLY, "--explain").stdout
    assert "taken, measured" in out


def test_tune_shows_its_trials(kernel, tmp_path, monkeypatch):
    shape, asked = [], recipe(WEIGHT_ONLY)
    monkeypatch.setattr(
        module,
        "tune",
        lambda *found: (
            shape.append(found) or [module.Trial(Rows(4), 4e-6, 1e-3), module.Trial(Rows(3), 3e-6, None, "no")]
        ),
    )
    out = invoke(*SHAPE, "-r", WEIGHT_ONLY, "--tune", "--most", 2, "--table", tmp_path / "a.json").stdout
    assert [line.split() for line in out.splitlines() if line.startswith(" rows")] == [
        ["rows", "4", "1,000.0", "µs", "4.0", "µs"],
        ["rows", "3", "–", "3.0", "µs", "no"],
    ]
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'a.json'}" and shape[0][1:] == (asked, 2)


def test_mistakes(tmp_path):
    assert "'fp9' is unknown" in error(*SHAPE, "-r", "fp9")
    assert "--top-k: 4 is more than the 2 of --experts" in error(
        *SHAPE, "-r", WEIGHT_ONLY, "--experts", 2, "--top-k", 4
    )
    assert "backend: 'cuda' is unknown" in error(*SHAPE, "-r", WEIGHT_ONLY, "--backend", "cuda")
    assert "its directory does not exist" in error(
        *SHAPE, "-r", WEIGHT_ONLY, "--tune", "--table", tmp_path / "absent" / "table.json"
    )
    assert "fp8x bench" in invoke("bench", "grouped", "--help").stdout
