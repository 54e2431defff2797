"""Plots of a training run and of its routing, each as PNG and SVG, or a page for the browser.

    python -m minidoctor.picture OUT --run out
    python -m minidoctor.picture --page routing.html --run out [--compare-run DIR]

    loss        the loss and its terms per step
    load        share of the answer tokens whose top-1 each expert is, per sublayer
    topics      experts by topic and language, in the sublayer whose top-1 experts have most information about topics
    sentence    a question with its answer in each language, each token with its top-1 expert

The plots need matplotlib: pip install -e ".[pictures]". The topics are those of the questions in --data. The page shows
the routing of one of these questions, an English one if there is one, the expert queue and the training. It needs no
network and no package.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from minidoctor.checkpoints.adapters import load
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.flags import add_model_flags
from minidoctor.cli.main import run
from minidoctor.config import UserError, check
from minidoctor.model import Model
from minidoctor.picture import terminal
from minidoctor.picture.metrics import read_metrics
from minidoctor.picture.page import write_page
from minidoctor.picture.statistics import top1_experts
from minidoctor.questions.read import read_questions
from minidoctor.questions.rows import Row
from minidoctor.text.tokenizer import Tokenizer, encode_conversation

MAX_TEXTS = 120  # of a question and its answer in the sentence plot


def example(rows: list[Row], language: str) -> Row | None:
    """Return the first question of a language, preferably a free-form one."""
    rows = [row for row in rows if row.language == language]
    return min(rows, key=lambda row: bool(row.options), default=None)


def routed_example(model: Model, tokenizer: Tokenizer, row: Row, sublayer: int) -> list[terminal.RoutedText]:
    """Return the texts of a question and its answer, at most MAX_TEXTS, with their top-1 experts."""
    tokens = encode_conversation(row.messages, tokenizer, model.config.max_seq_len).tokens
    start = terminal.question_start(tokenizer, row.messages[:-1])
    experts = terminal.top1_of_tokens(model, tokens, sublayer)
    texts = terminal.routed_texts(tokenizer, tokens[start:], experts[start:])
    if len(texts) > MAX_TEXTS:
        print(f"sentence: only the first {MAX_TEXTS} of {len(texts)} tokens are drawn", file=sys.stderr)
    return texts[:MAX_TEXTS]


def draw_plots(
    out: Path, metrics: list[dict[str, float]], model: Model, tokenizer: Tokenizer, rows: list[Row], sublayer: int
) -> None:
    """Save the four plots. Each is saved before the next is drawn."""
    import matplotlib

    from minidoctor.picture import plots

    top1 = top1_experts(model, tokenizer, rows)
    examples = {language: example(rows, language) for language in ("en", "zh")}
    sentences = {language: routed_example(model, tokenizer, row, sublayer) for language, row in examples.items() if row}
    figures = {
        "loss": lambda: plots.loss_figure(metrics),
        "load": lambda: plots.load_figure(top1, model),
        "topics": lambda: plots.topics_figure(top1, rows, model),
        "sentence": lambda: plots.sentence_figure(sentences, model, sublayer),
    }
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(plots.STYLE):
        for name, draw in figures.items():
            if figure := draw():
                print(*plots.save(figure, out, name), sep="  ")
            else:
                print(f"{name}: not drawn, these questions have nothing to show", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out_help = "directory for the plots; plots of the same names are replaced"
    parser.add_argument("out", metavar="OUT", nargs="?", help=out_help)
    parser.add_argument("--page", metavar="FILE", help="HTML file for the page; an existing file is replaced")
    parser.add_argument("--run", default="out", help="directory written by train.py (default out)")
    parser.add_argument("--compare-run", metavar="RUN", help="second run on the same base; the page switches to it")
    parser.add_argument("--data", default="data/heldout.jsonl", help="questions (default data/heldout.jsonl)")
    parser.add_argument("--layer", type=int, help="layer of the sentence plot (default: the last)")
    add_model_flags(parser, "base", "device", "dtype")
    args = parser.parse_args()
    check(args.out or args.page, "expected OUT for the plots, --page FILE, or both")
    check(args.page or not args.compare_run, "--compare-run needs --page")
    if args.out:
        if not find_spec("matplotlib"):
            raise UserError('plots need matplotlib: pip install -e ".[pictures]"')
        metrics = read_metrics(Path(args.run) / "metrics.jsonl")
    questions = read_questions(args.data)
    for line in questions.malformed:
        print(line, file=sys.stderr)
    rows = [row for row in questions.rows if row.answer]
    check(bool(rows), f"{args.data}: no question has an answer")
    if len(rows) < len(questions.rows):
        print(f"{args.data}: {len(questions.rows) - len(rows)} questions without an answer skipped", file=sys.stderr)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, tokenizer = load(args.base, args.run, dtype, device)
    runs = [(Path(args.run), model)]
    if args.compare_run:
        other, other_tokenizer = load(args.base, args.compare_run, dtype, device)
        check(
            other_tokenizer.format == tokenizer.format,
            f"{args.compare_run}: trained in another chat format than {args.run}, so their prompts differ",
        )
        runs.append((Path(args.compare_run), other))
    sublayer = terminal.choose_sublayer(model, args.layer)
    if args.out:
        draw_plots(Path(args.out), metrics, model, tokenizer, rows, sublayer)
    if args.page:
        row = example(rows, "en") or rows[0]
        topic = f"Topic: {row.topic}. " if row.topic else ""
        write_page(Path(args.page), tokenizer, row.messages, f"{topic}Answer: reference answer in {args.data}.", runs)
        print(args.page)


if __name__ == "__main__":
    run(main)
