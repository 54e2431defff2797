"""Plots of a training run and of its routing, each as PNG and SVG.

    python -m minidoctor.picture OUT --run out

    loss        the loss and its terms per step
    load        share of the answer tokens whose top-1 each expert is, per sublayer
    topics      experts by topic and language, in the sublayer whose top-1 experts have most information about topics
    sentence    a question with its answer in each language, each token with its top-1 expert

Needs matplotlib: pip install -e ".[pictures]". The topics are those of the questions in --data.
"""

import argparse
import sys
from pathlib import Path

from minidoctor.checkpoints.adapters import load
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.flags import add_model_flags
from minidoctor.cli.main import run
from minidoctor.config import UserError, check
from minidoctor.files.json_files import parse_json, read_lines
from minidoctor.model import Model
from minidoctor.picture import terminal
from minidoctor.picture.statistics import top1_experts
from minidoctor.questions.read import read_questions
from minidoctor.questions.rows import Row
from minidoctor.text.tokenizer import Tokenizer, encode_conversation

MAX_TEXTS = 120  # of a question and its answer in the sentence plot


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl. Raises FileNotFoundError or UserError."""
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            row = parse_json(line)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        check(isinstance(row, dict) and {"step", "loss"} <= set(row), f'{path}:{number}: no "step" and "loss"')
        for name in {"step", "loss", "lm", "balance", "contrast"} & set(row):
            check(isinstance(row[name], (int, float)), f"{path}:{number}: {name} is not a number: {row[name]!r:.40}")
        rows.append(row)
    check(bool(rows), f"{path}: no steps yet")
    return rows


def example(rows: list[Row], language: str) -> Row | None:
    """Return the first question of a language, preferably a free-form one."""
    rows = [row for row in rows if row.language == language]
    return min(rows, key=lambda row: bool(row.options), default=None)


def routed_example(model: Model, tokenizer: Tokenizer, row: Row, sublayer: int) -> list[terminal.RoutedText]:
    """Return the texts of a question and its answer, at most MAX_TEXTS, with their top-1 experts."""
    tokens = encode_conversation(row.messages, tokenizer, model.config.max_seq_len).tokens
    start = terminal.question_start(tokenizer, row.messages[:-1])
    experts = terminal.top1_of_tokens(model, tokens, sublayer)
    return terminal.routed_texts(tokenizer, tokens[start:], experts[start:])[:MAX_TEXTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="directory for the plots; plots of the same names are replaced")
    parser.add_argument("--run", default="out", help="directory written by train.py (default out)")
    parser.add_argument("--data", default="data/heldout.jsonl", help="questions (default data/heldout.jsonl)")
    parser.add_argument("--layer", type=int, help="layer of the sentence plot (default: the last)")
    add_model_flags(parser, "base", "device", "dtype")
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise UserError('plots need matplotlib: pip install -e ".[pictures]"') from None
    from minidoctor.picture import plots

    metrics = read_metrics(Path(args.run) / "metrics.jsonl")
    questions = read_questions(args.data)
    for line in questions.malformed:
        print(line, file=sys.stderr)
    rows = [row for row in questions.rows if row.answer]
    check(bool(rows), f"{args.data}: no question has an answer")
    device = choose_device(args.device)
    model, tokenizer = load(args.base, args.run, choose_dtype(args.dtype, device), device)
    sublayer = terminal.choose_sublayer(model, args.layer)
    top1 = top1_experts(model, tokenizer, rows)
    examples = {language: example(rows, language) for language in ("en", "zh")}
    sentences = {language: routed_example(model, tokenizer, row, sublayer) for language, row in examples.items() if row}
    figures = {
        "loss": lambda: plots.loss_figure(metrics),
        "load": lambda: plots.load_figure(top1, model),
        "topics": lambda: plots.topics_figure(top1, rows, model),
        "sentence": lambda: plots.sentence_figure(sentences, model, sublayer),
    }
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(plots.STYLE):
        for name, draw in figures.items():  # each is saved before the next is drawn
            if figure := draw():
                print(*plots.save(figure, Path(args.out), name), sep="  ")
            else:
                print(f"{name}: not drawn, these questions have nothing to show", file=sys.stderr)


if __name__ == "__main__":
    run(main)
