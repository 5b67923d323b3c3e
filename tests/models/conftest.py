"""The checkpoints of `tests/goldens` that most tests take."""

import pytest
from flax import nnx
from golden import Golden, read_golden


@pytest.fixture(scope="session", params=["mixtral", "mixtral_bf16_sharded", "qwen3_moe", "qwen3_moe_bf16"])
def golden(request) -> Golden:
    return read_golden(request.param)


@pytest.fixture(scope="session")
def qwen() -> Golden:
    """The case with the most features: dense and sparse layers, biases, q/k norms, a sliding window."""
    return read_golden("qwen3_moe_bf16")


@pytest.fixture(scope="session")
def run():
    """`run(model, ids)`: the logits, by one compiled function for all tests."""
    return nnx.jit(lambda model, ids: model(ids))
