"""A training run: load, evaluate, train, evaluate, report.

One training step is in minidoctor/step.py. Everything that must survive a crash is in state.py.
"""

import itertools
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minidoctor.batching import IGNORE, ShuffledBatches, micro_batches
from minidoctor.checkpoints.adapters import CONFIG, check_vocabulary, save_adapter_config
from minidoctor.checkpoints.hugging_face import find_non_finite, load_model
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.main import is_out_of_memory
from minidoctor.cli.processes import Processes
from minidoctor.config import UserError, check
from minidoctor.evaluate.inputs import TRAINING_QUESTIONS
from minidoctor.files.safetensors import write_tensors
from minidoctor.ops.compiled import compile_blocks
from minidoctor.ops.quantized import QuantizedWeight
from minidoctor.step import compute_losses, make_optimizer, make_queue, train_step
from minidoctor.text.tokenizer import Tokenizer, load_tokenizer
from minidoctor.training.data import TrainingData, load_data
from minidoctor.training.groups import learn_groups
from minidoctor.training.log import MetricsLog
from minidoctor.training.memory import estimate, format_estimate, free_memory
from minidoctor.training.parallel import compute_share, reshard, shard_base
from minidoctor.training.report import evaluate_rows, write_report
from minidoctor.training.start import hash_inputs, resume_command
from minidoctor.training.state import Components, RunState, restore, save
from minidoctor.training.stop import StopSignal


def train(state: RunState, processes: Processes = Processes()) -> None:  # noqa: B008  # frozen
    """Run from the first step, or from a saved state, to the report. Raises OSError, UserError and MemoryError.

    With several processes, only the first writes and prints.
    """
    config = state.config
    torch.manual_seed(config.seed)  # for the initial values of experts and routers
    device = choose_device(config.device)
    tokenizer = load_tokenizer(config.base, config.chat_format)
    if not tokenizer.format:
        raise UserError(tokenizer.note)
    check(
        processes.size > 1 or not config.shard, "--shard needs several processes: torchrun --nproc-per-node N train.py"
    )
    loading_device = torch.device("cpu") if config.shard else device
    dtype = choose_dtype(config.dtype, device)
    state.config = config = replace(config, dtype=str(dtype).removeprefix("torch."))  # a resumed run keeps it
    model = load_model(config.base, dtype, loading_device, state.adapter, config.quantize)
    check_vocabulary(config.base, model, tokenizer)
    if tensor := find_non_finite(model):
        raise UserError(f"{config.base}: {tensor} contains NaN or infinity; the checkpoint is damaged, get it again")
    data = load_data(config, tokenizer, model.config.max_seq_len)
    learn_groups(model, data.examples, config.seed)
    if config.shard:
        shard_base(model, device, processes)
    batches = ShuffledBatches(data.examples, config.batch_size, config.seed)
    components = Components(model, make_optimizer(model, config), make_queue(model, config))
    check(processes.size <= len(data.examples), f"{processes.size} processes for {len(data.examples)} examples")
    print(describe(components, tokenizer, data, batches, state, processes.size))
    if processes.size > 1:
        print(f"{processes.size} processes, each with its share of every batch")
    prepare_output(components, tokenizer, data, state, processes)
    again = resume_command(config, processes.size)
    # With a sharded base a forward pass needs all processes, so all of them answer all questions.
    evaluating = Processes() if config.shard else processes
    try:
        if data.eval_rows and state.eval_before is None:
            state.eval_before = evaluate_rows(model, tokenizer, data.eval_rows, evaluating)
            reshard(model)
            if processes.is_first:
                save(components, state)
        if config.compile:  # after the evaluation: the compiler specializes blocks for the first shapes it sees
            compile_blocks(model.model.layers)
        if not fit(components, batches, state, processes):
            print(f"stopped and saved after step {state.step}; continue with: {again}")
            return
        eval_after = evaluate_rows(model, tokenizer, data.eval_rows, evaluating)
        if processes.is_first:
            write_report(model, state, eval_after, data.eval_trained, processes.size)
    except KeyboardInterrupt:
        print(f"interrupted; continue from the last save with: {again}")
        raise


def describe(
    components: Components,
    tokenizer: Tokenizer,
    data: TrainingData,
    batches: ShuffledBatches,
    state: RunState,
    n_processes: int,
) -> str:
    """Return the lines printed before the first step."""
    (model, _, queue), config, n = components, state.config, len(data.examples)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_quantized = sum(w.n_weights for w in model.modules() if isinstance(w, QuantizedWeight))
    frozen = sum(p.numel() for p in model.parameters()) - trainable + n_quantized
    size, epochs = min(config.batch_size, n), config.steps / batches.per_epoch
    place = f"{config.dtype} on {model.lm_head.weight.device.type}"
    lines = [f"{config.base}: {frozen:,} frozen and {trainable:,} trainable parameters, {place}"]
    if n_quantized:
        lines.append(f"{config.base}: {n_quantized:,} of the frozen parameters are quantized to {config.quantize}")
    lines += [f"{config.base}: {tokenizer.note}"]
    lines += [f"{config.data}: {n:,} examples in batches of {size}, {epochs:.1f} epochs"]
    if model.groups:
        lines.append(f"{state.adapter.n_groups} groups of experts, learned from the prompts of the examples")
    if queue:
        kib = sum(buffer.nbytes for buffer in queue.buffers()) / 1024
        lines.append(f"expert queue: {kib:,.0f} KiB, for every batch size and sequence length")
    for flag, steps in {"--warmup": config.warmup, "--contrast-warmup": config.contrast_warmup if queue else 0}.items():
        if steps > config.steps:
            lines.append(f"note: {flag} {steps} is longer than the run: the full value is never reached")
    if state.step:
        lines.append(f"continuing after step {state.step}")
    size = math.ceil(math.ceil(size / config.accumulate) / n_processes)  # rows of a process in the largest micro-batch
    # Upper bounds of their tokens
    n_tokens = size * max(len(example.tokens) for example in data.examples)
    n_answers = size * max(sum(target != IGNORE for target in example.targets) for example in data.examples)
    needed = estimate(model, queue, config, n_tokens, n_answers)
    return "\n".join([*lines, format_estimate(needed, free_memory(model.lm_head.weight.device))])


def prepare_output(
    components: Components, tokenizer: Tokenizer, data: TrainingData, state: RunState, processes: Processes
) -> None:
    """Save a new run at step 0, or restore the saved tensors. Raises UserError if an input has changed."""
    config, out = state.config, Path(state.config.out)
    is_saved = bool(state.input_hashes)
    hash_inputs(state)
    out.mkdir(parents=True, exist_ok=True)
    if is_saved:
        restore(components, state)
    processes.gather(None)  # before the first process writes again
    if not processes.is_first:
        return
    save(components, state)  # also a resumed one, whose new paths and flags the next --resume needs
    # A run can be killed between two files, so those that are missing are written by the resumed run.
    if not state.step or not (out / CONFIG).exists():
        save_adapter_config(out, config.base, state.adapter, str(tokenizer.chat_format), config.quantize)
    if not state.step or not (out / TRAINING_QUESTIONS).exists():
        write_tensors(out / TRAINING_QUESTIONS, {"hashes": data.question_hashes})


def fit(components: Components, batches: ShuffledBatches, state: RunState, processes: Processes) -> bool:
    """Train from `state.step` to the last step, log and save. Return False if a signal stopped it before."""
    config, (model, optimizer, queue) = state.config, components
    log = MetricsLog(Path(config.out), state.step) if processes.is_first else None
    losses, all_reduce, start = compute_losses, None, time.perf_counter()
    if processes.size > 1:
        losses, all_reduce = partial(compute_share, processes=processes), processes.all_reduce
    model.train()
    with (
        StopSignal() as stop,
        tqdm(total=config.steps, initial=state.step, desc="training", disable=not processes.is_first) as progress,
    ):
        for examples in itertools.islice(batches.starting_at(state.step), config.steps - state.step):
            try:
                inputs = micro_batches(examples, config.accumulate)
                metrics = train_step(model, optimizer, queue, inputs, state.step, config, losses, all_reduce)
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    raise MemoryError(advise_on_memory(state, error, processes.size)) from None
                raise
            seconds, start = time.perf_counter() - start, time.perf_counter()
            if log:
                log.add(state.step, metrics, seconds)
            state.step += 1
            state.seconds += seconds
            state.tokens += metrics.n_tokens
            progress.update()
            stopping = processes.any(stop.requested)
            saving = stopping or state.step == config.steps or state.step % config.save_every == 0
            if log and (saving or state.step % config.log_every == 0):
                line, state.expert_load = log.flush()  # before saving: a step with a non-finite loss is not saved
                if saving:
                    save(components, state)
                progress.write(line)  # after saving: the terminal may be closed
            if stopping:
                break
    model.eval()
    return state.step == config.steps


def advise_on_memory(state: RunState, error: BaseException, n_processes: int) -> str:
    reason = next(iter(str(error).splitlines()), "")
    return (
        f"out of memory in step {state.step} ({reason:.200}); add --recompute or raise --accumulate and continue from "
        f"the last save with: {resume_command(state.config, n_processes)}; or lower --batch-size or --max-seq-len in a "
        "new run"
    )
