"""`Embed`: `nnx.Embed` in 8 bits."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fp8x import numerics, ops
from fp8x.array import ScaledArray
from fp8x.errors import ShapeError
from fp8x.nn.quantized import QuantizedLayer, initial_weight, names_layer, place
from fp8x.recipe import Recipe, as_recipe


class Embed(QuantizedLayer):
    """Rows of a table `[V, D]` in 8 bits, dequantized after they are looked up.

    Arguments:
        num_embeddings: V, the size of the vocabulary.
        features: D.
        recipe: a `Recipe` or its code, of which the weights' scheme and the output type count: a row that is looked up
            meets no matrix, and `attend` multiplies activations in 16 bits.
        rngs: the stream `params` initializes the table.

    Raises:
        ShapeError: sizes that the recipe's blocks do not fit (MX: `features` a multiple of 32).
    """

    def __init__(self, num_embeddings: int, features: int, *, recipe: Recipe | str, rngs: nnx.Rngs):
        recipe = weight_only(as_recipe(recipe))
        self.hold(initial_weight(rngs, (num_embeddings, features), recipe.weight), recipe, None)

    @classmethod
    def from_embed(
        cls, source: nnx.Embed, recipe: Recipe | str, *, name: str = "embedding", allow_nonfinite: bool = False
    ) -> Self:
        """Quantizes an `nnx.Embed`, or a stack of them. `name` stands in errors.

        Raises:
            ShapeError: sizes that the recipe's blocks do not fit, or NaN or Inf in the table.
        """
        recipe, shape = weight_only(as_recipe(recipe)), (source.num_embeddings, source.features)
        check_embed(source, recipe, name)
        table = numerics.quantize_weight(
            source.embedding[...], recipe.weight, name=name, allow_nonfinite=allow_nonfinite
        )
        layer = nnx.eval_shape(lambda: cls(*shape, recipe=recipe, rngs=nnx.Rngs(0)))
        layer.hold(table, recipe, None)
        layer.keep_sharding(source.embedding, None)
        return layer

    @names_layer
    def __call__(self, ids: Int[Array, "..."], out_sharding=None) -> Float[Array, "... d"]:
        """The rows of `ids`, of the recipe's output type; NaN for one that is not in the table, as Flax has it.

        Raises:
            ShapeError: ids that are no integers, or the layer is a stack.
        """
        ids = self.begin_call(ids, "ids")
        return look_up(self.quantized_weight, ids, self.recipe.out_dtype, out_sharding)

    @names_layer
    def attend(self, query: Float[Array, "... d"], out_sharding=None) -> Float[Array, "... v"]:
        """`query @ table.T`: the logits of a head that is tied to the table."""
        query = self.begin_call(query, "query")
        y = ops.matmul(query, self.quantized_weight, out_dtype=self.recipe.out_dtype)
        return place(y, out_sharding)


def look_up(table: ScaledArray, ids: Int[Array, "..."], out_dtype, out_sharding=None) -> Float[Array, "... d"]:
    """Rows of a table `[V, D]`, dequantized; NaN for an id that is not in it.

    Raises:
        ShapeError: ids that are no integers.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ShapeError(f"ids: dtype is {ids.dtype}; use integers")
    rows, scheme = table.shape[0], table.scheme
    if rows == 1:
        ids = jnp.zeros_like(ids)
    ids = jnp.where(ids < 0, ids + rows, ids)
    of_row = dataclasses.replace(scheme, block=scheme.block[-1:])

    def rows_of(data, scale, ids):
        data = jnp.take(data, ids, axis=0)
        scale = jnp.take(scale, ids // scheme.block_of(table.shape)[0], axis=0, mode="clip")
        return ScaledArray(data, scale, of_row).dequantize(out_dtype)

    take = rows_of if out_sharding is None else jax.sharding.auto_axes(rows_of, out_sharding=out_sharding)
    return take(table.data, table.scale, ids)


def weight_only(recipe: Recipe) -> Recipe:
    """The recipe without its activations."""
    return Recipe(recipe.weight, out_dtype=recipe.out_dtype, master_weights=recipe.master_weights)


def check_embed(source: nnx.Embed, recipe: Recipe, name: str) -> None:
    """Raises what `Embed.from_embed` does, but for NaN and Inf."""
    shape = (source.num_embeddings, source.features)
    if source.embedding.shape[-2:] != shape:
        raise ShapeError(
            f"{name}: shape is {source.embedding.shape}; use {shape}, or a stack of these along leading axes"
        )
    recipe.weight.check_shape(shape, name)
