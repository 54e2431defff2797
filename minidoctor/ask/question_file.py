"""TODO"""

import json
from pathlib import Path

from tqdm import tqdm

from minidoctor.config import SampleConfig, UserError
from minidoctor.generate import complete
from minidoctor.model import Model
from minidoctor.questions.exams import read_text
from minidoctor.questions.rows import parse_json, text_of
from minidoctor.text.tokenizer import Tokenizer


def read_question_lines(path: Path) -> list[tuple[int, str]]:
    """Line number and question of each line that is not empty: its text, or the "question" of a JSON object.

    Raises FileNotFoundError or ValueError, with file and line.
    """
    questions = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            question = text_of(parse_json(line.encode()), "question") if line.lstrip().startswith("{") else line.strip()
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if question:
            questions.append((number, question))
    if not questions:
        raise UserError(f"{path}: no questions")
    return questions


def answer_file(
    model: Model, tokenizer: Tokenizer, path: Path, out: Path, batch_size: int, config: SampleConfig
) -> None:
    """Writes {"question", "answer"} for each question, in the order of the file, as the batches are done.

    Raises ValueError before the first answer if a question does not fit into the model's context.
    """
    questions = read_question_lines(path)
    prompts = [tokenizer.chat([{"role": "user", "content": question}]) for _, question in questions]
    for (number, _), prompt in zip(questions, prompts, strict=True):
        if len(prompt) >= model.config.max_seq_len:
            raise UserError(f"{path}:{number}: {len(prompt)} tokens, the model reads {model.config.max_seq_len}")
    if out.exists():
        raise UserError(f"{out}: is there already; give another --out")
    window = 8 * batch_size  # among so many, like lengths are answered together
    with out.open("w", encoding="utf-8") as file, tqdm(total=len(questions), desc="answering") as progress:
        for start in range(0, len(questions), window):
            order = sorted(range(start, min(start + window, len(questions))), key=lambda i: len(prompts[i]))
            answers: dict[int, str] = {}
            for k in range(0, len(order), batch_size):
                chosen = order[k : k + batch_size]
                replies = complete(model, [prompts[i] for i in chosen], config, tokenizer.eos_ids)
                answers |= {i: tokenizer.decode(ids) for i, ids in zip(chosen, replies, strict=True)}
                progress.update(len(chosen))
            for i in sorted(answers):
                row = {"question": questions[i][1], "answer": answers[i]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(questions)} answers: {out}")
