import copy
import itertools
import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from paths import FIXTURES
from torch import nn

from minidoctor.batching import IGNORE, Example
from minidoctor.config import RopeScaling, UserError
from minidoctor.evaluate import scoring
from minidoctor.evaluate.evaluation import Evaluation, judge
from minidoctor.evaluate.prompts import Prompter, choose_shots, common_prefix_len
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.records import Outcome
from minidoctor.evaluate.scoring import (
    MIN_SHARED_TOKENS,
    SCORERS,
    TIE,
    Span,
    decide,
    hidden_states,
    likelihoods,
    prefixed_batches,
    shared_prefix_len,
)
from minidoctor.model import Model
from minidoctor.questions.rows import Row, conversation, format_multiple_choice
from minidoctor.text.backends import INSIDE
from minidoctor.text.tokenizer import encode_conversation, load_tokenizer

TOKENIZER_FIXTURES = FIXTURES / "tokenizers"
WORDS = ("gout", "asthma", "acid", "joint", "cough", "the", "key", "test", "treated", "痛风", "哮喘", "尿酸", "喘息")
SUBJECTS = {"anatomy": 14, "genetics": 11, "virology": 9, "nutrition": 6, "儿科学": 1}  # questions of each
SHOTS = 1
CONTEXT = 400


def random_rows(sizes, seed):
    """CMMLU questions of random words, short and long, some with several correct letters."""
    rng, rows = random.Random(seed), []

    def words(least, most):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    for topic, n in sizes.items():
        for i in range(n):
            question, letters = f"{words(1, 15)} {i}?", "ABCDE"[: rng.randint(2, 5)]
            options = {letter: f"{words(1, 3)} {letter}" for letter in letters}
            answer = "".join(sorted(rng.sample(letters, 2 if i % 3 == 0 else 1)))
            messages = conversation(*format_multiple_choice(question, options, answer))
            row = Row(f"{topic}-{i}", messages, question, options, answer, topic, "en", exam="cmmlu")
            rows.append(replace(row, multiple_answers=len(answer) > 1))
    rng.shuffle(rows)
    return rows


ROWS, POOL = random_rows(SUBJECTS, seed=1), random_rows(dict.fromkeys(SUBJECTS, SHOTS), seed=2)


def make_prompter(tokenizer, raw=False, **settings):
    return Prompter(tokenizer, EvalConfig(raw=raw, **settings))


def prompt_all(prompter, rows=ROWS, shots=SHOTS):
    return [prompter.prompt_question(row, choose_shots(row, POOL, shots), CONTEXT) for row in rows]


def random_model(config, adapter=None, **settings):
    torch.manual_seed(1)
    model = Model(replace(config, **{"max_seq_len": CONTEXT} | settings), adapter)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model.eval()


@pytest.fixture
def model(config):
    return random_model(config)


@pytest.fixture
def raw(tokenizer):
    return make_prompter(tokenizer, raw=True)


@pytest.fixture
def chat(tokenizer):
    return make_prompter(tokenizer)


def score(method, model, prompter, questions, **settings):
    """Return the outcomes of a scoring method by question, each of which must come once, and by name."""
    prompter = Prompter(prompter.tokenizer, replace(prompter.config, **settings))
    pairs = list(SCORERS[method](model, prompter, questions))
    assert sorted(i for i, _ in pairs) == list(range(len(questions)))
    return [dict(pairs)[i] for i in range(len(questions))]


def outcomes(method, model, prompter, questions, **settings):
    return [outcome[method] for outcome in score(method, model, prompter, questions, **settings)]


@torch.no_grad()
def log_likelihoods(model, prompt, ids):
    """Return the scores of all tokens after the prompt, from one full forward without batch, padding or cache."""
    tokens = [*prompt, *ids]
    log_probs = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
    return [log_probs[i - 1, tokens[i]].item() for i in range(len(prompt), len(tokens))]


def answer_tokens(prompter, text, answer):
    """Return the tokens of an answer after this prompt, in a chat without the end of the turn."""
    if prompter.config.raw:
        space = " " if text[-1:].isascii() and text.strip(" ") == text else ""
        return prompter.tokenizer.encode(space + answer, INSIDE)
    turns = prompter.tokenizer.chat_turns(conversation("?", answer))
    return next(ids for ids, is_answer in turns if is_answer)


@torch.no_grad()
def plain_logits(model, prompter, question):
    """Score each letter after the whole prompt; a letter of several tokens has the sum of theirs."""
    following, scores = model(torch.tensor([question.tokens]))[0][0, -1].log_softmax(-1), {}
    for letter in question.row.options:
        first, *rest = answer_tokens(prompter, question.text, letter)
        later = log_likelihoods(model, [*question.tokens, first], rest) if rest else []
        scores[letter] = following[first].item() + sum(later)
    return scores


@torch.no_grad()
def greedy_ids(model, tokenizer, prompt, n):
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + n, model.config.max_seq_len):
        token = model(torch.tensor([tokens]))[0][0, -1].argmax().item()
        if token in tokenizer.eos_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def plain_greedy(model, tokenizer, prompt, n):
    return tokenizer.decode(greedy_ids(model, tokenizer, prompt, n))


class InputRecorder:
    """The shapes of all inputs of a model."""

    def __init__(self, model):
        self.shapes = []
        model.model.embed_tokens.register_forward_hook(
            lambda module, args, out: self.shapes.append(tuple(args[0].shape))
        )

    @property
    def n_tokens(self):
        return sum(rows * length for rows, length in self.shapes)


def plain_decision(scores, multiple_answers):
    if multiple_answers:
        mean = sum(scores.values()) / len(scores)
        return "".join(letter for letter in scores if scores[letter] >= mean)
    return max(scores, key=scores.get)


def assert_same_scores(actual, expected):
    # A log-likelihood of -20 has a last bit of 2e-6 and is the difference of two numbers of that size.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


# --- logits ---


LLAMA3 = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq_len=64)


@pytest.mark.parametrize(
    ("settings", "has_adapter"), [({}, False), ({}, True), ({"window": 24}, True), ({"rope_scaling": LLAMA3}, False)]
)
def test_logits_equal_a_loop_over_whole_prompts(config, adapter, raw, settings, has_adapter):
    model, questions = random_model(config, adapter if has_adapter else None, **settings), prompt_all(raw)
    # The shared prefix is longer than the window and than the original context, so both change the scores.
    assert min(len(raw.tokens(q.head)) for q in questions) > 100
    expected = [plain_logits(model, raw, q) for q in questions]
    decisions = [plain_decision(scores, q.row.multiple_answers) for scores, q in zip(expected, questions, strict=True)]
    assert len(set(decisions)) > 5
    for batch_size in (1, 3, 16):
        actual = outcomes("logits", model, raw, questions, batch_size=batch_size)
        for outcome, scores in zip(actual, expected, strict=True):
            assert outcome == Outcome(outcome.scores)
            assert list(outcome.scores) == list(scores)
            assert_same_scores(outcome.scores, scores)
        judged = [judge(q.row, outcome) for q, outcome in zip(questions, actual, strict=True)]
        assert [outcome.prediction for outcome in judged] == decisions
        correct = [decision == q.row.answer for decision, q in zip(decisions, questions, strict=True)]
        assert [outcome.correct for outcome in judged] == correct


@pytest.mark.parametrize("has_adapter", [False, True])
def test_letter_of_several_tokens_has_the_sum_of_their_scores(config, adapter, chat, has_adapter):
    """This tokenizer has one token for "▁A" and two for "▁B"."""
    model, questions = random_model(config, adapter if has_adapter else None), prompt_all(chat, ROWS[:12])
    assert {len(answer_tokens(chat, "", letter)) for letter in "ABCDE"} == {1, 2}
    expected = [plain_logits(model, chat, q) for q in questions]
    for batch_size in (1, 16):
        actual = outcomes("logits", model, chat, questions, batch_size=batch_size)
        assert_same_scores([outcome.scores for outcome in actual], expected)


def test_common_beginning_of_all_letters_is_not_scored(config):
    """Every letter of this format begins with a space that is a separate token."""
    prompter = make_prompter(load_tokenizer(TOKENIZER_FIXTURES / "sentencepiece", "mistral"))
    model, questions = random_model(config), prompt_all(prompter, ROWS[:12])
    (space,) = {answer_tokens(prompter, "", letter)[0] for letter in "ABCDE"}
    for question, outcome in zip(questions, outcomes("logits", model, prompter, questions), strict=True):
        (space_score,) = log_likelihoods(model, question.tokens, [space])
        whole = plain_logits(model, prompter, question)
        assert_same_scores(outcome.scores, {letter: score - space_score for letter, score in whole.items()})


def plain_prefix_len(sequences):
    n = 0
    while all(len(tokens) > n and tokens[n] == sequences[0][n] for tokens in sequences):
        n += 1
    return n


def expected_prefix_len(questions):
    """Return the length of the shared prefix, which leaves at least one token of each question; 0 if it is not used."""
    if len(questions) < 2:
        return 0
    sequences = [q.tokens for q in questions]
    common = min(plain_prefix_len(sequences), min(map(len, sequences)) - 1)
    return common if common >= MIN_SHARED_TOKENS else 0


def test_shared_prefix_of_a_subject_is_computed_once(model, raw):
    inputs, questions = InputRecorder(model), prompt_all(raw)
    groups = [[q for q in questions if q.row.topic == topic] for topic in SUBJECTS]
    prefixes = [expected_prefix_len(group) for group in groups]
    assert all(prefixes[:-1])
    assert prefixes[-1] == 0  # a single question shares nothing
    rest = [len(q.tokens) - prefix for group, prefix in zip(groups, prefixes, strict=True) for q in group]
    score("logits", model, raw, questions, batch_size=1)
    assert sorted(inputs.shapes) == sorted((1, length) for length in [*filter(None, prefixes), *rest])
    assert inputs.n_tokens < 0.4 * sum(len(q.tokens) for q in questions)

    inputs.shapes.clear()
    score("logits", model, raw, questions, batch_size=16)
    # Every other input is a batch of questions without their prefix.
    lengths = [length for _, length in inputs.shapes]
    assert [lengths.count(prefix) for prefix in prefixes[:-1]] == [1, 1, 1, 1]
    assert sum(rows for rows, length in inputs.shapes if length in rest) == len(questions)


def test_short_common_prefix_is_not_shared(model, chat):
    inputs, questions = InputRecorder(model), prompt_all(make_prompter(chat.tokenizer, prompt="own"), shots=0)
    score("generate", model, chat, questions, batch_size=1, max_new_tokens=1)
    assert sorted(inputs.shapes) == sorted((1, len(q.tokens)) for q in questions)


def test_shared_prefix_len_equals_a_plain_comparison():
    rng, n_shared = random.Random(0), 0
    for _ in range(500):
        prefix = [rng.randrange(3) for _ in range(rng.choice([0, 14, 15, 16, 17, 30]))]
        group = []
        for _ in range(rng.randint(1, 5)):
            kept = prefix[: rng.choice([len(prefix)] * 4 + [20])]
            tokens = kept + [rng.randrange(3) for _ in range(rng.randint(1, 4))]
            group.append(Span(tokens, rng.randint(1, min(4, len(tokens))), ""))
        expected = min([plain_prefix_len([s.tokens for s in group]), *(len(s.tokens) - s.n for s in group)])
        assert shared_prefix_len(group) == (expected if expected >= 16 and len(group) > 1 else 0)
        n_shared += shared_prefix_len(group) > 0
    assert n_shared > 50


@pytest.mark.parametrize(
    ("sequences", "n"), [([[1, 2, 3], [1, 2, 4, 5]], 2), ([[1, 2], [1, 2, 3]], 2), ([[1], [2]], 0), ([[3, 4]] * 3, 2)]
)
def test_common_prefix_len_counts_leading_tokens(sequences, n):
    assert common_prefix_len(sequences) == common_prefix_len(sequences[::-1]) == n


def test_equal_questions_keep_a_token_after_the_prefix(model, raw):
    (question,) = prompt_all(raw, ROWS[:1])
    actual = outcomes("logits", model, raw, [question] * 3, batch_size=2)
    assert_same_scores([outcome.scores for outcome in actual], [plain_logits(model, raw, question)] * 3)


@pytest.mark.parametrize("limit", [100, 300])
def test_token_limit_of_a_batch_does_not_change_the_scores(model, raw, monkeypatch, limit):
    questions = prompt_all(raw)
    expected = [plain_logits(model, raw, q) for q in questions]
    monkeypatch.setattr(scoring, "MAX_BATCH_TOKENS", {"cpu": limit})
    actual = outcomes("logits", model, raw, questions, batch_size=16)
    assert_same_scores([outcome.scores for outcome in actual], expected)

    spans, sizes = [Span(q.tokens, 1, q.head) for q in questions], []
    for indices, prefix_len, prefix in prefixed_batches(model, spans, 16):
        longest = max(len(spans[i].tokens) - prefix_len for i in indices)
        assert len(indices) == 1 or len(indices) * longest <= limit
        sizes.append((len(indices), prefix))
    # A later batch of the same subject contains more questions, because they are shorter.
    grows = any(1 < a < b and first is second for (a, first), (b, second) in pairwise(sizes))
    assert grows == (limit == 300)


def test_hidden_states_equal_those_of_single_sequences(model):
    """Sequences with different numbers of needed states, some with a shared prefix."""
    rng = random.Random(0)
    prefixes = {name: [rng.randrange(400) for _ in range(n)] for name, n in (("a", 60), ("b", 17), ("c", 3))}
    spans = []
    for _ in range(40):
        name = rng.choice("abc")
        tokens = prefixes[name] + [rng.randrange(400) for _ in range(rng.randint(1, 30))]
        spans.append(Span(tokens, rng.randint(1, len(tokens) if rng.random() < 0.1 else 1), name))
    for batch_size in (1, 7):
        actual = {}
        for indices, states in hidden_states(model, spans, batch_size):
            assert len(indices) <= batch_size
            actual |= dict(zip(indices, states, strict=True))
        assert sorted(actual) == list(range(40))
        for i, span in enumerate(spans):
            with torch.no_grad():
                expected = model.hidden(torch.tensor([span.tokens]))[0][0, -span.n :]
            torch.testing.assert_close(actual[i], expected, rtol=1e-5, atol=2e-5)


# --- questions that do not fit ---


@pytest.mark.parametrize("method", ["logits", "generate"])
def test_question_beyond_the_context_is_unanswered_and_does_not_change_others(model, raw, method):
    """A letter is scored at the last token, a generated answer needs room for one more."""
    questions = prompt_all(raw)
    lengths = sorted(len(q.tokens) for q in questions)
    limit = lengths[len(lengths) // 2]
    assert lengths.count(limit) > 0  # a question of exactly this length
    before = outcomes(method, model, raw, questions, max_new_tokens=1, batch_size=4)
    model.config = replace(model.config, max_seq_len=limit)
    actual = outcomes(method, model, raw, questions, max_new_tokens=1, batch_size=4)
    fits = [len(q.tokens) <= limit if method == "logits" else len(q.tokens) < limit for q in questions]
    assert 10 < sum(fits) < len(fits) - 10
    for fit, outcome, earlier, question in zip(fits, actual, before, questions, strict=True):
        if fit:
            assert_same_scores(outcome.scores, earlier.scores)
            assert replace(outcome, scores={}) == replace(earlier, scores={})
        else:
            assert outcome == Outcome(too_long=True)
            judged = judge(question.row, outcome)
            assert (judged.prediction, judged.correct) == ("", False)


def test_letter_of_two_tokens_needs_room_for_the_first(model, chat):
    (question,) = prompt_all(chat, ROWS[:1])
    for room, fits in ((0, False), (1, True)):
        model.config = replace(model.config, max_seq_len=len(question.tokens) + room)
        (outcome,) = outcomes("logits", model, chat, [question])
        if fits:
            assert_same_scores(outcome.scores, plain_logits(model, chat, question))
        else:
            assert outcome == Outcome(too_long=True)


# --- sets of letters ---


def plain_sets(model, prompter, question):
    """Score each set of at least two letters, or each letter, as the whole answer, from one full forward each."""
    letters, scores, tokenizer = "".join(sorted(question.row.options)), {}, prompter.tokenizer
    for chosen in itertools.product((True, False), repeat=len(letters)):
        answer = "".join(itertools.compress(letters, chosen))
        if (len(answer) > 1) if question.row.multiple_answers else (len(answer) == 1):
            ids = answer_tokens(prompter, question.text, answer + "\n" * prompter.config.raw)
            scores[answer] = sum(
                log_likelihoods(model, question.tokens, [*ids, *([] if prompter.config.raw else tokenizer.eos_ids)])
            )
    return scores


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_sets_equal_a_loop_over_all_sets(config, adapter, tokenizer, is_raw, batch_size):
    model, prompter = random_model(config, adapter), make_prompter(tokenizer, is_raw)
    questions = prompt_all(prompter, ROWS[:16])
    expected = [plain_sets(model, prompter, question) for question in questions]
    assert {len(scores) for scores in expected} >= {2, 26}  # sizes of the alphabets of answers
    actual = outcomes("sets", model, prompter, questions, batch_size=batch_size)
    for question, outcome, scores in zip(questions, actual, expected, strict=True):
        assert_same_scores(outcome.scores, dict(sorted(scores.items(), key=lambda item: (len(item[0]), item[0]))))
        judged = judge(question.row, outcome)
        assert judged.prediction == max(scores, key=scores.get)
        assert judged.correct == (judged.prediction == question.row.answer)


def test_sets_do_not_depend_on_the_correct_answer(model, chat):
    rows = [row for row in ROWS if len(row.options) == 5 and row.multiple_answers]
    others = [replace(row, answer="ABCDE", messages=[]) for row in rows]
    answers = []
    for questions in (prompt_all(chat, rows), prompt_all(chat, others)):
        answers.append(outcomes("sets", model, chat, questions))
        answers.append([judge(q.row, o).prediction for q, o in zip(questions, answers[-1], strict=True)])
    assert answers[:2] == answers[2:]


def test_sets_and_the_mean_of_the_letters_select_different_answers(model, chat):
    questions = [q for q in prompt_all(chat) if q.row.multiple_answers and len(q.row.options) > 2]
    predictions = []
    for method in ("logits", "sets"):
        pairs = zip(questions, outcomes(method, model, chat, questions), strict=True)
        predictions.append([judge(question.row, outcome).prediction for question, outcome in pairs])
    assert predictions[0] != predictions[1]
    assert {1} < {len(prediction) for prediction in predictions[0]}
    assert min(map(len, predictions[1])) == 2


def test_question_without_room_for_all_letters_has_no_sets(model, chat):
    (question,) = prompt_all(chat, [row for row in ROWS if row.multiple_answers and len(row.options) == 5][:1])
    longest = max(len(chat.example(question.text, "ABCDE").tokens), 0)
    for limit, fits in ((longest, True), (longest - 1, False)):
        model.config = replace(model.config, max_seq_len=limit)
        (outcome,) = outcomes("sets", model, chat, [question])
        assert (len(outcome.scores), outcome.too_long) == ((26, False) if fits else (0, True))


def test_more_than_10_options_are_too_many_sets(model, chat):
    options = {letter: letter.lower() for letter in "ABCDEFGHIJK"}
    (question,) = prompt_all(chat, [replace(ROWS[0], id="many", options=options, multiple_answers=True)], shots=0)
    with pytest.raises(UserError, match="question many has 11 options"):
        outcomes("sets", model, chat, [question])


# --- text ---


def plain_text(model, prompter, row):
    """Score each option's text after the bare question, per token and per character, in a chat with its end."""
    per_token, per_character, tokenizer = {}, {}, prompter.tokenizer
    for letter, text in row.options.items():
        if prompter.config.raw:
            prompt = tokenizer.start + tokenizer.encode(row.question)
            ids = answer_tokens(prompter, row.question, text)
        else:
            prompt = tokenizer.chat([{"role": "user", "content": row.question}])
            ids = tokenizer.chat(conversation(row.question, text))[len(prompt) :]
            assert ids[-1] in tokenizer.eos_ids
        scores = log_likelihoods(model, prompt, ids)
        per_token[letter], per_character[letter] = sum(scores) / len(scores), sum(scores) / len(text)
    return {"text": Outcome(per_token), "text_per_character": Outcome(per_character)}


def numbers(outcome_by_name):
    return {name: {**o.scores, "nll": o.nll or 0.0, "n": o.n_tokens} for name, o in outcome_by_name.items()}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("raw", [True, False])
def test_text_scores_equal_a_loop_over_options(config, adapter, tokenizer, raw, batch_size):
    model, prompter, rows = random_model(config, adapter), make_prompter(tokenizer, raw), ROWS[:12]
    actual = score("text", model, prompter, prompt_all(prompter, rows), batch_size=batch_size)
    for row, outcome in zip(rows, actual, strict=True):
        assert_same_scores(numbers(outcome), numbers(plain_text(model, prompter, row)))


def test_raw_english_option_follows_a_space():
    prompter = make_prompter(load_tokenizer(TOKENIZER_FIXTURES / "sentencepiece"), raw=True)
    tokens, targets = prompter.example("Gout?", "uric acid")
    expected = prompter.tokenizer.start + prompter.tokenizer.encode("Gout? uric acid")
    assert [*tokens, targets[-1]] == expected


def test_question_with_an_option_beyond_the_context_has_no_text_scores(model, chat):
    too_long = {"text": Outcome(too_long=True), "text_per_character": Outcome(too_long=True)}
    rows = [*ROWS[:5], replace(ROWS[5], options={"A": "gout", "B": "acid " * CONTEXT}), *ROWS[6:9]]
    for i, outcome in enumerate(score("text", model, chat, prompt_all(chat, rows))):
        if i == 5:
            assert outcome == too_long
        else:
            assert_same_scores(numbers(outcome), numbers(plain_text(model, chat, rows[i])))
    longest = max(len(chat.example(ROWS[5].question, text).tokens) for text in ROWS[5].options.values())
    for limit, fits in ((longest, True), (longest - 1, False)):
        model.config = replace(model.config, max_seq_len=limit)
        (outcome,) = score("text", model, chat, prompt_all(chat, ROWS[5:6]))
        assert (outcome != too_long) == fits


# --- generated answers ---


@pytest.mark.parametrize(("raw", "settings"), [(True, {}), (False, {"window": 24, "rope_scaling": LLAMA3})])
def test_generated_answers_equal_those_of_single_prompts(config, adapter, tokenizer, raw, settings):
    model, prompter = random_model(config, adapter, **settings), make_prompter(tokenizer, raw)
    questions = prompt_all(prompter, ROWS[:12])
    expected = [plain_greedy(model, tokenizer, q.tokens, 5) for q in questions]
    assert len(set(expected)) > 9
    for batch_size in (1, 3, 16):
        inputs = InputRecorder(model)
        actual = outcomes("generate", model, prompter, questions, batch_size=batch_size, max_new_tokens=5)
        assert [outcome.reply for outcome in actual] == expected
        n_prompt_tokens = sum(rows * length for rows, length in inputs.shapes if length > 1)
        assert n_prompt_tokens < 0.6 * sum(len(q.tokens) for q in questions)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_answers_that_end_at_a_limit_are_truncated(model, tokenizer, batch_size):
    tokenizer = copy.copy(tokenizer)
    tokenizer.eos_ids = tuple(range(0, tokenizer.vocab_size, 12))  # so that some answers of the random model end
    prompter = make_prompter(tokenizer)
    questions = prompt_all(prompter, ROWS[:12], shots=0)
    n_tokens = [len(greedy_ids(model, tokenizer, q.tokens, 30)) for q in questions]
    assert min(n_tokens) < 10 < max(n_tokens)
    for limit in (5, 6, 10):
        actual = outcomes("generate", model, prompter, questions, batch_size=batch_size, max_new_tokens=limit)
        assert [outcome.truncated for outcome in actual] == [n >= limit for n in n_tokens]
    # The end of the context truncates as well.
    longest = max(range(12), key=lambda i: n_tokens[i])
    model.config = replace(model.config, max_seq_len=len(questions[longest].tokens) + 3)
    (outcome,) = outcomes("generate", model, prompter, questions[longest : longest + 1], max_new_tokens=30)
    assert outcome.truncated


def test_raw_answer_that_is_cut_before_the_next_question_is_not_truncated(model, raw, monkeypatch):
    replies = {"gout": ("gout", True), "gout\n\nQuestion: asthma?": ("gout", False)}
    for reply, expected in replies.items():
        ids = raw.tokenizer.encode(reply)
        monkeypatch.setattr(scoring, "complete", lambda *_, ids=ids: [ids])
        (outcome,) = outcomes("generate", model, raw, prompt_all(raw, ROWS[:1]), max_new_tokens=len(ids))
        assert (outcome.reply, outcome.truncated) == expected


def test_free_form_questions_are_generated(model, chat):
    rows = [Row(str(i), conversation(r.question, "x"), r.question, {}, "x", "", "en") for i, r in enumerate(ROWS[:6])]
    actual = outcomes("generate", model, chat, prompt_all(chat, rows), batch_size=4, max_new_tokens=6)
    prompts = [chat.tokenizer.chat(row.messages[:1]) for row in rows]
    expected = [plain_greedy(model, chat.tokenizer, prompt, 6) for prompt in prompts]
    assert [outcome.reply for outcome in actual] == expected


# --- loss ---


def plain_loss(model, tokenizer, messages):
    """Return sum and number of the losses of the assistant's tokens, each after all tokens before it."""
    before, scores = [], []
    for ids, is_answer in tokenizer.chat_turns(messages):
        if is_answer:
            scores += log_likelihoods(model, before, ids)
        before = [*before, *ids]
    return -sum(scores), len(scores)


def test_loss_equals_a_loop_over_tokens(config, adapter, chat):
    model = random_model(config, adapter)
    for batch_size in (1, 16):
        actual = outcomes("loss", model, chat, prompt_all(chat, ROWS[:20]), batch_size=batch_size)
        for row, outcome in zip(ROWS[:20], actual, strict=True):
            nll, n_tokens = plain_loss(model, chat.tokenizer, row.messages)
            assert outcome.n_tokens == n_tokens
            torch.testing.assert_close(outcome.nll, nll, rtol=1e-5, atol=1e-4)


def example_likelihoods(model, examples, batch_size):
    """Return (log-likelihood, number of targets) of each example."""
    by_index = dict(likelihoods(model, [{"": example} for example in examples], [""] * len(examples), batch_size))
    return [by_index[i][""] for i in range(len(examples))]


def test_only_the_turns_of_the_assistant_have_a_loss(model, tokenizer):
    first = [
        *conversation("痛风？", "尿酸"),
        *conversation("the key test for gout?", "uric acid"),
        *conversation("a", "b"),
    ]
    system = {"role": "system", "content": "the joint fluid"}
    talks = [
        first,
        conversation("asthma?", "cough"),
        [system, *conversation("哮喘？", "喘息"), *conversation("x", "y z")],
    ]
    examples = [encode_conversation(messages, tokenizer, CONTEXT) for messages in talks]
    starts = [next(i for i, target in enumerate(ex.targets) if target != IGNORE) for ex in examples]
    assert [IGNORE in ex.targets[start:] for ex, start in zip(examples, starts, strict=True)] == [True, False, True]
    for batch_size in (1, 3):
        actual = example_likelihoods(model, examples, batch_size)
        for (score, n), messages in zip(actual, talks, strict=True):
            expected, n_expected = plain_loss(model, tokenizer, messages)
            assert n == n_expected
            torch.testing.assert_close(-score, expected, rtol=1e-5, atol=1e-4)


def test_likelihoods_of_examples_with_a_common_beginning_start_at_their_first_target(model):
    start = list(range(5, 45))
    examples = [Example([*start, 50 + i, 60], [IGNORE] * (38 - i) + list(range(70, 74 + i))) for i in range(6)]
    for (score, n), (tokens, targets) in zip(example_likelihoods(model, examples, 4), examples, strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
        expected = [log_probs[t, target].item() for t, target in enumerate(targets) if target != IGNORE]
        assert n == len(expected)
        torch.testing.assert_close(score, sum(expected), rtol=1e-5, atol=1e-4)


def test_examples_with_the_same_input_are_computed_once(model):
    inputs, tokens = InputRecorder(model), list(range(5, 25))
    options = {name: Example(tokens, [IGNORE] * 19 + [target]) for name, target in (("A", 40), ("B", 41), ("C", 42))}
    ((_, actual),) = likelihoods(model, [options], [""], 4)
    assert inputs.shapes == [(1, 20)]
    expected = {name: log_likelihoods(model, tokens, example.targets[-1:])[0] for name, example in options.items()}
    assert len({score for score, _ in actual.values()}) == 3
    assert_same_scores({name: score for name, (score, _) in actual.items()}, expected)


def test_loss_counts_the_part_of_the_answer_inside_the_context(model, chat):
    row = replace(ROWS[0], messages=conversation("痛风", "gout asthma acid joint"))
    question = chat.prompt_question(row, [], CONTEXT)
    whole = encode_conversation(row.messages, chat.tokenizer, CONTEXT)
    n_prompt = whole.targets.count(IGNORE)
    for limit in (n_prompt, n_prompt + 1, n_prompt + 2):
        model.config = replace(model.config, max_seq_len=limit)
        (outcome,) = outcomes("loss", model, chat, [question])
        targets = [target for target in whole.targets[:limit] if target != IGNORE]
        assert outcome.n_tokens == len(targets) == limit - n_prompt
        expected = -sum(log_likelihoods(model, whole.tokens[: n_prompt + 1], targets)) if targets else 0.0
        torch.testing.assert_close(outcome.nll, expected, rtol=1e-5, atol=1e-4)


# --- all methods ---


@pytest.mark.parametrize("method", SCORERS)
def test_order_of_the_questions_does_not_change_the_outcomes(model, chat, method):
    rows = ROWS[:16]
    shuffled = random.Random(4).sample(rows, len(rows))
    by_id = []
    for order in (rows, shuffled):
        actual = score(method, model, chat, prompt_all(chat, order), batch_size=3, max_new_tokens=3)
        by_id.append({row.id: outcome for row, outcome in zip(order, actual, strict=True)})
    assert list(by_id[0]) != list(by_id[1])
    for row in rows:
        if method == "generate":
            assert by_id[1][row.id] == by_id[0][row.id]
        else:
            assert_same_scores(numbers(by_id[1][row.id]), numbers(by_id[0][row.id]))
    assert len({str(outcome) for outcome in by_id[0].values()}) > len(rows) / 2


@pytest.mark.parametrize("method", SCORERS)
def test_no_questions_have_no_outcomes(model, chat, method):
    assert score(method, model, chat, []) == []


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["logits", "sets", "text", "generate"])
def test_tensor_that_is_not_finite_is_reported(model, chat, method, value, name):
    prompter = make_prompter(chat.tokenizer, score=(method,))
    questions = prompt_all(prompter, ROWS[:4])
    with torch.no_grad():
        model.state_dict()[name].view(-1)[7] = value
    with pytest.raises(UserError, match=name):
        Evaluation(prompter, questions, [{} for _ in questions]).answer(model, show=False)


# --- decisions ---


def test_single_answer_is_the_best_option_and_the_first_of_equal_ones():
    assert decide({"A": -3.0, "B": -1.0, "C": -2.0}, multiple_answers=False) == "B"
    assert decide({"A": -1.0 - 0.9 * TIE, "B": -1.0, "C": -1.0}, multiple_answers=False) == "A"
    assert decide({"A": -1.0 - 1.1 * TIE, "B": -1.0, "C": -1.0}, multiple_answers=False) == "B"
    assert decide({"B": -1.0, "A": -1.0}, multiple_answers=False) == "B"  # in the order of the options
    # Each is within TIE of its neighbour: only the difference from the best counts.
    assert decide({"A": -1.0 - 1.4 * TIE, "B": -1.0 - 0.7 * TIE, "C": -1.0}, multiple_answers=False) == "B"


def test_multiple_answers_are_the_options_of_at_least_the_mean():
    rng = random.Random(0)
    for _ in range(200):
        scores = {letter: -10 * rng.random() for letter in "ABCDEF"[: rng.randint(2, 6)]}
        probabilities = {letter: math.exp(score) for letter, score in scores.items()}
        geometric_mean = math.prod(probabilities.values()) ** (1 / len(scores))
        expected = [letter for letter, p in probabilities.items() if p >= geometric_mean]
        assert decide(scores, multiple_answers=True) == "".join(expected)
        assert decide(scores, multiple_answers=False) == max(scores, key=scores.get)
    assert decide(dict.fromkeys("ABCD", -1.7), multiple_answers=True) == "ABCD"
    assert decide({"A": -1.0, "B": -2.0, "C": -1.5 - 0.9 * TIE}, multiple_answers=True) == "AC"


def test_best_of_several_sets_is_selected():
    scores = {"AB": -3.0, "AC": -1.0, "BC": -1.0 + 0.9 * TIE, "ABC": -2.0}
    assert decide(scores, multiple_answers=True) == "AC"
    assert decide(scores | {"BC": -0.5}, multiple_answers=True) == "BC"


@pytest.mark.parametrize("multiple_answers", [True, False])
def test_decide_without_scores_is_unanswered(multiple_answers):
    assert decide({}, multiple_answers) == ""
