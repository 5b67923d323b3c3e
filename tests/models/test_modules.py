"""Any module on disk and back: `fp8x.save` and `fp8x.load_into`, as docs/checkpoints.md shows them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import CODES, mesh_of
from metric import as_bits

import fp8x
from fp8x.checkpoint import DESCRIPTION, Reader, Writer
from fp8x.errors import CalibrationError, CheckpointError, MeshError
from fp8x.nn import registry
from fp8x.nn.walk import named_layers

IDS = np.arange(12).reshape(3, 4)
BLOCK = "fp8_e4m3fn_bf16_block_scale"
STATIC = "e4m3_e4m3_bf16"
MX = "mxfp8_mxfp8_bf16"


class Readout(nnx.Module):
    def __init__(self, embedding: nnx.Param):
        self.embedding = embedding

    def __call__(self, x):
        return x @ self.embedding[...].T


class Net(nnx.Module):
    """Linears, a batch norm, experts, random streams, and an embedding that is also the readout."""

    def __init__(self, inner: int = 96, names: tuple = (), *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        options = {"kernel_init": nnx.with_partitioning(init, names)} if names else {}
        self.embed = nnx.Embed(16, 64, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(64, inner, rngs=rngs, **options), nnx.Linear(inner, 64, rngs=rngs)])
        self.norm, self.dropout = nnx.BatchNorm(64, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        self.moe = fp8x.nn.MoE(64, 32, 4, 2, use_correction_bias=True, rngs=rngs)
        self.readout = Readout(self.embed.embedding)
        self.steps = nnx.Variable(jnp.zeros((), jnp.uint32))

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x).astype(x.dtype)
        return self.readout(self.moe(self.norm(x, use_running_average=True)))


def real(**options) -> Net:
    return Net(rngs=nnx.Rngs(1), **options)


def abstract(**options) -> Net:
    return nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0), **options))


def quantized(code: str, rules: dict | None = None, **options) -> Net:
    """With static scales as a calibration would set them, and state that a model at its start would not have."""
    model = fp8x.quantize_model(real(**options), code, rules)
    for number, layer in enumerate(named_layers(model).values()):
        if layer.recipe.is_static:
            layer.input_scale[...] = jnp.full(layer.input_scale.shape, 0.01 + 0.001 * number, jnp.float32)
    model.norm.mean[...] += 0.5
    model.steps[...] += 7
    model.dropout.rngs()
    return model


def bits(model: nnx.Module) -> dict:
    """Kind, type and bits of every array."""
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        array = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
        data = jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
        found[path] = (type(leaf), array.dtype, array.shape, np.asarray(data).tobytes())
    return found


@pytest.mark.sample
@pytest.mark.parametrize("code", CODES)
def test_a_model_comes_back_bit_for_bit(code, tmp_path):
    model = quantized(code)
    fp8x.save(model, tmp_path / "model")
    loaded = abstract()
    assert fp8x.load_into(loaded, tmp_path / "model") is loaded
    assert bits(loaded) == bits(model)
    assert {name: layer.recipe for name, layer in named_layers(loaded).items()} == {
        name: layer.recipe for name, layer in named_layers(model).items()
    }
    assert nnx.split(loaded)[0] == nnx.split(model)[0]
    assert loaded.readout.embedding is loaded.embed.embedding
    assert set(Reader(tmp_path / "model", config=DESCRIPTION)) >= {"norm.var", "dropout.rngs.key", "moe.w2.weight"}


class EveryLayer(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, 32, rngs=rngs)
        self.mix = nnx.Einsum("btnh,nhd->ntd", (4, 32, 8), rngs=rngs)
        self.each = nnx.Einsum("ecd,edf->ecf", (3, 32, 8), (3, 8), rngs=rngs)
        self.table = nnx.Embed(40, 32, rngs=rngs)
        self.lora = nnx.LoRALinear(32, 8, lora_rank=2, rngs=rngs)
        self.adapter = nnx.LoRA(32, 2, 8, base_module=nnx.Linear(32, 8, rngs=rngs), rngs=rngs)
        self.stack = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: fp8x.nn.MoE(32, 32, 2, 1, rngs=rngs)))(rngs)


@pytest.mark.sample
@pytest.mark.parametrize("code", [MX, "fp8_e4m3fn_bf16_block_scale"])
def test_every_type_of_layer_comes_back(code, tmp_path):
    model = fp8x.quantize_model(EveryLayer(nnx.Rngs(0)), code, {"table": code}, unsupported="ignore")
    fp8x.save(model, tmp_path / "model")
    loaded = fp8x.load_into(nnx.eval_shape(lambda: EveryLayer(nnx.Rngs(1))), tmp_path / "model")
    assert bits(loaded) == bits(model)
    assert nnx.split(loaded)[0] == nnx.split(model)[0]
    assert len(named_layers(loaded)) == 10


@pytest.mark.slow
def test_into_a_real_model_and_into_one_quantized_the_same_way(tmp_path):
    model = quantized(MX, {r"blocks\.0": BLOCK, ".*w2": None})
    fp8x.save(model, tmp_path / "model", max_shard_bytes=10_000)
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    untouched = Net(rngs=nnx.Rngs(2))
    norm, first = untouched.norm, untouched.embed.embedding
    fp8x.load_into(untouched, tmp_path / "model")
    again = fp8x.quantize_model(Net(rngs=nnx.Rngs(3)), MX, {r"blocks\.0": BLOCK, ".*w2": None})
    fp8x.load_into(again, tmp_path / "model")
    assert bits(untouched) == bits(again) == bits(model)
    assert untouched.norm is norm and untouched.embed.embedding is first
    np.testing.assert_array_equal(untouched(IDS), model(IDS))


def test_a_calibrated_model(tmp_path):
    model = fp8x.quantize_model(real(), f"{STATIC}_max_calibrate")
    with pytest.raises(CalibrationError, match=r"blocks\.0, blocks\.1, .* in calibration; end it with fp8x\.calibrate"):
        fp8x.save(model, tmp_path / "model")
    fp8x.calibrate(model, [IDS])
    fp8x.save(model, tmp_path / "model")
    loaded = fp8x.load_into(abstract(), tmp_path / "model")
    assert bits(loaded) == bits(model)
    uncalibrated = fp8x.quantize_model(real(), STATIC)
    with pytest.raises(CalibrationError, match=r"blocks\.0, .* not calibrated; run fp8x\.calibrate"):
        fp8x.save(uncalibrated, tmp_path / "other")


def test_unquantized_models_and_single_layers(tmp_path):
    fp8x.save(real(), tmp_path / "plain")
    assert bits(fp8x.load_into(abstract(), tmp_path / "plain")) == bits(real())
    layer = fp8x.quantize_model(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), MX)
    fp8x.save(layer, tmp_path / "layer")
    loaded = fp8x.load_into(nnx.eval_shape(lambda: nnx.Linear(32, 8, rngs=nnx.Rngs(1))), tmp_path / "layer")
    assert isinstance(loaded, fp8x.nn.Linear) and bits(loaded) == bits(layer)
    block = fp8x.quantize_model(fp8x.nn.MoE(32, 32, 2, 1, rngs=nnx.Rngs(0)), MX)
    fp8x.save(block, tmp_path / "moe")
    loaded = fp8x.load_into(nnx.eval_shape(lambda: fp8x.nn.MoE(32, 32, 2, 1, rngs=nnx.Rngs(1))), tmp_path / "moe")
    assert bits(loaded) == bits(block)


def test_arrays_of_every_kind(tmp_path):
    """Trees in a variable, arrays in none, numbers, types of 64 bits, keys of another kind."""

    def build(seed):
        return nnx.Dict(
            linear=nnx.Linear(32, 8, rngs=nnx.Rngs(seed)),
            tree=nnx.Variable({"x": (jnp.full(2, seed), None)}),
            none=nnx.Variable(None),
            number=nnx.Variable(seed),
            keys=nnx.Variable(jax.random.split(jax.random.key(seed, impl="rbg"), 3)),
            bare=jnp.full(2, seed),
            wide=np.full(2, seed + 0.1),
            held=nnx.data([jnp.full(2, seed), "text"]),
            flags=nnx.Variable(jnp.array([True, False])),
        )

    model = fp8x.quantize_model(build(5), None, {"linear": MX})
    fp8x.save(model, tmp_path / "model")
    loaded = fp8x.load_into(build(0), tmp_path / "model")
    assert loaded.tree.get_value()["x"][0].tolist() == [5, 5] and loaded.number[...] == 5
    assert loaded.held[0].tolist() == loaded.bare.tolist() == [5, 5] and loaded.held[1] == "text"
    assert loaded.wide.dtype == np.float64 and loaded.wide.tolist() == [5.1, 5.1]
    assert loaded.keys[...].dtype == model.keys[...].dtype
    np.testing.assert_array_equal(jax.random.key_data(loaded.keys[...]), jax.random.key_data(model.keys[...]))
    with pytest.raises(CheckpointError, match=r"bare, held\.0 are not in the model; .* nnx\.eval_shape leaves none"):
        fp8x.load_into(nnx.eval_shape(lambda: build(0)), tmp_path / "model")


class Pair(nnx.Module):
    """A user's own type, of which two layers are made; `scale` stays the variable that it is."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel, self.scale = nnx.Param(rngs.params.normal((2, 32, 32))), nnx.Param(jnp.ones(32))


class QuantizedPair(nnx.Module):
    def __init__(self, pair: Pair, recipe):
        kernel = pair.kernel[...]
        self.parts = nnx.List(
            [fp8x.nn.Linear.from_arrays(fp8x.quantize(kernel[i], recipe.weight), recipe) for i in range(2)]
        )
        self.scale = pair.scale


def test_a_registered_type_that_becomes_several_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_CONVERTERS", dict(registry._CONVERTERS))
    fp8x.nn.register(Pair, lambda module, recipe, *, name, allow_nonfinite: QuantizedPair(module, recipe))

    def build(seed):
        pair = Pair(nnx.Rngs(seed))
        return nnx.Dict(before=nnx.Dict(scale=pair.scale), pair=pair, z=nnx.Dict(scale=pair.scale))

    model = fp8x.quantize_model(build(1), "e4m3_bf16")
    fp8x.save(model, tmp_path / "model")
    for loaded in (build(0), nnx.eval_shape(lambda: build(0))):
        before = loaded.before.scale
        fp8x.load_into(loaded, tmp_path / "model")
        assert list(named_layers(loaded)) == ["pair.parts.0", "pair.parts.1"]
        assert bits(loaded) == bits(model)
        assert loaded.pair.scale is loaded.before.scale is loaded.z.scale is before


class TestOnAMesh:
    """Over 4 of the 8 devices; every layer splits where its unquantized one did."""

    def mesh(self, axis_type=AxisType.Auto):
        return mesh_of(axis_type, x=4)

    def placed(self, model: Net, mesh) -> Net:
        """As a user places a model: by hand, here a kernel, its bias, the embedding and the experts."""
        for variable, spec in [
            (model.blocks[0].kernel, P(None, "x")),
            (model.blocks[0].bias, P("x")),
            (model.embed.embedding, P("x")),
            (model.moe.w13.weight, P("x")),
        ]:
            variable.set_value(jax.device_put(variable[...], NamedSharding(mesh, spec)))
        return model

    def assert_placed(self, model: Net, mesh) -> None:
        for variable, spec in [
            (model.blocks[0].weight, P("x")),
            (model.blocks[0].bias, P("x")),
            (model.embed.embedding, P("x")),
            (model.moe.w13.weight, P("x")),
            (model.moe.w13.weight_scale, P("x")),
            (model.blocks[1].weight, P()),
            (model.norm.mean, P()),
        ]:
            array = variable[...]
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)

    @pytest.mark.sample
    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_into_a_model_that_is_placed(self, axis_type, tmp_path):
        mesh, model = self.mesh(axis_type), quantized(MX)
        fp8x.save(model, tmp_path / "model")
        loaded = fp8x.load_into(self.placed(real(), mesh), tmp_path / "model")
        self.assert_placed(loaded, mesh)
        assert loaded.blocks[0].weight_scale[...].sharding.spec == P("x", None)
        assert bits(loaded) == bits(model)
        # And one that is quantized and on the mesh, saved and loaded into.
        fp8x.save(loaded, tmp_path / "from-mesh")
        for name in ("model.safetensors", "fp8x.json"):
            assert (tmp_path / "from-mesh" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
        again = fp8x.load_into(nnx.clone(loaded), tmp_path / "from-mesh")
        assert [array.sharding for array in jax.tree.leaves(nnx.state(again))] == [
            array.sharding for array in jax.tree.leaves(nnx.state(loaded))
        ]
        if axis_type is AxisType.Auto:
            np.testing.assert_allclose(nnx.jit(lambda net, ids: net(ids))(loaded, IDS), model(IDS), atol=0.05)

    def test_blocks_that_a_boundary_would_cut_stay_whole(self, tmp_path):
        """96 rows over 4 devices are 24 each: of one block of 128 rows, whose scale lies everywhere."""
        mesh, model = self.mesh(), quantized(BLOCK)
        fp8x.save(model, tmp_path / "model")
        loaded = fp8x.load_into(self.placed(real(), mesh), tmp_path / "model")
        self.assert_placed(loaded, mesh)
        assert loaded.blocks[0].weight_scale[...].sharding.is_fully_replicated
        assert bits(loaded) == bits(model)

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_an_abstract_model_with_partitioning(self, axis_type, tmp_path):
        mesh, model = self.mesh(axis_type), quantized(MX)
        fp8x.save(model, tmp_path / "model")
        with jax.set_mesh(mesh):
            inside = fp8x.load_into(abstract(names=(None, "x")), tmp_path / "model")
            outside = abstract(names=(None, "x"))
        with pytest.raises(MeshError, match=r"mesh: .* on a mesh \{'x': 4\} without devices; pass mesh="):
            fp8x.load_into(outside, tmp_path / "model")
        assert not named_layers(outside)
        fp8x.load_into(outside, tmp_path / "model", mesh)
        for loaded in (inside, outside):
            assert {key: value[1:] for key, value in bits(loaded).items()} == {
                key: value[1:] for key, value in bits(model).items()
            }
            assert loaded.blocks[0].weight[...].sharding == NamedSharding(mesh, P("x", None))
            assert loaded.blocks[0].weight_scale[...].sharding == NamedSharding(mesh, P("x", None))
            assert loaded.blocks[0].weight.get_metadata("out_sharding") == ("x", None)
            assert loaded.blocks[1].weight[...].sharding.is_equivalent_to(NamedSharding(mesh, P()), 2)

    def test_an_abstract_state_with_shardings(self, tmp_path):
        mesh, model = self.mesh(), quantized(STATIC)
        fp8x.save(model, tmp_path / "model")
        describe = nnx.eval_shape(lambda: fp8x.quantize_model(Net(rngs=nnx.Rngs(0)), STATIC))
        weight, sharding = describe.moe.w2.weight, NamedSharding(mesh, P(None, "x"))
        weight.set_value(jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=sharding))
        fp8x.load_into(describe, tmp_path / "model")
        assert describe.moe.w2.weight[...].sharding == sharding
        assert bits(describe) == bits(model)

    def test_what_does_not_fit_the_mesh(self, tmp_path):
        fp8x.save(quantized(MX), tmp_path / "model")
        placed = self.placed(real(), self.mesh())
        with pytest.raises(MeshError, match=r"blocks\.0\.bias: x is no axis of the mesh \{'y': 2\}"):
            fp8x.load_into(placed, tmp_path / "model", mesh_of(y=2))
        assert not named_layers(placed)
        other = self.placed(real(), self.mesh())
        with pytest.raises(MeshError, match=r"moe\.w13\.weight: shape \[4, 2, 32, 64\] does not fit .*x': 8"):
            fp8x.load_into(other, tmp_path / "model", mesh_of(x=8))
        loaded = fp8x.load_into(other, tmp_path / "model", mesh_of(x=2))
        self.assert_placed(loaded, mesh_of(x=2))


class TestErrors:
    @pytest.fixture
    def path(self, tmp_path):
        fp8x.save(quantized(MX), tmp_path / "model")
        return tmp_path / "model"

    def assert_refused(self, model, path, match):
        """And that the model is as it was."""
        before = bits(model)
        with pytest.raises(CheckpointError, match=match):
            fp8x.load_into(model, path)
        assert bits(model) == before

    def test_missing_and_unknown(self, path):
        class More(Net):
            def __init__(self, *, rngs):
                super().__init__(rngs=rngs)
                self.more, self.other = nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(2))

        class Less(Net):
            def __init__(self, *, rngs):
                super().__init__(rngs=rngs)
                del self.norm

        self.assert_refused(More(rngs=nnx.Rngs(0)), path, r"model: more, other are missing, which the model has")
        self.assert_refused(Less(rngs=nnx.Rngs(0)), path, r"norm\.bias, norm\.mean, .* are not in the model")

    def test_shapes_and_types(self, path):
        match = (
            r"blocks\.0\.bias: float32\[96\] on disk, float32\[160\] in the model; "
            r"blocks\.0\.weight: float8_e4m3fn\[96, 64\] on disk, float8_e4m3fn\[160, 64\] in the model; .*and 1 more"
        )
        self.assert_refused(Net(inner=160, rngs=nnx.Rngs(0)), path, match)
        model = real()
        model.steps.set_value(jnp.zeros((), jnp.int32))
        self.assert_refused(model, path, r"steps: uint32\[\] on disk, int32\[\] in the model")
        model = real()
        model.dropout.rngs.key.set_value(jax.random.key(0, impl="rbg"))
        self.assert_refused(model, path, r"dropout\.rngs\.key: key<fry>\[\] on disk, key<rbg>\[\] in the model")

    def test_other_layers(self, path):
        model = fp8x.quantize_model(real(), BLOCK, {r"blocks\.1": MX})
        match = r"blocks\.0, .* quantized otherwise .* by weights e4m3 1×32 e8m0, .* on disk, by weights e4m3 128×128"
        with pytest.raises(CheckpointError, match=match):
            fp8x.load_into(model, path)
        with pytest.raises(CheckpointError, match=r"blocks\.0 .* by weights .* on disk, by no recipe in the model"):
            fp8x.load_into(fp8x.quantize_model(real(), None, {r"blocks\.1|.*w\d+": MX}), path)
        model = real()
        del model.moe
        self.assert_refused(model, path, r"holds moe\.w13 in 8 bits, but the model has no module of that name")
        model = real()
        model.blocks[1] = nnx.LayerNorm(64, rngs=nnx.Rngs(0))
        self.assert_refused(
            model, path, r"layers in 8 bits do not fit the model: rules: .*blocks.*1' matches blocks.1 alone"
        )
        self.assert_refused(Net(inner=72, rngs=nnx.Rngs(0)), path, r"do not fit the model: blocks\.1: dim 1 .* is 72")

    def test_other_directories(self, path, tmp_path, tiny_checkpoint):
        with pytest.raises(CheckpointError, match=r"it is a Hugging Face directory, which fp8x\.load reads"):
            fp8x.load_into(real(), tiny_checkpoint)
        with pytest.raises(CheckpointError, match=r"a model of your own \(fp8x\.json\), which fp8x\.load_into"):
            fp8x.load(path)
        with pytest.raises(CheckpointError, match=r"fp8x\.json: is missing; fp8x\.save writes it"):
            (tmp_path / "empty").mkdir()
            fp8x.load_into(real(), tmp_path / "empty")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda found: found.update(version=2), "version is 2, expected 1"),
            (lambda found: found.pop("layers"), "layers is None, expected an object"),
            (
                lambda found: found["layers"]["blocks.0"].pop("weight"),
                r"blocks\.0: is no recipe .* expected weight, act",
            ),
            (lambda found: found["layers"]["blocks.0"]["weight"].update(element="e3m4"), "element: 'e3m4' is unknown"),
            (
                lambda found: found["layers"]["blocks.0"].update(weight=None),
                r"blocks\.0: .*weight: None is not a Scheme",
            ),
            (lambda found: found["layers"]["blocks.0"].update(out_dtype=["f"]), r"blocks\.0: is no recipe"),
            (lambda found: found["random_keys"].update({"dropout.rngs.key": "dice"}), r"random_keys: dropout.*dice"),
            (
                lambda found: found["random_keys"].update({"norm.var": "rbg"}),
                r"norm\.var in .*: is float32\[64\], but a",
            ),
        ],
    )
    def test_a_damaged_description(self, change, match, path):
        file = path / "fp8x.json"
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))
        self.assert_refused(real(), path, match)

    def test_what_can_not_be_saved(self, tmp_path, monkeypatch):
        def refuses(model, match, **options):
            with pytest.raises(CheckpointError, match=match):
                fp8x.save(model, tmp_path / "out", **options)
            assert list(tmp_path.iterdir()) == []

        refuses(abstract(), r"model: blocks\.0\.bias, .* and \d+ more are without values")
        refuses(real(), "format: 'modelopt' does not fit: the model is a Net", format="modelopt")
        refuses(real(), "beside: fp8x.json is written by fp8x", beside={"fp8x.json": {}})
        model = real()
        model.tiny = nnx.Variable(jnp.ones(2, jnp.int4))
        refuses(model, "tiny: dtype is int4; use one of")
        model.tiny = nnx.Variable("text")
        refuses(model, "tiny: is a str, which no tensor holds")
        model.tiny = nnx.data({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
        refuses(model, r"tiny\.a\.b: two variables of the model have this name")
        del model.tiny
        add = Writer.add

        def fail(writer, name, array):
            if name == "moe.w2.weight":
                raise RuntimeError("power cut")
            add(writer, name, array)

        monkeypatch.setattr(Writer, "add", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            fp8x.save(model, tmp_path / "out", max_shard_bytes=1000)
        assert list(tmp_path.iterdir()) == []


def test_progress_and_further_files(tmp_path):
    written, read = [], []
    model = quantized(MX)
    fp8x.save(model, tmp_path / "m", beside={"notes.json": {"a": 1}}, progress=lambda *report: written.append(report))
    fp8x.load_into(abstract(), tmp_path / "m", progress=lambda *report: read.append(report))
    assert json.loads((tmp_path / "m" / "notes.json").read_text()) == {"a": 1}
    count = len(list(Reader(tmp_path / "m", config=DESCRIPTION)))
    for reports in (written, read):
        assert len(reports) == count and reports[-1][0] == reports[-1][1] and reports == sorted(reports)


class TestExport:
    """`jax.export` of a quantized model, as docs/checkpoints.md shows it."""

    @pytest.mark.slow
    def test_closed_over(self):
        model = quantized(MX)
        call = jax.jit(lambda ids: model(ids))
        blob = jax.export.export(call)(jax.ShapeDtypeStruct(IDS.shape, jnp.int32)).serialize()
        np.testing.assert_array_equal(
            as_bits(jax.export.deserialize(blob).call(jnp.asarray(IDS, jnp.int32))), as_bits(call(IDS))
        )

    @pytest.mark.sample
    @pytest.mark.parametrize("code", [MX, "e5m2_e5m2_bf16", BLOCK])
    def test_arrays_as_arguments(self, code):
        graphdef, state = nnx.split(quantized(code).moe)
        leaves, tree = jax.tree.flatten(state)

        @jax.jit
        def call(leaves, x):
            return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(x)

        x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
        blob = jax.export.export(call)(leaves, x).serialize()
        np.testing.assert_array_equal(as_bits(jax.export.deserialize(blob).call(leaves, x)), as_bits(call(leaves, x)))
