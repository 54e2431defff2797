import random

import pytest

from minidoctor.batching import IGNORE, Example, ShuffledBatches, collate, micro_batches


def test_collate_pads_on_the_right():
    examples = [Example([5, 6, 7], [IGNORE, 7, 2]), Example([8], [2]), Example([4, 3], [IGNORE, IGNORE])]
    batch = collate(examples)
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 0, 0], [4, 3, 0]]
    assert batch.targets.tolist() == [[IGNORE, 7, 2], [2, IGNORE, IGNORE], [IGNORE] * 3]
    assert batch.attention_mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    flat = [target for row in batch.targets.tolist() for target in row]
    assert batch.answer_positions.tolist() == [i for i, target in enumerate(flat) if target != IGNORE] == [1, 2, 3]


def make_examples(n):
    """Return n examples of random length whose tokens are their index."""
    draw = random.Random(0)
    return [Example([i] * length, [i] * length) for i, length in enumerate(draw.choices(range(1, 101), k=n))]


def padding_share(batches):
    n_tokens = sum(len(example.tokens) for batch in batches for example in batch)
    return 1 - n_tokens / sum(len(batch) * max(len(example.tokens) for example in batch) for batch in batches)


@pytest.mark.parametrize(("n", "expected_sizes"), [(1, [7]), (2, [4, 3]), (3, [3, 3, 1]), (20, [1] * 7)])
def test_micro_batches_contain_each_example_once(n, expected_sizes):
    batches = micro_batches(make_examples(7), n)
    assert [len(batch.tokens) for batch in batches] == expected_sizes
    assert sorted(tokens[0] for batch in batches for tokens in batch.tokens.tolist()) == list(range(7))


@pytest.mark.parametrize(("n", "batch_size"), [(101, 4), (64, 8), (3, 8), (1, 1)])
def test_an_epoch_contains_each_example_once(n, batch_size):
    batches = ShuffledBatches(make_examples(n), batch_size, seed=0)
    stream = batches.starting_at(0)
    for _ in range(3):
        epoch = [next(stream) for _ in range(batches.per_epoch)]
        assert sorted(example.tokens[0] for batch in epoch for example in batch) == list(range(n))
        assert max(map(len, epoch)) <= batch_size


def first_batches(batches, n, step=0):
    stream = batches.starting_at(step)
    return [[example.tokens[0] for example in next(stream)] for _ in range(n)]


def test_the_seed_determines_the_order():
    order = first_batches(ShuffledBatches(make_examples(50), 4, seed=3), 30)
    assert order == first_batches(ShuffledBatches(make_examples(50), 4, seed=3), 30)
    assert order != first_batches(ShuffledBatches(make_examples(50), 4, seed=4), 30)


def test_epochs_differ_in_order():
    batches = ShuffledBatches(make_examples(50), 4, seed=0)
    assert first_batches(batches, 13) != first_batches(batches, 13, step=13)


@pytest.mark.parametrize("step", [1, 12, 13, 14, 30])
def test_starting_at_a_step_equals_skipping_to_it(step):
    batches = ShuffledBatches(make_examples(50), 4, seed=0)
    assert batches.per_epoch == 13
    assert first_batches(batches, 20, step) == first_batches(batches, step + 20)[step:]


def test_similar_lengths_in_a_batch_keep_padding_low():
    examples = make_examples(1024)
    stream = ShuffledBatches(examples, 8, seed=0).starting_at(0)
    assert padding_share([examples[i : i + 8] for i in range(0, 1024, 8)]) > 0.3
    assert padding_share([next(stream) for _ in range(128)]) < 0.1
