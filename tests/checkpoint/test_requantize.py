"""From MXFP8 to other 8 bits for the least added error: literal cases, and errors measured again from the files."""

import dataclasses
import json
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from metric import float64
from resident import measure
from safetensors.numpy import save_file
from synthetic import write_mixtral

import fp8x
from fp8x import numerics
from fp8x.checkpoint import Reader, format_of, requantize, rows
from fp8x.checkpoint.reader import DTYPES
from fp8x.checkpoint.requantize import parse
from fp8x.errors import CheckpointError, RecipeError, RuleError, ShapeError
from fp8x.recipe import Recipe, describe
from fp8x.scheme import Scheme, mx, per_row, per_tensor

E4M3 = ml_dtypes.float8_e4m3fn
BLOCK, CHANNEL = fp8x.HOPPER
BLOCK_CODE, CHANNEL_CODE = "fp8_e4m3fn_bf16_block_scale", "e4m3_e4m3_bf16_dynamic"


def with_rule(recipe: Recipe, rule: str) -> Recipe:
    return dataclasses.replace(recipe, weight=dataclasses.replace(recipe.weight, scale_rule=rule))


BLOCK_POW2, CHANNEL_POW2 = with_rule(BLOCK, "pow2"), with_rule(CHANNEL, "pow2")


def write_mx(path, *matrices: tuple[np.ndarray, np.ndarray], **others: np.ndarray):
    """A checkpoint in MXFP8, as `quant_method: mxfp8` has it: of each matrix its codes' values `[N, K]`, and the
    exponents of its scales `[N, K / 32]`. `fc0` and so on."""
    tensors = dict(others)
    for index, (values, exponents) in enumerate(matrices):
        codes = np.asarray(values, np.float64).astype(E4M3)
        assert np.array_equal(codes.astype(np.float64), values, equal_nan=True)
        tensors[f"fc{index}.weight"] = codes
        tensors[f"fc{index}.weight_scale_inv"] = (np.asarray(exponents) + 127).astype(np.uint8)
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    quantization = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]}
    config = {"model_type": "other", "dtype": "bfloat16", "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return path


def wide(shape: tuple[int, int], seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """A random matrix in MXFP8 whose scales are far apart: any finite code, and 2^exponents."""
    rng = np.random.default_rng(seed)
    codes = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    n, k = shape
    exponents = np.rint(rng.normal(0, spread, (n, k // 32))).astype(int)
    return rng.choice(codes[np.isfinite(codes)], shape), exponents


def values_of(values: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64) * np.repeat(2.0 ** np.asarray(exponents), 32, axis=1)


def stored(path, prefix: str) -> fp8x.ScaledArray:
    """A matrix in 8 bits of a checkpoint."""
    reader = Reader(path)
    format = format_of(reader.config)
    (recipe,) = format.from_config(reader.config["quantization_config"], [prefix], DTYPES["BF16"]).values()
    return format.decode(prefix, recipe, reader.stored(f"{prefix}.weight").shape, reader)[0]


def as_computed(q: fp8x.ScaledArray) -> np.ndarray:
    """What a matrix in 8 bits stands for: code times scale, rounded once to float32. In float64."""
    return float64(q).astype(np.float32).astype(np.float64)


def group(values, k: int = 32) -> np.ndarray:
    """A row of `k` that starts with these values."""
    return np.array([*values, *[0.0] * (k - len(values))])


class TestByHand:
    def test_powers_of_two_keep_every_code(self, tmp_path):
        """Two groups of 32 of which one has scale 1, the other 8: 240 · 8 / 448 = 4.29, so the block's scale is 8."""
        row = np.concatenate([group([1.0, -1.125]), group([240.0, 0.0625])])
        done = fp8x.convert(write_mx(tmp_path / "a", (row[None], [[0, 3]])), tmp_path / "b", requantize=BLOCK_CODE)
        found = stored(tmp_path / "b", "fc0")
        assert np.array_equal(np.asarray(found.scale), [[8.0]])
        expected = np.concatenate([group([0.125, -0.140625]), group([240.0, 0.0625])])
        assert np.array_equal(np.asarray(found.data).astype(np.float64), expected[None])
        (choice,) = done.requantization.choices
        assert (choice.module, choice.chosen.recipe) == ("fc0", BLOCK_POW2)
        assert (choice.chosen.noise, choice.chosen.snr) == (0.0, math.inf)
        assert choice.chosen.signal == 1 + 1.125**2 + 1920**2 + 0.5**2
        # amax / 448 would be 30 / 7; but a block that comes from powers of two has the better of both by that rule.
        (other,) = choice.others
        assert (other.recipe, other.noise) == (BLOCK, 0.0)

    def test_a_small_code_that_is_lost_costs_no_other(self, tmp_path):
        """Of scale 8, 9/512 is 1.125 steps of 2^-9, and 1 is left of them. Of 30 / 7, what amax / 448 gives, 1, 1.125
        and 1/2 would become 15/64, 1/4 and 15/128."""
        row = np.concatenate([group([1.0, -1.125, 9 / 512]), group([240.0, 0.0625])])
        (choice,) = fp8x.choose_recipes(write_mx(tmp_path / "a", (row[None], [[0, 3]])), BLOCK_CODE).choices
        assert (choice.chosen.recipe, choice.chosen.noise) == (BLOCK_POW2, 512.0**-2)
        assert [(other.recipe, other.noise) for other in choice.others] == [(BLOCK, 512.0**-2)]

    def test_of_two_rules_the_sum_of_squares_decides(self, tmp_path):
        """As below, with 31 times 16: 2 of the steps of 4096 · 2^-9, but 3.5 of those of 2340.6, and 4 of them are
        18.286. The block's largest error is less by amax / 448, 2.286 instead of 4, and all of them together more."""
        row = np.concatenate([group([20.0, *[16.0] * 31]), group([256.0])])
        (choice,) = fp8x.choose_recipes(write_mx(tmp_path / "a", (row[None], [[0, 12]])), BLOCK_CODE).choices
        assert (choice.chosen.recipe, choice.chosen.noise) == (BLOCK_POW2, 4**2)
        (other,) = choice.others
        assert other.recipe == BLOCK
        assert other.noise == pytest.approx((20 - 128 / 7) ** 2 + 31 * (128 / 7 - 16) ** 2, rel=1e-2)

    def test_where_small_values_are_lost_amax_may_win(self, tmp_path):
        """256 · 2^12 / 448 = 2340.6, and 4096 is the next power of two. Of that 20 is 2.5 of the steps of 2^-9, which
        rounds to 2: 16. Of 2340.6 it is 4.375 steps, and 4 of them are 18.286. Either loses 1.125 whole."""
        row = np.concatenate([group([20.0, 1.125]), group([256.0])])
        done = fp8x.convert(write_mx(tmp_path / "a", (row[None], [[0, 12]])), tmp_path / "b", requantize=BLOCK_CODE)
        (choice,) = done.requantization.choices
        assert choice.chosen.recipe == BLOCK
        assert choice.chosen.noise == pytest.approx(1.125**2 + (20 - 128 / 7) ** 2, rel=1e-2)
        assert [(other.recipe, other.noise) for other in choice.others] == [(BLOCK_POW2, 1.125**2 + 4**2)]
        found = float64(stored(tmp_path / "b", "fc0"))
        assert found[0, :2] == pytest.approx([128 / 7, 0], rel=1e-6) and found[0, 32] == pytest.approx(
            2.0**20, rel=1e-7
        )

    def test_channels_keep_what_a_block_loses(self, tmp_path):
        """A large row beside a small one."""
        rows_of = np.stack([group([256.0]), group([1.125, 20.0])])
        path = write_mx(tmp_path / "a", (rows_of, [[12], [0]]))
        (choice,) = fp8x.choose_recipes(path).choices
        assert choice.chosen.recipe == CHANNEL_POW2 and choice.chosen.noise == 0
        assert {other.recipe: other.noise for other in choice.others}[BLOCK_POW2] == 1.125**2 + 4**2

    def test_a_block_keeps_what_channels_lose(self, tmp_path):
        """128 large columns beside 128 small ones."""
        row = np.concatenate([group([256.0], 128), group([1.125, 20.0], 128)])
        path = write_mx(tmp_path / "a", (row[None], [[12] * 4 + [0] * 4]))
        for named in ("hopper", (CHANNEL_CODE, BLOCK_CODE)):
            (choice,) = fp8x.choose_recipes(path, named).choices
            assert choice.chosen.recipe == BLOCK_POW2 and choice.chosen.noise == 0
            assert {other.recipe: other.noise for other in choice.others}[CHANNEL_POW2] == 1.125**2 + 4**2

    def test_of_equals_the_first(self, tmp_path):
        path = write_mx(tmp_path / "a", (np.stack([group([1.0, 1.125])] * 2), [[0], [1]]))
        for first, named in {BLOCK_POW2: fp8x.HOPPER, CHANNEL_POW2: fp8x.HOPPER[::-1]}.items():
            (choice,) = fp8x.choose_recipes(path, named).choices
            assert choice.chosen.recipe == first and len(choice.others) == 3
        zeros = write_mx(tmp_path / "zeros", (np.zeros((2, 32)), [[0], [1]]))
        (choice,) = fp8x.choose_recipes(zeros).choices
        assert choice.chosen.recipe == BLOCK_POW2 and choice.chosen.snr == math.inf

    def test_modules_choose_for_themselves(self, tmp_path):
        rows_of = np.stack([group([256.0]), group([1.125, 20.0])])
        row = np.concatenate([group([256.0], 128), group([1.125, 20.0], 128)])
        path = write_mx(tmp_path / "a", (rows_of, [[12], [0]]), (row[None], [[12] * 4 + [0] * 4]))
        done = fp8x.convert(path, tmp_path / "b", requantize="hopper")
        assert done.requantization.recipes == {"fc0": CHANNEL_POW2, "fc1": BLOCK_POW2}
        assert done.format == "compressed-tensors"
        assert stored(tmp_path / "b", "fc0").scheme == CHANNEL_POW2.weight
        assert stored(tmp_path / "b", "fc1").scheme == BLOCK_POW2.weight
        assert np.array_equal(float64(stored(tmp_path / "b", "fc0")), values_of(rows_of, [[12], [0]]))


@pytest.mark.parametrize("block", [(128, 128), (1, None), (None, None)])
def test_no_other_power_of_two_adds_less(block):
    """Also those that clip. In float64, with ml_dtypes' casts."""
    truth = values_of(*wide((160, 256), 0, spread=6))
    found = fp8x.quantize(jnp.asarray(truth, jnp.float32), Scheme("e4m3", block=block, scale_rule="pow2"))
    assert np.any(float64(found) != truth)  # else zeros would be compared
    n, k = (extent or size for extent, size in zip(block, truth.shape))
    for i in range(0, 160, n):
        for j in range(0, 256, k):
            part, chosen = truth[i : i + n, j : j + k], float(found.scale[i // n, j // k])
            errors = {}
            for power in range(-4, 5):
                scale = chosen * 2.0**power
                back = np.clip(part / scale, -448, 448).astype(E4M3).astype(np.float64) * scale
                errors[power] = np.square(back - part).sum()
            ours = np.square(float64(found)[i : i + n, j : j + k] - part).sum()
            assert ours == errors[0] == min(errors.values()) < errors[-1]


@pytest.mark.parametrize("spread", [1, 8])
def test_errors_are_those_of_the_files(tmp_path, monkeypatch, spread):
    """Every recipe that was compared, converted to by itself, and read back in float64."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(requantize, "PIECE", 1000)
    truth = values_of(*wide((200, 288), 1, spread))
    path = write_mx(tmp_path / "a", wide((200, 288), 1, spread))
    tensor = Recipe(per_tensor(), per_row(), "dynamic")
    columns = Recipe(Scheme("e4m3", block=(None, 32)), per_row(), "dynamic")
    (choice,) = fp8x.choose_recipes(path, ("hopper", tensor, columns, "mxfp8_bf16")).choices
    assert choice.chosen.recipe == fp8x.recipe("mxfp8_bf16") and choice.chosen.noise == 0
    assert [each.recipe.weight.scale_rule for each in choice.others] == ["pow2", "amax"] * 4
    for index, each in enumerate(choice.others):
        if each.recipe.weight.block == columns.weight.block:  # no format holds it
            found = numerics.requantize(stored(path, "fc0"), each.recipe.weight)
        else:
            fp8x.convert(path, tmp_path / f"{index}", each.recipe)
            found = stored(tmp_path / f"{index}", "fc0")
        noise = np.square(as_computed(found) - truth).sum()
        assert each.noise == pytest.approx(noise, rel=1e-12) and noise > 0
        assert each.signal == pytest.approx(np.square(truth).sum(), rel=1e-14)
        assert each.snr == pytest.approx(10 * math.log10(each.signal / each.noise))


def test_the_choice_is_that_of_a_format_with_one_recipe(tmp_path):
    """Alone, the first matrix takes amax and the second powers of two; `fp8` holds one rule, and the second's error
    under the first's is the larger."""
    first = np.concatenate([group([20.0, 1.125]), group([256.0])])
    second = np.concatenate([group([20.0, *[16.0] * 31]), group([256.0])])
    path = write_mx(tmp_path / "a", (first[None], [[0, 12]]), (second[None], [[0, 12]]))
    apart = fp8x.convert(path, tmp_path / "b", requantize=BLOCK_CODE)
    assert apart.requantization.recipes == {"fc0": BLOCK, "fc1": BLOCK_POW2}
    together = fp8x.convert(path, tmp_path / "c", format="fp8", requantize=BLOCK_CODE)
    assert together.requantization.recipes == {"fc0": BLOCK_POW2, "fc1": BLOCK_POW2}
    assert Reader(tmp_path / "c").config["quantization_config"]["scale_fmt"] == "ue8m0"
    with pytest.raises(CheckpointError, match="'fp8': one recipe for all layers"):
        fp8x.convert(path, tmp_path / "d", format="fp8", requantize=apart.requantization)
    rowwise = fp8x.convert(path, tmp_path / "e", format="modelopt", requantize=CHANNEL_CODE)
    assert len(set(rowwise.requantization.recipes.values())) == 1
    assert stored(tmp_path / "e", "fc0").scheme.block == (1, None)


def test_what_is_in_16_bits_stays(tmp_path):
    plain = np.ones((4, 32), ml_dtypes.bfloat16)
    path = write_mx(tmp_path / "a", wide((4, 32), 0, 1), **{"other.weight": plain, "fc0.bias": np.ones(4, np.float32)})
    done = fp8x.convert(path, tmp_path / "b", requantize="hopper")
    assert list(done.requantization.recipes) == ["fc0"]
    reader = Reader(tmp_path / "b")
    assert reader.stored("other.weight").dtype == "BF16"
    assert {"fc0.bias", "fc0.weight_scale", "other.weight"} < set(reader)


def test_what_is_stored_so_already_keeps_its_bytes(tmp_path):
    """Whatever rule its scales follow, which a given rule overrides."""
    path = write_mx(tmp_path / "a", wide((128, 160), 3, 6))
    fp8x.convert(path, tmp_path / "b", BLOCK_POW2)
    kept = fp8x.convert(tmp_path / "b", tmp_path / "c", requantize="hopper").requantization.choices[0]
    assert kept.chosen.recipe == BLOCK_POW2 and kept.chosen.noise == 0 and len(kept.others) == 2
    before, after = stored(tmp_path / "b", "fc0"), stored(tmp_path / "c", "fc0")
    assert before.data.tobytes() == after.data.tobytes() and before.scale.tobytes() == after.scale.tobytes()
    values, exponents = wide((128, 160), 3, 6)
    plain = write_mx(tmp_path / "plain", **{"fc0.weight": values_of(values, exponents).astype(ml_dtypes.bfloat16)})
    fp8x.convert(plain, tmp_path / "amax", BLOCK)
    (choice,) = fp8x.choose_recipes(tmp_path / "amax", BLOCK_POW2).choices
    assert choice.chosen.recipe == BLOCK_POW2 and choice.chosen.noise > 0 and choice.others == ()


def test_an_earlier_choice_is_taken_as_it_is(tmp_path):
    path = write_mx(tmp_path / "a", wide((8, 64), 0, 6))
    found = fp8x.choose_recipes(path, CHANNEL_CODE)
    done = fp8x.convert(path, tmp_path / "b", requantize=found)
    assert done.requantization is found and stored(tmp_path / "b", "fc0").scheme.block == (1, None)
    other = write_mx(tmp_path / "other", wide((8, 64), 0, 6), wide((8, 64), 1, 6))
    with pytest.raises(CheckpointError, match=r"requantize: fc1 is in 8 bits in .*other, and not among the choices"):
        fp8x.convert(other, tmp_path / "c", requantize=found)


def test_a_choice_as_text_and_json(tmp_path):
    row = np.concatenate([group([1.0, -1.125]), group([240.0])])
    found = fp8x.choose_recipes(write_mx(tmp_path / "a", (row[None], [[0, 3]])), (BLOCK_CODE, "e5m2_e5m2_bf16"))
    assert str(found).startswith(f"fc0  {BLOCK_CODE}, pow2 weights (exact); not {BLOCK_CODE} (exact); not e5m2_")
    (entry,) = found.to_json().values()
    assert entry["recipe"] == f"{BLOCK_CODE}, pow2 weights" and entry["snr_db"] == math.inf
    assert entry["others_snr_db"][BLOCK_CODE] == math.inf
    assert 20 < entry["others_snr_db"]["e5m2_e5m2_bf16"] < 100 and " dB)" in str(found)


def test_progress_counts_what_is_read(tmp_path):
    path = write_mx(tmp_path / "a", wide((200, 64), 0, 1), wide((64, 96), 1, 1))
    seen = []
    fp8x.choose_recipes(path, progress=lambda *pair: seen.append(pair))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (200 * 64 + 64 * 96, 200 * 64 + 64 * 96)


def test_nonfinite_codes(tmp_path):
    values, exponents = wide((8, 64), 0, 1)
    clean = values.copy()
    values[3, 5] = values[7, 63] = np.nan
    clean[3, 5] = clean[7, 63] = 0
    path = write_mx(tmp_path / "a", (values, exponents))
    message = r"fc0.weight in .*model.safetensors: holds 2 NaN or Inf of 512 values; .*allow_nonfinite"
    for call in (lambda: fp8x.choose_recipes(path), lambda: fp8x.convert(path, tmp_path / "b", requantize="hopper")):
        with pytest.raises(CheckpointError, match=message):
            call()
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    found = fp8x.choose_recipes(path, allow_nonfinite=True)
    expected = fp8x.choose_recipes(write_mx(tmp_path / "clean", (clean, exponents)))
    for one, other in zip(*([each.choices[0].chosen, *each.choices[0].others] for each in (found, expected))):
        assert one.recipe == other.recipe and one.signal == pytest.approx(other.signal, rel=1e-12)
        assert one.noise == pytest.approx(other.noise, rel=1e-12)


def test_what_does_not_fit(tmp_path):
    path, out = write_mx(tmp_path / "a", wide((8, 64), 0, 1)), tmp_path / "out"
    with pytest.raises(RecipeError, match="requantize: stands beside recipe"):
        fp8x.convert(path, out, BLOCK_CODE, requantize="hopper")
    with pytest.raises(RuleError, match="rules: are exceptions to a recipe, and requantize chooses"):
        fp8x.convert(path, out, rules={"fc0": None}, requantize="hopper")
    with pytest.raises(RecipeError, match=r"requantize: .*'hoper' is unknown; .*'hopper' stands for"):
        fp8x.convert(path, out, requantize="hoper")
    with pytest.raises(RecipeError, match="names no recipe"):
        fp8x.convert(path, out, requantize=())
    with pytest.raises(RecipeError, match="7 is no recipe"):
        fp8x.convert(path, out, requantize=7)
    with pytest.raises(RecipeError, match=r"weights e4m3 ·×·×· f32 have no block over \[N, K\]"):
        fp8x.convert(path, out, requantize=Recipe(Scheme("e4m3", block=(None, None, None))))
    with pytest.raises(RecipeError, match="master_weights"):
        fp8x.convert(path, out, requantize=dataclasses.replace(BLOCK, master_weights=True))
    with pytest.raises(CheckpointError, match="'fp8': weights e4m3 1×· f32 are neither"):
        fp8x.convert(path, out, format="fp8", requantize="hopper")
    with pytest.raises(CheckpointError, match="format: 'fp9' is unknown"):
        fp8x.convert(path, out, format="fp9", requantize="hopper")
    fp8x.convert(path, tmp_path / "plain", "bf16")
    with pytest.raises(CheckpointError, match=r"requantize: nothing in .*plain is in 8 bits; give a recipe"):
        fp8x.convert(tmp_path / "plain", out, requantize="hopper")
    odd = tmp_path / "odd"
    odd.mkdir()
    save_file({"fc.weight": np.ones((16, 33), np.float32)}, odd / "model.safetensors")
    (odd / "config.json").write_text(json.dumps({"model_type": "other", "dtype": "bfloat16"}))
    fp8x.convert(odd, tmp_path / "odd8", CHANNEL_CODE)
    with pytest.raises(ShapeError, match=r"fc.weight: .*33, which 32 does not divide"):
        fp8x.convert(tmp_path / "odd8", out, requantize=("hopper", "mxfp8_bf16"))
    assert not out.exists()


def test_names_of_recipes():
    assert parse("hopper") == fp8x.HOPPER == parse(["hopper", BLOCK_CODE])
    assert parse("e4m3_e4m3_bf16_max_calibrate") == (fp8x.recipe("e4m3_e4m3_bf16"),)
    assert describe(BLOCK) == BLOCK_CODE and describe(BLOCK_POW2) == f"{BLOCK_CODE}, pow2 weights"
    assert describe(Recipe(mx(), per_row(), "dynamic")) == "e4m3 1×32 e8m0 by e4m3 1×· f32 -> bfloat16"


CHOOSE = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # a matrix a thread, a thread a core
from fp8x.checkpoint import Reader
from fp8x.models.convert import choose_recipes
size = len(choose_recipes(path, ("hopper", "e5m2_e5m2_bf16")).choices)
"""


@pytest.mark.slow
def test_memory_is_that_of_some_rows(tmp_path, tiny_checkpoint):
    assert write_mixtral(tmp_path / "model", 1024, 2048) > 200 * 2**20
    for name, path in {"big": tmp_path / "model", "small": tiny_checkpoint}.items():
        fp8x.convert(path, tmp_path / name, "mxfp8_bf16")
    count, growth = measure(CHOOSE, tmp_path / "big", tmp_path / "small")
    assert count == 12 and growth < 96 * 2**20  # the source has 108 MB, in float32 432
