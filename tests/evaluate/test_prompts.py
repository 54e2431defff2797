import io
import json
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import sentencepiece
from paths import FIXTURES, ROOT

from minidoctor.batching import IGNORE
from minidoctor.config import UserError
from minidoctor.evaluate.prompts import (
    PROMPTS,
    PromptedQuestion,
    Prompter,
    answer_example,
    choose_shots,
    compose,
    load_prompt,
)
from minidoctor.evaluate.protocol import EvalConfig
from minidoctor.questions.exams import SUBJECTS
from minidoctor.questions.rows import Row, conversation, format_multiple_choice
from minidoctor.text.chat_formats import CHAT_FORMATS
from minidoctor.text.tokenizer import load_tokenizer

TOKENIZER_FIXTURES = FIXTURES / "tokenizers"
MARKERS = sorted({name for form in CHAT_FORMATS.values() for name in form.needs if not name.startswith("{")})


def make_row(id, question, options, answer="A", **more):
    options = dict(zip("ABCDEFG", options, strict=False))
    messages = conversation(*format_multiple_choice(question, options, answer))
    fields = {"topic": "", "language": "zh", "multiple_answers": len(answer) > 1} | more
    return Row(id=id, messages=messages, question=question, options=options, answer=answer, **fields)


DOCTOR = {"exam_type": "医师考试", "exam_class": "规培结业", "question_type": "单项选择题"}
CMB = [
    make_row("1", "痛风的关键检查是", ["尿酸", "心电图"], exam="cmb", metadata=DOCTOR),
    make_row("2", "哮喘的症状有", ["喘息", "咳嗽", "脱发"], "AB", exam="cmb",
                metadata=DOCTOR | {"question_type": "多项选择题"}),
    make_row("3", "肺炎多见于", ["肺", "心"], exam="cmb", metadata={}),
    make_row("4", "下列正确的是", ["甲类", "乙类", "丙类"], "BC", exam="cmb", metadata={"exam_type": "医师考试"}),
]  # fmt: skip
CMEXAM = [
    make_row("val-0", "痛风的关键检查是", ["尿酸", "心电图", "肺功能"], exam="cmexam"),
    make_row("val-1", "哮喘的症状是", ["脱发", "喘息"], "B", exam="cmexam"),
]
CMMLU = [
    make_row("anatomy-0", "听觉中枢位于", ["额叶", "颞叶", "枕叶", "顶叶"], "B", exam="cmmlu", topic="anatomy"),
    make_row("anatomy-1", "女性生殖腺是", ["卵巢", "子宫", "输卵管", "阴道"], "A", exam="cmmlu", topic="anatomy"),
    make_row("anatomy-2", "最大的腺体是", ["脾", "胰", "肝", "肾"], "C", exam="cmmlu", topic="anatomy"),
]
OWN = [
    make_row("a", "Which test confirms gout?", ["uric acid", "a cough"]),
    make_row("b", "Where is asthma treated?", ["rheumatology", "pneumology"], "B"),
]


def make_prompter(tokenizer, raw, prompt="auto"):
    return Prompter(tokenizer, EvalConfig(raw=raw, prompt=prompt))


def full_prompt(row, name="auto", shots=()):
    tokenizer = SimpleNamespace(format=None, opens_reasoning=False, chat=lambda messages: [])
    return make_prompter(tokenizer, raw=False, prompt=name).prompt_question(row, list(shots), 1).text


# --- published prompts ---


def test_cmb_prompt_equals_that_of_its_repository():
    """https://github.com/FreedomIntelligence/CMB, workers/base.py; an option of one character stays here."""
    ending = "不需要做任何分析和解释，直接输出答案选项。\n"
    assert full_prompt(CMB[0]) == (
        f"以下是中国医师考试中规培结业考试的一道单项选择题，{ending}痛风的关键检查是\nA. 尿酸\nB. 心电图"
    )
    assert full_prompt(CMB[1]) == (
        f"以下是中国医师考试中规培结业考试的一道多项选择题，{ending}哮喘的症状有\nA. 喘息\nB. 咳嗽\nC. 脱发"
    )
    # Without exam type and class the short form is used, without the question type, which the answer would reveal.
    assert full_prompt(CMB[2]) == f"以下是一道选择题，{ending}肺炎多见于\nA. 肺\nB. 心"
    assert full_prompt(CMB[3]) == f"以下是一道选择题，{ending}下列正确的是\nA. 甲类\nB. 乙类\nC. 丙类"


def test_cmb_few_shot_prompt_is_a_dialogue_of_questions_and_letters():
    assert full_prompt(CMB[0], shots=[CMB[1], CMB[2]]) == (
        "问：以下是中国医师考试中规培结业考试的一道多项选择题，不需要做任何分析和解释，直接输出答案选项。\n"
        "哮喘的症状有\nA. 喘息\nB. 咳嗽\nC. 脱发\n答：AB\n"
        "问：以下是一道选择题，不需要做任何分析和解释，直接输出答案选项。\n肺炎多见于\nA. 肺\nB. 心\n答：A\n"
        "问：以下是中国医师考试中规培结业考试的一道单项选择题，不需要做任何分析和解释，直接输出答案选项。\n"
        "痛风的关键检查是\nA. 尿酸\nB. 心电图\n答："
    )


def test_cmmlu_prompt_equals_that_of_its_repository():
    """https://github.com/haonan-li/CMMLU, src/mp_utils.py"""
    head = "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
    asked = "题目：听觉中枢位于\nA. 额叶\nB. 颞叶\nC. 枕叶\nD. 顶叶\n答案是："
    assert full_prompt(CMMLU[0]) == head + asked
    assert full_prompt(CMMLU[0], shots=CMMLU[1:]) == (
        head + "题目：女性生殖腺是\nA. 卵巢\nB. 子宫\nC. 输卵管\nD. 阴道\n答案是：A\n\n"
        "题目：最大的腺体是\nA. 脾\nB. 胰\nC. 肝\nD. 肾\n答案是：C\n\n" + asked
    )


@pytest.mark.parametrize(
    ("topic", "name"),
    [
        ("anatomy", "解剖学"),
        ("clinical_knowledge", "临床知识"),
        ("college_medicine", "大学医学"),
        ("genetics", "遗传学"),
        ("nutrition", "营养学"),
        ("professional_medicine", "专业医学"),
        ("traditional_chinese_medicine", "中医中药"),
        ("virology", "病毒学"),
        ("儿科学", "儿科学"),  # not a subject of CMMLU
    ],
)
def test_cmmlu_head_contains_the_chinese_subject(topic, name):
    row = make_row(f"{topic}-0", "下列正确的是", "甲乙丙丁", exam="cmmlu", topic=topic)
    assert full_prompt(row).startswith(f"以下是关于{name}的单项选择题，请直接给出正确答案的选项。\n\n题目：下列")
    assert len(SUBJECTS) == 8


def test_cmexam_prompt_equals_that_of_its_repository():
    """https://github.com/williamliujl/CMExam, src/preprocess/prompt_templates.py, with the beginning of its answer."""
    asked = "问题: 痛风的关键检查是, \n 选项: A 尿酸\nB 心电图\nC 肺功能\n答案:"
    assert full_prompt(CMEXAM[0]) == asked
    assert full_prompt(CMEXAM[0], shots=CMEXAM[1:]) == (
        "问题: 哮喘的症状是, \n 选项: A 脱发\nB 喘息\n答案: B\n\n" + asked
    )


def test_huatuo_prompt_has_the_question_type_if_it_is_known():
    """https://github.com/FreedomIntelligence/HuatuoGPT-II, evaluation/eval_qa.py"""
    asked = "请回答下面选择题。\n[单项选择题]痛风的关键检查是\nA. 尿酸\nB. 心电图"
    assert full_prompt(CMB[0], "huatuo") == asked
    assert full_prompt(CMB[2], "huatuo") == "请回答下面选择题。\n[选择题]肺炎多见于\nA. 肺\nB. 心"
    bare = "请回答下面选择题。\n哮喘的症状是\nA. 脱发\nB. 喘息"
    assert full_prompt(CMEXAM[1], "huatuo") == bare
    assert full_prompt(CMB[0], "huatuo", shots=[CMEXAM[1]]) == f"{bare}\nB\n\n{asked}\n"


def test_huatuo_o1_prompt_is_english_for_every_language():
    """https://github.com/FreedomIntelligence/HuatuoGPT-o1, evaluation/eval.py"""
    expected = "Please answer the following multiple-choice question:\n痛风的关键检查是\nA. 尿酸\nB. 心电图"
    assert full_prompt(CMB[0], "huatuo-o1") == expected


def test_own_prompt_equals_the_training_format():
    row, solved = OWN
    assert full_prompt(row) == "Which test confirms gout?\nA. uric acid\nB. a cough" == row.messages[0]["content"]
    assert full_prompt(row, shots=[solved]) == (
        "Where is asthma treated?\nA. rheumatology\nB. pneumology\nB\n\n"
        "Which test confirms gout?\nA. uric acid\nB. a cough\n"
    )


@pytest.mark.parametrize("name", PROMPTS)
def test_every_published_prompt_can_be_selected(name):
    row = make_row("1", "痛风？", ["尿酸", "心电图"], exam="cmb", metadata=DOCTOR, topic="anatomy")
    assert full_prompt(row, name) == "".join(compose(row, PROMPTS[name], []))
    assert all(text in full_prompt(row, name) for text in ("痛风？", "尿酸", "心电图"))
    assert len({full_prompt(row, other) for other in PROMPTS}) == len(PROMPTS)


def test_auto_selects_the_prompt_of_the_benchmark():
    for rows, name in ((CMB, "cmb"), (CMMLU, "cmmlu"), (CMEXAM, "cmexam"), (OWN, "own")):
        assert all(full_prompt(row) == full_prompt(row, name) for row in rows)


# --- prompt files ---


@pytest.fixture
def prompt_file(tmp_path):
    def write(content, name="prompt.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_prompt_file_has_its_head_above_three_dashes(prompt_file, ending, newline, mark):
    text = "你是医生。{subject}\n---\n不是头\n---\n{question}？\n{options}\n\n答案：" + ending
    path = prompt_file(mark + text.replace("\n", newline).encode())
    prompt = load_prompt(str(path))
    # The last line "---" separates head and item; one newline at the end is the editor's.
    assert compose(CMMLU[0], prompt, []) == (
        "你是医生。解剖学\n---\n不是头\n",
        "听觉中枢位于？\nA. 额叶\nB. 颞叶\nC. 枕叶\nD. 顶叶\n\n答案：",
    )
    head, asked = compose(CMMLU[0], prompt, CMMLU[1:2])
    solved = "女性生殖腺是？\nA. 卵巢\nB. 子宫\nC. 输卵管\nD. 阴道\n\n答案：A\n\n"
    assert head == "你是医生。解剖学\n---\n不是头\n" + solved
    assert asked == compose(CMMLU[0], prompt, [])[1]


def test_prompt_file_without_dashes_has_no_head(prompt_file):
    prompt = load_prompt(str(prompt_file("{question} --- {options}\n\n")))
    assert compose(OWN[0], prompt, []) == ("", "Which test confirms gout? --- A. uric acid\nB. a cough\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{options}", r"prompt\.txt: .* question$"),
        ("{question}", r"prompt\.txt: .* options$"),
        ("{question} {options}\n---\nnow", r"prompt\.txt: .* options, question$"),  # slots of the head do not count
        ("{question} {options} {answer}", r"subject, .*question_type.* answer$"),
        ("{colour}\n---\n{question} {options} {2}", r"subject.* 2, colour$"),
        ("", r"options, question$"),
        ("痛风 {question} {options}".encode("gb18030"), r"prompt\.txt:1: not UTF-8"),
    ],
)
def test_invalid_prompt_file_is_rejected_with_its_slots(prompt_file, content, message):
    with pytest.raises(UserError, match=message):
        load_prompt(str(prompt_file(content)))


def test_unknown_prompt_is_rejected_with_the_published_ones(tmp_path):
    for path in (tmp_path / "cmbb", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=rf"{path}: neither own, cmb, cmmlu, cmexam, huatuo, huatuo-o1 nor a file"
        ):
            load_prompt(str(path))


# --- slots ---


BRACES = ["{question}", "{{options}}", "{item}", "{answer}", "{letter} {text}", "{}", "{0}", "%s \\1 \\g<0>"]


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("braces", BRACES)
def test_braces_in_a_question_are_not_filled(name, braces):
    """The filled prompt equals the one of a marker that is replaced afterwards."""
    about = DOCTOR | {"exam_class": "EXAM"}

    def filled(mark):
        row = make_row("1", f"Q{mark}?", [f"one{mark}", "two"], exam="cmb", topic=mark, metadata=about)
        solved = make_row("2", f"S{mark}?", ["one", f"two{mark}"], exam="cmb", topic=mark, metadata=about)
        return [full_prompt(row, name), full_prompt(row, name, [solved])]

    assert filled(braces) == [text.replace("MARK", braces) for text in filled("MARK")]
    assert filled(braces)[1].count(braces) >= 4


@pytest.mark.parametrize(
    ("row", "name", "message"),
    [
        (OWN[0], "cmb", "question a has no exam_class"),
        (OWN[0], "cmmlu", "question a has no subject"),
        (CMB[0], "cmmlu", "question 1 has no subject"),
        (CMEXAM[1], "{exam_subject}: {question} {options}", "question val-1 has no exam_subject"),
        (CMEXAM[1], "{exam_type}\n---\n{question} {options}", "question val-1 has no exam_type"),
    ],
)
def test_missing_slot_value_is_reported_with_question_and_slot(prompt_file, tokenizer, row, name, message):
    name = str(prompt_file(name)) if "{" in name else name
    with pytest.raises(UserError, match=message):
        make_prompter(tokenizer, raw=True, prompt=name).prompt_question(row, [], 1000)


def test_missing_slot_value_of_a_few_shot_example_is_reported(tokenizer):
    with pytest.raises(UserError, match="question val-0 has no exam_class"):
        make_prompter(tokenizer, raw=True, prompt="cmb").prompt_question(CMB[0], CMEXAM[:1], 1000)


# --- few-shot examples ---


def test_few_shot_examples_are_the_first_of_the_same_subject():
    def plain(row, pool, n):
        same_kind, usable = [], []
        for shot in pool:
            if not shot.options or shot.answer == "" or shot.question == row.question:
                continue
            usable.append(shot)
            same = all(shot.metadata.get(key) == row.metadata.get(key) for key in ("exam_type", "exam_class"))
            if same if row.exam == "cmb" and shot.exam == "cmb" else shot.topic == row.topic:
                same_kind.append(shot)
        return (same_kind if same_kind else usable)[:n]

    rng, rows = random.Random(0), {"cmb": [], "cmmlu": []}
    for i in range(60):
        about = {"exam_type": rng.choice("MN"), "exam_class": rng.choice("XY"), "question_type": rng.choice("ST")}
        row = make_row(str(i), f"question {rng.randrange(40)}", "ab", rng.choice(["A", "B", ""]),
                          exam="cmb", metadata=about, topic=rng.choice("PQ"))  # fmt: skip
        rows["cmb"].append(row)
        topic = rng.choice(["anatomy", "genetics", "virology"])
        rows["cmmlu"].append(make_row(str(i), row.question, "ab", row.answer, exam="cmmlu", topic=topic))
    single = make_row("single", "question 5", "ab", exam="cmmlu", topic="nutrition")
    sizes = set()
    for exam, pool in rows.items():
        for row in [*pool, *([single] if exam == "cmmlu" else [])]:
            for n in (0, 1, 4, 100):
                chosen = choose_shots(row, pool, n)
                assert chosen == plain(row, pool, n)
                assert row.question not in [shot.question for shot in chosen]
                sizes.add(len(chosen))
    assert {0, 1, 4} < sizes  # and other sizes where the pool has fewer than 100


def test_free_form_questions_and_those_without_answer_are_no_examples():
    free_form = Row("o", conversation("痛风？", "尿酸"), "痛风？", {}, "尿酸", "anatomy", "zh")
    unanswered = make_row("u", "哮喘？", "甲乙", "", topic="anatomy")
    assert choose_shots(CMMLU[0], [free_form, unanswered, CMMLU[0], CMMLU[1]], 3) == [CMMLU[1]]
    assert choose_shots(CMMLU[0], [free_form, unanswered, CMMLU[0]], 3) == []


@pytest.mark.parametrize("raw", [True, False])
def test_last_few_shot_examples_are_dropped_if_the_context_is_too_short(tokenizer, raw):
    prompter, pool = make_prompter(tokenizer, raw, "cmmlu"), [CMMLU[1], CMMLU[2], *CMEXAM]
    full = [prompter.prompt_question(CMMLU[0], pool[:n], 10**6) for n in range(5)]
    lengths = [len(question.tokens) for question in full]
    assert all(fewer < more for fewer, more in pairwise(lengths))
    for n in range(5):
        assert full[n].shots == n
        assert full[n].text == full_prompt(CMMLU[0], "cmmlu", pool[:n])
        assert full[n].text == full[n].head + compose(CMMLU[0], PROMPTS["cmmlu"], pool[:n])[1]
        assert [full[n].head.count(shot.question) for shot in pool] == [1] * n + [0] * (4 - n)
        # The prompt must leave room for a token of the answer.
        assert prompter.prompt_question(CMMLU[0], pool, lengths[n] + 1) == full[n]
        assert prompter.prompt_question(CMMLU[0], pool, lengths[n]) == full[max(n - 1, 0)]
    assert prompter.prompt_question(CMMLU[0], pool, 5) == full[0]  # too long, which the scoring method reports


# --- tokens ---


def test_prompt_is_one_user_message_or_raw_text(tokenizer):
    text = full_prompt(CMMLU[0])
    chat, raw = (make_prompter(tokenizer, raw).prompt_question(CMMLU[0], [], 1000).tokens for raw in (False, True))
    assert raw == tokenizer.start + tokenizer.encode(text)
    assert tokenizer.start  # otherwise its absence would not show
    assert chat == tokenizer.chat([{"role": "user", "content": text}])


def test_free_form_question_has_no_prompt(tokenizer):
    system = {"role": "system", "content": "Be short."}
    messages = [system, *conversation("gout?", "acid"), *conversation("asthma?", "x")]
    row = Row("o", messages, "asthma?", {}, "x", "", "en")
    for name in ("auto", "cmb"):
        chat, raw = (make_prompter(tokenizer, raw, name).prompt_question(row, OWN, 1000) for raw in (False, True))
        assert chat.tokens == tokenizer.chat(messages[:-1])
        assert (chat.text, chat.head, chat.shots) == ("asthma?", "", 0)
        assert (raw.text, raw.head, raw.shots) == ("Be short.\ngout?\nacid\nasthma?", "", 0)
        assert raw.tokens == tokenizer.start + tokenizer.encode(raw.text)


@pytest.fixture(scope="module")
def conftest_dir(tmp_path_factory, make_tokenizer):
    """conftest's tokenizer with the special tokens of every chat format."""
    directory = tmp_path_factory.mktemp("all")
    trained = make_tokenizer(control_symbols=[*MARKERS, "<reserved_106>", "<reserved_107>"])
    (directory / "tokenizer.model").write_bytes(trained.backend.processor.serialized_model_proto())
    user, assistant = (trained.backend.token_to_id(f"<reserved_{n}>") for n in (106, 107))
    (directory / "generation_config.json").write_text(
        json.dumps({"user_token_id": user, "assistant_token_id": assistant}), encoding="utf-8"
    )
    return directory


@pytest.fixture(params=["conftest", "sentencepiece", "bpe"])
def tokenizer_dir(request, conftest_dir):
    if request.param == "bpe":
        pytest.importorskip("tokenizers")
    return conftest_dir if request.param == "conftest" else TOKENIZER_FIXTURES / request.param


def load_tokenizers(directory):
    for name in CHAT_FORMATS:
        try:
            yield load_tokenizer(directory, name)
        except UserError as error:
            assert "needs the token" in str(error)  # noqa: PT017


def split_letters(prompter, text, tokens, letters):
    """Return the prompt and the scored tokens of each letter, from its example."""
    row = Row("1", [], text, dict.fromkeys(letters, "x"), "", "", "en")
    examples = prompter.letter_examples(PromptedQuestion(row, text, tokens, "", 0))
    assert list(examples) == list(letters)
    prompts, scored = [], []
    for example in examples.values():
        scored.append([target for target in example.targets if target != IGNORE])
        n = len(example.tokens) + 1 - len(scored[-1])
        assert example.targets[: n - 1] == [IGNORE] * (n - 1)
        assert example.tokens[n:] == scored[-1][:-1]
        prompts.append(example.tokens[:n])
    assert all(prompt == prompts[0] for prompt in prompts)
    return prompts[0], scored


def test_letter_examples_are_prefixes_of_the_whole_conversation(tokenizer_dir):
    tokenizers, extended, spelled = list(load_tokenizers(tokenizer_dir)), 0, 0
    assert len(tokenizers) == len(CHAT_FORMATS) if tokenizer_dir.parent != TOKENIZER_FIXTURES else len(tokenizers) > 3
    for tokenizer in tokenizers:
        prompter = make_prompter(tokenizer, raw=False)
        for row, options in ((OWN[0], "AB"), (CMB[1], "ABC"), (CMMLU[0], "BCDE"), (CMEXAM[0], "ABCDEFG")):
            question = prompter.prompt_question(row, [], 1000)
            prompt, letters = split_letters(prompter, question.text, question.tokens, options)
            assert prompt[: len(question.tokens)] == question.tokens
            for letter, ids in zip(options, letters, strict=True):
                whole = tokenizer.chat(conversation(question.text, letter))
                assert prompt + ids == whole[: len(prompt + ids)]
                assert tokenizer.decode(ids).strip() == letter
                assert tokenizer.decode(whole[len(prompt + ids) :]).strip() == ""  # nothing of the letter is missing
            assert all(letters)
            assert len(set(map(tuple, letters))) == len(options)
            # The common beginning of all letters, except for the last token, is part of the prompt.
            assert any(len(ids) == 1 for ids in letters) or len({ids[0] for ids in letters}) > 1
            extended += len(prompt) > len(question.tokens)
            spelled += any(len(ids) > 1 for ids in letters)
    if tokenizer_dir.parent != TOKENIZER_FIXTURES:  # "▁A" is one token, B is "▁" and a byte
        assert extended
        assert spelled


def test_raw_letter_follows_an_ascii_character_after_a_space(tokenizer_dir):
    texts = [("题目：痛风？\n答案是：", ""), ("Which is it?\nA. uric acid\nB. a cough\n", ""), ("痛风？\nA. 尿酸", "")]
    if tokenizer_dir.parent == TOKENIZER_FIXTURES:  # the other tokenizer removes a space at the start of a text
        texts += [("Question: gout?\nAnswer:", " "), ("问题: 痛风, \n答案:", " "), ("Which?\nA. uric acid", " ")]
    tokenizer = load_tokenizer(tokenizer_dir)
    prompter = make_prompter(tokenizer, raw=True)
    for text, space in texts:
        prompt, letters = split_letters(prompter, text, prompter.tokens(text), "ABCD")
        for letter, ids in zip("ABCD", letters, strict=True):
            assert prompt + ids == tokenizer.start + tokenizer.encode(text + space + letter)


def test_space_that_is_a_separate_token_belongs_to_the_prompt():
    tokenizer = load_tokenizer(TOKENIZER_FIXTURES / "sentencepiece", "mistral")
    token_to_id = tokenizer.backend.token_to_id
    space, letters = token_to_id("▁"), [token_to_id(f"<0x{ord(letter):X}>") for letter in "ABCD"]
    prompter = make_prompter(tokenizer, raw=False)
    assert split_letters(prompter, "x", [1, 2], "ABCD") == ([1, 2, space], [[i] for i in letters])
    # "▁G" is one token: then nothing is common, and A keeps its space.
    assert split_letters(prompter, "x", [1, 2], "AG") == ([1, 2], [[space, letters[0]], [token_to_id("▁G")]])


def test_every_letter_keeps_a_token_to_be_scored(tokenizer, monkeypatch):
    prompter, answers = make_prompter(tokenizer, raw=True), {"A": [5, 6], "B": [5, 6, 7], "C": [5, 6, 8]}
    monkeypatch.setattr(prompter, "example", lambda text, letter: answer_example([1], answers[letter]))
    assert split_letters(prompter, "x", [1], "ABC") == ([1, 5], [[6], [6, 7], [6, 8]])


@pytest.mark.parametrize("raw", [True, False])
def test_letters_with_equal_tokens_are_rejected(tmp_path, raw):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ABCD abc"] * 4), model_writer=model, model_type="char", vocab_size=12, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    prompter = make_prompter(load_tokenizer(tmp_path, "plain"), raw)
    assert len(split_letters(prompter, "a", [1], "ABCD")[1]) == 4
    for options in ("XY", "ABXY"):  # X and Y are both the unknown token
        with pytest.raises(UserError, match=f"letters {', '.join(options)}: score text"):
            split_letters(prompter, "a", [1], options)


def test_example_has_its_targets_on_the_answer(tokenizer):
    for raw in (False, True):
        tokens, targets = make_prompter(tokenizer, raw).example("痛风的关键检查是？", "尿酸")
        if raw:
            whole, end = tokenizer.start + tokenizer.encode("痛风的关键检查是？尿酸"), []
        else:
            whole, end = tokenizer.chat(conversation("痛风的关键检查是？", "尿酸")), list(tokenizer.eos_ids)
        scored = [i for i in targets if i != IGNORE]
        assert tokens == whole[:-1]
        assert targets == [IGNORE] * (len(tokens) - len(scored)) + scored
        assert scored == whole[-len(scored) :]
        assert tokenizer.decode(scored) == "尿酸"
        assert scored[len(scored) - len(end) :] == end


def test_space_after_the_answer_is_not_scored():
    base = ROOT / "data" / "base"
    for name in ("llama2", "minidoctor", "mistral"):
        prompter = make_prompter(load_tokenizer(base, name), raw=False)
        _, letters = split_letters(prompter, "?", prompter.tokens("?"), "ABCD")
        assert [len(ids) for ids in letters] == [1] * 4, name
        assert len({ids[0] for ids in letters}) == 4


@pytest.mark.parametrize("name", ["own", "cmb", "huatuo"])
def test_raw_prompt_separates_the_letter_from_the_last_option(name, tokenizer):
    row = Row("1", [], "Which?", {"A": "gout", "B": "flu"}, "B", "", "en", exam="cmb")
    raw, chat = (make_prompter(tokenizer, raw, name).prompt_question(row, [], 1000).text for raw in (True, False))
    assert raw.endswith("flu\n答：" if name == "cmb" else "flu\n")
    assert chat.endswith("flu")
