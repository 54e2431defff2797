import re
from collections import Counter

import pytest
import torch

from minidoctor.config import TARGETS, AdapterConfig, UserError
from minidoctor.model import Model
from minidoctor.picture.terminal import (
    CODES,
    PALETTE,
    choose_sublayer,
    letter,
    question_start,
    routed_texts,
    routing_text,
    sublayer_names,
    top1_of_tokens,
)

QUESTION = [{"role": "user", "content": "gout, 龘 or 痛风?"}]  # the tokenizer spells 龘 in bytes
ESCAPE = re.compile(r"\x1b\[30;48;5;(\d+)m(.*?)\x1b\[0m")


def adapted_model(config, *targets, n_experts=4):
    return Model(config, AdapterConfig(n_experts, 2, 2, targets=targets, routing_dim=4)).eval()


def test_sublayer_names_match_the_order_of_the_routings(adapted, tokenizer):
    tokens, chosen = tokenizer.chat(QUESTION), {}
    for number, block in enumerate(adapted.model.layers):
        for kind, module in (("attention", block.self_attn), ("feed-forward", block.mlp)):
            module.router.register_forward_hook(
                lambda _, inputs, out, key=f"layer {number} {kind}": chosen.update(
                    {key: out.expert_ids[0, :, 0].tolist()}
                )
            )
    by_index = [top1_of_tokens(adapted, tokens, sublayer) for sublayer in range(4)]
    assert dict(zip(sublayer_names(adapted), by_index, strict=True)) == chosen
    assert len({tuple(experts) for experts in by_index}) == 4


def test_choose_sublayer_prefers_the_feed_forward_of_a_layer(config, adapted):
    assert [choose_sublayer(adapted, layer) for layer in (None, 0, 1)] == [3, 1, 3]
    attention, feed_forward = adapted_model(config, "q_proj"), adapted_model(config, "up_proj")
    assert sublayer_names(attention) == ["layer 0 attention", "layer 1 attention"]
    assert sublayer_names(feed_forward) == ["layer 0 feed-forward", "layer 1 feed-forward"]
    assert [choose_sublayer(attention, layer) for layer in (None, 0)] == [1, 0]
    for layer in (-1, 2):
        with pytest.raises(UserError, match=f"--layer .*0 and 1.* {layer}"):
            choose_sublayer(adapted, layer)


def test_sublayer_names_need_a_router(config, model):
    for plain in (model, Model(config, AdapterConfig(n_experts=1, rank=2, targets=tuple(TARGETS)))):
        with pytest.raises(UserError, match="no router"):
            sublayer_names(plain)


def test_routed_texts_contain_every_token_once(tokenizer):
    tokens = tokenizer.chat([*QUESTION, {"role": "assistant", "content": "尿酸 in fluid"}])
    texts = routed_texts(tokenizer, tokens, list(range(len(tokens))))
    assert [expert for text in texts for expert in text.experts] == list(range(len(tokens)))
    names = [tokenizer.names[token] for token in tokens if token in tokenizer.names]
    assert len(names) == 4
    assert [text.text for text in texts if text.text in names] == names
    # Without the spaces that SentencePiece adds in front of a text and of its words.
    assert "".join(text.text for text in texts).replace(" ", "") == (
        f"{names[0]}{names[1]}gout,龘or痛风?{names[2]}尿酸influid{names[3]}"
    )
    assert {len(text.experts) for text in texts if "龘" in text.text} == {3}
    assert {len(text.experts) for text in texts if text.text.isascii()} == {1}


def test_routed_texts_show_an_incomplete_last_character(tokenizer):
    tokens = tokenizer.encode("龘")[:-1]
    last = routed_texts(tokenizer, tokens, [1] * len(tokens))[-1]
    assert last.experts == (1, 1)
    assert set(last.text) == {"\ufffd"}


@pytest.mark.parametrize("text", ["gout?", "痛风", "same"])
@pytest.mark.parametrize("n_earlier", [0, 2])
def test_question_start_is_the_first_token_of_the_last_message(tokenizer, text, n_earlier):
    earlier = [{"role": "user", "content": "same"}, {"role": "assistant", "content": "same"}]
    messages = [*earlier[:n_earlier], {"role": "user", "content": text}]
    rest = tokenizer.chat(messages)[question_start(tokenizer, messages) :]
    assert tokenizer.decode(rest).strip() == text
    assert rest[-1] in tokenizer.names
    assert set(rest[:-1]).isdisjoint(tokenizer.names)


def test_question_start_exists_for_every_text(tokenizer):
    assert question_start(tokenizer, [{"role": "user", "content": "\0"}]) == 0  # the text that it compares with


def test_routing_text_has_the_expert_of_each_token_and_counts(adapted, tokenizer):
    tokens = tokenizer.chat(QUESTION)
    for start in (0, question_start(tokenizer, QUESTION)):
        line, legend = routing_text(adapted, tokenizer, tokens, start, 3, colour=False).split("\n")
        experts = top1_of_tokens(adapted, tokens, 3)[start:]  # with the earlier tokens as context
        assert len(set(experts)) > 1
        letters = "".join(re.findall(r"\[([A-D,]+)\]", line)).replace(",", "")
        assert letters == "".join("ABCD"[e] for e in experts)
        assert re.sub(r"\[[A-D,]+\]| ", "", line).endswith("gout,龘or痛风?<|assistant|>")
        counts = "  ".join(f"{name} {Counter(experts)[e]}" for e, name in enumerate("ABCD"))
        assert legend == f"layer 1 feed-forward, top-1 expert of {len(experts)} tokens:  {counts}"


def test_colours_show_the_same_experts_as_letters(adapted, tokenizer):
    tokens = tokenizer.chat(QUESTION)
    plain, _ = routing_text(adapted, tokenizer, tokens, 0, 1, colour=False).split("\n")
    line, legend = routing_text(adapted, tokenizer, tokens, 0, 1, colour=True).split("\n")
    texts = re.findall(r"(.+?)\[(?:[A-D],)*([A-D])\]", plain)
    assert [(text, "ABCD"[CODES.index(int(code))]) for code, text in ESCAPE.findall(line)] == texts
    assert ESCAPE.findall(legend) == [(str(CODES[e]), f" {name} ") for e, name in enumerate("ABCD")]
    assert "\x1b" not in plain + ESCAPE.sub("", line + legend)


def test_more_experts_than_colours_have_letters_too(config, tokenizer):
    model, tokens = adapted_model(config, "up_proj", n_experts=11), tokenizer.chat(QUESTION)
    line, legend = routing_text(model, tokenizer, tokens, 0, 1, colour=True).split("\n")
    names = [letter(e, 11) for e in top1_of_tokens(model, tokens, 1)]
    assert re.findall(r"[A-K]", "".join(re.findall(r"\[([A-K,]+)\]", line))) == names
    assert [code for code, _ in ESCAPE.findall(legend)] == [str(CODES[e % 8]) for e in range(11)]
    assert [letter(e, 27) for e in (0, 26)] == ["0", "26"]


def test_control_characters_are_escaped(adapted, tokenizer):
    tokens = tokenizer.encode("gout\x1b[2J\n\tasthma")
    text = routing_text(adapted, tokenizer, tokens, 0, 1, colour=False)
    assert text.count("\n") == 1
    assert "\x1b" not in text
    displayed = re.sub(r"\[[A-D]\]", "", text.split("\n")[0])
    assert all(escape in displayed for escape in ("\\x1b", "\\n", "\\t"))


def test_colours_agree_and_black_text_has_contrast():
    steps = (0, 95, 135, 175, 215, 255)  # of xterm's colour cube, codes 16 to 231; then 24 greys
    for code, hexadecimal in zip(CODES, PALETTE, strict=True):
        cube = [steps[(code - 16) // 6**power % 6] for power in (2, 1, 0)]
        rgb = cube if code < 232 else [8 + 10 * (code - 232)] * 3
        assert "#" + bytes(rgb).hex() == hexadecimal
        # https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio
        value = torch.tensor(rgb) / 255
        linear = torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        luminance = (linear * torch.tensor([0.2126, 0.7152, 0.0722])).sum()
        assert (luminance + 0.05) / 0.05 > 5, code
    assert len(set(CODES)) == 8
