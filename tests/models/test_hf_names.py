from collections import Counter

import numpy as np
from flax import nnx
from safetensors import safe_open

from fp8x.models import Decoder, DecoderConfig
from fp8x.models.hf_names import flat, linear_names, param_names
from fp8x.models.loading import get


def stored_shapes(folder):
    """The shape of every tensor of a checkpoint."""
    shapes = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def test_every_tensor_is_named_once(golden):
    config = DecoderConfig.from_hf(golden.hf)
    matrices = [f"{prefix}.weight" for names in linear_names(config).values() for _, prefix in flat(names)]
    named = Counter([*matrices, *(name for names in param_names(config).values() for _, name in flat(names))])
    assert named == Counter(list(stored_shapes(golden.path)))


def test_every_parameter_has_a_name_and_its_tensor_fits(golden):
    config = DecoderConfig.from_hf(golden.hf)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    shapes = stored_shapes(golden.path)
    paths = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    for path, name in param_names(config).items():
        assert paths.pop(path).shape == shapes[name]
    for path, names in linear_names(config).items():
        if isinstance(names, str):
            assert paths.pop(f"{path}.kernel").shape == shapes[f"{names}.weight"][::-1]
        else:
            *_, last = indices = [index for index, _ in flat(names)]
            assert indices == list(np.ndindex(*(i + 1 for i in last)))
            (shape,) = {shapes[f"{prefix}.weight"] for _, prefix in flat(names)}
            assert paths.pop(f"{path}.weight").shape == (*(i + 1 for i in last), *shape)
    assert not paths


def test_paths_lead_to_modules(golden):
    config = DecoderConfig.from_hf(golden.hf)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert all(isinstance(get(model, path), nnx.Module) for path in linear_names(config))
