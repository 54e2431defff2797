import re
from collections import Counter

import pytest
import torch

from minidoctor.config import AdapterConfig
from minidoctor.model import Model
from minidoctor.picture.terminal import (
    BACKGROUNDS,
    Sublayer,
    choose_sublayer,
    letter,
    question_start,
    routed_texts,
    routing_text,
    sublayers,
    top1_of_tokens,
)

QUESTION = [{"role": "user", "content": "gout, 龘 or 痛风?"}]  # the middle one is spelled in bytes
ESCAPE = re.compile(r"\x1b\[30;48;5;(\d+)m(.*?)\x1b\[0m")


def adapted_to(config, *targets, n_experts=4):
    return Model(config, AdapterConfig(n_experts, 2, 2, targets=targets, routing_dim=4)).eval()


def test_a_sublayer_is_the_one_it_is_called(adapted, tokenizer):
    """The router of that name, and no other, decided so."""
    tokens, chosen = tokenizer.chat(QUESTION), {}
    for number, block in enumerate(adapted.model.layers):
        for kind, part in (("attention", block.self_attn), ("feed-forward", block.mlp)):
            part.router.register_forward_hook(
                lambda _, inputs, out, key=(number, kind): chosen.update({key: out.expert_ids[0, :, 0].tolist()})
            )
    found = [top1_of_tokens(adapted, tokens, place) for place in range(4)]
    assert dict(zip(sublayers(adapted), found, strict=True)) == chosen
    assert len({tuple(experts) for experts in found}) == 4
    assert str(sublayers(adapted)[3]) == "layer 1 feed-forward"


def test_the_feed_forward_of_a_layer_is_chosen_and_else_its_attention(config, adapted):
    assert [choose_sublayer(adapted, layer) for layer in (None, 0, 1)] == [3, 1, 3]
    attention, feed_forward = adapted_to(config, "q_proj"), adapted_to(config, "up_proj")
    assert sublayers(attention) == [Sublayer(0, "attention"), Sublayer(1, "attention")]
    assert sublayers(feed_forward) == [Sublayer(0, "feed-forward"), Sublayer(1, "feed-forward")]
    assert [choose_sublayer(attention, layer) for layer in (None, 0)] == [1, 0]
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"--layer must be between 0 and 1, got {layer}"):
            choose_sublayer(adapted, layer)


def test_a_model_without_a_router_is_refused(config, model):
    for plain in (model, Model(config, AdapterConfig(n_experts=1, top_k=1, rank=2))):
        with pytest.raises(ValueError, match="no router: that needs an adapter with more than one expert"):
            choose_sublayer(plain, None)


def test_every_token_is_in_a_piece_and_every_piece_in_the_text(tokenizer):
    tokens = tokenizer.chat([*QUESTION, {"role": "assistant", "content": "尿酸 in fluid"}])
    pieces = routed_texts(tokenizer, tokens, list(range(len(tokens))))
    assert [expert for piece in pieces for expert in piece.experts] == list(range(len(tokens)))
    names = [tokenizer.names[token] for token in tokens if token in tokenizer.names]
    assert len(names) == 4
    assert [piece.text for piece in pieces if piece.text in names] == names
    # Apart from the spaces that SentencePiece has in front of a text and in front of its words.
    assert "".join(piece.text for piece in pieces).replace(" ", "") == (
        f"{names[0]}{names[1]}gout,龘or痛风?{names[2]}尿酸influid{names[3]}"
    )
    assert {len(piece.experts) for piece in pieces if "龘" in piece.text} == {3}
    assert {len(piece.experts) for piece in pieces if piece.text.isascii()} == {1}


def test_half_a_character_at_the_end_is_shown(tokenizer):
    tokens = tokenizer.encode("龘")[:-1]
    last = routed_texts(tokenizer, tokens, [1] * len(tokens))[-1]
    assert last.experts == (1, 1)
    assert set(last.text) == {"\ufffd"}


@pytest.mark.parametrize("text", ["gout?", "痛风", "same", "\0"])
def test_the_last_question_begins_where_it_begins(tokenizer, text):
    earlier = [{"role": "user", "content": "same"}, {"role": "assistant", "content": "same"}]
    for before in ([], earlier):
        messages = [*before, {"role": "user", "content": text}]
        start = question_start(tokenizer, messages)
        if text != "\0":
            rest = tokenizer.chat(messages)[start:]
            assert tokenizer.decode(rest).strip() == text
            assert rest[-1] in tokenizer.names
            assert set(rest[:-1]).isdisjoint(tokenizer.names)


def test_letters_follow_their_tokens_and_are_counted(adapted, tokenizer):
    tokens = tokenizer.chat(QUESTION)
    for start in (0, question_start(tokenizer, QUESTION)):
        line, legend = routing_text(adapted, tokenizer, tokens, start, 3, colour=False).split("\n")
        experts = top1_of_tokens(adapted, tokens, 3)[start:]  # routed with what stands before
        assert "".join(re.findall(r"\[([A-D,]+)\]", line)).replace(",", "") == "".join("ABCD"[e] for e in experts)
        assert "".join("ABCD"[e] for e in experts) != "A" * len(experts)
        assert re.sub(r"\[[A-D,]+\]| ", "", line).endswith("gout,龘or痛风?<|assistant|>")
        counts = Counter(experts)
        counted = "  ".join(f"{name} {counts[e]}" for e, name in enumerate("ABCD"))
        assert legend == f"layer 1 feed-forward, first expert of {len(experts)} tokens:  {counted}"


def test_colours_say_what_letters_say(adapted, tokenizer):
    tokens = tokenizer.chat(QUESTION)
    plain, _ = routing_text(adapted, tokenizer, tokens, 0, 1, colour=False).split("\n")
    line, legend = routing_text(adapted, tokenizer, tokens, 0, 1, colour=True).split("\n")
    pieces = re.findall(r"(.+?)\[(?:[A-D],)*([A-D])\]", plain)
    assert [(text, "ABCD"[BACKGROUNDS.index(int(code))]) for code, text in ESCAPE.findall(line)] == pieces
    assert ESCAPE.findall(legend) == [(str(BACKGROUNDS[e]), f" {name} ") for e, name in enumerate("ABCD")]
    assert "\x1b" not in plain + ESCAPE.sub("", line + legend)


def test_more_experts_than_colours_have_letters_too(config, tokenizer):
    model, tokens = adapted_to(config, "up_proj", n_experts=11), tokenizer.chat(QUESTION)
    line, legend = routing_text(model, tokenizer, tokens, 0, 1, colour=True).split("\n")
    names = [letter(e, 11) for e in top1_of_tokens(model, tokens, 1)]
    assert re.findall(r"[A-K]", "".join(re.findall(r"\[([A-K,]+)\]", line))) == names
    assert [code for code, _ in ESCAPE.findall(legend)] == [str(BACKGROUNDS[e % 8]) for e in range(11)]
    assert [letter(e, 27) for e in (0, 26)] == ["0", "26"]


def test_text_cannot_command_the_terminal_or_break_the_line(adapted, tokenizer):
    tokens = tokenizer.encode("gout\x1b[2J\n\tasthma")
    text = routing_text(adapted, tokenizer, tokens, 0, 1, colour=False)
    assert text.count("\n") == 1
    assert "\x1b" not in text
    shown = re.sub(r"\[[A-D]\]", "", text.split("\n")[0])
    assert "\\x1b" in shown
    assert "\\n" in shown
    assert "\\t" in shown


def test_black_is_legible_on_every_background():
    steps = (0, 95, 135, 175, 215, 255)  # of the colour cube of xterm
    for code in BACKGROUNDS:
        cube = [steps[(code - 16) // 6**place % 6] for place in (2, 1, 0)]
        rgb = torch.tensor(cube if code < 232 else [8 + 10 * (code - 232)] * 3) / 255
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        luminance = (linear * torch.tensor([0.2126, 0.7152, 0.0722])).sum()
        assert (luminance + 0.05) / 0.05 > 5, code
    assert len(set(BACKGROUNDS)) == 8
