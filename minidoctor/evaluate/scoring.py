"""The scoring methods: how a model's answer to a question is obtained.

    logits     log-probability of each option's letter as the next token
    sets       log-likelihood of each set of letters as the whole answer ("AC" and the end of the turn)
    text       log-likelihood of each option's text as the answer to the bare question, per token and per character
    generate   greedy decoding; extraction.py reads the letters
    loss       negative log-likelihood of the correct answer

The tokens that all prompts of a subject begin with (system message, few-shot examples) are computed once. In float32,
this and batching change a score by less than TIE. In bfloat16, options with close scores can swap.
"""

import math
import re
from collections.abc import Callable, Iterator
from itertools import chain, combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidoctor.batching import IGNORE, Example
from minidoctor.config import SampleConfig, check
from minidoctor.evaluate.prompts import PromptedQuestion, Prompter, common_prefix_len
from minidoctor.evaluate.records import Outcome
from minidoctor.generate import NonFiniteLogits, complete, prefill
from minidoctor.model import KVCache, Model
from minidoctor.text.reasoning import final_part
from minidoctor.text.tokenizer import encode_conversation

# A CPU has its full speed in small batches, whose activations fit into its caches: README.md has the measurements.
MAX_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
MIN_SHARED_TOKENS = 16  # with fewer common tokens a cache costs more than it saves
TIE = 1e-4  # nats; scores that differ by less are equal: batching and shared prefixes change a score by up to 3e-5
MAX_SET_OPTIONS = 10  # 1,013 sets of at least two letters
# Without a chat format nothing ends the answer, and a base model continues with further questions. Cut before them.
NEXT_QUESTION = re.compile(r"\n\s*\n|\n(?:题目|问题?|Question)\s*[:：]")

Outcomes = Iterator[tuple[int, dict[str, Outcome]]]  # index of the question, and its outcomes by method


class Span(NamedTuple):
    """Tokens whose last n hidden states are needed. Those of one group may share a prefix."""

    tokens: list[int]
    n: int
    group: str


PrefixedBatch = tuple[list[int], int, KVCache | None]  # indices, length of the shared prefix, its cache of one row


def prefixed_batches(model: Model, spans: list[Span], batch_size: int) -> Iterator[PrefixedBatch]:
    """Yield batches group by group, the longest first, so that out-of-memory shows at once."""
    groups: dict[str, list[int]] = {}
    for i in sorted(range(len(spans)), key=lambda i: -len(spans[i].tokens)):
        groups.setdefault(spans[i].group, []).append(i)
    max_tokens = MAX_BATCH_TOKENS.get(model.lm_head.weight.device.type, 4096)
    for members in groups.values():
        prefix_len = shared_prefix_len([spans[i] for i in members])
        prefix = prefill(model, spans[members[0]].tokens[:prefix_len]) if prefix_len else None
        while members:
            size = max(1, min(batch_size, max_tokens // (len(spans[members[0]].tokens) - prefix_len)))
            yield members[:size], prefix_len, prefix
            members = members[size:]


def shared_prefix_len(group: list[Span]) -> int:
    """Return how many leading tokens are common and not needed as hidden states; 0 if too few to be worth a cache."""
    same = common_prefix_len([span.tokens for span in group])
    same = min(same, *(len(span.tokens) - span.n for span in group))
    return same if len(group) > 1 and same >= MIN_SHARED_TOKENS else 0


@torch.inference_mode()
def hidden_states(model: Model, spans: list[Span], batch_size: int) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield batches of indices and, for each index, the hidden states (n, D) of its last n tokens."""
    device = model.lm_head.weight.device
    for indices, prefix_len, prefix in prefixed_batches(model, spans, batch_size):
        rows = [spans[i].tokens[prefix_len:] for i in indices]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)  # (B, T)
        if prefix is None:
            hidden, _ = model.hidden(tokens)  # (B, T, D)
        else:
            positions = prefix_len + torch.arange(longest, device=device).expand_as(tokens)  # (B, T)
            cache = prefix.expand(model.config, len(rows), prefix_len + longest)
            hidden, _ = model.hidden(tokens, positions, cache)  # (B, T, D)
            del cache  # before the next one is allocated
        yield indices, [hidden[b, len(rows[b]) - spans[i].n : len(rows[b])] for b, i in enumerate(indices)]


@torch.inference_mode()
def likelihoods(
    model: Model, examples: list[dict[str, Example]], groups: list[str], batch_size: int
) -> Iterator[tuple[int, dict[str, tuple[float, int]]]]:
    """Yield the index and, of each of the question's examples, the log-likelihood in nats and the number of targets.

    There are none if one example does not fit into the context. Examples with the same input, such as the prompt
    before letters of one token each, are computed once.
    """
    inputs: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
    for i, options in enumerate(examples):
        if any(len(ex.tokens) > model.config.max_seq_len or max(ex.targets) == IGNORE for ex in options.values()):
            yield i, {}
            continue
        for name, example in options.items():
            first = next(t for t, target in enumerate(example.targets) if target != IGNORE)
            inputs.setdefault((i, len(example.tokens) - first, tuple(example.tokens)), []).append(name)
    results: list[dict[str, tuple[float, int]]] = [{} for _ in examples]
    keys, spans = list(inputs), [Span(list(tokens), n, groups[i]) for i, n, tokens in inputs]
    for indices, hidden in hidden_states(model, spans, batch_size):
        for k, states in zip(indices, hidden, strict=True):
            i, logits = keys[k][0], model.lm_head(states).float()  # (n, V)
            for name in inputs[keys[k]]:
                targets = torch.tensor(examples[i][name].targets[-len(states) :], device=states.device)  # (n,)
                nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum").item()
                if not math.isfinite(nll):  # a comparison with NaN would select an option nevertheless
                    raise NonFiniteLogits("the log-likelihood of an answer is not finite")
                results[i][name] = -nll, int((targets != IGNORE).sum())
            if len(results[i]) == len(examples[i]):
                yield i, {name: results[i][name] for name in examples[i]}


def score_option_letters(model: Model, prompter: Prompter, questions: list[PromptedQuestion]) -> Outcomes:
    """Score each option by the log-probability of its letter after the prompt, summed over its tokens, in nats."""
    examples, heads = [prompter.letter_examples(q) for q in questions], [q.head for q in questions]
    for i, letters in likelihoods(model, examples, heads, prompter.config.batch_size):
        scores = {letter: score for letter, (score, _) in letters.items()}
        yield i, {"logits": Outcome(scores, too_long=not scores)}


def score_letter_sets(model: Model, prompter: Prompter, questions: list[PromptedQuestion]) -> Outcomes:
    """Score each answer that consists of letters by its log-likelihood after the prompt, with its end, in nats.

    That is each letter or, if several are correct, each set of at least two, regardless of how many are. The best of
    them is the most probable answer of a model that may generate letters only.
    """
    end = "\n" if prompter.config.raw else ""  # a chat format has a token that ends the answer
    for i in sorted(range(len(questions)), key=lambda i: -len(questions[i].tokens)):
        letters, several = sorted(questions[i].row.options), questions[i].row.multiple_answers
        check(len(letters) <= MAX_SET_OPTIONS, f"score sets: question {questions[i].row.id} has {len(letters)} options")
        sets = (combinations(letters, size) for size in (range(2, len(letters) + 1) if several else (1,)))
        names = map("".join, chain(*sets))
        examples = {name: prompter.example(questions[i].text, name + end) for name in names}
        ((_, answers),) = likelihoods(model, [examples], [""], 4 * prompter.config.batch_size)
        yield i, {"sets": Outcome({name: score for name, (score, _) in answers.items()}, too_long=not answers)}


def score_option_text(model: Model, prompter: Prompter, questions: list[PromptedQuestion]) -> Outcomes:
    """Score each option by the log-likelihood of its text as the answer to the bare question, in nats, normalized."""
    rows = [question.row for question in questions]
    examples = [{k: prompter.example(row.question, text) for k, text in row.options.items()} for row in rows]
    for i, texts in likelihoods(model, examples, [""] * len(rows), 4 * prompter.config.batch_size):
        per_token = {letter: score / n_tokens for letter, (score, n_tokens) in texts.items()}
        per_character = {letter: score / len(rows[i].options[letter]) for letter, (score, _) in texts.items()}
        methods = {"text": per_token, "text_per_character": per_character}
        yield i, {name: Outcome(scores, too_long=not scores) for name, scores in methods.items()}


@torch.inference_mode()
def score_generated(model: Model, prompter: Prompter, questions: list[PromptedQuestion]) -> Outcomes:
    """Generate the answer by greedy decoding."""
    spans, config = [Span(question.tokens, 1, question.head) for question in questions], prompter.config
    fits = [i for i, span in enumerate(spans) if len(span.tokens) < model.config.max_seq_len]
    for i in sorted(set(range(len(spans))) - set(fits)):
        yield i, {"generate": Outcome(too_long=True)}
    sampling = SampleConfig(temperature=0.0, max_new_tokens=prompter.max_new_tokens)
    for indices, prefix_len, prefix in prefixed_batches(model, [spans[i] for i in fits], config.batch_size):
        prompts = [spans[fits[k]].tokens[prefix_len:] for k in indices]
        answers = complete(model, prompts, sampling, prompter.tokenizer.eos_ids, prefix)
        for k, ids in zip(indices, answers, strict=True):
            reply = prompter.tokenizer.decode(ids)
            limit = min(prompter.max_new_tokens, model.config.max_seq_len - len(spans[fits[k]].tokens))
            answer = NEXT_QUESTION.split(reply.lstrip(), maxsplit=1) if config.raw else [reply]
            truncated = len(ids) >= limit and len(answer) == 1
            unfinished = final_part(answer[0], truncated and prompter.opens_reasoning) is None
            yield fits[k], {"generate": Outcome(reply=answer[0], truncated=truncated, unfinished=unfinished)}


def score_loss(model: Model, prompter: Prompter, questions: list[PromptedQuestion]) -> Outcomes:
    """Return the negative log-likelihood of the correct answer as training formats it, in nats."""
    tokenizer, limit = prompter.tokenizer, model.config.max_seq_len
    examples = [{"": encode_conversation(q.row.messages, tokenizer, limit)} for q in questions]
    for i, answer in likelihoods(model, examples, [""] * len(examples), prompter.config.batch_size):
        score, n_tokens = answer.get("", (0.0, 0))
        yield i, {"loss": Outcome(nll=-score, n_tokens=n_tokens)}


SCORERS: dict[str, Callable[[Model, Prompter, list[PromptedQuestion]], Outcomes]] = {
    "logits": score_option_letters,
    "sets": score_letter_sets,
    "text": score_option_text,
    "generate": score_generated,
    "loss": score_loss,
}


def decide(scores: dict[str, float], multiple_answers: bool) -> str:
    """Return the letters that the scores select, "" without scores.

    One correct letter, or scores of sets: the highest score, the first of equal ones (within TIE). Several: every
    letter whose score is at least the mean, which for logits means a probability of at least the geometric mean.
    """
    if not scores:
        return ""
    best, mean = max(scores.values()), sum(scores.values()) / len(scores)
    if multiple_answers and max(map(len, scores)) == 1:
        return "".join(letter for letter, score in scores.items() if score >= mean - TIE)
    return next(letter for letter, score in scores.items() if score >= best - TIE)
