import json
import random
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT, SHARED
from torch import nn

from minidoctor.batching import collate
from minidoctor.evaluate import predictions as answers
from minidoctor.evaluate import scoring
from minidoctor.evaluate.__main__ import main
from minidoctor.evaluate.predictions import contains, evaluate, known_from, prediction_of
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.summary import full_summary
from minidoctor.model import Model
from minidoctor.questions.json_rows import read_rows
from minidoctor.questions.read import read_questions
from minidoctor.questions.rows import conversation
from minidoctor.text.chat_formats import CHAT_FORMATS
from minidoctor.text.tokenizer import encode_conversation

ROWS = [
    {
        "id": "test-gout",
        "question": "What is the key test for gout?",
        "options": {"A": "uric acid in the joint fluid", "B": "a cough at night", "C": "pneumology"},
        "answer": "A",
        "topic": "test",
    },
    {
        "question": "痛风属于哪个科？",
        "options": {"A": "呼吸科", "B": "风湿科", "C": "关节", "D": "夜间"},
        "answer": "B",
    },
    {"question": "Where is asthma treated?", "answer": "pneumology"},
    {
        "question": "Which are symptoms of asthma?",
        "options": {"A": "wheezing", "B": "gout", "C": "a cough"},
        "answer": "AC",
    },
    {"question": "哮喘的典型症状是什么？", "answer": "喘息和夜间咳嗽"},
    {"messages": [*conversation("gout?", "acid"), *conversation("asthma?", "wheezing")]},
]


CMMLU = """,Question,A,B,C,D,Answer
0,痛风的关键检查是,尿酸,关节液,夜间咳嗽,风湿科,A
1,哮喘属于哪个科,风湿科,呼吸科,关节,夜间,B
2,痛风属于哪个科,夜间,关节,风湿科,呼吸科,C
"""


@pytest.fixture
def rows(rows_file):
    return read_rows(rows_file(*ROWS))


@torch.no_grad()
def plain_log_likelihoods(model, prompt, answer):
    """Of each answer token after the prompt, from one full forward without batch or padding."""
    tokens = prompt + answer
    log_probs = model(torch.tensor([tokens[:-1]]))[0][0].log_softmax(-1)
    return [log_probs[i - 1, tokens[i]].item() for i in range(len(prompt), len(tokens))]


@torch.no_grad()
def plain_answer(model, tokenizer, prompt):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + 64 and len(tokens) < model.config.max_seq_len:
        tokens.append(model(torch.tensor([tokens]))[0][0, -1].argmax().item())
        if tokens[-1] in tokenizer.eos_ids:
            return tokenizer.decode(tokens[len(prompt) : -1])
    return tokenizer.decode(tokens[len(prompt) :])


def plain_prediction(model, tokenizer, row):
    """(prediction, scores by text, scores by letter) of a row, from their definition."""
    prompt = tokenizer.chat(row.messages[:-1])
    if not row.options:
        return plain_answer(model, tokenizer, prompt), {}, {}
    text, letters = {}, {}
    for letter, option in row.options.items():
        bare = tokenizer.chat([{"role": "user", "content": row.question}])
        likelihoods = plain_log_likelihoods(model, bare, tokenizer.encode(option) + list(tokenizer.eos_ids))
        text[letter] = sum(likelihoods) / len(likelihoods)
        letters[letter] = sum(plain_log_likelihoods(model, prompt, tokenizer.encode(letter)))
    best = "".join(letter for letter in text if text[letter] >= sum(text.values()) / len(text))
    return best if row.multiple_answers else max(text, key=text.get), text, letters


@pytest.mark.parametrize(("tokens_in_a_batch", "batch_size"), [(60, 16), (4096, 1), (4096, 16)])
def test_scores_equal_a_plain_loop_over_unbatched_full_forwards(
    adapted, tokenizer, rows, monkeypatch, tokens_in_a_batch, batch_size
):
    monkeypatch.setattr(scoring, "TOKENS_IN_A_BATCH", {"cpu": tokens_in_a_batch})
    result = evaluate(adapted, tokenizer, rows, show_progress=False, config=EvalConfig(batch_size=batch_size))
    for row, ours in zip(rows, result["predictions"], strict=True):
        prediction, text, letters = plain_prediction(adapted, tokenizer, row)
        assert ours["prediction"] == prediction
        torch.testing.assert_close(ours["scores"], text, rtol=1e-5, atol=1e-5)
        if row.options:
            torch.testing.assert_close(ours["also"]["logits"]["scores"], letters, rtol=1e-5, atol=1e-5)


def predict(model, tokenizer, rows, **choices):
    return evaluate(model, tokenizer, rows, show_progress=False, config=EvalConfig(**choices))["predictions"]


def test_the_loss_is_that_of_the_assistants_tokens(adapted, tokenizer, rows):
    for row, ours in zip(rows, predict(adapted, tokenizer, rows), strict=True):
        nll = n = 0
        for i, message in enumerate(row.messages):
            if message["role"] == "assistant":
                prompt = tokenizer.chat(row.messages[:i])
                answer = tokenizer.encode(message["content"]) + list(tokenizer.eos_ids)
                nll, n = nll - sum(plain_log_likelihoods(adapted, prompt, answer)), n + len(answer)
        assert ours["n_tokens"] == n
        torch.testing.assert_close(ours["nll"], nll, rtol=1e-5, atol=1e-5)


def test_predictions_stand_in_the_order_of_the_file(model, tokenizer, rows):
    predictions = predict(model, tokenizer, rows)
    assert [p["id"] for p in predictions] == ["test-gout", "2", "3", "4", "5", "6"]
    assert [p["answer"] for p in predictions] == ["A", "B", "pneumology", "AC", "喘息和夜间咳嗽", "wheezing"]
    # Each row is told apart by its scores, so the order is that of the rows and not only of their names.
    backwards = predict(model, tokenizer, rows[::-1])[::-1]
    for one, other in zip(predictions, backwards, strict=True):
        assert one["prediction"] == other["prediction"]
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [
        ("It is uric acid.", "uric acid", True),
        ("URIC\n  Acid", "uric acid", True),
        ("uricacid", "uric acid", False),
        ("", "gout", False),
        ("关键检查是尿酸。", "尿酸", True),
        ("尿", "尿酸", False),
    ],
)
def test_contains(reply, answer, expected):
    assert contains(reply, answer) == expected


def test_of_equal_scores_the_first_option_is_taken(model, tokenizer, rows_file):
    row = {"question": "Which?", "options": {"A": "gout", "B": "gout"}, "answer": "B"}
    (prediction,) = predict(model, tokenizer, read_rows(rows_file(row)))
    assert (prediction["prediction"], prediction["correct"]) == ("A", False)


def test_a_model_that_knows_the_answers_scores_100_percent_and_0_where_others_are_called_right(
    config, tokenizer, rows_file
):
    asked = [row for row in ROWS[:5] if row["answer"] != "AC"]
    rows = read_rows(rows_file(*asked))
    bare = [conversation(r.question, r.options[r.answer]) for r in rows if r.options]
    examples = [encode_conversation(messages, tokenizer, 128) for messages in [row.messages for row in rows] + bare]
    batch, model = collate(examples), Model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        loss = F.cross_entropy(model(batch.tokens)[0].flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ways = EvalConfig(score=("text", "logits", "generate", "loss"))

    def accuracies(rows):
        summary = evaluate(model, tokenizer, rows, show_progress=False, config=ways)["summary"]
        also = [summary["also"][way]["accuracy"] for way in ("logits", "generate")]
        return [summary["accuracy"], *also, summary["open_accuracy"]], summary

    right, summary = accuracies(rows)
    assert right == [1.0] * 4
    assert summary["nll"] < 0.1
    wrong, _ = accuracies([replace(row, answer="C" if row.options else "something else") for row in rows])
    assert wrong == [0.0] * 4


@pytest.mark.parametrize("row", [ROWS[0], ROWS[2]], ids=["choice", "open"])
def test_a_question_longer_than_the_context_is_wrong_and_counted(model, tokenizer, rows_file, row):
    rows = read_rows(rows_file({**row, "id": "long", "question": "Why? " * 200}, row))
    result = evaluate(model, tokenizer, rows, show_progress=False)
    long, short = result["predictions"]
    assert (long["too_long"], long["prediction"], long["correct"], long["scores"]) == (True, "", False, {})
    assert "too_long" not in short
    assert short == predict(model, tokenizer, rows[1:])[0]
    assert result["summary"]["too_long"] == 1


def test_scores_that_are_no_numbers_are_an_error_and_not_the_first_option(model, tokenizer, rows):
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    for score in (("logits",), ("text",), ("generate", "loss")):
        with pytest.raises(FloatingPointError, match=r"damaged"):
            predict(model, tokenizer, rows[:1], score=score)


# --- stand-ins that answer by script: what the scores then must be is known ---


def questions_of(n, seed):
    """Multiple choice of 4 letters, some with several right ones."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        options = {letter: f"{rng.choice(['gout', 'asthma', 'acid', 'cough'])} {i} {letter}" for letter in "ABCD"}
        answer = "".join(sorted(rng.sample("ABCD", 3 if i % 10 == 0 else 1)))
        rows.append({"id": f"q{i}", "question": f"What is right in case {i}?", "options": options, "answer": answer})
    return rows


def written(model, tokenizer, rows, monkeypatch, replies):
    """The summary of rows whose written answers are these."""
    of_prompt = {tuple(tokenizer.chat(row.messages[:-1])): reply for row, reply in zip(rows, replies, strict=True)}

    def complete(model, tokenizer, prompts, config, prefix):
        return [of_prompt[tuple(prompt)] for prompt in prompts]

    monkeypatch.setattr(scoring, "complete", complete)
    monkeypatch.setattr(scoring, "WORTH_SHARING", 1000)
    config = EvalConfig(score=("generate",), batch_size=7)
    return evaluate(model, tokenizer, rows, show_progress=False, config=config)["summary"]


def test_one_that_always_writes_the_answer_scores_100_percent(model, tokenizer, rows_file, monkeypatch):
    rows = read_rows(rows_file(*questions_of(60, seed=1)))
    shapes = ["答案是{}。", "The answer is {}.", "{}", "I would choose {}", "故选{}"]
    replies = [shapes[i % 5].format("、".join(row.answer)) for i, row in enumerate(rows)]
    summary = written(model, tokenizer, rows, monkeypatch, replies)
    assert (summary["scoring"], summary["n"], summary["unanswered"]) == ("generate", 60, 0)
    assert [summary[part]["accuracy"] for part in ("single", "several")] == [1.0, 1.0]
    assert summary["accuracy"] == 1.0


def test_one_that_never_writes_a_letter_scores_0_with_everything_unanswered(model, tokenizer, rows_file, monkeypatch):
    rows = read_rows(rows_file(*questions_of(60, seed=1)))
    silent = ["无法确定。", "I cannot say.", "", "A patient should ask a doctor.", "维生素A"]
    summary = written(model, tokenizer, rows, monkeypatch, [silent[i % 5] for i in range(60)])
    assert (summary["accuracy"], summary["unanswered"], summary["n"]) == (0.0, 60, 60)


def test_one_that_answers_at_random_lands_inside_its_interval(model, tokenizer, rows_file, monkeypatch):
    rows = [row for row in read_rows(rows_file(*questions_of(800, seed=2))) if not row.multiple_answers]
    rng = random.Random(3)
    summary = written(model, tokenizer, rows, monkeypatch, [f"选{rng.choice('ABCD')}" for _ in rows])
    low, high = summary["interval"]
    assert low < summary["floors"]["random"] == 0.25 < high
    assert 0.05 < high - low < 0.08  # 2 * 1.96 * sqrt(0.25 * 0.75 / 720) = 0.063
    assert summary["unanswered"] == 0


class Knowing(nn.Module):
    """Its next token is the letter of the right answer, whatever the batch; of all else it has no opinion."""

    def __init__(self, config, known):
        super().__init__()
        self.config, self.known = config, known
        self.lm_head = nn.Linear(config.vocab_size, config.vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def hidden(self, tokens):
        hidden = torch.zeros(*tokens.shape, self.config.vocab_size)
        for b, row in enumerate(tokens.tolist()):
            for prompt, ids in self.known.items():
                if tuple(row[: len(prompt)]) == prompt:
                    hidden[b, len(prompt) - 1 :, ids] = 5.0
        return hidden, []


def test_one_whose_next_token_is_always_right_scores_100_percent_by_logits(
    config, make_tokenizer, rows_file, monkeypatch
):
    rows = read_rows(rows_file(*questions_of(40, seed=4)))
    tokenizer = make_tokenizer(
        control_symbols=list(CHAT_FORMATS["minidoctor"].needs), user_defined_symbols=list("ABCD")
    )
    config = replace(config, vocab_size=tokenizer.vocab_size)
    ids = {letter: tokenizer.encode(letter)[-1] for letter in "ABCD"}
    monkeypatch.setattr(scoring, "WORTH_SHARING", 1000)
    for shift, expected in ((0, 1.0), (1, 0.0)):
        said = {
            tuple(tokenizer.chat(row.messages[:-1])): [
                ids["ABCDA"["ABCD".index(letter) + shift]] for letter in row.answer
            ]
            for row in rows
        }
        model = Knowing(config, said)
        summary = evaluate(model, tokenizer, rows, show_progress=False, config=EvalConfig(score=("logits",)))["summary"]
        assert (summary["single"]["accuracy"], summary["several"]["accuracy"]) == (expected, expected)


# --- the program ---


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
    main()


@pytest.fixture
def roomy(base_dir, tmp_path):
    """The base with room for the benchmarks' prompts, which its tokenizer writes byte by byte."""
    directory = shutil.copytree(base_dir, tmp_path / "roomy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return directory


@pytest.fixture
def cmmlu(tmp_path):
    """test/anatomy.csv, and dev/anatomy.csv with other questions."""
    for name, text in (("test", CMMLU), ("dev", CMMLU.replace("哪个科", "什么科").replace("关键", "主要"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "anatomy.csv").write_text(text, encoding="utf-8")
    return tmp_path / "test" / "anatomy.csv"


def test_the_program_prints_a_table_and_writes_every_prediction(
    tmp_path, base_dir, adapter_dir, adapted, tokenizer, rows_file, monkeypatch, capsys
):
    files = rows_file(*ROWS[:2], name="one.jsonl"), rows_file(*ROWS[2:], name="two.jsonl")
    out = tmp_path / "predictions.json"
    words = ["--base", base_dir, "--adapter", adapter_dir, "--data", *files, "--out", out, "--device", "cpu"]
    call(monkeypatch, *words)
    result = json.loads(out.read_text())
    assert set(result) == {"complete", "protocol", "summary", "predictions"}
    assert {"accuracy", "n", "nll", "languages"} <= set(result["summary"])
    assert all({"accuracy", "n", "nll"} <= set(part) for part in result["summary"]["languages"].values())
    for prediction in result["predictions"]:
        assert {"id", "prediction", "answer", "correct", "scores"} <= set(prediction)
    rows = [row for file in files for row in read_rows(file)]
    expected = evaluate(adapted, tokenizer, rows, show_progress=False)
    assert {key: result[key] for key in expected} == expected
    assert next(iter(result["protocol"]["first_prompts"].values())) == rows[0].messages[0]["content"]
    printed = capsys.readouterr().out
    assert rows[0].messages[0]["content"] in printed
    named = [line.split()[0] for line in printed.splitlines() if re.match("(all|en|zh) ", line)]
    assert list(dict.fromkeys(named)) == ["all", "en", "zh"]


def test_every_figure_of_a_result_file_follows_from_its_rows(cmmlu, tmp_path, roomy, monkeypatch):
    out = tmp_path / "p.json"
    call(monkeypatch, "--base", roomy, "--data", cmmlu, "--score", "logits,text,generate,loss", "--out", out)
    result = json.loads(out.read_text())
    assert full_summary(result["predictions"]) == result["summary"]
    for p in result["predictions"]:
        best = max(p["scores"], key=p["scores"].get)
        assert (p["scoring"], p["prediction"], p["correct"]) == ("logits", best, best == p["answer"])
        assert set(p["also"]) == {"text", "text_per_character", "generate"}
        assert p["nll"] > 0


def test_without_an_adapter_the_base_is_evaluated(tmp_path, base_dir, model, tokenizer, rows_file, monkeypatch):
    path, out = rows_file(*ROWS[:3]), tmp_path / "predictions.json"
    call(monkeypatch, "--base", base_dir, "--data", path, "--out", out, "--device", "cpu")
    expected = evaluate(model, tokenizer, read_rows(path), show_progress=False)
    assert json.loads(out.read_text())["predictions"] == expected["predictions"]


def stopping(way, after):
    """The scorer, interrupted after so many answers."""
    scorer = scoring.SCORERS[way]

    def stopped(*arguments):
        for number, one in enumerate(scorer(*arguments)):
            if number == after:
                raise KeyboardInterrupt
            yield one

    return {**scoring.SCORERS, way: stopped}


@pytest.mark.parametrize(("way", "after"), [("text", 1), ("logits", 2), ("loss", 3), ("generate", 0)])
def test_a_stopped_evaluation_goes_on_where_it_was(way, after, tmp_path, base_dir, rows_file, monkeypatch, capsys):
    data, whole, out = rows_file(*ROWS), tmp_path / "whole.json", tmp_path / "part.json"
    words = ["--base", base_dir, "--data", data, "--device", "cpu", "--batch-size", "1"]
    call(monkeypatch, *words, "--out", whole)
    with monkeypatch.context() as patch:
        patch.setattr(answers, "SCORERS", stopping(way, after))
        with pytest.raises(KeyboardInterrupt):
            call(monkeypatch, *words, "--out", out)
    part = json.loads(out.read_text())
    assert part["complete"] is False
    assert "--resume" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unfinished"):
        call(monkeypatch, *words, "--out", out)
    with pytest.raises(ValueError, match="made with other prompt"):
        call(monkeypatch, *words, "--prompt", "huatuo", "--out", out, "--resume")
    done = sum(way in known_from(p) for p in part["predictions"])
    assert done == after
    asked = []
    scorer = scoring.SCORERS[way]

    def counting(model, asker, questions, config):
        asked.extend(questions)
        return scorer(model, asker, questions, config)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "SCORERS", {**scoring.SCORERS, way: counting})
        call(monkeypatch, *words, "--out", out, "--resume")
    ends = {"generate": 3, "loss": 6}.get(way, 3)
    assert len(asked) == ends - after
    ended, expected = (json.loads(path.read_text()) for path in (out, whole))
    assert ended["complete"]
    assert ended["protocol"] == expected["protocol"]
    for one, other in zip(ended["predictions"], expected["predictions"], strict=True):
        assert one["prediction"] == other["prediction"]
        # Not to the last bit: fewer questions have a longer start in common.
        known, whole_known = known_from(one), known_from(other)
        assert known.keys() == whole_known.keys()
        for key, outcome in known.items():
            torch.testing.assert_close(
                outcome.get("scores", {}), whole_known[key].get("scores", {}), rtol=1e-5, atol=1e-5
            )
            assert outcome.get("reply") == whole_known[key].get("reply")


def test_an_unfinished_result_is_saved_once_a_minute(tmp_path, base_dir, rows_file, monkeypatch):
    monkeypatch.setattr(answers, "SAVE_EVERY", 0)
    saved = []
    monkeypatch.setattr(
        "minidoctor.evaluate.__main__.write_json", lambda path, content: saved.append(content["complete"])
    )
    call(monkeypatch, "--base", base_dir, "--data", rows_file(*ROWS[:2]), "--out", tmp_path / "p.json")
    assert saved == [False] * (len(saved) - 1) + [True]
    assert len(saved) > 3


def test_what_is_known_survives_the_file(adapted, tokenizer, rows):
    config = EvalConfig(score=("generate", "text", "logits", "loss"))
    asker = answers.Asker(tokenizer, raw=False)
    questions = answers.put_questions(asker, rows, [], config, 128, show_progress=False)
    found = [{} for _ in rows]
    answers.answer(adapted, asker, questions, config, found, show_progress=False)
    for question, known in zip(questions, found, strict=True):
        assert known_from(prediction_of(question, config, known)) == known
        assert known_from(prediction_of(question, config, {})) == {}


def test_solved_questions_are_found_in_dev_and_stand_in_the_prompt(cmmlu, tmp_path, roomy, monkeypatch, capsys):
    out = tmp_path / "p.json"
    call(monkeypatch, "--base", roomy, "--data", cmmlu, "--shots", "1", "--out", out)
    result = json.loads(out.read_text())
    prompt = next(iter(result["protocol"]["first_prompts"].values()))
    assert prompt.startswith("以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n题目：痛风的主要检查是")
    assert prompt.endswith("答案是：A\n\n题目：痛风的关键检查是\nA. 尿酸\nB. 关节液\nC. 夜间咳嗽\nD. 风湿科\n答案是：")
    assert prompt in capsys.readouterr().out
    with pytest.raises(ValueError, match="no solved questions beside"):
        call(monkeypatch, "--base", roomy, "--data", cmmlu.parent.parent / "dev" / "anatomy.csv", "--shots", "1")


def test_a_prompt_of_ones_own_and_its_hash(cmmlu, tmp_path, roomy, monkeypatch):
    hashes = []
    for name, text in (("1", "{question}？\n{options}\n选："), ("2", "{question}！\n{options}\n选：")):
        prompt, out = tmp_path / f"{name}.txt", tmp_path / f"{name}.json"
        prompt.write_text(text, encoding="utf-8")
        call(monkeypatch, "--base", roomy, "--data", cmmlu, "--prompt", prompt, "--out", out, "--raw")
        result = json.loads(out.read_text())
        assert next(iter(result["protocol"]["first_prompts"].values())) == text.format(
            question="痛风的关键检查是", options="A. 尿酸\nB. 关节液\nC. 夜间咳嗽\nD. 风湿科"
        )
        hashes += [p["prompt_sha256"] for p in result["predictions"]]
    assert len(set(hashes)) == 6


def test_two_results_are_compared_in_pairs(cmmlu, tmp_path, roomy, rows_file, monkeypatch, capsys):
    files = [tmp_path / f"{name}.json" for name in "abc"]
    call(monkeypatch, "--base", roomy, "--data", cmmlu, "--out", files[0])
    result = json.loads(files[0].read_text())
    for p in result["predictions"]:
        p["correct"] = not p["correct"]
    files[1].write_text(json.dumps(result))
    capsys.readouterr()
    call(monkeypatch, "--compare", *files[:2])
    printed = capsys.readouterr().out
    n_right = sum(not p["correct"] for p in result["predictions"])
    assert f"right only in a: {n_right}, only in b: {3 - n_right}" in printed
    call(monkeypatch, "--base", roomy, "--data", rows_file(*ROWS[:2]), "--out", files[2])
    with pytest.raises(ValueError, match="not of the same questions"):
        call(monkeypatch, "--compare", files[0], files[2])
    files[1].write_text("{}")
    with pytest.raises(ValueError, match="not two results"):
        call(monkeypatch, "--compare", *files[:2])


def test_cmb_gets_its_submission_file(tmp_path, roomy, cmmlu, monkeypatch, capsys):
    asked = [
        {"id": 7, "exam_type": "医师考试", "exam_class": "执业医师", "question_type": kind, "question": "哪个科",
         "option": {"A": "风湿科", "B": "呼吸科", "C": "关节", "D": ""}}
        for kind in ("单项选择题", "多项选择题")
    ]  # fmt: skip
    asked[1]["id"] = 8
    data, answered, form = tmp_path / "q.json", tmp_path / "a.json", tmp_path / "form.json"
    data.write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")
    answered.write_text(json.dumps([{"id": 7, "answer": "A"}, {"id": 8, "answer": "AB"}]), encoding="utf-8")
    out = tmp_path / "p.json"
    call(monkeypatch, "--base", roomy, "--data", data, "--submission", form, "--out", out)
    predictions = json.loads(out.read_text())["predictions"]
    assert json.loads(form.read_text()) == [
        {"id": i, "model_answer": p["prediction"]} for i, p in zip((7, 8), predictions, strict=True)
    ]
    assert [p["correct"] for p in predictions] == [None, None]
    assert "2 questions have no known answer" in capsys.readouterr().out
    call(monkeypatch, "--base", roomy, "--data", data, "--answers", answered, "--out", out)
    result = json.loads(out.read_text())
    assert [p["prediction"] for p in result["predictions"]] == [p["prediction"] for p in predictions]
    assert result["summary"]["n"] == 2
    assert result["summary"]["several"]["n"] == 1
    assert list(result["summary"]["exams"]["cmb"]["parts"]) == ["医师考试"]
    with pytest.raises(ValueError, match="submission is for CMB"):
        call(monkeypatch, "--base", roomy, "--data", cmmlu, "--submission", form)


def test_rows_that_are_left_out_are_said_and_stored(cmmlu, tmp_path, roomy, monkeypatch, capsys):
    cmmlu.write_text(CMMLU + "3,痛风,尿酸,关节,夜间,呼吸,nan\n", encoding="utf-8")
    out = tmp_path / "p.json"
    call(monkeypatch, "--base", roomy, "--data", cmmlu, "--out", out, "--limit", "2")
    (file,) = json.loads(out.read_text())["protocol"]["files"]
    assert (file["questions"], len(file["odd"])) == (3, 1)
    printed = capsys.readouterr().out
    assert "anatomy.csv:5:" in printed
    assert "nan" in printed
    assert "3 questions, 1 odd" in printed
    assert len(json.loads(out.read_text())["predictions"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "letters"], "score must be of"),
        (["--score", "loss"], "must begin with another way"),
        (["--score", "text,text"], "each way once"),
        (["--score", "text,loss", "--raw"], "none with --raw"),
        (["--shots", "-1"], "shots must be at least 0"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--limit", "0"], "limit must be at least 1"),
        (["--resume"], "--resume needs the --out"),
        (["--out", "nowhere/p.json"], "directory that exists"),
        (["--prompt", "nowhere.txt"], "neither own, cmb"),
        (["--compare", "a.json", "b.json"], "no such file"),
        (["--data", "nowhere.csv"], "no such file"),
    ],
)
def test_a_careless_command_is_told_what_is_wrong(words, message, base_dir, cmmlu, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = words if words[0] in ("--compare", "--data") else ["--data", cmmlu, *words]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(monkeypatch, "--base", base_dir, *given)


DATA = SHARED / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' own files are not here")
@pytest.mark.parametrize("path", ["cmmlu_med/test", "cmexam/val.csv", "cmb/CMB-sample.json"])
def test_predictions_of_the_shipped_base_are_those_of_a_plain_loop(path):
    from minidoctor.checkpoints.hugging_face import load_model
    from minidoctor.text.tokenizer import load_tokenizer

    base = ROOT / "data" / "base"
    model, tokenizer, rows = load_model(base), load_tokenizer(base), read_questions(DATA / path).rows
    rows = [row for row in rows[:: len(rows) // 20] if not row.multiple_answers][:20]
    asker = answers.Asker(tokenizer, raw=False)
    questions = answers.put_questions(asker, rows, [], EvalConfig(), model.config.max_seq_len, show_progress=False)
    expected = []
    for one in questions:
        # Sums: this vocabulary spells "E" in two tokens.
        likely = [sum(plain_log_likelihoods(model, one.tokens, tokenizer.encode(x))) for x in one.row.options]
        expected.append(list(one.row.options)[likely.index(max(likely))])
    for batch_size in (1, 16):
        predictions = predict(model, tokenizer, rows, score=("logits",), batch_size=batch_size)
        assert [p["prediction"] for p in predictions] == expected


def test_a_submission_of_other_questions_is_refused_before_they_are_asked(cmmlu, tmp_path, roomy, monkeypatch):
    monkeypatch.setattr("minidoctor.evaluate.__main__.answer", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ValueError, match="--submission is for CMB's test questions"):
        call(monkeypatch, "--base", roomy, "--data", cmmlu, "--submission", tmp_path / "s.json")
