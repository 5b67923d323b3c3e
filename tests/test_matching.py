"""What a rule reaches, by every name that its modules go by; and what is said where it reaches nothing."""

import re

import pytest

import fp8x
from fp8x.errors import RuleError
from fp8x.recipe import Rules

CODE = "e4m3_bf16"
PATHS = ["layers.0.self_attn.q_proj", "layers.0.mlp.w13", "layers.0.mlp.w2", "layers.1.mlp.down_proj"]
EXPERTS = [f"model.layers.0.moe.experts.{expert}" for expert in range(2)]
NAMES = {
    "layers.0.self_attn.q_proj": [["model.layers.0.self_attn.q_proj"]],
    "layers.0.mlp.w13": [[f"{expert}.{name}" for expert in EXPERTS for name in ("gate_proj", "up_proj")]],
    "layers.0.mlp.w2": [[f"{expert}.down_proj" for expert in EXPERTS]],
    "layers.1.mlp.down_proj": [["model.layers.1.mlp.down_proj"]],
}
OTHERS = {"model.norm": "a norm", "lm_head.scale": "a scale"}


def reached(pattern: str) -> set[str]:
    found = Rules(None, {pattern: CODE}).decide(PATHS, names=NAMES, others=OTHERS)
    assert all(decision.pattern == (pattern if decision.recipe else None) for decision in found.values())
    return {path for path, decision in found.items() if decision.recipe == fp8x.recipe(CODE)}


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        (r"layers\.0\.self_attn\.q_proj", PATHS[:1]),
        (r"model\.layers\.0\.self_attn\.q_proj", PATHS[:1]),
        (r"model\.layers\.0\.self_attn\.q_proj\.weight", PATHS[:1]),
        (r"layers\.0\.self_attn\.q_proj\.kernel", PATHS[:1]),
        (r"re:model\.layers\.\d+\.self_attn\.q_proj$", PATHS[:1]),
        (r".*\.experts\..*", PATHS[1:3]),
        (r".*down_proj", PATHS[2:]),  # by the name of one and the path of the other
        (r".*(gate|up)_proj", PATHS[1:2]),
        (r".*\.w.*", PATHS[1:3]),  # a parameter's name, `.weight`, counts only where nothing else matches
    ],
)
def test_names(pattern, paths):
    assert reached(pattern) == set(paths)


@pytest.mark.parametrize("pattern", [r".*gate_proj", r"model\.layers\.0\.moe\.experts\.1\.up_proj\.weight"])
def test_a_part_of_a_layer_stands_for_all_of_it(pattern):
    with pytest.warns(UserWarning, match="which is one layer with other matrices: it reaches all of layers.0.mlp.w13"):
        assert reached(pattern) == {"layers.0.mlp.w13"}


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"layers\.1", r"matches layers.1 alone, which can't be quantized as a whole: it holds layers.1.mlp.down_proj"),
        (r"layers\.1", re.escape(repr(r"layers\.1\..*")) + " matches what it holds"),
        (r".*\.moe\.experts", r"matches model.layers.0.moe.experts alone, .*gate_proj.* and 3 more"),
        (r"model\.norm", "matches model.norm alone, where nothing can be quantized: a norm"),
        ("norm", "matches model.norm alone, where nothing can be quantized: a norm"),
        (r".*q_proj\.bias", "matches layers.0.self_attn.q_proj.bias alone, where nothing can be quantized: a bias"),
        ("q_prj", r"matches no module \(the whole path has to match\); near it: .*q_proj"),
        ("*.q_proj", r"is not a regular expression: nothing to repeat .*'\.\*' stands for any text"),
    ],
)
@pytest.mark.parametrize("value", [None, CODE])
def test_what_reaches_nothing(pattern, text, value):
    with pytest.raises(RuleError, match=re.escape(f"rules: {pattern!r} ") + ".*" + text):
        Rules(CODE, {pattern: value}).decide(PATHS, names=NAMES, others=OTHERS)
