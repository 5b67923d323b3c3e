"""`Latent` and `Mixture`: what a `DecoderConfig` says of attention and of experts."""

import dataclasses
from typing import TYPE_CHECKING

from fp8x.errors import ConfigError

if TYPE_CHECKING:
    from fp8x.nn.routing import Scores

# Those of `fp8x.ops.gate`, which is made of JAX.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class Latent:
    """Attention through latents (DeepSeek-V2, arXiv:2405.04434, section 2.1): the cache holds `kv_rank + rope_dim`
    numbers a token, of which every head makes its key and value.

    Attributes:
        q_rank: of the queries' latent; None where they are made of the hidden state.
        kv_rank: of that of keys and values.
        nope_dim, rope_dim: dims of a query and a key without and with positions; the latter are all heads'.
        v_dim: dims of a value.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A layer's mixture of experts.

    Attributes:
        num_experts, top_k: how many there are, and how many a token visits.
        intermediate: width of one expert.
        scores, normalize, scale, use_correction_bias, use_bias, router_bias: as `fp8x.nn.MoE` takes them.
        clamped_swiglu: alpha and limit of the experts' gate, a `fp8x.ops.ClampedSwiGLU`; None for the decoder's
            `hidden_act`.
        groups, top_groups, group_best: a token's experts are of so many groups of them, as `fp8x.nn.MoE` takes them.
        shared_intermediate: width of the expert that every token visits; None without one.
        shared_gate: whether a sigmoid weighs that one.
        router_float32: whether the router computes in float32, whatever the parameters' type.
    """

    num_experts: int
    top_k: int
    intermediate: int
    scores: "Scores" = "softmax"
    normalize: bool = True
    scale: float = 1.0
    use_correction_bias: bool = False
    use_bias: bool = False
    router_bias: bool = False
    clamped_swiglu: tuple[float, float] | None = None
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    shared_intermediate: int | None = None
    shared_gate: bool = False
    router_float32: bool = False

    def __post_init__(self):
        for name in ("num_experts", "top_k", "intermediate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ConfigError(
                f"groups ({self.groups}) must divide the number of experts ({self.num_experts}), and the groups that a "
                f"token visits ({self.top_groups}) be at most as many"
            )
        reachable = self.num_experts // self.groups * self.top_groups
        if self.top_k > reachable:
            raise ConfigError(f"num_experts_per_tok ({self.top_k}) must be at most the number of experts ({reachable})")
        if self.group_best > self.num_experts // self.groups:
            raise ConfigError(
                f"groups ({self.groups}) of {self.num_experts} experts must have {self.group_best} or more"
            )
