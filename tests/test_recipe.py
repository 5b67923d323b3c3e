"""Recipes, their short codes, and the rules that hand them out."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import fp8x
from fp8x.errors import RecipeError, RuleError
from fp8x.recipe import RECIPES, Recipe, Rules, as_recipe, recipe
from fp8x.scheme import E8M0, Scheme, per_tensor

TENSOR = Scheme("e4m3", block=(None, None))
ROW = Scheme("e4m3", block=(1, None))
BARE = Scheme("e5m2", block=(None, None), scale_rule="unit")
BLOCK = Scheme("e4m3", block=(128, 128))
GROUP = Scheme("e4m3", block=(1, 128))
STATIC_GROUP = Scheme("e4m3", block=(None, 128))
MX = Scheme("e4m3", block=(1, 32), scale_dtype=E8M0, scale_rule="rceil")

# DESIGN.md, section 3: code -> weights, activations, activation scale. `{}` is the output type.
CODES = {
    "e4m3_e4m3_{}": (TENSOR, TENSOR, "static"),
    "e5m2_e5m2_{}": (BARE, BARE, "static"),
    "e4m3_e4m3_{}_dynamic": (ROW, ROW, "dynamic"),
    "e4m3_{}": (ROW, None, None),
    "fp8_e4m3fn_{}_block_scale": (BLOCK, GROUP, "dynamic"),
    "fp8_e4m3fn_{}_block_scale_static_activation": (BLOCK, STATIC_GROUP, "static"),
    "mxfp8_{}": (MX, None, None),
    "mxfp8_mxfp8_{}": (MX, MX, "dynamic"),
}
IN_CALIBRATION = ["e4m3_e4m3_{}", "e5m2_e5m2_{}", "fp8_e4m3fn_{}_block_scale_static_activation"]


class TestCodes:
    @pytest.mark.parametrize(("out", "dtype"), [("bf16", jnp.bfloat16), ("f16", jnp.float16), ("f32", jnp.float32)])
    @pytest.mark.parametrize("code", CODES)
    def test_scheme_by_scheme(self, code, out, dtype):
        r = fp8x.recipe(code.format(out))
        assert (r.weight, r.activation, r.activation_scale) == CODES[code]
        assert r.out_dtype == dtype and r.observer is None
        assert r.is_static == (CODES[code][2] == "static")

    @pytest.mark.parametrize("out", ["bf16", "f16", "f32"])
    @pytest.mark.parametrize("code", IN_CALIBRATION)
    def test_the_same_recipe_in_calibration(self, code, out):
        code = code.format(out)
        assert recipe(f"{code}_max_calibrate") == dataclasses.replace(recipe(code), observer="max")

    def test_there_are_no_others(self):
        codes = {code.format(out) for code in CODES for out in ("bf16", "f16", "f32")}
        codes |= {f"{code.format(out)}_max_calibrate" for code in IN_CALIBRATION for out in ("bf16", "f16", "f32")}
        assert set(RECIPES) == codes and fp8x.RECIPES is RECIPES

    @pytest.mark.parametrize(
        ("typo", "near"),
        [
            ("e4m3_bf_16", "e4m3_bf16"),
            ("mxfp8", "mxfp8_bf16"),
            ("fp8_e4m3_bf16_block_scale", "fp8_e4m3fn_bf16_block_scale"),
            ("E4M3_E4M3_BF16", "e4m3"),
        ],
    )
    def test_unknown_code_lists_the_near_ones(self, typo, near):
        with pytest.raises(RecipeError, match=f"recipe: '{typo}' is unknown; near it: .*{near}.*RECIPES lists all"):
            recipe(typo)

    def test_what_is_near_no_code(self):
        with pytest.raises(
            RecipeError, match=r"recipe: 'zzz' is unknown; none is near it \(fp8x\.RECIPES lists all 33"
        ):
            fp8x.recipe("zzz")
        with pytest.raises(RecipeError, match="recipe: 'none' is unknown; None, without quotes, leaves a module as it"):
            fp8x.recipe("none")

    @pytest.mark.parametrize("value", [None, 3, ["mxfp8_bf16"]])
    def test_what_is_no_code(self, value):
        with pytest.raises(RecipeError, match="is unknown"):
            recipe(value)

    def test_as_recipe(self):
        r = recipe("mxfp8_bf16")
        assert as_recipe(r) is r and as_recipe("mxfp8_bf16") is r


class TestRecipe:
    def test_other_mixes(self):
        r = Recipe(Scheme("e5m2", block=(128, 128)), MX, "dynamic", jnp.float32)
        assert r.out_dtype == np.float32 and not r.is_static
        assert Recipe(BLOCK) == Recipe(BLOCK, None, None, "bfloat16")
        assert len({r, Recipe(BLOCK), Recipe(BLOCK)}) == 2  # hashable: static under jit
        assert fp8x.Recipe is Recipe

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            (dict(weight="e4m3"), "weight: 'e4m3' is not a Scheme"),
            (dict(activation="e4m3", activation_scale="dynamic"), "activation: 'e4m3' is not a Scheme"),
            (dict(activation=GROUP), r"activation_scale: None does not fit .* use one of \('static', 'dynamic'\)"),
            (dict(activation=GROUP, activation_scale="once"), "activation_scale: 'once' does not fit"),
            (dict(activation_scale="dynamic"), r"activation_scale: 'dynamic' does not fit activation None"),
            (dict(activation=Scheme("e4m3", block=(128,)), activation_scale="dynamic"), "has to name two dims"),
            (dict(activation=GROUP, activation_scale="static"), r"a scale for every row.*\(None, group\)"),
            (dict(activation=MX, activation_scale="static"), "a scale for every row"),
            (dict(out_dtype=jnp.float8_e4m3fn), "out_dtype: float8_e4m3fn does not fit; use one of bfloat16"),
            (dict(out_dtype="bf16"), "out_dtype: 'bf16' is no dtype"),
            (dict(observer="mse"), "observer: 'mse' is unknown"),
            (dict(observer="max"), "observer: 'max' needs a static activation scale; this recipe's is None"),
            (dict(activation=GROUP, activation_scale="dynamic", observer="max"), "this recipe's is dynamic"),
        ],
    )
    def test_contradictions(self, fields, match):
        with pytest.raises(RecipeError, match=match):
            Recipe(**{"weight": per_tensor(), **fields})


PATHS = [
    "embed_tokens",
    "layers.0.self_attn.q_proj",
    "layers.0.self_attn.k_proj",
    "layers.0.mlp.gate",
    "layers.0.mlp.router",
    "layers.0.mlp.w13",
    "layers.0.mlp.shared.gate_proj",
    "layers.0.mlp.shared_expert_gate",
    "layers.1.mlp.w13",
    "lm_head",
]
SKIPPED = {"embed_tokens", "layers.0.mlp.gate", "layers.0.mlp.router", "layers.0.mlp.shared_expert_gate", "lm_head"}
A, B = recipe("mxfp8_bf16"), recipe("e4m3_bf16")


class TestRules:
    def test_built_in_skips(self):
        resolved = Rules(A).resolve(PATHS)
        assert list(resolved) == PATHS
        assert {path for path, r in resolved.items() if r is None} == SKIPPED
        assert all(r is A for path, r in resolved.items() if path not in SKIPPED)

    @pytest.mark.parametrize("path", ["gate_proj", "model.gateway", "header", "embedder", "routers.up", "delegate"])
    def test_built_in_skips_match_whole_names(self, path):
        assert Rules(A).resolve([path]) == {path: A}

    def test_the_first_full_match_wins(self):
        rules = Rules(A, {r"layers\.0\..*q_proj": B, r"layers\.0\..*": None, r".*w13": B})
        resolved = rules.resolve(PATHS)
        assert resolved["layers.0.self_attn.q_proj"] is B
        assert resolved["layers.0.self_attn.k_proj"] is None
        assert resolved["layers.0.mlp.w13"] is None  # the second rule is before the third
        assert resolved["layers.1.mlp.w13"] is B

    def test_the_order_is_the_mapping_s(self):
        specific, general = (r"layers\.0\.mlp\.w13", B), (r".*\.w13", None)
        assert Rules(A, dict([specific, general])).resolve(PATHS)["layers.0.mlp.w13"] is B
        assert Rules(A, dict([general, specific])).resolve(PATHS)["layers.0.mlp.w13"] is None

    def test_codes_stand_for_recipes(self):
        assert Rules("mxfp8_bf16", {".*w13": "e4m3_bf16"}).resolve(PATHS)["layers.0.mlp.w13"] is B
        assert Rules("mxfp8_bf16").resolve(["a"]) == {"a": A}
        with pytest.raises(RecipeError, match="recipe: 'e4m3_bf17' is unknown"):
            Rules(A, {".*w13": "e4m3_bf17"}).resolve(PATHS)

    def test_a_rule_comes_before_a_built_in_skip(self):
        resolved = Rules(A, {"lm_head": "e4m3_bf16", r".*\.router": A}).resolve(PATHS)
        assert resolved["lm_head"] is B and resolved["layers.0.mlp.router"] is A
        assert resolved["layers.0.mlp.gate"] is None

    def test_no_default(self):
        resolved = Rules(None, {".*w13": A}).resolve(PATHS)
        assert {path for path, r in resolved.items() if r} == {"layers.0.mlp.w13", "layers.1.mlp.w13"}

    @pytest.mark.parametrize(
        ("pattern", "near"),
        [
            (r"layers\.0\.self_atn\.q.*", "q_proj"),
            ("q_proj", "q_proj"),
            (r"layers\.7\.mlp\.w13", r"layers\.1\.mlp\.w13"),
        ],
    )
    def test_a_rule_that_matches_nothing_raises(self, pattern, near):
        with pytest.raises(
            RuleError, match=rf"{re.escape(pattern[-3:])}' matches no module \(the whole path .*near it: .*{near}"
        ):
            Rules(A, {".*w13": B, pattern: None}).resolve(PATHS)

    def test_a_rule_for_a_model_without_linears_raises(self):
        assert Rules(A).resolve([]) == {}
        with pytest.raises(RuleError, match="the model has no module that can be quantized"):
            Rules(A, {".*": B}).resolve([])

    def test_a_shadowed_rule_is_no_typo(self):
        assert Rules(A, {".*": None, ".*w13": B}).resolve(PATHS) == dict.fromkeys(PATHS)

    def test_what_is_no_regular_expression(self):
        with pytest.raises(RuleError, match=r"rules: '\*w13' is not a regular expression: nothing to repeat"):
            Rules(A, {"*w13": B}).resolve(PATHS)


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ([("q_proj", None)], "rules: a list came; give a mapping from regular expressions over paths to recipes"),
        ("q_proj", "rules: a str came"),
        ({1: None}, "rules: 1 is no pattern"),
    ],
)
def test_rules_that_are_none(rules, match):
    with pytest.raises(RuleError, match=match):
        Rules("e4m3_bf16", rules).resolve(["q_proj"])
