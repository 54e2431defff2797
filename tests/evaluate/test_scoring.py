import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from paths import FIXTURES
from torch import nn

from minidoctor.batching import IGNORE, Example
from minidoctor.config import RopeScaling
from minidoctor.evaluate import scoring
from minidoctor.evaluate.predictions import answer, judge
from minidoctor.evaluate.prompts import Asker, choose_shots
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.evaluate.scoring import (
    SCORERS,
    TIE,
    WORTH_SHARING,
    Wanted,
    batches,
    by_logits,
    by_loss,
    by_text,
    by_writing,
    decide,
    hidden_states,
    losses_of,
    shared_tokens,
)
from minidoctor.model import Model
from minidoctor.questions.rows import Row, conversation, format_multiple_choice
from minidoctor.text.tokenizer import encode_conversation, load_tokenizer

TOKENIZER_FIXTURES = FIXTURES / "tokenizers"
WORDS = ("gout", "asthma", "acid", "joint", "cough", "the", "key", "test", "treated", "痛风", "哮喘", "尿酸", "喘息")
SUBJECTS = {"anatomy": 14, "genetics": 11, "virology": 9, "nutrition": 6, "儿科学": 1}  # questions of each
SHOTS = 1
CONTEXT = 400


def rows_of(sizes, seed):
    """CMMLU questions of random words, short and long, some with several right letters."""
    rng, rows = random.Random(seed), []

    def words(least, most):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    for topic, n in sizes.items():
        for i in range(n):
            question, letters = f"{words(1, 15)} {i}?", "ABCDE"[: rng.randint(2, 5)]
            options = {letter: f"{words(1, 3)} {letter}" for letter in letters}
            right = "".join(sorted(rng.sample(letters, 2 if i % 3 == 0 else 1)))
            messages = conversation(*format_multiple_choice(question, options, right))
            several = len(right) > 1
            rows.append(
                Row(
                    f"{topic}-{i}",
                    messages,
                    question,
                    options,
                    right,
                    topic,
                    "en",
                    multiple_answers=several,
                    exam="cmmlu",
                )
            )
    rng.shuffle(rows)
    return rows


ROWS, POOL = rows_of(SUBJECTS, seed=1), rows_of(dict.fromkeys(SUBJECTS, SHOTS), seed=2)


def put(asker, rows=ROWS, shots=SHOTS, name="auto"):
    return [asker.put(row, name, choose_shots(row, POOL, shots), CONTEXT) for row in rows]


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
    return Asker(tokenizer, raw=True)


@pytest.fixture
def chat(tokenizer):
    return Asker(tokenizer, raw=False)


def config_of(batch_size, **settings):
    return EvalConfig(batch_size=batch_size, **settings)


def results(outcomes, n):
    """Of each question, in the order of the questions; each must have come once."""
    found = dict(pairs := list(outcomes))
    assert sorted(i for i, _ in pairs) == list(range(n))
    return [found[i] for i in range(n)]


def only(way, outcomes, n):
    return [outcome[way] for outcome in results(outcomes, n)]


@torch.no_grad()
def log_likelihoods(model, prompt, ids):
    """Of each token after the prompt, from one full forward without batch, padding or cache."""
    tokens = [*prompt, *ids]
    log_probs = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
    return [log_probs[i - 1, tokens[i]].item() for i in range(len(prompt), len(tokens))]


@torch.no_grad()
def plain_logits(model, asker, question):
    """The whole prompt, the letter behind it; where the letter is several tokens, one after the other."""
    following, scores = model(torch.tensor([question.tokens]))[0][0, -1].log_softmax(-1), {}
    for letter in question.row.options:
        first, *more = asker.answer_tokens(question.text, letter)
        rest = log_likelihoods(model, [*question.tokens, first], more) if more else []
        scores[letter] = following[first].item() + sum(rest)
    return scores


@torch.no_grad()
def plain_greedy(model, tokenizer, prompt, n):
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + n, model.config.max_seq_len):
        token = model(torch.tensor([tokens]))[0][0, -1].argmax().item()
        if token in tokenizer.eos_ids:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[len(prompt) :])


class Seen:
    """The shape of everything that goes through the model."""

    def __init__(self, model):
        self.shapes = []
        model.model.embed_tokens.register_forward_hook(
            lambda module, args, out: self.shapes.append(tuple(args[0].shape))
        )

    @property
    def tokens(self):
        return sum(rows * length for rows, length in self.shapes)


def plain_decision(scores, several):
    if several:
        mean = sum(scores.values()) / len(scores)
        return "".join(letter for letter in scores if scores[letter] >= mean)
    return max(scores, key=scores.get)


def assert_same_scores(ours, expected):
    # A log-likelihood of -20 has a last bit of 2e-6, and is the difference of two numbers as large.
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


# --- logits ---


LLAMA3 = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq_len=64)


@pytest.mark.parametrize(
    ("settings", "adapted"), [({}, False), ({}, True), ({"window": 24}, True), ({"rope_scaling": LLAMA3}, False)]
)
def test_logits_equal_a_plain_loop_over_whole_prompts(config, adapter, raw, settings, adapted):
    model, questions = random_model(config, adapter if adapted else None, **settings), put(raw)
    starts = [len(raw.tokens(one.head)) for one in questions]
    assert min(starts) > 100  # beyond the window, and beyond the original context
    expected = [plain_logits(model, raw, one) for one in questions]
    decisions = [
        plain_decision(scores, one.row.multiple_answers) for scores, one in zip(expected, questions, strict=True)
    ]
    assert len(set(decisions)) > 5
    for batch_size in (1, 3, 16):
        ours = only("logits", by_logits(model, raw, questions, config_of(batch_size)), len(questions))
        for outcome, scores in zip(ours, expected, strict=True):
            assert list(outcome) == ["scores"]
            assert list(outcome["scores"]) == list(scores)
            assert_same_scores(outcome["scores"], scores)
        judged = [judge(one.row, outcome) for one, outcome in zip(questions, ours, strict=True)]
        assert [one["prediction"] for one in judged] == decisions
        assert [one["correct"] for one in judged] == [
            d == q.row.answer for d, q in zip(decisions, questions, strict=True)
        ]


@pytest.mark.parametrize("adapted", [False, True])
def test_letters_that_the_vocabulary_spells_count_whole(config, adapter, chat, adapted):
    """In a chat this tokenizer has "▁A" as one token and writes B as two."""
    model, questions = random_model(config, adapter if adapted else None), put(chat, ROWS[:12])
    assert {len(chat.answer_tokens("", letter)) for letter in "ABCDE"} == {1, 2}
    expected = [plain_logits(model, chat, one) for one in questions]
    for batch_size in (1, 16):
        ours = only("logits", by_logits(model, chat, questions, config_of(batch_size)), len(questions))
        assert_same_scores([outcome["scores"] for outcome in ours], expected)


def test_what_all_letters_begin_with_is_read_and_not_scored(config):
    """In this format all of them begin with a space that is a token of its own."""
    asker = Asker(load_tokenizer(TOKENIZER_FIXTURES / "sentencepiece", "mistral"), raw=False)
    model, questions = random_model(config), put(asker, ROWS[:12])
    (space,) = {asker.answer_tokens("", letter)[0] for letter in "ABCDE"}
    ours = only("logits", by_logits(model, asker, questions, config_of(5)), len(questions))
    for one, outcome in zip(questions, ours, strict=True):
        (of_space,) = log_likelihoods(model, one.tokens, [space])
        whole = plain_logits(model, asker, one)
        assert_same_scores(outcome["scores"], {letter: score - of_space for letter, score in whole.items()})


def same_start(sequences):
    n = 0
    while all(len(one) > n and one[n] == sequences[0][n] for one in sequences):
        n += 1
    return n


def common_start(questions):
    """Of the tokens of a group, at least one of each question left; 0 if it is not shared."""
    if len(questions) < 2:
        return 0
    common = same_start([one.tokens for one in questions])
    common = min(common, min(len(one.tokens) for one in questions) - 1)
    return common if common >= WORTH_SHARING else 0


def groups_of(questions):
    return [[one for one in questions if one.row.topic == topic] for topic in SUBJECTS]


def test_what_the_prompts_of_a_subject_have_in_common_is_computed_once(model, raw):
    seen, questions = Seen(model), put(raw)
    starts = [common_start(group) for group in groups_of(questions)]
    assert all(starts[:-1])
    assert starts[-1] == 0  # a question alone shares nothing
    own = [len(one.tokens) - start for group, start in zip(groups_of(questions), starts, strict=True) for one in group]
    results(by_logits(model, raw, questions, config_of(1)), len(questions))
    assert sorted(seen.shapes) == sorted((1, length) for length in [*filter(None, starts), *own])
    assert seen.tokens < 0.4 * sum(len(one.tokens) for one in questions)

    seen.shapes.clear()
    results(by_logits(model, raw, questions, config_of(16)), len(questions))
    # Each start once more, and everything else is what stands behind one, or the question alone.
    lengths = [length for _, length in seen.shapes]
    assert [lengths.count(start) for start in starts[:-1]] == [1, 1, 1, 1]
    assert sum(rows for rows, length in seen.shapes if length in own) == len(questions)


def test_where_little_is_in_common_nothing_is_shared(model, chat):
    seen, questions = Seen(model), put(chat, shots=0, name="own")
    results(by_writing(model, chat, questions, config_of(1, max_new_tokens=1)), len(questions))
    assert sorted(seen.shapes) == sorted((1, len(one.tokens)) for one in questions)


def test_the_common_start_equals_that_of_a_plain_comparison():
    rng, shared = random.Random(0), 0
    for _ in range(500):
        start = [rng.randrange(3) for _ in range(rng.choice([0, 14, 15, 16, 17, 30]))]
        group = []
        for _ in range(rng.randint(1, 5)):
            tokens = start[: rng.choice([len(start)] * 4 + [20])] + [rng.randrange(3) for _ in range(rng.randint(1, 4))]
            group.append(Wanted(tokens, rng.randint(1, min(4, len(tokens))), ""))
        expected = same_start([one.tokens for one in group])
        expected = min([expected, *(len(one.tokens) - one.n for one in group)])
        assert shared_tokens(group) == (expected if expected >= 16 and len(group) > 1 else 0)
        shared += shared_tokens(group) > 0
    assert shared > 50


def test_one_question_asked_twice_still_has_a_token_of_its_own(model, raw):
    (question,) = put(raw, ROWS[:1])
    ours = only("logits", by_logits(model, raw, [question] * 3, config_of(2)), 3)
    assert_same_scores([one["scores"] for one in ours], [plain_logits(model, raw, question)] * 3)


@pytest.mark.parametrize("limit", [100, 300])
def test_fewer_tokens_in_a_batch_change_no_score(model, raw, monkeypatch, limit):
    questions = put(raw)
    expected = [plain_logits(model, raw, one) for one in questions]
    monkeypatch.setattr(scoring, "TOKENS_IN_A_BATCH", {"cpu": limit})
    ours = only("logits", by_logits(model, raw, questions, config_of(16)), len(questions))
    assert_same_scores([one["scores"] for one in ours], expected)

    wanted, sizes = [Wanted(one.tokens, 1, one.head) for one in questions], []
    for indices, start, cache in batches(model, wanted, 16):
        assert len(indices) == 1 or len(indices) * max(len(wanted[i].tokens) - start for i in indices) <= limit
        sizes.append((len(indices), cache))
    # A later batch of the same subject holds more questions, which are shorter.
    assert any(1 < a < b and one is other for (a, one), (b, other) in pairwise(sizes)) == (limit == 300)


def test_batches_of_hidden_states_are_those_of_whole_sequences(model):
    """Of sequences with their own number of wanted states, some of which begin alike."""
    rng = random.Random(0)
    starts = {name: [rng.randrange(400) for _ in range(n)] for name, n in (("a", 60), ("b", 17), ("c", 3))}
    wanted = []
    for _ in range(40):
        name = rng.choice("abc")
        tokens = starts[name] + [rng.randrange(400) for _ in range(rng.randint(1, 30))]
        wanted.append(Wanted(tokens, rng.randint(1, len(tokens) if rng.random() < 0.1 else 1), name))
    for batch_size in (1, 7):
        found = {}
        for indices, states in hidden_states(model, wanted, batch_size):
            assert len(indices) <= batch_size
            found |= dict(zip(indices, states, strict=True))
        assert sorted(found) == list(range(40))
        for i, one in enumerate(wanted):
            with torch.no_grad():
                expected = model.hidden(torch.tensor([one.tokens]))[0][0, -one.n :]
            torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=2e-5)


# --- what does not fit ---


def test_what_does_not_fit_is_said_and_changes_nothing_for_the_others(model, raw):
    """One token more than fits: a letter is read from the last token, a written answer needs one more place."""
    questions = put(raw)
    lengths = sorted(len(one.tokens) for one in questions)
    limit = lengths[len(lengths) // 2]
    ways = {"logits": by_logits, "generate": by_writing}
    config = config_of(4, max_new_tokens=1)
    whole = {way: only(way, scorer(model, raw, questions, config), len(questions)) for way, scorer in ways.items()}
    model.config = replace(model.config, max_seq_len=limit)
    for way, scorer in ways.items():
        ours = only(way, scorer(model, raw, questions, config), len(questions))
        fits = [len(one.tokens) <= limit if way == "logits" else len(one.tokens) < limit for one in questions]
        assert 10 < sum(fits) < len(fits) - 10
        for fit, one, before, question in zip(fits, ours, whole[way], questions, strict=True):
            if not fit:
                assert one == {"scores": {}, "too_long": True}
                assert (judge(question.row, one)["prediction"], judge(question.row, one)["correct"]) == ("", False)
            elif way == "logits":
                assert_same_scores(one["scores"], before["scores"])
            else:
                assert one == before
    assert lengths.count(limit) > 0  # one stands at the border


def test_a_spelled_letter_must_fit_but_for_its_last_token(model, chat):
    (question,) = put(chat, ROWS[:1])
    for room, fits in ((0, False), (1, True)):  # B is two tokens, of which the first must be read
        model.config = replace(model.config, max_seq_len=len(question.tokens) + room)
        (ours,) = only("logits", by_logits(model, chat, [question], config_of(4)), 1)
        if fits:
            assert_same_scores(ours["scores"], plain_logits(model, chat, question))
        else:
            assert ours == {"scores": {}, "too_long": True}


# --- text ---


def plain_text(model, asker, row):
    """Per token and per character: the bare question, the option's text behind it, in a chat with its end."""
    per_token, per_character = {}, {}
    for letter, text in row.options.items():
        if asker.raw:
            prompt = asker.tokenizer.start + asker.tokenizer.encode(row.question)
            ids = asker.answer_tokens(row.question, text)
        else:
            prompt = asker.tokenizer.chat([{"role": "user", "content": row.question}])
            ids = asker.tokenizer.chat(conversation(row.question, text))[len(prompt) :]
            assert ids[-1] in asker.tokenizer.eos_ids
        found = log_likelihoods(model, prompt, ids)
        per_token[letter], per_character[letter] = sum(found) / len(found), sum(found) / len(text)
    return {"text": {"scores": per_token}, "text_per_character": {"scores": per_character}}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("is_raw", [True, False])
def test_text_equals_a_plain_loop_over_options(config, adapter, tokenizer, is_raw, batch_size):
    model, asker, rows = random_model(config, adapter), Asker(tokenizer, is_raw), ROWS[:12]
    ours = results(by_text(model, asker, put(asker, rows), config_of(batch_size)), len(rows))
    for row, outcome in zip(rows, ours, strict=True):
        assert_same_scores(outcome, plain_text(model, asker, row))


def test_raw_options_in_english_stand_behind_a_space():
    asker = Asker(load_tokenizer(TOKENIZER_FIXTURES / "sentencepiece"), raw=True)
    tokens, targets = asker.example("Gout?", "uric acid")
    assert [*tokens, targets[-1]] == asker.tokenizer.start + asker.tokenizer.encode("Gout? uric acid")


def test_a_question_with_one_option_too_long_has_no_scores_by_text(model, chat):
    options = {"A": "gout", "B": "acid " * CONTEXT}
    rows = [*ROWS[:5], replace(ROWS[5], options=options), *ROWS[6:9]]
    ours = results(by_text(model, chat, put(chat, rows), config_of(16)), len(rows))
    for i, (row, outcome) in enumerate(zip(rows, ours, strict=True)):
        if i == 5:
            too_long = {"scores": {}, "too_long": True}
            assert outcome == {"text": too_long, "text_per_character": too_long}
        else:
            assert_same_scores(outcome, plain_text(model, chat, row))
    border = max(len(chat.example(ROWS[5].question, text).tokens) for text in ROWS[5].options.values())
    for limit, fits in ((border, True), (border - 1, False)):
        model.config = replace(model.config, max_seq_len=limit)
        ((_, outcome),) = by_text(model, chat, put(chat, ROWS[5:6]), config_of(16))
        assert ("too_long" not in outcome["text"]) == fits


# --- written answers ---


@pytest.mark.parametrize(("is_raw", "settings"), [(True, {}), (False, {"window": 24, "rope_scaling": LLAMA3})])
def test_written_answers_are_those_of_each_prompt_alone(config, adapter, tokenizer, is_raw, settings):
    model, asker = random_model(config, adapter, **settings), Asker(tokenizer, is_raw)
    questions = put(asker, ROWS[:12])
    expected = [plain_greedy(model, tokenizer, one.tokens, 5) for one in questions]
    assert len(set(expected)) > 9
    for batch_size in (1, 3, 16):
        seen = Seen(model)
        ours = only("generate", by_writing(model, asker, questions, config_of(batch_size, max_new_tokens=5)), 12)
        assert ours == [{"scores": {}, "reply": reply} for reply in expected]
        read = sum(rows * length for rows, length in seen.shapes if length > 1)
        assert read < 0.6 * sum(len(one.tokens) for one in questions)


def test_open_questions_are_written_too(model, chat):
    rows = [
        Row(str(i), conversation(row.question, "x"), row.question, {}, "x", "", "en") for i, row in enumerate(ROWS[:6])
    ]
    questions = put(chat, rows)
    ours = only("generate", by_writing(model, chat, questions, config_of(4, max_new_tokens=6)), 6)
    prompts = [chat.tokenizer.chat(row.messages[:1]) for row in rows]
    assert [one["reply"] for one in ours] == [plain_greedy(model, chat.tokenizer, prompt, 6) for prompt in prompts]


# --- loss ---


def plain_loss(model, tokenizer, messages):
    """(sum, number) of the assistant's own tokens, each after all that stands before it."""
    before, found = [], []
    for ids, own in tokenizer.chat_turns(messages):
        if own:
            found += log_likelihoods(model, before, ids)
        before = [*before, *ids]
    return -sum(found), len(found)


def test_loss_equals_a_plain_one(config, adapter, chat):
    model = random_model(config, adapter)
    for batch_size in (1, 16):
        ours = only("loss", by_loss(model, chat, put(chat, ROWS[:20]), config_of(batch_size)), 20)
        for row, outcome in zip(ROWS[:20], ours, strict=True):
            nll, n_tokens = plain_loss(model, chat.tokenizer, row.messages)
            assert outcome["n_tokens"] == n_tokens
            torch.testing.assert_close(outcome["nll"], nll, rtol=1e-5, atol=1e-4)


def test_only_the_assistants_turns_have_a_loss(model, tokenizer):
    talks = [
        [
            *conversation("痛风？", "尿酸"),
            *conversation("the key test for gout?", "uric acid"),
            *conversation("a", "b"),
        ],
        conversation("asthma?", "cough"),
        [{"role": "system", "content": "the joint fluid"}, *conversation("哮喘？", "喘息"), *conversation("x", "y z")],
    ]
    examples = [encode_conversation(messages, tokenizer, CONTEXT) for messages in talks]
    first = [next(i for i, target in enumerate(ex.targets) if target != IGNORE) for ex in examples]
    assert [IGNORE in ex.targets[start:] for ex, start in zip(examples, first, strict=True)] == [True, False, True]
    for batch_size in (1, 3):
        for (nll, n), messages in zip(losses_of(model, examples, batch_size), talks, strict=True):
            expected, number = plain_loss(model, tokenizer, messages)
            assert n == number
            torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-4)


def test_losses_of_sequences_that_begin_alike_start_where_each_has_its_first_target(model):
    start = list(range(5, 45))
    examples = [Example([*start, 50 + i, 60], [IGNORE] * (38 - i) + list(range(70, 74 + i))) for i in range(6)]
    for (nll, n), (tokens, targets) in zip(losses_of(model, examples, 4), examples, strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
        expected = [-log_probs[t, target].item() for t, target in enumerate(targets) if target != IGNORE]
        assert n == len(expected)
        torch.testing.assert_close(nll, sum(expected), rtol=1e-5, atol=1e-4)


def test_an_answer_outside_the_context_has_no_loss(model, chat):
    """What of it is inside counts."""
    row = replace(ROWS[0], messages=conversation("痛风", "gout asthma acid joint"))
    question = chat.put(row, "auto", [], CONTEXT)
    whole = encode_conversation(row.messages, chat.tokenizer, CONTEXT)
    n_prompt = whole.targets.count(IGNORE)
    for limit in (n_prompt, n_prompt + 1, n_prompt + 2):
        model.config = replace(model.config, max_seq_len=limit)
        (outcome,) = only("loss", by_loss(model, chat, [question], config_of(4)), 1)
        learned = [target for target in whole.targets[:limit] if target != IGNORE]
        assert outcome["n_tokens"] == len(learned) == limit - n_prompt
        prompt = [*whole.tokens[: n_prompt + 1]]
        expected = -sum(log_likelihoods(model, prompt, learned)) if learned else 0.0
        torch.testing.assert_close(outcome["nll"], expected, rtol=1e-5, atol=1e-4)


# --- all ways ---


@pytest.mark.parametrize("way", SCORERS)
def test_the_order_of_the_questions_changes_nothing(model, chat, way):
    rows = ROWS[:16]
    mixed = random.Random(4).sample(rows, len(rows))
    config = config_of(3, max_new_tokens=3)
    by_id = [
        {row.id: outcome for row, outcome in
         zip(order, results(SCORERS[way](model, chat, put(chat, order), config), len(order)), strict=True)}
        for order in (rows, mixed)
    ]  # fmt: skip
    assert list(by_id[0]) != list(by_id[1])
    for row in rows:
        if way == "generate":
            assert by_id[1][row.id] == by_id[0][row.id]
        else:
            assert_same_scores(by_id[1][row.id], by_id[0][row.id])
    assert len({str(outcome) for outcome in by_id[0].values()}) > len(rows) / 2


@pytest.mark.parametrize("way", SCORERS)
def test_no_questions_have_no_outcomes(model, chat, way):
    assert list(SCORERS[way](model, chat, [], config_of(3))) == []


@pytest.mark.parametrize("where", ["model.layers.0.mlp.gate_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("way", ["logits", "text"])
def test_damaged_weights_are_said(model, chat, way, where):
    questions = put(chat, ROWS[:4])
    with torch.no_grad():
        model.state_dict()[where][:] = math.nan
    with pytest.raises(FloatingPointError, match="its weights are damaged"):
        answer(model, chat, questions, config_of(2, score=(way,)), [{} for _ in questions], show_progress=False)


# --- decisions ---


def test_one_letter_is_the_best_and_of_equal_ones_the_first():
    assert decide({"A": -3.0, "B": -1.0, "C": -2.0}, several=False) == "B"
    assert decide({"A": -1.0 - 0.9 * TIE, "B": -1.0, "C": -1.0}, several=False) == "A"
    assert decide({"A": -1.0 - 1.1 * TIE, "B": -1.0, "C": -1.0}, several=False) == "B"
    assert decide({"B": -1.0, "A": -1.0}, several=False) == "B"  # in the order of the options
    # Each is within the margin of its neighbour: only the distance to the best counts.
    assert decide({"A": -1.0 - 1.4 * TIE, "B": -1.0 - 0.7 * TIE, "C": -1.0}, several=False) == "B"


def test_several_letters_are_those_of_at_least_the_mean():
    rng = random.Random(0)
    for _ in range(200):
        scores = {letter: -10 * rng.random() for letter in "ABCDEF"[: rng.randint(2, 6)]}
        probabilities = {letter: math.exp(score) for letter, score in scores.items()}
        geometric = math.prod(probabilities.values()) ** (1 / len(scores))
        expected = [letter for letter, p in probabilities.items() if p >= geometric]
        assert decide(scores, several=True) == "".join(expected)
        assert decide(scores, several=False) == max(scores, key=scores.get)
    assert decide(dict.fromkeys("ABCD", -1.7), several=True) == "ABCD"
    assert decide({"A": -1.0, "B": -2.0, "C": -1.5 - 0.9 * TIE}, several=True) == "AC"


@pytest.mark.parametrize("several", [True, False])
def test_no_scores_decide_nothing_and_what_is_no_number_is_an_error(several):
    assert decide({}, several) == ""
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(FloatingPointError, match=f"{bad}.* damaged"):
            decide({"A": -1.0, "B": bad}, several)
