from dataclasses import replace

import numpy as np
import pytest
import torch

from minidoctor.config import SampleConfig
from minidoctor.generate import complete, filter_logits, generate, prefill, sample_token

PROMPTS = [[1, 40, 300], [1, 7, 350, 12, 90, 33, 200], [1], [1, 5, 5, 5, 5, 5, 60, 310, 20, 250, 11]]


def config_of(n, **settings):
    return SampleConfig(**({"temperature": 0.0, "max_new_tokens": n} | settings))


def written(model, prompts, config, stop_ids=(), prefix=None):
    """The tokens of each row; nothing may follow its end."""
    steps = list(generate(model, prompts, config, stop_ids, prefix))
    rows = [list(row) for row in zip(*steps, strict=True)] if steps else [[] for _ in prompts]
    given = [[token for token in row if token is not None] for row in rows]
    for row, tokens in zip(rows, given, strict=True):
        assert row == tokens + [None] * (len(row) - len(tokens))
    return given


@torch.no_grad()
def plain_greedy(model, prompt, n, stop_ids=()):
    """The whole text through the model for every token."""
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
        assert len(set(expected)) > 3  # not one word over and over
        assert written(model, [prompt], config_of(20)) == [expected]


def test_a_batch_of_prompts_of_different_lengths_gives_each_row_what_it_gets_alone(adapted):
    expected = [plain_greedy(adapted, prompt, 20) for prompt in PROMPTS]
    assert written(adapted, PROMPTS, config_of(20)) == expected


def test_a_row_that_has_ended_does_not_disturb_the_others(adapted):
    whole = [plain_greedy(adapted, prompt, 20) for prompt in PROMPTS]
    stop_ids = {whole[0][2], whole[1][9]}
    expected = [plain_greedy(adapted, prompt, 20, stop_ids) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in expected}) > 1
    assert written(adapted, PROMPTS, config_of(20), stop_ids) == expected


def test_a_stop_token_ends_a_row_and_is_not_given_out(model):
    expected = plain_greedy(model, PROMPTS[1], 20)
    stop = expected[5]
    assert written(model, [PROMPTS[1]], config_of(20), [stop]) == [expected[: expected.index(stop)]]
    assert written(model, [PROMPTS[1]], config_of(20), [expected[0]]) == [[]]


@pytest.mark.parametrize("n", [1, 2, 9])
def test_no_more_than_max_new_tokens_are_written(model, n):
    assert written(model, [PROMPTS[0]], config_of(n)) == [plain_greedy(model, PROMPTS[0], n)]


def test_a_text_ends_where_the_context_ends(model):
    limit = model.config.max_seq_len
    for room in (1, 5):
        prompt = [1] + [50] * (limit - room - 1)
        tokens = written(model, [prompt], config_of(20))[0]
        assert tokens == plain_greedy(model, prompt, room)


def test_a_row_beside_a_prompt_that_nearly_fills_the_context_gets_what_it_gets_alone(model):
    long = [1] + [50] * (model.config.max_seq_len - 4)
    expected = [plain_greedy(model, PROMPTS[0], 20), plain_greedy(model, long, 3)]
    assert written(model, [PROMPTS[0], long], config_of(20)) == expected


def test_an_empty_or_too_long_prompt_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        written(model, [[1, 2], []], config_of(5))
    limit = model.config.max_seq_len
    with pytest.raises(ValueError, match=f"the prompt has {limit} tokens, the model reads at most {limit}"):
        written(model, [[1] * limit], config_of(5))


PREFIX = [1, 33, 7, 250, 250, 18, 64, 301, 5, 90, 41, 310, 77, 12, 8, 205, 6]


@pytest.mark.parametrize("window", [0, 6])
def test_prompts_that_go_on_from_a_prefill_get_what_whole_prompts_get(adapted, window):
    """Of different lengths, in batches and alone; with a window, one that ends inside of what was read before."""
    for layer in adapted.model.layers:
        layer.self_attn.window = window
    expected = [plain_greedy(adapted, PREFIX + prompt, 20) for prompt in PROMPTS]
    assert expected != [plain_greedy(adapted, prompt, 20) for prompt in PROMPTS]
    assert written(adapted, PROMPTS, config_of(20), prefix=prefill(adapted, PREFIX)) == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert written(adapted, [prompt], config_of(20), prefix=prefill(adapted, PREFIX)) == [tokens]


def test_drawn_tokens_after_a_prefill_are_those_after_whole_prompts(model):
    """Also of a prefix of one token, the shortest."""
    for n in (1, len(PREFIX)):
        config = config_of(20, temperature=1.0, seed=7)
        whole = written(model, [PREFIX[:n] + prompt for prompt in PROMPTS], config)
        assert written(model, PROMPTS, config, prefix=prefill(model, PREFIX[:n])) == whole


def test_a_prefix_is_not_changed_by_those_that_go_on_from_it(adapted):
    prefix = prefill(adapted, PREFIX)
    keys, values = prefix.keys.clone(), prefix.values.clone()
    first = written(adapted, PROMPTS, config_of(20), prefix=prefix)
    assert written(adapted, PROMPTS[::-1], config_of(20), prefix=prefix) == first[::-1]
    assert (prefix.length, prefix.keys.shape[1]) == (len(PREFIX), 1)
    assert torch.equal(prefix.keys, keys)
    assert torch.equal(prefix.values, values)
    whole = prefill(adapted, PREFIX + PROMPTS[1])  # it holds what a longer one holds at its start
    torch.testing.assert_close(whole.keys[:, :, :, : len(PREFIX)], keys)
    torch.testing.assert_close(whole.values[:, :, :, : len(PREFIX)], values)


def test_the_context_limit_counts_the_prefix(model):
    n = len(PREFIX)
    for room in (1, 5):
        model.config = replace(model.config, max_seq_len=n + len(PROMPTS[1]) + room)
        tokens = written(model, [PROMPTS[1]], config_of(20), prefix=prefill(model, PREFIX))[0]
        assert tokens == plain_greedy(model, PREFIX + PROMPTS[1], room)
    model.config = replace(model.config, max_seq_len=n + len(PROMPTS[1]))
    message = f"the prompt has {n + len(PROMPTS[1])} tokens, the model reads at most {n + len(PROMPTS[1])}"
    with pytest.raises(ValueError, match=message):
        written(model, PROMPTS[:2], config_of(20), prefix=prefill(model, PREFIX))
    with pytest.raises(ValueError, match="at least one token"):
        written(model, [[]], config_of(20), prefix=prefill(model, PREFIX))


def plain_probabilities(logits, temperature, top_k, top_p):
    """One row in numpy: the probabilities after temperature, then top-k, then top-p."""
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
def test_filtered_equals_a_plain_temperature_top_k_and_top_p(temperature, top_k, top_p):
    logits = 3 * torch.randn(5, 30)
    config = SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = filter_logits(logits, config).softmax(-1)
    expected = np.stack([plain_probabilities(row, temperature, top_k, top_p) for row in logits.numpy()])
    assert ((ours > 0).numpy() == (expected > 0)).all()
    torch.testing.assert_close(ours, torch.from_numpy(expected).float())


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = 2 * torch.randn(1, 10)
    config = SampleConfig(temperature=0.8, top_k=6, top_p=0.9)
    drawn = sample_token(logits.expand(20_000, -1), config, torch.Generator().manual_seed(0))
    expected = plain_probabilities(logits[0].numpy(), 0.8, 6, 0.9)
    share = drawn.bincount(minlength=10) / 20_000
    # The standard deviation of a share is at most (0.25 / 20,000)^0.5 = 0.0035.
    assert np.abs(share.numpy() - expected).max() < 0.02


def test_the_same_seed_writes_the_same_text_and_another_seed_another(model):
    texts = [written(model, PROMPTS, config_of(20, temperature=1.0, seed=seed)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_the_likeliest_of_one_is_greedy_whatever_the_temperature(model):
    greedy = written(model, PROMPTS, config_of(20))
    assert written(model, PROMPTS, config_of(20, temperature=5.0, top_k=1)) == greedy
    assert written(model, PROMPTS, config_of(20, temperature=5.0)) != greedy


def test_a_temperature_next_to_zero_is_greedy(model):
    greedy = written(model, PROMPTS, config_of(20))
    assert written(model, PROMPTS, config_of(20, temperature=1e-3)) == greedy
    assert written(model, PROMPTS, config_of(20, temperature=1e-40)) == greedy


def test_complete_decodes_whole_answers(model, tokenizer):
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in ("gout?", "哮喘的症状？")]
    expected = [tokenizer.decode(plain_greedy(model, prompt, 12, tokenizer.eos_ids)) for prompt in prompts]
    assert complete(model, tokenizer, prompts, config_of(12)) == expected
    start = min(len(prompt) for prompt in prompts) - 1
    for prompt, text in zip(prompts, expected, strict=True):
        assert complete(model, tokenizer, [prompt[start:]], config_of(12), prefill(model, prompt[:start])) == [text]
