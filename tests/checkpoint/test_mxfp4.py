"""MXFP4 on disk: what it means, by ml_dtypes' float4_e2m1fn and float64, and that it survives the way out and back."""

import json
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fp8x
from fp8x.checkpoint import Reader, Writer
from fp8x.checkpoint.convert import _jobs
from fp8x.checkpoint.experts import ExpertJob
from fp8x.checkpoint.header import DTYPES, read_header
from fp8x.checkpoint.inspect import inspect, merge_experts
from fp8x.checkpoint.packed import pack, unpack
from fp8x.errors import CheckpointError

E8M0 = ml_dtypes.float8_e8m0fnu
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
BLOCK, OTHER = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"

# By bytes of scales in rows and bytes of codes in columns: all of both, but for the scale that is NaN.
ALL_BYTES = np.tile(np.arange(256, dtype=np.uint8), (255, 1))
ALL_SCALES = np.tile(np.arange(255, dtype=np.uint8)[:, None], (1, 16))


def values(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`[..., K]` in float64, of codes two a byte and a scale for 32 of them."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    elements = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return elements * np.exp2(scales.astype(np.float64) - 127).repeat(32, axis=-1)


def of_reader(reader: Reader, prefix: str) -> np.ndarray:
    """The values of a matrix in MXFP8, as fp8x reads it."""
    codes, scale = (read(reader, f"{prefix}.{name}") for name in ("weight", "weight_scale"))
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    return codes.astype(np.float64) * np.exp2(scale.view(np.uint8).astype(np.float64) - 127).repeat(32, axis=-1)


def read(reader: Reader, name: str) -> np.ndarray:
    stored = reader.stored(name)
    return reader.read(name, shapes=[stored.shape], dtypes=[stored.dtype])


def write(path: Path, tensors: dict[str, np.ndarray], quantization: dict | None, **config) -> Path:
    with Writer(path) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
        writer.add_json("config.json", config | ({} if quantization is None else {"quantization_config": quantization}))
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_all_bytes_by_all_scales_of_gpt_oss(tmp_path, dtype):
    tensors = {
        f"{BLOCK}.down_proj_blocks": ALL_BYTES.reshape(1, 255, 16, 16).view(dtype),
        f"{BLOCK}.down_proj_scales": ALL_SCALES[None],
    }
    reader = Reader(write(tmp_path / "in", tensors, {"quant_method": "mxfp4"}, model_type="gpt_oss"))
    found = of_reader(reader, f"{BLOCK}.0.down_proj")
    assert found.tobytes() == values(ALL_BYTES, ALL_SCALES).tobytes()  # the sign of zero, too


@pytest.mark.parametrize(
    "weight, scale, types",
    [
        ("weight_packed", "weight_scale", (np.uint8, np.uint8)),
        ("weight", "scale", (np.int8, E8M0)),
        ("weight", "weight_scale", (np.uint8, np.uint8)),
        ("weight", "weight_scale_inv", (np.int8, E8M0)),
    ],
)
def test_all_bytes_by_all_scales_of_one_matrix(tmp_path, weight, scale, types):
    arrays = {f"a.{weight}": ALL_BYTES.view(types[0]), f"a.{scale}": ALL_SCALES.view(types[1])}
    path = write(tmp_path / "in", arrays, {"quant_method": "mxfp4"})
    codes = read(Reader(path), "a.weight").astype(np.float64)
    found = codes * np.exp2(ALL_SCALES.astype(np.float64) - 127).repeat(32, axis=-1)
    assert found.tobytes() == values(ALL_BYTES, ALL_SCALES).tobytes()
    fp8x.convert(path, tmp_path / "out", format="compressed-tensors")
    assert of_reader(Reader(tmp_path / "out"), "a").tobytes() == found.tobytes()


def test_packed_codes_are_those_that_were_unpacked():
    codes = np.empty((255, 512), np.uint8)
    unpack(ALL_BYTES, codes)
    packed, missing = pack(codes)
    assert packed.tobytes() == ALL_BYTES.tobytes() and missing == 0
    _, missing = pack(np.arange(256, dtype=np.uint8)[None])
    assert missing == 240


def test_packing_takes_little_memory():
    """Of a layer of experts, which `fp8x.save` packs as one."""
    codes = np.full((4096, 4096), 0x38, np.uint8)
    tracemalloc.start()
    packed, _ = pack(codes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert packed.nbytes <= peak < packed.nbytes + 2**21 and (packed == 0x22).all()


def gpt_oss(seed: int = 0, experts: int = 3, hidden: int = 64, width: int = 96) -> dict[str, np.ndarray]:
    """The tensors of a layer of gpt-oss."""
    rng = np.random.default_rng(seed)

    def bf16(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

    def blocks(name: str, n: int, k: int) -> dict[str, np.ndarray]:
        return {
            f"{BLOCK}.{name}_blocks": rng.integers(0, 256, (experts, n, k // 32, 16), np.uint8),
            f"{BLOCK}.{name}_scales": rng.integers(110, 130, (experts, n, k // 32), np.uint8),
            f"{BLOCK}.{name}_bias": bf16(experts, n),
        }

    layer = "model.layers.0"
    return {
        **blocks("gate_up_proj", 2 * width, hidden),
        **blocks("down_proj", hidden, width),
        f"{layer}.mlp.router.weight": bf16(experts, hidden),
        f"{layer}.mlp.router.bias": bf16(experts),
        f"{layer}.self_attn.q_proj.weight": bf16(hidden, hidden),
        f"{layer}.self_attn.sinks": bf16(4),
        "model.embed_tokens.weight": bf16(32, hidden),
        "lm_head.weight": bf16(32, hidden),
    }


def directory(path: Path, tensors: dict[str, np.ndarray], config: dict, files: int = 1) -> Path:
    """As others write it: tensors dealt out in turn, files counted from zero."""
    names = [f"model-{i:05}-of-{files - 1:05}.safetensors" for i in range(files)]
    weight_map = {name: names[i % files] for i, name in enumerate(tensors)}
    path.mkdir()
    for file in names:
        with Writer(path / "part") as writer:
            for name, found in weight_map.items():
                if found == file:
                    writer.add(name, tensors[name])
        (path / "part" / "model.safetensors").rename(path / ("model.safetensors" if files == 1 else file))
        shutil.rmtree(path / "part")
    if files > 1:
        index = {"metadata": {"total_size": 7, "total_parameters": 9}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config))
    return path


def contents(path: Path) -> dict[str, object]:
    """Every file: its JSON, or its tensors."""
    found: dict[str, object] = {}
    for file in path.iterdir():
        if file.suffix == ".json":
            found[file.name] = json.loads(file.read_text())
            continue
        content = file.read_bytes()
        with file.open("rb") as f:
            tensors, _ = read_header(f, file)
        found[file.name] = {
            name: (each.dtype, each.shape, content[each.start : each.stop]) for name, each in tensors.items()
        }
    return found


CONFIG = {"model_type": "gpt_oss", "hidden_size": 64, "vocab_size": 32, "dtype": "bfloat16"}
WORDS = {
    "plain": {"modules_to_not_convert": KEPT},
    "null": {"modules_to_not_convert": None},
    "none": {},
    "dequantize": {"modules_to_not_convert": KEPT, "dequantize": True},
}


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("words", WORDS)
def test_gpt_oss_and_back(tmp_path, words, files):
    """Out to MXFP8 in two dialects, and back: the same tensors, names, config and index."""
    config = CONFIG | {"quantization_config": WORDS[words] | {"quant_method": "mxfp4"}}
    source = directory(tmp_path / "source", gpt_oss(), config, files)
    fp8x.convert(source, tmp_path / "mxfp8")
    fp8x.convert(tmp_path / "mxfp8", tmp_path / "other", "mxfp8_mxfp8_bf16", "modelopt")
    fp8x.convert(tmp_path / "other", tmp_path / "third", "mxfp8_bf16", "compressed-tensors")
    for middle in ("mxfp8", "third", "source"):
        fp8x.convert(tmp_path / middle, tmp_path / f"{middle}-back", format="mxfp4")
        assert contents(tmp_path / f"{middle}-back") == contents(source)


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
def test_experts_in_mxfp8(tmp_path):
    """What becomes of each tensor of gpt-oss."""
    tensors = gpt_oss()
    source = directory(tmp_path / "in", tensors, CONFIG | {"quantization_config": {"quant_method": "mxfp4"}})
    plan = fp8x.plan(source)
    assert {(row.before, str(row.after)) for row in plan.groups if row.before == "mxfp4"} == {
        ("mxfp4", "e4m3 1×32 e8m0")
    }
    assert plan.bytes_before == sum(array.nbytes for array in tensors.values())
    fp8x.convert(plan, tmp_path / "out")
    reader = Reader(tmp_path / "out")
    gate_up, scales = (tensors[f"{BLOCK}.gate_up_proj_{name}"] for name in ("blocks", "scales"))
    for e in range(3):
        for first, part in enumerate(("gate_proj", "up_proj")):
            expected = values(gate_up[e, first::2].reshape(96, 32), scales[e, first::2])
            assert of_reader(reader, f"{BLOCK}.{e}.{part}").tobytes() == expected.tobytes()
            bias = tensors[f"{BLOCK}.gate_up_proj_bias"][e, first::2]
            assert read(reader, f"{BLOCK}.{e}.{part}.bias").tobytes() == bias.tobytes()
    others = {name for name in tensors if ".experts." not in name}
    assert all(read(reader, name).tobytes() == tensors[name].tobytes() for name in others)
    matrices = {f"{BLOCK}.{e}.{part}" for e in range(3) for part in ("gate_proj", "up_proj", "down_proj")}
    assert set(reader) == others | {f"{m}.{x}" for m in matrices for x in ("weight", "weight_scale", "bias")}


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
def test_gpt_oss_in_16_bits(tmp_path):
    """As transformers has it: transposed, gate and up in alternate columns; out of MXFP4, and out of MXFP8."""
    tensors = gpt_oss()
    source = directory(tmp_path / "in", tensors, CONFIG | {"quantization_config": {"quant_method": "mxfp4"}})
    fp8x.convert(source, tmp_path / "mxfp8")
    for middle in ("in", "mxfp8"):
        fp8x.convert(tmp_path / middle, tmp_path / f"{middle}-bf16", "bf16")
        found = contents(tmp_path / f"{middle}-bf16")["model.safetensors"]
        for name in ("gate_up_proj", "down_proj"):
            blocks, scales = (tensors[f"{BLOCK}.{name}_{part}"] for part in ("blocks", "scales"))
            expected = values(blocks.reshape(*blocks.shape[:2], -1), scales).swapaxes(1, 2)
            dtype, shape, content = found[f"{BLOCK}.{name}"]
            assert (dtype, shape) == ("BF16", expected.shape)
            assert content == expected.astype(ml_dtypes.bfloat16).tobytes()
            assert found[f"{BLOCK}.{name}_bias"][2] == tensors[f"{BLOCK}.{name}_bias"].tobytes()
    # And that as MXFP8 anew, by a recipe: the columns of each expert's gate.
    fp8x.convert(tmp_path / "in-bf16", tmp_path / "again", "mxfp8_bf16")
    found = of_reader(Reader(tmp_path / "again"), f"{BLOCK}.1.up_proj")
    blocks, scales = tensors[f"{BLOCK}.gate_up_proj_blocks"][1, 1::2], tensors[f"{BLOCK}.gate_up_proj_scales"][1, 1::2]
    assert found.tobytes() == values(blocks.reshape(96, 32), scales).tobytes()


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
def test_experts_are_written_in_the_order_of_their_tensor(tmp_path):
    """Others sort names: the tenth expert comes before the second. Blocks that wait for an expert take memory."""
    tensors = gpt_oss(experts=12, hidden=32, width=32)
    fp8x.convert(write(tmp_path / "in", tensors, GPT_OSS, model_type="gpt_oss"), tmp_path / "mxfp8")
    reader = Reader(tmp_path / "mxfp8")
    arrays = {name: read(reader, name) for name in sorted(reader)}
    source = write(tmp_path / "sorted", arrays, dict(reader.config["quantization_config"]), model_type="gpt_oss")
    plan = fp8x.plan(source, format="mxfp4")
    jobs = [(job.fused.name, job.index) for job in _jobs(plan) if isinstance(job, ExpertJob)]
    assert jobs == [(f"{BLOCK}.{name}", e) for name in ("down_proj", "gate_up_proj") for e in range(12)]
    fp8x.convert(plan, tmp_path / "back")
    assert {name: array.tobytes() for name, array in tensors.items()} == {
        name: content for name, (_, _, content) in contents(tmp_path / "back")["model.safetensors"].items()
    }


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "mxfp4-pack-quantized",
    "config_groups": {
        "experts": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                "dynamic": False, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8", "observer": "memoryless",
            },
            "input_activations": None,
        }
    },
    "ignore": ["lm_head"],
    "version": "0.15.0",
}  # fmt: skip


@pytest.mark.parametrize("files", [1, 2])
def test_compressed_tensors_and_back(tmp_path, files):
    rng = np.random.default_rng(1)
    tensors: dict[str, np.ndarray] = {"lm_head.weight": np.ones((32, 64), ml_dtypes.bfloat16)}
    for layer in range(3):
        tensors[f"model.layers.{layer}.up_proj.weight_packed"] = rng.integers(0, 256, (96, 32), np.uint8)
        tensors[f"model.layers.{layer}.up_proj.weight_scale"] = rng.integers(0, 255, (96, 2), np.uint8)
    config = {"model_type": "any", "quantization_config": COMPRESSED}
    source = directory(tmp_path / "in", tensors, config, files)
    fp8x.convert(source, tmp_path / "mxfp8")
    written = json.loads((tmp_path / "mxfp8" / "config.json").read_text())["quantization_config"]
    assert written["format"] == "mxfp8-quantized" and "fp8x" not in written
    fp8x.convert(tmp_path / "mxfp8", tmp_path / "back", format="mxfp4-pack-quantized")
    assert contents(tmp_path / "back") == contents(source)


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_and_columns(tmp_path_factory, data):
    """Of gpt-oss's matrices, in 4 bits and in 16, what is asked for is what lies there."""
    path = tmp_path_factory.mktemp("any")
    tensors = gpt_oss(seed=data.draw(st.integers(0, 99)))
    plain = np.random.default_rng(2).standard_normal((3, 64, 192)).astype(np.float32)
    reader = Reader(write(path / "in", tensors | {f"{OTHER}.gate_up_proj": plain}, None, model_type="gpt_oss"))
    e, first = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 1))
    part = ("gate_proj", "up_proj")[first]
    rows, columns = (slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in (96, 64))
    name = f"{OTHER}.{e}.{part}.weight"
    assert reader.slices(name, shapes=[(96, 64)], dtypes=["F32"])[rows.start : rows.start, :].shape == (0, 64)
    found = reader.slices(name, shapes=[(96, 64)], dtypes=["F32"])[rows, columns]
    assert found.tobytes() == plain[e, :, first::2].T[rows, columns].tobytes()
    name = f"{BLOCK}.{e}.{part}.weight"
    found = reader.slices(name, shapes=[(96, 64)], dtypes=["F8_E4M3"])[rows, columns]
    packed = tensors[f"{BLOCK}.gate_up_proj_blocks"][e, first::2].reshape(96, 32)
    whole = values(packed, np.full((96, 2), 127)).astype(np.float32)
    assert found.astype(np.float32).tobytes() == whole[rows, columns].tobytes()


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_of_any_shape(tmp_path_factory, data):
    """However few bytes are read at once, of every form that is in 4 bits, and of bytes that others lie between."""
    path, integers = tmp_path_factory.mktemp("any"), lambda first, last: data.draw(st.integers(first, last))
    experts, n, k, rng = integers(1, 3), 2 * integers(1, 9), integers(1, 3), np.random.default_rng(integers(0, 99))
    codes, plain = rng.integers(0, 256, (experts, n, 16 * k), np.uint8), rng.standard_normal((experts, 32 * k, n))
    scales = rng.integers(100, 140, (experts, n, k), np.uint8)
    tensors = {f"{BLOCK}.gate_up_proj_blocks": codes.reshape(experts, n, k, 16), f"{BLOCK}.gate_up_proj_scales": scales}
    tensors |= {f"{OTHER}.gate_up_proj": plain, f"{OTHER}.gate_up_proj_bias": plain[:, 0]}
    tensors |= {"a.weight_packed": codes[0], "a.weight_scale": scales[0]}
    tensors |= {"b.weight": codes[0].view(np.int8), "b.scale": scales[0].view(E8M0)}
    expected = {"a.weight": values(codes[0], np.full((n, k), 127)), "b.weight": values(codes[0], np.full((n, k), 127))}
    for e in range(experts):
        for first, part in enumerate(("gate_proj", "up_proj")):
            expected[f"{BLOCK}.{e}.{part}.weight"] = values(codes[e, first::2], np.full((n // 2, k), 127))
            expected[f"{BLOCK}.{e}.{part}.weight_scale"] = scales[e, first::2]
            expected[f"{OTHER}.{e}.{part}.weight"] = plain[e, :, first::2].T
            expected[f"{OTHER}.{e}.{part}.bias"] = plain[e, 0, first::2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fp8x.checkpoint.views.BAND", integers(1, 300))
        patch.setattr("fp8x.checkpoint.views.PIECE", integers(1, 300))
        reader = Reader(write(path / "in", tensors, None, model_type="gpt_oss"))
        assert set(expected) <= set(reader)
        for name, array in expected.items():
            stored = reader.stored(name)
            slices = reader.slices(name, shapes=[array.shape], dtypes=[stored.dtype])
            index = tuple(slice(*sorted((integers(0, n), integers(0, n)))) for n in array.shape)
            assert np.array_equal(slices[index].astype(np.float64), array[index].astype(np.float64))
            # As a conversion reads it: some rows at a time, into a buffer.
            step, content = stored.step(integers(1, 200)), []
            for start in range(0, stored.nbytes, step):
                content.append(np.empty(min(step, stored.nbytes - start), np.uint8))
                reader.read_into(name, start, content[-1])
            whole = np.concatenate(content).view(DTYPES[stored.dtype]).reshape(stored.shape)
            assert np.array_equal(whole.astype(np.float64), array.astype(np.float64))


GPT_OSS = {"quant_method": "mxfp4"}
BARE = {"quant_method": "mxfp4"}


@pytest.mark.parametrize(
    "change, quantization, error",
    [
        ({f"{BLOCK}.down_proj_scales": None}, GPT_OSS, r"down_proj_blocks in .*: its scales .* are missing"),
        (
            {f"{BLOCK}.down_proj_scales": np.zeros((3, 64, 2), np.uint8)},
            GPT_OSS,
            r"down_proj_scales in .*: is U8 \[3, 64, 2\], expected U8 or F8_E8M0 \[3, 64, 3\] beside .*blocks",
        ),
        (
            {f"{BLOCK}.down_proj_scales": np.zeros((3, 64, 3), np.float32)},
            GPT_OSS,
            r"down_proj_scales in .*: is F32 \[3, 64, 3\], expected U8 or F8_E8M0",
        ),
        (
            {f"{BLOCK}.down_proj_blocks": np.zeros((3, 64, 3, 8), np.uint8)},
            GPT_OSS,
            r"down_proj_blocks in .*: shape is \[3, 64, 3, 8\], expected \[E, N, K/32, 16\], two codes a byte",
        ),
        (
            {f"{BLOCK}.down_proj_blocks": np.zeros((3, 64, 48), np.uint8)},
            GPT_OSS,
            r"down_proj_blocks in .*: shape is \[3, 64, 48\], expected \[E, N, K/32, 16\], two codes a byte",
        ),
        (
            {
                f"{BLOCK}.gate_up_proj_blocks": np.zeros((3, 5, 2, 16), np.uint8),
                f"{BLOCK}.gate_up_proj_scales": np.zeros((3, 5, 2), np.uint8),
            },
            GPT_OSS,
            "5 rows do not divide into gate and up",
        ),
        (
            {f"{BLOCK}.0.down_proj.weight": np.zeros((64, 96), np.float32)},
            GPT_OSS,
            r"experts.0.down_proj.weight: .* holds it twice",
        ),
        (
            {"a.weight_packed": np.zeros((4, 24), np.uint8), "a.weight_scale": np.zeros((4, 2), np.uint8)},
            COMPRESSED,
            r"a.weight_packed in .*: shape is \[4, 24\], so K is 48; MXFP4 has blocks of 32, which must divide K",
        ),
        (
            {"a.weight_packed": np.zeros((4, 16), np.uint8), "a.weight_scale": np.zeros((4, 2), np.uint8)},
            COMPRESSED,
            r"a.weight_scale in .*: is U8 \[4, 2\], expected U8 or F8_E8M0 \[4, 1\] beside a.weight_packed \[4, 16\]",
        ),
        (
            {
                "a.weight_packed": np.zeros((4, 16), np.uint8),
                "a.weight_scale": np.zeros((4, 1), np.uint8),
                "a.weight": np.zeros((4, 32), np.float32),
            },
            COMPRESSED,
            r"a.weight: .* holds it twice, in 4 bits and otherwise",
        ),
        (
            {"a.weight": np.zeros((4, 16), np.int8), "a.scale": np.zeros((4, 2), np.uint8).view(E8M0)},
            BARE,
            r"a.scale in .*: is F8_E8M0 \[4, 2\], expected U8 or F8_E8M0 \[4, 1\] beside a.weight \[4, 16\]",
        ),
        (
            {"a.weight_packed": np.zeros((4, 16), np.uint8)},
            COMPRESSED,
            r"a.weight_packed in .*: its scales a.weight_scale are missing",
        ),
        (
            {"a.weight_packed": np.zeros(16, np.uint8), "a.weight_scale": np.zeros(1, np.uint8)},
            COMPRESSED,
            r"a.weight_packed in .*: shape is \[16\], expected \[N, K/2\], two codes a byte",
        ),
        (
            {f"{BLOCK}.down_proj_blocks": np.zeros((3, 64, 16), np.uint8)},
            GPT_OSS,
            r"down_proj_blocks in .*: shape is \[3, 64, 16\], expected \[E, N, K/32, 16\], two codes a byte",
        ),
        (
            {
                f"{BLOCK}.gate_up_proj_blocks": np.zeros((3, 1, 2, 16), np.uint8),
                f"{BLOCK}.gate_up_proj_scales": np.zeros((3, 1, 2), np.uint8),
            },
            GPT_OSS,
            "1 rows do not divide into gate and up$",
        ),
        (
            {f"{BLOCK}.gate_up_proj_bias": np.zeros((3, 1), np.float32)},
            GPT_OSS,
            "gate_up_proj_bias in .*: 1 rows do not divide into gate and up$",
        ),
        (
            {
                f"{OTHER}.gate_up_proj": np.zeros((3, 64, 16), np.int8),
                f"{OTHER}.gate_up_proj_scale_inv": np.zeros((3, 64, 1), np.uint8).view(E8M0),
            },
            GPT_OSS,
            r"1.mlp.experts.gate_up_proj in .*: experts in 4 bits that lie as \[E, K, N\]",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path, change, quantization, error):
    tensors = {name: array for name, array in (gpt_oss() | change).items() if array is not None}
    with pytest.raises(CheckpointError, match=error):
        Reader(write(tmp_path / "in", tensors, quantization, model_type="gpt_oss"))


PACKED = {"weight": np.zeros((4, 16), np.int8), "scale": np.zeros((4, 1), np.uint8).view(E8M0)}


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
@pytest.mark.parametrize(
    "tensors, quantization, error",
    [
        (gpt_oss(), None, r"gate_up_proj_blocks in .*: is in MXFP4, .*config.json has no quantization_config"),
        ({f"a.{name}": x for name, x in PACKED.items()}, None, "a.weight in .*: is in MXFP4, .*no quantization_config"),
        (
            {f"embed_tokens.{name}": x for name, x in PACKED.items()},
            GPT_OSS,
            r"embed_tokens.weight in .*: is in MXFP4, .*its scales \(it is no matrix of a linear layer",
        ),
        (
            {f"conv.{name}": x[:, None] for name, x in PACKED.items()},
            GPT_OSS,
            r"conv.weight in .*: is in MXFP4, .*its scales \(it is no matrix of a linear layer",
        ),
        (
            {f"{BLOCK}.down_proj{name}": x[None] for name, x in zip(("", "_scale_inv"), PACKED.values())}
            | {f"{BLOCK}.down_proj_bias": np.zeros((1, 4), np.float32)},
            {"quant_method": "fp8", "activation_scheme": "dynamic"},
            r"down_proj in .*: is in MXFP4, .*its scales \(experts in one tensor, with biases",
        ),
    ],
)
@pytest.mark.parametrize("recipe", [None, "bf16"])
def test_what_no_config_describes_is_not_copied(tmp_path, tensors, quantization, error, recipe):
    """It appears in 8 bits: as such it would be something else to others."""
    source = write(tmp_path / "in", tensors, quantization, model_type="any")
    with pytest.raises(CheckpointError, match=error):
        fp8x.plan(source, recipe)
    assert inspect(source).bytes == sum(array.nbytes for array in tensors.values())


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
def test_others_by_such_names_are_copied(tmp_path):
    tensors = {
        "a.weight": np.ones((4, 32), np.float32),
        "b_blocks": np.ones((2, 4, 2, 16), np.uint8),
        f"{BLOCK}.down_proj": np.arange(6, dtype=np.float32).reshape(2, 3),
        f"{OTHER}.down_proj": np.arange(2, dtype=np.float32),
    }
    fp8x.convert(write(tmp_path / "in", tensors, None, model_type="gpt_oss"), tmp_path / "out")
    found = {name: content for name, (_, _, content) in contents(tmp_path / "out")["model.safetensors"].items()}
    assert found == {name: array.tobytes() for name, array in tensors.items()}


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
@pytest.mark.parametrize(
    "recipe, format", [(None, None), ("bf16", None), (None, "mxfp4"), (None, "mxfp4-pack-quantized")]
)
@pytest.mark.parametrize("shape", [(0, 4, 2), (2, 0, 2), (2, 4, 0)])
def test_nothing_in_4_bits(tmp_path, shape, recipe, format):
    tensors = gpt_oss() | {
        f"{OTHER}.gate_up_proj_blocks": np.zeros((*shape, 16), np.uint8),
        f"{OTHER}.gate_up_proj_scales": np.zeros(shape, np.uint8),
    }
    fp8x.convert(write(tmp_path / "in", tensors, GPT_OSS, model_type="gpt_oss"), tmp_path / "out", recipe, format)
    reader, (_, n, k) = Reader(tmp_path / "out"), shape
    for e in range(shape[0]):
        for part in ("gate_proj", "up_proj"):
            assert read(reader, f"{OTHER}.{e}.{part}.weight").shape == (n // 2, 32 * k)


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
def test_some_experts_in_16_bits(tmp_path):
    """A tensor of all experts holds all, or none: what is left of them goes one by one."""
    source = write(tmp_path / "in", gpt_oss(), GPT_OSS, model_type="gpt_oss")
    rules = {r".*experts\.[01]\..*": None}
    fp8x.convert(source, tmp_path / "out", "mxfp8_bf16", rules=rules)
    experts = [name for name in contents(tmp_path / "out")["model.safetensors"] if ".experts." in name]
    assert all(name.startswith(tuple(f"{BLOCK}.{e}." for e in range(3))) for name in experts)
    assert len(experts) == 3 * 3 * 2 + 3
    for each in (rules, {r".*down_proj": None}):
        with pytest.raises(CheckpointError, match=r"'mxfp4' holds gate, up and down of all .*0\.\w+_proj.* in 16"):
            fp8x.convert(source, tmp_path / "no", "mxfp8_bf16", "mxfp4", rules=each)


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
def test_a_layer_s_experts_in_16_bits(tmp_path):
    """They are one tensor beside those in 4 bits, and config.json names them."""
    tensors = gpt_oss()
    experts = [name for name in tensors if name.startswith(BLOCK)]
    tensors |= {name.replace(BLOCK, OTHER): tensors[name] for name in experts}
    source = write(tmp_path / "in", tensors, GPT_OSS, model_type="gpt_oss")
    fp8x.convert(source, tmp_path / "out", "mxfp8_bf16", "mxfp4", rules={r"model\.layers\.1\.mlp\.experts\..*": None})
    found = contents(tmp_path / "out")
    assert found["config.json"]["quantization_config"]["modules_to_not_convert"] == [*KEPT, OTHER]
    kinds = {name: kind for name, (kind, _, _) in found["model.safetensors"].items() if name.startswith(OTHER)}
    assert kinds == {
        f"{OTHER}.{name}{part}": "BF16" for name in ("gate_up_proj", "down_proj") for part in ("", "_bias")
    }
    assert all(found["model.safetensors"][name][2] == tensors[name].tobytes() for name in experts)
    fp8x.convert(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back")["model.safetensors"][f"{OTHER}.gate_up_proj"][0] == "BF16"


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
@pytest.mark.parametrize("recipe, format", [("bf16", None), (None, "mxfp4")])
def test_a_bias_that_is_missing(tmp_path, recipe, format):
    fp8x.convert(write(tmp_path / "in", gpt_oss(), GPT_OSS, model_type="gpt_oss"), tmp_path / "mxfp8")
    reader, lost = Reader(tmp_path / "mxfp8"), f"{BLOCK}.1.up_proj.bias"
    rest = {name: read(reader, name) for name in reader if name != lost}
    source = write(tmp_path / "lost", rest, dict(reader.config["quantization_config"]), model_type="gpt_oss")
    with pytest.raises(CheckpointError, match=rf"{lost} is missing from .*lost, which has biases of other experts"):
        fp8x.plan(source, recipe, format)


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
def test_scales_that_are_nan(tmp_path):
    tensors = gpt_oss()
    tensors[f"{BLOCK}.gate_up_proj_scales"][2, 7, 1] = 255  # up's fourth row
    source = write(tmp_path / "in", tensors, GPT_OSS, model_type="gpt_oss")
    with pytest.raises(CheckpointError, match=r"experts.2.up_proj.weight_scale in .*: 1 of 192 scales are NaN"):
        fp8x.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fp8x.convert(source, tmp_path / "out", allow_nonfinite=True)
    assert read(Reader(tmp_path / "out"), f"{BLOCK}.2.up_proj.weight_scale").view(np.uint8)[3, 1] == 255


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
@pytest.mark.parametrize("format", ["mxfp4", "mxfp4-pack-quantized"])
def test_codes_that_4_bits_do_not_hold(tmp_path, format):
    tensors = gpt_oss()
    source = write(tmp_path / "in", tensors, GPT_OSS, model_type="gpt_oss")
    fp8x.convert(source, tmp_path / "mxfp8")
    reader = Reader(tmp_path / "mxfp8")
    stored = reader.stored(f"{BLOCK}.1.up_proj.weight")
    with stored.file.open("r+b") as f:
        f.seek(stored.start + 65)
        f.write(bytes([0x31, 0x7E, 0xC9]))  # 0.5625, 448 and -4.5
    with pytest.raises(
        CheckpointError,
        match=r"1.up_proj.weight in .*: 3 of 6144 codes are none of e2m1's .*format='compressed-tensors'",
    ):
        fp8x.convert(tmp_path / "mxfp8", tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
@pytest.mark.parametrize(
    "recipe, format, error",
    [
        ("mxfp8_mxfp8_bf16", "mxfp4", "no activations in 8 bits"),
        ("e4m3_bf16", "mxfp4", "weights e4m3 1×· f32 are not in MX blocks"),
        ("e4m3_bf16", "mxfp4-pack-quantized", "weights e4m3 1×· f32 are not in MX blocks"),
    ],
)
def test_recipes_that_4_bits_do_not_hold(tmp_path, recipe, format, error):
    source = write(tmp_path / "in", gpt_oss(), GPT_OSS, model_type="gpt_oss")
    with pytest.raises(CheckpointError, match=error):
        fp8x.convert(source, tmp_path / "out", recipe, format)


def test_nothing_is_quantized_to_4_bits(tmp_path):
    tensors = {"a.up_proj.weight": np.ones((32, 32), np.float32)}
    source = write(tmp_path / "in", tensors, None)
    with pytest.raises(CheckpointError, match=r"a\.up_proj is not, and fp8x quantizes nothing to 4 bits"):
        fp8x.convert(source, tmp_path / "out", "mxfp8_bf16", "mxfp4-pack-quantized")
    fp8x.convert(source, tmp_path / "mxfp8", "mxfp8_bf16")
    with pytest.raises(CheckpointError, match=r"holds the experts of gpt-oss alone.*; a\.up_proj is not"):
        fp8x.convert(tmp_path / "mxfp8", tmp_path / "out", format="mxfp4")


@pytest.mark.filterwarnings("ignore:.*could not build this model:UserWarning")
def test_an_origin_that_says_something_else(tmp_path):
    source = write(tmp_path / "in", gpt_oss(), GPT_OSS, model_type="gpt_oss")
    fp8x.convert(source, tmp_path / "mxfp8")
    file = tmp_path / "mxfp8" / "fp8x_origin.json"
    for content, warning in (
        ("{", "is not JSON"),
        ('{"quantization_config": 3}', "quantization_config is 3, expected an object"),
        ('{"quantization_config": {}, "index": {"weight_map": {"a": "../a"}}}', "has no weight_map"),
        # Where it is, nobody looks for others.
        ('{"quantization_config": {}, "index": {"weight_map": {"a": "model.safetensors"}}}', "has no weight_map"),
    ):
        file.write_text(content)
        with pytest.warns(UserWarning, match=f"{warning}.*; it is not used"):
            plan = fp8x.plan(tmp_path / "mxfp8", format="mxfp4")
        assert plan.origin is None and plan.config["quantization_config"]["modules_to_not_convert"] == KEPT
    # Of another checkpoint: other tensors, other words.
    other = {"quantization_config": {"quant_method": "fp8"}, "index": {"weight_map": {"a": "b.safetensors"}}}
    file.write_text(json.dumps(other))
    fp8x.convert(tmp_path / "mxfp8", tmp_path / "back", format="mxfp4")
    assert [each.name for each in sorted((tmp_path / "back").iterdir())] == ["config.json", "model.safetensors"]
    # What is quantized anew is like the origin no more.
    assert "fp8x_origin.json" in fp8x.plan(tmp_path / "mxfp8", "bf16").companions.left


KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "mxfp8-quantized"},
        {"format": "mixed-precision"},
        {"ignore": ["lm_head", "model.layers.0.up_proj"]},
        {"kv_cache_scheme": None},
        {"quant_method": "mxfp4"},
    ],
)
def test_an_origin_whose_words_are_true_no_more(tmp_path, change):
    """Then the destination is described anew."""
    rng = np.random.default_rng(1)
    tensors: dict[str, np.ndarray] = {f"model.layers.0.self_attn.{x}_scale": np.ones(1, np.float32) for x in "kv"}
    tensors["model.layers.0.up_proj.weight_packed"] = rng.integers(0, 256, (96, 32), np.uint8)
    tensors["model.layers.0.up_proj.weight_scale"] = rng.integers(0, 255, (96, 2), np.uint8)
    stated = COMPRESSED | {"kv_cache_scheme": KV_CACHE}
    source = directory(tmp_path / "in", tensors, {"model_type": "any", "quantization_config": stated})
    fp8x.convert(source, tmp_path / "mxfp8")
    file = tmp_path / "mxfp8" / "fp8x_origin.json"
    said = json.loads(file.read_text())
    assert fp8x.plan(tmp_path / "mxfp8", format="mxfp4-pack-quantized").config["quantization_config"] == stated
    file.write_text(json.dumps(said | {"quantization_config": stated | change}))
    fp8x.convert(tmp_path / "mxfp8", tmp_path / "back", format="mxfp4-pack-quantized")
    written = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert written["format"] == "mxfp4-pack-quantized" and "experts" not in written["config_groups"]
    assert written["kv_cache_scheme"]["num_bits"] == 8 and "model.layers.0.up_proj" not in written["ignore"]
    assert contents(tmp_path / "back")["model.safetensors"] == contents(source)["model.safetensors"]


def test_an_origin_beside_other_blocks_stays_behind(tmp_path):
    source = write(tmp_path / "in", {"a.up_proj.weight": np.ones((128, 128), np.float32)}, None)
    fp8x.convert(source, tmp_path / "fp8", "fp8_e4m3fn_bf16_block_scale")
    (tmp_path / "fp8" / "fp8x_origin.json").write_text(json.dumps({"quantization_config": COMPRESSED, "index": None}))
    plan = fp8x.plan(tmp_path / "fp8", format="fp8")
    assert "fp8x_origin.json" in plan.companions.left and "fp8x_origin.json" not in plan.beside


def test_experts_of_another_kind_in_one_tensor(tmp_path):
    """DeepSeek-V4's, as transformers saves them: gate's rows come first."""
    rng = np.random.default_rng(3)
    packed, scales = rng.integers(0, 256, (2, 64, 16), np.uint8), rng.integers(100, 140, (2, 64, 1), np.uint8)
    tensors = {f"{BLOCK}.gate_up_proj": packed.view(np.int8), f"{BLOCK}.gate_up_proj_scale_inv": scales.view(E8M0)}
    reader = Reader(write(tmp_path / "in", tensors, {"quant_method": "fp8", "expert_dtype": "fp4"}))
    for e in range(2):
        for index, part in enumerate(("gate_proj", "up_proj")):
            rows = slice(32 * index, 32 * index + 32)
            codes = read(reader, f"{BLOCK}.{e}.{part}.weight").astype(np.float64)
            found = codes * np.exp2(scales[e, rows].astype(np.float64) - 127)
            assert found.tobytes() == values(packed[e, rows], scales[e, rows]).tobytes()
            assert read(reader, f"{BLOCK}.{e}.{part}.weight_scale_inv").tobytes() == scales[e, rows].tobytes()
    assert DTYPES["F8_E8M0"] == E8M0


@pytest.mark.parametrize("dtype, first, last", [("f32", 2, 252), ("bf16", 2, 252), ("f16", 104, 140)])
def test_what_16_and_32_bits_hold(tmp_path, dtype, first, last):
    """Exact wherever a normal number holds the scale's smallest code, and its largest; beyond, an error or an Inf."""
    rows = slice(first, last + 1)
    quantization = {"quant_method": "mxfp4"}
    arrays = {"a.weight": ALL_BYTES[rows].copy().view(np.int8), "a.scale": ALL_SCALES[rows].copy().view(E8M0)}
    fp8x.convert(write(tmp_path / "in", arrays, quantization), tmp_path / "out", dtype)
    found = read(Reader(tmp_path / "out"), "a.weight").astype(np.float64)
    assert found.tobytes() == values(ALL_BYTES, ALL_SCALES)[rows].tobytes()
    beyond = {"a.weight": ALL_BYTES[:8].view(np.int8), "a.scale": (ALL_SCALES[:8] + np.uint8(last + 1)).view(E8M0)}
    beyond["a.scale"][1:] = beyond["a.scale"][0]
    source = write(tmp_path / "beyond", beyond, quantization)
    with pytest.raises(CheckpointError, match=r"a.weight in .*: \d+ values or more are beyond the largest number of"):
        fp8x.convert(source, tmp_path / "no", dtype)
    fp8x.convert(source, tmp_path / "inf", dtype, allow_nonfinite=True)
    assert np.isinf(read(Reader(tmp_path / "inf"), "a.weight").astype(np.float64)).any()


def test_what_inspect_says(tmp_path):
    source = write(tmp_path / "in", gpt_oss(), GPT_OSS, model_type="gpt_oss")
    rows = {row.name: row for row in merge_experts(inspect(source).rows)}
    row = rows[f"{BLOCK}.*.up_proj.weight"]
    assert (row.stored_as, row.shape, row.bytes) == ("mxfp4", (3, 96, 64), 3 * 96 * (32 + 2))
    assert inspect(source).bytes == sum(array.nbytes for array in gpt_oss().values())


def test_deepseek_v4_says_no_more_that_experts_are_in_4_bits(tmp_path):
    packed, scale = ALL_BYTES[:64].view(np.int8), ALL_SCALES[100:164].view(E8M0)
    quantization = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
    }  # fmt: skip
    tensors = {
        "layers.0.ffn.experts.0.w1.weight": packed,
        "layers.0.ffn.experts.0.w1.scale": scale,
        "layers.0.attn.wkv.weight": np.ones((128, 256), ml_dtypes.float8_e4m3fn),
        "layers.0.attn.wkv.scale": np.full((1, 2), 120, np.uint8).view(E8M0),
        "layers.0.attn.attn_sink": np.ones(4, np.float32),
    }
    source = write(tmp_path / "in", tensors, quantization, model_type="deepseek_v4", expert_dtype="fp4")
    plan = fp8x.plan(source)
    assert plan.left_fields == {"expert_dtype": "experts are not in 4 bits any more, and vLLM would take them so"}
    fp8x.convert(plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "expert_dtype" not in config and config["quantization_config"]["format"] == "mixed-precision"
    reader = Reader(tmp_path / "out")
    found = of_reader(reader, "layers.0.ffn.experts.0.w1")
    assert found.tobytes() == values(ALL_BYTES[:64], ALL_SCALES[100:164]).tobytes()
    assert read(reader, "layers.0.attn.wkv.weight_scale").tolist() == [[2.0**-7, 2.0**-7]]
    # And all of it in blocks, in DeepSeek's own format.
    fp8x.convert(source, tmp_path / "blocks", "fp8_e4m3fn_bf16_block_scale", "fp8")
    exactness = inspect(tmp_path / "blocks", reference=source).exactness
    assert exactness.values == 64 * 512 + 128 * 256 and exactness.blocks == 4 + 2


@pytest.mark.parametrize("band", [1, 100, 1 << 19])
def test_gate_and_up_read_at_once(tmp_path, monkeypatch, band):
    """And what does not lie in turn one after the other."""
    monkeypatch.setattr("fp8x.checkpoint.views.BAND", band)
    tensors = gpt_oss()
    reader = Reader(write(tmp_path / "in", tensors, GPT_OSS, model_type="gpt_oss"))
    for names in (
        [f"{BLOCK}.2.gate_proj.weight", f"{BLOCK}.2.up_proj.weight"],
        [f"{BLOCK}.2.up_proj.weight", f"{BLOCK}.2.gate_proj.weight"],
        [f"{BLOCK}.1.up_proj.bias", f"{BLOCK}.1.gate_proj.bias"],
        [f"{BLOCK}.0.up_proj.weight", f"{BLOCK}.1.up_proj.weight"],
        [f"{BLOCK}.0.down_proj.weight", "model.layers.0.mlp.router.weight"],
        [f"{BLOCK}.0.down_proj.weight"],
    ):
        expected = [read(reader, name) for name in names]
        found = [np.empty_like(each) for each in expected]
        reader.read_together(names, found)
        assert [each.tobytes() for each in found] == [each.tobytes() for each in expected]
