"""Static activation scales from data, on many hosts: start this on each of them.

    python examples/calibrate_multihost.py MODEL texts.jsonl calibration.json --recipe e4m3_e4m3_bf16 \
        --coordinator host0:1234 --num-processes 2 --process-id 0     # and 1 on the other host

Under Slurm, Open MPI or Kubernetes, jax.distributed finds the last three options itself: leave them out.

Every host holds the model and reads the data; each takes its share of the rows. Devices meet once, after the last
batch. Process 0 writes the sidecar, which `fp8x.load(MODEL, RECIPE, calibration="calibration.json")` takes. Where a
process dies the others end with an error within --heartbeat seconds, and nothing is written.
"""

import argparse
import sys

import jax
from tokenizers import Tokenizer

import fp8x
from fp8x.calibrate import Dataset, Sidecar
from fp8x.calibrate.data import DOCUMENT_ROWS, batches, pack, read_texts
from fp8x.models.evaluate import default_context, first_token


def main(arguments: argparse.Namespace) -> None:
    jax.distributed.initialize(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        heartbeat_timeout_seconds=arguments.heartbeat,
    )
    model = fp8x.load(arguments.model, arguments.recipe)
    rows = pack(
        read_texts(arguments.data),
        Tokenizer.from_file(f"{arguments.model}/tokenizer.json"),
        arguments.max_length or default_context(model.config),
        arguments.num_samples,
        arguments.seed,
        bos_id=first_token(model.config),
    )
    # Every process draws the same rows and takes its share.
    mine = rows[jax.process_index() :: jax.process_count()]
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
    size = arguments.batch_size * jax.local_device_count()
    report = fp8x.calibrate(model, watched(batches(mine, size)), mesh, method=arguments.method)
    if jax.process_index() == 0:
        dataset = Dataset.of(arguments.data, rows, arguments.seed, DOCUMENT_ROWS)
        Sidecar(arguments.recipe, report, dataset).write(arguments.output)
        print(f"wrote {arguments.output}: {len(report.layers)} layers, {rows.size} tokens")


def watched(each):
    for number, batch in enumerate(each, 1):
        print(f"process {jax.process_index()}: batch {number}", file=sys.stderr, flush=True)
        yield batch


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face directory")
    parser.add_argument("data", help="JSONL with `text`, chat `messages`, ShareGPT `conversations` or token `ids`")
    parser.add_argument("output", help="the sidecar to write")
    parser.add_argument("--recipe", default="e4m3_e4m3_bf16")
    parser.add_argument("--method", default="max")
    parser.add_argument("--num-samples", type=int, default=512)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--batch-size", type=int, default=4, help="rows a device takes at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coordinator", help="address and port of process 0")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--heartbeat", type=int, default=60, help="seconds without a sign of life that mean death")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
