"""Checks by hand that vLLM and SGLang take what fp8x writes: their own parsers of configs, over every directory.

Neither is installed: unpacked wheels (vllm 0.33.0, sglang 0.5.23) and compressed-tensors are enough, beside torch and
what compressed-tensors imports. Their files on configs and names run as they are, everything else of theirs is a stub.

    python tests/goldens/check_with_compressed_tensors.py write DIR
    python tests/goldens/check_with_vllm_and_sglang.py DIR VLLM SGLANG

Every `quantization_config`, and ModelOpt's `hf_quant_config.json`, is parsed; then each is asked of every matrix
whether it is quantized, by the name that the model has in memory: q, k and v as `qkv_proj`, gate and up as
`gate_up_proj`, and experts together. The answer has to be what the file holds.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

FILES = ("base_config", "fp8", "compressed_tensors.compressed_tensors", "compressed_tensors.utils")
REAL = {
    "vllm": (
        "vllm.model_executor.layers.quantization",
        (*FILES, "modelopt", "utils.quant_utils", "utils.config_utils"),
    ),
    "sglang": ("sglang.srt.layers.quantization", (*FILES, "modelopt_quant", "utils")),
}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
WHOLE = {part: whole for whole, parts in FUSED.items() for part in parts}


class _Anything(type):
    """Of a class that stands for whatever a stubbed module has: every attribute is it again."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __getitem__ = __or__

    def __iter__(cls) -> Any:
        return iter(())


class Stub(metaclass=_Anything):
    def __new__(cls, *args: Any, **options: Any) -> Any:
        if cls is not Stub:
            return object.__new__(cls)
        return args[0] if len(args) == 1 and not options and callable(args[0]) else Stub  # a decorator, or a call

    def __init_subclass__(cls, **options: Any) -> None:
        pass


class _StubModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The files of `REAL` from their folders, a stub for all else of these packages."""

    def __init__(self, folders: dict[str, Path]):
        self.folders = folders
        self.real = {f"{package}.{name}" for package, names in REAL.values() for name in names}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        top = name.partition(".")[0]
        if name in self.real:
            file = self.folders[top] / f"{name.replace('.', '/')}.py"
            return importlib.util.spec_from_file_location(name, file)
        if top in (*self.folders, "flashinfer", "aiter"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Linear:
    """Its class name is what a target of compressed-tensors may say."""


def vllm_decides(config: dict) -> Any:
    """Name in memory -> whether vLLM quantizes it."""
    if decides := _alike("vllm", config, "utils.quant_utils", match_mode="exact"):
        return decides
    return _modelopt(config, importlib.import_module(f"{REAL['vllm'][0]}.modelopt"))


def sglang_decides(config: dict) -> Any:
    """Name in memory -> whether SGLang quantizes it; None where it has no such method."""
    if decides := _alike("sglang", config, "utils"):
        return decides
    if config.get("quantization", config)["quant_algo"] != "FP8":
        return None
    module = importlib.import_module(f"{REAL['sglang'][0]}.modelopt_quant")
    parsed = module.ModelOptFp8Config.from_config(config)
    return lambda name: not parsed.is_layer_excluded(name)


def _alike(library: str, config: dict, names: str, **options: str) -> Any:
    """What both do in the same way; None for ModelOpt's configs. `names`: where names are looked up in lists."""
    package = REAL[library][0]
    if config["quant_method"] == "compressed-tensors":
        utils = importlib.import_module(f"{package}.compressed_tensors.utils")
        cls = importlib.import_module(f"{package}.compressed_tensors.compressed_tensors").CompressedTensorsConfig
        parsed = cls.from_config(config)
        return lambda name: _by_scheme(utils, parsed, name)
    if config["quant_method"] == "fp8":
        skipped = importlib.import_module(f"{package}.{names}").is_layer_skipped
        parsed = importlib.import_module(f"{package}.fp8").Fp8Config.from_config(config)
        return lambda name: not skipped(name, parsed.ignored_layers, FUSED, **options)
    return None


def _modelopt(config: dict, module: Any) -> Any:
    quantization = config.get("quantization", config)
    named = "ModelOptMxFp8Config" if quantization["quant_algo"] == "MXFP8" else "ModelOptFp8Config"
    # Which algorithms belong to which class stands in a file that imports kernels.
    module.algos_owned_by = lambda owner: ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
    parsed = getattr(module, named).from_config({"quant_method": "modelopt"} | config)
    assert parsed.quant_method == quantization["quant_algo"]
    parsed.packed_modules_mapping = FUSED
    return lambda name: not parsed.is_layer_excluded(name)


def _by_scheme(utils: Any, parsed: Any, name: str) -> bool:
    if name.endswith(".experts"):  # as `get_moe_method` asks: by the parts of its first expert
        parts = [f"{name}.0.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
        answers = {_by_scheme(utils, parsed, part) for part in parts}
        assert len(answers) == 1, name
        return answers.pop()
    if utils.should_ignore_layer(name, ignore=parsed.ignore, fused_mapping=FUSED):
        return False
    target = utils.find_matched_target(name, Linear(), parsed.target_scheme_map.keys(), FUSED)
    return parsed.target_scheme_map[target]["weights"] is not None


def matrices(path: Path) -> dict[str, bool]:
    """By the name that a module has in memory, whether the file holds it in 8 bits."""
    found: dict[str, set[bool]] = {}
    for file in path.glob("model*.safetensors"):
        content = file.open("rb").read(2**24)
        for name, entry in json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).items():
            if not name.endswith(".weight") or len(entry["shape"]) != 2 or "embed" in name or "norm" in name:
                continue
            module = re.sub(r"(\.experts)\..*", r"\1", name.removesuffix(".weight"))
            head, _, part = module.rpartition(".")
            # Towers of images have no fused layers there.
            module = f"{head}.{WHOLE[part]}" if part in WHOLE and "vision" not in head else module
            found.setdefault(module, set()).add(entry["dtype"].startswith("F8"))
    assert all(len(answers) == 1 for answers in found.values()), path
    return {module: answers.pop() for module, answers in found.items()}


def check(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        config = json.loads((path / "config.json").read_text()).get("quantization_config")
        if config is None:
            continue
        configs = {"config.json": config}
        if (path / "hf_quant_config.json").exists():
            legacy = json.loads((path / "hf_quant_config.json").read_text())
            configs["hf_quant_config.json"] = {"quant_method": "modelopt"} | legacy
        for name, config in configs.items():
            answers = []
            for reader, decides in (("vllm", vllm_decides), ("sglang", sglang_decides)):
                try:
                    decide = decides(json.loads(json.dumps(config)))
                    wrong = decide and [m for m, held in matrices(path).items() if decide(m) != held]
                except Exception as error:  # one row of the table
                    answers.append(f"{reader}: {type(error).__name__}: {error}"[:150])
                    continue
                said = f"{len(matrices(path))} modules as the file has them" if not wrong else f"differs in {wrong[:3]}"
                answers.append(f"{reader}: {said if decide else 'knows no such method'}")
            print(f"{path.name:44} {name:20} {'; '.join(answers)}")


if __name__ == "__main__":
    sys.modules["regex"] = re
    sys.meta_path.insert(0, _Finder({"vllm": Path(sys.argv[2]), "sglang": Path(sys.argv[3])}))
    check(Path(sys.argv[1]))
