import itertools
import random

import pytest

from minidoctor.batching import IGNORE, Example, ShuffledBatches, collate
from minidoctor.questions.json_rows import read_rows
from minidoctor.text.tokenizer import encode_conversation

CHOICE = {"question": "Which?", "options": {"A": "gout", "B": "asthma", "C": "flu"}, "answer": "B"}


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_question_and_its_answer(rows_file):
    (row,) = read_rows(rows_file({"question": "gout?", "answer": "uric acid", "topic": "test"}))
    assert row.messages == turns("gout?", "uric acid")
    assert (row.id, row.question, row.answer, row.options) == ("1", "gout?", "uric acid", {})
    assert (row.topic, row.language) == ("test", "en")


def test_a_multiple_choice_question_lists_its_options_and_answers_with_letter_and_text(rows_file):
    (row,) = read_rows(rows_file({**CHOICE, "id": 7, "explanation": "Because."}))
    assert row.messages == turns("Which?\nA. gout\nB. asthma\nC. flu", "B. asthma")
    assert (row.id, row.question, row.answer, row.options) == ("7", "Which?", "B", CHOICE["options"])


def test_several_right_letters_answer_with_a_line_each(rows_file):
    (row,) = read_rows(rows_file({**CHOICE, "answer": "AC"}))
    assert row.messages[-1]["content"] == "A. gout\nC. flu"
    assert row.answer == "AC"


def test_a_conversation_is_taken_as_it_is(rows_file):
    (row,) = read_rows(rows_file({"messages": turns("gout?", "uric acid", "why?", "crystals")}))
    assert row.messages == turns("gout?", "uric acid", "why?", "crystals")
    assert (row.question, row.answer) == ("why?", "crystals")


def test_instruction_input_and_output(rows_file):
    rows = read_rows(
        rows_file(
            {"instruction": "Translate.", "input": "gout", "output": "痛风"},
            {"instruction": "Say hi.", "input": "", "output": "hi"},
            {"instruction": "Say ho.", "output": "ho"},
        )
    )
    expected = [turns("Translate.\ngout", "痛风"), turns("Say hi.", "hi"), turns("Say ho.", "ho")]
    assert [row.messages for row in rows] == expected


def test_the_language_is_that_of_the_question(rows_file):
    system = {"role": "system", "content": "You are a doctor."}
    rows = read_rows(
        rows_file(
            {"question": "What is 2?", "answer": "痛风"},
            {"question": "什么是 gout?", "answer": "a disease"},
            {"messages": turns("痛风?", "gout")},
            {"messages": [system, *turns("痛风?", "gout")]},
        )
    )
    assert [row.language for row in rows] == ["en", "zh", "zh", "zh"]


BAD_ROWS = [
    ("{", "not JSON"),
    ("[1]", "expected a JSON object, got list"),
    ("7", "expected a JSON object, got int"),
    ("NaN", "expected a JSON object, got float"),
    ("[" * 100_000, "recursion"),
    ("9" * 5000, "integer"),
    ({}, 'no "question"'),
    ({"answer": "x"}, 'no "question"'),
    ({"question": "x"}, 'no "answer"'),
    ({"question": " ", "answer": "x"}, '"question" must be text'),
    ({"question": "x", "answer": 5}, '"answer" must be text, got 5'),
    ({"question": "x", "answer": None}, '"answer" must be text, got None'),
    ({"question": "x", "answer": "y", "topic": 3}, '"topic" must be text, got 3'),
    ({**CHOICE, "options": None}, '"options" must be an object'),
    ({**CHOICE, "options": ["gout", "flu"]}, '"options" must be an object'),
    ({**CHOICE, "options": {"B": "gout"}}, "at least two letters"),
    ({**CHOICE, "options": {"A": "gout", "b": "flu"}}, "one capital letter, got 'b'"),
    ({**CHOICE, "options": {"A": "gout", "B": 1}}, '"B" must be text, got 1'),
    ({**CHOICE, "answer": "D"}, "\"answer\" must be among the options ABC, got 'D'"),
    ({**CHOICE, "answer": "AA"}, "\"answer\" must be among the options ABC, got 'AA'"),
    ({**CHOICE, "answer": "asthma"}, '"answer" must be among the options ABC'),
    ({"messages": []}, '"messages" must be a list'),
    ({"messages": "hi"}, '"messages" must be a list'),
    ({"messages": ["hi"]}, '"messages" must be a list'),
    ({"messages": [{"role": "user"}]}, 'no "content"'),
    ({"messages": [{"role": "robot", "content": "x"}]}, "got 'robot'"),
    ({"messages": turns("hello")}, "must hold a user's and end with the assistant's"),
    ({"instruction": "x"}, 'no "output"'),
    ({"instruction": "x", "input": 5, "output": "y"}, '"input" must be text, got 5'),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_a_bad_row_is_named_by_file_and_line(rows_file, row, message):
    path = rows_file({"question": "x", "answer": "y"}, "", row, {"question": "x", "answer": "y"})
    with pytest.raises(ValueError, match=message) as refused:
        read_rows(path)
    assert str(refused.value).startswith(f"{path}:3: ")
    assert len(str(refused.value)) < len(str(path)) + 200


def test_bytes_that_are_no_text_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "x", "answer": "y"}\n{"question": "\xff", "answer": "y"}\n')
    with pytest.raises(ValueError, match=rf"{path}:2: .*utf-8"):
        read_rows(path)


def test_a_missing_file_a_directory_and_an_empty_file_are_refused(tmp_path, rows_file):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such file"):
            read_rows(path)
    for text in ((), ("", " ")):
        with pytest.raises(ValueError, match=r"rows\.jsonl: no rows"):
            read_rows(rows_file(*text))


def plain_targets(tokenizer, tokens):
    """Walks over the conversation: an assistant's marker starts what is learned, its end token ends it."""
    targets, learning = [], False
    for token, following in itertools.pairwise(tokens):
        learning = learning or token == tokenizer.special_tokens["<|assistant|>"]
        targets.append(following if learning else IGNORE)
        learning = learning and following not in tokenizer.eos_ids
    return targets


def test_only_the_assistants_words_and_the_token_that_ends_them_are_learned(tokenizer):
    messages = [{"role": "system", "content": "Short."}, *turns("gout?", "uric acid", "哮喘？", "喘息")]
    example, tokens = encode_conversation(messages, tokenizer, 1000), tokenizer.chat(messages)
    assert example.tokens == tokens[:-1]
    assert example.targets == plain_targets(tokenizer, tokens)
    learned = [target for target in example.targets if target != IGNORE]
    end = list(tokenizer.eos_ids)
    assert learned == tokenizer.encode("uric acid") + end + tokenizer.encode("喘息") + end


def test_a_long_example_is_cut_at_its_end(tokenizer):
    messages = turns("gout?", "uric acid " * 20)
    whole, cut = encode_conversation(messages, tokenizer, 1000), encode_conversation(messages, tokenizer, 9)
    assert cut == (whole.tokens[:9], whole.targets[:9])
    assert len(whole.tokens) > 9


def test_collate_pads_each_row_on_the_right():
    examples = [Example([5, 6, 7], [IGNORE, 7, 2]), Example([8], [2]), Example([4, 3], [IGNORE, IGNORE])]
    batch = collate(examples)
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 0, 0], [4, 3, 0]]
    assert batch.targets.tolist() == [[IGNORE, 7, 2], [2, IGNORE, IGNORE], [IGNORE] * 3]
    assert batch.attention_mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    flat = [target for row in batch.targets.tolist() for target in row]
    assert batch.answer_positions.tolist() == [i for i, target in enumerate(flat) if target != IGNORE] == [1, 2, 3]


def examples_of_random_length(n):
    draw = random.Random(0)
    return [Example([i] * draw.randint(1, 100), []) for i in range(n)]  # the first token names the example


@pytest.mark.parametrize(("n", "batch_size"), [(101, 4), (64, 8), (3, 8), (1, 1)])
def test_every_example_comes_once_an_epoch(n, batch_size):
    batches = ShuffledBatches(examples_of_random_length(n), batch_size, seed=0)
    stream = batches.starting_at(0)
    for _ in range(3):
        epoch = [next(stream) for _ in range(batches.per_epoch)]
        assert sorted(example.tokens[0] for batch in epoch for example in batch) == list(range(n))
        assert max(map(len, epoch)) <= batch_size


def first(batches, n, step=0):
    stream = batches.starting_at(step)
    return [[example.tokens[0] for example in next(stream)] for _ in range(n)]


def test_the_order_is_a_function_of_the_seed():
    examples = examples_of_random_length(50)
    assert first(ShuffledBatches(examples, 4, seed=3), 30) == first(ShuffledBatches(examples, 4, seed=3), 30)
    assert first(ShuffledBatches(examples, 4, seed=3), 30) != first(ShuffledBatches(examples, 4, seed=4), 30)


def test_epochs_differ_in_order():
    batches = ShuffledBatches(examples_of_random_length(50), 4, seed=0)
    assert first(batches, 13) != first(batches, 13, step=13)


@pytest.mark.parametrize("step", [1, 12, 13, 14, 30])
def test_starting_at_a_step_equals_skipping_to_it(step):
    batches = ShuffledBatches(examples_of_random_length(50), 4, seed=0)
    assert batches.per_epoch == 13
    assert first(batches, 20, step) == first(batches, step + 20)[step:]


def test_examples_of_like_length_stand_together_so_that_little_is_padding():
    examples = examples_of_random_length(1024)

    def padding(batches):
        real = sum(len(example.tokens) for example in examples)
        return 1 - real / sum(len(batch) * max(len(e.tokens) for e in batch) for batch in batches)

    stream = ShuffledBatches(examples, 8, seed=0).starting_at(0)
    ours = padding([next(stream) for _ in range(128)])
    plain = padding([examples[i : i + 8] for i in range(0, 1024, 8)])
    assert plain > 0.3
    assert ours < 0.1
