"""`Recipe`: what one layer does. The short codes of the common ones, and the rules that say which layer gets which."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from fp8x import matching, roles
from fp8x.errors import RecipeError, RuleError
from fp8x.matching import Names
from fp8x.scheme import Scheme, as_dtype, mx, per_row, per_tensor

OUT_DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one layer does.

    Arguments:
        weight: the weights' scheme, over `[N, K]` (the same blocks per expert for `[E, N, K]`).
        activation: the activations' scheme, over `[M, K]`; None keeps them in 16 bits (weight-only, W8A16).
        activation_scale: `"dynamic"`: from each input; `"static"`: calibrated once. A static scale can't depend on the
            rows, so its scheme's block is None over them. Given exactly when `activation` is.
        out_dtype: what the layer returns: bfloat16, float16 or float32. Products accumulate in float32.
        observer: `"max"` builds the layer in calibration: it gathers the running amax of its input and fake-quantizes
            with the scale that follows from it, until `fp8x.calibrate` ends it. Static activation scales only.
        master_weights: the module keeps its weights as they are, for an optimizer, and quantizes them at every call
            (`fp8x.nn.QuantizationAware`), until `fp8x.nn.finish_training` ends it. No static activation scales.

    Raises:
        RecipeError: fields that contradict each other.
    """

    weight: Scheme
    activation: Scheme | None = None
    activation_scale: Literal["static", "dynamic"] | None = None
    out_dtype: np.dtype = OUT_DTYPES["bf16"]
    observer: Literal["max"] | None = None
    master_weights: bool = False

    def __post_init__(self):
        if not isinstance(self.weight, Scheme):
            raise RecipeError(f"weight: {self.weight!r} is not a Scheme; use one like Scheme('e4m3', block=(128, 128))")
        if not (self.activation is None or isinstance(self.activation, Scheme)):
            raise RecipeError(f"activation: {self.activation!r} is not a Scheme; use a Scheme, or None for weight-only")
        fits = (None,) if self.activation is None else ("static", "dynamic")
        if self.activation_scale not in fits:
            raise RecipeError(
                f"activation_scale: {self.activation_scale!r} does not fit activation {self.activation}; "
                f"use one of {fits}"
            )
        if self.activation is not None and len(self.activation.block) != 2:
            raise RecipeError(f"activation: block {self.activation.block} has to name two dims, over [M, K]")
        if self.activation_scale == "static" and (self.activation.is_mx or self.activation.block[0] is not None):
            raise RecipeError(
                f"activation: {self.activation} has a scale for every row, which can't be known before the rows are; "
                "a static activation scale needs block (None, None) or (None, group) and float32 scales"
            )
        out_dtype = as_dtype(self.out_dtype, "out_dtype")
        if out_dtype not in OUT_DTYPES.values():
            raise RecipeError(
                f"out_dtype: {out_dtype} does not fit; use one of {', '.join(map(str, OUT_DTYPES.values()))}"
            )
        if self.observer not in (None, "max"):
            raise RecipeError(f"observer: {self.observer!r} is unknown; use 'max' or None")
        if self.observer and self.activation_scale != "static":
            raise RecipeError(
                f"observer: {self.observer!r} needs a static activation scale; this recipe's is {self.activation_scale}"
            )
        if self.master_weights and self.activation_scale == "static":
            raise RecipeError(
                "master_weights: a static activation scale would fall behind the weights; train with a dynamic one or "
                "weight-only, then fp8x.nn.finish_training(model, recipe) by a recipe with a static one, and calibrate"
            )
        object.__setattr__(self, "out_dtype", out_dtype)

    @property
    def is_static(self) -> bool:
        """Whether the layer holds a calibrated activation scale."""
        return self.activation_scale == "static"

    @property
    def needs_calibration(self) -> bool:
        """Whether that scale comes from data; a unit scale does not."""
        return self.is_static and self.activation.scale_rule != "unit"


def _codes(out: str) -> dict[str, Recipe]:
    dtype = OUT_DTYPES[out]
    unit = Scheme("e5m2", block=(None, None), scale_rule="unit")
    block, group = Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(1, 128))
    static = {
        f"e4m3_e4m3_{out}": Recipe(per_tensor(), per_tensor(), "static", dtype),
        f"e5m2_e5m2_{out}": Recipe(unit, unit, "static", dtype),
        f"fp8_e4m3fn_{out}_block_scale_static_activation": Recipe(
            block, Scheme("e4m3", block=(None, 128)), "static", dtype
        ),
    }
    return (
        static
        | {f"{code}_max_calibrate": dataclasses.replace(recipe, observer="max") for code, recipe in static.items()}
        | {
            f"e4m3_e4m3_{out}_dynamic": Recipe(per_row(), per_row(), "dynamic", dtype),
            f"e4m3_{out}": Recipe(per_row(), out_dtype=dtype),
            f"fp8_e4m3fn_{out}_block_scale": Recipe(block, group, "dynamic", dtype),
            f"mxfp8_{out}": Recipe(mx(), out_dtype=dtype),
            f"mxfp8_mxfp8_{out}": Recipe(mx(), mx(), "dynamic", dtype),
        }
    )


RECIPES: dict[str, Recipe] = _codes("bf16") | _codes("f16") | _codes("f32")

# What Hopper's tensor cores multiply in 8 bits without calibration: float32 scales, for blocks of 128×128 or channels.
HOPPER: tuple[Recipe, ...] = (RECIPES["fp8_e4m3fn_bf16_block_scale"], RECIPES["e4m3_e4m3_bf16_dynamic"])


def recipe(code: str) -> Recipe:
    """The recipe with a short code, like `"fp8_e4m3fn_bf16_block_scale"`; `RECIPES` holds them all.

    Raises:
        RecipeError: an unknown code; the message lists the nearest.
    """
    if isinstance(code, str) and code in RECIPES:
        return RECIPES[code]
    if str(code).lower() == "none":
        raise RecipeError(f"recipe: {code!r} is unknown; None, without quotes, leaves a module as it is")
    near = difflib.get_close_matches(str(code), RECIPES, n=3, cutoff=0.3)
    raise RecipeError(
        f"recipe: {code!r} is unknown; {f'near it: {", ".join(near)}' if near else 'none is near it'} (fp8x.RECIPES "
        f"lists all {len(RECIPES)}; where a checkpoint is loaded or converted {', '.join(OUT_DTYPES)} dequantize it)"
    )


def as_recipe(value: "Recipe | str") -> Recipe:
    """A `Recipe` as it is, or the one with that code."""
    return value if isinstance(value, Recipe) else recipe(value)


def describe(recipe: Recipe) -> str:
    """The recipe's code, with the rule of its weights' scales where that is another; or what it is made of."""
    plain = dataclasses.replace(recipe, weight=dataclasses.replace(recipe.weight, scale_rule=None))
    for code, other in RECIPES.items():
        if other == recipe:
            return code
        if other == plain:
            return f"{code}, {recipe.weight.scale_rule} weights"
    activation = "16 bits" if recipe.activation is None else str(recipe.activation)
    return f"{recipe.weight} by {activation} -> {recipe.out_dtype}"


def check_stored(recipes: "Iterable[Recipe | None]") -> None:
    """Raises a RecipeError for recipes of training, where weights are to be stored in 8 bits."""
    if any(recipe is not None and recipe.master_weights for recipe in recipes):
        raise RecipeError(
            "recipe: master_weights keeps the weights of a module for an optimizer, and here they are stored in 8 "
            "bits; build or load the model without a recipe, then call fp8x.quantize_model with this one"
        )


@dataclasses.dataclass(frozen=True)
class Decision:
    """What rules say of a path.

    Attributes:
        recipe: None where it stays as it is.
        pattern: the rule that said it; None where none did.
        kept: what it is (`"a head"`), where that keeps it as no rule names it.
    """

    recipe: Recipe | None
    pattern: str | None
    kept: str | None = None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which module gets which recipe: an ordered mapping of path regex to a recipe (or its code), or None to skip.

    The first pattern wins that matches the whole path of a module (`layers.0.self_attn.q_proj`), or its name in a
    checkpoint (`model.layers.0.self_attn.q_proj`; `fp8x.matching`). Where none does, embeddings, heads and routers stay
    as they are (`fp8x.roles`), and everything else gets `default`.
    """

    default: Recipe | str | None
    rules: Mapping[str, Recipe | str | None] = dataclasses.field(default_factory=dict)

    def resolve(self, paths: Iterable[str]) -> dict[str, Recipe | None]:
        """The recipe of every path, None where it stays as it is; heads and routers are told by names alone.

        Raises:
            RuleError: as `decide`.
        """
        return {path: decision.recipe for path, decision in self.decide(paths).items()}

    def decide(
        self,
        paths: Iterable[str],
        *,
        kept: Mapping[str, str] | None = None,
        names: Names | None = None,
        others: Mapping[str, str] | None = None,
    ) -> "dict[str, Decision]":
        """What holds for every path.

        Arguments:
            paths: of the modules.
            kept: what some of them are, which keeps them where no rule names them; None tells it by their names.
            names: how a checkpoint names the matrices of a path.
            others: names of what can't be quantized, with the reason, for errors.

        Raises:
            RuleError: a pattern that is no regular expression, or that reaches none of the paths: a typo must not
                silently leave a layer in bf16.
        """
        paths = list(paths)
        _check_rules(self.rules)
        if kept is None:
            kept = {path: reason for path in paths if (reason := roles.by_name(path)) is not None}
        default = None if self.default is None else as_recipe(self.default)
        chosen: dict[str, Decision] = {}
        for pattern, value in self.rules.items():
            reached = matching.reached(pattern, paths, names or {}, others or {})
            recipe = None if value is None else as_recipe(value)
            chosen = dict.fromkeys(reached, Decision(recipe, pattern)) | chosen
        return {
            path: chosen.get(path) or (Decision(None, None, kept[path]) if path in kept else Decision(default, None))
            for path in paths
        }


def _check_rules(rules: Any) -> None:
    """Raises a RuleError for what maps no paths."""
    fits = "give a mapping from regular expressions over paths to recipes, like {r'.*\\.q_proj': None}"
    if not isinstance(rules, Mapping):
        raise RuleError(f"rules: a {type(rules).__name__} came; {fits}")
    if wrong := [pattern for pattern in rules if not isinstance(pattern, str)]:
        raise RuleError(f"rules: {wrong[0]!r} is no pattern; {fits}")
