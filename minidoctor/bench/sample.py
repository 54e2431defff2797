"""Decoding speed, next to transformers and the memory bandwidth, and the time until the first token.

Decoding at batch size 1 is memory-bound. Its lower bound is one read of all weights per token, timed here as a sum
over each weight where it is stored.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from minidoctor.bench import baselines
from minidoctor.bench.implementations import make_base, share_weights
from minidoctor.bench.options import SHAPES, BenchConfig
from minidoctor.bench.timing import Result, alternate, medians, ratio
from minidoctor.config import SampleConfig, check
from minidoctor.generate import complete

N_READS = 8  # of all weights, per round


def bench_sample(config: BenchConfig) -> Result:
    """Time greedy decoding of each implementation. README.md explains the keys of the result."""
    base, n = make_base(config, SHAPES[config.shape].n_layers), config.new_tokens
    device, weights = base.lm_head.weight.device, [p.detach() for p in base.parameters()]
    prompt = torch.randint(base.config.vocab_size, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    settings = SampleConfig(max_new_tokens=n)
    ours = share_weights(base, compiled=config.compile).eval()
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: [weight.sum() for _ in range(N_READS) for weight in weights],
        "batch 1": partial(complete, ours, [prompt], settings, ()),
        "batch 8": partial(complete, ours, [prompt] * 8, settings, ()),
    }
    if config.compile:
        calls["batch 1, not compiled"] = partial(complete, base, [prompt], settings, ())
    if baselines.installed("transformers"):
        baseline, tokens = baselines.transformers_model(base).eval(), torch.tensor([prompt], device=device)
        calls["transformers"] = partial(baseline.generate, tokens, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    counts = dict.fromkeys(calls, n) | {"read": N_READS, "batch 8": 8 * n}
    speed = alternate(calls, counts, config.rounds, device)
    reads, single = speed.pop("read"), speed["batch 1"]
    lower_bound, weights_gb = medians({"read": reads})["read"], sum(weight.nbytes for weight in weights) / 1e9
    return {
        "unit": "tokens per second, with the prefill of 16 prompt tokens",
        "speed": medians(speed),
        "lower_bound": lower_bound,
        "bandwidth_gb_per_second": lower_bound * weights_gb,
        "weights_gb": weights_gb,
        "dtype": str(base.lm_head.weight.dtype),
        "ratio_to_transformers": ratio(single, speed.get("transformers")),
        "of_lower_bound": ratio(single, reads),
        "batch_8_over_1": ratio(speed["batch 8"], single),
        "compiled_over_not": ratio(single, speed.get("batch 1, not compiled")),
    }


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
