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

from minidoctor.batching import IGNORE, Batch, Example, ShuffledBatches, collate, micro_batches
from minidoctor.checkpoints.families import read_model_config
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import TrainConfig, UserError, check
from minidoctor.evaluate.summary import OUT_OF_SCOPE
from minidoctor.expert_queue import ExpertQueue
from minidoctor.model import Model, trainable_parameters
from minidoctor.picture.statistics import Top1, joint_distribution, mutual_information
from minidoctor.questions.read import read_questions
from minidoctor.questions.rows import Row
from minidoctor.step import Losses, compute_losses, make_optimizer, make_queue, train_step
from minidoctor.study import routing_forms as forms
from minidoctor.study.run import RunResult, evaluation_rows
from minidoctor.study.sequence_variants import SEQUENCE_VARIANTS, SequenceConfig, SequenceVariant
from minidoctor.study.variants import adapter_config, train_config
from minidoctor.text.tokenizer import Tokenizer, encode_conversation, load_tokenizer

TEXT_SEED = 999_999  # of no text that the base was pretrained on: data/make_base.py counts up from 0
N_PROMPTS = 500  # unlabelled prompts for the centres of groups

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


class RoutingForm:
    """The loss function of a variant, which first chooses the groups of experts, and its queue."""

    def __init__(self, model: Model, variant: SequenceVariant, prompts: list[Example], train: TrainConfig):
        self.variant, self.centres, self.stage = variant, None, 0
        self.groups = forms.ExpertGroups(model, variant.n_groups) if variant.groups else None
        if variant.groups in ("k-means", "contrast"):
            self.centres = find_centres(model, variant, prompts, train.seed)
        self.queue = make_queue(model, train)
        if self.queue is not None:
            n_layers, n_experts, capacity, dim = self.queue.keys.shape
            if variant.contrast == "pair":  # one ring of sequences, with as many slots as all rings of a sublayer
                dim, capacity = model.config.dim + n_layers * n_experts, n_experts * capacity
                n_layers = n_experts = 1
            self.queue = ExpertQueue(n_layers, n_experts, capacity, dim)
            if variant.reservoir:
                self.queue = forms.ReservoirQueue(n_layers, n_experts, capacity, dim, train.seed)

    def choose_groups(self, model: Model, batch: Batch) -> None:
        if self.groups:
            self.groups.group = torch.tensor([self.stage])
            if self.centres is not None:
                features = forms.mean_embeddings(model, batch.tokens, forms.prompt_mask(batch))  # (B, D)
                self.groups.group = forms.nearest_centre(features, self.centres)  # (B,)

    def expert_shares(self, model: Model) -> Tensor:
        """Return (E*R,), for each row of A the share of the batch that its group has, times the groups, at most 1."""
        assert self.groups
        assert model.adapter
        shares = self.groups.group.bincount(minlength=self.groups.n_groups) / len(self.groups.group)
        shares = (shares * self.groups.n_groups).clamp(max=1)  # (G,)
        return shares.repeat_interleave(self.groups.size * model.adapter.rank)

    def __call__(
        self, model: Model, batch: Batch, anchors: Tensor, queue: ExpertQueue | None, config: TrainConfig
    ) -> Losses:
        self.choose_groups(model, batch)
        pairs = self.variant.contrast == "pair"
        losses = compute_losses(model, batch, anchors, None if pairs else queue, config)
        mask = batch.attention_mask
        if self.groups:
            losses.terms["balance"] = torch.stack([self.groups.balance(r, mask) for r in losses.routings]).mean()
        if self.variant.only_in_use:
            losses.terms["balance"] = torch.stack([forms.balance_in_use(r, mask) for r in losses.routings]).mean()
        if pairs and queue is not None:
            features = forms.mean_embeddings(model, batch.tokens, forms.prompt_mask(batch))  # (B, D)
            routing = forms.sequence_routing(losses.routings, mask)  # (B, L, E)
            key_features, key_routing = queue.keys[queue.filled()].split([features.shape[1], routing[0].numel()], dim=1)
            key_routing = key_routing.unflatten(1, routing.shape[1:])  # (M, L, E)
            losses.terms["contrast"] = forms.pair_contrast(features, routing, key_features, key_routing)
            keys = torch.cat([features, routing.detach().flatten(1)], dim=1).unsqueeze(0)  # (1, B, D + L*E)
            losses = losses._replace(z=keys, top1=torch.zeros(keys.shape[:2], dtype=torch.long))
        return losses


def find_centres(model: Model, variant: SequenceVariant, prompts: list[Example], seed: int) -> Tensor:
    """Return the centres (G, D) of groups of prompts. The contrast has two random halves of the tokens as views."""
    batch = collate(prompts)
    mask = forms.prompt_mask(batch)  # (n, T)
    if variant.groups == "k-means":
        return forms.k_means_centres(forms.mean_embeddings(model, batch.tokens, mask), variant.n_groups, seed)
    half = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.5  # (n, T)
    views = [forms.mean_embeddings(model, batch.tokens, mask & part) for part in (half, ~half)]
    return forms.contrast_centres(torch.stack(views), variant.n_groups, seed)


@torch.inference_mode()
def measure(model: Model, form: RoutingForm, examples: list[Example], stage: int) -> Measured:
    """Measure examples of one stage under teacher forcing."""
    examples = sorted(examples, key=lambda example: len(example.tokens))  # for less padding
    form.stage, n_correct, loss, ids, is_answer = stage, 0, 0.0, list[Tensor](), list[Tensor]()
    for start in range(0, len(examples), 32):
        batch = collate(examples[start : start + 32])
        form.choose_groups(model, batch)
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


def text_loss(model: Model, form: RoutingForm, examples: list[Example]) -> float:
    """Return nats per token of a text. That of the oracle is a mean over both stages, because a text has none."""
    stages = (0, 1) if form.variant.groups == "oracle" else (0,)
    return statistics.fmean(measure(model, form, examples, stage).loss for stage in stages)


def train_stage(
    model: Model, form: RoutingForm, examples: list[Example], train: TrainConfig, stage: int
) -> list[float]:
    """Train with a new optimizer and schedule, and return the seconds of each step."""
    form.stage, optimizer = stage, make_optimizer(model, train)
    batches = ShuffledBatches(examples, train.batch_size, train.seed).starting_at(0)
    routers = [p for name, p in trainable_parameters(model).items() if ".router." in name]
    slow = routers if stage and form.variant.router_factor < 1 else []
    seconds = []
    for step in range(train.steps):
        batch = micro_batches(next(batches), 1)
        start = time.perf_counter()
        before = [p.detach().clone() for p in slow]
        experts = {n: p for n, p in trainable_parameters(model).items() if "lora_" in n and form.variant.proportional}
        old_experts = [p.detach().clone() for p in experts.values()]
        metrics = train_step(model, optimizer, form.queue, batch, step, train, form)
        with torch.no_grad():
            for p, old in zip(slow, before, strict=True):
                p.lerp_(old, 1 - form.variant.router_factor)  # AdamW's update is proportional to the learning rate
            for (name, p), old in zip(experts.items(), old_experts, strict=True):
                # AdamW gives an expert with a few gradients updates of full size, so a few prompts that the groups
                # misplace would make it forget.
                shares = form.expert_shares(model)  # (E*R,)
                p.copy_(torch.lerp(old, p, shares[:, None] if name.endswith("lora_a") else shares[None]))
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
    if mixed and variant.groups == "oracle":
        return {}
    stage = stage_function(split, [row for row, _ in questions])
    train, test = ([[e for row, e in pairs if stage(row) == s] for s in (0, 1)] for pairs in (questions, tests))
    for path, parts in ((config.data, train), (config.eval, test)):
        check(all(parts), f"{path}: no question for one of the stages by {split}; choose other --stages")
    torch.manual_seed(seed)
    model = load_model(config.base, adapter=adapter_config(variant, config, read_model_config(config.base)))
    assert model.adapter
    stage_config = train_config(variant, replace(config, steps=2 * config.steps) if mixed else config, seed)
    prompts = [example for _, example in questions[:: max(1, len(questions) // N_PROMPTS)]]
    form = RoutingForm(model, variant, prompts, stage_config)
    measures = {"trainable_parameters": float(sum(p.numel() for p in trainable_parameters(model).values()))}
    if text:
        measures["text_loss_before"] = text_loss(model, form, text)
    if mixed:
        seconds = train_stage(model, form, train[0] + train[1], stage_config, 0)
    else:
        seconds = train_stage(model, form, train[0], stage_config, 0)
        first, second = (measure(model, form, test[s], s) for s in (0, 1))
        measures |= stage_measures(first, second, "_midway")
        seconds += train_stage(model, form, train[1], stage_config, 1)
    first, second = (measure(model, form, test[s], s) for s in (0, 1))
    measures |= stage_measures(first, second)
    measures |= {"accuracy": (first.accuracy + second.accuracy) / 2, "step_seconds": statistics.median(seconds)}
    if not mixed:
        measures["forgetting"] = measures["first_accuracy_midway"] - first.accuracy
    if text:
        measures["text_loss"] = text_loss(model, form, text)
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
