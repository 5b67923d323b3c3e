"""From 8 bits to other 8 bits for the least added error: of several recipes, each module gets the best for its weights.

A checkpoint in MXFP8 is what this is for. Hopper's tensor cores know no e8m0 scales, but they multiply blocks and
channels with float32 scales. How much of the source survives depends on the rule of these scales:

- `"pow2"` shifts the exponents of codes and keeps their mantissas. What ends below 2^-6, the smallest normal e4m3, is
  rounded to a multiple of 2^-9; all else is exact.
- `"amax"` takes, block by block, that power of two or amax / 448, whichever has the smaller largest error
  (`fp8x.numerics.better_scale`). amax / 448 rounds every code anew, except where amax is 448 times a power of two and
  both scales agree. But it is down to half as large, and so are the steps below the smallest normal. It wins where that
  counts for more: in a block with little but some large values and a floor of tiny ones. Of many of these the largest
  error may be less by it, and the sum of squares more.

So both are tried, and measured. No other power of two needs to be. A larger one is never better, whatever the source:
of the numbers that it can hold, those within the smaller one's reach are among the smaller one's. A smaller one clips.
An MX block's largest value has four significant bits, so past 448 = 1.75 * 2^8 it is 480 or more, in units of that
scale, and clipping it costs at least 32^2; each of the block's other values gains at most 2^-18, the square of half a
step of the larger scale. A scale would have to serve 2^28 values for that to pay. (From float32 scales a value may lie
just past 448, and clipping may win a little; here nothing is ever clipped.)

The choice looks at weights alone. What the activations of a recipe lose depends on the data.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.checkpoint import rows
from fp8x.checkpoint.finite import nonfinite_error
from fp8x.checkpoint.format import Format
from fp8x.checkpoint.parts import StoredMatrix, quantized_matrix
from fp8x.checkpoint.plan import Target, matrix_shape
from fp8x.checkpoint.reader import Reader
from fp8x.checkpoint.threads import Threads
from fp8x.errors import CalibrationError, CheckpointError, RecipeError, RuleError, some
from fp8x.recipe import HOPPER, Recipe, as_recipe, check_stored, describe
from fp8x.scheme import SCALE_RULES, Scheme

PIECE = 2**16  # values whose float64s fit a processor's cache

WORDS: dict[str, tuple[Recipe, ...]] = {"hopper": HOPPER}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A recipe that a module might have, and what it costs.

    Attributes:
        recipe: with the rule of its scales.
        signal: sum of squares of the dequantized source, over all matrices of the module.
        noise: sum of squares of the difference from it.
    """

    recipe: Recipe
    signal: float
    noise: float

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio in dB; Inf where nothing is lost."""
        return rows.decibels(self.signal, self.noise)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one module becomes.

    Attributes:
        module: its path, as `fp8x.load` has it where it knows the model, else the matrix's name in the checkpoint.
        chosen: the recipe that it gets.
        others: what else was measured, in the order in which it was named.
    """

    module: str
    chosen: Candidate
    others: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True)
class Requantization:
    """The choice for every module that is in 8 bits in the source, in the order of the model; prints as a table."""

    choices: tuple[Choice, ...]

    @property
    def recipes(self) -> dict[str, Recipe]:
        """By module."""
        return {choice.module: choice.chosen.recipe for choice in self.choices}

    def by_prefix(
        self, modules: Mapping[str, Sequence[str]], stored: Mapping[str, Recipe | None]
    ) -> dict[str, Recipe | None]:
        """Of every prefix of these modules: None for what is stored in 16 or 32 bits."""
        recipes = self.recipes
        return {
            prefix: None if stored[prefix] is None else recipes[module]
            for module, prefixes in modules.items()
            for prefix in prefixes
        }

    def to_json(self) -> dict[str, Any]:
        """By module: the recipe, its SNR in dB (Inf for nothing lost), and that of the others."""
        return {
            choice.module: {
                "recipe": describe(choice.chosen.recipe),
                "snr_db": choice.chosen.snr,
                "others_snr_db": {describe(other.recipe): other.snr for other in choice.others},
            }
            for choice in self.choices
        }

    def __str__(self) -> str:
        width = max((len(choice.module) for choice in self.choices), default=0)
        return "\n".join(
            f"{choice.module:{width}}  {'; not '.join(map(_line, (choice.chosen, *choice.others)))}"
            for choice in self.choices
        )


Requantize = Recipe | str | Sequence[Recipe | str] | Requantization


def _line(candidate: Candidate) -> str:
    words = {math.inf: "exact", -math.inf: "lost"}
    error = words.get(candidate.snr, f"{candidate.snr:.1f} dB")
    return f"{describe(candidate.recipe)} ({error})"


def check_alone(recipe: object, rules: object) -> None:
    """Raises for what can't stand beside `requantize`."""
    if recipe is not None:
        raise RecipeError(
            "requantize: stands beside recipe; give requantize for the best of several recipes, or recipe for one"
        )
    if rules:
        raise RuleError("rules: are exceptions to a recipe, and requantize chooses recipes; leave one of them out")


def parse(requantize: Recipe | str | Sequence[Recipe | str]) -> tuple[Recipe, ...]:
    """The recipes that are named, each once.

    Raises:
        RecipeError: an unknown code, none at all, a recipe of training, or scales across experts.
    """
    named = [requantize] if isinstance(requantize, Recipe | str) else requantize
    if not isinstance(named, Iterable):
        raise RecipeError(f"requantize: {requantize!r} is no recipe; use a code, a Recipe, several, or 'hopper'")
    try:
        recipes = [recipe for each in named for recipe in _named(each)]
    except RecipeError as error:
        raise RecipeError(f"requantize: {error}; 'hopper' stands for Hopper's two") from None
    check_stored(recipes)
    if not recipes:
        raise RecipeError("requantize: names no recipe; use a code, a Recipe, several, or 'hopper'")
    for recipe in recipes:
        if len(recipe.weight.block) != 2:
            raise RecipeError(
                f"requantize: weights {recipe.weight} have no block over [N, K]; a matrix has scales of its own here"
            )
    return tuple(dict.fromkeys(recipes))


def _named(each: Recipe | str) -> list[Recipe]:
    if isinstance(each, str) and each in WORDS:
        return list(WORDS[each])
    # There is nothing to observe: static scales are the source's.
    return [dataclasses.replace(as_recipe(each), observer=None)]


def choose(
    reader: Reader,
    modules: Mapping[str, Sequence[str]],
    stored: Mapping[str, Recipe | None],
    requantize: Requantize,
    format: Format | None,
    *,
    together: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Requantization:
    """The recipe that adds the least squared error, for every module that is in 8 bits.

    All matrices of these modules are read, some rows at a time and one matrix a thread; sums are float64. The same
    files give the same choice in every process.

    A recipe with float32 scales by the default rule is tried with `"amax"` and with `"pow2"`, one with another rule as
    it is. Where the source has the same types and blocks already, its own rule is taken: nothing is lost. Layers go on
    returning what they return, whatever the output type of the recipes.

    Arguments:
        reader: the source.
        modules: the prefixes of every module that holds matrices, by path.
        stored: by prefix; None for what is in 16 or 32 bits, and stays so.
        requantize: recipes or their codes, `"hopper"` for `fp8x.recipe.HOPPER`; or what an earlier call has chosen,
            for the same modules, of which nothing is measured again.
        format: of the source.
        together: choose one recipe for all modules, the one with the least error over all of them.
        allow_nonfinite: leave NaN and Inf out of the sums instead of raising.
        progress: is called with the bytes read and the bytes in all, from several threads but one at a time.

    Raises:
        CheckpointError: nothing is in 8 bits there; NaN or Inf; an earlier choice that lacks modules.
        CalibrationError: static activation scales that the source does not hold.
        RecipeError: as `parse`.
        ShapeError: a matrix that a recipe does not fit.
    """
    in_8_bits: dict[str, list[str]] = {
        module: found
        for module, prefixes in modules.items()
        if (found := [prefix for prefix in prefixes if stored[prefix] is not None])
    }
    if not in_8_bits:
        raise CheckpointError(f"requantize: nothing in {reader.path} is in 8 bits; give a recipe instead")
    if isinstance(requantize, Requantization):
        if missing := [module for module in in_8_bits if module not in requantize.recipes]:
            raise CheckpointError(f"requantize: {some(missing)} in 8 bits in {reader.path}, and not among the choices")
        _check(reader, in_8_bits, stored, {module: [requantize.recipes[module]] for module in in_8_bits})
        return requantize
    recipes = {module: frozenset(stored[prefix] for prefix in prefixes) for module, prefixes in in_8_bits.items()}
    if together:
        recipes = dict.fromkeys(recipes, frozenset().union(*recipes.values()))
    named = parse(requantize)
    variants = {module: _variants(named, found) for module, found in recipes.items()}
    _check(reader, in_8_bits, stored, variants)
    sums = _Measurement(reader, format, stored, allow_nonfinite).run(in_8_bits, variants, progress)
    deciding = dict.fromkeys(sums, sum(sums.values())) if together else sums
    return Requantization(tuple(_choice(each, variants[each], sums[each], deciding[each]) for each in sums))


def _choice(module: str, recipes: Sequence[Recipe], sums: np.ndarray, deciding: np.ndarray) -> Choice:
    """By the sums that decide: the module's own, or those of all modules."""
    signal, *noises = sums.tolist()
    candidates = [Candidate(recipe, signal, noise) for recipe, noise in zip(recipes, noises, strict=True)]
    return Choice(module, candidates.pop(int(np.argmin(deciding[1:]))), tuple(candidates))


def _variants(recipes: Sequence[Recipe], stored: Collection[Recipe]) -> tuple[Recipe, ...]:
    """Recipes with each rule for their scales that may be the best, for matrices that are stored so."""
    # All layers of a checkpoint return its type, unless fp8x itself wrote otherwise.
    schemes, out_dtype = {each.weight for each in stored}, min((each.out_dtype for each in stored), key=str)
    variants = [
        dataclasses.replace(recipe, weight=weight, out_dtype=out_dtype)
        for recipe in recipes
        for weight in _rules(recipe.weight, schemes)
    ]
    return tuple(dict.fromkeys(variants))


def _rules(scheme: Scheme, stored: Collection[Scheme]) -> list[Scheme]:
    if scheme.scale_rule != SCALE_RULES[scheme.scale_dtype][0]:
        return [scheme]
    if len(stored) == 1 and (same := next(iter(stored))).stores_alike(scheme):
        return [same]
    # Where both make the same scales the name that says more, so that modules differ less.
    rules = (scheme.scale_rule,) if scheme.is_mx else ("pow2", "amax")
    return [dataclasses.replace(scheme, scale_rule=rule) for rule in rules]


def _check(
    reader: Reader,
    modules: Mapping[str, Sequence[str]],
    stored: Mapping[str, Recipe],
    variants: Mapping[str, Sequence[Recipe]],
) -> None:
    """Raises for recipes that the source's matrices can't have, before any is read."""
    for module, prefixes in modules.items():
        for recipe in variants[module]:
            for prefix in prefixes:
                recipe.weight.check_shape(matrix_shape(reader, f"{prefix}.weight"), f"{prefix}.weight")
            if lacking := [prefix for prefix in prefixes if Target(stored[prefix], recipe).needs_calibration]:
                raise CalibrationError(
                    f"requantize: {some(lacking)} in {reader.path} without the static activation scales of the recipe "
                    f"{describe(recipe)}; name recipes with dynamic activation scales"
                )


@dataclasses.dataclass(frozen=True)
class _Measurement:
    """What recipes would do to matrices of a checkpoint."""

    reader: Reader
    format: Format
    stored: Mapping[str, Recipe | None]
    allow_nonfinite: bool

    def run(
        self,
        modules: Mapping[str, Sequence[str]],
        variants: Mapping[str, Sequence[Recipe]],
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, np.ndarray]:
        """By module: the sum of squares of its values, and of the errors in each recipe; float64 `[1 + recipes]`."""
        prefixes = [(prefix, variants[module]) for module, found in modules.items() for prefix in found]
        total = sum(self.reader.stored(f"{prefix}.weight").nbytes for prefix, _ in prefixes)
        threads = Threads(progress, 0, total)
        with contextlib.closing(self.reader):
            measured = iter(threads.run(functools.partial(self._sums, *job, threads) for job in prefixes))
        # In one order, so that sums are the same everywhere.
        return {module: sum(next(measured) for _ in found) for module, found in modules.items()}

    def _sums(self, prefix: str, recipes: Sequence[Recipe], threads: Threads) -> np.ndarray:
        """Of one matrix."""
        schemes, stored = [recipe.weight for recipe in recipes], self.stored[prefix]
        source, _ = quantized_matrix(self.format, prefix, stored, self.reader, allow_nonfinite=self.allow_nonfinite)
        scales = {scheme: source.whole_scale(threads, scheme) for scheme in schemes if scheme.block[0] is None}
        sums, nonfinite, k = np.zeros(1 + len(schemes)), 0, source.shape[1]
        for part, values, truth in self._parts(source, schemes, threads):
            nonfinite += truth.size - np.count_nonzero(np.isfinite(truth))
            sums[0] += _distance(np.zeros_like(truth), truth)
            for index, scheme in enumerate(schemes, 1):
                if scheme != source.scheme:  # else its bytes stay
                    found = np.asarray(_requantized(values, scales.get(scheme), scheme))
                    sums[index] += _distance(found, truth)
            threads.advance((min(part.stop, source.shape[0]) - part.start) * k)
        if nonfinite and not self.allow_nonfinite:
            file = self.reader.stored(source.name).file
            raise nonfinite_error(source.name, file, nonfinite, math.prod(source.shape))
        return sums

    def _parts(
        self, source: StoredMatrix, schemes: Sequence[Scheme], threads: Threads
    ) -> Iterator[tuple[slice, ScaledArray, Float[np.ndarray, "n k"]]]:
        """The source and what it stands for, some rows at a time, in whole blocks of all these schemes. Zeros beyond
        the end, which add nothing."""
        for part, values in source.parts(threads, *schemes):
            yield part, values, np.asarray(_dequantized(values))


_dequantized = jax.jit(numerics.dequantize)


# The difference is numpy's: XLA may fuse it with the product before, and would round once less.
@functools.partial(jax.jit, static_argnames="scheme")
def _requantized(q: ScaledArray, scale: Array | None, scheme: Scheme) -> Float[Array, "n k"]:
    """`q` in another scheme, dequantized, with scales of the whole matrix where its blocks hold every row."""
    if scale is None:
        return numerics.requantize(q, scheme).dequantize()
    return numerics.quantize_with_scale(q.dequantize(), scale, scheme).dequantize()


def _distance(x: Float[np.ndarray, "n k"], truth: Float[np.ndarray, "n k"]) -> float:
    """The sum of squares of the difference, in float64, where `truth` is finite."""
    total, x, truth = 0.0, x.reshape(-1), truth.reshape(-1)
    for part in (slice(start, start + PIECE) for start in range(0, truth.size, PIECE)):
        is_finite = np.isfinite(truth[part])
        difference = np.subtract(x[part][is_finite], truth[part][is_finite], dtype=np.float64)
        total += float(np.square(difference, out=difference).sum())
    return total
