import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minidoctor import evaluate as module
from minidoctor.data import collate, conversation, encode, read_rows
from minidoctor.evaluate import contains, evaluate, main, predict, summarize
from minidoctor.model import Model

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
    """(prediction, scores) of a row, from its definition."""
    prompt = tokenizer.chat(row.messages[:-1])
    if not row.options:
        return plain_answer(model, tokenizer, prompt), {}
    scores = {"text": {}, "letter": {}}
    for letter, text in row.options.items():
        bare = tokenizer.chat([{"role": "user", "content": row.question}])
        likelihoods = plain_log_likelihoods(model, bare, tokenizer.encode(text) + list(tokenizer.eos_ids))
        scores["text"][letter] = sum(likelihoods) / len(likelihoods)
        scores["letter"][letter] = sum(plain_log_likelihoods(model, prompt, tokenizer.encode(letter)))
    return max(scores["text"], key=scores["text"].get), scores


@pytest.mark.parametrize("tokens_in_a_batch", [60, 4096])
def test_scores_equal_a_plain_loop_over_unbatched_full_forwards(
    adapted, tokenizer, rows, monkeypatch, tokens_in_a_batch
):
    monkeypatch.setattr(module, "TOKENS_IN_A_BATCH", tokens_in_a_batch)
    for row, ours in zip(rows, predict(adapted, tokenizer, rows, show_progress=False), strict=True):
        prediction, scores = plain_prediction(adapted, tokenizer, row)
        assert ours["prediction"] == prediction
        assert ours["scores"].keys() == scores.keys()
        for way in scores:
            for letter, score in scores[way].items():
                torch.testing.assert_close(ours["scores"][way][letter], score, rtol=1e-5, atol=1e-5)


def test_the_loss_is_that_of_the_assistants_tokens(adapted, tokenizer, rows):
    for row, ours in zip(rows, predict(adapted, tokenizer, rows, show_progress=False), strict=True):
        nll = n = 0
        for i, message in enumerate(row.messages):
            if message["role"] == "assistant":
                prompt = tokenizer.chat(row.messages[:i])
                answer = tokenizer.encode(message["content"]) + list(tokenizer.eos_ids)
                nll, n = nll - sum(plain_log_likelihoods(adapted, prompt, answer)), n + len(answer)
        assert ours["n_tokens"] == n
        torch.testing.assert_close(ours["nll"], nll, rtol=1e-5, atol=1e-5)


def test_predictions_stand_in_the_order_of_the_file(model, tokenizer, rows):
    predictions = predict(model, tokenizer, rows, show_progress=False)
    assert [p["id"] for p in predictions] == ["test-gout", "2", "3", "4", "5", "6"]
    answers = ["A", "B", "pneumology", "AC", "喘息和夜间咳嗽", "wheezing"]
    assert [p["answer"] for p in predictions] == answers
    # Each row is told apart by its scores, so the order is that of the rows and not only of their names.
    backwards = predict(model, tokenizer, rows[::-1], show_progress=False)[::-1]
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


def test_the_summary_follows_from_the_predictions(adapted, tokenizer, rows):
    result = evaluate(adapted, tokenizer, rows, show_progress=False)
    parts = {"all": result["summary"], **result["summary"]["languages"]}
    assert set(parts) == {"all", "en", "zh"}
    for name, summary in parts.items():
        predictions = [p for p in result["predictions"] if name in ("all", p["language"])]
        choice = [p for p in predictions if p["scores"] and len(p["answer"]) == 1]
        written = [p for p in predictions if not p["scores"]]
        by_text = [max(p["scores"]["text"], key=p["scores"]["text"].get) == p["answer"] for p in choice]
        by_letter = [max(p["scores"]["letter"], key=p["scores"]["letter"].get) == p["answer"] for p in choice]
        assert (summary["n"], summary["n_open"]) == (len(choice), len(written))
        assert summary["accuracy"] == sum(by_text) / len(choice)
        assert summary["letter_accuracy"] == sum(by_letter) / len(choice)
        assert summary["open_accuracy"] == sum(contains(p["prediction"], p["answer"]) for p in written) / len(written)
        nats, tokens = sum(p["nll"] for p in predictions), sum(p["n_tokens"] for p in predictions)
        assert math.isclose(summary["nll"], nats / tokens)


def test_what_was_not_asked_has_no_accuracy(model, tokenizer, rows):
    choice = summarize(predict(model, tokenizer, rows[:2], show_progress=False))
    assert (choice["n"], choice["n_open"], choice["open_accuracy"]) == (2, 0, None)
    written = summarize(predict(model, tokenizer, rows[2:3], show_progress=False))
    assert (written["n"], written["accuracy"], written["letter_accuracy"]) == (0, None, None)


def test_of_equal_scores_the_first_option_is_taken(model, tokenizer, rows_file):
    row = {"question": "Which?", "options": {"A": "gout", "B": "gout"}, "answer": "B"}
    (prediction,) = predict(model, tokenizer, read_rows(rows_file(row)), show_progress=False)
    assert (prediction["prediction"], prediction["correct"]) == ("A", False)


def test_a_model_that_knows_the_answers_scores_100_percent_and_0_where_others_are_called_right(
    config, tokenizer, rows_file
):
    asked = [row for row in ROWS[:5] if row["answer"] != "AC"]
    rows = read_rows(rows_file(*asked))
    bare = [conversation(r.question, r.options[r.answer]) for r in rows if r.options]
    examples = [encode(messages, tokenizer, 128) for messages in [row.messages for row in rows] + bare]
    batch, model = collate(examples), Model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        loss = F.cross_entropy(model(batch.tokens)[0].flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    summary = evaluate(model, tokenizer, rows, show_progress=False)["summary"]
    ways = ("accuracy", "letter_accuracy", "open_accuracy")
    assert [summary[way] for way in ways] == [1.0, 1.0, 1.0]
    assert summary["nll"] < 0.1
    wrong = [replace(row, answer="C" if row.options else "something else") for row in rows]
    summary = evaluate(model, tokenizer, wrong, show_progress=False)["summary"]
    assert [summary[way] for way in ways] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("row", [ROWS[0], ROWS[2]], ids=["choice", "open"])
def test_a_question_longer_than_the_context_is_refused_by_name(model, tokenizer, rows_file, row):
    rows = read_rows(rows_file({**row, "id": "long", "question": "Why? " * 200}))
    with pytest.raises(ValueError, match=r"question long has .* tokens, the model reads at most 128"):
        predict(model, tokenizer, rows, show_progress=False)


def test_scores_that_are_no_numbers_are_an_error_and_not_the_first_option(model, tokenizer, rows):
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises((ValueError, FloatingPointError), match=r"finite|nan"):
        predict(model, tokenizer, rows[:1], show_progress=False)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
    main()


def test_the_program_prints_a_table_and_writes_every_prediction(
    tmp_path, base_dir, adapter_dir, adapted, tokenizer, rows_file, monkeypatch, capsys
):
    files = rows_file(*ROWS[:2], name="one.jsonl"), rows_file(*ROWS[2:], name="two.jsonl")
    out = tmp_path / "predictions.json"
    words = ["--base", base_dir, "--adapter", adapter_dir, "--data", *files, "--out", out, "--device", "cpu"]
    call(monkeypatch, *words)
    result = json.loads(out.read_text())
    assert set(result) == {"summary", "predictions"}
    assert {"accuracy", "n", "nll", "languages"} <= set(result["summary"])
    assert all({"accuracy", "n", "nll"} <= set(part) for part in result["summary"]["languages"].values())
    for prediction in result["predictions"]:
        assert {"id", "prediction", "answer", "correct", "scores"} <= set(prediction)
    rows = [row for file in files for row in read_rows(file)]
    assert result == evaluate(adapted, tokenizer, rows, show_progress=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["all", "en", "zh"]


def test_without_an_adapter_the_base_is_evaluated(tmp_path, base_dir, model, tokenizer, rows_file, monkeypatch):
    path, out = rows_file(*ROWS[:3]), tmp_path / "predictions.json"
    call(monkeypatch, "--base", base_dir, "--data", path, "--out", out, "--device", "cpu")
    expected = evaluate(model, tokenizer, read_rows(path), show_progress=False)
    assert json.loads(out.read_text()) == expected
