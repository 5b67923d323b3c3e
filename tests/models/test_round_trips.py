"""Conversions lose nothing: every dialect into every format that holds it, and what does not come along is named.

Checkpoints are read here without fp8x: header, bytes, and numbers by ml_dtypes.
"""

import fnmatch
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fp8x
from fp8x.checkpoint.plan import Plan
from fp8x.errors import CheckpointError

GOLDENS = Path(__file__).parents[1] / "goldens" / "fp8"
Tensor = tuple[str, tuple[int, ...], bytes]  # safetensors' dtype, shape, bytes
Tensors = dict[str, Tensor]
NUMPY = {
    "F64": "f8",
    "F32": "f4",
    "BF16": ml_dtypes.bfloat16,
    "F16": "f2",
    "U8": ml_dtypes.float8_e8m0fnu,  # of scales
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
CT, FP8, MODELOPT = "compressed-tensors", "fp8", "modelopt"
# Every dialect, and the formats that hold its recipes.
HELD = {
    "compressed_tensors_channel": (CT, MODELOPT),
    "compressed_tensors_mxfp8": (CT,),
    "fbgemm_fp8": (CT, MODELOPT),
    "fp8_block_ragged": (CT, FP8),
    "fp8_tensor": (CT, FP8, MODELOPT),
    "hf_block": (CT, FP8),
    "hf_block_fused_ue8m0": (CT, FP8),
    "hf_block_static": (CT, FP8),
    "hf_tensor_fused_static": (CT, FP8, MODELOPT),
    "modelopt_fp8": (CT, FP8, MODELOPT),
    "modelopt_mixed": (CT,),
    "modelopt_mxfp8": (CT, MODELOPT),
    "mxfp8": (CT, MODELOPT),
    "quark_fp8_kv": (CT, FP8, MODELOPT),
    "quark_mxfp8": (CT, MODELOPT),
    "quark_per_channel": (CT,),
    "torchao_mixed": (CT,),
    "torchao_mxfp8": (CT, MODELOPT),
    "torchao_row": (CT, MODELOPT),
}
WRITABLE = {name: format for name, formats in HELD.items() for format in formats if name.startswith(
    {CT: "compressed_tensors", FP8: ("fp8", "hf_"), MODELOPT: "modelopt"}[format])}  # fmt: skip

BF16 = np.dtype(ml_dtypes.bfloat16)
STRANGE = {
    "extra.vector": np.arange(3, dtype="f4"),
    "extra.cube.weight": np.arange(24, dtype="f4").astype(BF16).reshape(2, 3, 4),
    "extra.ints": np.arange(4).reshape(2, 2),
    "extra.double": np.array([1 / 3, 2e300]),
    "extra.flags": np.array([True, False, True]),
    "extra.empty": np.empty(0, "f4"),
    "extra.empty_matrix.weight": np.empty((0, 32), BF16),
    "model.layers.9.odd näme/[1]* ²\n.weight": np.ones((16, 32), BF16),
    "model.layers.0.self_attn.o_proj.bias": np.ones(64, BF16),
    "model.layers.0.self_attn.q_scale": np.float32([2.0]),
}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "int64": "I64", "float64": "F64", "bool": "BOOL", "uint8": "U8",
          "float8_e4m3fn": "F8_E4M3", "int32": "I32"}  # fmt: skip

pytestmark = pytest.mark.filterwarnings(
    "ignore:config.json of a .* not read:UserWarning", "ignore:.* it bounds the amax:UserWarning"
)


def read(path: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(path.glob("model*.safetensors")):
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:begin]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found[name] = entry["dtype"], tuple(entry["shape"]), content[begin + start : begin + stop]
    return found


def write(file: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    header, data = {"__metadata__": metadata}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def as_tensor(array: np.ndarray) -> Tensor:
    return DTYPES[str(array.dtype)], array.shape, array.tobytes()


def numbers(tensor: Tensor) -> np.ndarray:
    dtype, _, content = tensor
    return np.frombuffer(content, NUMPY[dtype]).astype(np.float64)


def decorated(path: Path, golden: str, **more: np.ndarray) -> Path:
    """A checkpoint of another tool, with everything in it that nobody expects."""
    shutil.copytree(GOLDENS / golden, path)
    (path / "golden.safetensors").unlink()
    tensors, content = read(path), (path / "model.safetensors").read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    strange = {name: as_tensor(array) for name, array in (STRANGE | more).items()}
    write(path / "model.safetensors", tensors | strange, metadata | {"made_by": "someone"})
    for name in ("config.json", "hf_quant_config.json"):
        if (path / name).exists():
            config = json.loads((path / name).read_text())
            for planted in objects(config):
                planted["planted"] = {"in": [len(planted), {"a": None}]}
            (path / name).write_text(json.dumps(config))
    (path / "LICENSE").write_text("x")
    return path


# Whose keys are names of modules or groups: another key there would be one, too.
NAMES = ("config_groups", "quantized_layers", "layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config",
         "rope_parameters")  # fmt: skip


def objects(value: Any, key: str = "") -> Iterator[dict]:
    """Every object in a config in which a field may stand."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from objects(item, str(name))
    if isinstance(value, dict) and key not in NAMES:
        yield value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is no object."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


def config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def matrices(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor[0].startswith("F8_E4M3")}


def check_values(before: Tensors, after: Tensors) -> None:
    """Codes are the same bytes, scales the same numbers: by name, or somewhere among them where experts lay fused."""
    fused = [tensor for name, tensor in matrices(before).items() if len(tensor[1]) == 3]
    found = {name.replace("._weight_qdata", ".weight"): tensor for name, tensor in matrices(before).items()}
    for name, (dtype, shape, codes) in matrices(after).items():
        dtypes, contents = zip(*((t[0], t[2]) for t in ([found[name]] if name in found else fused)), strict=True)
        assert dtype in dtypes and any(codes in content for content in contents), name
        assert name not in found or shape == found[name][1]
    assert sum(len(t[2]) for t in matrices(after).values()) == sum(len(t[2]) for t in matrices(before).values())
    for kind in ("weight_scale", "input_scale", "k_scale", "v_scale"):
        before_, after_ = scales(before, kind), scales(after, kind)
        assert len(before_) == len(after_) and np.array_equal(before_, after_), kind


WORDS = {
    "weight_scale": ("weight_scale", "_weight_scale", "weight_scale_inv", "gate_up_proj_scale_inv",
                     "down_proj_scale_inv"),
    "input_scale": ("input_scale", "activation_scale", "gate_up_proj_activation_scale", "down_proj_activation_scale"),
    "k_scale": ("k_scale", "k_proj.output_scale"),
    "v_scale": ("v_scale", "v_proj.output_scale"),
}  # fmt: skip


def scales(tensors: Tensors, kind: str) -> np.ndarray:
    """All numbers of a kind, in order of size; one that gate and up share counts twice."""
    found = []
    for name, tensor in tensors.items():
        if name.endswith(tuple(f".{word}" for word in WORDS[kind])):
            one_for_both = name.endswith("gate_up_proj_activation_scale") or (
                name.endswith("gate_up_proj_scale_inv") and tensor[1][1:2] in ((), (1,))
            )
            if name.endswith("._weight_scale") and tensor[0] == "F8_E8M0":
                tensor = in_rows(tensor, tensors[name.removesuffix("scale") + "qdata"][1])
            found += [numbers(tensor)] * (2 if one_for_both else 1)
    return np.sort(np.concatenate(found)) if found else np.empty(0)


def in_rows(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """MX scales of a matrix `[N, K]` out of cuBLAS' tiles of 128×4, which are padded.

    https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout
    """
    dtype, (_, columns), content = tensor
    n, count = shape[0], shape[1] // 32
    row, column = np.mgrid[:n, :count]
    tile = row // 128 * (columns // 16) + column // 4
    offset = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    return dtype, (n, count), np.frombuffer(content, "u1")[offset].tobytes()


def check_named(plan: Plan, source: Path, result: Path) -> None:
    """Every tensor, planted field, word of a header and file is in the result, or is named."""
    before, after = read(source), read(result)
    rows = {row.name: row for row in plan.rows}
    read_with_matrix = tuple(f".{word}" for kind in ("weight_scale", "input_scale") for word in WORDS[kind])
    for name in before.keys() - after.keys():
        if (row := rows.get(name)) is not None and row.after is None:
            assert row.reason
        else:  # other names, and their numbers are compared
            moved = (*read_with_matrix, "_qdata", "experts.gate_up_proj", "experts.down_proj", ".mlp.gate.weight")
            assert name.endswith(moved), name
    for name, array in STRANGE.items():
        if name in after:
            assert after[name] == as_tensor(array), name
        else:
            assert rows[name].after is None and rows[name].reason
    here, there = dict(leaves(config(source))), dict(leaves(config(result)))
    for path, value in here.items():
        named = any(f"{path}.".startswith(f"{left}.") for left in plan.left_fields)
        known = path.startswith(("quantization_config", "compression_config")) and "planted" not in path
        moved = path.replace("compression_config", "quantization_config")
        named |= any(f"{moved}.".startswith(f"{left.partition('[')[0]}") for left in plan.left_fields)
        assert there.get(path, there.get(moved, ...)) == value or named or known, path
    assert "__metadata__.made_by" in plan.left_fields
    files = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    missing = {file for file in files if not (result / file).exists() and not file.endswith(".safetensors")}
    assert missing <= set(plan.companions.left)
    json.dumps(plan.to_json())
    assert all(field in str(plan) for field in plan.left_fields)


@pytest.mark.parametrize(("golden", "format"), [(name, format) for name, formats in HELD.items() for format in formats])
def test_every_dialect_into_every_format(tmp_path, golden, format):
    source = decorated(tmp_path / "a", golden)
    plan = fp8x.plan(source, format=format)
    fp8x.convert(plan, tmp_path / "b")
    check_values(read(source), read(tmp_path / "b"))
    check_named(plan, source, tmp_path / "b")
    if golden in WRITABLE:  # and back: what comes from `a` at once
        back = WRITABLE[golden]
        fp8x.convert(source, tmp_path / "direct", format=back)
        fp8x.convert(tmp_path / "b", tmp_path / "back", format=back)
        assert read(tmp_path / "back") == read(tmp_path / "direct")
        ours, theirs = config(tmp_path / "back"), config(tmp_path / "direct")
        planted = theirs["quantization_config"]
        for field in set(planted) - set(ours["quantization_config"]):
            assert f"quantization_config.{field}" in plan.left_fields
            del planted[field]
        assert ours == theirs


CODES = np.full((64, 64), 8, np.uint8).view(ml_dtypes.float8_e4m3fn)
BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}
ONE = np.ones((), "f4")


def directory(path: Path, arrays: dict[str, np.ndarray], quantization: dict | None = None, **fields) -> Path:
    path.mkdir()
    write(path / "model.safetensors", {name: as_tensor(array) for name, array in arrays.items()}, {"format": "pt"})
    fields = {"model_type": "other", "torch_dtype": "bfloat16"} | fields
    (path / "config.json").write_text(
        json.dumps(fields | ({"quantization_config": quantization} if quantization else {}))
    )
    return path


def left_out(plan: Plan) -> dict[str, str | None]:
    return {row.name: row.reason for row in plan.rows if row.after is None}


IN_BLOCKS = {"up.weight": CODES, "up.weight_scale_inv": np.ones((1, 1), "f4")}


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("input_scale", ONE, "activations are not static in the source"),
        ("activation_scale", ONE, "activations are not static in the source"),
        ("weight_shape", np.array([64, 64]), "the matrix has its own shape"),
        ("weight_zero_point", np.zeros((1, 1), "f4"), "all zero points are 0"),
        ("weight_g_idx", np.zeros(64, np.int32), "columns lie in the order of their scales"),
        ("weight_g_idx", np.full(64, -1, np.int32), "columns lie in the order of their scales"),
        ("input_global_scale", ONE, "all factors are 1"),
    ],
)
def test_what_means_nothing_beside_a_matrix_is_left_out(tmp_path, name, array, reason):
    source = directory(tmp_path / "a", IN_BLOCKS | {f"up.{name}": array}, BLOCK)
    for format in (CT, FP8):
        plan = fp8x.plan(source, format=format)
        assert left_out(plan) == {f"up.{name}": reason}
        fp8x.convert(plan, tmp_path / format)
        assert f"up.{name}" not in read(tmp_path / format)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("weight_scale", ONE, r"stands beside up.weight_scale_inv; fp8x does not know which of them counts"),
        ("weight_zero_point", np.full((1, 1), 2.0, "f4"), "zero points other than 0"),
        ("weight_g_idx", np.arange(64, dtype=np.int32)[::-1].copy(), "columns in another order than their scales"),
        ("weight_global_scale", np.full(1, 2.0, "f4"), "further factors of its values"),
        ("pre_quant_scale", np.full(64, 0.5, "f4"), "further factors of its values"),
    ],
)
def test_what_changes_a_matrix_unread_is_refused(tmp_path, name, array, message):
    source = directory(tmp_path / "a", IN_BLOCKS | {f"up.{name}": array}, BLOCK)
    for code in (None, "bf16", "e4m3_bf16"):
        with pytest.raises(CheckpointError, match=rf"up.{name} in .*: .*{message}"):
            fp8x.plan(source, code)


def test_static_scales_that_nobody_uses_any_more(tmp_path):
    arrays = {"up.weight": CODES, "up.weight_scale": ONE, "up.input_scale": ONE * 2}
    source = directory(tmp_path / "a", arrays, TENSOR)
    assert left_out(fp8x.plan(source, format=CT)) == {}
    name, anymore = "up.input_scale", "activations are not quantized any more"
    assert left_out(fp8x.plan(source, "bf16")) == left_out(fp8x.plan(source, "e4m3_bf16")) == {name: anymore}
    plan = fp8x.plan(source, "mxfp8_mxfp8_bf16")
    assert left_out(plan) == {name: "activations become dynamic"}
    assert plan.bytes_before == 64 * 64 + 4 + 4


def test_no_name_is_written_twice(tmp_path):
    arrays = {"up.weight": np.ones((64, 64), BF16), "up.weight_scale": ONE}
    source = directory(tmp_path / "a", arrays)
    message = r"up.weight_scale: would be written twice, as part of up.weight, as compressed-tensors stores it, and as"
    with pytest.raises(CheckpointError, match=message):
        fp8x.convert(source, tmp_path / "b", "e4m3_bf16")
    fp8x.convert(source, tmp_path / "c")
    assert read(tmp_path / "c") == read(source)


def test_8_bits_without_a_word_are_no_16_bits(tmp_path):
    source = directory(tmp_path / "a", {"up.weight": CODES, "up.weight_scale": ONE})
    with pytest.raises(CheckpointError, match=r"up.weight in .*: is F8_E4M3, but config.json has no"):
        fp8x.plan(source, "bf16")
    fp8x.convert(source, tmp_path / "b")
    assert read(tmp_path / "b") == read(source)


@pytest.mark.parametrize("named", [(), ("dtype",), ("dtype", "torch_dtype")])
def test_config_json_names_the_type_of_the_result(tmp_path, named):
    source = directory(tmp_path / "a", IN_BLOCKS, BLOCK)
    fields = {"model_type": "other", "quantization_config": BLOCK} | dict.fromkeys(named, "bfloat16")
    (source / "config.json").write_text(json.dumps(fields))
    fp8x.convert(source, tmp_path / "b", "f16")
    assert config(tmp_path / "b") == {"model_type": "other"} | dict.fromkeys(named or ["dtype"], "float16")
    assert read(tmp_path / "b")["up.weight"][0] == "F16"
    fp8x.convert(source, tmp_path / "c", "bf16")
    assert config(tmp_path / "c") == {"model_type": "other"} | dict.fromkeys(named, "bfloat16")


def test_words_of_an_index_and_what_says_the_same_twice(tmp_path):
    """A snapshot of the hub's cache: links to blobs, in two files."""
    blobs, source = tmp_path / "blobs", tmp_path / "snapshots" / "a"
    blobs.mkdir(), source.mkdir(parents=True)
    shards = {
        f"model-{i}-of-2.safetensors": {f"layers.{i}.up.weight": as_tensor(np.ones((32, 32), BF16))} for i in (1, 2)
    }
    for file, tensors in shards.items():
        write(blobs / file, tensors, {"format": "mlx", "origin": file})
    index = {
        "metadata": {"total_size": 4096, "total_parameters": 2048},
        "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
        "comment": "x",
    }
    own = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}, "ignore": []}
    own |= {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}}
    fields = {"model_type": "other", "quantization_config": own, "compression_config": {"format": "other"}}
    texts = {"model.safetensors.index.json": index, "config.json": fields, "hf_quant_config.json": {"quantization": {}}}
    for name, text in texts.items():
        (blobs / name).write_text(json.dumps(text))
    for blob in blobs.iterdir():
        (source / blob.name).symlink_to(blob)
    plan = fp8x.plan(source, "e4m3_bf16")
    fp8x.convert(plan, tmp_path / "b")
    assert set(plan.left_fields) == {
        "compression_config",
        "model.safetensors.index.json.comment",
        "model.safetensors.index.json.metadata.total_parameters",
        "__metadata__.format",
        "__metadata__.origin",
    }
    assert plan.companions.left == {
        "hf_quant_config.json": "quantization_config says how the source is quantized, and counts"
    }
    shutil.copyfile(source / "model-1-of-2.safetensors", source / "model.safetensors")
    left = fp8x.plan(source, "e4m3_bf16").companions.left
    assert left["model.safetensors.index.json"] == "model.safetensors holds everything"
    assert left["model-2-of-2.safetensors"].startswith("weights that")


def test_a_kv_cache_of_an_unknown_kind(tmp_path):
    arrays = IN_BLOCKS | {"self_attn.k_scale": ONE, "self_attn.v_scale": ONE}
    source = directory(tmp_path / "a", arrays, BLOCK | {"kv_cache_scheme": {"type": "int", "num_bits": 8}})
    for format in (CT, FP8):
        with pytest.warns(UserWarning, match="keys and values stay in the model's type"):
            plan = fp8x.plan(source, format=format)
        assert "quantization_config.kv_cache_scheme" in plan.left_fields
        assert set(left_out(plan).values()) == {"of a KV cache that fp8x does not know"}
        fp8x.convert(plan, tmp_path / format)
        assert config(tmp_path / format)["quantization_config"].get("kv_cache_scheme") is None


def test_a_kv_cache_alone_stays_where_nothing_changes(tmp_path):
    arrays = {"up.weight": np.ones((64, 64), BF16), "self_attn.k_scale": ONE[None] * 3, "self_attn.v_scale": ONE[None]}
    source = directory(tmp_path / "a", arrays)
    fp8x.convert(source, tmp_path / "b", format=CT)
    fp8x.convert(tmp_path / "b", tmp_path / "c")
    assert read(tmp_path / "c") == read(tmp_path / "b") == read(source)
    assert config(tmp_path / "c") == config(tmp_path / "b")


def test_experts_that_stay_whole_are_listed_as_not_quantized(tmp_path):
    experts = "model.layers.0.mlp.experts"
    arrays = {
        f"{experts}.gate_up_proj": np.ones((2, 32, 64), BF16),
        f"{experts}.gate_up_proj_bias": np.ones((2, 64), BF16),
        "model.layers.0.up.weight": np.ones((64, 64), BF16),
    }
    source = directory(tmp_path / "a", arrays)
    fp8x.convert(source, tmp_path / "b", "e4m3_e4m3_bf16_dynamic", MODELOPT)
    ignored = config(tmp_path / "b")["quantization_config"]["ignore"]
    asked = ["lm_head", experts, f"{experts}.0.gate_proj"]  # by vLLM
    assert all(any(fnmatch.fnmatchcase(name, entry) for entry in ignored) for name in asked)
    assert not any(fnmatch.fnmatchcase("model.layers.0.up", entry) for entry in ignored)


def test_zeros_that_are_stored_like_all_else(tmp_path):
    arrays = {"up.weight": CODES, "up.weight_scale": np.ones((64, 1), "f4")}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    stated = {"quant_method": CT, "format": "float-quantized", "config_groups": {"group_0": group}}
    dense = {"format": "dense", "global_sparsity": 0.14, "registry_requires_subclass": False}
    source = directory(tmp_path / "a", arrays, stated | {"sparsity_config": dense})
    assert "quantization_config.sparsity_config" in fp8x.plan(source, "bf16").left_fields
    fp8x.convert(source, tmp_path / "b")
    assert config(tmp_path / "b")["quantization_config"]["sparsity_config"] == dense
    sparse = directory(tmp_path / "c", arrays, stated | {"sparsity_config": {"format": "sparse-24-bitmask"}})
    with pytest.raises(CheckpointError, match=r"sparsity_config is .*, expected none"):
        fp8x.plan(sparse)
