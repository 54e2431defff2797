"""Measure speed and memory next to other implementations and lower bounds.

    python -m minidoctor.bench train                             a Llama of SmolLM2's shape with 10 layers
    python -m minidoctor.bench train --base DIR --data FILE      questions of different lengths
    python -m minidoctor.bench sample --base DIR --gguf f32.gguf q8_0.gguf
    python -m minidoctor.bench memory
    python -m minidoctor.bench load --base DIR

README.md in this directory explains the results. The baselines are optional:

    pip install transformers peft mixlora bitsandbytes llama-cpp-python
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

import torch

from minidoctor.bench.options import BenchConfig
from minidoctor.bench.sample import bench_load, bench_sample
from minidoctor.bench.timing import Result
from minidoctor.bench.train import bench_memory, bench_train
from minidoctor.cli.device import choose_device
from minidoctor.cli.flags import add_flags, from_flags
from minidoctor.cli.main import run

BENCHMARKS: dict[str, Callable[..., Result]] = {
    "train": bench_train,
    "sample": bench_sample,
    "memory": bench_memory,
    "load": bench_load,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidoctor.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=BENCHMARKS)
    add_flags(parser, BenchConfig)
    parser.add_argument("--gguf", nargs="+", default=[], help="sample: files of the same model, decoded by llama.cpp")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = vars(parser.parse_args())
    config: BenchConfig = from_flags(BenchConfig, flags)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device, instructions = choose_device(config.device), torch.backends.cpu.get_cpu_capability()
    machine = f"{device}, {torch.get_num_threads()} CPU threads, {instructions}, torch {torch.__version__}"
    files = {"gguf": flags["gguf"]} if flags["mode"] == "sample" else {}
    result = {"mode": flags["mode"], "config": config, "machine": machine, **BENCHMARKS[flags["mode"]](config, **files)}
    text = json.dumps(result, default=asdict)
    rounded = json.loads(text, parse_float=lambda number: round(float(number), 3))
    print(text if flags["json"] else "\n".join(f"{key}: {value}" for key, value in rounded.items()))


if __name__ == "__main__":
    run(main)
