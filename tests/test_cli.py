"""The `fp8x` command, on a tiny random checkpoint."""

import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, processors
from tokenizers import models as tokenizer_models
from typer.testing import CliRunner

import fp8x
from fp8x import models
from fp8x.checkpoint import Reader
from fp8x.cli import app
from fp8x.cli.generate import Text
from fp8x.cli.loading import read_texts
from fp8x.errors import DataError

STATIC, DYNAMIC = "e4m3_e4m3_bf16", "e4m3_e4m3_bf16_dynamic"
TEXTS = [f"Document {i}: the quick brown fox jumps over the lazy dog." for i in range(12)]


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exit_code != code and result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def read_json(*arguments):
    """What a command prints with --json: one document, nothing else."""
    return json.loads(invoke(*arguments, "--json").stdout)


def error(*arguments):
    """The one line that a user's mistake ends in."""
    result = invoke(*arguments, code=2)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "static"
    invoke("quantize", tiny_checkpoint, path, "--recipe", STATIC, "--calibrate", texts)
    return path


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def test_version_and_help():
    assert invoke("--version").stdout.startswith("fp8x 0.")
    for name in ("quantize", "calibrate", "eval", "generate", "inspect", "recipes"):
        assert name in invoke("--help").stdout
        assert "$ fp8x" in invoke(name, "--help").stdout


def test_python_m():
    found = subprocess.run([sys.executable, "-m", "fp8x", "--version"], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("fp8x 0.")


def test_recipes():
    found = read_json("recipes")
    assert found[STATIC]["needs_calibration"] and not found["e5m2_e5m2_bf16"]["needs_calibration"]
    assert STATIC in invoke("recipes").stdout


def test_quantize_static(quantized, texts):
    config = json.loads((quantized / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    sidecar = json.loads((quantized / "calibration.json").read_text())
    assert sidecar["recipe"] == STATIC and sidecar["seed"] == 0 and sidecar["dataset"]["file"] == texts.name
    assert sidecar["tokens"] == sidecar["samples"] * 64 <= sum(len(text) + 1 for text in TEXTS)
    layer = sidecar["layers"]["layers.1.mlp.w13"]
    assert np.allclose(np.float32(layer["amax"]) / 448, layer["scale"]) and len(layer["tokens"]) == 4


def test_quantize_summary(tiny_checkpoint, tmp_path):
    arguments = (
        "quantize",
        tiny_checkpoint,
        tmp_path / "out",
        "--recipe",
        "mxfp8_bf16",
        "--rule",
        r"layers\.0\..*=none",
        "--verify",
    )
    found = read_json(*arguments)
    assert found["format"] == "compressed-tensors"
    assert found["bytes_after"] < found["bytes_before"]
    assert found["schemes"]["e4m3 1×32 e8m0"]["tensors"] == 16
    assert 25 < found["schemes"]["e4m3 1×32 e8m0"]["snr_db"] < 40
    assert found["bytes_per_second"] > 0 and found["bytes_resumed"] == 0
    assert "nothing" not in error(*arguments)  # the destination exists now


@pytest.mark.parametrize("recipe", ["e5m2_e5m2_bf16", "e5m2_e5m2_bf16_max_calibrate"])
def test_a_bare_cast_needs_no_data(tiny_checkpoint, tmp_path, recipe):
    assert read_json("quantize", tiny_checkpoint, tmp_path / "out", "--recipe", recipe)["format"] == "fp8"


def test_data_that_is_not_needed_is_left_out(tiny_checkpoint, tmp_path, texts):
    result = invoke("quantize", tiny_checkpoint, tmp_path / "out", "--recipe", "e4m3_bf16", "--calibrate", texts)
    assert "warning: --calibrate is not used" in result.stderr
    assert "e4m3 1×· f32" in result.stdout and not (tmp_path / "out" / "calibration.json").exists()


def test_calibrate(tiny_checkpoint, texts, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(texts.read_text() + "{\n" + texts.read_text() + json.dumps({"text": "x" * 2000}) + "\n")
    arguments = ("calibrate", tiny_checkpoint, data, "--recipe", STATIC + "_max_calibrate", "--min-tokens", 10**6)
    result = invoke(*arguments, "-o", tmp_path / "scales.json", "--document-rows", 2)
    assert "layers.0.self_attn.q_proj" in result.stdout
    assert "data.jsonl: line 13: not JSON" in result.stderr and "fewer than 1000000 tokens" in result.stderr
    assert "data.jsonl: 12 of 25 documents are copies of others" in result.stderr
    assert "data.jsonl: 256 rows of 64 tokens (16,384) were asked for, but the texts give 2," in result.stderr
    assert "data.jsonl: one document ('xxxx" in result.stderr and "too few or too short for 256 rows" in result.stderr
    written = json.loads((tmp_path / "scales.json").read_text())
    assert (written["length"], written["document_rows"]) == (64, 2)
    result = invoke(*arguments, "--num-samples", 5, "--json", "-o", tmp_path / "scales.json")
    assert "were asked for" not in result.stderr and "one document" not in result.stderr
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "scales.json").read_text()) | {"malformed": 1}
    assert (printed["samples"], printed["tokens"], printed["document_rows"]) == (5, 320, 1)
    assert printed["rows_sha256"] != written["rows_sha256"]


def test_malformed_lines_are_counted_and_named(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n' + "{\n" * 12)
    assert read_texts(path, list_malformed=False) == (["good"], 12)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and "2 more are malformed; skipped (--list-malformed names all)" in lines[-1]
    assert read_texts(path, list_malformed=True) == (["good"], 12)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == [f"line {number}" for number in range(2, 14)]
    path.write_text("{\n")
    with pytest.raises(DataError, match="all 1 records are malformed"):
        read_texts(path, list_malformed=False)
    assert "line 1: not JSON" in capsys.readouterr().err


def test_quantize_dry_run(tiny_checkpoint, tmp_path):
    arguments = ("quantize", tiny_checkpoint, tmp_path / "out", "-r", DYNAMIC, "--dry-run")
    table = invoke(*arguments).stdout
    assert "model.layers.*.block_sparse_moe.gate.weight" in table and "a router" in table
    assert "nothing is written yet; about 1 s after JAX has started" in table
    found = read_json(*arguments)
    assert list(tmp_path.iterdir()) == []
    done = read_json(*arguments[:-1])
    assert found["expected_limit"] in ("reading", "computing", "writing") and found["requantized"] is None
    assert done["plan"] == {key: found[key] for key in found if key in done["plan"]}
    assert set(found) - set(done["plan"]) == {"expected_seconds", "expected_limit", "requantized"}
    assert (found["bytes_before"], found["bytes_after"]) == (done["bytes_before"], done["bytes_after"])


def test_quantize_names_exceptions(tiny_checkpoint, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    (source / "optimizer.pt").write_bytes(b"x")
    out = invoke("quantize", source, tmp_path / "out", "-r", DYNAMIC).stdout
    assert "in bf16 (a router): model.layers.*.block_sparse_moe.gate.weight" in out
    assert "files left behind (weights that the checkpoint does not count as its own): optimizer.pt" in out


def test_eval_side_by_side(tiny_checkpoint, quantized, texts):
    found = read_json("eval", tiny_checkpoint, quantized, "--data", texts, "--recipe", DYNAMIC)["results"]
    assert [r["recipe"] for r in found] == [None, None, DYNAMIC]
    assert found[0]["delta_percent"] == 0 and found[0]["bytes"] == sum(map(len, TEXTS))
    for result in found[1:]:
        assert abs(result["delta_percent"]) < 2 and result["delta_percent"] != 0
        assert result["model_bytes"] < found[0]["model_bytes"]


def test_eval_prints_markdown(tiny_checkpoint, texts):
    result = invoke("eval", tiny_checkpoint, "-d", texts, "--context", 16, "--markdown", "--calibrate", texts)
    lines = result.stdout.splitlines()
    assert "warning: --calibrate is not used: no --recipe has a calibrated scale" in result.stderr
    assert lines[0].startswith("| model | bits per byte |") and lines[2].startswith("| tiny | ") and len(lines) == 3


@pytest.mark.slow
def test_eval_all_calibrates(tiny_checkpoint, texts, monkeypatch):
    module = sys.modules["fp8x.recipe"]  # `fp8x.recipe` is the function
    monkeypatch.setattr(module, "RECIPES", {code: module.RECIPES[code] for code in (STATIC, STATIC + "_max_calibrate")})
    found = read_json("eval", tiny_checkpoint, "-d", texts, "--recipe", "all", "--calibrate", texts)
    assert (found["malformed"], found["calibration_malformed"]) == (0, 0)
    found = found["results"]
    assert [r["recipe"] for r in found] == [None, STATIC]
    assert abs(found[1]["delta_percent"]) < 2


def test_generate(quantized):
    arguments = ("generate", quantized, "The quick", "--max-new-tokens", 4)
    found = read_json(*arguments)
    assert len(found["ids"]) <= 4 and found["prompt"] == "The quick"
    assert invoke(*arguments).stdout == f"The quick{found['text']}\n"
    drawn = [read_json(*arguments, "--temperature", 5, "--seed", seed)["ids"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_generate_several(quantized, byte_tokenizer):
    arguments = ("generate", quantized, "The quick", "The", "-n", 8, "--cache-dtype", "e4m3")
    free = read_json(*arguments, "--stop", "no random text")
    assert [each["prompt"] for each in free] == ["The quick", "The"]
    # The texts are random bytes: one that is printable is a string to stop at.
    new = free[0]["ids"]
    place, string = next((i, c) for i, c in enumerate(map(byte_tokenizer.id_to_token, new)) if c.isascii())
    assert read_json(*arguments, "--stop", string)[0]["ids"] == new[: place + 1]
    expected = f"The quick{byte_tokenizer.decode(new[: place + 1])}\nThe"
    assert invoke(*arguments, "--stop", string).stdout.startswith(expected)


def test_words_as_they_come():
    """With SentencePiece's decoder, which drops a text's first space, and a character of two tokens."""
    vocab = {token: number for number, token in enumerate(["▁the", "▁end", "<0xC3>", "<0xA9>", "</s>"])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)

    def words(tokens, stops=()):
        text, shown = Text(tokenizer, [0], [4], [*stops], 5), []
        for token in tokens:
            text.add(token)
            shown.append(text.new_words())
        return [*shown, text.new_words(is_last=True)]

    assert words([1, 2, 3, 0]) == [" end", "", "é", " the", ""]
    assert words([1, 2]) == [" end", "", "\N{REPLACEMENT CHARACTER}"]
    assert words([1, 4, 4]) == [" end", "", "", ""]
    assert words([1, 2, 3, 0, 0], ["dé"]) == [" end", "", "é", "", "", ""]


@pytest.mark.slow
def test_chat(copy, byte_tokenizer):
    template = "{{ bos_token }}{% for each in messages %}[{{ each.role }}]{{ each.content }}{% endfor %}[model]"
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "bos_token": "<s>"}))
    # A post-processor that would write <s> once more.
    byte_tokenizer = Tokenizer.from_str(byte_tokenizer.to_str())
    byte_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    byte_tokenizer.save(str(copy / "tokenizer.json"))
    arguments = ("generate", copy, "Why?", "--chat", "--system", "Be brief.", "-n", 4)
    found = read_json(*arguments)
    assert invoke(*arguments).stdout == f"{found['text']}\n"
    ids = byte_tokenizer.encode("<s>[system]Be brief.[user]Why?[model]", add_special_tokens=False).ids
    texts = models.generate(fp8x.load(copy), [ids], max_new_tokens=4)
    assert texts[0, len(ids) :].tolist()[: len(found["ids"])] == found["ids"]
    assert "--system: is a message of a chat; add --chat" in error("generate", copy, "Why?", "--system", "x")


@pytest.mark.slow
def test_generate_ends_where_generation_config_says(copy):
    arguments = ("generate", copy, "The quick", "--max-new-tokens", 4)
    first = read_json(*arguments)["ids"][0]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, first]}))
    assert read_json(*arguments)["ids"] == []


def test_inspect(tiny_checkpoint, quantized, tmp_path):
    found = read_json("inspect", quantized, "--reference", tiny_checkpoint)
    rows = {row["name"]: row for row in found["tensors"]}
    assert found["format"] == "compressed-tensors" and len(rows) == 41
    row = rows["model.layers.0.block_sparse_moe.experts.3.w1.weight"]
    assert row["shape"] == [96, 64] and row["scheme"] == "e4m3 ·×· f32" and 25 < row["snr_db"] < 40
    assert row["bytes"] == 96 * 64 + 4 + 4
    assert rows["lm_head.weight"]["snr_db"] is None
    out = invoke("inspect", quantized, "--reference", tiny_checkpoint, "--plot", tmp_path / "plot.png").stdout
    assert " layers.0.block_sparse_moe.experts.*.w1 " in out and "4×96×64" in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_says_why_there_is_no_snr(tiny_checkpoint, quantized):
    assert "pass --reference" in invoke("inspect", quantized).stdout
    assert "--recipe CODE shows" in invoke("inspect", tiny_checkpoint).stdout
    assert " dB" in invoke("inspect", tiny_checkpoint, "--recipe", "mxfp8_bf16", "--all").stdout


def test_inspect_counts_what_is_not_finite(copy):
    set_tensor(copy, "lm_head.weight", lambda w: np.full_like(w, np.nan))
    assert "lm_head.weight: 16,512 of 16,512 values are NaN or Inf" in invoke("inspect", copy).stderr


def set_tensor(path, name, change):
    tensors = load_file(path / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def set_config(path, **fields):
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_unknown_recipe(tiny_checkpoint, tmp_path):
    assert "'e4m3_e4m3_bf61' is unknown; near it: e4m3_e4m3_bf16" in error(
        "quantize", tiny_checkpoint, tmp_path / "out", "--recipe", "e4m3_e4m3_bf61"
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (r"layers\.9\..*=none", r"layers\\.9\\..*' matches no module"),
        ("layers", "expected REGEX=CODE"),
        (".*=none", "nothing would be quantized"),
        ("(=none", "is not a regular expression"),
        (".*=nonne", "'nonne' is unknown"),
    ],
)
def test_bad_rules(tiny_checkpoint, tmp_path, rule, message):
    assert message in error("quantize", tiny_checkpoint, tmp_path / "out", "-r", DYNAMIC, "--rule", rule)


def test_static_without_data(tiny_checkpoint, tmp_path, texts):
    assert "pass --calibrate DATA.jsonl" in error("quantize", tiny_checkpoint, tmp_path / "out", "-r", STATIC)
    assert "pass --calibrate DATA.jsonl" in error("eval", tiny_checkpoint, "-d", texts, "-r", "all")
    assert "has no calibrated scale" in error("calibrate", tiny_checkpoint, texts, "-r", DYNAMIC)


def test_unknown_or_unfit_format(tiny_checkpoint, tmp_path):
    arguments = ("quantize", tiny_checkpoint, tmp_path / "out", "-r")
    assert "'gguf' is unknown" in error(*arguments, DYNAMIC, "--format", "gguf")
    assert "e5m2" in error(*arguments, "e5m2_e5m2_bf16", "--format", "compressed-tensors")


def test_an_existing_destination_stays(tiny_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert "exists and is not empty" in error("quantize", tiny_checkpoint, tmp_path / "out", "-r", DYNAMIC)
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_missing_directory(tmp_path, texts):
    absent = tmp_path / "absent"
    for arguments in (
        ("quantize", absent, tmp_path / "out", "-r", DYNAMIC),
        ("calibrate", absent, texts, "-r", STATIC),
        ("eval", absent, "-d", texts),
        ("generate", absent, "x"),
        ("inspect", absent),
    ):
        assert "absent" in error(*arguments)


def test_truncated_safetensors(copy, tmp_path):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors: is truncated" in error("quantize", copy, tmp_path / "out", "-r", DYNAMIC)
    assert "model.safetensors: is truncated" in error("inspect", copy)
    assert not (tmp_path / "out").exists()


def test_config_without_a_field(copy, texts, tmp_path):
    set_config(copy, num_attention_heads=None)
    """Matrices need none to be converted, but a model does."""
    done = invoke("quantize", copy, tmp_path / "out", "-r", DYNAMIC)
    assert done.stderr.count("warning: ") == 1 and "has no num_attention_heads" in done.stderr
    assert "num_attention_heads" in error("eval", copy, "--data", texts)


def test_nan_weights(copy, tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    set_tensor(copy, name, lambda w: np.where(np.arange(w.size).reshape(w.shape) == 5, jnp.nan, w).astype(w.dtype))
    message = error("quantize", copy, tmp_path / "out", "-r", DYNAMIC)
    assert name in message and "1 NaN or Inf" in message
    assert list(tmp_path.iterdir()) == [copy]
    invoke("quantize", copy, tmp_path / "out", "-r", DYNAMIC, "--allow-nonfinite")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "it is empty"), ("{}\n[", "all 2 records are malformed"), ("\0\0", "it is binary"), (None, "No such file")],
)
def test_bad_data(tiny_checkpoint, tmp_path, content, message):
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    for arguments in (
        ("quantize", tiny_checkpoint, tmp_path / "out", "-r", STATIC, "-c", data),
        ("calibrate", tiny_checkpoint, data, "-r", STATIC),
        ("eval", tiny_checkpoint, "-d", data),
    ):
        assert f"{data}: {message}" in error(*arguments)
    assert not (tmp_path / "out").exists()


def test_ids_of_another_model(tiny_checkpoint, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"ids": [5000]}\n')
    assert "token id 5000, beyond the model's vocab_size 258" in error("calibrate", tiny_checkpoint, data, "-r", STATIC)
    assert "needs its text" in error("eval", tiny_checkpoint, "-d", data)


def test_empty_prompt(tiny_checkpoint):
    assert "prompt: it is empty" in error("generate", tiny_checkpoint, "  ")


def test_missing_or_broken_tokenizer(copy, texts):
    (copy / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: is no tokenizer" in error("generate", copy, "x")
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json: missing" in error("eval", copy, "-d", texts)


def test_quantized_already(quantized, texts):
    for arguments in (("eval", quantized, "-d", texts, "-r", DYNAMIC), ("inspect", quantized, "-r", DYNAMIC)):
        assert "is quantized already" in error(*arguments)


def test_from_8_bits(quantized, tiny_checkpoint, tmp_path):
    found = read_json("quantize", quantized, tmp_path / "mx", "-r", "mxfp8_bf16")
    assert 25 < found["schemes"]["e4m3 1×32 e8m0"]["snr_db"] < 60 and len(found["snr_db"]) == 32
    assert "e4m3 1×32 e8m0" in invoke("inspect", tmp_path / "mx").stdout
    found = read_json("quantize", quantized, tmp_path / "plain", "-r", "bf16")
    assert found["format"] is None and "bf16" in found["schemes"]
    found = read_json("quantize", quantized, tmp_path / "fp8", "--format", "fp8")
    assert found["format"] == "fp8" and set(found["snr_db"].values()) == {None}  # exact
    assert found["exactness"]["differing"] == 0 and found["exactness"]["inexact_snr_db"] is None
    assert "--recipe: missing" in error("quantize", tiny_checkpoint, tmp_path / "out")


BLOCK = "fp8_e4m3fn_bf16_block_scale"


def test_exact_blocks(tiny_checkpoint, tmp_path):
    invoke("quantize", tiny_checkpoint, tmp_path / "mx", "-r", "mxfp8_mxfp8_bf16")
    found = read_json("quantize", tmp_path / "mx", tmp_path / "a", "-r", BLOCK)["exactness"]
    assert 0 < found["exact_blocks"] < found["blocks"] and 0 < found["differing"] < found["values"]
    assert found["inexact_snr_db"] > 100
    out = invoke("quantize", tmp_path / "mx", tmp_path / "b", "-r", BLOCK).stdout
    line = f"{found['exact_blocks']:,} of {found['blocks']:,} blocks are exact; {found['differing']:,} of "
    assert line in out
    inspected = read_json("inspect", tmp_path / "a", "--reference", tmp_path / "mx")
    assert inspected["exactness"] == found
    assert sum(row["exact_blocks"] or 0 for row in inspected["tensors"]) == found["exact_blocks"]
    assert line in invoke("inspect", tmp_path / "a", "--reference", tmp_path / "mx").stdout
    out = invoke("quantize", tmp_path / "mx", tmp_path / "c", "-f", "modelopt").stdout
    assert f"nothing was lost: every one of {found['values']:,} values is the source's, bit for bit" in out
    plain = read_json("quantize", tiny_checkpoint, tmp_path / "d", "-r", "mxfp8_bf16")
    assert plain["exactness"] is None


def test_requantize(tiny_checkpoint, tmp_path):
    invoke("quantize", tiny_checkpoint, tmp_path / "mx", "-r", "mxfp8_mxfp8_bf16")
    found = read_json("quantize", tmp_path / "mx", tmp_path / "a", "--requantize", "hopper")
    dry_run = ("quantize", tmp_path / "mx", tmp_path / "dry", "--requantize", "hopper", "--dry-run")
    assert read_json(*dry_run)["requantized"] == found["requantized"]
    assert "lowest SNR" in invoke(*dry_run).stdout and not (tmp_path / "dry").exists()
    chosen = found["requantized"]["layers.1.mlp.w13"]
    assert chosen["recipe"] in (f"{DYNAMIC}, pow2 weights", "fp8_e4m3fn_bf16_block_scale, pow2 weights")
    assert chosen["snr_db"] is None and len(chosen["others_snr_db"]) == 3  # exact
    lowest = [snr for each in found["requantized"].values() for snr in each["others_snr_db"].values() if snr]
    assert lowest and min(lowest) > 100
    assert found["recipe"] is None and set(found["schemes"]) <= {"bf16", "e4m3 1×· f32 pow2", "e4m3 128×128 f32 pow2"}
    out = invoke("quantize", tmp_path / "mx", tmp_path / "b", "--requantize", DYNAMIC, "--format", "modelopt").stdout
    assert f"{DYNAMIC}, pow2 weights" in out and "next best" in out and "recipe chosen by module" in out
    assert fp8x.load(tmp_path / "a").layers[1].mlp.w13.recipe.weight.scale_rule == "pow2"
    again = ("quantize", tmp_path / "mx", tmp_path / "c", "--requantize", "hopper")
    assert "requantize: stands beside recipe" in error(*again, "-r", DYNAMIC)
    assert "requantize chooses recipes" in error(*again, "--rule", ".*=none")
    assert "nothing in" in error("quantize", tiny_checkpoint, tmp_path / "c", "--requantize", "hopper")


def test_scales_from_a_file(tiny_checkpoint, quantized, tmp_path):
    scales = quantized / "calibration.json"
    invoke("quantize", tiny_checkpoint, tmp_path / "out", "-r", STATIC, "--calibration", scales)
    written = [(path / "model.safetensors").read_bytes() for path in (quantized, tmp_path / "out")]
    assert written[0] == written[1]
    other = "fp8_e4m3fn_bf16_block_scale_static_activation"
    assert "was calibrated for" in error(
        "quantize", tiny_checkpoint, tmp_path / "b", "-r", other, "--calibration", scales
    )


@pytest.mark.slow
def test_keys_and_values_in_8_bits(tiny_checkpoint, texts, tmp_path):
    """Their scales are found, come from a file, and get other names in another format."""
    few = ("--num-samples", 2, "--max-length", 16)
    with_data = ("quantize", tiny_checkpoint, tmp_path / "a", "-r", DYNAMIC, "--calibrate", texts)
    invoke(*with_data, "--kv-cache", "tensor", *few)
    invoke("quantize", tmp_path / "a", tmp_path / "b", "--format", "modelopt")
    invoke("quantize", tiny_checkpoint, tmp_path / "c", "--calibration", tmp_path / "a/calibration.json")
    names = [{name for name in Reader(tmp_path / path) if name.endswith("k_scale")} for path in "abc"]
    first = "model.layers.0.self_attn"
    assert names[0] == names[2] and f"{first}.k_scale" in names[0] and f"{first}.k_proj.k_scale" in names[1]
    found = read_json("calibrate", tiny_checkpoint, texts, "-r", DYNAMIC, "--kv-cache", "head", *few)
    assert set(found["layers"]) == {f"layers.{i}.self_attn.{name}_cache" for i in range(2) for name in "kv"}
    to_another = (*with_data[:2], tmp_path / "d", *with_data[3:])
    assert "--kv-cache block: is unknown; use tensor, head" in error(*to_another, "--kv-cache", "block")
    heads = ("quantize", tiny_checkpoint, tmp_path / "d", "-r", DYNAMIC, "--format", "modelopt", "--kv-cache", "head")
    assert "no KV cache in e4m3" in error(*heads, "--calibrate", texts)
    assert "pass --calibrate" in error(*heads[:5], "--kv-cache", "tensor")


@pytest.mark.slow
def test_eval_with_keys_and_values_in_8_bits(tiny_checkpoint, texts):
    found = read_json("eval", tiny_checkpoint, "-d", texts, "--kv-cache", "token", "--mesh", "data=2")["results"]
    assert [result["kv_cache"] for result in found] == [None, "token"]
    assert found[1]["cache_bytes_per_token"] < found[0]["cache_bytes_per_token"] and found[1]["delta_percent"] != 0


def test_outputs_that_can_not_be_written(tiny_checkpoint, tmp_path, texts):
    absent = tmp_path / "absent" / "file.png"
    assert "its directory does not exist" in error("inspect", tiny_checkpoint, "--plot", absent)
    assert "its directory does not exist" in error("calibrate", tiny_checkpoint, texts, "-r", STATIC, "-o", absent)
    assert "--plot" in error("inspect", tiny_checkpoint, "--plot", tmp_path / "picture.xyz")


def test_a_mistake_in_the_options_is_code_2():
    assert invoke("quantize", "a", code=2).exit_code == 2
    assert invoke("frobnicate", code=2).exit_code == 2


def test_numbers_out_of_range_and_text_that_is_none(tiny_checkpoint, texts, tmp_path):
    assert error("generate", tiny_checkpoint, "\udcff") == "error: prompt: it is not UTF-8"
    invoke("generate", tiny_checkpoint, "text", "--seed", 2**64, code=2)
    invoke("generate", tiny_checkpoint, "text", "-n", 10**11, code=2)
    calibrate = ("calibrate", tiny_checkpoint, texts, "--recipe", STATIC)
    assert "--max-length: 65 tokens, but the model's context is 64" in error(*calibrate, "--max-length", 65)
    assert f"--output {tmp_path}: is a directory" in error(*calibrate, "--output", tmp_path)
