"""Speed and memory, beside what people would use instead and beside what the machine allows.

    python -m minidoctor.bench train                     a Llama of SmolLM2's shape with 10 layers, half of it prompt
    python -m minidoctor.bench train --base DIR --data FILE      questions of varied length
    python -m minidoctor.bench sample --base DIR
    python -m minidoctor.bench memory
    python -m minidoctor.bench load --base DIR

All that is compared runs alternately in one process; a ratio is the median of those of single rounds, with the least
and the greatest. Shared machines slow down and recover within seconds: figures of two runs are not to be compared.

Floors: in training the frozen model's own forward and backward on the same tokens; in decoding one reading of all
weights where they lie, by a sum over each (the memory of a shared machine can slow down by half and recover). MFU:
operations of the products of a step (on a CPU without those of attention, which torch does not count there) over those
that large products would do in the same time.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from minidoctor.batching import Batch, ShuffledBatches, collate
from minidoctor.bench import baselines as peers
from minidoctor.bench.implementations import CONTRAST, SHAPES, base_of, drawn_batch, frozen_step, our_step, twin
from minidoctor.bench.memory import bench_memory
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.cli.main import run
from minidoctor.config import AdapterConfig, SampleConfig, TrainConfig, UserError
from minidoctor.generate import generate
from minidoctor.model import Model
from minidoctor.questions.exams import read_questions
from minidoctor.text.tokenizer import encode_conversation, load_tokenizer

TARGETS = ("gate_proj", "up_proj", "down_proj")  # MixLoRA has experts here alone
Rounds = dict[str, list[float]]  # seconds of each contender in each round


def alternate(contenders: dict[str, Callable[[], Any]], n_rounds: int, device: torch.device) -> Rounds:
    """Each once to warm up, then one after the other, again and again."""
    seconds: Rounds = {name: [] for name in contenders}
    for round_number in range(n_rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """a / b round by round: the median, and the least and greatest."""
    each = [x / y for x, y in zip(a, b, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "greatest": max(each)}


def rates(seconds: Rounds, n: dict[str, float]) -> Rounds:
    return {name: [n[name] / s for s in times] for name, times in seconds.items()}


def bench_train(given: argparse.Namespace, base: Model) -> dict[str, Any]:
    device = base.lm_head.weight.device
    moe = AdapterConfig(given.n_experts, given.top_k, given.rank, 2.0 * given.rank, tuple(given.targets.split(",")))
    lora = dataclasses.replace(moe, n_experts=1, top_k=1)
    plain = TrainConfig(
        batch_size=given.batch_size, max_seq_len=given.seq_len, recompute=given.recompute, contrast_weight=CONTRAST
    )
    config = dataclasses.replace(plain, compile=given.compile)
    matrix = torch.randn(2, *([4096 if device.type == "cuda" else 1024] * 2)).to(base.lm_head.weight)  # (2, n, n)
    floor = twin(base, compiled=given.compile)
    steps: dict[str, Callable[[Batch], Any]] = {
        "minidoctor": our_step(base, moe, config),
        "minidoctor, no contrast": our_step(base, moe, dataclasses.replace(config, contrast_weight=0.0)),
        "minidoctor, plain LoRA": our_step(base, lora, config),
        "minidoctor, a loop over experts": our_step(base, moe, plain, looped=True),
        "frozen model": lambda batch: frozen_step(floor, batch),
    }
    if given.compile:
        steps["minidoctor, not compiled"] = our_step(base, moe, plain)
    if peers.known(base.config) and peers.installed("transformers", "peft"):
        steps["peft"] = peers.training_step(*peers.peft_lora(base, lora), config.lr, config.clip)
    if peers.known(base.config) and peers.installed("transformers", "mixlora") and set(moe.targets) <= set(TARGETS):
        steps["mixlora"] = peers.training_step(*peers.mixlora(base, moe), config.lr, config.clip)
    batches = {name: [drawn_batch(base.config.vocab_size, given.batch_size, given.seq_len)] for name in steps}
    if given.data:
        if not given.base:
            raise UserError("--data needs the --base whose tokenizer reads it")
        batches = {name: real_batches(given, name) for name in steps}

    def contender(name: str) -> Callable[[], Any]:
        return lambda: [steps[name](batch) for batch in batches[name]]

    calls = {name: contender(name) for name in steps}
    once = our_step(base, moe, dataclasses.replace(plain, recompute=False))
    n_operations = given.batch_size * operations(once, drawn_batch(base.config.vocab_size, 1, given.seq_len))
    del once
    seconds = alternate({**calls, "matrix": lambda: [matrix[0] @ matrix[1] for _ in range(20)]}, given.rounds, device)
    per_second = [20 * 2 * matrix.shape[1] ** 3 / s for s in seconds.pop("matrix")]
    count = {
        name: float(sum(len(b.answer_positions) if given.data else int(b.attention_mask.sum()) for b in batches[name]))
        for name in steps
    }
    speed = rates(seconds, count)
    ours = speed["minidoctor"]
    achieved = [n_operations / s for s in seconds["minidoctor"]]
    return {
        "unit": "answer tokens per second" if given.data else "tokens per second",
        "speed": {name: statistics.median(values) for name, values in speed.items()},
        "ratio_to_peft": ratio(ours, speed["peft"]) if "peft" in speed else None,
        "ratio_to_mixlora": ratio(ours, speed["mixlora"]) if "mixlora" in speed else None,
        "of_floor": ratio(ours, speed["frozen model"]),
        "moe_over_lora": ratio(speed["minidoctor, plain LoRA"], ours),
        "contrast_over_none": ratio(speed["minidoctor, no contrast"], ours),
        "over_a_loop": ratio(speed.get("minidoctor, not compiled", ours), speed["minidoctor, a loop over experts"]),
        "compiled_over_not": ratio(ours, speed["minidoctor, not compiled"]) if given.compile else None,
        "matrix_tera_operations_per_second": statistics.median(per_second) / 1e12,
        "mfu": None if given.data else ratio(achieved, per_second),
    }


def operations(step: Callable[[Batch], Any], row: Batch) -> int:
    """Of the products of a step. A --recompute is no use of the machine, so the step is one without."""

    def product(y: torch.Size, a: torch.Size, b: torch.Size, **_: Any) -> int:  # torch has none for addmm_
        return 2 * a[0] * a[1] * b[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})
    with counter:
        step(row)
    return counter.get_total_flops()


def real_batches(given: argparse.Namespace, name: str) -> list[Batch]:
    """Eight batches of a file's questions: ours by length, the peers' as they come, shuffled."""
    tokenizer = load_tokenizer(given.base)
    rows = read_questions(given.data).rows
    examples = [encode_conversation(row.messages, tokenizer, given.seq_len) for row in rows]
    if name in ("peft", "mixlora"):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
        size = given.batch_size
        chosen = [[examples[i] for i in order[k * size : (k + 1) * size]] for k in range(8)]
    else:
        source = ShuffledBatches(examples, given.batch_size, 1).starting_at(0)
        chosen = [next(source) for _ in range(8)]
    return [collate(part) for part in chosen]


def bench_sample(given: argparse.Namespace, base: Model) -> dict[str, Any]:
    device, weights = base.lm_head.weight.device, [p.detach() for p in base.parameters()]
    prompt = torch.randint(base.config.vocab_size, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    config = SampleConfig(max_new_tokens=given.new_tokens)
    ours = twin(base, compiled=given.compile).eval()
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: [weight.sum() for _ in range(8) for weight in weights],
        "batch 1": lambda: sum(1 for _ in generate(ours, [prompt], config, ())),
        "batch 8": lambda: sum(1 for _ in generate(ours, [prompt] * 8, config, ())),
    }
    if given.compile:
        calls["batch 1, not compiled"] = lambda: sum(1 for _ in generate(base, [prompt], config, ()))
    if peers.known(base.config) and peers.installed("transformers"):
        peer, tokens = peers.llama(base).eval(), torch.tensor([prompt], device=device)
        n = given.new_tokens
        calls["transformers"] = lambda: peer.generate(tokens, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    seconds = alternate(calls, given.rounds, device)
    n_bytes = float(sum(weight.nbytes for weight in weights))
    count = {"read": 8.0, "batch 8": 8.0 * given.new_tokens}
    speed = rates(seconds, dict.fromkeys(calls, float(given.new_tokens)) | count)
    bandwidth = statistics.median(speed["read"]) * n_bytes / 1e9
    return {
        "unit": "tokens per second, the prompt of 16 tokens among the time",
        "speed": {name: statistics.median(values) for name, values in speed.items() if name != "read"},
        "floor": statistics.median(speed["read"]),
        "bandwidth_gb_per_second": bandwidth,
        "weights_gb": n_bytes / 1e9,
        "dtype": str(base.lm_head.weight.dtype),
        "ratio_to_transformers": ratio(speed["batch 1"], speed["transformers"]) if "transformers" in speed else None,
        "of_floor": ratio(speed["batch 1"], speed["read"]),
        "batch_8_over_1": ratio(speed["batch 8"], speed["batch 1"]),
        "compiled_over_not": ratio(speed["batch 1"], speed["batch 1, not compiled"]) if given.compile else None,
    }


def bench_load(given: argparse.Namespace) -> dict[str, Any]:
    if not given.base:
        raise UserError("load needs a --base")
    seconds: Rounds = {"load": [], "first token": []}
    for _ in range(given.rounds):
        start = time.perf_counter()
        model = load_model(given.base)
        loaded = time.perf_counter()
        next(generate(model, [[1, 2, 3]], SampleConfig(), ()))
        seconds["load"].append(loaded - start)
        seconds["first token"].append(time.perf_counter() - loaded)
    return {"seconds": {name: statistics.median(times) for name, times in seconds.items()}}


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {shown(inner)}" for key, inner in value.items())
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidoctor.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "sample", "memory", "load"])
    parser.add_argument("--base", help="checkpoint (default: random weights of --shape)")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2", help="of the random model (default smollm2)")
    parser.add_argument("--layers", type=int, help="of the random model (default 10, sample: all of the shape)")
    parser.add_argument("--data", help="train on batches of this file instead of drawn ones")
    parser.add_argument("--batch-size", type=int, help="(default 4, with --data 8)")
    parser.add_argument("--seq-len", type=int, help="(default 256, with --data 512 at most)")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds (default 7)")
    parser.add_argument("--steps", type=int, default=20, help="memory: steps between the two looks (default 20)")
    parser.add_argument("--new-tokens", type=int, default=128, help="sample: tokens written (default 128)")
    parser.add_argument("--n-experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default=",".join(TARGETS), help="layers with experts (default the feed-forward)")
    parser.add_argument("--recompute", action="store_true", help="as in train.py")
    parser.add_argument("--compile", action="store_true", help="as in train.py and sample.py")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default all)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    given.layers = given.layers or (SHAPES[given.shape].n_layers if given.what == "sample" else 10)
    given.batch_size = given.batch_size or (8 if given.data else 4)
    given.seq_len = given.seq_len or (512 if given.data else 256)
    for name in ("rounds", "threads", "batch_size", "layers", "new_tokens"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    if given.seq_len < 4 or given.steps < 3:
        raise UserError("--seq-len must be at least 4 and --steps at least 3")
    torch.set_num_threads(given.threads)
    machine = f"{given.device}, {given.threads} threads, {platform.machine()}, torch {torch.__version__}"
    ran = {key: value for key, value in vars(given).items() if value not in (None, False)}
    if given.what in ("train", "sample"):
        found = {"train": bench_train, "sample": bench_sample}[given.what](
            given, base_of(given.base, given.shape, given.layers, given.device, given.dtype)
        )
    else:
        found = {"memory": bench_memory, "load": bench_load}[given.what](given)
    result = {"ran": ran, "machine": machine, **found}
    print(json.dumps(result) if given.json else "\n".join(f"{key}: {shown(value)}" for key, value in result.items()))


if __name__ == "__main__":
    run(main)
