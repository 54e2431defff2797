"""Groups of experts learned from prompts."""

import pytest
import torch
import torch.nn.functional as F

from minidoctor.batching import IGNORE, Example
from minidoctor.config import TARGETS, AdapterConfig
from minidoctor.model import Model
from minidoctor.training.groups import balanced_assignments, learn_centres, learn_groups, prompt_views

GROUPED = AdapterConfig(n_experts=8, top_k=2, rank=2, targets=tuple(TARGETS), n_groups=2)


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return Model(config, GROUPED)


def make_example(prompt, answer=(5, 6)):
    return Example([*prompt, *answer], [IGNORE] * (len(prompt) - 1) + [*answer, 2])


def make_prompts(n):
    """Return prompts from two small vocabularies in turn, with tokens that both share."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randint(20, 30, (12,), generator=generator) + i % 2 * 10 for i in range(n)]
    return [make_example([1, 4, *draw.tolist()]) for draw in draws]


def test_assignments_give_every_group_the_same_total():
    torch.manual_seed(0)
    scores = torch.rand(60, 3) * 0.2 + torch.tensor([0.3, 0.0, 0.0])  # the first group is the nearest for most
    q = balanced_assignments(scores, n_rounds=50)
    torch.testing.assert_close(q.sum(1), torch.ones(60))
    torch.testing.assert_close(q.sum(0), torch.full((3,), 20.0))
    assert (scores / 0.05).softmax(-1).sum(0)[0] > 40
    assert torch.corrcoef(torch.stack([q[:, 0], scores[:, 0] - scores[:, 1]]))[0, 1] > 0.5


def test_views_are_the_mean_embeddings_of_two_halves_of_the_prompt(model):
    mean = torch.randn(model.config.dim)
    prompt = list(range(7, 17))
    example = make_example(prompt)
    views = prompt_views(model, [example, make_example([30, 31])], mean, seed=3)
    half = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    table = model.model.embed_tokens.weight
    for view, chosen in zip(views[:, 0], (half[0], ~half[0]), strict=True):
        # the last token of the prompt predicts the answer and is the first answer position
        tokens = [t for t, c in zip(prompt[:-1], chosen, strict=False) if c]
        torch.testing.assert_close(view, F.normalize(table[tokens].mean(0) - mean, dim=0).detach())
    longer = prompt_views(model, [make_example(prompt, (99, 98)), make_example([30, 31])], mean, seed=3)
    assert torch.equal(views, longer)  # answers are not seen


def test_centres_separate_two_kinds_of_prompts_without_labels(model):
    torch.manual_seed(0)
    kinds = F.normalize(torch.randn(2, 16), dim=-1)
    views = F.normalize(kinds.repeat(100, 1) + 0.2 * torch.randn(2, 200, 16), dim=-1)
    centres = learn_centres(views, 2, seed=0)
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(2))
    groups = (views[0] @ centres.T).argmax(-1).view(100, 2)
    assert (groups == groups[0]).all()
    assert groups[0].tolist() in ([0, 1], [1, 0])
    assert torch.equal(centres, learn_centres(views, 2, seed=0))


def test_groups_of_a_model_are_those_of_its_prompts(model):
    examples = make_prompts(1000)  # evenly spaced ones would all be of one kind
    learn_groups(model, examples, seed=0)
    torch.testing.assert_close(model.groups.mean, model.model.embed_tokens.weight.mean(0).detach())
    groups = [
        int(model.groups(model.model.embed_tokens(torch.tensor([e.tokens[:-2]]))).sum(1).argmax()) for e in examples
    ]
    first = sum(g == groups[0] for g in groups[::2]), sum(g == groups[0] for g in groups[1::2])
    assert first[0] > 475
    assert first[1] < 25


def test_model_without_groups_is_left_alone(config):
    model = Model(config, AdapterConfig(n_experts=4, targets=tuple(TARGETS)))
    learn_groups(model, [make_example([7, 8])], seed=0)
    assert model.groups is None
