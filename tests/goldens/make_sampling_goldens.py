"""Writes logits, and what transformers' warpers leave of them.

The environment (CPU): `pip install torch transformers safetensors`; the committed file was made with torch 2.14.1 and
transformers 5.24.0. Run `python tests/goldens/make_sampling_goldens.py`; it replaces `sampling.safetensors` beside this
file, which holds `logits`, float32 [4, 50], and for every case its log-probabilities under the case's name, float32
[4, 50], -inf for tokens that are left out. The warpers come in the order in which transformers' `generate` has them.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

CASES = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.6, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 2.5, "top_k": 7, "top_p": 0.5, "min_p": 0.3},
]


def name_of(case: dict[str, float]) -> str:
    return ",".join(f"{option}={value}" for option, value in case.items())


def main() -> None:
    torch.manual_seed(0)
    # From nearly flat to nearly certain; the last row has equal logits, also where they are cut.
    logits = torch.randn(4, 50) * torch.tensor([[0.3], [1.5], [5.0], [1.0]])
    logits[3] = logits[3].round()
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    tensors = {"logits": logits}
    for case in CASES:
        options = {"top_k": 0, "top_p": 1.0, "min_p": None} | case
        warpers = model._get_logits_processor(GenerationConfig(do_sample=True, **options), input_ids_seq_length=1)
        tensors[name_of(case)] = torch.log_softmax(warpers(torch.zeros(4, 1, dtype=torch.long), logits.clone()), -1)
    save_file(tensors, Path(__file__).parent / "sampling.safetensors")


if __name__ == "__main__":
    main()
