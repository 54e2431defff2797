"""The targets of the base's pretraining."""

import itertools

from data import make_base
from data.make_base import find_slots, make_blocks
from data.make_text import ATTRIBUTES, HERE, LANGUAGES, declarative_text, names_and_values, read_table
from minidoctor.batching import IGNORE
from minidoctor.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(HERE / "base")
_, CONDITIONS = read_table()


def test_find_slots_marks_the_tokens_of_names_and_values():
    n_expected = n_found = 0
    for text in itertools.islice(declarative_text(CONDITIONS, 1, 0, cut="\t"), 300):
        ids = TOKENIZER.encode(text.replace("\t", ""))
        marked = find_slots(text, ids, TOKENIZER)
        slots = "".join("".join(text.split("\t")[1::2]).split())
        found = "".join(TOKENIZER.decode([i for i, inside in zip(ids, marked, strict=True) if inside]).split())
        characters = iter(slots)
        assert all(character in characters for character in found)  # in this order
        n_expected, n_found = n_expected + len(slots), n_found + len(found)
    assert 0.99 * n_expected < n_found <= n_expected  # few tokens cross the end of a slot


def test_names_and_values_have_few_tokens_and_none_is_unknown():
    texts = names_and_values(CONDITIONS)
    assert {c[x]["name"] for c in CONDITIONS for x in LANGUAGES} < {*texts}
    assert {c[x][a] for c in CONDITIONS for x in LANGUAGES for a in ATTRIBUTES} < {*texts}
    counts = [len(TOKENIZER.encode(text)) for text in texts]
    assert sum(counts) / len(counts) < 6
    assert all(TOKENIZER.decode(TOKENIZER.encode(text)) == text for text in texts)


def test_blocks_have_the_tokens_of_slots_and_ends_as_targets(monkeypatch):
    shares = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(make_base, "P_WORDING", share)
        blocks = list(itertools.islice(make_blocks(CONDITIONS, TOKENIZER, 64, 0), 50))
        targets = [target for block in blocks for target in block.targets]
        shares.append(sum(target != IGNORE for target in targets) / len(targets))
        for block in blocks:
            following = [*block.tokens[1:], None]
            pairs = list(zip(block.targets[:-1], following, strict=False))
            assert all(target in (IGNORE, token) for target, token in pairs)
            # </s> follows each paragraph; <s> only begins one and is never predicted.
            assert all(target == token for target, token in pairs if token in TOKENIZER.eos_ids)
            assert not {*TOKENIZER.start} & {*block.targets}
    assert shares[0] < 0.7 < 0.95 < shares[1] < 1
