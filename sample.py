"""Ask the model: one question, a file of questions, or a chat. For teaching only, not medical advice.

python sample.py --adapter out "What is the key test for gout?"
python sample.py --adapter out                     chat: /reset starts a new conversation, /quit ends, Ctrl-C stops
python sample.py --adapter out --show-routing "What is the key test for gout?"      with the top-1 expert of each token
python sample.py --adapter out --page routing.html "What is the key test for gout?"     the routing as a page to open
python sample.py --adapter out --questions q.txt --out answers.jsonl    one question, or {"question": "..."}, per line
python sample.py --base DIR --raw "Once upon"      text completion, without a chat format
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from minidoctor.ask.chat import WARNING, chat, print_routing, reply, stream
from minidoctor.ask.question_file import answer_questions, count_answered, read_question_file
from minidoctor.checkpoints.adapters import load
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.flags import add_flags, add_model_flags, from_flags
from minidoctor.cli.main import run
from minidoctor.config import SampleConfig, check
from minidoctor.ops.compiled import compile_decoding
from minidoctor.picture.page import write_page
from minidoctor.picture.terminal import choose_sublayer, sublayer_names


def parse_flags() -> argparse.Namespace:
    """Parse the command line. Raises UserError for flags that contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="(default: a chat)")
    parser.add_argument("--raw", action="store_true", help="continue QUESTION as text, without a chat format")
    parser.add_argument("--questions", metavar="FILE", help="questions to answer, one per line or as JSON lines")
    parser.add_argument("--out", metavar="FILE", help="new file for the answers to --questions, as JSON lines")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished --out; repeat the other flags")
    parser.add_argument("--batch-size", type=int, default=8, help="questions per batch (default 8)")
    parser.add_argument("--show-routing", action="store_true", help="show the top-1 expert of each token")
    parser.add_argument("--page", metavar="FILE", help="HTML file for the routing of QUESTION and answer, replaced")
    parser.add_argument("--layer", type=int, help="layer of --show-routing (default: the last)")
    parser.add_argument("--compile", action="store_true", help="compile decoding (about 30 s, then faster)")
    add_model_flags(parser)
    add_flags(parser, SampleConfig)
    args = parser.parse_args()
    for name in ("questions", "out", "page", "adapter"):  # an empty variable of the shell is no absent flag
        check(getattr(args, name, None) != "", f"--{name} is empty")
    check(bool(args.questions) == bool(args.out), "--questions FILE and --out FILE need each other")
    check(not args.questions or args.question is None, "--questions cannot be combined with a QUESTION")
    check(not args.questions or not args.raw, "--questions cannot be combined with --raw")
    check(not args.questions or not args.show_routing, "--questions cannot be combined with --show-routing")
    check(args.questions or not args.resume, "--resume needs --questions")
    check(not args.raw or args.question is not None, '--raw needs a text to continue, which may be empty: --raw ""')
    check(args.raw or args.question is None or args.question.strip(), "the question is empty")
    check(args.batch_size >= 1, f"--batch-size must be at least 1, got {args.batch_size}")
    check(not args.show_routing or args.adapter, "--show-routing needs an --adapter; the base model has no router")
    page = args.adapter and args.question is not None and not args.raw
    check(not args.page or page, "--page needs a QUESTION and an --adapter, and cannot be combined with --raw")
    check(args.layer is None or args.show_routing, "--layer needs --show-routing")
    return args


def main() -> None:
    args = parse_flags()
    config = from_flags(SampleConfig, vars(args))
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    if args.questions:  # before the model is loaded, which can take minutes
        out, questions = Path(args.out), read_question_file(Path(args.questions))
        n_answered = count_answered(out, questions, args.resume)
    # Compiled, a single row of int8 products is faster than packed; packed, several rows are.
    settings = args.chat_format, not args.raw, args.thinking, args.quantize, bool(args.questions) or not args.compile
    model, tokenizer = load(args.base, args.adapter, dtype, device, *settings)
    if tokenizer.format and not args.raw and "max_new_tokens" not in args:  # reasoning needs more
        config = replace(config, max_new_tokens=max(config.max_new_tokens, tokenizer.format.max_new_tokens))
    sublayer = choose_sublayer(model, args.layer) if args.show_routing else None
    if args.page:
        sublayer_names(model)  # reports a model without a router before the answer is generated
    if args.compile:
        config = replace(config, static_cache=compile_decoding(model))
    print(f"{args.base}: {tokenizer.note}\n{WARNING}", file=sys.stderr)
    if args.questions:
        try:
            answer_questions(model, tokenizer, questions, n_answered, out, args.batch_size, config)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{out}: interrupted; use --resume to continue it") from None
    elif args.raw:
        prompt = tokenizer.start + tokenizer.encode(args.question)
        _, tokens = stream(model, tokenizer, prompt, config)
        if sublayer is not None:
            print_routing(model, tokenizer, prompt + tokens, len(tokenizer.start), sublayer)
    elif args.question is None:
        chat(model, tokenizer, config, sublayer)
    else:
        messages = [{"role": "user", "content": args.question}]
        messages.append({"role": "assistant", "content": reply(model, tokenizer, messages, config, sublayer)})
        if args.page:
            note = "The model generated the answer and read it once more for this page."
            write_page(Path(args.page), tokenizer, messages, note, [(Path(args.adapter), model)])


if __name__ == "__main__":
    run(main)
