"""Accuracy on CMB, CMExam, CMMLU and the user's questions, and the loss on their answers.

    python -m minidoctor.evaluate --base DIR [--adapter DIR] --data FILE... [--out predictions.json]
    python -m minidoctor.evaluate --base DIR --data cmmlu/test --shots 5 --out predictions.json --resume
    python -m minidoctor.evaluate --compare a.json b.json

For teaching and measuring. The answers of a model are not medical advice.
"""

import argparse

from minidoctor.cli.flags import add_flags, add_model_flags, from_flags
from minidoctor.cli.main import run
from minidoctor.cli.processes import start_processes
from minidoctor.evaluate.compare import compare_files
from minidoctor.evaluate.inputs import RunConfig
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.run import run_evaluation
from minidoctor.questions.exams import SUBJECT_LISTS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidoctor.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    parser.add_argument("--data", nargs="+", default=["data/heldout.jsonl"], help="files or directories of questions")
    parser.add_argument("--dev", nargs="+", default=[], help="files of few-shot examples (default: CMMLU's dev/)")
    parser.add_argument("--answers", default="", help="CMB's file of answers to its test questions")
    parser.add_argument("--subjects", choices=["all", *SUBJECT_LISTS], default="all", help="CMMLU's subjects (all)")
    parser.add_argument("--train-questions", nargs="+", default=[], help="training data: report questions not in it")
    parser.add_argument("--limit", type=int, default=0, help="first questions of each file to use (default 0: all)")
    parser.add_argument("--out", default="", help="new JSON file for the predictions; Ctrl-C keeps those that are done")
    parser.add_argument("--resume", action="store_true", help="continue the unfinished --out")
    parser.add_argument("--submission", default="", help="new file for CMB's submission form")
    parser.add_argument("--report", default="", help="new directory for report.md, a page to cite")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare two results and do nothing else")
    add_flags(parser, EvalConfig)
    flags = vars(parser.parse_args())
    if flags["compare"]:
        print(compare_files(*flags["compare"]))
    else:
        processes = start_processes(flags["device"])
        run_evaluation(from_flags(RunConfig, flags), from_flags(EvalConfig, flags), processes)


if __name__ == "__main__":
    run(main)
