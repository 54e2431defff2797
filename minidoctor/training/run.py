"""A training run: load, evaluate, train, evaluate, report.

One training step is in minidoctor/step.py. Everything that must survive a crash is in state.py.
"""

import itertools
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from minidoctor.batching import IGNORE, ShuffledBatches, micro_batches
from minidoctor.checkpoints.adapters import CONFIG, check_vocabulary, save_adapter_config
from minidoctor.checkpoints.hugging_face import find_non_finite, load_model
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.main import is_out_of_memory
from minidoctor.config import UserError
from minidoctor.files.safetensors import write_tensors
from minidoctor.ops.compiled import compile_blocks
from minidoctor.step import make_optimizer, make_queue, train_step
from minidoctor.text.tokenizer import Tokenizer, load_tokenizer
from minidoctor.training.data import TrainingData, load_data
from minidoctor.training.log import MetricsLog
from minidoctor.training.memory import estimate, format_estimate, free_memory
from minidoctor.training.report import evaluate_rows, write_report
from minidoctor.training.start import hash_inputs, resume_command
from minidoctor.training.state import QUESTIONS, Components, RunState, restore, save
from minidoctor.training.stop import StopSignal


def train(state: RunState) -> None:
    """Run from the first step, or from a saved state, to the report. Raises OSError, UserError and MemoryError."""
    config = state.config
    torch.manual_seed(config.seed)  # for the initial values of experts and routers
    device = choose_device(config.device)
    tokenizer = load_tokenizer(config.base, config.chat_format)
    if not tokenizer.format:
        raise UserError(tokenizer.note)
    model = load_model(config.base, choose_dtype(config.dtype, device), device, state.adapter)
    check_vocabulary(config.base, model, tokenizer)
    if tensor := find_non_finite(model):
        raise UserError(f"{config.base}: {tensor} contains NaN or infinity; the checkpoint is damaged, get it again")
    data = load_data(config, tokenizer, model.config.max_seq_len)
    batches = ShuffledBatches(data.examples, config.batch_size, config.seed)
    components = Components(model, make_optimizer(model, config), make_queue(model, config))
    print(describe(components, tokenizer, data, batches, state))
    prepare_output(components, tokenizer, data, state)
    try:
        if data.eval_rows and state.eval_before is None:
            state.eval_before = evaluate_rows(model, tokenizer, data.eval_rows)
            save(components, state)
        if config.compile:  # after the evaluation: the compiler specializes blocks for the first shapes it sees
            compile_blocks(model.model.layers)
        if not fit(components, batches, state):
            print(f"stopped and saved after step {state.step}; continue with: {resume_command(config.out)}")
            return
        write_report(model, state, evaluate_rows(model, tokenizer, data.eval_rows), data.eval_trained)
    except KeyboardInterrupt:
        print(f"interrupted; continue from the last save with: {resume_command(config.out)}")
        raise


def describe(
    components: Components, tokenizer: Tokenizer, data: TrainingData, batches: ShuffledBatches, state: RunState
) -> str:
    """Return the lines printed before the first step."""
    (model, _, queue), config, n = components, state.config, len(data.examples)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    size, epochs = min(config.batch_size, n), config.steps / batches.per_epoch
    lines = [f"{config.base}: {frozen:,} frozen and {trainable:,} trainable parameters"]
    lines += [f"{config.base}: {tokenizer.note}"]
    lines += [f"{config.data}: {n:,} examples in batches of {size}, {epochs:.1f} epochs"]
    if queue:
        kib = sum(buffer.nbytes for buffer in queue.buffers()) / 1024
        lines.append(f"expert queue: {kib:,.0f} KiB, for every batch size and sequence length")
    for flag, steps in {"--warmup": config.warmup, "--contrast-warmup": config.contrast_warmup if queue else 0}.items():
        if steps > config.steps:
            lines.append(f"note: {flag} {steps} is longer than the run: the full value is never reached")
    if state.step:
        lines.append(f"continuing after step {state.step}")
    size = math.ceil(size / config.accumulate)  # of the largest micro-batch; below, upper bounds of its tokens
    n_tokens = size * max(len(example.tokens) for example in data.examples)
    n_answers = size * max(sum(target != IGNORE for target in example.targets) for example in data.examples)
    needed = estimate(model, queue, config, n_tokens, n_answers)
    return "\n".join([*lines, format_estimate(needed, free_memory(model.lm_head.weight.device))])


def prepare_output(components: Components, tokenizer: Tokenizer, data: TrainingData, state: RunState) -> None:
    """Save a new run at step 0, or restore the saved tensors. Raises UserError if an input has changed."""
    config, out = state.config, Path(state.config.out)
    is_saved = bool(state.input_hashes)
    hash_inputs(state)
    out.mkdir(parents=True, exist_ok=True)
    (restore if is_saved else save)(components, state)
    # A run can be killed between two files, so those that are missing are written by the resumed run.
    if not state.step or not (out / CONFIG).exists():
        save_adapter_config(out, config.base, state.adapter, str(tokenizer.chat_format))
    if not state.step or not (out / QUESTIONS).exists():
        write_tensors(out / QUESTIONS, {"hashes": data.question_hashes})


def fit(components: Components, batches: ShuffledBatches, state: RunState) -> bool:
    """Train from `state.step` to the last step, log and save. Return False if a signal stopped it before."""
    config, (model, optimizer, queue) = state.config, components
    log, start = MetricsLog(Path(config.out), state.step), time.perf_counter()
    model.train()
    with StopSignal() as stop, tqdm(total=config.steps, initial=state.step, desc="training") as progress:
        for examples in itertools.islice(batches.starting_at(state.step), config.steps - state.step):
            try:
                inputs = micro_batches(examples, config.accumulate)
                metrics = train_step(model, optimizer, queue, inputs, state.step, config)
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    raise MemoryError(advise_on_memory(state, error)) from None
                raise
            seconds, start = time.perf_counter() - start, time.perf_counter()
            log.add(state.step, metrics, seconds)
            state.step += 1
            state.seconds += seconds
            state.tokens += metrics.n_tokens
            progress.update()
            stopping = stop.requested
            saving = stopping or state.step == config.steps or state.step % config.save_every == 0
            if saving or state.step % config.log_every == 0:
                line, state.expert_load = log.flush()  # before saving: a step with a non-finite loss is not saved
                if saving:
                    save(components, state)
                progress.write(line)  # after saving: the terminal may be closed
            if stopping:
                break
    model.eval()
    return state.step == config.steps


def advise_on_memory(state: RunState, error: BaseException) -> str:
    reason = next(iter(str(error).splitlines()), "")
    return (
        f"out of memory in step {state.step} ({reason:.200}); add --recompute or raise --accumulate and continue from "
        f"the last save with: {resume_command(state.config.out)}; or lower --batch-size or --max-seq-len in a new run"
    )
