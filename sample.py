"""Ask the model: one question from the command line, a file of them, or a chat when none is given.

python sample.py --adapter out "What is the key test for gout?"
python sample.py --adapter out                     chat; /reset forgets it, /quit ends, Ctrl-C stops an answer
python sample.py --base DIR --raw "Once upon"      go on with a text, no chat format
python sample.py --adapter out --show-routing "What is the key test for gout?"      and which expert each token went to
python sample.py --adapter out --questions q.txt --out answers.jsonl       one question a line, or {"question": "..."}
"""

import argparse
import sys
from pathlib import Path

from minidoctor.ask.chat import chat, reply, show_routing, stream
from minidoctor.ask.question_file import answer_file
from minidoctor.checkpoints.adapters import load
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.flags import add_flags, from_flags
from minidoctor.cli.main import run
from minidoctor.config import SampleConfig, UserError
from minidoctor.ops.compiled import compile_blocks
from minidoctor.picture.terminal import choose_sublayer

WARNING = "For teaching only. This is not medical advice; ask a doctor."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="(none: a chat)")
    parser.add_argument("--base", default="data/base", help="checkpoint directory (default data/base)")
    parser.add_argument("--adapter", help="directory that train.py wrote (default: the base alone)")
    parser.add_argument("--raw", action="store_true", help="go on with QUESTION as text, without a chat format")
    parser.add_argument("--chat-format", default="auto", help="how conversations are written (auto: as trained)")
    parser.add_argument("--questions", help="answer the questions of a file: one a line, or JSON lines")
    parser.add_argument("--out", help="where the answers to --questions go, as JSON lines")
    parser.add_argument("--batch-size", type=int, default=8, help="questions answered at once (default 8)")
    parser.add_argument("--show-routing", action="store_true", help="show which expert each token went to first")
    parser.add_argument("--layer", type=int, help="layer that --show-routing looks at (default: the last)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default auto)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer blocks with torch.compile (about 30 s warm-up; helps decoding most)",
    )
    add_flags(parser, SampleConfig)
    given = parser.parse_args()
    config = from_flags(SampleConfig, vars(given))
    if given.raw and given.question is None and not given.questions:
        raise UserError('--raw needs a text to go on with (it may be empty: --raw "")')
    if given.question is not None and not given.question.strip() and not given.raw:
        raise UserError("the question is empty")
    if bool(given.questions) != bool(given.out):
        raise UserError("--questions FILE and --out FILE belong together")
    if given.questions and (given.question is not None or given.raw):
        raise UserError("--questions asks those of the file: no QUESTION and no --raw beside it")
    if given.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {given.batch_size}")
    if given.show_routing and given.questions:
        raise UserError("--show-routing shows answers that are printed, those to --questions go to a file")
    if given.show_routing and not given.adapter:
        raise UserError("--show-routing needs an --adapter with experts: the base alone has no router")
    if given.layer is not None and not given.show_routing:
        raise UserError("--layer is the one that --show-routing shows, and needs it")
    device = choose_device(given.device)
    dtype = choose_dtype(given.dtype, device)
    model, tokenizer = load(given.base, given.adapter, dtype, device, given.chat_format, chats=not given.raw)
    sublayer = choose_sublayer(model, given.layer) if given.show_routing else None
    if given.compile:
        compile_blocks(model.model.layers)
    if given.raw:
        prompt = tokenizer.start + tokenizer.encode(given.question)
        _, tokens = stream(model, tokenizer, prompt, config)
        if sublayer is not None:
            show_routing(model, tokenizer, prompt + tokens, len(tokenizer.start), sublayer)
        return
    print(f"{given.base}: {tokenizer.note}\n{WARNING}", file=sys.stderr)
    if given.questions:
        answer_file(model, tokenizer, Path(given.questions), Path(given.out), given.batch_size, config)
    elif given.question is None:
        chat(model, tokenizer, config, sublayer)
    else:
        reply(model, tokenizer, [{"role": "user", "content": given.question}], config, sublayer)


if __name__ == "__main__":
    run(main)
