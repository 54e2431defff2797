import itertools

from minidoctor.batching import IGNORE
from minidoctor.text.tokenizer import encode_conversation

CONVERSATION = [
    {"role": "system", "content": "Short."},
    {"role": "user", "content": "gout?"},
    {"role": "assistant", "content": "uric acid"},
    {"role": "user", "content": "哮喘？"},
    {"role": "assistant", "content": "喘息 " * 8},
]


def plain_targets(tokenizer, tokens):
    """Return the targets by a state machine: learning starts at <|assistant|> and stops behind the end token."""
    assistant, targets, learning = tokenizer.special_tokens["<|assistant|>"], [], False
    for token, following in itertools.pairwise(tokens):
        learning = learning or token == assistant
        targets.append(following if learning else IGNORE)
        learning = learning and following not in tokenizer.eos_ids
    return targets


def test_targets_are_the_assistant_tokens_and_their_end_token(tokenizer):
    example, tokens = encode_conversation(CONVERSATION, tokenizer, 1000), tokenizer.chat(CONVERSATION)
    assert example.tokens == tokens[:-1]
    assert example.targets == plain_targets(tokenizer, tokens)
    end = list(tokenizer.eos_ids)
    learned = [target for target in example.targets if target != IGNORE]
    assert learned == tokenizer.encode("uric acid") + end + tokenizer.encode("喘息 " * 8) + end


def test_max_seq_len_truncates_the_end(tokenizer):
    whole, truncated = (encode_conversation(CONVERSATION, tokenizer, length) for length in (1000, 9))
    assert len(whole.tokens) > 9
    assert truncated == (whole.tokens[:9], whole.targets[:9])
