"""`fp8x.plan`: what stays in 16 bits by default, and that `convert` does what was said."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import fp8x
from fp8x import RECIPES
from fp8x.checkpoint import Reader
from fp8x.checkpoint.plan import Plan
from fp8x.errors import CheckpointError, RecipeError

BF16 = np.dtype(ml_dtypes.bfloat16)
BLOCK, MX, CHANNEL = "fp8_e4m3fn_bf16_block_scale", "mxfp8_mxfp8_bf16", "e4m3_bf16"


def matrix(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(BF16)


def directory(path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None, **config):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"} | (metadata or {}))
    (path / "config.json").write_text(json.dumps({"model_type": "other", "torch_dtype": "bfloat16"} | config))
    return path


def stored(path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint; safetensors' own function for numpy knows no 8-bit floats."""
    reader, found = Reader(path), {}
    for name in reader:
        tensor = reader.stored(name)
        found[name] = reader.read(name, shapes=[tensor.shape], dtypes=[tensor.dtype])
    return found


def kept(plan: Plan) -> dict[str, str]:
    """The reason of each matrix that stays in 16 bits, by prefix."""
    return {prefix: target.reason for prefix, target in plan.targets.items() if target.recipe is None}


# By what makers of public FP8 checkpoints leave in 16 bits, and what they do not.
PARTS = {
    "model.language_model.layers.3.self_attn.q_proj": None,
    "model.language_model.layers.3.mlp.gate_proj": None,
    "transformer.h.0.mlp.c_fc": None,
    "thinker.model.layers.0.mlp.up_proj": None,
    "mtp.layers.0.self_attn.q_proj": None,
    "bert.encoder.layer.0.attention.output.dense": None,
    "model.layers.0.self_attn.indexer.wk": None,
    "rwkv.blocks.0.attention.output": None,
    "model.layers.0.self_attn.g_b_proj": None,
    "visual.blocks.7.mlp.fc1": "sees images",
    "model.vision_embed_tokenizer.proj": "sees images",
    "vision_model.encoder.layers.0.self_attn.k_proj": "sees images",
    "vpm.encoder.layers.0.mlp.fc1": "sees images",
    "audio_tower.layers.0.fc2": "hears or speaks",
    "code2wav.decoder.0.proj": "hears or speaks",
    "multi_modal_projector.linear_1": "leads into the language model",
    "model.connector.modality_projection.proj": "leads into the language model",
    "resampler.attn.out_proj": "leads into the language model",
    "mlp1.1": "leads into the language model",
    "qformer.encoder.layer.0.attention.attention.query": "leads into the language model",
    "language_projection": "leads into the language model",
    "lm_head": "a head",
    "score": "a head",
    "classifier.dense": "a head",
    "v_head.summary": "a head",
    "output": "a head",
    "language_model.output": "a head",
    "model.layers.61.shared_head.head": "a head",
    "model.layers.0.block_sparse_moe.router.layer": "a router",
    "model.layers.1.mlp.gate.wg": "a router",
    "model.layers.1.mlp.shared_expert_gate": "a router",
    "mtp.fc": "joins layers for multi-token prediction",
    "model.layers.61.eh_proj": "joins layers for multi-token prediction",
    "model.layers.0.linear_attn.in_proj_ba": "a recurrence's gates and steps",
    "model.layers.0.self_attn.b_proj": "a recurrence's gates and steps",
    "model.layers.0.self_attn.f_a_proj": "a recurrence's gates and steps",
    "base_model.layers.0.q_proj.lora_A.vision": "an adapter",
    "model.layers.0.mlp.router.classifier": "a router",
    "model.layers.0.altup.modality_router": "a router",
    "model.layers.0.per_layer_input_gate": "a narrow path beside the layers",
    "talker.hidden_projection.linear_fc1": "leads into the language model",
}  # fmt: skip


def test_what_practitioners_keep(tmp_path):
    source = directory(tmp_path / "a", {f"{name}.weight": matrix(32, 32) for name in PARTS})
    plan = fp8x.plan(source, CHANNEL)
    assert kept(plan) == {name: reason for name, reason in PARTS.items() if reason}
    # A rule overrides a default, and only there.
    again = fp8x.plan(source, CHANNEL, rules={r"visual\..*": MX, r"mtp\.layers\..*": None})
    assert again.targets["visual.blocks.7.mlp.fc1"].recipe == RECIPES[MX]
    assert kept(again)["mtp.layers.0.self_attn.q_proj"] == r"rule 'mtp\\.layers\\..*'"
    assert kept(again)["vpm.encoder.layers.0.mlp.fc1"] == "sees images"


def test_routers_are_known_by_their_shape_too(tmp_path):
    names = [f"model.layers.0.moe.experts.{e}.up.weight" for e in range(17)]
    tensors = dict.fromkeys(names, matrix(64, 32))
    tensors |= {f"model.layers.0.moe.{name}.weight": matrix(rows, 32) for name, rows in (("chooser", 17), ("in", 64))}
    plan = fp8x.plan(directory(tmp_path / "a", tensors), CHANNEL)
    assert kept(plan) == {"model.layers.0.moe.chooser": "a router: a row for each of 17 experts"}


@pytest.mark.parametrize("stored", [True, False])
def test_heads_are_known_by_the_vocabulary_too(tmp_path, stored):
    """Of a stored embedding, or as config.json has it; in layers nothing is a head."""
    tensors = {"layers.0.up.weight": matrix(1000, 32), "layers.0.down.weight": matrix(32, 1000)}
    tensors |= {"final.weight": matrix(1024, 32)}
    source = directory(tmp_path / "a", tensors | ({"tok_embeddings.weight": matrix(1000, 32)} if stored else {}))
    config = json.loads((source / "config.json").read_text()) | (
        {} if stored else {"vocab_size": 1000, "hidden_size": 32}
    )
    (source / "config.json").write_text(json.dumps(config))
    plan, table = fp8x.plan(source, CHANNEL), "tok_embeddings" if stored else "config.json"
    assert kept(plan) == {"final": f"taken for a head: its 1024 outputs are the vocabulary of {table}"}
    assert not kept(fp8x.plan(source, CHANNEL, rules={"final": CHANNEL}))


def test_narrow_matrices_stay(tmp_path):
    # Gemma 3n's, and one that is just wide enough.
    tensors = {"prediction_coefs.weight": matrix(16, 4), "a.weight": matrix(16, 16)}
    plan = fp8x.plan(directory(tmp_path / "a", tensors), CHANNEL)
    assert kept(plan) == {"prediction_coefs": "fewer than 16 columns"}


def test_lists_of_embeddings_are_no_matrices(tmp_path):
    # Qwen3-Omni's talker, MusicGen's decoder.
    names = ["talker.code_predictor.model.codec_embedding.0", "decoder.model.decoder.embed_tokens.3"]
    tensors = {f"{name}.weight": matrix(32, 32) for name in (*names, "embedder.layers.0")}
    plan = fp8x.plan(directory(tmp_path / "a", tensors), CHANNEL)
    assert list(plan.targets) == ["embedder.layers.0"]
    assert {row.name: row.reason for row in plan.rows if row.reason} == {
        f"{name}.weight": "a lookup table or a norm" for name in names
    }


def test_projections_of_embeddings_are_matrices(tmp_path):
    # Gemma 3n's, which are linear layers: others would look for their scales if `ignore` did not name them.
    name = "model.embed_vision.embedding_projection"
    source = directory(tmp_path / "a", {f"{name}.weight": matrix(32, 32), "layers.0.up.weight": matrix(32, 32)})
    plan = fp8x.plan(source, CHANNEL)
    assert kept(plan) == {name: "sees images"}
    ignored = plan.config["quantization_config"]["ignore"]
    assert any(re.match(entry.removeprefix("re:"), name) for entry in ignored)


def test_whole_experts_are_ignored_by_name(tmp_path):
    # gpt-oss and DBRX; what vLLM's layer of experts asks for, by its own name and by those of its first matrices.
    experts = {
        "layers.0.mlp.experts.gate_up_proj": matrix(2, 32, 64),
        "layers.0.mlp.experts.gate_up_proj_bias": matrix(2, 64),
        "layers.0.mlp.experts.down_proj": matrix(2, 32, 32),
        "blocks.0.ffn.experts.mlp.w1": matrix(64, 32),
    }
    source = directory(tmp_path / "a", experts | {"layers.0.q_proj.weight": matrix(32, 32)})
    names = ["layers.0.mlp.experts", "layers.0.mlp.experts.0.up_proj", "blocks.0.ffn.experts"]
    fields = fp8x.plan(source, CHANNEL).config["quantization_config"]
    patterns = [entry.removeprefix("re:") for entry in fields["ignore"]]
    assert all(any(re.match(pattern, name) for pattern in patterns) for name in names)
    assert not any(re.match(pattern, "layers.0.q_proj") for pattern in patterns)
    fields = fp8x.plan(source, "fp8_e4m3fn_bf16_block_scale", "fp8").config["quantization_config"]
    assert set(names) < set(fields["modules_to_not_convert"])
    # Where experts are quantized one by one, they are not.
    one = {f"layers.0.mlp.experts.0.{name}.weight": matrix(32, 32) for name in ("gate_proj", "up_proj", "down_proj")}
    assert fp8x.plan(directory(tmp_path / "b", one), CHANNEL).config["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize("parent", ["", "transformer."])
def test_matrices_of_gpt2_lie_as_k_n(tmp_path, parent):
    shapes = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
    tensors = {f"{parent}h.0.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    # StarCoder's have the same names, and are those of linear layers.
    tensors |= {f"other.h.0.{name}.weight": matrix(*shape[::-1]) for name, shape in shapes.items()}
    plan = fp8x.plan(directory(tmp_path / "a", tensors), CHANNEL)
    reason = "lies as [K, N], of GPT-2's Conv1D, which readers count as no linear layer"
    assert kept(plan) == {f"{parent}h.0.{name}": reason for name in shapes}


def test_a_known_family_under_other_names(tmp_path):
    # Qwen3-Embedding says ForCausalLM, and holds what is inside of `model`.
    config = json.loads((Path(__file__).parents[1] / "goldens" / "llama" / "config.json").read_text())
    tensors = {"layers.0.self_attn.q_proj.weight": matrix(32, 32), "embed_tokens.weight": matrix(64, 32)}
    source = directory(tmp_path / "a", tensors, **config)
    with pytest.warns(UserWarning, match="could not build this model .* its matrices go by their own names"):
        plan = fp8x.plan(source, CHANNEL)
    assert [prefix for prefix, target in plan.targets.items() if target.recipe] == ["layers.0.self_attn.q_proj"]
    # Where some are there, others are missing.
    source = directory(tmp_path / "b", {f"model.{name}": tensor for name, tensor in tensors.items()}, **config)
    with pytest.raises(CheckpointError, match=r"missing, which config\.json calls for"):
        fp8x.plan(source, CHANNEL)


def test_scales_of_transposed_experts_are_refused_by_name(tmp_path):
    # Llama-4 in fbgemm_fp8.
    codes = matrix(2, 32, 64).astype(ml_dtypes.float8_e4m3fn)
    tensors = {"feed_forward.experts.gate_up_proj": codes, "feed_forward.experts.down_proj": codes[:, :, :32]}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    tensors |= {f"{name}_scale": np.ones((2, 1, tensor.shape[2]), np.float32) for name, tensor in tensors.items()}
    source = directory(tmp_path / "a", tensors, quantization_config={"quant_method": "fbgemm_fp8"})
    with pytest.raises(
        CheckpointError, match=r"experts\.\w+_proj_scale in .*: scales of experts that lie as \[E, K, N\]"
    ):
        fp8x.plan(source)


def test_a_classifier_of_a_known_family(tmp_path):
    config = json.loads((Path(__file__).parents[1] / "goldens" / "llama" / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    tensors = {"model.layers.0.self_attn.q_proj.weight": matrix(32, 32), "score.weight": matrix(2, 32)}
    plan = fp8x.plan(directory(tmp_path / "a", tensors, **config), CHANNEL)
    assert kept(plan) == {"score": "a head"}


def blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In e4m3, with one float32 scale: a block of 128 holds all of it."""
    scale = np.float32(np.abs(weight.astype(np.float32)).max() / 448)
    return (weight.astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn), np.full((1, 1), scale, np.float32)


BLOCK_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def block_checkpoint(path, **config):
    codes, scale = blocks(matrix(64, 128))
    tensors = {f"layers.0.up.weight{suffix}": value for suffix, value in (("", codes), ("_scale_inv", scale))}
    tensors |= {"layers.0.indexer.wk.weight": matrix(32, 128), "layers.0.norm.weight": matrix(128)}
    return directory(path, tensors, {"made_by": "someone"}, quantization_config=BLOCK_CONFIG | config)


def test_what_was_in_16_bits_stays_so(tmp_path):
    source = block_checkpoint(tmp_path / "a")
    assert kept(fp8x.plan(source, MX)) == {"layers.0.indexer.wk": "in 16 or 32 bits in the source"}
    # Also where nothing else changes, or recipes are chosen.
    for plan in (fp8x.plan(source), fp8x.plan(source, requantize=CHANNEL)):
        assert kept(plan) == {"layers.0.indexer.wk": "in 16 or 32 bits in the source"}
    plan = fp8x.plan(source, MX, rules={r".*\.wk": MX})
    assert kept(plan) == {}
    # From 16 bits there is no such maker.
    fp8x.convert(source, tmp_path / "b", "bf16")
    assert kept(fp8x.plan(tmp_path / "b", MX)) == {}


@pytest.mark.parametrize("also_above", [False, True])
def test_a_quantization_config_of_the_language_model(tmp_path, also_above):
    # As in Kimi-K2.5. Where others would still find it, a checkpoint in 16 bits may not keep it.
    inner = {"text_config": {"hidden_size": 128, "quantization_config": BLOCK_CONFIG}}
    above = {"quantization_config": BLOCK_CONFIG if also_above else None}
    source = block_checkpoint(tmp_path / "a")
    before = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(before | inner | above))
    plan = fp8x.plan(source, "bf16")
    assert plan.source_format.name == "fp8"
    assert plan.config["text_config"] == {"hidden_size": 128} and "quantization_config" not in plan.config
    fp8x.convert(plan, tmp_path / "b")
    assert str(stored(tmp_path / "b")["layers.0.up.weight"].dtype) == "bfloat16"


@pytest.mark.parametrize("code", [CHANNEL, "bf16"])
def test_8_bits_that_config_json_does_not_speak_of(tmp_path, code):
    source = block_checkpoint(tmp_path / "a")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.up\.weight in .*: is F8_E4M3, but config\.json has no quant"
    ):
        fp8x.plan(source, code)


def test_a_model_type_that_is_none(tmp_path):
    source = directory(tmp_path / "a", {"up.weight": matrix(32, 32)}, model_type=["llama"])
    assert kept(fp8x.plan(source, CHANNEL)) == {}


@pytest.mark.parametrize("code", [CHANNEL, MX, BLOCK, "bf16", None])
def test_convert_does_what_the_plan_says(tmp_path, code):
    source = block_checkpoint(tmp_path / "a")
    plan = fp8x.plan(source, code)
    sizes = {name: array.nbytes for name, array in stored(source).items()}
    assert plan.bytes_before == sum(sizes.values())
    done = fp8x.convert(plan, tmp_path / "b")
    written = stored(tmp_path / "b")
    assert done.plan is plan
    assert plan.bytes_after == done.bytes_written == sum(array.nbytes for array in written.values())
    names = {"F8_E4M3": "float8_e4m3fn", "BF16": "bfloat16"}
    for row in plan.rows:
        expected = "float8_e4m3fn" if isinstance(row.after, fp8x.Scheme) else names[row.after.upper()]
        assert str(written[row.name].dtype) == expected
    assert sum(row.count for row in plan.groups) == len(plan.rows) == 3


def test_a_plan_prints_and_counts_alike_tensors_once(tmp_path):
    tensors = {f"layers.{i}.{name}.weight": matrix(64, 32) for i in range(12) for name in ("up", "lm_head")}
    plan = fp8x.plan(directory(tmp_path / "a", tensors), CHANNEL)
    up, head = sorted(plan.groups, key=lambda row: row.name, reverse=True)
    # 64 · 32 codes, and 64 float32 scales.
    assert (up.name, up.count, up.shape, up.before, str(up.after)) == (
        "layers.*.up.weight",
        12,
        (64, 32),
        "bf16",
        "e4m3 1×· f32",
    )
    assert (up.bytes_before, up.bytes_after) == (12 * 4096, 12 * (2048 + 256))
    assert (head.after, head.reason) == ("bf16", "a head")
    assert "12 × layers.*.lm_head.weight 64×32: bf16 → bf16, 49,152 → 49,152 bytes (a head)" in str(plan)
    found = json.loads(json.dumps(plan.to_json()))
    assert [group["after"] for group in found["groups"]] == ["bf16", "e4m3 1×· f32"]


def test_a_plan_says_everything(tmp_path):
    plan = fp8x.plan(block_checkpoint(tmp_path / "a"))
    with pytest.raises(RecipeError, match="recipe: stands beside a plan, which says it already"):
        fp8x.convert(plan, tmp_path / "b", CHANNEL)


def test_fields_that_are_left_out_are_named(tmp_path):
    source = block_checkpoint(tmp_path / "a", maker={"name": "x"}, notes=None, extra=1)
    # Of the same format what fp8x does not know stays.
    plan = fp8x.plan(source, format="fp8")
    assert list(plan.left_fields) == ["__metadata__.made_by"]
    fp8x.convert(plan, tmp_path / "same")
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    assert config["quantization_config"].items() >= {"maker": {"name": "x"}, "extra": 1}.items()
    plan = fp8x.plan(source, MX)
    assert set(plan.left_fields) == {"__metadata__.made_by", *(f"quantization_config.{k}" for k in ("maker", "extra"))}
    assert "does not know it, to write it as compressed-tensors" in plan.left_fields["quantization_config.extra"]
    assert "is not quantized" in fp8x.plan(source, "bf16").left_fields["quantization_config.extra"]


def test_fields_of_config_json_stay(tmp_path):
    own = {"vision_config": {"depth": 2}, "something": [1, None], "rope_scaling": None}
    source = directory(tmp_path / "a", {"up.weight": matrix(32, 32)}, **own)
    fp8x.convert(source, tmp_path / "b", CHANNEL)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert after.pop("quantization_config") and after == before


def test_files_that_come_along_and_files_that_do_not(tmp_path):
    source = block_checkpoint(tmp_path / "a")
    along = ("tokenizer.model", "README.md", "LICENSE", "video_preprocessor_config.json", "1_Pooling/config.json",
             "chat_template.jinja", "modeling_own.py", "model.safetensors.txt")  # fmt: skip
    left = {
        "pytorch_model.bin": "weights that", "consolidated.safetensors": "weights that", "onnx/model.onnx": "weights",
        "pytorch_model.bin.index.json": "the index", ".gitattributes": "hidden", "calibration.json": "found for",
        "figure.png": "a Git LFS pointer",
    }  # fmt: skip
    for name in (*along, *left):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}" if name != "figure.png" else "version https://git-lfs.github.com/spec/v1\noid")
    (source / "old").symlink_to(tmp_path)
    plan = fp8x.plan(source)
    assert {str(file) for file in plan.companions.files} == set(along)
    assert plan.companions.left.keys() == {*left, "old"}
    assert all(
        plan.companions.left[name].startswith(left[name].split()[0]) or left[name] in plan.companions.left[name]
        for name in left
    )
    fp8x.convert(plan, tmp_path / "b")
    found = {str(path.relative_to(tmp_path / "b")) for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert found == {*along, "config.json", "model.safetensors"}


@pytest.mark.parametrize("listed", ['[{"idx": 2, "path": "2_Dense"}, {"idx": 0, "path": ""}]', "[]", "[1]", "no JSON"])
def test_layers_of_sentence_transformers(tmp_path, listed):
    # Whatever is beside the model itself, like Mistral's second copy of it, is left behind all the same.
    source = directory(tmp_path / "a", {"layers.0.up.weight": matrix(32, 32)})
    (source / "modules.json").write_text(listed)
    (source / "2_Dense").mkdir()
    for name in ("2_Dense/model.safetensors", "2_Dense/config.json", "consolidated.safetensors"):
        (source / name).write_bytes(b"{}")
    found = fp8x.plan(source, CHANNEL).companions
    along = Path("2_Dense/model.safetensors")
    assert (along in found.files) == ("2_Dense" in listed) == (str(along) not in found.left)
    assert "consolidated.safetensors" in found.left


def test_a_cache_of_huggingface_hub(tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    snapshot = directory(cache / "snapshots" / "0123", {"up.weight": matrix(32, 32)})
    with pytest.raises(CheckpointError, match=f"in the cache of huggingface_hub; give {snapshot}"):
        fp8x.plan(cache, CHANNEL)


EXPERTS = "model.layers.0.feed_forward.experts"


def transposed(path, **more: np.ndarray):
    tensors = {f"{EXPERTS}.gate_up_proj": matrix(2, 48, 64), f"{EXPERTS}.down_proj": matrix(2, 32, 48), **more}
    return directory(path, tensors), tensors


@pytest.mark.sample
@pytest.mark.parametrize("code", [CHANNEL, BLOCK, "e5m2_e5m2_bf16"])
def test_experts_that_lie_transposed(tmp_path, code):
    source, tensors = transposed(tmp_path / "a")
    fp8x.convert(source, tmp_path / "b", code)
    written = stored(tmp_path / "b")
    gate_up, down = tensors.values()
    for e in range(2):
        expected = {"gate_proj": gate_up[e, :, :32].T, "up_proj": gate_up[e, :, 32:].T, "down_proj": down[e].T}
        for name, array in expected.items():
            q = fp8x.quantize(np.ascontiguousarray(array), RECIPES[code].weight)
            found = written[f"{EXPERTS}.{e}.{name}.weight"]
            assert found.tobytes() == np.asarray(q.data).tobytes()
    assert not any(name.endswith("gate_up_proj") for name in written)


def test_experts_of_which_none_is_quantized_stay_as_they_lie(tmp_path):
    source, tensors = transposed(tmp_path / "a", **{"model.layers.0.up.weight": matrix(32, 32)})
    plan = fp8x.plan(source, CHANNEL, rules={rf"{EXPERTS}\..*": None})
    fp8x.convert(plan, tmp_path / "b")
    with safe_open(tmp_path / "b" / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {*tensors, "model.layers.0.up.weight_scale"}
        for name in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"):
            assert file.get_tensor(name).tobytes() == tensors[name].tobytes()
    assert next(row.reason for row in plan.rows if row.name.endswith("down_proj")).startswith("rule ")
    # One expert alone: then all are written one by one.
    fp8x.convert(source, tmp_path / "c", CHANNEL, rules={rf"{EXPERTS}\.0\..*": None})
    written = stored(tmp_path / "c")
    assert written[f"{EXPERTS}.0.down_proj.weight"].tobytes() == tensors[f"{EXPERTS}.down_proj"][0].T.tobytes()
    assert written[f"{EXPERTS}.1.down_proj.weight"].dtype == ml_dtypes.float8_e4m3fn


def test_experts_of_uncertain_layout_are_named(tmp_path):
    tensors = {f"{EXPERTS}.gate_up_proj": matrix(2, 48, 64), f"{EXPERTS}.gate_up_proj_bias": matrix(2, 64)}
    source = directory(tmp_path / "a", tensors | {"up.weight": matrix(32, 32)})
    plan = fp8x.plan(source, CHANNEL)
    (row,) = [row for row in plan.rows if row.name == f"{EXPERTS}.gate_up_proj"]
    assert (row.after, row.reason) == (
        "bf16",
        "experts in one tensor, with biases; gate and up may alternate row by row",
    )


def test_8_bits_that_nothing_explains(tmp_path):
    codes, scale = blocks(matrix(64, 128))
    tensors = {"up.weight": codes, "up.weight_scale_inv": scale, "experts.packed.weight": np.stack([codes, codes])}
    source = directory(tmp_path / "a", tensors, quantization_config=BLOCK_CONFIG)
    with pytest.raises(CheckpointError, match=r"experts.packed.weight in .*: is in 8 bits, and fp8x does not know its"):
        fp8x.plan(source, MX)
    fp8x.convert(source, tmp_path / "b", format="fp8")  # as it is
    assert stored(tmp_path / "b")["experts.packed.weight"].tobytes() == codes.tobytes() * 2


def test_a_recipe_that_quantizes_nothing(tmp_path):
    source = directory(tmp_path / "a", {"score.weight": matrix(32, 32), "norm.weight": matrix(32)})
    with pytest.warns(UserWarning, match=r"nothing in it becomes 8 bits \(a vector or a number; a head\);"):
        assert fp8x.plan(source, CHANNEL).format is None
