"""Text with the top-1 expert of each token, for a terminal: as background colours, or as letters without colours.

    痛风[A]属于[C]风湿[C]科[A]
    layer 3 feed-forward, top-1 expert of 4 tokens:  A 2  B 0  C 2  D 0

The expert shown with a token was chosen at its position, where the model predicts the next token.
"""

from typing import NamedTuple

import torch

from minidoctor.config import UserError, check
from minidoctor.model import Model
from minidoctor.router import Router
from minidoctor.text.stream import TextStream, printable
from minidoctor.text.tokenizer import Tokenizer

# Eight of the 256 colours of terminals and their RGB values, close to those of Okabe and Ito for colour-blind readers
# (https://jfly.uni-koeln.de/color/) and light enough for black text: its contrast is above 5 on each.
CODES = (214, 117, 36, 227, 69, 202, 176, 250)
PALETTE = ("#ffaf00", "#87d7ff", "#00af87", "#ffff5f", "#5f87ff", "#ff5f00", "#d787d7", "#bcbcbc")


class RoutedText(NamedTuple):
    """Displayed text and the top-1 experts of its tokens: several if they spell one character in bytes."""

    text: str
    experts: tuple[int, ...]


def sublayer_names(model: Model) -> list[str]:
    """Return names such as "layer 3 feed-forward" in the order of the routings. Raises UserError without a router."""
    kinds, names = {"self_attn": "attention", "mlp": "feed-forward"}, []
    for name, module in model.named_modules():
        if isinstance(module, Router):  # model.layers.0.mlp.router
            _, _, layer, sublayer, _ = name.split(".")
            names.append(f"layer {layer} {kinds[sublayer]}")
    if not names:
        raise UserError("this model has no router; it needs an adapter with more than one expert")
    return names


def choose_sublayer(model: Model, layer: int | None) -> int:
    """Return the index of a layer's routing, by default the last layer's: of its feed-forward, else its attention."""
    names, last = sublayer_names(model), model.config.n_layers - 1
    layer = last if layer is None else layer
    check(0 <= layer <= last, f"--layer must be between 0 and {last}, got {layer}")
    return max(i for i, name in enumerate(names) if name.startswith(f"layer {layer} "))


def letter(expert: int, n_experts: int) -> str:
    return chr(ord("A") + expert) if n_experts <= 26 else str(expert)


@torch.inference_mode()
def top1_of_tokens(model: Model, tokens: list[int], sublayer: int) -> list[int]:
    _, routings = model.hidden(torch.tensor([tokens], device=model.lm_head.weight.device))
    return routings[sublayer].expert_ids[0, :, 0].tolist()


def routed_texts(tokenizer: Tokenizer, tokens: list[int], experts: list[int]) -> list[RoutedText]:
    """Decode tokens one by one: special tokens by name, tokens without text as a space, bytes joined to characters."""
    texts: list[RoutedText] = []
    stream, pending = TextStream(tokenizer), list[int]()  # experts of bytes that are not a character yet
    for token, expert in zip(tokens, experts, strict=True):
        if name := tokenizer.names.get(token):
            if pending:
                texts.append(RoutedText(stream.rest(), tuple(pending)))
            texts.append(RoutedText(name, (expert,)))
            stream, pending = TextStream(tokenizer), []
            continue
        pending.append(expert)
        text = stream.push(token)
        if text or not stream.incomplete:
            texts.append(RoutedText(text or " ", tuple(pending)))
            pending = []
    if pending:
        texts.append(RoutedText(stream.rest(), tuple(pending)))
    # Line breaks are escaped: some terminals extend a background colour to the end of the line.
    return [t._replace(text=printable(t.text).replace("\n", "\\n").replace("\t", "\\t")) for t in texts]


def question_start(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> int:
    """Return the index of the last message's first token: where the prompt first differs for another last message."""
    prompt = tokenizer.chat(messages)
    changed = tokenizer.chat([*messages[:-1], {**messages[-1], "content": "\0"}])
    return next((i for i, (a, b) in enumerate(zip(prompt, changed, strict=False)) if a != b), 0)


def routing_text(model: Model, tokenizer: Tokenizer, tokens: list[int], start: int, sublayer: int, colour: bool) -> str:
    """Return the tokens from `start` with their experts and a legend with counts. The earlier tokens are context.

    Letters follow the text if there are no colours, as in "gout[C]", or more experts than colours.
    """
    assert model.adapter
    n_experts = model.adapter.n_experts
    experts = top1_of_tokens(model, tokens, sublayer)[start:]

    def painted(text: str, expert: int) -> str:
        return f"\x1b[30;48;5;{CODES[expert % len(CODES)]}m{text}\x1b[0m" if colour else text

    line, counts = "", []
    for text, chosen in routed_texts(tokenizer, tokens[start:], experts):
        if not colour or n_experts > len(CODES):
            text += f"[{','.join(letter(e, n_experts) for e in chosen)}]"
        line += painted(text, chosen[-1])
    for e in range(n_experts):
        name = letter(e, n_experts)
        counts.append(f"{painted(f' {name} ' if colour else name, e)} {experts.count(e)}")
    name = sublayer_names(model)[sublayer]
    return f"{line}\n{name}, top-1 expert of {len(experts)} tokens:  {'  '.join(counts)}"
