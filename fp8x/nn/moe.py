"""`MoE`: router, gated experts (w13, w2), combine."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fp8x import meshes
from fp8x.array import as_input
from fp8x.errors import ShapeError
from fp8x.nn.convert import quantize_model
from fp8x.nn.grouped import GroupedLinear
from fp8x.nn.observer import Statistic
from fp8x.nn.routing import Scores, check_scores, choose_experts, sort_by_expert
from fp8x.nn.training import source_of
from fp8x.nn.unquantized import GatedMLP, UnquantizedGroupedLinear
from fp8x.ops.gate import Gate, check_gate
from fp8x.recipe import Recipe, as_recipe


class CorrectionBias(nnx.Variable):
    """Evens out the load of experts, float32. No `nnx.Param`: it has no gradient, and no decay should move it."""


class MoE(nnx.Module):
    """A mixture of gated experts: each token visits its `top_k` experts, and the router weighs what they return.

    Arguments:
        hidden: features of a token.
        intermediate: features between w13 and w2.
        num_experts, top_k: how many experts there are, and how many a token visits.
        recipe: a `Recipe` or its code quantizes the experts, the shared one too; None leaves them in `param_dtype`.
            The router never is.
        activation: of the gate, by its Hugging Face name; or a `fp8x.ops.ClampedSwiGLU` (gpt-oss).
        scores: of the experts, from the router's logits: "softmax", or a "sigmoid" each.
        normalize_top_k: whether the chosen experts' scores are scaled to sum to one.
        routed_scale: a factor on their weights after that.
        use_correction_bias: whether a bias is added to the scores to choose by, and to nothing else.
        groups, top_groups, group_best: a token's experts are of `top_groups` of so many groups of them, those with the
            highest sum of their `group_best` highest scores.
        use_bias: whether every expert's matrices add a bias.
        router_bias: whether the router adds one to its logits, which chooses and weighs (gpt-oss).
        shared_intermediate: gives a shared expert of that width, which every token visits with weight one.
        shared_gate: whether a sigmoid of the token weighs the shared expert instead (Qwen2-MoE).
        router_dtype: computation type of the router; None takes `dtype`.
        dtype: computation type; None takes the parameters'.
        param_dtype: type of what is not quantized.

    Attributes:
        router: `nnx.Linear`, hidden -> num_experts.
        correction_bias: `CorrectionBias` `[E]`, or None.
        w13: weights `[E, 2, intermediate, hidden]`: gate (w1), then up (w3).
        w2: weights `[E, hidden, intermediate]`.
        shared: a `GatedMLP`, or None.
        shared_expert_gate: `nnx.Linear`, hidden -> 1, without bias, or None; never quantized.
        expert_axes: mesh axes over which the experts are split, where the layer is one device's part of another: w13
            and w2 hold the experts of this device alone. Every device routes all tokens.
        sum_axes: those over which its outputs are summed: `expert_axes`, and those over which w2's K is split.

    Raises:
        ShapeError: `top_k` over `num_experts`, an unknown name, or sizes that the recipe's blocks do not fit (MX:
            multiples of 32).
    """

    expert_axes: tuple[str, ...] = ()
    sum_axes: tuple[str, ...] = ()

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        *,
        recipe: Recipe | str | None = None,
        activation: Gate = "silu",
        scores: Scores = "softmax",
        normalize_top_k: bool = True,
        routed_scale: float = 1.0,
        use_correction_bias: bool = False,
        groups: int = 1,
        top_groups: int = 1,
        group_best: int = 1,
        use_bias: bool = False,
        router_bias: bool = False,
        shared_intermediate: int | None = None,
        shared_gate: bool = False,
        router_dtype=None,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 1 <= top_k <= num_experts:
            raise ShapeError(f"top_k: {top_k} does not fit {num_experts} experts; use 1 to {num_experts}")
        if num_experts % groups or not 1 <= top_groups <= groups or top_k > num_experts // groups * top_groups:
            raise ShapeError(
                f"groups: {groups}, of which a token visits {top_groups}, do not fit {num_experts} experts, {top_k} a "
                "token; they must divide the experts, and the visited ones hold as many as a token visits"
            )
        if not 1 <= group_best <= num_experts // groups:
            raise ShapeError(f"group_best: {group_best} does not fit groups of {num_experts // groups} experts")
        if shared_gate and shared_intermediate is None:
            raise ShapeError("shared_gate: there is no shared expert; give its shared_intermediate")
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.top_k, self.num_experts, self.normalize_top_k = top_k, num_experts, normalize_top_k
        self.activation = check_gate(activation)
        self.scores, self.routed_scale = check_scores(scores), routed_scale
        self.groups, self.top_groups, self.group_best = groups, top_groups, group_best
        of_router = options | {"dtype": router_dtype or dtype}
        self.router = nnx.Linear(hidden, num_experts, use_bias=router_bias, **of_router)
        self.correction_bias = CorrectionBias(jnp.zeros(num_experts)) if use_correction_bias else None
        if recipe is None:
            make = functools.partial(UnquantizedGroupedLinear, num_experts, use_bias=use_bias, **options)
        else:
            recipe = as_recipe(recipe)
            recipe.weight.check_shape((num_experts, intermediate, hidden), "w13, [num_experts, intermediate, hidden]")
            recipe.weight.check_shape((num_experts, hidden, intermediate), "w2, [num_experts, hidden, intermediate]")
            make = functools.partial(GroupedLinear, num_experts, use_bias=use_bias, recipe=recipe, rngs=rngs)
        self.w13 = make(hidden, (2, intermediate))
        self.w2 = make(intermediate, hidden)
        self.shared = (
            None
            if shared_intermediate is None
            else GatedMLP(hidden, shared_intermediate, activation=activation, use_bias=use_bias, **options)
        )
        self.shared_expert_gate = nnx.Linear(hidden, 1, use_bias=False, **options) if shared_gate else None
        if recipe is not None and self.shared is not None:
            quantize_model(self.shared, recipe)

    def __call__(self, x: Float[Array, "... h"]) -> Float[Array, "... h"]:
        x = as_input(x)
        hidden = source_of(self.w2).weight.shape[1]
        if x.shape[-1:] != (hidden,):
            raise ShapeError(f"x: shape is {x.shape}, but the layer takes [..., {hidden}]")
        if meshes.explicit_mesh((nnx.state(self), x)) is not None:
            return self._by_xla(x)
        tokens = x.reshape(-1, hidden)
        weights, experts = self.route(tokens)
        y = self.combine(tokens, weights, experts)
        if self.shared is not None:
            shared = self.shared(tokens)
            y += shared if self.shared_expert_gate is None else shared * jax.nn.sigmoid(self.shared_expert_gate(tokens))
        return y.astype(x.dtype).reshape(x.shape)

    def _by_xla(self, x: Float[Array, "... h"]) -> Float[Array, "... h"]:
        """The layer on an Explicit mesh: tokens are sorted and gathered, whose layout no type can say."""
        graphdef, state = nnx.split(self)
        dims = (*meshes.explicit_dims(x)[:-1], ())

        def call(state, x):
            layer = nnx.merge(graphdef, state)
            y = layer(x)
            return [y, *jax.tree.leaves(nnx.state(layer, Statistic))]

        statistics = nnx.state(self, Statistic)
        leaves, tree = jax.tree.flatten(statistics)
        y, *found = meshes.by_xla(call, lambda: [dims, *(((),) * leaf.ndim for leaf in leaves)], state, x)
        nnx.update(self, jax.tree.unflatten(tree, found))
        return y

    def route(self, tokens: Float[Array, "t h"]) -> tuple[Float[Array, "t k"], Int[Array, "t k"]]:
        """Router weights (float32) and experts of each token."""
        return choose_experts(
            self.router(tokens),
            self.top_k,
            scores=self.scores,
            bias=None if self.correction_bias is None else self.correction_bias[...],
            normalize=self.normalize_top_k,
            scale=self.routed_scale,
            groups=self.groups,
            top_groups=self.top_groups,
            group_best=self.group_best,
        )

    def combine(
        self, tokens: Float[Array, "t h"], weights: Float[Array, "t k"], experts: Int[Array, "t k"]
    ) -> Float[Array, "t h"]:
        """Sends each token to its experts and sums what they return, in float32; over devices last."""
        y = (self._visit_unsorted if self._is_small(tokens) else self._visit)(tokens, experts)
        y = jnp.sum(y.reshape(*experts.shape, y.shape[-1]).astype(jnp.float32) * weights[..., None], axis=1)
        return jax.lax.psum(y, self.sum_axes) if self.sum_axes else y

    def _visit(self, tokens: Float[Array, "t h"], experts: Int[Array, "t k"]) -> Float[Array, "tk h"]:
        """What the experts return, a row for each token and expert."""
        here = source_of(self.w2).weight.shape[0]
        source, row, group_sizes = sort_by_expert(self._here(experts), here)
        rows = tokens.shape[0] * min(self.top_k, here)  # a token visits an expert once
        visitors = source[:rows] // self.top_k
        if isinstance(self.w13, GroupedLinear) and isinstance(self.w2, GroupedLinear):
            y = self.w13.with_gate(self.w2, tokens, group_sizes, visitors, self.activation)
        else:
            y = self.w2(self.w13(tokens, group_sizes, visitors), group_sizes, gate=self.activation)
        # Back to token order: the inverse permutation gathers, where a scatter-add would sum in no fixed order.
        return y[row] if rows == row.size else jnp.take(y, row, axis=0, mode="fill", fill_value=0)

    def _visit_unsorted(self, tokens: Float[Array, "1 h"], experts: Int[Array, "1 k"]) -> Float[Array, "k h"]:
        """`_visit` of one token: its experts are distinct, so there is nothing to sort or to share."""
        expert = self._here(experts)
        gate_up = self.w13.by_expert(tokens, expert, rows=jnp.zeros_like(expert))
        return self.w2.by_expert(gate_up, expert, gate=self.activation)

    def _is_small(self, tokens: Float[Array, "t h"]) -> bool:
        layers = (self.w13, self.w2)
        return tokens.shape[0] == 1 and all(isinstance(x, GroupedLinear) and not x.is_calibrating for x in layers)

    def _here(self, experts: Int[Array, "t k"]) -> Int[Array, " tk"]:
        """Each row's expert, counted from the first one on this device; their number for one that is elsewhere."""
        expert, here = experts.reshape(-1), source_of(self.w2).weight.shape[0]
        if not self.expert_axes:
            return expert
        expert = expert - here * jax.lax.axis_index(self.expert_axes)
        return jnp.where((expert >= 0) & (expert < here), expert, here)
