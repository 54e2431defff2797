"""Writing: a prefill of the prompt, then one token at a time with the cache.

A batch of prompts of different lengths is padded on the right and each row goes on from its own end, so
that greedy decoding gives every row the tokens it would get alone.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from minidoctor.config import TINY, SampleConfig
from minidoctor.model import KVCache, Model
from minidoctor.tokenizer import Tokenizer


def filtered(logits: Tensor, config: SampleConfig) -> Tensor:
    """Logits (B, V) after temperature, top-k and top-p: -inf where a token may not be chosen."""
    # Less the largest first: a small temperature then gives -inf and not inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p < 1:
        ordered, ids = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # (B, V), of all likelier tokens
        # A token stays while those before it do not make up p: the likeliest always does.
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, ids, before >= config.top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def choose(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> Tensor:
    """Logits (B, V) to token ids (B,). Drawn on the CPU in float32: the same seed, the same text."""
    if config.temperature < TINY:
        return logits.argmax(-1)
    probs = filtered(logits.float().cpu(), config).softmax(-1)  # (B, V)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1).to(logits.device)


@torch.inference_mode()
def prefill(model: Model, tokens: list[int]) -> KVCache:
    """A cache of one row that has read these tokens, for prompts that begin with them."""
    device = model.lm_head.weight.device
    cache = KVCache(model.config, 1, len(tokens), model.lm_head.weight)
    cache.length = len(tokens)
    model.hidden(torch.tensor([tokens], device=device), torch.arange(len(tokens), device=device)[None], cache)
    return cache


@torch.inference_mode()
def generate(
    model: Model,
    prompts: list[list[int]],
    config: SampleConfig,
    stop_ids: Collection[int],
    prefix: KVCache | None = None,
) -> Iterator[list[int | None]]:
    """The next token of each prompt, step by step; None for a row that has ended.

    The prompts go on from `prefix`, where one is given, as if each of them began with what it has read.
    A row ends with a token of `stop_ids`, which is not given out, after `max_new_tokens`, or at the model's
    context length. Raises ValueError if a prompt is empty or fills the context.
    """
    start = prefix.length if prefix else 0
    longest, limit = max(map(len, prompts)), model.config.max_seq_len
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    if start + longest >= limit:
        raise ValueError(f"the prompt has {start + longest} tokens, the model reads at most {limit} with its answer")
    device = model.lm_head.weight.device
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # (B, T)
    places = [start + len(prompt) for prompt in prompts]  # where each row's next token goes
    ends = [min(place + config.max_new_tokens, limit) for place in places]
    if prefix:
        cache = prefix.repeated(model.config, len(prompts), max(ends))
    else:
        cache = KVCache(model.config, len(prompts), max(ends), model.lm_head.weight)
    generator = torch.Generator().manual_seed(config.seed)
    running = [True] * len(prompts)

    cache.length = start + longest
    hidden, _ = model.hidden(tokens, start + torch.arange(longest, device=device).expand_as(tokens), cache)
    logits = model.lm_head(hidden[torch.arange(len(prompts)), torch.tensor(places) - start - 1])  # (B, V)
    while True:
        new = choose(logits, config, generator)  # (B,)
        ids = new.tolist()
        running = [
            alive and place < end and i not in stop_ids
            for alive, place, end, i in zip(running, places, ends, ids, strict=True)
        ]
        if not any(running):
            return
        yield [i if alive else None for alive, i in zip(running, ids, strict=True)]
        if not any(alive and place + 1 < end for alive, place, end in zip(running, places, ends, strict=True)):
            return
        # A row that has ended waits at the cache's last place; what it does there no other row sees.
        positions = torch.tensor([[min(place, max(ends) - 1)] for place in places], device=device)  # (B, 1)
        places = [place + 1 for place in places]
        cache.length = min(cache.length + 1, max(ends))
        hidden, _ = model.hidden(new[:, None], positions, cache)  # (B, 1, D)
        logits = model.lm_head(hidden[:, -1])  # (B, V)


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    config: SampleConfig,
    prefix: KVCache | None = None,
) -> list[str]:
    """The whole answers to a batch of prompts."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, config, tokenizer.eos_ids, prefix):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return [tokenizer.decode(answer) for answer in answers]
