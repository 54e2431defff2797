"""One run of the ablation: a variant, a seed, and its measures. README.md in this directory defines these."""

import math
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

import torch

from minidoctor.batching import IGNORE, Example, ShuffledBatches, collate, micro_batches
from minidoctor.checkpoints.families import read_model_config
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import check
from minidoctor.evaluate.evaluation import evaluate
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.losses import language_model_loss
from minidoctor.model import Model, trainable_parameters
from minidoctor.picture.statistics import Top1, label_information, load_statistics, mean_cosine_similarity, top1_experts
from minidoctor.questions.read import read_questions
from minidoctor.questions.rows import Row
from minidoctor.router import Router
from minidoctor.step import compute_losses, make_optimizer, make_queue, train_step
from minidoctor.study.variants import VARIANTS, AblationConfig, adapter_config, compute_losses_in_batch, train_config
from minidoctor.text.tokenizer import Tokenizer, encode_conversation, load_tokenizer
from minidoctor.training.log import peak_memory_gib


@dataclass(frozen=True)
class RunResult:
    """A run and its measures: those of the routing only with a router, accuracies only without --loss-only."""

    variant: str
    seed: int
    measures: dict[str, float]


def run_variant(name: str, seed: int, config: AblationConfig) -> RunResult:
    """Fine-tune one variant with one seed and measure the result. Raises UserError if a loss is not finite.

    Runs of the same seed see the same batches in the same order, and their experts start from the same values.
    """
    variant = VARIANTS[name]
    torch.manual_seed(seed)
    adapter = adapter_config(variant, config, read_model_config(config.base))
    model, tokenizer = load_model(config.base, adapter=adapter), load_tokenizer(config.base)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.requires_grad_(variant.trainable_router)
    train, rows = train_config(variant, config, seed), evaluation_rows(config)
    examples = [e for e in encode(read_questions(config.data).rows, tokenizer, config) if max(e.targets) != IGNORE]
    check(bool(examples), f"{config.data}: no answer begins within --max-seq-len {config.max_seq_len}")
    batches = ShuffledBatches(examples, config.batch_size, seed).starting_at(0)
    optimizer, in_batch = make_optimizer(model, train), variant.contrast == "batch"
    queue, losses = (None, compute_losses_in_batch) if in_batch else (make_queue(model, train), compute_losses)
    seconds, measures, before = [], {}, None

    model.train()
    for step in range(config.steps):
        batch = micro_batches(next(batches), 1)
        start = time.perf_counter()
        metrics = train_step(model, optimizer, queue, batch, step, train, losses)
        seconds.append(time.perf_counter() - start)
        if step + 1 == max(1, config.steps * 3 // 4):
            measures["peak_memory_gib"] = peak_memory_gib()  # before the first evaluation
            before = top1_experts(model, tokenizer, rows, config.max_seq_len) if routers else None
    model.eval()
    last = {key: loss.item() for key, loss in metrics.losses.items()}
    check(all(map(math.isfinite, last.values())), f"{name}, seed {seed}: losses {last} are not finite; lower the --lr")
    measures["trainable_parameters"] = sum(p.numel() for p in trainable_parameters(model).values())
    measures["nll"] = mean_loss(model, encode(rows, tokenizer, config))
    measures |= {"train_loss": last["lm"], "step_seconds": statistics.median(seconds)}
    if not config.loss_only:
        measures |= accuracies(model, tokenizer, rows)
    if before:
        measures |= routing_measures(model, rows, before, top1_experts(model, tokenizer, rows, config.max_seq_len))
    return RunResult(name, seed, measures)


def evaluation_rows(config: AblationConfig) -> list[Row]:
    rows = read_questions(config.eval).rows
    n = min(config.eval_rows or len(rows), len(rows))
    # The same ones for all runs, and at random: evenly spaced rows of a file with a period can be of one kind.
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), n))]


def encode(rows: list[Row], tokenizer: Tokenizer, config: AblationConfig) -> list[Example]:
    return [encode_conversation(row.messages, tokenizer, config.max_seq_len) for row in rows]


@torch.inference_mode()
def mean_loss(model: Model, examples: list[Example]) -> float:
    """Return nats per answer token."""
    total, n_tokens = 0.0, 0
    for start in range(0, len(examples), 8):
        batch = collate(examples[start : start + 8])
        hidden, _ = model.hidden(batch.tokens)  # (B, T, D)
        total += language_model_loss(hidden, model.lm_head.weight, batch.targets, batch.answer_positions).item()
        n_tokens += len(batch.answer_positions)
    check(n_tokens > 0, "no evaluation question has an answer that begins within --max-seq-len")
    return total / n_tokens


def accuracies(model: Model, tokenizer: Tokenizer, rows: list[Row]) -> dict[str, float]:
    """Return the accuracy of all questions and of each kind, in all and per language."""
    result = evaluate(model, tokenizer, rows, show_progress=False, config=EvalConfig(score=("text",)))
    correct: dict[str, list[bool]] = defaultdict(list)
    for row, prediction in zip(rows, result.predictions, strict=True):
        kind = "multiple_choice" if row.options else "free_form"
        for measure in ("accuracy", kind, f"accuracy_{row.language}", f"{kind}_{row.language}"):
            correct[measure].append(bool(prediction.correct))
    return {measure: statistics.fmean(values) for measure, values in sorted(correct.items())}


def routing_measures(model: Model, rows: list[Row], before: Top1, after: Top1) -> dict[str, float]:
    """Return the statistics of the routing at the end, and its changes since `before`."""
    assert model.adapter
    n_experts = model.adapter.n_experts
    load = load_statistics(after, n_experts)
    measures = {"load_entropy": load.entropy, "underused_experts": load.underused, "least_load": load.least}
    for label in ("topic", "language"):
        information = label_information(after, [getattr(row, label) for row in rows], n_experts)
        measures |= {f"{label}_bits": information.bits, f"{label}_bits_shuffled": information.shuffled}
    measures["routing_churn"] = (after.expert_ids != before.expert_ids).double().mean().item()
    return measures | {"mean_cosine_similarity": mean_cosine_similarity(model)}
