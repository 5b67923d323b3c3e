"""Which tiling a kernel takes: forced, measured, or estimated; and the tables of measured ones."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from fp8x.errors import BackendError
from fp8x.pallas import tuning
from fp8x.pallas.tuning import Problem


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
