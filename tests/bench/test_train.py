from minidoctor.bench.implementations import make_step, random_batch
from minidoctor.bench.options import FEED_FORWARD, BenchConfig
from minidoctor.bench.train import count_operations, question_batches
from minidoctor.config import AdapterConfig, ModelConfig, TrainConfig
from minidoctor.model import Model


def test_count_operations_equals_products_of_forward_and_backward():
    config, adapter = ModelConfig(60, 16, 2, 2, 1, 8, 24, 64), AdapterConfig(4, 2, 2, targets=FEED_FORWARD)
    batch = random_batch(config.vocab_size, 1, 16)
    counted = count_operations(make_step(Model(config), adapter, TrainConfig(contrast_weight=0)), batch)
    t, d, f, v, n = 16, config.dim, config.ffn_dim, config.vocab_size, len(batch.answer_positions)
    attention, feed_forward = d * 16 + 2 * d * 8 + 16 * d, 3 * d * f  # q, k and v, o: 2 query heads, 1 key head of 8
    experts, router = 3 * (d + f) * 8, d * 16 + 16 * 4  # A and B of 4 experts of rank 2 in 3 layers; P and c_e
    # A product costs 2 operations per token and weight. The backward pass needs as many for the gradient of its input,
    # and for trainable weights as many again for theirs.
    per_layer = 2 * t * (2 * (attention + feed_forward) + 3 * (experts + router))
    # Backpropagation stops at the first feed-forward: no gradients in its attention and of its input, which is
    # multiplied by W and A of gate_proj and up_proj and by P.
    not_computed = 2 * t * (attention + 2 * (d * f + d * 8) + d * 16)
    assert counted == 2 * per_layer - not_computed + 2 * 2 * n * d * v  # twice the output layer, on answers only


def test_question_batches_are_sorted_by_length_for_minidoctor_only(base_dir, rows_file):
    rows = [{"question": "gout?", "answer": "uric acid " * (1 + i % 8)} for i in range(32)]
    config = BenchConfig(base=str(base_dir), data=str(rows_file(*rows)))
    by_length, shuffled = question_batches(config)
    assert [sum(map(len, batches)) for batches in ([b.tokens for b in by_length], [b.tokens for b in shuffled])] == [
        32
    ] * 2
    n_padding = [sum(int((~b.attention_mask).sum()) for b in batches) for batches in (by_length, shuffled)]
    assert n_padding[0] == 0 < n_padding[1]
