"""Accuracy on CMB, CMExam, CMMLU and on questions of one's own, and the loss on their answers.

    python -m minidoctor.evaluate --base DIR [--adapter DIR] --data FILE... [--out predictions.json]
    python -m minidoctor.evaluate --base DIR --data cmmlu/test --shots 5 --out predictions.json --resume
    python -m minidoctor.evaluate --compare a.json b.json

Files are read by exams.py, questions put by prompts.py, answered in the ways that scoring.py lists and counted by
results.py. An open question is answered by writing, and right when the answer contains the expected one.

For teaching and measuring. What a model answers is not medical advice.
"""

import argparse
import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

from minidoctor.checkpoints.adapters import load
from minidoctor.checkpoints.hugging_face import checkpoint_hash
from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.cli.flags import add_flags, from_flags
from minidoctor.cli.main import run
from minidoctor.config import UserError
from minidoctor.evaluate.predictions import Found, answer, known_from, prediction_of, put_questions, result_of, sha256
from minidoctor.evaluate.prompts import Asker, Question
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.summary import compare, percent, table
from minidoctor.files.json_files import read_object, write_json
from minidoctor.questions.read import Questions, list_question_files, read_questions
from minidoctor.questions.rows import Row
from minidoctor.text.stream import printable

RULES = {
    "single": "the best score, of equal ones the first option",
    "several": "each letter whose score is at least the mean of the question's scores; which questions these are says "
    "the benchmark, in CMExam and in files of one's own the number of letters in the answer",
    "text": "of the bare question: without prompt, options and shots",
    "generate": "letters.py; what it cannot read is unanswered and wrong",
}


def submission_of(questions: list[Question], found: list[Found], config: EvalConfig) -> list[dict[str, Any]]:
    """CMB's official form: `[{"id": 1, "model_answer": "C"}, ...]`."""
    answers = [prediction_of(one, config, known)["prediction"] for one, known in zip(questions, found, strict=True)]
    return [
        {"id": int(one.row.id), "model_answer": answer or ""} for one, answer in zip(questions, answers, strict=True)
    ]


def read_data(given: argparse.Namespace) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of all files, and what is to be said of each file. Raises FileNotFoundError or ValueError."""
    paths = [file for path in given.data for file in list_question_files(Path(path))]
    if given.answers and len(paths) > 1:
        raise UserError("--answers belongs to the questions of CMB: give their file alone")
    rows: list[Row] = []
    files = []
    for path in paths:
        questions = read_questions(path, given.answers)
        rows += questions.rows[: given.limit]
        files.append(described(path, questions, given.answers))
    return rows, files


def described(path: Path, questions: Questions, answers: str | None = None) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes())
    if answers:
        digest.update(Path(answers).read_bytes())
    return {
        "file": path.name,
        "sha256": digest.hexdigest(),
        "questions": len(questions.rows),
        "odd": questions.malformed,
    }


def read_pool(given: argparse.Namespace, shots: int) -> tuple[list[Row], list[dict[str, Any]]]:
    """Solved questions for --shots: from --dev, or from dev/ beside the questions' directory, as CMMLU has it."""
    if not shots:
        return [], []
    paths = [file for path in given.dev or () for file in list_question_files(Path(path))]
    if not paths:
        for file in [file for path in given.data for file in list_question_files(Path(path))]:
            near = (file.parent.parent / "dev" / file.name, file.with_stem("dev"))
            paths += [one for one in near if one.exists() and one != file][:1]
    if not paths:
        raise UserError(f"--shots {shots}: no solved questions beside {given.data[0]}; --dev FILE says where they are")
    read = [(path, read_questions(path)) for path in paths]
    return [row for _, questions in read for row in questions.rows], [described(*one) for one in read]


def resumed(path: Path, protocol: dict[str, Any], questions: list[Question]) -> list[Found]:
    """What an unfinished result knows. Raises FileNotFoundError or ValueError if it is of another evaluation."""
    if not path.is_file():
        raise FileNotFoundError(f"--resume: there is no {path} to go on with")
    before = read_object(path)
    try:
        for key, value in protocol.items():
            if contents(before["protocol"][key]) != contents(value):
                raise UserError(f"--resume: {path} was made with other {key}: {before['protocol'][key]!r:.80}")
        if [p["prompt_sha256"] for p in before["predictions"]] != [sha256(one.text) for one in questions]:
            raise UserError(f"--resume: {path} was made with other prompts: the file of --prompt or --dev has changed")
        return [known_from(prediction) for prediction in before["predictions"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no result of this program ({error!r:.60})") from None


def contents(value: Any) -> Any:
    """Of files only what is in them, wherever they are read from."""
    return [one["sha256"] for one in value] if isinstance(value, list) and value and "sha256" in value[0] else value


def comparison(a: str, b: str) -> str:
    """Two result files, paired, for people. Raises FileNotFoundError or ValueError."""
    first, second = (read_object(Path(path)) for path in (a, b))
    for path, result in ((a, first), (b, second)):
        if result.get("complete") is False:
            raise UserError(
                f"{path}: an unfinished evaluation, of the longest questions only; --resume goes on with it"
            )
    try:
        of = compare(first["predictions"], second["predictions"])
        protocols = [result.get("protocol", {}) for result in (first, second)]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{a} and {b}: not two results of this program ({error!r:.60})") from None
    keys = [key for key in protocols[0] if protocols[0][key] != protocols[1].get(key) and key != "first_prompts"]
    return (
        f"a  {a}: {percent(of['a'])}\nb  {b}: {percent(of['b'])}\n"
        f"b - a: {of['difference']:+.1%}, 95 % interval {of['interval'][0]:+.1%} to {of['interval'][1]:+.1%}, "
        f"on the same {of['n']} questions\n"
        f"right only in a: {of['only_a']}, only in b: {of['only_b']}; exact McNemar test: p = {of['p']:.3g}\n"
        f"the two differ in: {', '.join(keys) or 'nothing that the results name'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidoctor.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="data/base", help="checkpoint directory (default data/base)")
    parser.add_argument("--adapter", help="directory that train.py wrote (default: the base alone)")
    parser.add_argument("--data", nargs="+", default=["data/heldout.jsonl"], help="files or directories of questions")
    parser.add_argument("--answers", help="CMB's file of answers to its test questions")
    parser.add_argument("--dev", nargs="+", help="solved questions for --shots (default: CMMLU's dev/)")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each file")
    parser.add_argument("--out", help="write every prediction here, as JSON; Ctrl-C leaves what is done")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished --out")
    parser.add_argument("--submission", help="write CMB's submission file here")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare two results, and nothing else")
    parser.add_argument("--chat-format", default="auto", help="how conversations are written (auto: as trained)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    add_flags(parser, EvalConfig)
    given = parser.parse_args()
    if given.compare:
        print(comparison(*given.compare))
        return
    config = from_flags(EvalConfig, vars(given))
    for name in ("out", "submission"):
        path = getattr(given, name)
        if path and (not Path(path).parent.is_dir() or Path(path).is_dir()):
            raise UserError(f"--{name} {path}: must be a file in a directory that exists")
    if given.limit is not None and given.limit < 1:
        raise UserError(f"--limit must be at least 1, got {given.limit}")
    if given.submission and given.limit:
        raise UserError("--submission needs all questions: not with --limit")
    if given.resume and not given.out:
        raise UserError("--resume needs the --out to go on with")
    examine(given, config)


def examine(given: argparse.Namespace, config: EvalConfig) -> None:
    """One evaluation from its files to its table."""
    device = choose_device(given.device)
    dtype = choose_dtype(given.dtype, device)
    rows, files = read_data(given)
    if given.submission and (other := [row.id for row in rows if row.exam != "cmb" or not row.id.isdecimal()]):
        raise UserError(f"--submission is for CMB's test questions, which have numbers; question {other[0]} has none")
    pool, dev = read_pool(given, config.shots)
    model, tokenizer = load(given.base, given.adapter, dtype, device, given.chat_format, chats=not config.raw)
    asker = Asker(tokenizer, config.raw)
    questions = put_questions(asker, rows, pool, config, model.config.max_seq_len)
    protocol = {
        "base": Path(given.base).resolve().name,
        "fingerprint": checkpoint_hash(given.base),
        "adapter": adapter_digest(given.adapter),
        "dtype": str(dtype).removeprefix("torch."),
        "chat_format": "raw" if config.raw else tokenizer.chat_format,
        "files": files,
        "dev": dev,
        "limit": given.limit,
        **{name: value for name, value in json_of(config).items() if name not in ("batch_size", "raw")},
        "rules": RULES,
        "first_prompts": {one.row.exam or "own": one.text for one in reversed(questions)},  # of each benchmark
    }
    out = Path(given.out) if given.out else None
    found: list[Found] = [{} for _ in rows]
    if out and given.resume:
        found = resumed(out, protocol, questions)
    elif out and out.exists() and read_object(out).get("complete") is False:
        raise UserError(f"{out}: an unfinished evaluation; --resume goes on with it, another --out starts a new one")

    def result(complete: bool) -> dict[str, Any]:
        return {"complete": complete, "protocol": protocol, **result_of(questions, config, found)}

    def save() -> None:
        if out:
            write_json(out, result(complete=False))

    print(f"{given.base}: {tokenizer.note}", file=sys.stderr)
    print("For teaching and measuring. What a model answers is not medical advice.")
    for exam, text in protocol["first_prompts"].items():
        print(f"the first prompt ({exam}):\n{printable(text)}\n")
    save()  # that it can be written is to be known before hours of work
    try:
        answer(model, asker, questions, config, found, save=save)
    except KeyboardInterrupt:
        print(f"{table(result(complete=False)['summary'])}\nof what was done, which is the longest questions; stopped")
        save()
        if out:
            print(f"go on with: the same command and --resume ({out})")
        raise
    finished = result(complete=True)
    print(table(finished["summary"]))
    for file in (*files, *dev):
        print(f"{file['file']}: {file['questions']} questions, {len(file['odd'])} odd")
        print("".join(f"    {line}\n" for line in file["odd"][:10]), end="")
    if out:
        write_json(out, finished)
        print(f"every prediction: {out}")
    if given.submission:
        write_json(Path(given.submission), submission_of(questions, found, config))
        print(f"for CMB: {given.submission}")


def json_of(config: EvalConfig) -> dict[str, Any]:
    """As it comes back from a JSON file."""
    return dataclasses.asdict(config) | {"score": list(config.score)}


def adapter_digest(directory: str | None) -> str | None:
    if not directory:
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(directory).glob("adapter*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    run(main)
