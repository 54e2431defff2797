"""Pictures of a training run and of what its experts do, each as PNG and SVG.

    python -m minidoctor.picture OUT --run out

    loss        the loss and its parts, step by step
    load        how many answer tokens go to each expert of each sublayer first
    topics      experts against topics and languages, in the sublayer that tells topics apart most
    sentence    a question with its answer in each language, every token with its first expert
    memory      what the contrast holds for batches of more and more tokens, with the queue and without

Needs matplotlib: pip install -e ".[pictures]". The topics are those of the questions in --data.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from minidoctor.checkpoints.adapters import load
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.main import run
from minidoctor.config import AdapterConfig, TrainConfig, UserError
from minidoctor.files.json_files import read_bytes
from minidoctor.model import Model
from minidoctor.picture.live_bytes import TOKENS, contrast_bytes_by_tokens
from minidoctor.picture.statistics import Top1, expert_load, label_information, mutual_information, shares, top1_experts
from minidoctor.picture.terminal import (
    RoutedText,
    choose_sublayer,
    question_start,
    routed_texts,
    sublayers,
    top1_of_tokens,
)
from minidoctor.questions.exams import read_questions
from minidoctor.questions.rows import Row, parse_json
from minidoctor.text.stream import printable
from minidoctor.text.tokenizer import Tokenizer, encode_conversation

MOST_PIECES = 120  # of a question and its answer that are drawn


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Raises FileNotFoundError or ValueError."""
    rows = []
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if not isinstance(row, dict) or not {"step", "loss"} <= set(row):
            raise UserError(f'{path}:{number}: expected an object with "step" and "loss"')
        if not all(isinstance(value, (int, float)) for value in row.values()):
            raise UserError(f"{path}:{number}: expected numbers")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no steps yet")
    return rows


def most_telling(found: Top1, labels: list[str], n_experts: int) -> int:
    """The sublayer whose first experts say most about the questions' labels."""
    joint = shares(numbered(found, labels), found.expert_ids, n_experts)  # (L, E, J)
    bits = [mutual_information(layer[None]) for layer in joint]
    return bits.index(max(bits))


def numbered(found: Top1, labels: list[str]) -> Tensor:
    """The place among the sorted labels of each token's (n,)."""
    names = sorted(set(labels))
    return torch.tensor([names.index(label) for label in labels])[found.question]


def lift(found: Top1, labels: list[str], n_experts: int) -> Tensor:
    """How much more often than on average an expert's tokens have a label: p(j | e) / p(j) of (1, n) -> (J, E).

    NaN for an expert with less than a tenth of its fair share of tokens: of so few it says nothing.
    """
    joint = shares(numbered(found, labels), found.expert_ids, n_experts)[0].T  # (J, E)
    load = joint.sum(0)  # (E,)
    return torch.where(load < 0.1 / n_experts, torch.nan, joint / load / joint.sum(1, keepdim=True))


def example(rows: list[Row], language: str) -> Row | None:
    """The first question of a language, one without options if there is any."""
    found = [row for row in rows if row.language == language]
    return next((row for row in found if not row.options), found[0] if found else None)


def sentence(model: Model, tokenizer: Tokenizer, row: Row, sublayer: int) -> list[RoutedText]:
    tokens = encode_conversation(row.messages, tokenizer, model.config.max_seq_len).tokens
    start = question_start(tokenizer, row.messages[:-1])
    experts = top1_of_tokens(model, tokens, sublayer)
    pieces = routed_texts(tokenizer, tokens[start:], experts[start:])[:MOST_PIECES]
    return [piece._replace(text=printable(piece.text).replace("\n", "\\n")) for piece in pieces]


def topics_picture(found: Top1, rows: list[Row], model: Model) -> "Figure | None":
    """The sublayer whose first experts say most about the topics, or about the languages if there is one topic only."""
    from minidoctor.picture import plots as figures

    assert model.adapter
    n_experts, tables, told = model.adapter.n_experts, {}, []
    labels = {"topic": [row.topic or "(none)" for row in rows], "language": [row.language for row in rows]}
    labels = {kind: of_question for kind, of_question in labels.items() if len(set(of_question)) > 1}
    if not labels:
        return None
    best = most_telling(found, next(iter(labels.values())), n_experts)
    of_best = found._replace(expert_ids=found.expert_ids[best : best + 1])  # (1, n)
    for kind, of_question in labels.items():
        about = label_information(of_best, of_question, n_experts)
        told.append(f"{about['bits']:.2f} bits about the {kind} ({about['shuffled']:.2f} with {kind}s shuffled)")
        table = lift(of_best, of_question, n_experts)  # (J, E)
        tables[kind] = sorted(set(of_question))[: len(table)], table  # the last may have no answer tokens
    title = f"The first expert in {sublayers(model)[best]} tells\n" + ", ".join(told)
    return figures.topics_figure(tables, expert_load(of_best, n_experts)[0], title)


def sentence_picture(model: Model, tokenizer: Tokenizer, rows: list[Row], sublayer: int) -> "Figure | None":
    """A question and its answer in each language that this machine has a font for."""
    from minidoctor.picture import plots as figures

    assert model.adapter
    sentences = []
    for language, name in (("en", "English"), ("zh", "Chinese")):
        if row := example(rows, language):
            pieces = sentence(model, tokenizer, row, sublayer)
            if font := figures.font_for("".join(piece.text for piece in pieces)):
                sentences.append((pieces, font))
            else:
                print(f"sentence: nothing in {name}, no font of this machine has its characters", file=sys.stderr)
    title = f"The first expert of each token, {sublayers(model)[sublayer]}"
    return figures.sentence_figure(sentences, model.adapter.n_experts, title) if sentences else None


def memory_picture() -> "Figure":
    """Of the default experts and queue, whatever the run's are, so that all who draw it see the same."""
    from minidoctor.picture import plots as figures

    adapter, config = AdapterConfig(), TrainConfig()
    queue, batch = contrast_bytes_by_tokens(TOKENS, adapter, config)
    told = {
        "within the batch: every token is a key": batch,
        f"with the queue: {config.queue_capacity} keys for each of {adapter.n_experts} experts": queue,
    }
    title = f"Memory of the contrastive loss and its gradient, {config.n_anchors} anchors"
    return figures.memory_figure(told, TOKENS, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="directory for the pictures; those of the same names are replaced")
    parser.add_argument("--run", default="out", help="directory that train.py wrote (default out)")
    parser.add_argument("--base", default="data/base", help="checkpoint directory (default data/base)")
    parser.add_argument("--data", default="data/heldout.jsonl", help="questions (default data/heldout.jsonl)")
    parser.add_argument("--layer", type=int, help="layer of the sentence picture (default: the last)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default auto)")
    given = parser.parse_args()
    try:
        from matplotlib import rc_context

        from minidoctor.picture import plots as figures
    except ImportError:
        raise UserError('pictures need one more package, matplotlib: pip install -e ".[pictures]"') from None
    metrics = read_metrics(Path(given.run) / "metrics.jsonl")
    questions = read_questions(given.data)
    for line in questions.odd:
        print(line, file=sys.stderr)
    rows = [row for row in questions.rows if row.answer]
    if not rows:
        raise UserError(f"{given.data}: no question has an answer")
    device = choose_device(given.device)
    model, tokenizer = load(given.base, given.run, choose_dtype(given.dtype, device), device)
    sublayer, names = choose_sublayer(model, given.layer), [str(sublayer) for sublayer in sublayers(model)]
    assert model.adapter
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    found = top1_experts(model, tokenizer, rows)
    with rc_context(figures.STYLE):
        pictures = {
            "loss": figures.loss_figure(metrics),
            "load": figures.load_figure(expert_load(found, model.adapter.n_experts), names),
            "topics": topics_picture(found, rows, model),
            "sentence": sentence_picture(model, tokenizer, rows, sublayer),
            "memory": memory_picture(),
        }
        for name, figure in pictures.items():
            if figure:
                print(*figures.save(figure, out, name), sep="  ")
            else:
                print(f"{name}: not drawn, there is nothing to show of these questions", file=sys.stderr)


if __name__ == "__main__":
    run(main)
