"""Training speed and memory, next to peft, MixLoRA and the frozen model's forward and backward pass."""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from minidoctor.batching import IGNORE, Batch, ShuffledBatches, collate
from minidoctor.bench import baselines
from minidoctor.bench.implementations import Step, make_base, make_frozen_step, make_step, random_batch
from minidoctor.bench.memory import peak_memory
from minidoctor.bench.options import FEED_FORWARD, BenchConfig
from minidoctor.bench.timing import Result, alternate, medians, ratio
from minidoctor.config import check
from minidoctor.model import Model
from minidoctor.questions.read import read_questions
from minidoctor.text.tokenizer import encode_conversation, load_tokenizer

N_BATCHES = 8  # of questions, per round
N_PRODUCTS = 20  # large matrix products per round: their speed is the peak of MFU, model FLOPs utilization
BASELINES = ("peft", "qlora", "mixlora")


def bench_train(config: BenchConfig) -> Result:
    """Time a training step of each implementation. README.md explains the keys of the result."""
    base = make_base(config)
    device, vocab_size = base.lm_head.weight.device, base.config.vocab_size
    steps = {name: build() for name, build in training_steps(base, config).items()}
    batch = random_batch(vocab_size, config.batch_size, config.seq_len)
    by_length, shuffled = question_batches(config) if config.data else ([batch], [batch])
    batches = {name: shuffled if name in BASELINES else by_length for name in steps}
    size = 4096 if device.type == "cuda" else 1024
    a, b, c = torch.randn(3, size, size).to(base.lm_head.weight)
    calls: dict[str, Callable[[], Any]] = {name: partial(run_steps, steps[name], batches[name]) for name in steps}
    calls["products"] = lambda: [torch.mm(a, b, out=c) for _ in range(N_PRODUCTS)]
    counts = {name: n_tokens(batches[name], config) for name in steps} | {"products": N_PRODUCTS * 2 * size**3}
    speed = alternate(calls, counts, config.rounds, device)
    peak = speed.pop("products")  # operations per second
    # Activation checkpointing computes some operations twice; these are not useful work and not counted.
    once = make_step(base, config.experts, replace(config.train, recompute=False, compile=False))
    per_token = count_operations(once, random_batch(vocab_size, 1, config.seq_len)) / config.seq_len
    ours, loop = speed["minidoctor"], speed["minidoctor, loop over experts"]
    return {
        "unit": "answer tokens per second" if config.data else "tokens per second",
        "speed": medians(speed),
        "peak_gib": {name: peaks[-1] for name, peaks in training_memory(config, 3).items()},
        **{f"ratio_to_{name}": ratio(ours, speed.get(name)) for name in BASELINES},
        "of_lower_bound": ratio(ours, speed["frozen model"]),
        "moe_over_lora": ratio(speed["minidoctor, plain LoRA"], ours),
        "contrast_over_none": ratio(speed["minidoctor, no contrast"], ours),
        "over_a_loop": ratio(speed.get("minidoctor, not compiled", ours), loop),
        "compiled_over_not": ratio(ours, speed.get("minidoctor, not compiled")),
        "quantized_over_not": ratio(ours, speed.get("minidoctor, not quantized")),
        "matrix_tera_operations_per_second": medians({"peak": peak})["peak"] / 1e12,
        "mfu": None if config.data else ratio([per_token * rate for rate in ours], peak),
    }


def training_steps(base: Model, config: BenchConfig) -> dict[str, Callable[[], Step]]:
    """Return functions that build the training step of each implementation.

    All share the weights of `base`, except that the other packages do not use quantized ones.
    """

    @functools.cache
    def plain() -> Model:
        return base if config.quantize == "none" else make_base(replace(config, quantize="none"))

    experts, train = config.experts, config.train
    lora, eager = replace(experts, n_experts=1, top_k=1, n_groups=1), replace(train, compile=False)
    steps: dict[str, Callable[[], Step]] = {
        "minidoctor": partial(make_step, base, experts, train),
        "minidoctor, no contrast": partial(make_step, base, experts, replace(train, contrast_weight=0.0)),
        "minidoctor, plain LoRA": partial(make_step, base, lora, train),
        "minidoctor, loop over experts": partial(make_step, base, experts, eager, loop=True),
        "frozen model": partial(make_frozen_step, base, config.compile),
    }
    if config.compile:
        steps["minidoctor, not compiled"] = partial(make_step, base, experts, eager)
    if config.quantize != "none":
        steps["minidoctor, not quantized"] = lambda: make_step(plain(), experts, train)
    if baselines.installed("transformers", "peft"):
        steps["peft"] = lambda: baselines.make_step(*baselines.peft_lora(plain(), lora), train)
        if baselines.installed("bitsandbytes"):
            steps["qlora"] = lambda: baselines.make_step(*baselines.peft_lora(plain(), lora, nf4=True), train)
    feed_forward_only = set(config.targets) <= set(FEED_FORWARD)  # MixLoRA has no experts in the attention
    if baselines.installed("transformers", "mixlora") and feed_forward_only and not base.config.qk_norm:
        steps["mixlora"] = lambda: baselines.make_step(*baselines.mixlora(plain(), experts), train)
    return steps


def training_memory(config: BenchConfig, n_steps: int) -> dict[str, list[float]]:
    """Return the peak memory until each training step on random tokens in GiB, by implementation."""
    names = ["minidoctor", *["peft"] * baselines.installed("transformers", "peft")]
    names += ["qlora"] * baselines.installed("transformers", "peft", "bitsandbytes")
    return peak_memory({name: partial(build_step, name, config) for name in names}, n_steps)


def build_step(name: str, config: BenchConfig) -> Callable[[], Any]:
    base = make_base(config)
    batch = random_batch(base.config.vocab_size, config.batch_size, config.seq_len)
    return partial(training_steps(base, config)[name](), batch)


def bench_memory(config: BenchConfig) -> Result:
    """Measure the peak memory of each implementation once. It hardly varies, so the ratio is that of a single round."""
    peaks = training_memory(config, config.steps)
    check(bool(peaks), "the peak memory of a process is measured on Linux only")
    first = {name: values[2:3] for name, values in peaks.items()}
    return {
        "peak_gib": medians(first),
        "peak_gib_after_steps": {name: values[-1] for name, values in peaks.items()},
        "ratio_to_peft": ratio(first["minidoctor"], first.get("peft")),
        "ratio_to_qlora": ratio(first["minidoctor"], first.get("qlora")),
    }


def run_steps(step: Step, batches: list[Batch]) -> None:
    for batch in batches:
        step(batch)


def n_tokens(batches: list[Batch], config: BenchConfig) -> int:
    """Return the answer tokens of questions, or all tokens of random batches."""
    return sum(len(batch.answer_positions) if config.data else batch.tokens.numel() for batch in batches)


def question_batches(config: BenchConfig) -> tuple[list[Batch], list[Batch]]:
    """Return batches of a file's questions: by length, as train.py makes them, and shuffled, as the baselines do."""
    check(bool(config.base), "--data needs the --base whose tokenizer encodes it")
    tokenizer, questions, size = load_tokenizer(config.base), read_questions(config.data), config.batch_size
    if questions.malformed:
        print(f"{config.data}: {len(questions.malformed)} malformed rows skipped", file=sys.stderr)
    examples = [encode_conversation(row.messages, tokenizer, config.seq_len) for row in questions.rows]
    examples = [example for example in examples if max(example.targets) != IGNORE]
    if len(examples) < len(questions.rows):
        n_without = len(questions.rows) - len(examples)
        print(f"{config.data}: {n_without} questions without an answer within --seq-len skipped", file=sys.stderr)
    n = N_BATCHES * size
    check(len(examples) >= n, f"{config.data}: has {len(examples)} questions, expected {n}; lower --batch-size")
    source = ShuffledBatches(examples, size, 1).starting_at(0)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = [collate([examples[i] for i in order[k : k + size]]) for k in range(0, n, size)]
    return [collate(next(source)) for _ in range(N_BATCHES)], shuffled


def count_operations(step: Step, batch: Batch) -> int:
    """Return the operations of the matrix products of a step. On a CPU, torch does not count those of attention."""

    def addmm_flops(y: torch.Size, a: torch.Size, b: torch.Size, **_: Any) -> int:  # torch has no formula for addmm_
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        step(batch)
    return counter.get_total_flops()
