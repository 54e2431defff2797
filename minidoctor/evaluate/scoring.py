"""What a model answers to multiple-choice questions, in the ways that the result names:

    logits     the probability of each option's letter as the next token
    text       the likelihood of each option's text as the answer to the bare question, per token and per character
    generate   the model writes, letters.py reads; what cannot be read is unanswered
    loss       the negative log-likelihood of the right answer

Batches hold questions of like length. What the prompts of a subject have in common at their start (few-shot examples,
the system message) is computed once. In float32 that moves a score by less than TIE; bfloat16 has 8 bits in all, and
close scores can change places.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidoctor.batching import IGNORE, Example
from minidoctor.config import SampleConfig
from minidoctor.evaluate.prompts import Asker, Question
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.generate import complete, prefill
from minidoctor.kv_cache import KVCache
from minidoctor.model import Model
from minidoctor.text.tokenizer import encode_conversation

# Beyond these a batch only costs memory. On a CPU the products are at full speed long before, and what a block makes of
# 4,096 tokens no longer fits into its caches: 300 questions of CMMLU took 162 s by 16 and 125 s by 4 (one core of an
# AMD EPYC, SmolLM2-135M, 2026-11-25).
TOKENS_IN_A_BATCH = {"cpu": 1024, "cuda": 16384}
WORTH_SHARING = 16  # tokens: with fewer in common, a cache costs more than it saves
# Nats. Scores that differ by less are the same. Batches and the shared start move a score by up to 3e-5 (SmolLM2-135M
# in float32, 120 questions, 2026-11-24), so that equal scores would be decided by them.
TIE = 1e-4
# Where nothing ends its answer, a base goes on with questions of its own and answers these: raw, cut before them.
AGAIN = re.compile(r"\n\s*\n|\n(?:题目|问题?|Question)\s*[:：]")


class Wanted(NamedTuple):
    """Tokens whose last n hidden states are needed, in a group that may begin alike."""

    tokens: list[int]
    n: int
    group: str


class Batch(NamedTuple):
    indices: list[int]
    start: int  # tokens of the prefix
    cache: KVCache | None  # one row that has read the prefix


def batches(model: Model, wanted: list[Wanted], batch_size: int) -> Iterator[Batch]:
    """Groups one after the other, the longest first: what does not fit into memory shows at once."""
    groups: dict[str, list[int]] = {}
    for i in sorted(range(len(wanted)), key=lambda i: -len(wanted[i].tokens)):
        groups.setdefault(wanted[i].group, []).append(i)
    most = TOKENS_IN_A_BATCH.get(model.lm_head.weight.device.type, 4096)
    for members in groups.values():
        start, cache = shared_tokens([wanted[i] for i in members]), None
        if start:
            cache = prefill(model, wanted[members[0]].tokens[:start])
        while members:
            size = max(1, min(batch_size, most // (len(wanted[members[0]].tokens) - start)))
            yield Batch(members[:size], start, cache)
            members = members[size:]


def shared_tokens(group: list[Wanted]) -> int:
    """How many tokens at their start all have in common and need not be computed again; 0 if it is not worth it."""
    # The first and the last in order differ first.
    first, last = min(one.tokens for one in group), max(one.tokens for one in group)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    same = min(same, *(len(one.tokens) - one.n for one in group))
    return same if len(group) > 1 and same >= WORTH_SHARING else 0


@torch.inference_mode()
def hidden_states(model: Model, wanted: list[Wanted], batch_size: int) -> Iterator[tuple[list[int], list[Tensor]]]:
    """ShuffledBatches of indices and, for each, the hidden states (n, D) of its last n tokens."""
    device = model.lm_head.weight.device
    source, cache = None, None
    for indices, start, prefix in batches(model, wanted, batch_size):
        rows = [wanted[i].tokens[start:] for i in indices]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)  # (B, T)
        if prefix is None:
            hidden, _ = model.hidden(tokens)  # (B, T, D); padded on the right, where no real token looks
        else:
            # The group's first batch is its longest, but later ones may hold more questions.
            if source is not prefix or cache is None or cache.keys.shape[1] < len(rows):
                source, cache = prefix, prefix.expand(model.config, len(rows), start + longest)
            cache.truncate(start)
            positions = start + torch.arange(longest, device=device).expand_as(tokens)  # (B, T)
            hidden, _ = model.hidden(tokens, positions, cache)  # (B, T, D)
        ends = [len(row) for row in rows]
        yield indices, [hidden[b, ends[b] - wanted[i].n : ends[b]] for b, i in enumerate(indices)]


Outcome = dict[str, Any]  # "scores" of the options, "reply", or "nll" of "n_tokens"
TOO_LONG: Outcome = {"scores": {}, "too_long": True}
Outcomes = Iterator[tuple[int, dict[str, Outcome]]]  # index of the question, and what was found by name of the way


@torch.inference_mode()
def by_logits(model: Model, asker: Asker, questions: list[Question], config: EvalConfig) -> Outcomes:
    """The log-probability of each option's letter as the next token, in nats.

    Where the vocabulary spells a letter in several tokens, that of one after the other: a context for each.
    """
    letters = [asker.letters(one.text, one.tokens, list(one.row.options)) for one in questions]
    lengths = [len(prompt) + max(map(len, spelled)) - 1 for prompt, spelled in letters]
    fits = [i for i, length in enumerate(lengths) if length <= model.config.max_seq_len]
    yield from too_long("logits", len(questions), fits)
    contexts = [(i, tuple(ids[:n])) for i in fits for ids in letters[i][1] for n in range(len(ids))]
    contexts = list(dict.fromkeys(contexts))
    wanted = [Wanted([*letters[i][0], *context], 1, questions[i].head) for i, context in contexts]
    open_contexts = Counter(i for i, _ in contexts)
    scores = {i: [0.0] * len(letters[i][1]) for i in fits}
    for indices, hidden in hidden_states(model, wanted, config.batch_size):
        log_probs = model.lm_head(torch.cat(hidden)).float().log_softmax(-1)  # (B, V)
        for k, of_row in zip(indices, log_probs, strict=True):
            i, context = contexts[k]
            n = len(context)
            follows = [o for o, ids in enumerate(letters[i][1]) if tuple(ids[:n]) == context and len(ids) > n]
            for option, score in zip(follows, of_row[[letters[i][1][o][n] for o in follows]].tolist(), strict=True):
                scores[i][option] += score
            open_contexts[i] -= 1
            if not open_contexts[i]:
                yield i, {"logits": {"scores": dict(zip(questions[i].row.options, scores.pop(i), strict=True))}}


@torch.inference_mode()
def by_text(model: Model, asker: Asker, questions: list[Question], config: EvalConfig) -> Outcomes:
    """The log-likelihood of each option's text as the answer to the bare question, in nats.

    The sum over its tokens (and, in a chat, the one that ends an answer) divided by how many they are, or by its
    characters: the first favours texts of common words, the second those that the tokenizer has whole.
    """
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].row.question))
    while order:
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        examples = {
            (i, letter): asker.example(questions[i].row.question, text)
            for i in chosen
            for letter, text in questions[i].row.options.items()
        }
        long = {i for (i, _), example in examples.items() if len(example.tokens) > model.config.max_seq_len}
        short = {place: example for place, example in examples.items() if place[0] not in long}
        losses = dict(zip(short, losses_of(model, list(short.values()), 4 * config.batch_size), strict=True))
        for i in chosen:
            if i in long:
                yield i, {"text": dict(TOO_LONG), "text_per_character": dict(TOO_LONG)}
                continue
            options = questions[i].row.options
            per_token = {letter: -losses[i, letter][0] / losses[i, letter][1] for letter in options}
            per_character = {letter: -losses[i, letter][0] / len(text) for letter, text in options.items()}
            yield i, {"text": {"scores": per_token}, "text_per_character": {"scores": per_character}}


@torch.inference_mode()
def by_writing(model: Model, asker: Asker, questions: list[Question], config: EvalConfig) -> Outcomes:
    """The greedy answer."""
    fits = [i for i, one in enumerate(questions) if len(one.tokens) < model.config.max_seq_len]
    yield from too_long("generate", len(questions), fits)
    wanted = [Wanted(questions[i].tokens, 1, questions[i].head) for i in fits]
    sampling = SampleConfig(temperature=0.0, max_new_tokens=config.max_new_tokens)
    for indices, start, prefix in batches(model, wanted, config.batch_size):
        prompts = [wanted[k].tokens[start:] for k in indices]
        for k, ids in zip(indices, complete(model, prompts, sampling, asker.tokenizer.eos_ids, prefix), strict=True):
            reply = asker.tokenizer.decode(ids)
            answer = AGAIN.split(reply.lstrip(), maxsplit=1)[0] if asker.raw else reply
            yield fits[k], {"generate": {"scores": {}, "reply": answer}}


@torch.inference_mode()
def by_loss(model: Model, asker: Asker, questions: list[Question], config: EvalConfig) -> Outcomes:
    """The negative log-likelihood of the right answer as data.py writes it, over its tokens, in nats."""
    limit = model.config.max_seq_len
    encoded = [encode_conversation(one.row.messages, asker.tokenizer, limit) for one in questions]
    fits = [i for i, example in enumerate(encoded) if max(example.targets) != IGNORE]
    for i in sorted(set(range(len(questions))) - set(fits)):
        yield i, {"loss": {"nll": 0.0, "n_tokens": 0}}
    while fits:
        chosen, fits = fits[: 16 * config.batch_size], fits[16 * config.batch_size :]
        losses = losses_of(model, [encoded[i] for i in chosen], config.batch_size)
        for i, (nll, n_tokens) in zip(chosen, losses, strict=True):
            yield i, {"loss": {"nll": nll, "n_tokens": n_tokens}}


def too_long(way: str, n: int, fits: list[int]) -> Outcomes:
    """The outcome of those that do not fit into the model's context: no answer."""
    yield from ((i, {way: dict(TOO_LONG)}) for i in sorted(set(range(n)) - set(fits)))


@torch.inference_mode()
def losses_of(model: Model, examples: list[Example], batch_size: int) -> list[tuple[float, int]]:
    """The negative log-likelihood of each example's targets, summed, and how many they are."""
    first = [next(i for i, target in enumerate(example.targets) if target != IGNORE) for example in examples]
    wanted = [Wanted(ex.tokens, len(ex.tokens) - start, "") for ex, start in zip(examples, first, strict=True)]
    losses = [(0.0, 0)] * len(examples)
    for indices, hidden in hidden_states(model, wanted, batch_size):
        for i, of_row in zip(indices, hidden, strict=True):
            targets = torch.tensor(examples[i].targets[first[i] :], device=of_row.device)  # (n,)
            logits = model.lm_head(of_row).float()  # (n, V)
            nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum").item()
            losses[i] = nll, int((targets != IGNORE).sum())
    return losses


SCORERS: dict[str, Callable[[Model, Asker, list[Question], EvalConfig], Outcomes]] = {
    "logits": by_logits,
    "text": by_text,
    "generate": by_writing,
    "loss": by_loss,
}


def decide(scores: dict[str, float], several: bool) -> str:
    """The letters that the scores speak for; none if there are no scores, for a question that did not fit.

    One right letter: the best score, of equal ones (within TIE) the first. Several: each letter on its own, chosen
    if its score is at least the mean of the question's scores, for logits a probability of at least the geometric mean.
    """
    if not scores:
        return ""
    if not all(map(math.isfinite, scores.values())):  # compared with others they would pick an option all the same
        raise FloatingPointError(f"the model's likelihood of an answer is {scores}, its weights are damaged")
    best, mean = max(scores.values()), sum(scores.values()) / len(scores)
    if several:
        return "".join(letter for letter, score in scores.items() if score >= mean - TIE)
    return next(letter for letter, score in scores.items() if score >= best - TIE)
