"""Generation against a full forward pass per token, and the filters against numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidoctor.config import SampleConfig
from minidoctor.generate import complete, filter_logits, generate, prefill, sample_token

PROMPTS = [[1, 40, 300], [1, 7, 350, 12, 90, 33, 200], [1], [1, 5, 5, 5, 5, 5, 60, 310, 20, 250, 11]]


def make_sampling(n, **settings):
    return SampleConfig(**({"temperature": 0.0, "max_new_tokens": n} | settings))


def decode(model, prompts, config, stop_ids=(), prefix=None):
    """Return the tokens of each row, and check that only None follows the end of a row."""
    steps = list(generate(model, prompts, config, stop_ids, prefix))
    rows = [list(row) for row in zip(*steps, strict=True)] if steps else [[] for _ in prompts]
    decoded = [[token for token in row if token is not None] for row in rows]
    for row, tokens in zip(rows, decoded, strict=True):
        assert row == tokens + [None] * (len(row) - len(tokens))
    return decoded


@torch.no_grad()
def plain_greedy(model, prompt, n, stop_ids=()):
    """Decode with a full forward pass for every token."""
    tokens = list(prompt)
    for _ in range(n):
        token = model(torch.tensor([tokens]))[0][0, -1].argmax().item()
        if token in stop_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_cached_greedy_decoding_equals_full_forward_without_a_cache(request, which):
    model = request.getfixturevalue(which)
    for prompt in PROMPTS:
        expected = plain_greedy(model, prompt, 20)
        assert len(set(expected)) > 3  # not one token repeated
        assert decode(model, [prompt], make_sampling(20)) == [expected]


def test_rows_of_a_padded_batch_equal_batches_of_one(adapted):
    expected = [plain_greedy(adapted, prompt, 20) for prompt in PROMPTS]
    assert decode(adapted, PROMPTS, make_sampling(20)) == expected


def test_ended_rows_do_not_change_the_others(adapted):
    whole = [plain_greedy(adapted, prompt, 20) for prompt in PROMPTS]
    stop_ids = {whole[0][2], whole[1][9]}
    expected = [plain_greedy(adapted, prompt, 20, stop_ids) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in expected}) > 1
    assert decode(adapted, PROMPTS, make_sampling(20), stop_ids) == expected


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["ragged", "one row"])
def test_static_cache_gives_the_same_tokens_with_one_shape(adapted, prompts, window, monkeypatch):
    monkeypatch.setattr(adapted, "config", replace(adapted.config, window=window, max_seq_len=300))
    shapes, attend = [], F.scaled_dot_product_attention

    def record(q, k, *args, **kwargs):
        shapes.append((q.shape[2], k.shape[2]))
        return attend(q, k, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    decoded = []
    for static_cache in (False, True):
        shapes.clear()
        prefix = prefill(adapted, [1, 9, 30])
        config = make_sampling(12, static_cache=static_cache)
        decoded.append([decode(adapted, prompts, config), decode(adapted, prompts, config, prefix=prefix)])
        sizes = {n_keys for n_tokens, n_keys in shapes if n_tokens == 1}
        assert (sizes == {256}) == static_cache
    assert decoded[0] == decoded[1]


def test_a_stop_token_ends_a_row_and_is_not_returned(model):
    expected = plain_greedy(model, PROMPTS[1], 20)
    stop = expected[5]
    assert decode(model, [PROMPTS[1]], make_sampling(20), [stop]) == [expected[: expected.index(stop)]]
    assert decode(model, [PROMPTS[1]], make_sampling(20), [expected[0]]) == [[]]


@pytest.mark.parametrize("n", [1, 2, 9])
def test_decoding_stops_after_max_new_tokens(model, n):
    assert decode(model, [PROMPTS[0]], make_sampling(n)) == [plain_greedy(model, PROMPTS[0], n)]


def test_decoding_stops_at_the_context_length(model):
    limit = model.config.max_seq_len
    for room in (1, 5):
        prompt = [1] + [50] * (limit - room - 1)
        tokens = decode(model, [prompt], make_sampling(20))[0]
        assert tokens == plain_greedy(model, prompt, room)


def test_a_short_row_is_unchanged_next_to_a_row_that_fills_the_context(model):
    long = [1] + [50] * (model.config.max_seq_len - 4)
    expected = [plain_greedy(model, PROMPTS[0], 20), plain_greedy(model, long, 3)]
    assert decode(model, [PROMPTS[0], long], make_sampling(20)) == expected


def test_empty_and_too_long_prompts_are_rejected(model):
    with pytest.raises(ValueError, match="at least one token"):
        decode(model, [[1, 2], []], make_sampling(5))
    limit = model.config.max_seq_len
    with pytest.raises(ValueError, match=f"{limit} tokens"):
        decode(model, [[1] * limit], make_sampling(5))


PREFIX = [1, 33, 7, 250, 250, 18, 64, 301, 5, 90, 41, 310, 77, 12, 8, 205, 6]


@pytest.mark.parametrize("window", [0, 6])
def test_prompts_after_a_prefill_equal_whole_prompts(adapted, window):
    """In a batch and in batches of one; the window of 6 begins inside the prefix."""
    unlimited = [plain_greedy(adapted, PREFIX + prompt, 20) for prompt in PROMPTS]
    adapted.config = replace(adapted.config, window=window)
    expected = [plain_greedy(adapted, PREFIX + prompt, 20) for prompt in PROMPTS]
    assert (expected != unlimited) == (window > 0)
    assert expected != [plain_greedy(adapted, prompt, 20) for prompt in PROMPTS]
    assert decode(adapted, PROMPTS, make_sampling(20), prefix=prefill(adapted, PREFIX)) == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert decode(adapted, [prompt], make_sampling(20), prefix=prefill(adapted, PREFIX)) == [tokens]


def test_sampled_tokens_after_a_prefill_equal_those_after_whole_prompts(model):
    """Also after a prefix of one token."""
    for n in (1, len(PREFIX)):
        config = make_sampling(20, temperature=1.0, seed=7)
        whole = decode(model, [PREFIX[:n] + prompt for prompt in PROMPTS], config)
        assert decode(model, PROMPTS, config, prefix=prefill(model, PREFIX[:n])) == whole


def test_a_prefix_is_not_changed_by_its_continuations(adapted):
    prefix = prefill(adapted, PREFIX)
    stored = [tensor.clone() for layer in prefix.layers for tensor in layer]
    first = decode(adapted, PROMPTS, make_sampling(20), prefix=prefix)
    assert decode(adapted, PROMPTS[::-1], make_sampling(20), prefix=prefix) == first[::-1]
    assert (prefix.length, len(stored[0])) == (len(PREFIX), 1)
    assert all(map(torch.equal, (tensor for layer in prefix.layers for tensor in layer), stored))
    whole = prefill(adapted, PREFIX + PROMPTS[1])  # a longer prefix begins with the same keys and values
    torch.testing.assert_close([tensor[:, :, : len(PREFIX)] for layer in whole.layers for tensor in layer], stored)


def test_the_context_limit_counts_the_prefix(model):
    n = len(PREFIX)
    for room in (1, 5):
        model.config = replace(model.config, max_seq_len=n + len(PROMPTS[1]) + room)
        tokens = decode(model, [PROMPTS[1]], make_sampling(20), prefix=prefill(model, PREFIX))[0]
        assert tokens == plain_greedy(model, PREFIX + PROMPTS[1], room)
    model.config = replace(model.config, max_seq_len=n + len(PROMPTS[1]))
    with pytest.raises(ValueError, match=f"{n + len(PROMPTS[1])} tokens"):
        decode(model, PROMPTS[:2], make_sampling(20), prefix=prefill(model, PREFIX))
    with pytest.raises(ValueError, match="at least one token"):
        decode(model, [[]], make_sampling(20), prefix=prefill(model, PREFIX))


def plain_probabilities(logits, temperature, top_k, top_p):
    """Return the probabilities of one row after temperature, then top-k, then top-p, in numpy."""
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    probs = np.exp(logits[order] - logits[order].max())
    probs /= probs.sum()
    n, total = 0, 0.0
    while n < len(order) and total < top_p:
        total += probs[n]
        n += 1
    result = np.zeros_like(logits)
    result[order[:n]] = probs[:n] / probs[:n].sum()
    return result


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 30, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_filter_logits_equals_plain_temperature_top_k_and_top_p(temperature, top_k, top_p):
    logits = 3 * torch.randn(5, 30)
    config = SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = filter_logits(logits, config).softmax(-1)
    expected = np.stack([plain_probabilities(row, temperature, top_k, top_p) for row in logits.numpy()])
    assert ((ours > 0).numpy() == (expected > 0)).all()
    torch.testing.assert_close(ours, torch.from_numpy(expected).float())


def test_tokens_are_sampled_with_their_probability():
    logits = 2 * torch.randn(1, 10)
    config = SampleConfig(temperature=0.8, top_k=6, top_p=0.9)
    drawn = sample_token(logits.expand(20_000, -1), config, torch.Generator().manual_seed(0))
    expected = plain_probabilities(logits[0].numpy(), 0.8, 6, 0.9)
    share = drawn.bincount(minlength=10) / 20_000
    # The standard deviation of a share is at most (0.25 / 20,000)^0.5 = 0.0035.
    assert np.abs(share.numpy() - expected).max() < 0.02


def test_the_seed_fixes_the_sampled_tokens(model):
    texts = [decode(model, PROMPTS, make_sampling(20, temperature=1.0, seed=seed)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_top_k_of_one_is_greedy_at_every_temperature(model):
    greedy = decode(model, PROMPTS, make_sampling(20))
    assert decode(model, PROMPTS, make_sampling(20, temperature=5.0, top_k=1)) == greedy
    assert decode(model, PROMPTS, make_sampling(20, temperature=5.0)) != greedy


def test_a_temperature_close_to_zero_is_greedy(model):
    greedy = decode(model, PROMPTS, make_sampling(20))
    assert decode(model, PROMPTS, make_sampling(20, temperature=1e-3)) == greedy
    assert decode(model, PROMPTS, make_sampling(20, temperature=1e-40)) == greedy


def test_complete_returns_whole_answers(model, tokenizer):
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in ("gout?", "哮喘的症状？")]
    expected = [plain_greedy(model, prompt, 12, tokenizer.eos_ids) for prompt in prompts]
    assert complete(model, prompts, make_sampling(12), tokenizer.eos_ids) == expected
    start = min(len(prompt) for prompt in prompts) - 1
    for prompt, answer in zip(prompts, expected, strict=True):
        prefix = prefill(model, prompt[:start])
        assert complete(model, [prompt[start:]], make_sampling(12), tokenizer.eos_ids, prefix) == [answer]
