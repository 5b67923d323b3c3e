"""Tilings that a kernel could take, measured: what the tables of fp8x/pallas/tuning are made of."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from fp8x.benchmark.grouped import Shape, candidates, gemm_seconds, measure
from fp8x.errors import BackendError
from fp8x.pallas import tuning
from fp8x.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Trial:
    """A tiling, what its kernel thought that it would take, and what it took.

    Attributes:
        seconds: of the kernel alone, where CUPTI tells, or else of the whole op; None if it failed.
        failure: why.
    """

    tiling: Any
    estimate: float
    seconds: float | None
    failure: str | None = None


def tune(shape: Shape, recipe: Recipe, most: int) -> Iterator[Trial]:
    """A trial of each of the `most` tilings that the kernel estimates to be the fastest, as it is done.

    Raises:
        BackendError: the call takes a kernel that has no tilings.
    """
    choice = candidates(shape, recipe)
    if choice is None:
        raise BackendError(f"{shape}, {recipe}: takes a kernel without tilings; ask for backend 'mosaic_gpu'")
    for tiling, estimate in sorted(choice.estimates.items(), key=lambda item: item[1])[:most]:
        with tuning.forced(tiling):
            try:
                found = measure(shape, recipe, quantized=recipe.activation is not None)
            except Exception as error:  # of the compiler: the others may do
                found = {"failure": f"{type(error).__name__}: {error}"}
        seconds = None if "failure" in found else gemm_seconds(found) or found["seconds"]
        yield Trial(tiling, estimate, seconds, found.get("failure"))


def ranked(trials: list[Trial]) -> list[Trial]:
    """The fastest first, failures last."""
    return sorted(trials, key=lambda trial: (trial.seconds is None, trial.seconds))


def entry(shape: Shape, recipe: Recipe, best: Trial) -> dict[str, Any]:
    """What `tuning.write` takes."""
    return {
        **dataclasses.asdict(candidates(shape, recipe).problem),
        "tiling": dataclasses.asdict(best.tiling),
        "seconds": best.seconds,
        "jax": jax.__version__,
    }
