import pytest
import torch

from minidoctor.config import AdapterConfig, TrainConfig
from minidoctor.picture.live_bytes import LiveBytes, contrast_bytes_by_tokens
from minidoctor.training.memory import CONTRAST_COPIES


def test_what_is_alive_is_counted_once_and_no_longer():
    held = torch.zeros(50)  # 200 bytes
    with LiveBytes(held) as live:
        a = torch.zeros(100)  # 400
        view = a.view(10, 10).t()
        b = a + 1  # 400
        b.add_(1)
        assert live.peak == sum(live.sizes.values()) == 1000
        del a, b  # the view keeps one of them
        assert sum(live.sizes.values()) == 600
        c = view.double() * held[0]  # 800, and as much for the product
        assert live.peak == 600 + 1600
        del view, c
    assert sum(live.sizes.values()) == 200
    assert live.peak == 2200


def test_the_way_back_is_counted_too():
    x = torch.ones(100, requires_grad=True)
    with LiveBytes(x) as live:
        y = x.exp()  # kept for the way back
        assert live.peak == 800
        y.sum().backward()
        # x, y, the sum, its gradient of 1 (expanded, not copied), and the gradient of x.
        assert live.peak == 400 + 400 + 4 + 4 + 400


def test_the_queue_is_flat_and_the_batch_grows_with_its_tokens():
    adapter, config = AdapterConfig(), TrainConfig()
    tokens = (512, 1024, 2048, 4096)
    queue, batch = contrast_bytes_by_tokens(tokens, adapter, config)
    assert len(set(queue)) == 1
    assert batch[0] == queue[0]  # 512 tokens are as many keys as the queue has: 8 * 64
    # A key is its vector, a flag, and similarities with all anchors: several copies, fewer than memory.py counts with.
    each = {(b - a) / (n - m) for a, b, m, n in zip(batch, batch[1:], tokens, tokens[1:], strict=False)}
    assert len(each) == 1
    copies = (each.pop() - 4 * adapter.routing_dim - 1) / (4 * config.n_anchors)
    assert 2 < copies < CONTRAST_COPIES


@pytest.mark.parametrize("n_anchors", [16, 64])
def test_anchors_and_capacity_set_the_size_of_the_flat_line(n_anchors):
    adapter, small, large = AdapterConfig(), *(TrainConfig(n_anchors=n_anchors, queue_capacity=c) for c in (16, 32))
    (a,), _ = contrast_bytes_by_tokens((1024,), adapter, small)
    (b,), _ = contrast_bytes_by_tokens((1024,), adapter, large)
    assert 1.8 * a < b < 2.1 * a
