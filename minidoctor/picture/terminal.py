"""Which expert each token of a text goes to first, for a terminal: in colours, or with letters where it has none.

    痛风[A]属于[C]风湿[C]科[A]
    layer 3 feed-forward, first expert of 4 tokens:  A 2  B 0  C 2  D 0

A token is routed where it stands itself, on the way to the token that follows it.
"""

from typing import NamedTuple

import torch

from minidoctor.config import UserError
from minidoctor.model import Model
from minidoctor.router import Router
from minidoctor.text.stream import INCOMPLETE, TextStream, printable
from minidoctor.text.tokenizer import Tokenizer

# Of the 256 colours that terminals know, those near the palette of Okabe and Ito (https://jfly.uni-koeln.de/color/),
# which the colour-blind tell apart; its blue lighter and its black a grey, so that black text has a contrast above 5.
BACKGROUNDS = (214, 117, 36, 227, 69, 202, 176, 250)


class Sublayer(NamedTuple):
    layer: int
    kind: str

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"


class RoutedText(NamedTuple):
    """Text, and the first experts of its tokens: of one, or of the bytes that spell a character."""

    text: str
    experts: tuple[int, ...]


def sublayers(model: Model) -> list[Sublayer]:
    """Those with a router, in the order of the routings. Raises ValueError if there is none."""
    kinds = {"self_attn": "attention", "mlp": "feed-forward"}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Router):  # model.layers.0.mlp.router
            _, _, layer, sublayer, _ = name.split(".")
            found.append(Sublayer(int(layer), kinds[sublayer]))
    if not found:
        raise UserError("this model has no router: that needs an adapter with more than one expert")
    return found


def choose_sublayer(model: Model, layer: int | None) -> int:
    """The place of a layer's (None: the last one's) routing: its feed-forward's, or else its attention's."""
    found, last = sublayers(model), model.config.n_layers - 1
    wanted = last if layer is None else layer
    if not 0 <= wanted <= last:
        raise UserError(f"--layer must be between 0 and {last}, got {wanted}")
    return max(place for place, sublayer in enumerate(found) if sublayer.layer == wanted)


def letter(expert: int, n_experts: int) -> str:
    return chr(ord("A") + expert) if n_experts <= 26 else str(expert)


@torch.inference_mode()
def top1_of_tokens(model: Model, tokens: list[int], sublayer: int) -> list[int]:
    _, routings = model.hidden(torch.tensor([tokens], device=model.lm_head.weight.device))
    return routings[sublayer].expert_ids[0, :, 0].tolist()


def routed_texts(tokenizer: Tokenizer, tokens: list[int], experts: list[int]) -> list[RoutedText]:
    """Tokens and their experts as pieces of text. Control tokens go by their names, those without text are a space.

    (SentencePiece may begin a text with a token for the space before its first word, which is no part of it.)
    """
    pieces: list[RoutedText] = []
    text, waiting = TextStream(tokenizer), list[int]()  # experts of the bytes that are no character yet

    def end() -> None:
        if waiting:
            pieces.append(RoutedText(text.rest(), tuple(waiting)))

    for token, expert in zip(tokens, experts, strict=True):
        if name := tokenizer.names.get(token):
            end()
            pieces.append(RoutedText(name, (expert,)))
            text, waiting = TextStream(tokenizer), []
        else:
            waiting.append(expert)
            new = text.push(token)
            if new or not tokenizer.decode(text.ids).endswith(INCOMPLETE):
                pieces.append(RoutedText(new or " ", tuple(waiting)))
                waiting = []
    end()
    return pieces


def question_start(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> int:
    """Where the last message begins in the prompt: there it parts from the same conversation with another one."""
    prompt = tokenizer.chat(messages)
    other = tokenizer.chat([*messages[:-1], {**messages[-1], "content": "\0"}])
    return next((i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), 0)


def routing_text(model: Model, tokenizer: Tokenizer, tokens: list[int], start: int, sublayer: int, colour: bool) -> str:
    """The tokens from `start` on with the experts that they go to, having read those before, and a legend.

    Without colour every piece has its expert behind it, `"gout[C]"`; with more experts than colours it has with it.
    """
    assert model.adapter
    n_experts = model.adapter.n_experts
    experts = top1_of_tokens(model, tokens, sublayer)[start:]
    letters = not colour or n_experts > len(BACKGROUNDS)

    def painted(text: str, expert: int) -> str:
        background = BACKGROUNDS[expert % len(BACKGROUNDS)]
        return f"\x1b[30;48;5;{background}m{text}\x1b[0m" if colour else text

    line = ""
    for text, of_piece in routed_texts(tokenizer, tokens[start:], experts):
        # A line break is shown as such and not made: colours run on to the end of the line in some terminals.
        safe = printable(text).replace("\n", "\\n").replace("\t", "\\t")
        names = ",".join(letter(expert, n_experts) for expert in of_piece)
        line += painted(safe + (f"[{names}]" if letters else ""), of_piece[-1])
    counts = (
        painted(f" {letter(e, n_experts)} " if colour else letter(e, n_experts), e) + f" {experts.count(e)}"
        for e in range(n_experts)
    )
    where = sublayers(model)[sublayer]
    return f"{line}\n{where}, first expert of {len(experts)} tokens:  {'  '.join(counts)}"
