"""Which tiling a kernel takes: forced, measured, or estimated; and the tables of measured ones."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import fp8x
from fp8x import Recipe, Scheme
from fp8x.benchmark.grouped import Shape, operands, product
from fp8x.errors import BackendError
from fp8x.ops import mosaic_swapped
from fp8x.pallas import tuning
from fp8x.pallas.tuning import Problem
from fp8x.scheme import mx, per_row


@dataclasses.dataclass(frozen=True)
class Rows:
    rows: int
    depth: int = 4


@dataclasses.dataclass(frozen=True)
class Columns:
    columns: int


PROBLEM = Problem("sm90_rows", 300, 4096, 7168, 8)
ESTIMATES = {Rows(64): 2e-3, Rows(128): 1e-3, Rows(256): 1e-3}
MEASURED = dict(kernel="sm90_rows", m=512, n=4096, k=7168, groups=8, tiling=dict(rows=64, depth=3), seconds=9e-4)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of this device with one entry, named by the environment."""
    path = tmp_path / "table.json"
    tuning.write(path, jax.devices()[0].device_kind, [MEASURED | dict(jax="0.11.2")])
    monkeypatch.setenv("FP8X_TUNING", str(path))
    yield path
    tuning._tables.cache_clear()


def test_the_least_estimate_where_nothing_was_measured():
    assert tuning.choose(PROBLEM, ESTIMATES) == Rows(128)


def test_what_was_measured(table):
    assert tuning.choose(PROBLEM, ESTIMATES) == Rows(64, 3)


@pytest.mark.parametrize("change", [dict(m=257), dict(m=512)])
def test_rows_up_to_the_next_power_of_two_share_an_entry(table, change):
    assert tuning.choose(dataclasses.replace(PROBLEM, **change), ESTIMATES) == Rows(64, 3)


@pytest.mark.parametrize("change", [dict(m=256), dict(m=513), dict(n=4095), dict(k=1), dict(groups=1), dict(kernel="")])
def test_other_problems_do_not(table, change):
    assert tuning.choose(dataclasses.replace(PROBLEM, **change), ESTIMATES) == Rows(128)


def test_a_table_in_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "__init__.py"))
    assert tuning.table_path("NVIDIA H200").name == "nvidia_h200.json"
    kind = jax.devices()[0].device_kind
    tuning.write(tuning.table_path(kind), kind, [MEASURED])
    try:
        assert tuning.choose(PROBLEM, ESTIMATES) == Rows(64, 3)
        nearer = tmp_path / "mine.json"
        tuning.write(nearer, kind, [MEASURED | dict(tiling=dict(rows=32))])
        monkeypatch.setenv("FP8X_TUNING", str(nearer))
        assert tuning.choose(PROBLEM, ESTIMATES) == Rows(32)
        assert tuning.choose(dataclasses.replace(PROBLEM, m=1), ESTIMATES) == Rows(128)
    finally:
        tuning._tables.cache_clear()


def test_writing_replaces_and_keeps(table):
    kind = jax.devices()[0].device_kind
    other = MEASURED | dict(m=1, groups=2)
    tuning.write(table, kind, [MEASURED | dict(m=400, seconds=1e-4), other])
    assert json.loads(table.read_text())["entries"] == [other, MEASURED | dict(m=400, seconds=1e-4)]


def test_forced_where_the_kernel_has_such_tilings():
    with tuning.forced(Rows(7)):
        assert tuning.choose(PROBLEM, ESTIMATES) == Rows(7)
        assert tuning.choose(PROBLEM, {Columns(1): 1.0}) == Columns(1)


def test_compiled_functions_follow_the_context():
    @jax.jit
    def rows(x):
        return x * tuning.choose(PROBLEM, ESTIMATES).rows

    found = [rows(jnp.ones(()))]
    with tuning.forced(Rows(7)):
        found.append(rows(jnp.ones(())))
    found.append(rows(jnp.ones(())))
    assert [int(x) for x in found] == [128, 7, 128]


def test_recorded(table):
    with tuning.recorded() as choices:
        tuning.choose(PROBLEM, ESTIMATES)
        tuning.choose(dataclasses.replace(PROBLEM, m=1), ESTIMATES)
    assert [(choice.tiling, choice.seconds) for choice in choices] == [(Rows(64, 3), 9e-4), (Rows(128), None)]
    assert choices[0].problem == PROBLEM and choices[0].estimates == ESTIMATES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"table.json: can't be read \(JSONDecodeError"),
        ("[]", "can't be read"),
        ('{"device": "cpu", "entries": [{"kernel": "a"}]}', r"can't be read \(KeyError: 'm'\)"),
        ('{"device": "NVIDIA B200", "entries": []}', "is for 'NVIDIA B200', and this device is 'cpu'"),
        (None, "can't be read"),
    ],
)
def test_tables_that_can_not_be_used(table, text, message):
    table.unlink() if text is None else table.write_text(text)
    tuning._tables.cache_clear()
    with pytest.raises(BackendError, match=message):
        tuning.choose(PROBLEM, ESTIMATES)


def test_a_tiling_of_another_version(table):
    tuning.write(table, jax.devices()[0].device_kind, [MEASURED | dict(tiling=dict(width=3))])
    with pytest.raises(BackendError, match=r"sm90_rows has the tiling {'width': 3}; its fields are rows, depth"):
        tuning.choose(PROBLEM, ESTIMATES)


BLOCK, GROUP = Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(1, 128))
RECIPES = {  # one that takes the kernel
    "sm90_fp8": Recipe(per_row(), per_row(), "dynamic"),
    "sm90_fp8_block": Recipe(BLOCK, GROUP, "dynamic"),
    "sm90_fp8_decode_promoted": Recipe(BLOCK, GROUP, "dynamic"),
    "sm90_w8a16": Recipe(per_row()),
    "sm90_w8a16_promoted": Recipe(BLOCK),
    "sm90_mx": Recipe(mx()),
}
SHIPPED = [
    (path, entry)
    for path in sorted(Path(tuning.__file__).parent.glob("*.json"))
    for entry in json.loads(path.read_text())["entries"]
]


@pytest.mark.sample
@pytest.mark.parametrize(
    ("path", "entry"),
    SHIPPED,
    ids=lambda v: v.stem if isinstance(v, Path) else "-".join(map(str, list(v.values())[:5])),
)
def test_shipped_tables_have_tilings_that_their_kernels_could_choose(path, entry, monkeypatch):
    device = json.loads(path.read_text())["device"]
    assert tuning.table_path(device) == path
    monkeypatch.setattr(tuning, "_tables", lambda *_: [tuning.read(path, device)])
    monkeypatch.setattr(mosaic_swapped, "FEW_ROWS", 32)
    shape = Shape(entry["m"], entry["n"], entry["k"], entry["groups"])
    given = jax.eval_shape(lambda: operands(shape, RECIPES[entry["kernel"]], 0).arguments)
    with fp8x.backend("mosaic_gpu"), tuning.recorded() as choices:
        jax.eval_shape(product(shape, RECIPES[entry["kernel"]]), *given)
    choice = choices[-1]
    assert dataclasses.asdict(choice.problem).items() <= entry.items()
    assert dataclasses.asdict(choice.tiling) == entry["tiling"] and choice.seconds == entry["seconds"]
    assert choice.tiling in choice.estimates
    # A few times what the estimate says, at most: of seconds, not of µs.
    assert choice.estimates[choice.tiling] / 2 < choice.seconds < 3 * choice.estimates[choice.tiling]
