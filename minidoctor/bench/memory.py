"""Peak memory of training steps, each contender in a process of its own, and of the contrast. On Linux."""

import argparse
import dataclasses
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minidoctor.bench import baselines as peers
from minidoctor.bench.implementations import CONTRAST, SHAPES, base_of, drawn_batch, our_step
from minidoctor.checkpoints.families import read_model_config
from minidoctor.config import AdapterConfig, TrainConfig, UserError
from minidoctor.picture.live_bytes import TOKENS, contrast_bytes_by_tokens

FORGET = Path("/proc/self/clear_refs")


def peak_of(name: str, given: argparse.Namespace, found: Any) -> None:
    """In a process of its own: the peak memory of three steps, in GiB, and what is held after more of them."""
    torch.set_num_threads(given.threads)
    base = base_of(given.base, given.shape, given.layers, given.device, given.dtype)
    moe = AdapterConfig(given.n_experts, given.top_k, given.rank, 2.0 * given.rank, tuple(given.targets.split(",")))
    config = TrainConfig(
        batch_size=given.batch_size,
        max_seq_len=given.seq_len,
        recompute=given.recompute,
        compile=given.compile,
        contrast_weight=CONTRAST,
    )
    batch = drawn_batch(base.config.vocab_size, given.batch_size, given.seq_len)
    if name == "peft":
        step = peers.training_step(*peers.peft_lora(base, dataclasses.replace(moe, n_experts=1, top_k=1)), 1e-3, 1.0)
        del base
    else:
        step = our_step(base, moe, config)
    forget()  # building is not measured
    held = []
    for number in range(given.steps):
        step(batch)
        if number in (2, given.steps - 1):
            held.append(peak_gib())
    found.put((held[0], held[-1]))


def forget() -> None:
    """The peak so far does not count: of the GPU, or of this process as Linux knows it."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        FORGET.write_text("5")


def peak_gib() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


def bench_memory(given: argparse.Namespace) -> dict[str, Any]:
    if not FORGET.exists():
        raise UserError("the peak memory of a process is measured on Linux only")
    known = peers.known(read_model_config(given.base) if given.base else SHAPES[given.shape])
    names = ["minidoctor", *(["peft"] if known and peers.installed("transformers", "peft") else [])]
    peaks = {name: alone(peak_of, name, given) for name in names}
    adapter = AdapterConfig(given.n_experts, given.top_k, given.rank)
    contrast = contrast_bytes_by_tokens(TOKENS, adapter, TrainConfig())
    return {
        "peak_gib": {name: peak for name, (peak, _) in peaks.items()},
        f"peak_gib_after_{given.steps}_steps": {name: last for name, (_, last) in peaks.items()},
        "ratio_to_peft": peaks["minidoctor"][0] / peaks["peft"][0] if "peft" in peaks else None,
        "contrast_mib_by_tokens": {
            name: {str(n): size / 2**20 for n, size in zip(TOKENS, sizes, strict=True)}
            for name, sizes in zip(("with the queue", "within the batch"), contrast, strict=True)
        },
    }


def alone(target: Callable[..., None], *args: Any) -> Any:
    """What `target` puts into its last argument, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=target, args=(*args, found))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"{target.__name__} ended with code {process.exitcode}, perhaps for want of memory")
    return found.get()
