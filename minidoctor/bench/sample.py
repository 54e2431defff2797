"""Decoding speed, next to transformers, llama.cpp and the memory bandwidth, and the time until the first token.

Decoding at batch size 1 is memory-bound. Its lower bound is one read of all weights per token, timed here as a sum
over each weight where it is stored.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minidoctor.bench import baselines
from minidoctor.bench.implementations import make_base, share_weights
from minidoctor.bench.memory import Build, peak_memory
from minidoctor.bench.options import SHAPES, BenchConfig
from minidoctor.bench.timing import Result, alternate, medians, ratio
from minidoctor.config import SampleConfig, check
from minidoctor.generate import complete
from minidoctor.model import Model
from minidoctor.ops.compiled import compile_decoding
from minidoctor.ops.int8_product import pack_int8
from minidoctor.ops.linear import join_projections

N_READS = 8  # of all weights, per round
PROMPT = list(range(16))


def bench_sample(config: BenchConfig, gguf: Sequence[str] = ()) -> Result:
    """Time greedy decoding of each implementation. README.md explains the keys of the result."""
    plain, n = make_sample_base(replace(config, quantize="none")), config.new_tokens
    context = plain.config.max_seq_len
    check(len(PROMPT) + n <= context, f"--new-tokens {n} after {len(PROMPT)} tokens: the context has {context}")
    device, weights = plain.lm_head.weight.device, [p.detach() for p in plain.parameters()]
    base = plain if config.quantize == "none" else make_sample_base(config)
    unpacked = config.compile and config.quantize == "int8"  # for batches of one; larger ones are not compiled
    ours = share_weights(make_sample_base(config, unpacked) if unpacked else base).eval()
    static = config.compile and compile_decoding(ours)
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: [weight.sum() for _ in range(N_READS) for weight in weights],
        "batch 1": make_decoder(config, ours, static_cache=static),
        "batch 8": make_decoder(config, base if unpacked else ours, 8, static and not unpacked),
    }
    builds: dict[str, Build] = {"minidoctor": partial(make_decoder, config)}
    if config.compile:
        calls["batch 1, not compiled"] = make_decoder(config, base)
    if config.quantize != "none":
        calls["batch 1, not quantized"] = make_decoder(config, plain)
    if baselines.installed("transformers"):
        calls["transformers"] = make_transformers_decoder(config, plain)
        builds["transformers"] = partial(make_transformers_decoder, config)
    llama_cpp = llama_cpp_builds(gguf, n, plain)
    calls |= {f"llama.cpp {name}": build() for name, build in llama_cpp.items()}
    if device.type == "cpu":  # on a GPU, PyTorch does not count the memory of llama.cpp
        builds |= {f"llama.cpp {name}": build for name, build in llama_cpp.items()}
    counts = dict.fromkeys(calls, n) | {"read": N_READS, "batch 8": 8 * n}
    speed = alternate(calls, counts, config.rounds, device)
    reads, single = speed.pop("read"), speed["batch 1"]
    lower_bound, weights_gb = medians({"read": reads})["read"], sum(weight.nbytes for weight in weights) / 1e9
    return {
        "unit": f"tokens per second, with the prefill of {len(PROMPT)} prompt tokens",
        "speed": medians(speed),
        "lower_bound": lower_bound,
        "bandwidth_gb_per_second": lower_bound * weights_gb,
        "weights_gb": weights_gb,
        "dtype": str(plain.lm_head.weight.dtype),
        "peak_gib": {name: peaks[-1] for name, peaks in peak_memory(builds, 1).items()},
        "ratio_to_transformers": ratio(single, speed.get("transformers")),
        "ratio_to_llama_cpp": {name: ratio(single, speed[f"llama.cpp {name}"]) for name in llama_cpp} or None,
        "of_lower_bound": ratio(single, reads),
        "batch_8_over_1": ratio(speed["batch 8"], single),
        "compiled_over_not": ratio(single, speed.get("batch 1, not compiled")),
        "quantized_over_not": ratio(single, speed.get("batch 1, not quantized")),
    }


def make_sample_base(config: BenchConfig, unpacked_blocks: bool = False) -> Model:
    """Return the model as sample.py decodes with it."""
    model = make_base(config, SHAPES[config.shape].n_layers)
    join_projections(model)
    pack_int8(model.lm_head if unpacked_blocks else model)
    return model


def make_decoder(
    config: BenchConfig, model: Model | None = None, batch_size: int = 1, static_cache: bool = False
) -> Callable[[], Any]:
    if model is None:
        model = make_sample_base(config, unpacked_blocks=config.compile)
        static_cache = config.compile and compile_decoding(model)
    sampling = SampleConfig(max_new_tokens=config.new_tokens, static_cache=static_cache)
    return partial(complete, model, [PROMPT] * batch_size, sampling, ())


def make_transformers_decoder(config: BenchConfig, base: Model | None = None) -> Callable[[], Any]:
    base = base or make_sample_base(replace(config, quantize="none"))
    model, n = baselines.transformers_model(base).eval(), config.new_tokens
    prompt = torch.tensor([PROMPT], device=model.device)
    return partial(model.generate, prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False)


def llama_cpp_builds(files: Sequence[str], n: int, base: Model) -> dict[str, Build]:
    """Return functions that load a decoder for each gguf file, by the file's stem."""
    if files and not baselines.installed("llama_cpp"):
        print("llama.cpp is not measured: pip install llama-cpp-python", file=sys.stderr)
        return {}
    stems = [Path(file).stem for file in files]
    check(len({*stems}) == len(stems), f"--gguf: expected files of different names, got {', '.join(stems)}")
    build, gpu = baselines.make_llama_cpp_decoder, base.lm_head.weight.device.type != "cpu"
    return {stem: partial(build, file, PROMPT, n, base.config, gpu) for stem, file in zip(stems, files, strict=True)}


def bench_load(config: BenchConfig) -> Result:
    """Time loading a checkpoint, and prefill and sampling of its first token."""
    check(bool(config.base), "load needs a --base")
    seconds: dict[str, list[float]] = {"load": [], "first token": []}
    for _ in range(config.rounds):
        start = time.perf_counter()
        model = make_base(config)
        loaded = time.perf_counter()
        complete(model, [[1, 2, 3]], SampleConfig(max_new_tokens=1), ())
        seconds["load"].append(loaded - start)
        seconds["first token"].append(time.perf_counter() - loaded)
    return {"seconds": medians(seconds)}
