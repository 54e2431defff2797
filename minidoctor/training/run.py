"""TODO"""

import dataclasses
import hashlib
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minidoctor.batching import IGNORE, Example, ShuffledBatches, micro_batches
from minidoctor.checkpoints.adapters import check_vocabulary, save_adapter_config
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.flags import from_flags
from minidoctor.config import AdapterConfig, TrainConfig, UserError
from minidoctor.evaluate.predictions import evaluate
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.summary import table
from minidoctor.expert_queue import ExpertQueue
from minidoctor.files.json_files import write_json
from minidoctor.model import Model
from minidoctor.ops.compiled import compile_blocks
from minidoctor.questions.exams import Questions, normalize_question, overlap, question_files, read_questions
from minidoctor.questions.rows import Row, explained
from minidoctor.step import make_optimizer, make_queue, train_step
from minidoctor.text.tokenizer import Tokenizer, encode_conversation, load_tokenizer
from minidoctor.training.log import MetricsLog, Stop, peak_memory_gib
from minidoctor.training.memory import ADVICE, estimate, free_memory, in_words, out_of_memory
from minidoctor.training.state import STATE, read_state, restore, save

EVALUATION = EvalConfig(score=("auto", "loss"))


def describe(
    model: Model,
    tokenizer: Tokenizer,
    queue: ExpertQueue | None,
    examples: list[Example],
    config: TrainConfig,
    state: dict[str, Any],
) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    lines = [
        f"{config.base}: {total - trained:,} frozen weights, {trained:,} trained",
        f"{config.base}: {tokenizer.note}",
        f"{config.data}: {len(examples):,} examples, {config.steps * config.batch_size / len(examples):.1f} epochs",
    ]
    if queue:
        kib = sum(buffer.numel() * buffer.element_size() for buffer in queue.buffers()) / 1024
        lines.append(f"expert queue: {kib:,.0f} KiB, whatever the batch and the length")
    if state["step"]:
        lines.append(f"going on after step {state['step']}")
    return "\n".join(lines)


def start_or_resume(given: dict[str, Any]) -> tuple[TrainConfig, AdapterConfig, dict[str, Any]]:
    """The configuration, and the run so far (empty for a new one). Raises FileNotFoundError or ValueError."""
    if not given.get("resume"):
        if given.get("n_experts") == 1:
            given.setdefault("top_k", 1)  # plain LoRA: there is nothing to choose
        config, adapter = from_flags(TrainConfig, given), from_flags(AdapterConfig, given)
        if (Path(config.out) / STATE).exists():
            raise UserError(
                f"{config.out}: holds a run already; --resume goes on with it, another --out starts a new one"
            )
        return config, adapter, {}
    out = given.get("out", TrainConfig.out)
    state = read_state(Path(out))
    lighter: dict[str, Any] = {name: given[name] for name in ("accumulate", "recompute") if name in given}
    lighter["compile"] = given.get("compile", False)  # as the machine can, which may be another one
    config, adapter = dataclasses.replace(state["config"], out=out, resume=True, **lighter), state["adapter"]
    stored = dataclasses.asdict(config) | dataclasses.asdict(adapter)
    for name, value in given.items():
        if stored[name] != value:
            raise UserError(f"--resume: {name} is {value}, the run in {out} was started with {stored[name]}")
    return config, adapter, state


def read_data(config: TrainConfig) -> tuple[list[Row], list[Row], int]:
    """Questions to learn, questions to evaluate on, and how many of these are among the first as well.

    Prints what had to be left out. Raises FileNotFoundError or ValueError.
    """
    learned = read_questions(config.data)
    tested = read_questions(config.eval) if config.eval else Questions([], [])
    for odd in (learned.odd, tested.odd):
        print("".join(f"left out: {line}\n" for line in odd[:5]), end="")
        if len(odd) > 5:
            print(f"left out: {len(odd) - 5} more")
    rows = [row for row in learned.rows if row.messages[-1]["role"] == "assistant"]
    if len(rows) < len(learned.rows):
        print(f"left out: {len(learned.rows) - len(rows)} questions of {config.data} that have no answer")
    both = overlap(rows, tested.rows)
    if both and config.leave_out_eval:
        before = len(rows)
        rows = [row for row in rows if normalize_question(row.question) not in both]
        print(f"left out: {before - len(rows)} of {before} questions of {config.data} that stand in {config.eval} too")
        both = set()
    seen = sum(normalize_question(row.question) in both for row in tested.rows)
    if seen:
        print(
            f"WARNING: {seen} of {len(tested.rows)} questions of {config.eval} stand in {config.data} too: the "
            "accuracy on them shows memory, not knowledge; --leave-out-eval leaves them out of training"
        )
    if not rows:
        raise UserError(f"{config.data}: no question to learn from is left")
    return rows, tested.rows, seen


def train(config: TrainConfig, adapter: AdapterConfig, state: dict[str, Any]) -> None:
    """A run from its start, or from `state`, to its report."""
    device, out = choose_device(config.device), Path(config.out)
    torch.manual_seed(config.seed)  # of the experts' first values
    tokenizer = load_tokenizer(config.base, config.chat_format)
    if not tokenizer.format:
        raise UserError(tokenizer.note)
    model = load_model(config.base, choose_dtype(config.dtype, device), device, adapter)
    check_vocabulary(config.base, model, tokenizer)
    rows, eval_rows, eval_seen = read_data(config)
    conversations = [explained(row) if config.explain else row.messages for row in rows]
    encoded = [encode_conversation(messages, tokenizer, config.max_seq_len) for messages in conversations]
    examples = [example for example in encoded if max(example.targets) != IGNORE]
    if len(examples) < len(encoded):
        print(f"{len(encoded) - len(examples)} of {len(encoded)} examples left out: no answer before --max-seq-len")
    if not examples:
        raise UserError(f"{config.data}: no answer begins within max_seq_len={config.max_seq_len} tokens")
    longest, context = max(len(example.tokens) for example in examples), model.config.max_seq_len
    most_answers = max(sum(target != IGNORE for target in example.targets) for example in examples)
    if longest > context:
        raise UserError(f"{config.data}: an example has {longest} tokens, {config.base} reads {context}: --max-seq-len")
    batches = ShuffledBatches(examples, config.batch_size, config.seed)
    optimizer, queue = make_optimizer(model, config), make_queue(model, config)
    digest = hashlib.sha256()
    for path in filter(None, (config.data, config.eval)):
        for file in question_files(Path(path)):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    if state:
        restore(out, model, optimizer, queue, state, digest.hexdigest())
    else:
        save_adapter_config(out, config.base, adapter, str(tokenizer.chat_format))
        state = {"step": 0, "seconds": 0.0, "tokens": 0, "load": [], "eval_before": None}
        state |= {"config": config, "adapter": adapter, "data": digest.hexdigest()}
        save(out, model, optimizer, queue, state)
    print(describe(model, tokenizer, queue, examples, config, state))
    in_a_part = math.ceil(config.batch_size / config.accumulate)
    needed = estimate(model, config, in_a_part * longest, in_a_part * most_answers)
    print(in_words(needed, free_memory(device)))
    if eval_rows and state["eval_before"] is None:
        before = evaluate(model, tokenizer, eval_rows, config=EVALUATION)["summary"]
        save(out, model, optimizer, queue, state | {"eval_before": before})
        state["eval_before"] = before

    if config.compile:
        compile_blocks(
            model.model.layers
        )  # not before: of a block only so many kinds are made, and the steps shall have theirs
    if not fit(model, optimizer, queue, batches, config, state):
        print(f"stopped and saved after step {state['step']}; go on with: python train.py --out {out} --resume")
        return
    eval_after = evaluate(model, tokenizer, eval_rows, config=EVALUATION)["summary"] if eval_rows else None
    report = {
        "eval_before": state["eval_before"],
        "eval_after": eval_after,
        "eval_seen": eval_seen,
        "steps": state["step"],
        "seconds": state["seconds"],
        "tokens_per_second": state["tokens"] / state["seconds"],
        "peak_memory_gib": peak_memory_gib(),
        "trained_weights": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "expert_load": state["load"],
        "config": dataclasses.asdict(config),
        "adapter": dataclasses.asdict(adapter),
    }
    write_json(out / "report.json", report)
    if state["eval_before"] and eval_after:
        print(f"before\n{table(state['eval_before'])}\nafter\n{table(eval_after)}")
    print(f"{out}/report.json   ask it: python sample.py --base {config.base} --adapter {out}")


def fit(
    model: Model,
    optimizer: torch.optim.Optimizer,
    queue: ExpertQueue | None,
    batches: ShuffledBatches,
    config: TrainConfig,
    state: dict[str, Any],
) -> bool:
    """Trains from `state["step"]` to the last step, logging and saving; False if it was asked to stop before."""
    out, start = Path(config.out), time.perf_counter()
    log, failure = MetricsLog(out, state["step"]), ""
    model.train()
    with Stop() as stop, tqdm(total=config.steps, initial=state["step"], desc="training") as progress:
        for examples in itertools.islice(batches.starting_at(state["step"]), config.steps - state["step"]):
            try:
                parts = micro_batches(examples, config.accumulate)
                figures = train_step(model, optimizer, queue, parts, state["step"], config)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                failure = str(error).splitlines()[0]
                break
            seconds, start = time.perf_counter() - start, time.perf_counter()
            log.add(state["step"], figures, seconds)
            state |= {"step": state["step"] + 1, "seconds": state["seconds"] + seconds}
            state["tokens"] += figures.n_tokens
            progress.update()
            last = state["step"] == config.steps or stop.asked
            saving = last or state["step"] % config.save_every == 0
            if saving or state["step"] % config.log_every == 0:
                line, state["load"] = log.flush()  # before saving: no step is saved whose loss was not finite
                progress.write(line)
            if saving:
                save(out, model, optimizer, queue, state)
            if stop.asked:
                break
    model.eval()
    if failure:
        raise MemoryError(
            f"out of memory in step {state['step']}; the run continues from its last save; {ADVICE} ({failure:.200})"
        )
    return state["step"] == config.steps
