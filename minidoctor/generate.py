"""Generation: a prefill of the prompts, then one token at a time with the KV cache.

Prompts of different lengths are padded on the right, and each row continues from its own end. Greedy decoding
therefore gives every row of a batch the tokens that it would get in a batch of one, up to rounding.
"""

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from minidoctor.config import TINY, SampleConfig, UserError
from minidoctor.kv_cache import KVCache
from minidoctor.model import Model

STATIC_STEP = 256  # the size of a static cache is a multiple of this


class NonFiniteLogits(UserError):
    """The logits contain NaN or infinity."""


def filter_logits(logits: Tensor, config: SampleConfig) -> Tensor:
    """Return logits (B, V) after temperature, top-k and top-p, -inf for the tokens that are filtered out."""
    # Relative to the largest, so that a small temperature gives -inf and not inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        smallest = logits.topk(config.top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if config.top_p < 1:
        ordered, ids = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # (B, V), mass of the more probable tokens
        # A token is kept while the tokens before it have less mass than p, so the most probable one always is.
        removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, ids, before >= config.top_p)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits


def sample_token(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> Tensor:
    """Return token ids (B,) drawn from logits (B, V): on the CPU in float32, so the seed fixes the text."""
    if config.temperature < TINY:
        return logits.argmax(-1)
    probs = filter_logits(logits.float().cpu(), config).softmax(-1)  # (B, V)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1).to(logits.device)


@torch.inference_mode()
def prefill(model: Model, tokens: list[int]) -> KVCache:
    """Return a cache of one row filled with these tokens, for prompts that share them as their beginning."""
    cache = KVCache(model.config, 1, len(tokens), model.lm_head.weight)
    model.hidden(torch.tensor([tokens], device=model.lm_head.weight.device), cache=cache)
    return cache


@torch.inference_mode()
def generate(
    model: Model,
    prompts: list[list[int]],
    config: SampleConfig,
    stop_ids: Collection[int],
    prefix: KVCache | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each prompt, step by step, and None for a row that has ended.

    The prompts continue `prefix`, if it is given. A row ends before a token of `stop_ids`, after `max_new_tokens`,
    or at the model's context length. Raises UserError if a prompt is empty or fills the context.
    """
    start = prefix.length if prefix else 0
    longest, limit = max(map(len, prompts)), model.config.max_seq_len
    if not all(prompts):
        raise UserError("a prompt needs at least one token")
    if start + longest >= limit:
        raise UserError(f"the prompt has {start + longest} tokens; the model's context of {limit} includes the answer")
    device = model.lm_head.weight.device
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # (B, T)
    positions = [start + len(prompt) for prompt in prompts]  # the position that each row's next token gets
    ends = [min(position + config.max_new_tokens, limit) for position in positions]
    size = max(ends)
    if config.static_cache:  # few sizes, since each one needs a CUDA graph
        size = min(math.ceil(size / STATIC_STEP) * STATIC_STEP, limit)
    n, like = len(prompts), model.lm_head.weight
    cache = prefix.expand(model.config, n, size) if prefix else KVCache(model.config, n, size, like)
    generator = torch.Generator().manual_seed(config.seed)
    running = [True] * len(prompts)

    # Rows of different lengths have different positions; the others continue the cache together.
    ragged = len(set(positions)) > 1 or config.static_cache
    steps = start + torch.arange(longest, device=device).expand_as(tokens) if ragged else None  # (B, T)

    hidden, _ = model.hidden(tokens, steps, cache)
    logits = model.lm_head(hidden[torch.arange(len(prompts)), torch.tensor(positions) - start - 1])  # (B, V)
    if config.static_cache:
        cache.fix_shapes()
    while True:
        if not logits.amax(-1).isfinite().all():  # the maximum is NaN if any logit is
            raise NonFiniteLogits("the logits are not finite")
        next_tokens = sample_token(logits, config, generator)  # (B,)
        ids = next_tokens.tolist()
        running = [
            alive and position < end and i not in stop_ids
            for alive, position, end, i in zip(running, positions, ends, ids, strict=True)
        ]
        if not any(running):
            return
        yield [i if alive else None for alive, i in zip(running, ids, strict=True)]
        if not any(alive and p + 1 < end for alive, p, end in zip(running, positions, ends, strict=True)):
            return
        # A row that has ended is computed on, at most at the last position of the cache; its tokens are not returned.
        if ragged:
            steps = torch.tensor([[min(p, max(ends) - 1)] for p in positions], device=device)  # (B, 1)
        logits = model(next_tokens[:, None], steps, cache)[0][:, -1]  # (B, V)
        positions = [p + 1 for p in positions]


def complete(
    model: Model,
    prompts: list[list[int]],
    config: SampleConfig,
    stop_ids: Collection[int],
    prefix: KVCache | None = None,
) -> list[list[int]]:
    """Return the whole answers to a batch of prompts, as token ids."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, config, stop_ids, prefix):
        for answer, token in zip(answers, step, strict=True):
            answer.extend([] if token is None else [token])
    return answers
