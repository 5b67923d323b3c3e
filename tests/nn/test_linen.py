"""Linen models in 8 bits: the numbers of `ops` bit for bit, Linen's own transformations, and nothing silent."""

import dataclasses
import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core, serialization, traverse_util
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from metric import as_bits, relative_error

import fp8x
from fp8x import linen, ops
from fp8x.errors import RecipeError, RuleError, ShapeError
from fp8x.linen import Quantized, QuantizedKernel
from fp8x.nn.quantized import weight_scheme

CODE = "mxfp8_mxfp8_bf16"
CODES = [CODE, "e4m3_bf16", "fp8_e4m3fn_bf16_block_scale", "e4m3_e4m3_bf16_dynamic", "e5m2_e5m2_f16"]
codes = pytest.mark.parametrize(
    "code", [pytest.param(code, marks=() if code in CODES[:2] else pytest.mark.slow) for code in CODES]
)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def initialized(model, *args):
    """Its variables, with biases that are not zero."""
    variables = model.init(jax.random.key(1), *args)
    return jax.tree.map(lambda leaf: leaf + normal(*leaf.shape) * 0.1, variables)


def product(x, matrix, code, bias=None):
    """By `ops`: `matrix` is `[K, N]`, or `[B, K, N]` for `x` of `[B, M, K]`."""
    recipe = fp8x.recipe(code)
    w = fp8x.quantize(matrix.mT, weight_scheme(recipe, matrix.ndim))
    scale = jnp.ones(recipe.activation.scale_shape((1, w.shape[-1])), jnp.float32) if recipe.is_static else None
    options = dict(activation=recipe.activation, activation_scale=scale, bias=bias, out_dtype=recipe.out_dtype)
    if matrix.ndim == 2:
        return ops.matmul(x, w, **options)
    sizes = jnp.full(x.shape[0], x.shape[1], jnp.int32)
    return ops.grouped_matmul(x.reshape(-1, x.shape[-1]), w, sizes, **options).reshape(*x.shape[:2], -1)


# A layer, the shape of its input, and by `ops` what it gives for x, kernel and bias.
LAYERS = {
    "Dense": (lambda: nn.Dense(24), (2, 3, 32), lambda x, k, b, code: product(x, k, code, b)),
    "into heads": (
        lambda: nn.DenseGeneral((4, 8)),
        (2, 3, 64),
        lambda x, k, b, code: product(x, k.reshape(64, 32), code, b.reshape(32)).reshape(2, 3, 4, 8),
    ),
    "out of heads": (
        lambda: nn.DenseGeneral(24, axis=(-2, -1)),
        (2, 3, 4, 8),
        lambda x, k, b, code: product(x.reshape(2, 3, 32), k.reshape(32, 24), code, b),
    ),
    "inner axis": (
        lambda: nn.DenseGeneral(24, axis=1, use_bias=False),
        (2, 32, 3),
        lambda x, k, b, code: product(x.swapaxes(1, 2), k, code),
    ),
    "batch": (
        lambda: nn.DenseGeneral(24, batch_dims=(0,)),
        (2, 3, 32),
        lambda x, k, b, code: product(x, k, code, b),
    ),
    "Einsum": (
        lambda: nn.Einsum((8, 32, 4), "btd,ndh->bthn"),
        (2, 3, 32),
        # The weight's rows lie as the kernel's dims do, n before h; the output and the bias have h before n.
        lambda x, k, b, code: (
            product(x, k.swapaxes(0, 1).reshape(32, 32), code, b.T.reshape(32)).reshape(2, 3, 8, 4).swapaxes(2, 3)
        ),
    ),
    "Einsum of experts": (
        lambda: nn.Einsum((2, 32, 24), "ecd,edf->ecf", use_bias=False),
        (2, 3, 32),
        lambda x, k, b, code: product(x, k, code),
    ),
}


@pytest.mark.sample
@codes
@pytest.mark.parametrize("name", LAYERS)
def test_layers_multiply_by_ops_eager_and_compiled(name, code):
    make, shape, expected = LAYERS[name]
    layer, x = make(), normal(*shape)
    variables = initialized(layer, x)
    quantized = linen.quantize(layer, variables, code, args=(x,))
    bias = variables["params"].get("bias")
    wanted = as_bits(expected(x, variables["params"]["kernel"], bias, code))
    apply = Quantized(layer).apply
    np.testing.assert_array_equal(as_bits(apply(quantized, x)), wanted)
    np.testing.assert_array_equal(as_bits(jax.jit(apply)(quantized, x)), wanted)
    if bias is not None:
        assert quantized["params"]["bias"] is variables["params"]["bias"]


@pytest.mark.slow
def test_a_table_is_looked_up_and_attended_where_a_rule_names_it():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(10, 32, name="embed")
            return embed.attend(nn.Dense(32, name="up")(embed(ids))), embed(ids)

    model, ids = Tied(), jnp.array([[3, 0, 9], [1, 1, 7]])
    variables = initialized(model, ids)
    kept = linen.quantize(model, variables, CODE, args=(ids,))
    assert kept["params"]["embed"]["embedding"] is variables["params"]["embed"]["embedding"]
    quantized = linen.quantize(model, variables, CODE, {"embed": CODE}, args=(ids,))
    params = variables["params"]
    table = fp8x.quantize(params["embed"]["embedding"], fp8x.recipe(CODE).weight)
    rows = table.dequantize(jnp.bfloat16)[ids]
    logits, embedded = Quantized(model).apply(quantized, ids)
    np.testing.assert_array_equal(as_bits(embedded), as_bits(rows))
    h = product(rows, params["up"]["kernel"], CODE, params["up"]["bias"])
    np.testing.assert_array_equal(as_bits(logits), as_bits(ops.matmul(h, table)))


class Block(nn.Module):
    """One of a transformer, as users write them."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attn")(h, mask=nn.make_causal_mask(x[..., 0]))
        h = nn.gelu(nn.Dense(128, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dropout(0.1, deterministic=not self.has_rng("dropout"))(nn.Dense(64, name="down")(h)), None


class Transformer(nn.Module):
    """`how` the layers are held: in a list, or a stack."""

    how: str = "list"

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(32, 64, name="embed")(ids)
        if self.how == "list":
            for i in range(2):
                x, _ = Block(name=f"layers_{i}")(x)
        else:
            stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = stack(name="layers")(x, None)
        return nn.Dense(32, name="lm_head")(x)


KERNELS = {"attn.query", "attn.key", "attn.value", "attn.out", "up", "down"}


def kernels(variables) -> dict[str, QuantizedKernel]:
    leaves = traverse_util.flatten_dict(variables["params"], sep=".")
    return {path.removesuffix(".kernel"): leaf for path, leaf in leaves.items() if isinstance(leaf, QuantizedKernel)}


@functools.cache
def transformer(how: str):
    """A model, ids, and its variables."""
    model, ids = Transformer(how), jnp.arange(24).reshape(2, 12)
    return model, ids, model.init(jax.random.key(0), ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code, limit",
    [(CODE, 0.12), ("e4m3_bf16", 0.06), ("fp8_e4m3fn_bf16_block_scale", 0.12), ("e4m3_e4m3_bf16_dynamic", 0.12)],
)
def test_a_transformer_stays_near_its_float32_self(code, limit):
    model, ids, variables = transformer("list")
    quantized = linen.quantize(model, variables, code, args=(ids,))
    assert set(kernels(quantized)) == {f"layers_{i}.{name}" for i in range(2) for name in KERNELS}
    logits = jax.jit(Quantized(model).apply)(quantized, ids)
    assert 0 < relative_error(logits, model.apply(variables, ids)) < limit


@pytest.mark.slow
def test_a_stack_is_its_layers_one_by_one():
    model, ids, variables = transformer("list")
    stacked, _, _ = transformer("scan")
    params = dict(variables["params"])
    layers = [params.pop(f"layers_{i}") for i in range(2)]
    stack = {"params": {**params, "layers": jax.tree.map(lambda *each: jnp.stack(each), *layers)}}
    one, both = (linen.quantize(m, v, "e4m3_bf16", args=(ids,)) for m, v in ((model, variables), (stacked, stack)))
    assert set(kernels(both)) == {f"layers.{name}" for name in KERNELS}
    for path, kernel in kernels(both).items():
        for i in range(2):
            alone = kernels(one)[path.replace("layers", f"layers_{i}")]
            assert alone.dims == kernel.dims
            jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(as_bits(a[i]), as_bits(b)), kernel, alone)
    expected, actual = (Quantized(m).apply(v, ids) for m, v in ((model, one), (stacked, both)))
    assert relative_error(actual, expected) < 0.01  # the layers of a scan are compiled, norms and softmax with them


@pytest.mark.slow
def test_vmapped_layers_are_each_their_own():
    layers = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(24)
    x = normal(3, 5, 32)
    variables = initialized(layers, x)
    quantized = linen.quantize(layers, variables, CODE, args=(x,))
    y = Quantized(layers).apply(quantized, x)
    for i in range(3):
        one = Quantized(nn.Dense(24)).apply(jax.tree.map(lambda leaf, i=i: leaf[i], quantized), x[i])
        np.testing.assert_array_equal(as_bits(y[i]), as_bits(one))


@pytest.mark.slow
def test_gradients_reach_inputs_and_all_parameters_but_the_kernels():
    model, ids, variables = transformer("scan")
    quantized = linen.quantize(model, variables, CODE, args=(ids,))["params"]
    leaves = traverse_util.flatten_dict(quantized)
    frozen = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, QuantizedKernel)}

    def loss(apply, trained, frozen=frozen):
        params = traverse_util.unflatten_dict({**trained, **frozen})
        return jnp.mean(apply({"params": params}, ids, rngs={"dropout": jax.random.key(3)}).astype(jnp.float32) ** 2)

    trained = {path: leaf for path, leaf in leaves.items() if path not in frozen}
    gradients = jax.jit(jax.grad(functools.partial(loss, Quantized(model).apply)))(trained)
    kept = {path: leaf for path, leaf in traverse_util.flatten_dict(variables["params"]).items() if path in frozen}
    exact = jax.grad(functools.partial(loss, model.apply, frozen=kept))(trained)
    for path, gradient in gradients.items():
        if path[-2:] != ("key", "bias"):  # attention does not depend on it
            assert relative_error(gradient, exact[path]) < 0.25, path
    dense, x = nn.Dense(24), normal(3, 32)
    weights = linen.quantize(dense, initialized(dense, x), CODE, args=(x,))
    dx = jax.grad(lambda x: Quantized(dense).apply(weights, x).astype(jnp.float32).sum())(x)
    w = weights["params"]["kernel"].weight.dequantize()
    np.testing.assert_allclose(dx, jnp.broadcast_to(w.sum(0), x.shape), rtol=1e-5, atol=1e-5)


def test_what_apply_takes_and_other_ways_to_run():
    model, ids, variables = transformer("list")
    quantized = linen.quantize(model, variables, CODE, args=(ids,))
    y, state = Quantized(model).apply(quantized, ids, mutable=["intermediates"], capture_intermediates=True)
    assert state["intermediates"]["layers_0"]["up"]["__call__"][0].dtype == jnp.bfloat16
    noisy = Quantized(model).apply(quantized, ids, rngs={"dropout": jax.random.key(0)})
    assert (noisy != y).any()
    with linen.intercept():
        np.testing.assert_array_equal(as_bits(model.bind(quantized)(ids)), as_bits(y))
    assert hash(Quantized(model)) == hash(Quantized(Transformer()))


@pytest.mark.slow
def test_attention_decodes_with_a_cache():
    attention, x = nn.MultiHeadDotProductAttention(4, decode=True), normal(2, 5, 32)
    params = {"params": attention.init(jax.random.key(0), x)["params"]}
    quantized = linen.quantize(attention, params, CODE, args=(x,))
    apply = functools.partial(Quantized(attention).apply, mutable=["cache"])
    _, state = apply(quantized, x)
    for step in range(5):
        y, state = apply({**quantized, **state}, x[:, step : step + 1])
    whole = Quantized(nn.MultiHeadDotProductAttention(4)).apply(quantized, x)
    assert relative_error(y[:, 0], whole[:, -1]) < 0.02


def test_variables_are_not_changed_and_may_be_frozen_dicts():
    model, ids, variables = transformer("list")
    before = jax.tree.leaves(variables)
    quantized = linen.quantize(model, core.freeze(variables), CODE, args=(ids,))
    assert all(one is other for one, other in zip(before, jax.tree.leaves(variables)))
    assert type(quantized) is dict and quantized["params"].keys() == variables["params"].keys()
    # Shapes are enough for the call, and methods that __call__ does not run can be named.
    shape = jax.ShapeDtypeStruct(ids.shape, ids.dtype)
    again = linen.quantize(model, variables, CODE, kwargs={"ids": shape}, method=lambda model, ids: model(ids))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(as_bits(a), as_bits(b)), quantized, again)
    # Inside of jit, too.
    compiled = jax.jit(lambda variables: linen.quantize(model, variables, CODE, args=(ids,)))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(as_bits(a), as_bits(b)), quantized, compiled)


def test_they_are_serialized():
    dense, x = nn.Dense(24), normal(3, 32)
    quantized = linen.quantize(dense, initialized(dense, x), CODE, args=(x,))
    empty = jax.tree.map(jnp.zeros_like, quantized)
    restored = serialization.from_bytes(empty, serialization.to_bytes(quantized))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(as_bits(a), as_bits(b)), quantized, restored)


def test_partitioned_kernels_stay_boxed():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(64, kernel_init=init, name="up")(x), None

    scan = functools.partial(nn.scan, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    model, x = scan(Layer, metadata_params={nn.PARTITION_NAME: "layers"})(), normal(4, 64)
    variables = model.init(jax.random.key(0), x, None)
    for code, scale_names in [(CODE, ("layers", "out", None)), ("fp8_e4m3fn_bf16_block_scale", ("layers", None, None))]:
        quantized = linen.quantize(model, variables, code, args=(x, None))
        weight = quantized["params"]["up"]["kernel"].weight
        assert weight.data.names == ("layers", "out", "in") and weight.scale.names == scale_names
        specs = nn.get_partition_spec(quantized)["params"]["up"]["kernel"].weight
        assert tuple(specs.data) == ("layers", "out", "in") and tuple(specs.scale) == scale_names
        plain = linen.quantize(model, nn.unbox(variables), code, args=(x, None))
        ys = [Quantized(model).apply(each, x, None)[0] for each in (quantized, nn.unbox(quantized), plain)]
        assert all((as_bits(y) == as_bits(ys[0])).all() for y in ys)

    @dataclasses.dataclass
    class Box(nn.meta.AxisMetadata):
        value: object

        def unbox(self):
            return self.value

        def replace_boxed(self, value):
            return Box(value)

        def add_axis(self, index, params):
            return self

        def remove_axis(self, index, params):
            return self

    jax.tree_util.register_dataclass(Box, ["value"], [])
    dense = nn.Dense(64)
    variables = dense.init(jax.random.key(0), x)
    variables["params"]["kernel"] = Box(variables["params"]["kernel"])
    with pytest.raises(RecipeError, match=r"model: its kernel is boxed in Box; use nn\.with_partitioning"):
        linen.quantize(dense, variables, CODE, args=(x,))


@pytest.mark.sample
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("code", [CODE, "fp8_e4m3fn_bf16_block_scale"])
def test_partition_specs_lay_kernels_on_a_mesh(code, kind):
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    dense = nn.Dense(256, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    x = normal(8, 64)
    quantized = linen.quantize(dense, dense.init(jax.random.key(0), x), code, args=(x,))
    specs = nn.get_partition_spec(quantized)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda each: isinstance(each, P))
    split = jax.tree.map(jax.device_put, nn.unbox(quantized), shardings)
    assert split["params"]["kernel"].weight.data.sharding.spec == P("model", None)
    with jax.set_mesh(mesh):
        y = jax.jit(Quantized(dense).apply)(split, jax.device_put(x, NamedSharding(mesh, P())))
    assert y.sharding.spec == P(None, "model")
    np.testing.assert_array_equal(as_bits(y), as_bits(Quantized(dense).apply(quantized, x)))


class Subclass(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Adapted(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x) + x @ self.param("adapter", nn.initializers.normal(), (32, self.features))


class Shared(nn.Module):
    """Two modules of one scope: the layer's parameters are at the path of the outer one."""

    def setup(self):
        self.inner = nn.Dense(24)
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x) + self.inner(2 * x)


def test_subclasses_shared_scopes_and_jitted_layers():
    x = normal(3, 32)
    for model, factor in [(Subclass(24), 2), (Shared(), None), (nn.jit(nn.Dense)(24), 1), (nn.remat(nn.Dense)(24), 1)]:
        variables = initialized(model, x)
        model.apply(variables, x)  # what nn.jit has traced once, it does not trace again
        k, b = (variables["params"][name] for name in ("kernel", "bias"))
        for _ in range(2):
            quantized = linen.quantize(model, variables, CODE, args=(x,))
        one, two = product(x, k, CODE, b), product(2 * x, k, CODE, b)
        np.testing.assert_array_equal(
            as_bits(Quantized(model).apply(quantized, x)), as_bits(one + two if factor is None else factor * one)
        )
    with pytest.warns(UserWarning, match=r"1 matrix of the model: model \(nn\.Dense holds it beside its kernel\)"):
        quantized = linen.quantize(Adapted(24), Adapted(24).init(jax.random.key(0), x), CODE, args=(x,))
    assert isinstance(quantized["params"]["kernel"], QuantizedKernel)


def doubled(variables):
    return jax.tree.map(lambda leaf: 2 * leaf, variables)


def transposed(variables):
    return jax.tree.map(lambda leaf: leaf.T, variables)


class Odd(nn.Module):
    """Layers of which only `plain` can be quantized."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="plain")(x)
        name, own = "odd", functools.partial(jax.lax.dot_general)
        match self.kind:
            case "dot_general":
                return nn.Dense(32, name=name, dot_general=own)(x)
            case "dot_general_cls":
                return nn.DenseGeneral(32, name=name, dot_general_cls=lambda: jax.lax.dot_general)(x)
            case "promote_dtype":
                return nn.Dense(32, name=name, promote_dtype=lambda *arrays, dtype, inexact=True: arrays)(x)
            case "WeightNorm":
                return nn.WeightNorm(nn.Dense(32, name=name))(x)
            case "Conv":
                return nn.Conv(32, (3,), name=name)(x)
            case "equation":
                return nn.Einsum((32, 32), "bd,dd->bd", use_bias=False, name=name)(x)
            case "equations":
                layer = nn.Einsum((32, 32), use_bias=False, name=name)
                return layer(x, "bd,de->be") + layer(x, "be,de->bd")
            case "doubled" | "transposed":
                fn, begin = {"doubled": doubled, "transposed": transposed}[self.kind], self.is_initializing()
                mapped = nn.map_variables(
                    nn.Dense, "params", trans_in_fn=fn, trans_out_fn=lambda tree: tree, mutable=begin, init=begin
                )
                return mapped(32, use_bias=False, name=name)(x)
            case "axis":
                stack = nn.scan(Residual, variable_axes={"params": 1}, split_rngs={"params": True}, length=32)
                return stack(name=name)(x.astype(jnp.float32), None)[0]
            case "carry":
                stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
                return stack(name=name)(x.astype(jnp.float32), None)[0]
            case "read":
                layer = nn.Dense(32, name=name)
                return layer(x) @ layer.variables["params"]["kernel"].T
            case "own":
                return x @ self.param(name, nn.initializers.normal(), (32, 32))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(32, use_bias=False, name="d")(x), None


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(32, name="d")(x), None


REASONS = {
    "dot_general": "odd (it has a dot_general of its own)",
    "dot_general_cls": "odd (it has a dot_general_cls of its own)",
    "promote_dtype": "odd (it has a promote_dtype of its own)",
    "WeightNorm": "odd (nn.WeightNorm rewrites it at every call)",
    "Conv": "odd (nn.Conv is no type that fp8x can quantize)",
    "equation": "odd (its equation 'bd,dd->bd' takes a diagonal)",
    "equations": "odd (its calls read the kernel in different ways)",
    "doubled": "odd (the model does not run if its kernel is no array and its output bfloat16; TypeError: multiply",
    "transposed": "odd (something changes its kernel on the way, as nn.map_variables does)",
    "axis": "odd.d (something changes its kernel on the way, as nn.map_variables does)",
    "carry": "odd.d (the model does not run if its kernel is no array and its output bfloat16; TypeError: scan body",
    "read": "odd (the model does not run if its kernel is no array and its output bfloat16; AttributeError",
    "own": "model (Odd is no type that fp8x can quantize)",
}


@pytest.mark.sample
@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_quantized_is_named_and_left(kind):
    model, x = Odd(kind), normal(4, 32)
    variables = model.init(jax.random.key(0), x)
    with pytest.warns(UserWarning) as caught:
        quantized = linen.quantize(model, variables, CODE, args=(x,))
    text = str(caught[0].message)
    assert f"fp8x can't quantize 1 matrix of the model: {REASONS[kind]}" in text and caught[0].filename == __file__
    assert set(kernels(quantized)) == {"plain"}
    assert np.isfinite(Quantized(model).apply(quantized, x)).all()
    with pytest.raises(RecipeError, match="model: fp8x can't quantize 1 matrix"):
        linen.quantize(model, variables, CODE, args=(x,), unsupported="error")
    rows = linen.report(model, variables, CODE, args=(x,)).rows
    assert any(REASONS[kind].split("(", 1)[1].rstrip(")") in row.reason for row in rows if row.path.startswith("odd"))
    with warnings.catch_warnings(action="error"):
        linen.quantize(model, variables, CODE, args=(x,), unsupported="ignore")
        if kind != "own":
            linen.quantize(model, variables, CODE, {"odd.*": None}, args=(x,))


def test_modules_that_the_call_does_not_run_are_named():
    class Two(nn.Module):
        def setup(self):
            self.a, self.b = nn.Dense(32), nn.Dense(32)

        def __call__(self, x):
            return self.a(x)

        def both(self, x):
            return self.b(self.a(x))

    model, x = Two(), normal(4, 32)
    variables = model.init(jax.random.key(0), x, method="both")
    with pytest.warns(UserWarning, match=r"b \(no module that this call runs holds it; see the argument method\)"):
        linen.quantize(model, variables, CODE, args=(x,))
    assert set(kernels(linen.quantize(model, variables, CODE, args=(x,), method="both"))) == {"a", "b"}


def test_rules_and_the_report():
    model, ids, variables = transformer("scan")
    rules = {r".*\.attn\..*": "e4m3_bf16", r".*\.down": None}
    quantized = linen.quantize(model, variables, CODE, rules, args=(ids,))
    report = linen.report(model, quantized, CODE, rules, args=(ids,))
    rows = {row.path: row for row in report.rows}
    leaves = traverse_util.flatten_dict(variables["params"], sep=".")
    assert set(rows) == {path for path, leaf in leaves.items() if leaf.ndim >= 2}
    assert rows["layers.attn.out.kernel"].code == "e4m3_bf16" and rows["layers.up.kernel"].code == CODE
    up = rows["layers.up.kernel"]
    assert (up.type, up.shape, up.nbytes) == ("nn.Dense", (2, 128, 64), 2 * 128 * (64 + 2))
    assert rows["layers.down.kernel"].reason == "the rule '.*\\\\.down' says so"
    assert rows["layers.up.bias"].reason == "a bias"
    assert rows["layers.LayerNorm_0.scale"].reason == "scale or bias of a norm"
    assert rows["lm_head.kernel"].reason == "a head; a rule quantizes it"
    assert rows["embed.embedding"].reason == "an embedding; a rule quantizes it"
    before = {row.path: row for row in linen.report(model, variables, CODE, rules, args=(ids,)).rows}
    assert before["layers.up.kernel"].reason == "fp8x.linen.quantize has not been called"
    bare = {row.path: row for row in linen.report(model, quantized, args=(ids,)).rows}
    assert bare["layers.down.kernel"].reason == "it is not quantized; the recipe and the rules would say why"
    only = linen.quantize(model, variables, None, {"lm_head": CODE}, args=(ids,))
    assert set(kernels(only)) == {"lm_head"}


class Mixture(nn.Module):
    @nn.compact
    def __call__(self, x):
        nn.Dense(8, name="choose")(x)
        up = nn.Einsum((8, 64, 128), "etd,edf->etf", use_bias=False, name="up")
        return x + up(jnp.broadcast_to(x, (8, *x.shape))).sum(0)[:, :64]


class Language(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = Mixture(name="mixture")(nn.Embed(1000, 64, name="tok")(ids))
        return nn.Dense(1000, name="final")(x)


def test_heads_and_routers_are_told_by_their_shapes():
    model, ids = Language(), jnp.arange(5)
    variables = model.init(jax.random.key(0), ids)
    quantized = linen.quantize(model, variables, CODE, args=(ids,))
    assert set(kernels(quantized)) == {"mixture.up"}
    reasons = {row.path: row.reason for row in linen.report(model, quantized, CODE, args=(ids,)).rows}
    head = "taken for a head: its 1000 outputs are the vocabulary of tok; a rule quantizes it"
    assert reasons["final.kernel"] == head
    assert reasons["mixture.choose.kernel"] == "a router: a row for each of 8 experts; a rule quantizes it"
    assert "final" in kernels(linen.quantize(model, variables, CODE, {"final": CODE}, args=(ids,)))


def test_errors():
    model, ids, variables = transformer("list")
    quantize = functools.partial(linen.quantize, model, args=(ids,))
    with pytest.raises(RuleError, match=r"rules: 'attn' matches no module .* near it: .*attn"):
        quantize(variables, CODE, {"attn": None})
    with pytest.raises(RuleError, match=r"matches layers_0\.attn alone, .* it holds layers_0\.attn\.query"):
        quantize(variables, CODE, {r"layers_0\.attn": None})
    with pytest.raises(RuleError, match=r"matches layers_0\.LayerNorm_0 alone, .* its parameters are vectors"):
        quantize(variables, CODE, {r"layers_0\.LayerNorm_0": None})
    assert set(kernels(quantize(variables, None, {r"layers_0\.up\.kernel": CODE}))) == {"layers_0.up"}
    with pytest.raises(RuleError, match="they skip every module"):
        quantize(variables, CODE, {".*": None})
    with pytest.raises(RecipeError, match="unsupported: 'no' is unknown"):
        quantize(variables, CODE, unsupported="no")
    with pytest.raises(RecipeError, match=r"layers_0\.attn\.query: its recipe has a static activation scale, which"):
        quantize(variables, "e4m3_e4m3_bf16")
    with pytest.raises(RecipeError, match=r"layers_0\.attn\.query\.kernel is quantized already"):
        quantize(quantize(variables, CODE, {r".*up|.*down": None}), CODE)
    broken = jax.tree.map(lambda leaf: leaf, variables)
    broken["params"]["layers_1"]["up"]["kernel"] = broken["params"]["layers_1"]["up"]["kernel"].at[0, 0].set(np.nan)
    with pytest.raises(ShapeError, match=r"layers_1\.up: holds 1 NaN or Inf"):
        quantize(broken, CODE)
    assert len(kernels(quantize(broken, CODE, allow_nonfinite=True))) == 12

    dense, x = nn.Dense(24), normal(3, 20)
    with pytest.raises(ShapeError, match="model: "):
        linen.quantize(dense, dense.init(jax.random.key(0), x), CODE, args=(x,))
    norm = nn.LayerNorm()
    with pytest.raises(RecipeError, match=r"model: LayerNorm calls no module that can be quantized \(nn\.Dense, "):
        linen.quantize(norm, norm.init(jax.random.key(0), x), CODE, args=(x,))

    variables = dense.init(jax.random.key(0), x)
    for given, args, match in (
        (variables, (), "args: Dense can't be called with 0 of these: missing a required argument: 'inputs'"),
        (variables, x, r"args: a \w+ came; give a tuple of what the model is called with, like \(x,\)"),
        (variables["params"], (x,), r"variables: no collection 'params' \(has kernel, bias\)"),
    ):
        with pytest.raises(RecipeError, match=match):
            linen.quantize(dense, given, CODE, args=args)

    x = normal(3, 24)
    square = linen.quantize(dense, dense.init(jax.random.key(0), x), "e4m3_bf16", args=(x,))
    with pytest.raises(RecipeError, match=r"run the model by fp8x\.linen\.Quantized\(model\)\.apply"):
        dense.apply(square, x)
    with pytest.raises(ShapeError, match=r"x: shape \(3, 20\) does not fit the kernel \(24, 24\) of model"):
        Quantized(dense).apply(square, normal(3, 20))
    with pytest.raises(RecipeError, match=r"model: its kernel is in 8 bits, but it has a dot_general of its own"):
        Quantized(nn.Dense(24, dot_general=functools.partial(jax.lax.dot_general))).apply(square, x)
    stack = jax.tree.map(lambda leaf: leaf[None], square)
    with pytest.raises(ShapeError, match="a stack of layers"):
        Quantized(nn.Dense(24)).apply(stack, x)


def test_a_float32_model_stays_float32_where_the_recipe_says_so():
    recipe = dataclasses.replace(fp8x.recipe(CODE), out_dtype=np.dtype("float32"))
    rnn, x = nn.RNN(nn.GRUCell(32)), normal(2, 5, 32)
    variables = rnn.init(jax.random.key(0), x)
    quantized = linen.quantize(rnn, variables, recipe, args=(x,))
    assert len(kernels(quantized)) == 6
    y = Quantized(rnn).apply(quantized, x)
    assert y.dtype == jnp.float32 and relative_error(y, rnn.apply(variables, x)) < 0.08
