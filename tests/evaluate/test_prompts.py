import io
import json
import random
from itertools import pairwise

import pytest
import sentencepiece
from paths import FIXTURES, ROOT

from minidoctor.batching import IGNORE
from minidoctor.evaluate.prompts import PROMPTS, SUBJECTS, Asker, choose_prompt, choose_shots, compose, read_prompt
from minidoctor.questions.rows import Row, conversation, format_multiple_choice
from minidoctor.text.chat_formats import CHAT_FORMATS
from minidoctor.text.tokenizer import load_tokenizer

TOKENIZER_FIXTURES = FIXTURES / "tokenizers"
MARKERS = sorted({name for form in CHAT_FORMATS.values() for name in form.needs if not name.startswith("{")})


def question_of(id, question, options, answer="A", **more):
    options = dict(zip("ABCDEFG", options, strict=False))
    messages = conversation(*format_multiple_choice(question, options, answer))
    fields = {"topic": "", "language": "zh", "multiple_answers": len(answer) > 1} | more
    return Row(id=id, messages=messages, question=question, options=options, answer=answer, **fields)


DOCTOR = {"exam_type": "医师考试", "exam_class": "规培结业", "question_type": "单项选择题"}
CMB = [
    question_of("1", "痛风的关键检查是", ["尿酸", "心电图"], exam="cmb", metadata=DOCTOR),
    question_of("2", "哮喘的症状有", ["喘息", "咳嗽", "脱发"], "AB", exam="cmb",
                metadata=DOCTOR | {"question_type": "多项选择题"}),
    question_of("3", "肺炎多见于", ["肺", "心"], exam="cmb", metadata={}),
    question_of("4", "下列正确的是", ["甲类", "乙类", "丙类"], "BC", exam="cmb", metadata={"exam_type": "医师考试"}),
]  # fmt: skip
CMEXAM = [
    question_of("val-0", "痛风的关键检查是", ["尿酸", "心电图", "肺功能"], exam="cmexam"),
    question_of("val-1", "哮喘的症状是", ["脱发", "喘息"], "B", exam="cmexam"),
]
CMMLU = [
    question_of("anatomy-0", "听觉中枢位于", ["额叶", "颞叶", "枕叶", "顶叶"], "B", exam="cmmlu", topic="anatomy"),
    question_of("anatomy-1", "女性生殖腺是", ["卵巢", "子宫", "输卵管", "阴道"], "A", exam="cmmlu", topic="anatomy"),
    question_of("anatomy-2", "最大的腺体是", ["脾", "胰", "肝", "肾"], "C", exam="cmmlu", topic="anatomy"),
]
OWN = [
    question_of("a", "What is the key test for gout?", ["uric acid", "a cough"]),
    question_of("b", "Where is asthma treated?", ["rheumatology", "pneumology"], "B"),
]


def text_of(row, name="auto", shots=()):
    return "".join(compose(row, choose_prompt(name, row), list(shots)))


# --- the named prompts ---


def test_cmb_is_asked_as_its_repository_asks():
    """https://github.com/FreedomIntelligence/CMB, workers/base.py; an option of one character stays here."""
    ending = "不需要做任何分析和解释，直接输出答案选项。\n"
    assert text_of(CMB[0]) == (
        f"以下是中国医师考试中规培结业考试的一道单项选择题，{ending}痛风的关键检查是\nA. 尿酸\nB. 心电图"
    )
    assert text_of(CMB[1]) == (
        f"以下是中国医师考试中规培结业考试的一道多项选择题，{ending}哮喘的症状有\nA. 喘息\nB. 咳嗽\nC. 脱发"
    )
    # What says too little of itself is put without it, and not by what kind its answer is: that would tell.
    assert text_of(CMB[2]) == f"以下是一道选择题，{ending}肺炎多见于\nA. 肺\nB. 心"
    assert text_of(CMB[3]) == f"以下是一道选择题，{ending}下列正确的是\nA. 甲类\nB. 乙类\nC. 丙类"


def test_cmb_with_shots_is_a_dialogue_of_questions_and_letters():
    assert text_of(CMB[0], shots=[CMB[1], CMB[2]]) == (
        "问：以下是中国医师考试中规培结业考试的一道多项选择题，不需要做任何分析和解释，直接输出答案选项。\n"
        "哮喘的症状有\nA. 喘息\nB. 咳嗽\nC. 脱发\n答：AB\n"
        "问：以下是一道选择题，不需要做任何分析和解释，直接输出答案选项。\n肺炎多见于\nA. 肺\nB. 心\n答：A\n"
        "问：以下是中国医师考试中规培结业考试的一道单项选择题，不需要做任何分析和解释，直接输出答案选项。\n"
        "痛风的关键检查是\nA. 尿酸\nB. 心电图\n答："
    )


def test_cmmlu_is_asked_as_its_repository_asks():
    """https://github.com/haonan-li/CMMLU, src/mp_utils.py"""
    head = "以下是关于解剖学的单项选择题，请直接给出正确答案的选项。\n\n"
    asked = "题目：听觉中枢位于\nA. 额叶\nB. 颞叶\nC. 枕叶\nD. 顶叶\n答案是："
    assert text_of(CMMLU[0]) == head + asked
    assert text_of(CMMLU[0], shots=CMMLU[1:]) == (
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
        ("儿科学", "儿科学"),  # a subject that CMMLU has not is called what it is called
    ],
)
def test_cmmlus_head_names_the_subject_in_chinese(topic, name):
    row = question_of(f"{topic}-0", "下列正确的是", "甲乙丙丁", exam="cmmlu", topic=topic)
    assert text_of(row).startswith(f"以下是关于{name}的单项选择题，请直接给出正确答案的选项。\n\n题目：下列")
    assert len(SUBJECTS) == 8


def test_cmexam_is_asked_as_its_repository_asks():
    """https://github.com/williamliujl/CMExam, src/preprocess/prompt_templates.py, and its first word of the answer."""
    asked = "问题: 痛风的关键检查是, \n 选项: A 尿酸\nB 心电图\nC 肺功能\n答案:"
    assert text_of(CMEXAM[0]) == asked
    assert text_of(CMEXAM[0], shots=CMEXAM[1:]) == ("问题: 哮喘的症状是, \n 选项: A 脱发\nB 喘息\n答案: B\n\n" + asked)


def test_huatuogpt_2_asks_with_the_question_type_or_without():
    """https://github.com/FreedomIntelligence/HuatuoGPT-II, evaluation/eval_qa.py"""
    asked = "请回答下面选择题。\n[单项选择题]痛风的关键检查是\nA. 尿酸\nB. 心电图"
    assert text_of(CMB[0], "huatuo") == asked
    assert text_of(CMB[2], "huatuo") == "请回答下面选择题。\n[选择题]肺炎多见于\nA. 肺\nB. 心"
    bare = "请回答下面选择题。\n哮喘的症状是\nA. 脱发\nB. 喘息"
    assert text_of(CMEXAM[1], "huatuo") == bare
    assert text_of(CMB[0], "huatuo", shots=[CMEXAM[1]]) == f"{bare}\nB\n\n{asked}\n"


def test_ones_own_questions_are_asked_as_in_training():
    row, solved = OWN
    assert text_of(row) == "What is the key test for gout?\nA. uric acid\nB. a cough" == row.messages[0]["content"]
    assert text_of(row, shots=[solved]) == (
        "Where is asthma treated?\nA. rheumatology\nB. pneumology\nB\n\n"
        "What is the key test for gout?\nA. uric acid\nB. a cough\n"
    )


@pytest.mark.parametrize("name", PROMPTS)
def test_any_named_prompt_can_be_chosen_for_a_question_that_has_what_it_asks_for(name):
    row = question_of("1", "痛风？", ["尿酸", "心电图"], exam="cmb", metadata=DOCTOR, topic="anatomy")
    assert choose_prompt(name, row) == PROMPTS[name]
    assert all(text in text_of(row, name) for text in ("痛风？", "尿酸", "心电图"))
    assert choose_prompt("auto", row) == PROMPTS["cmb"]


def test_auto_is_the_benchmarks_own():
    for rows, name in ((CMB, "cmb"), (CMMLU, "cmmlu"), (CMEXAM, "cmexam"), (OWN, "own")):
        assert all(choose_prompt("auto", row) is PROMPTS[name] for row in rows)


# --- a prompt of one's own ---


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
def test_a_file_is_a_prompt_with_its_head_above_three_dashes(prompt_file, ending, newline, mark):
    text = "你是医生。{subject}\n---\n不是头\n---\n{question}？\n{options}\n\n答案：" + ending
    path = prompt_file(mark + text.replace("\n", newline).encode())
    prompt = choose_prompt(str(path), CMMLU[0])
    # The last such line counts; one newline at the end belongs to the editor.
    assert compose(CMMLU[0], prompt, []) == (
        "你是医生。解剖学\n---\n不是头\n",
        "听觉中枢位于？\nA. 额叶\nB. 颞叶\nC. 枕叶\nD. 顶叶\n\n答案：",
    )
    head, asked = compose(CMMLU[0], prompt, CMMLU[1:2])
    solved = "女性生殖腺是？\nA. 卵巢\nB. 子宫\nC. 输卵管\nD. 阴道\n\n答案：A\n\n"
    assert head == "你是医生。解剖学\n---\n不是头\n" + solved
    assert asked == compose(CMMLU[0], prompt, [])[1]


def test_a_file_without_dashes_has_no_head(prompt_file):
    prompt = read_prompt(prompt_file("{question} --- {options}\n\n"))
    assert compose(OWN[0], prompt, []) == ("", "What is the key test for gout? --- A. uric acid\nB. a cough\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{options}", r"prompt\.txt: needs \{question\} and \{options\}.* question$"),
        ("{question}", r"prompt\.txt: needs .* options$"),
        (
            "{question} {options}\n---\nnow",
            r"prompt\.txt: needs .* options, question$",
        ),  # in the head they do not count
        ("{question} {options} {answer}", r"may have subject, .*question_type.* answer$"),
        ("{colour}\n---\n{question} {options} {2}", r"may have .* 2, colour$"),
        ("", r"needs .* options, question$"),
        ("痛风 {question} {options}".encode("gb18030"), r"prompt\.txt: not UTF-8"),
    ],
)
def test_a_file_that_is_no_prompt_is_refused_with_its_name(prompt_file, content, message):
    with pytest.raises(ValueError, match=message):
        read_prompt(prompt_file(content))


def test_a_name_that_is_neither_a_prompt_nor_a_file_is_refused_with_what_there_is(tmp_path):
    for path in (tmp_path / "cmbb", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{path}: neither own, cmb, cmmlu, cmexam, huatuo nor a file"):
            choose_prompt(str(path), OWN[0])


# --- what stands in the slots ---


BRACES = ["{question}", "{{options}}", "{item}", "{answer}", "{letter} {text}", "{}", "{0}", "%s \\1 \\g<0>"]


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("odd", BRACES)
def test_braces_in_a_question_stay_what_they_are(name, odd):
    """What is filled in equals a mark filled in and then replaced."""
    about = DOCTOR | {"exam_class": "EXAM"}

    def filled(mark):
        row = question_of("1", f"Q{mark}?", [f"one{mark}", "two"], exam="cmb", topic=mark, metadata=about)
        solved = question_of("2", f"S{mark}?", ["one", f"two{mark}"], exam="cmb", topic=mark, metadata=about)
        return [text_of(row, name), text_of(row, name, [solved])]

    assert filled(odd) == [text.replace("MARK", odd) for text in filled("MARK")]
    assert filled(odd)[1].count(odd) >= 4


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
def test_a_prompt_that_asks_for_what_a_question_lacks_names_both(prompt_file, tokenizer, row, name, message):
    name = str(prompt_file(name)) if "{" in name else name
    with pytest.raises(ValueError, match=f"{message}, which the prompt asks for"):
        Asker(tokenizer, raw=True).put(row, name, [], 1000)


def test_a_solved_question_that_lacks_what_the_prompt_asks_for_is_named_too(tokenizer):
    with pytest.raises(ValueError, match="question val-0 has no exam_class"):
        Asker(tokenizer, raw=True).put(CMB[0], "cmb", CMEXAM[:1], 1000)


# --- solved questions in front ---


def test_solved_questions_are_the_first_of_the_same_subject():
    def plain(row, pool, n):
        of_its_kind, of_any = [], []
        for shot in pool:
            if not shot.options or shot.answer == "" or shot.question == row.question:
                continue
            of_any.append(shot)
            same = all(shot.metadata.get(key) == row.metadata.get(key) for key in ("exam_type", "exam_class"))
            if same if row.exam == "cmb" and shot.exam == "cmb" else shot.topic == row.topic:
                of_its_kind.append(shot)
        return (of_its_kind if of_its_kind else of_any)[:n]

    rng, rows = random.Random(0), {"cmb": [], "cmmlu": []}
    for i in range(60):
        about = {"exam_type": rng.choice("MN"), "exam_class": rng.choice("XY"), "question_type": rng.choice("ST")}
        row = question_of(str(i), f"question {rng.randrange(40)}", "ab", rng.choice(["A", "B", ""]),
                          exam="cmb", metadata=about, topic=rng.choice("PQ"))  # fmt: skip
        rows["cmb"].append(row)
        topic = rng.choice(["anatomy", "genetics", "virology"])
        rows["cmmlu"].append(question_of(str(i), row.question, "ab", row.answer, exam="cmmlu", topic=topic))
    alone = question_of("alone", "question 5", "ab", exam="cmmlu", topic="nutrition")
    sizes = set()
    for exam, pool in rows.items():
        for row in [*pool, *([alone] if exam == "cmmlu" else [])]:
            for n in (0, 1, 4, 100):
                chosen = choose_shots(row, pool, n)
                assert chosen == plain(row, pool, n)
                assert row.question not in [shot.question for shot in chosen]
                sizes.add(len(chosen))
    assert {0, 1, 4} < sizes  # among 100 asked for, as many as there are


def test_open_questions_and_those_without_an_answer_solve_nothing():
    open_one = Row("o", conversation("痛风？", "尿酸"), "痛风？", {}, "尿酸", "anatomy", "zh")
    unsolved = question_of("u", "哮喘？", "甲乙", "", topic="anatomy")
    assert choose_shots(CMMLU[0], [open_one, unsolved, CMMLU[0], CMMLU[1]], 3) == [CMMLU[1]]
    assert choose_shots(CMMLU[0], [open_one, unsolved, CMMLU[0]], 3) == []


@pytest.mark.parametrize("raw", [True, False])
def test_where_the_context_is_too_short_the_last_solved_questions_are_left_out(tokenizer, raw):
    asker, pool = Asker(tokenizer, raw), [CMMLU[1], CMMLU[2], *CMEXAM]
    whole = [asker.put(CMMLU[0], "cmmlu", pool[:n], 10**6) for n in range(5)]
    lengths = [len(one.tokens) for one in whole]
    assert all(fewer < more for fewer, more in pairwise(lengths))
    for n in range(5):
        assert whole[n].shots == n
        assert whole[n].text == text_of(CMMLU[0], "cmmlu", pool[:n])
        assert whole[n].text == whole[n].head + compose(CMMLU[0], PROMPTS["cmmlu"], pool[:n])[1]
        assert [whole[n].head.count(shot.question) for shot in pool] == [1] * n + [0] * (4 - n)
        # The prompt must leave room for a token of the answer.
        assert asker.put(CMMLU[0], "cmmlu", pool, lengths[n] + 1) == whole[n]
        assert asker.put(CMMLU[0], "cmmlu", pool, lengths[n]) == whole[max(n - 1, 0)]
    assert asker.put(CMMLU[0], "cmmlu", pool, 5) == whole[0]  # too long, and said where it is scored


# --- tokens ---


def test_a_question_is_one_message_of_the_users_or_raw_text(tokenizer):
    text = text_of(CMMLU[0])
    assert Asker(tokenizer, raw=True).put(CMMLU[0], "auto", [], 1000).tokens == tokenizer.start + tokenizer.encode(text)
    assert tokenizer.start  # so that it shows if it is missing
    chat = Asker(tokenizer, raw=False).put(CMMLU[0], "auto", [], 1000).tokens
    assert chat == tokenizer.chat([{"role": "user", "content": text}])


def test_an_open_question_is_put_as_it_is(tokenizer):
    system = {"role": "system", "content": "Be short."}
    messages = [system, *conversation("gout?", "acid"), *conversation("asthma?", "x")]
    row = Row("o", messages, "asthma?", {}, "x", "", "en")
    for name in ("auto", "cmb"):
        chat, raw = (Asker(tokenizer, raw).put(row, name, OWN, 1000) for raw in (False, True))
        assert chat.tokens == tokenizer.chat(messages[:-1])
        assert raw.tokens == tokenizer.start + tokenizer.encode("asthma?")
        assert (chat.text, chat.head, chat.shots) == (raw.text, raw.head, raw.shots) == ("asthma?", "", 0)


@pytest.fixture(scope="module")
def conftest_dir(tmp_path_factory, make_tokenizer):
    """conftest's tokenizer with the control tokens of every chat format."""
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


def formats_of(directory):
    for name in CHAT_FORMATS:
        try:
            yield load_tokenizer(directory, name)
        except ValueError as error:
            assert "needs the token" in str(error)  # noqa: PT017


def test_letters_are_the_tokens_of_the_whole_conversation(tokenizer_dir):
    tokenizers, moved, spelled = list(formats_of(tokenizer_dir)), 0, 0
    assert len(tokenizers) == len(CHAT_FORMATS) if tokenizer_dir.parent != TOKENIZER_FIXTURES else len(tokenizers) > 3
    for tokenizer in tokenizers:
        asker = Asker(tokenizer, raw=False)
        for row, options in ((OWN[0], "AB"), (CMB[1], "ABC"), (CMMLU[0], "BCDE"), (CMEXAM[0], "ABCDEFG")):
            asked = asker.put(row, "auto", [], 1000)
            prompt, letters = asker.letters(asked.text, asked.tokens, list(options))
            assert prompt[: len(asked.tokens)] == asked.tokens
            for letter, ids in zip(options, letters, strict=True):
                whole = tokenizer.chat(conversation(asked.text, letter))
                assert prompt + ids == whole[: len(prompt + ids)]
                assert tokenizer.decode(ids).strip() == letter
                assert tokenizer.decode(whole[len(prompt + ids) :]).strip() == ""  # it is there to its end
            assert all(letters)
            assert len(set(map(tuple, letters))) == len(options)
            # All that the letters have in common but for their last token is part of the prompt.
            assert any(len(ids) == 1 for ids in letters) or len({ids[0] for ids in letters}) > 1
            moved += len(prompt) > len(asked.tokens)
            spelled += any(len(ids) > 1 for ids in letters)
    if tokenizer_dir.parent != TOKENIZER_FIXTURES:  # "▁A" is a piece, B is "▁" and a byte
        assert moved
        assert spelled


def test_a_letter_in_raw_text_is_written_as_people_write_it(tokenizer_dir):
    texts = [("题目：痛风？\n答案是：", ""), ("Which is it?\nA. uric acid\nB. a cough\n", ""), ("痛风？\nA. 尿酸", "")]
    if tokenizer_dir.parent == TOKENIZER_FIXTURES:  # the other takes away a space in front of a text
        texts += [("Question: gout?\nAnswer:", " "), ("问题: 痛风, \n答案:", " "), ("Which?\nA. uric acid", " ")]
    tokenizer = load_tokenizer(tokenizer_dir)
    asker = Asker(tokenizer, raw=True)
    for text, space in texts:
        prompt, letters = asker.letters(text, asker.tokens(text), list("ABCD"))
        for letter, ids in zip("ABCD", letters, strict=True):
            assert prompt + ids == tokenizer.start + tokenizer.encode(text + space + letter)


def test_a_space_that_is_a_token_of_its_own_belongs_to_the_prompt():
    tokenizer = load_tokenizer(TOKENIZER_FIXTURES / "sentencepiece", "mistral")
    space, letters = tokenizer.backend.token_to_id("▁"), [tokenizer.backend.token_to_id(f"<0x{ord(letter):X}>") for letter in "ABCD"]
    asker = Asker(tokenizer, raw=False)
    assert asker.letters("x", [1, 2], list("ABCD")) == ([1, 2, space], [[i] for i in letters])
    # "▁G" is one piece: then nothing is common, and the others keep their space.
    whole = tokenizer.backend.token_to_id("▁G")
    assert asker.letters("x", [1, 2], list("AG")) == ([1, 2], [[space, letters[0]], [whole]])


def test_a_letter_keeps_a_token_to_be_scored(tokenizer, monkeypatch):
    asker, written = Asker(tokenizer, raw=True), {"A": [5, 6], "B": [5, 6, 7], "C": [5, 6, 8]}
    monkeypatch.setattr(asker, "answer_tokens", lambda text, letter: written[letter])
    assert asker.letters("x", [1], list("ABC")) == ([1, 5], [[6], [6, 7], [6, 8]])


@pytest.mark.parametrize("raw", [True, False])
def test_letters_that_are_the_same_to_the_tokenizer_are_refused(tmp_path, raw):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ABCD abc"] * 4), model_writer=model, model_type="char", vocab_size=12, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    asker = Asker(load_tokenizer(tmp_path, "plain"), raw)
    assert len(asker.letters("a", [1], list("ABCD"))[1]) == 4
    for options in ("XY", "ABXY"):  # both are "unknown"
        with pytest.raises(ValueError, match=rf"letters {', '.join(options)} alike: score text"):
            asker.letters("a", [1], list(options))


def test_an_example_has_its_targets_on_the_answer(tokenizer):
    for raw in (False, True):
        tokens, targets = Asker(tokenizer, raw).example("痛风的关键检查是？", "尿酸")
        if raw:
            whole, end = tokenizer.start + tokenizer.encode("痛风的关键检查是？尿酸"), []
        else:
            whole, end = tokenizer.chat(conversation("痛风的关键检查是？", "尿酸")), list(tokenizer.eos_ids)
        learned = [i for i in targets if i != IGNORE]
        assert tokens == whole[:-1]
        assert targets == [IGNORE] * (len(tokens) - len(learned)) + learned
        assert learned == whole[-len(learned) :]
        assert tokenizer.decode(learned) == "尿酸"
        assert learned[len(learned) - len(end) :] == end


def test_a_space_behind_the_answer_is_no_part_of_the_letter():
    base = ROOT / "data" / "base"
    for name in ("llama2", "minidoctor", "mistral"):
        asker = Asker(load_tokenizer(base, name), raw=False)
        _, letters = asker.letters("?", asker.tokens("?"), list("ABCD"))
        assert [len(ids) for ids in letters] == [1] * 4, name
        assert len({ids[0] for ids in letters}) == 4


@pytest.mark.parametrize("name", ["own", "cmb", "huatuo"])
def test_raw_the_letter_does_not_stand_right_behind_the_last_option(name, tokenizer):
    row = Row("1", [], "Which?", {"A": "gout", "B": "flu"}, "B", "", "en", exam="cmb")
    raw, chat = (Asker(tokenizer, raw=raw).put(row, name, [], 1000).text for raw in (True, False))
    assert raw.endswith("flu\n答：" if name == "cmb" else "flu\n")
    assert chat.endswith("flu")
