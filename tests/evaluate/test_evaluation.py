import copy
import random
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT, SHARED
from torch import nn

from minidoctor.batching import collate
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.cli.processes import Processes
from minidoctor.config import UserError
from minidoctor.evaluate import evaluation as evaluation_module
from minidoctor.evaluate import scoring
from minidoctor.evaluate.evaluation import Evaluation, applicable_methods, evaluate, judge, prompt_rows
from minidoctor.evaluate.prompts import Prompter
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.records import Outcome
from minidoctor.model import Model
from minidoctor.questions.read import read_questions
from minidoctor.questions.rows import conversation
from minidoctor.text.chat_formats import CHAT_FORMATS
from minidoctor.text.tokenizer import encode_conversation, load_tokenizer

ROWS = [
    {
        "id": "test-gout",
        "question": "Which test confirms gout?",
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


SUGARS = {"question": "Which two are sugars?", "options": {"A": "fructose", "B": "glucose", "C": "iron"}}


@pytest.fixture
def read_rows(rows_file):
    return lambda *rows: read_questions(rows_file(*rows)).rows


@pytest.fixture
def rows(read_rows):
    return read_rows(*ROWS)


def predict(model, tokenizer, rows, **settings):
    return evaluate(model, tokenizer, rows, show_progress=False, config=EvalConfig(**settings)).predictions


@torch.no_grad()
def plain_log_likelihoods(model, prompt, answer):
    """Return the scores of all answer tokens, from one full forward without batch or padding."""
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
    """Return (prediction, text scores, letter scores) of a row, from their definition."""
    prompt = tokenizer.chat(row.messages[:-1])
    if not row.options:
        return plain_answer(model, tokenizer, prompt), {}, {}
    text, letters = {}, {}
    for letter, option in row.options.items():
        bare = tokenizer.chat([{"role": "user", "content": row.question}])
        scores = plain_log_likelihoods(model, bare, tokenizer.encode(option) + list(tokenizer.eos_ids))
        text[letter] = sum(scores) / len(scores)
        letters[letter] = sum(plain_log_likelihoods(model, prompt, tokenizer.encode(letter)))
    at_least_mean = "".join(letter for letter in text if text[letter] >= sum(text.values()) / len(text))
    return at_least_mean if row.multiple_answers else max(text, key=text.get), text, letters


@pytest.mark.parametrize(("max_batch_tokens", "batch_size"), [(60, 16), (4096, 1), (4096, 16)])
def test_predictions_equal_a_loop_over_unbatched_forwards(
    adapted, tokenizer, rows, monkeypatch, max_batch_tokens, batch_size
):
    monkeypatch.setattr(scoring, "MAX_BATCH_TOKENS", {"cpu": max_batch_tokens})
    for row, p in zip(rows, predict(adapted, tokenizer, rows, batch_size=batch_size), strict=True):
        prediction, text, letters = plain_prediction(adapted, tokenizer, row)
        assert p.prediction == prediction
        torch.testing.assert_close(p.scores, text, rtol=1e-5, atol=1e-5)
        if row.options:
            torch.testing.assert_close(p.outcomes["logits"].scores, letters, rtol=1e-5, atol=1e-5)


def test_loss_is_that_of_the_assistants_tokens(adapted, tokenizer, rows):
    for row, p in zip(rows, predict(adapted, tokenizer, rows), strict=True):
        nll = n = 0
        for i, message in enumerate(row.messages):
            if message["role"] == "assistant":
                prompt = tokenizer.chat(row.messages[:i])
                answer = tokenizer.encode(message["content"]) + list(tokenizer.eos_ids)
                nll, n = nll - sum(plain_log_likelihoods(adapted, prompt, answer)), n + len(answer)
        assert p.outcomes["loss"].n_tokens == n
        torch.testing.assert_close(p.outcomes["loss"].nll, nll, rtol=1e-5, atol=1e-5)


def test_predictions_have_the_order_of_the_rows(model, tokenizer, rows):
    predictions = predict(model, tokenizer, rows)
    assert [p.id for p in predictions] == ["test-gout", "2", "3", "4", "5", "6"]
    assert [p.answer for p in predictions] == ["A", "B", "pneumology", "AC", "喘息和夜间咳嗽", "wheezing"]
    # The scores are compared too: equal ids do not show that each prediction is that of its row.
    for p, q in zip(predictions, predict(model, tokenizer, rows[::-1])[::-1], strict=True):
        assert p.prediction == q.prediction
        torch.testing.assert_close(p.scores, q.scores, rtol=1e-5, atol=1e-5)


def test_first_of_equal_options_is_predicted(model, tokenizer, read_rows):
    row = {"question": "Which?", "options": {"A": "gout", "B": "gout"}, "answer": "B"}
    (p,) = predict(model, tokenizer, read_rows(row))
    assert (p.prediction, p.correct) == ("A", False)


def overfit(config, tokenizer, conversations, steps=150):
    batch, model = collate([encode_conversation(messages, tokenizer, 128) for messages in conversations]), Model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = F.cross_entropy(model(batch.tokens)[0].flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_overfitted_model_has_accuracy_1_and_0_for_other_gold_answers(config, tokenizer, read_rows):
    rows = read_rows(*(row for row in ROWS[:5] if row["answer"] != "AC"))
    bare = [conversation(r.question, r.options[r.answer]) for r in rows if r.options]
    model = overfit(config, tokenizer, [row.messages for row in rows] + bare)
    settings = EvalConfig(score=("text", "logits", "generate", "loss"))

    def summary(rows):
        return evaluate(model, tokenizer, rows, show_progress=False, config=settings).summary

    def accuracies(summary):
        others = [summary.methods[method].accuracy for method in ("logits", "generate")]
        return [summary.accuracy, *others, summary.free_form_accuracy]

    assert accuracies(summary(rows)) == [1.0] * 4
    assert summary(rows).nll < 0.1
    wrong = [replace(row, answer="C" if row.options else "something else") for row in rows]
    assert accuracies(summary(wrong)) == [0.0] * 4


def test_benchmark_question_with_several_correct_letters_is_scored_by_sets(config, tokenizer, read_rows):
    options = {"A": "wheezing", "B": "gout", "C": "cough", "D": "acid"}
    questions = {"asthma?": "AC", "gout?": "BD", "哮喘": "ACD", "痛风": "ABCD", "acid?": "D"}
    rows = read_rows(*({"question": q, "options": options, "answer": answer} for q, answer in questions.items()))
    rows = [replace(row, exam="cmexam") for row in rows]
    prompter = Prompter(tokenizer, EvalConfig(prompt="own"))
    texts = [question.text for question in prompt_rows(prompter, rows, [], 128)]
    pairs = [conversation(text, row.answer) for text, row in zip(texts, rows, strict=True)]
    model = overfit(config, tokenizer, pairs)
    predictions = predict(model, tokenizer, rows, prompt="own")
    assert [p.prediction for p in predictions] == list(questions.values())
    assert [p.scoring for p in predictions] == ["sets"] * 4 + ["logits"]
    assert [list(p.outcomes) for p in predictions] == [["logits", "sets"]] * 4 + [["logits"]]
    assert [len(p.scores) for p in predictions] == [11] * 4 + [4]
    summary = evaluate(model, tokenizer, rows, show_progress=False, config=EvalConfig(prompt="own")).summary
    assert (summary.scoring, summary.accuracy, summary.methods["logits"].n) == ("sets/logits", 1.0, 5)
    for row, prediction in zip(rows, predict(model, tokenizer, rows, prompt="own", score=("sets",)), strict=True):
        assert (prediction.scoring, prediction.prediction) == ("sets", row.answer)


# --- replies of reasoning models ---


def test_a_model_that_reasons_is_not_asked_for_a_letter_before_it_has_reasoned(model, tokenizer, rows):
    opened = copy.copy(tokenizer)
    opened.opens_reasoning = True
    config = EvalConfig(score=("auto", "loss"), max_new_tokens=2)
    for question in evaluate(model, opened, rows, show_progress=False, config=config).predictions:
        assert set(question.outcomes) <= {"generate", "loss"}
        assert question.scoring == "generate"


class FirstOfTwo(Processes):
    """The first of two processes: the second has no outcomes."""

    def gather(self, value):
        gathered.append(value)
        return [value, {}]


gathered: list[dict] = []


def test_each_round_of_several_processes_is_gathered(model, tokenizer, rows, monkeypatch):
    """Otherwise an interrupted evaluation would lose the outcomes of all but the first process."""
    monkeypatch.setattr(evaluation_module, "ROUND", 1)
    gathered.clear()
    prompter = Prompter(tokenizer, EvalConfig(score=("text",), max_new_tokens=2))
    evaluation = Evaluation(prompter, prompt_rows(prompter, rows, [], 128, False), [{} for _ in rows])
    evaluation.answer(model, show=False, processes=FirstOfTwo(0, 2))
    assert len(gathered) > 2
    assert all(len(share) == 1 for share in gathered)
    assert sum(map(bool, evaluation.outcomes)) == len(gathered)


@pytest.fixture
def evaluate_replies(model, tokenizer, read_rows, monkeypatch):
    """Evaluate one question whose generated answer is this text, with as many tokens as the limit if it is cut off."""

    def run(reply, cut_off=False, opens_reasoning=False, row=SUGARS | {"answer": "A"}):
        rows, ids = read_rows(row), tokenizer.encode(reply)
        opened = copy.copy(tokenizer)
        opened.opens_reasoning = opens_reasoning
        monkeypatch.setattr(scoring, "complete", lambda *_: [ids])
        config = EvalConfig(score=("generate",), max_new_tokens=len(ids) + (not cut_off))
        return evaluate(model, opened, rows, show_progress=False, config=config)

    return run


@pytest.mark.parametrize(
    ("reply", "settings", "prediction", "counts"),
    [
        ("<think>\nB?\n</think>\n\nA", {}, "A", (0, 0)),
        ("<think>\nIt is A.", {}, "", (0, 1)),
        ("## Thinking\n\nThe answer is A", {"cut_off": True}, "", (0, 1)),
        ("## Thinking\n\nB?\n\n## Final Response\n\nThe answer is A", {"cut_off": True}, "A", (0, 0)),
        ("<think>\nB?\n</think>\n\nIt depends.", {}, "", (1, 0)),
        ("The answer is A", {"cut_off": True, "opens_reasoning": True}, "", (0, 1)),
        ("B?\n</think>\n\nA", {"cut_off": True, "opens_reasoning": True}, "A", (0, 0)),
        ("The answer is A", {"opens_reasoning": True}, "A", (0, 0)),  # not cut off: answered without reasoning
        ("The answer is A", {"cut_off": True}, "A", (0, 0)),
        ("It depends.", {"cut_off": True}, "", (1, 0)),
    ],
)
def test_answer_that_ends_within_its_reasoning_is_unfinished(evaluate_replies, reply, settings, prediction, counts):
    summary, (p,) = evaluate_replies(reply, **settings)
    assert (p.prediction, p.correct) == (prediction, prediction == "A")
    assert (summary.unanswered, summary.unfinished) == counts
    assert p.outcomes["generate"].reply == reply
    assert (summary.truncated == 1) == settings.get("cut_off", False)


def test_unfinished_free_form_answer_is_wrong(evaluate_replies):
    row = {"question": "Which acid?", "answer": "uric acid"}
    for reply, correct in (("<think>uric acid", False), ("<think>gout?</think>uric acid", True)):
        summary, (p,) = evaluate_replies(reply, row=row)
        assert (p.correct, p.outcomes["generate"].unfinished, p.prediction) == (correct, not correct, reply)
        assert summary.free_form_accuracy == correct


def test_length_limit_is_that_of_the_chat_format(tokenizer):
    reasoning = copy.copy(tokenizer)
    reasoning.format = tokenizer.format._replace(max_new_tokens=2048)
    limits = [Prompter(t, EvalConfig(raw=raw)).max_new_tokens for t in (tokenizer, reasoning) for raw in (False, True)]
    assert limits == [64, 64, 2048, 64]
    assert Prompter(reasoning, EvalConfig(max_new_tokens=7)).max_new_tokens == 7


def test_only_a_chat_opens_the_reasoning(tokenizer):
    opened = copy.copy(tokenizer)
    opened.opens_reasoning = True
    flags = [Prompter(t, EvalConfig(raw=raw)).opens_reasoning for t in (tokenizer, opened) for raw in (False, True)]
    assert flags == [False, False, True, False]


@pytest.mark.parametrize("row", [ROWS[0], ROWS[2]], ids=["multiple choice", "free-form"])
def test_question_longer_than_the_context_is_wrong_and_counted(model, tokenizer, read_rows, row):
    rows = read_rows({**row, "id": "long", "question": "Why? " * 200}, row)
    summary, (long, short) = evaluate(model, tokenizer, rows, show_progress=False)
    assert long.outcomes[long.scoring].too_long
    assert (long.prediction, long.correct, long.scores) == ("", False, {})
    assert not short.outcomes[short.scoring].too_long
    assert short == predict(model, tokenizer, rows[1:])[0]
    assert summary.too_long == 1


@pytest.mark.parametrize("score", [("logits",), ("text",), ("generate",), ("text", "loss")])
def test_tensor_that_is_not_finite_is_reported(model, tokenizer, rows, score):
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"model\.norm\.weight contains NaN"):
        predict(model, tokenizer, rows[:1], score=score)


# --- letters are a set ---


@pytest.mark.parametrize("answer", ["AB", "BA"])
@pytest.mark.parametrize("order", ["ABC", "CBA", "BAC"])
def test_letters_are_compared_as_sets(read_rows, order, answer):
    options = {letter: SUGARS["options"][letter] for letter in order}
    (read_row,) = read_rows(SUGARS | {"options": options, "answer": answer})
    for row in (read_row, replace(read_row, answer=answer)):  # also in an order that no reader of files returns
        scores = {letter: -9.0 if letter == "C" else -1.0 for letter in order}
        candidates = [Outcome(scores)] + [Outcome(reply=reply) for reply in ("AB", "BA", "B, A", "答案是B和A")]
        for outcome in candidates:
            judged = judge(row, outcome)
            assert (judged.prediction, judged.correct) == ("AB", True)
        for outcome in (
            Outcome(reply="A"),
            Outcome(reply="ABC"),
            Outcome(scores | {"B": -9.0}),
            Outcome(too_long=True),
        ):
            assert judge(row, outcome).correct is False


def test_letters_are_shown_in_one_order(model, tokenizer, read_rows):
    orders = ("ABC", "CBA", "BAC")
    rows = read_rows(*(SUGARS | {"options": {k: SUGARS["options"][k] for k in o}, "answer": "BA"} for o in orders))
    rows = [replace(row, answer=answer) for row, answer in zip(rows, ("BA", "AB", "BA"), strict=True)]
    for p in predict(model, tokenizer, rows, score=("text", "logits", "generate")):
        assert p.answer == "AB"
        assert [outcome.prediction for outcome in p.outcomes.values()] == [
            "".join(sorted(outcome.prediction)) for outcome in p.outcomes.values()
        ]
    baselines = evaluate(model, tokenizer, rows, show_progress=False).summary.trivial_baselines
    assert baselines["most_frequent"] == 1.0


def test_answer_of_a_few_shot_example_is_alphabetical(tokenizer, read_rows):
    row, example = read_rows(ROWS[0], SUGARS | {"answer": "BA"})
    (question,) = prompt_rows(Prompter(tokenizer, EvalConfig(shots=1)), [row], [replace(example, answer="BA")], 10**6)
    assert "C. iron\nAB\n" in question.text


# --- resume ---


def test_answer_computes_only_missing_outcomes(adapted, tokenizer, rows, monkeypatch):
    prompter = Prompter(tokenizer, EvalConfig(score=("generate", "text", "logits", "loss")))
    evaluation = Evaluation(prompter, prompt_rows(prompter, rows, [], 128), [{} for _ in rows])
    assert evaluation.result().summary.n == 0
    evaluation.answer(adapted, show=False)
    expected = evaluation.result()
    del evaluation.outcomes[1]["logits"], evaluation.outcomes[3]["logits"]
    calls = []

    def recorded(name, scorer):
        return lambda model, prompter, questions: (
            calls.append((name, len(questions))) or scorer(model, prompter, questions)
        )

    scorers = {name: recorded(name, scorer) for name, scorer in scoring.SCORERS.items()}
    monkeypatch.setattr("minidoctor.evaluate.evaluation.SCORERS", scorers)
    evaluation.answer(adapted, show=False)
    assert calls == [("logits", 2)]
    assert evaluation.result() == expected


# --- several processes ---


class Share(Processes):
    """One of several processes, run one after the other: `gather` returns the outcomes so far."""

    shares: ClassVar[list] = []

    def gather(self, value):
        self.shares.append(copy.deepcopy(value))
        return self.shares


def test_processes_answer_disjoint_shares_and_merge_them(adapted, tokenizer, rows):
    prompter = Prompter(tokenizer, EvalConfig(score=("text", "logits", "generate", "loss")))
    questions = prompt_rows(prompter, rows, [], 128)
    whole = Evaluation(prompter, questions, [{} for _ in rows])
    whole.answer(adapted, show=False)
    for rank in range(3):
        part = Evaluation(prompter, questions, [{} for _ in rows])
        part.answer(adapted, show=False, processes=Share(rank, 3))
    n_rounds = len(Share.shares) // 3  # one per method
    n_computed = [sum(map(len, Share.shares[i : i + n_rounds])) for i in range(0, 3 * n_rounds, n_rounds)]
    assert sum(n_computed) == sum(len(applicable_methods(prompter.config, row)) for row in rows)
    assert min(n_computed) > 0
    for p, q in zip(part.result().predictions, whole.result().predictions, strict=True):
        assert (p.id, p.prediction, p.outcomes.keys()) == (q.id, q.prediction, q.outcomes.keys())
        torch.testing.assert_close(p.scores, q.scores, rtol=1e-5, atol=1e-5)


# --- models with known answers ---


def random_questions(n, seed):
    """Return multiple-choice questions with four options, a tenth of them with several correct ones."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        options = {letter: f"{rng.choice(['gout', 'asthma', 'acid', 'cough'])} {i} {letter}" for letter in "ABCD"}
        answer = "".join(sorted(rng.sample("ABCD", 3 if i % 10 == 0 else 1)))
        rows.append({"id": f"q{i}", "question": f"Which is correct in case {i}?", "options": options, "answer": answer})
    return rows


@pytest.fixture
def summary_of_replies(model, tokenizer, monkeypatch):
    """Summarize an evaluation in which the model generates these replies."""

    def summarize(rows, replies):
        prompts = [tuple(tokenizer.chat(row.messages[:-1])) for row in rows]
        by_prompt = {prompt: tokenizer.encode(reply) for prompt, reply in zip(prompts, replies, strict=True)}
        monkeypatch.setattr(scoring, "complete", lambda model, prompts, *_: [by_prompt[tuple(p)] for p in prompts])
        monkeypatch.setattr(scoring, "MIN_SHARED_TOKENS", 1000)
        config = EvalConfig(score=("generate",), batch_size=7)
        return evaluate(model, tokenizer, rows, show_progress=False, config=config).summary

    return summarize


def test_replies_with_the_correct_letters_have_accuracy_1(summary_of_replies, read_rows):
    rows = read_rows(*random_questions(60, seed=1))
    templates = ["答案是{}。", "The answer is {}.", "{}", "I would choose {}", "故选{}"]
    summary = summary_of_replies(rows, [templates[i % 5].format("、".join(row.answer)) for i, row in enumerate(rows)])
    assert (summary.scoring, summary.n, summary.unanswered) == ("generate", 60, 0)
    assert (summary.accuracy, summary.single_answer.accuracy, summary.multiple_answers.accuracy) == (1.0, 1.0, 1.0)


def test_replies_without_a_letter_are_unanswered_and_wrong(summary_of_replies, read_rows):
    rows = read_rows(*random_questions(60, seed=1))
    replies = ["无法确定。", "I cannot say.", "", "A patient should ask a doctor.", "维生素A"]
    summary = summary_of_replies(rows, [replies[i % 5] for i in range(60)])
    assert (summary.accuracy, summary.unanswered, summary.n) == (0.0, 60, 60)


def test_chance_is_inside_the_interval_of_random_replies(summary_of_replies, read_rows):
    rows = [row for row in read_rows(*random_questions(800, seed=2)) if not row.multiple_answers]
    rng = random.Random(3)
    summary = summary_of_replies(rows, [f"选{rng.choice('ABCD')}" for _ in rows])
    low, high = summary.interval
    assert low < summary.trivial_baselines["random"] == 0.25 < high
    assert 0.05 < high - low < 0.08  # 2 * 1.96 * sqrt(0.25 * 0.75 / 720) = 0.063
    assert summary.unanswered == 0


class LetterModel(nn.Module):
    """A model whose next token after a prompt is one of the given ids; every other token has the same logits."""

    def __init__(self, config, ids_by_prompt):
        super().__init__()
        self.config, self.ids_by_prompt = config, ids_by_prompt
        self.lm_head = nn.Linear(config.vocab_size, config.vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def hidden(self, tokens):
        hidden = torch.zeros(*tokens.shape, self.config.vocab_size)
        for b, row in enumerate(tokens.tolist()):
            for prompt, ids in self.ids_by_prompt.items():
                if tuple(row[: len(prompt)]) == prompt:
                    hidden[b, len(prompt) - 1 :, ids] = 5.0
        return hidden, []


def test_model_of_correct_letters_has_accuracy_1_by_logits(config, make_tokenizer, read_rows, monkeypatch):
    rows = read_rows(*random_questions(40, seed=4))
    symbols = list(CHAT_FORMATS["minidoctor"].needs)
    tokenizer = make_tokenizer(control_symbols=symbols, user_defined_symbols=list("ABCD"))
    config = replace(config, vocab_size=tokenizer.vocab_size)
    ids = {letter: tokenizer.encode(letter)[-1] for letter in "ABCD"}
    monkeypatch.setattr(scoring, "MIN_SHARED_TOKENS", 1000)
    for shift, expected in ((0, 1.0), (1, 0.0)):
        next_letter = {letter: "ABCDA"["ABCD".index(letter) + shift] for letter in "ABCD"}
        ids_by_prompt = {
            tuple(tokenizer.chat(row.messages[:-1])): [ids[next_letter[letter]] for letter in row.answer]
            for row in rows
        }
        model, settings = LetterModel(config, ids_by_prompt), EvalConfig(score=("logits",))
        summary = evaluate(model, tokenizer, rows, show_progress=False, config=settings).summary
        assert (summary.single_answer.accuracy, summary.multiple_answers.accuracy) == (expected, expected)


DATA = SHARED / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the published benchmark files are not here")
@pytest.mark.parametrize("path", ["cmmlu_med/test", "cmexam/val.csv", "cmb/CMB-sample.json"])
def test_benchmark_predictions_of_the_shipped_base_equal_a_loop(path):
    base = ROOT / "data" / "base"
    model, tokenizer, rows = load_model(base), load_tokenizer(base), read_questions(DATA / path).rows
    rows = [row for row in rows[:: len(rows) // 12] if not row.multiple_answers][:8]
    expected = []
    for question in prompt_rows(Prompter(tokenizer, EvalConfig()), rows, [], model.config.max_seq_len, show=False):
        # Sums, because this vocabulary spells "E" in two tokens.
        options = list(question.row.options)
        scores = [sum(plain_log_likelihoods(model, question.tokens, tokenizer.encode(letter))) for letter in options]
        expected.append(options[scores.index(max(scores))])
    for batch_size in (1, 16):
        predictions = predict(model, tokenizer, rows, score=("logits",), batch_size=batch_size)
        assert [p.prediction for p in predictions] == expected
