"""One run of the sequential experiment: two stages of training without replay, and what is left of the first.

README.md in this directory defines the measures. A run goes through every split in `stages`, with a new adapter each.
"""

import itertools
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidoctor.batching import IGNORE, Example, ShuffledBatches, collate, micro_batches
from minidoctor.checkpoints.families import read_model_config
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import TrainConfig, UserError, check
from minidoctor.evaluate.summary import OUT_OF_SCOPE
from minidoctor.expert_queue import ExpertQueue
from minidoctor.model import Model, trainable_parameters
from minidoctor.picture.statistics import Top1, joint_distribution, mutual_information
from minidoctor.questions.read import read_questions
from minidoctor.questions.rows import Row
from minidoctor.router import PromptGroups
from minidoctor.step import make_optimizer, make_queue, train_step
from minidoctor.study.run import RunResult, evaluation_rows
from minidoctor.study.sequence_variants import SEQUENCE_VARIANTS, SequenceConfig
from minidoctor.study.variants import adapter_config, train_config
from minidoctor.text.tokenizer import Tokenizer, encode_conversation, load_tokenizer
from minidoctor.training.groups import learn_groups

TEXT_SEED = 999_999  # of no text that the base was pretrained on: data/make_base.py counts up from 0

Pairs = list[tuple[Row, Example]]


class Measured(NamedTuple):
    """The measures of a model on examples with reference answers."""

    accuracy: float  # share of examples in which every target token is the most probable one
    loss: float  # nats per target token
    expert_ids: Tensor  # (L, N), top-1 experts of all tokens
    is_answer: Tensor  # (N,), True at the answer positions


def stage_function(split: str, rows: list[Row]) -> Callable[[Row], int | None]:
    """Return the function from a question to its stage, 0 or 1, or None if it belongs to neither.

    The departments are in alphabetical order. The first ones, with about half of the training questions, are stage 0.
    """
    if split == "form":
        return lambda row: int(len(row.messages) > 2 or row.kind == OUT_OF_SCOPE)
    if split in ("language", "mixed"):
        return language_stage
    counts, stages, total = Counter(row.topic for row in rows if row.topic), dict[str, int](), 0
    for topic in sorted(counts):
        stages[topic] = int(total + counts[topic] / 2 > counts.total() / 2)
        total += counts[topic]
    return lambda row: stages.get(row.topic)


def language_stage(row: Row) -> int | None:
    """Return 0 for Chinese, 1 for English, or None for a conversation in both languages."""
    chinese = {bool(re.search("[\u4e00-\u9fff]", x["content"])) for x in row.messages if x["role"] == "user"}
    return None if len(chinese) > 1 else int(not chinese.pop())


def encode_pairs(rows: list[Row], tokenizer: Tokenizer, config: SequenceConfig) -> Pairs:
    """Return the free-form questions whose answers begin within the maximum length, with their tokens."""
    pairs = [(row, encode_conversation(row.messages, tokenizer, config.max_seq_len)) for row in rows if not row.options]
    return [(row, example) for row, example in pairs if max(example.targets, default=IGNORE) != IGNORE]


def declarative_examples(tokenizer: Tokenizer, config: SequenceConfig) -> list[Example]:
    """Return paragraphs of the kind of text that the shipped base was pretrained on, with targets on all tokens."""
    if not config.text_paragraphs:
        return []
    try:
        from data.make_text import declarative_text, read_table  # data/ is not installed with the package
    except ModuleNotFoundError:
        raise UserError("data/make_text.py: not found; run in the checkout, or with --text-paragraphs 0") from None
    text = itertools.islice(declarative_text(read_table()[1], 1, TEXT_SEED), config.text_paragraphs)
    ids = [[*tokenizer.start, *tokenizer.encode(paragraph), *tokenizer.eos_ids[:1]] for paragraph in text]
    return [Example(tokens[:-1][: config.max_seq_len], tokens[1:][: config.max_seq_len]) for tokens in ids]


class OracleGroups(PromptGroups):
    """Votes for the group with the number of the stage, which no prompt tells."""

    stage = 0

    def forward(self, embeddings: Tensor) -> Tensor:
        votes = torch.zeros(*embeddings.shape[:2], len(self.centres))  # (B, T, J)
        votes[..., self.stage] = 1.0
        return votes


def set_stage(model: Model, stage: int) -> None:
    """Tell the oracle the stage of the questions that follow."""
    if isinstance(model.groups, OracleGroups):
        model.groups.stage = stage


@torch.inference_mode()
def measure(model: Model, examples: list[Example], stage: int) -> Measured:
    """Measure examples of one stage under teacher forcing."""
    examples = sorted(examples, key=lambda example: len(example.tokens))  # for less padding
    set_stage(model, stage)
    n_correct, loss, ids, is_answer = 0, 0.0, list[Tensor](), list[Tensor]()
    for start in range(0, len(examples), 32):
        batch = collate(examples[start : start + 32])
        hidden, routings = model.hidden(batch.tokens)  # (B, T, D)
        logits = model.lm_head(hidden.flatten(0, 1)[batch.answer_positions])  # (n, V)
        targets = batch.targets.flatten()[batch.answer_positions]  # (n,)
        wrong = batch.answer_positions[logits.argmax(-1) != targets]
        n_correct += len(batch.tokens) - len((wrong // batch.tokens.shape[1]).unique())
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        is_answer.append((batch.targets != IGNORE)[batch.attention_mask])  # (N,)
        ids.append(torch.stack([r.expert_ids[..., 0][batch.attention_mask] for r in routings] or [is_answer[-1]]))
    answers = torch.cat(is_answer)
    return Measured(n_correct / len(examples), loss / int(answers.sum()), torch.cat(ids, dim=1), answers)


def stage_measures(first: Measured, second: Measured, suffix: str = "") -> dict[str, float]:
    parts = {"first": first, "second": second}
    return {f"{s}_{key}{suffix}": getattr(part, key) for s, part in parts.items() for key in ("accuracy", "loss")}


def stage_bits(first: Tensor, second: Tensor, n_experts: int) -> float:
    """Return the mutual information of stage and top-1 expert (L, n), (L, m) in bits, averaged over the sublayers."""
    stage = torch.cat([torch.zeros(first.shape[1], dtype=torch.long), torch.ones(second.shape[1], dtype=torch.long)])
    joint = joint_distribution(Top1(torch.cat([first, second], dim=1), stage), ["first", "second"], n_experts)
    return mutual_information(joint).mean().item()


def text_loss(model: Model, examples: list[Example]) -> float:
    """Return nats per token of a text. That of the oracle is a mean over both stages, because a text has none."""
    stages = (0, 1) if isinstance(model.groups, OracleGroups) else (0,)
    return statistics.fmean(measure(model, examples, stage).loss for stage in stages)


def train_stage(
    model: Model, queue: ExpertQueue | None, examples: list[Example], train: TrainConfig, stage: int
) -> list[float]:
    """Train with a new optimizer and schedule, and return the seconds of each step."""
    set_stage(model, stage)
    optimizer, batches = make_optimizer(model, train), ShuffledBatches(examples, train.batch_size, train.seed)
    seconds = []
    for step, batch in zip(range(train.steps), batches.starting_at(0), strict=False):
        start = time.perf_counter()
        metrics = train_step(model, optimizer, queue, micro_batches(batch, 1), step, train)
        seconds.append(time.perf_counter() - start)
    last = {key: loss.item() for key, loss in metrics.losses.items()}
    check(all(map(math.isfinite, last.values())), f"losses {last} are not finite; lower the --lr")
    return seconds


def run_split(
    split: str, name: str, config: SequenceConfig, seed: int, questions: Pairs, tests: Pairs, text: list[Example]
) -> dict[str, float]:
    """Train a new adapter in the stages of one split and return its measures.

    "mixed" trains on both languages at once, for the steps of two stages. The oracle, which has no stage there, is left
    out.
    """
    variant, mixed = SEQUENCE_VARIANTS[name], split == "mixed"
    if mixed and variant.oracle:
        return {}
    stage = stage_function(split, [row for row, _ in questions])
    train, test = ([[e for row, e in pairs if stage(row) == s] for s in (0, 1)] for pairs in (questions, tests))
    for path, parts in ((config.data, train), (config.eval, test)):
        check(all(parts), f"{path}: no question for one of the stages by {split}; choose other --stages")
    torch.manual_seed(seed)
    model = load_model(config.base, adapter=adapter_config(variant, config, read_model_config(config.base)))
    assert model.adapter
    stage_config = train_config(variant, replace(config, steps=2 * config.steps) if mixed else config, seed)
    learn_groups(model, [example for _, example in questions], seed)
    if variant.oracle:
        model.groups = OracleGroups(model.config.dim, variant.n_groups)
    queue = make_queue(model, stage_config)
    measures = {"trainable_parameters": float(sum(p.numel() for p in trainable_parameters(model).values()))}
    if text:
        measures["text_loss_before"] = text_loss(model, text)
    if mixed:
        seconds = train_stage(model, queue, train[0] + train[1], stage_config, 0)
    else:
        seconds = train_stage(model, queue, train[0], stage_config, 0)
        first, second = (measure(model, test[s], s) for s in (0, 1))
        measures |= stage_measures(first, second, "_midway")
        seconds += train_stage(model, queue, train[1], stage_config, 1)
    first, second = (measure(model, test[s], s) for s in (0, 1))
    measures |= stage_measures(first, second)
    measures |= {"accuracy": (first.accuracy + second.accuracy) / 2, "step_seconds": statistics.median(seconds)}
    if not mixed:
        measures["forgetting"] = measures["first_accuracy_midway"] - first.accuracy
    if text:
        measures["text_loss"] = text_loss(model, text)
    if (n_experts := model.adapter.n_experts) > 1:
        answers = [part.expert_ids[:, part.is_answer] for part in (first, second)]
        measures["answer_bits"] = stage_bits(answers[0], answers[1], n_experts)
        measures["token_bits"] = stage_bits(first.expert_ids, second.expert_ids, n_experts)
    return measures


def run_sequence(name: str, seed: int, config: SequenceConfig) -> RunResult:
    """Train one variant with one seed in all splits. A measure's name begins with that of its split.

    Runs of the same seed see the same batches in the same order, and their experts start from the same values.
    """
    tokenizer = load_tokenizer(config.base)
    questions = encode_pairs(read_questions(config.data).rows, tokenizer, config)
    tests = encode_pairs(evaluation_rows(config), tokenizer, config)
    text, measures = declarative_examples(tokenizer, config), dict[str, float]()
    for split in config.stages:
        values = run_split(split, name, config, seed, questions, tests, text)
        measures |= {f"{split}_{key}": value for key, value in values.items()}
    return RunResult(name, seed, measures)
