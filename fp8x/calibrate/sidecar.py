"""The sidecar: a JSON file of static activation scales, with what they were found on; `fp8x.load` applies it."""

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int

from fp8x.calibrate.report import CalibrationReport, LayerStatistics
from fp8x.errors import CalibrationError, ShapeError, some
from fp8x.scheme import ELEMENTS, KV_HEAD, KV_TENSOR, Scheme

if TYPE_CHECKING:
    from flax import nnx

VERSION = 2

_KV_PATHS = (".k_cache", ".v_cache")
_KV_SCHEMES = {
    str(scheme): scheme
    for scheme in (
        Scheme(element, block=block, scale_rule=rule)
        for element in ELEMENTS
        for block in (KV_TENSOR, KV_HEAD)
        for rule in ("amax", "pow2")
    )
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What scales were found on: enough to find them again.

    Attributes:
        file: the data file's name; `sha256`: of its bytes.
        seed: drew the order of its documents, and the pieces of long ones.
        document_rows: rows that one document fills at most, while others are left.
        samples, length: rows of tokens, and tokens in each. `tokens`: in all.
        rows_sha256: of the rows' ids as little-endian int32: of the same data, another tokenizer gives others.
    """

    file: str
    sha256: str
    seed: int
    samples: int
    length: int
    tokens: int
    document_rows: int
    rows_sha256: str

    @classmethod
    def of(cls, path: str | Path, rows: Int[np.ndarray, "samples length"], seed: int, document_rows: int) -> "Dataset":
        """What rows of tokens were drawn from."""
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        of_rows = hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()
        return cls(Path(path).name, digest, seed, *rows.shape, rows.size, document_rows, of_rows)

    def to_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return {"dataset": {key: found.pop(key) for key in ("file", "sha256")}, **found}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Dataset":
        others = [field.name for field in dataclasses.fields(cls) if field.name not in ("file", "sha256")]
        return cls(**found["dataset"], **{name: found[name] for name in others})


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """Static activation scales by layer, and where they come from.

    Attributes:
        recipe: the code of the recipe that most layers have.
        report: methods, scales and counts.
        dataset: what they were found on; None where the caller did not say.
    """

    recipe: str
    report: CalibrationReport
    dataset: Dataset | None = None

    @property
    def scales(self) -> dict[str, Float32[np.ndarray, "1 groups"]]:
        """The static activation scale of every layer, by module path (`layers.0.mlp.w13`)."""
        return {path: layer.scale for path, layer in self._layers.items()}

    @property
    def _layers(self) -> dict[str, LayerStatistics]:
        """Of matrices, not of keys and values."""
        return {path: layer for path, layer in self.report.layers.items() if not path.endswith(_KV_PATHS)}

    @property
    def kv_cache(self) -> Scheme | None:
        """How keys and values are stored, over `[B, S, heads, dim]`, where their scales were found too.

        Raises:
            CalibrationError: in a way that this version does not know.
        """
        kinds = {layer.activation for path, layer in self.report.layers.items() if path.endswith(_KV_PATHS)}
        if not kinds:
            return None
        if len(kinds) > 1 or not kinds <= set(_KV_SCHEMES):
            raise CalibrationError(f"calibration: keys and values are in {', '.join(sorted(kinds))}; make it anew")
        return _KV_SCHEMES[kinds.pop()]

    @property
    def kv_scales(self) -> dict[str, tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]]:
        """The scales of keys and values, `[1]` or `[heads]`, by the attention's path (`layers.0.self_attn`)."""
        layers, keys = self.report.layers, ".k_cache"
        paths = [path.removesuffix(keys) for path in layers if path.endswith(keys)]
        # Through latents one scale serves for both.
        pairs = {path: (layers[path + keys], layers.get(f"{path}.v_cache", layers[path + keys])) for path in paths}
        return {path: tuple(layer.scale.reshape(-1) for layer in pair) for path, pair in pairs.items()}

    def set_kv_cache(self, model: "nnx.Module") -> None:
        """Has a decoder store keys and values by the scales here, if there are any.

        Raises:
            CalibrationError: a model that is no decoder, or whose layers and heads are others.
        """
        if self.kv_cache is not None:
            count = len(model.layers) if hasattr(model, "set_kv_cache") else 0
            self.give_kv_cache(count, lambda *found: model.set_kv_cache(*found))

    def give_kv_cache(self, count: int, take: Callable[[Scheme, list], Any]) -> None:
        """Calls `take` with the scheme of keys and values, and with the scales of each of a decoder's `count` layers.

        Raises:
            CalibrationError: there are other layers, or `take` raises a ShapeError.
        """
        pairs, paths = self.kv_scales, [f"layers.{index}.self_attn" for index in range(count)]
        if set(paths) != set(pairs):
            raise CalibrationError(
                f"calibration: {some(list(pairs))} in it, with scales of a KV cache; is it another model's?"
            )
        try:
            take(self.kv_cache, [pairs[path] for path in paths])
        except ShapeError as error:
            raise CalibrationError(f"calibration: {error}; is it another model's?") from None

    def check(self, layers: Mapping[str, tuple[Scheme, int]]) -> None:
        """Looks whether the scales are those of a model.

        Arguments:
            layers: activation scheme and input features K of each layer with a static activation scale.

        Raises:
            CalibrationError: layers without a scale, scales without a layer, or of another scheme or size; named.
        """
        known = self._layers
        if missing := [path for path in layers if path not in known]:
            raise CalibrationError(f"calibration: {some(missing)} without a scale in it; is it another model's?")
        made_with = f"use the recipe ({self.recipe}) and rules that it was made with"
        if extra := [path for path in known if path not in layers]:
            raise CalibrationError(f"calibration: {some(extra)} in it, but not calibrated in this model; {made_with}")
        for path, (scheme, k) in layers.items():
            found = known[path]
            if found.activation != str(scheme):
                raise CalibrationError(
                    f"calibration: {path} was calibrated for {found.activation}, but its activations are in {scheme}; "
                    f"{made_with}"
                )
            if found.scale.shape != (fits := scheme.scale_shape((1, k))):
                raise CalibrationError(
                    f"calibration: the scale of {path} is {list(found.scale.shape)}, but its input of {k} features "
                    f"takes {list(fits)}; is it another model's?"
                )

    def apply(self, model: "nnx.Module") -> None:
        """Sets the static activation scales of a model.

        Raises:
            CalibrationError: as `check`, or the model has no layer for any, or is on a mesh.
        """
        # Imported late: `fp8x.convert` reads a sidecar and needs no Flax.
        from fp8x.calibrate.statistics import static_layers
        from fp8x.nn.quantized import QuantizedLayer
        from fp8x.nn.training import check_finished
        from fp8x.nn.walk import named_static

        if getattr(model, "placement", None) is not None:
            raise CalibrationError("calibration: the model is on a mesh; give the file to fp8x.load, with the mesh")
        check_finished(model)
        static = static_layers(model) if self.kv_cache is None else named_static(model)
        layers = {path: layer for path, layer in static.items() if isinstance(layer, QuantizedLayer)}
        self.check({path: (layer.recipe.activation, layer.weight.shape[-1]) for path, layer in layers.items()})
        self.set_kv_cache(model)
        for path, scale in self.scales.items():
            layers[path].abandon_calibration()
            layers[path].input_scale[...] = scale

    def to_json(self) -> dict[str, Any]:
        """What `write` writes."""
        report = self.report
        return {
            "version": VERSION,
            "recipe": self.recipe,
            "method": report.method,
            **({} if report.percentile is None else {"percentile": report.percentile}),
            "batches": report.batches,
            **({} if self.dataset is None else self.dataset.to_json()),
            "layers": {
                path: {
                    "activation": layer.activation,
                    **{name: getattr(layer, name).tolist() for name in ("amax", "scale", "tokens")},
                }
                for path, layer in report.layers.items()
            },
        }

    def write(self, path: str | Path) -> None:
        """Writes a file that is there completely or not at all; replaces one that is there.

        Raises:
            CalibrationError: it can't be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        try:
            temporary.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise CalibrationError(f"calibration: {path}: can't be written: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)


def read(path: str | Path) -> Sidecar:
    """The sidecar in a file.

    Raises:
        CalibrationError: the file can't be read, or is none, or holds a scale that is not finite and positive (named).
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise CalibrationError(f"calibration: {path}: {error.strerror or error}; give a file that fp8x wrote") from None
    except ValueError as error:
        raise CalibrationError(f"calibration: {path}: is no JSON: {error}") from None
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise CalibrationError(f"calibration: {path}: is of version {version}, not {VERSION}; make it anew")
    try:
        layers = {name: _layer(name, layer) for name, layer in found["layers"].items()}
        report = CalibrationReport(layers, found["batches"], found["method"], found.get("percentile"))
        dataset = Dataset.from_json(found) if "dataset" in found else None
        return Sidecar(found["recipe"], report, dataset)
    except (KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(f"calibration: {path}: is damaged: {error!r}; make it anew") from None
    except ValueError as error:
        raise CalibrationError(f"calibration: {path}: {error}; make it anew") from None


def _layer(name: str, found: dict[str, Any]) -> LayerStatistics:
    amax, scale = (np.asarray(found[key], np.float32) for key in ("amax", "scale"))
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"{name} has a scale that is not finite and positive")
    return LayerStatistics(found["activation"], amax, scale, np.asarray(found["tokens"], np.int32))
