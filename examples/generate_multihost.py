"""Text from a model that no host holds alone: start this on each host.

    python examples/generate_multihost.py MODEL "A function that" --mesh expert=2,tensor=8 \
        --coordinator host0:1234 --num-processes 2 --process-id 0     # and 1 on the other host

Under Slurm, Open MPI or Kubernetes, jax.distributed finds the last three options itself: leave them out.

The mesh takes all devices of all hosts, in the order of its axes: the last gets those of one host, whose links are the
fastest. Each host needs the checkpoint's directory, and reads what its devices hold. All compute the same text;
process 0 prints it. Where a process dies the others end with an error within --heartbeat seconds.
"""

import argparse

import jax
import numpy as np
from tokenizers import Tokenizer

import fp8x
from fp8x.models import generate


def main(arguments: argparse.Namespace) -> None:
    jax.distributed.initialize(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        heartbeat_timeout_seconds=arguments.heartbeat,
    )
    axes = {axis: int(size) for axis, size in (part.split("=") for part in arguments.mesh.split(","))}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (jax.sharding.AxisType.Auto,) * len(axes))
    model = fp8x.load(arguments.model, arguments.recipe, mesh)
    tokenizer = Tokenizer.from_file(f"{arguments.model}/tokenizer.json")
    # Every process gives the same prompts.
    ids = np.array([tokenizer.encode(arguments.prompt).ids] * axes.get("data", 1))
    found = generate(
        model,
        ids,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        eos_id=model.config.eos_token_id,
        seed=arguments.seed,
    )
    if jax.process_index() == 0:
        for text in np.asarray(found):
            print(tokenizer.decode(text.tolist()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face directory, quantized or not")
    parser.add_argument("prompt")
    parser.add_argument("--mesh", required=True, help="devices by axis: data (a text each), tensor, expert")
    parser.add_argument("--recipe", help="quantizes while loading; its activation scales have to be dynamic")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coordinator", help="address and port of process 0")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--heartbeat", type=int, default=60, help="seconds without a sign of life that mean death")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
