import csv
import io
import json
import random

import pytest
from paths import SHARED

from minidoctor.questions.cmb import read_answers
from minidoctor.questions.json_rows import read_rows
from minidoctor.questions.read import read_questions
from minidoctor.questions.rows import Row

BOM = "\ufeff"
DATA = SHARED / "data"


def present(name):
    return pytest.mark.skipif(not (DATA / name).exists(), reason=f"{name} was not fetched")


# Questions of our own, in the form of each benchmark.
CMMLU_HEADER = ["", "Question", "A", "B", "C", "D", "Answer"]
CMMLU = [
    ["0", "正常人右肺的肺叶数为", "一叶", "二叶", "三叶", "四叶", "C"],
    ["1", "分泌胰岛素的细胞是", "胰岛α细胞", "胰岛β细胞", "胰岛δ细胞", "胃主细胞", "B"],
    ["2", "下列疾病, 由缺乏维生素C引起的是", "坏血病", "脚气病, 湿性", '所谓"夜盲"', "佝偻病", "A"],
    ["3", "乙型肝炎病毒\n所含的核酸是", "单链RNA", "双链RNA", "单链DNA", "不完全\n双链DNA", "D"],
]
CMEXAM_HEADER = ["Question", "Options", "Answer", "Explanation"]
CMEXAM = [
    ["儿童缺乏维生素D可引起", "A 佝偻病\nB 坏血病\nC 夜盲症\nD 脚气病", "A", "维生素D促进钙的吸收，\n缺乏则骨化不足。"],
    ["属于脂溶性维生素的有", "A. 维生素A\nB. 维生素C\nC. 维生素D\nD. 维生素E\nE. 维生素B1", "DAC", "nan"],
    ["痛风是哪种物质代谢紊乱", "A、嘌呤\nB、糖\nC、铁\nD、铜", "A", ""],
    ["哮喘的典型体征是", "A．呼气相哮鸣音\nB: 三凹征\nC：杵状指\nD  奔马律", "A", "nan"],
]
INTERNAL = {"exam_type": "医师考试", "exam_class": "执业医师", "exam_subject": "内科学"}
SINGLE, SEVERAL = {"question_type": "单项选择题"}, {"question_type": "多项选择题"}
CMB = [
    {
        "id": 11,
        **INTERNAL,
        **SINGLE,
        "question": "原发性高血压最常损害的器官不包括",
        "option": {"A": "心", "B": "脑", "C": "肾", "D": "胰", "E": ""},
        "answer": "D",
    },
    {
        "id": 12,
        **INTERNAL,
        **SEVERAL,
        "question": "甲状腺功能亢进症的表现有",
        "option": {"A": "怕热", "B": "心悸", "C": "便秘", "D": "消瘦", "E": "畏寒"},
        "answer": "DAB",
    },
    {
        "question": "抢救青霉素过敏性休克首选",
        "option": {"A": "肾上腺素", "B": "阿托品", "C": "呋塞米", "D": "地高辛", "E": "胰岛素"},
        **SINGLE,
        "answer": "A",
    },
]
OWN = [
    {"question": "What is measured in gout?", "answer": "uric acid", "explanation": None},
    {"question": "哮喘属于？", "options": {"A": "呼吸科", "B": "风湿科"}, "answer": "A", "explanation": "肺病。"},
    {"question": "Which?", "options": {"A": "gout", "B": "asthma", "C": "flu"}, "answer": "AB"},
]


def csv_text(header, rows, end="\r\n"):
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([header, *rows])
    return text.getvalue()


def texts():
    return {
        "cmmlu": csv_text(CMMLU_HEADER, CMMLU),
        "cmexam": csv_text(CMEXAM_HEADER, CMEXAM, "\n"),
        "cmb": json.dumps(CMB, ensure_ascii=False, indent=1),
        "own": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OWN),
    }


@pytest.fixture
def put(tmp_path):
    """Writes content, as it is, to a file and returns its path."""

    def write(content, name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def asked(question, options):
    return {"role": "user", "content": "".join([question, *(f"\n{letter}. {text}" for letter, text in options)])}


def row(id, question, texts, answer, **more):
    """What a multiple-choice question is to come out as."""
    options = dict(zip("ABCDE", texts, strict=False))
    reply = "\n".join(f"{letter}. {options[letter]}" for letter in answer)
    messages = [asked(question, options.items()), {"role": "assistant", "content": reply}]
    return Row(id, messages, question, options, answer, **{"topic": "", "language": "zh", **more})


ANATOMY, CMEXAM_VAL = {"exam": "cmmlu", "topic": "anatomy"}, {"exam": "cmexam"}
CMMLU_ROWS = [
    row("anatomy-0", "正常人右肺的肺叶数为", ["一叶", "二叶", "三叶", "四叶"], "C", **ANATOMY),
    row("anatomy-1", "分泌胰岛素的细胞是", ["胰岛α细胞", "胰岛β细胞", "胰岛δ细胞", "胃主细胞"], "B", **ANATOMY),
    row("anatomy-2", CMMLU[2][1], ["坏血病", "脚气病, 湿性", '所谓"夜盲"', "佝偻病"], "A", **ANATOMY),
    row("anatomy-3", CMMLU[3][1], ["单链RNA", "双链RNA", "单链DNA", "不完全\n双链DNA"], "D", **ANATOMY),
]
VITAMINS = ["维生素A", "维生素C", "维生素D", "维生素E", "维生素B1"]
CMEXAM_ROWS = [
    row("val-0", CMEXAM[0][0], ["佝偻病", "坏血病", "夜盲症", "脚气病"], "A", explanation=CMEXAM[0][3], **CMEXAM_VAL),
    row("val-1", CMEXAM[1][0], VITAMINS, "ACD", multiple_answers=True, **CMEXAM_VAL),
    row("val-2", CMEXAM[2][0], ["嘌呤", "糖", "铁", "铜"], "A", **CMEXAM_VAL),
    row("val-3", CMEXAM[3][0], ["呼气相哮鸣音", "三凹征", "杵状指", "奔马律"], "A", **CMEXAM_VAL),
]
OF_INTERNAL, THYROID = {"exam": "cmb", "topic": "内科学"}, ["怕热", "心悸", "便秘", "消瘦", "畏寒"]
CMB_ROWS = [
    row("11", CMB[0]["question"], "心脑肾胰", "D", metadata=INTERNAL | SINGLE, **OF_INTERNAL),
    row("12", CMB[1]["question"], THYROID, "ABD", metadata=INTERNAL | SEVERAL, multiple_answers=True, **OF_INTERNAL),
    row("row-3", CMB[2]["question"], CMB[2]["option"].values(), "A", metadata=SINGLE, exam="cmb"),
]
EXPECTED = {"cmmlu": CMMLU_ROWS, "cmexam": CMEXAM_ROWS, "cmb": CMB_ROWS}
NAMES = {"cmmlu": "anatomy", "cmexam": "val", "cmb": "CMB-test"}


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".txt", ""])
@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("start", ["", BOM])
def test_each_benchmark_is_known_by_its_content_and_read(put, kind, suffix, start):
    rows, odd = read_questions(put(start + texts()[kind], NAMES[kind] + suffix))
    assert odd == []
    assert rows == EXPECTED[kind]


def without_ends(one):
    """A row with its line ends, which may stand within cells, made alike."""
    text = json.dumps(vars(one), sort_keys=True)
    return text.replace("\\r\\n", "\\n").replace("\\r", "\\n")


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_end_of_line_will_do(put, kind, end):
    text = texts()[kind].replace("\r\n", "\n").replace("\n", end)
    rows, odd = read_questions(put(text, NAMES[kind] + ".csv"))
    assert odd == []
    assert [without_ends(one) for one in rows] == [without_ends(one) for one in EXPECTED[kind]]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
@pytest.mark.parametrize("start", ["", BOM])
def test_json_lines_of_ones_own_are_read_as_in_training(put, suffix, start):
    path = put(start + texts()["own"], "mine" + suffix)
    assert read_questions(path) == (read_rows(path), [])
    rows = read_questions(path).rows
    assert [(one.id, one.answer, one.explanation, one.exam, one.multiple_answers) for one in rows] == [
        ("1", "uric acid", "", "", False),
        ("2", "A", "肺病。", "", False),
        ("3", "AB", "", "", True),
    ]


def test_a_several_letter_question_is_one_by_its_type_even_if_one_letter_is_right_or_none_is_known(put):
    records = [{**CMB[1], "answer": "A"}, {**CMB[1], "answer": ""}, {**CMB[0], "answer": ""}]
    rows = read_questions(put(json.dumps(records), "q.json")).rows
    assert [(one.answer, one.multiple_answers, len(one.messages)) for one in rows] == [
        ("A", True, 2),
        ("", True, 1),
        ("", False, 1),
    ]


def changed(cells, header, **values):
    return [values.get(name, cell) for name, cell in zip(header, cells, strict=True)]


ODD = {
    "cmmlu": [
        (CMMLU[0][:-1], "not as many cells as columns"),
        ([*CMMLU[0], "A"], "not as many cells as columns"),
        (changed(CMMLU[0], CMMLU_HEADER, Question=" "), '"Question" must be text'),
        (changed(CMMLU[0], CMMLU_HEADER, B=""), '"B" must be text'),
        (changed(CMMLU[0], CMMLU_HEADER, Answer=""), "no answer"),
        (changed(CMMLU[0], CMMLU_HEADER, Answer="E"), "among the options ABCD, got 'E'"),
        (changed(CMMLU[0], CMMLU_HEADER, Answer="CC"), "got 'CC'"),
        (changed(CMMLU[0], CMMLU_HEADER, Answer="三叶"), "got '三叶'"),
    ],
    "cmexam": [
        (CMEXAM[0][:2], "not as many cells as columns"),
        (changed(CMEXAM[0], CMEXAM_HEADER, Question=""), '"Question" must be text'),
        (changed(CMEXAM[0], CMEXAM_HEADER, Options="A 佝偻病\n坏血病"), "a letter in front, got '坏血病'"),
        (changed(CMEXAM[0], CMEXAM_HEADER, Options="A 佝偻病\nA 坏血病"), "a letter in front, got 'A 坏血病'"),
        (changed(CMEXAM[0], CMEXAM_HEADER, Options="A 佝偻病\nB"), "a letter in front, got 'B'"),
        (changed(CMEXAM[0], CMEXAM_HEADER, Options="A 佝偻病"), "at least two letters"),
        (changed(CMEXAM[0], CMEXAM_HEADER, Options=""), "at least two letters"),
        (changed(CMEXAM[0], CMEXAM_HEADER, Answer="nan"), "among the options ABCD, got 'nan'"),
        (changed(CMEXAM[0], CMEXAM_HEADER, Answer=""), "no answer"),
        (changed(CMEXAM[0], CMEXAM_HEADER, Answer="A,B"), "got 'A,B'"),
    ],
    "cmb": [
        ("痛风", "expected a JSON object, got str"),
        (None, "expected a JSON object, got NoneType"),
        ({"id": 11, "answer": "D"}, "given with --answers"),
        ({"id": 11}, 'no "option"'),
        ({**CMB[0], "question": 7}, '"question" must be text, got 7'),
        ({**CMB[0], "option": ["心", "脑"]}, 'no "option"'),
        ({**CMB[0], "option": {"A": "心", "B": None}}, '"B" must be text, got None'),
        ({**CMB[0], "option": {"A": "心", "乙": "脑"}}, "one capital letter"),
        ({**CMB[0], "option": {"A": "心", "D": ""}}, "at least two letters"),
        ({**CMB[0], "answer": "E"}, "among the options ABCD, got 'E'"),
        ({**CMB[0], "answer": "DD"}, "got 'DD'"),
        ({**CMB[0], "answer": ["D"]}, "must be letters, got ['D']"),
        ({**CMB[0], "exam_type": 3}, '"exam_type" must be text, got 3'),
        ({**CMB[0], "question": "半\ud83d"}, "half a character"),
    ],
}


def routed_texts(kind, records, start=""):
    """The text of a file with these records, and the line at which each of them starts."""
    if kind == "cmb":
        parts = [("" if i == 0 else ",\n") + json.dumps(record, indent=1) for i, record in enumerate(records)]
        starts, text = [], start + "[\n"
        for i, part in enumerate(parts):
            starts.append(text.count("\n") + 1 + (i > 0))
            text += part
        return text + "\n]", starts
    header = {"cmmlu": CMMLU_HEADER, "cmexam": CMEXAM_HEADER}[kind]
    starts, text = [], start + csv_text(header, [])
    for cells in records:
        starts.append(text.count("\n") + 1)
        text += csv_text(cells, [])
    return text, starts


GOOD = {"cmmlu": CMMLU, "cmexam": CMEXAM, "cmb": CMB}


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [(kind, bad, message) for kind, cases in ODD.items() for bad, message in cases],
    ids=[f"{kind}-{message}" for kind, cases in ODD.items() for _, message in cases],
)
def test_an_odd_row_is_named_by_file_and_line_and_the_others_are_read(put, kind, bad, message):
    records = [*GOOD[kind][:2], bad, *GOOD[kind][2:]]
    text, starts = routed_texts(kind, records)
    path = put(text, NAMES[kind] + ".csv")
    rows, odd = read_questions(path)
    assert len(odd) == 1
    assert odd[0].startswith(f"{path}:{starts[2]}: ")
    assert message in odd[0]
    assert len(odd[0]) < len(str(path)) + 200
    expected = EXPECTED[kind]
    assert [(one.question, one.options, one.answer) for one in rows] == [
        (one.question, one.options, one.answer) for one in expected
    ]


@pytest.mark.parametrize(("kind", "bad"), [(kind, cases[0][0]) for kind, cases in ODD.items()])
def test_a_file_without_any_question_is_refused_and_its_first_row_named(put, kind, bad):
    path = put(routed_texts(kind, [bad, bad])[0], "q.json")
    with pytest.raises(ValueError, match=r"q\.json:\d+: ") as refused:
        read_questions(path)
    line = read_questions(put(routed_texts(kind, [bad, GOOD[kind][0]])[0], "q.json")).malformed[0]
    assert str(refused.value) == line  # the same words as where other rows are good
    path = put(routed_texts(kind, [])[0], "q.json")
    with pytest.raises(ValueError, match=r"q\.json: no questions$"):
        read_questions(path)


def damage_csv(draw, header, cells):
    """The cells after an accident, and whether they can still be read: True, or None where they are unchanged."""
    place, accident = {name: i for i, name in enumerate(header)}, draw.randrange(8)
    cells = list(cells)
    if accident == 0:
        del cells[draw.randrange(len(cells))]
    elif accident == 1:
        cells[place["Answer"]] = draw.choice(["", " ", "nan", "F", "a", "AA", "A B", "1", "Ａ"])
    elif accident == 2:
        cells[place["Question"]] = draw.choice(["", " ", "\n"])
    elif accident == 3 and "Options" in place:
        lines = cells[place["Options"]].split("\n")
        i, j = draw.sample(range(len(lines)), 2)
        lines[i] = draw.choice([lines[j], lines[i][1:], lines[i][0], "", "a" + lines[i][1:]])
        # An empty last line is none.
        if i == len(lines) - 1 and not lines[i]:
            lines[i] = "?"
        cells[place["Options"]] = "\n".join(lines)
    elif accident == 3:
        cells[place[draw.choice("ABCD")]] = draw.choice(["", "  "])
    elif accident == 4:  # all letters, from the last to the first: still a question
        cells[place["Answer"]] = "DCBA"
        return cells, True
    else:
        return cells, True
    return cells, False


def damage_json(draw, record):
    record, accident = dict(record), draw.randrange(9)
    if accident == 0:
        del record[draw.choice(["question", "option"])]
    elif accident == 1:
        record["answer"] = draw.choice(["nan", "F", "a", "AA", "A,B", 7, ["A"], True])
    elif accident == 2:
        record["question"] = draw.choice(["", " ", None, 5, [], {}])
    elif accident == 3:
        record["option"] = draw.choice(
            [None, [], {}, "A. 心", {"A": "心"}, {"A": "心", "B": 1}, {"甲": "心", "乙": "脑"}]
        )
    elif accident == 4:
        return draw.choice([None, 7, "痛风", [], [record], True, {}]), False
    elif accident == 5:  # the test questions have no answers
        del record["answer"]
        return record, True
    elif accident == 6:
        record["answer"] = "DCBA"
        return record, True
    else:
        return record, True
    return record, False


@pytest.mark.parametrize("kind", GOOD)
def test_every_record_of_a_damaged_file_is_either_read_or_reported(put, kind):
    draw = random.Random(0)
    for trial in range(40):
        chosen = [draw.choice(GOOD[kind]) for _ in range(draw.randint(1, 12))]
        header = {"cmmlu": CMMLU_HEADER, "cmexam": CMEXAM_HEADER}.get(kind)
        results = [damage_csv(draw, header, one) if header else damage_json(draw, one) for one in chosen]
        text, starts = routed_texts(kind, [record for record, _ in results], draw.choice(["", BOM]))
        path = put(text, f"{trial}.txt")
        good = [i for i, (_, fine) in enumerate(results) if fine]
        if not good:
            with pytest.raises(ValueError, match=f"{path}:{starts[0]}: "):
                read_questions(path)
            continue
        rows, odd = read_questions(path)
        assert len(rows) + len(odd) == len(chosen)
        assert [line.partition(": ")[0] for line in odd] == [
            f"{path}:{line}" for i, line in enumerate(starts) if i not in good
        ]
        asked_of = [
            results[i][0]["question"] if kind == "cmb" else results[i][0][header.index("Question")] for i in good
        ]
        assert [one.question for one in rows] == asked_of
        if kind == "cmb":
            answers = [results[i][0].get("answer", "") for i in good]
        else:
            answers = [results[i][0][header.index("Answer")] for i in good]
        assert [one.answer for one in rows] == ["".join(sorted(answer)) for answer in answers]


@pytest.mark.parametrize("kind", ["cmmlu", "cmexam"])
def test_a_truncated_csv_is_either_read_to_its_end_or_refused(put, kind):
    draw, text = random.Random(1), texts()[kind]
    for cut in draw.sample(range(text.index("\n") + 2, len(text)), 40):
        path = put(text[:cut], "cut.csv")
        try:
            records = [cells for cells in csv.reader(io.StringIO(text[:cut], newline=""), strict=True) if cells][1:]
        except csv.Error:
            with pytest.raises(ValueError, match=r"cut\.csv:\d+: not CSV \(unexpected end of data\)"):
                read_questions(path)
            continue
        try:
            rows, odd = read_questions(path)
        except ValueError as refused:
            assert str(refused).startswith(f"{path}:2: ") or str(refused) == f"{path}: no questions"  # noqa: PT017
            assert len(records) <= 1
            continue
        assert len(rows) + len(odd) == len(records)


def test_a_quote_left_open_is_refused_rather_than_swallowing_the_rest(put):
    text = texts()["cmmlu"].replace("分泌胰岛素的细胞是", '"分泌胰岛素的细胞是')
    with pytest.raises(ValueError, match=r"q\.csv:\d+: not CSV"):
        read_questions(put(text, "q.csv"))


def broken(draw, content):
    """The bytes after an accident of the kind that disks, editors and downloads have."""
    accident, n = draw.randrange(5), len(content)
    if accident == 0:
        return content[: draw.randrange(n)]
    if accident == 1:
        return draw.randbytes(draw.randrange(200))
    if accident == 2:
        return content.decode().encode("gbk", "replace")
    start = draw.randrange(n)
    if accident == 3:
        return content[:start] + draw.randbytes(3) + content[start + 3 :]
    return content[:start] + draw.choice([b'"', b"\0", b"\\ud800", b"[", b"}", b",", b"\r"]) + content[start:]


@pytest.mark.parametrize("kind", ["cmmlu", "cmexam", "cmb", "own"])
def test_whatever_the_bytes_they_are_read_or_refused_by_name(put, kind):
    draw, content = random.Random(2), texts()[kind].encode()
    refusals = 0
    for _ in range(60):
        path = put(broken(draw, content), "broken" + draw.choice([".csv", ".json", ".jsonl"]))
        for read in (read_questions, read_answers):
            try:
                read(path)
            except (ValueError, FileNotFoundError) as refused:
                assert str(refused).startswith(str(path))  # noqa: PT017  # it may be read as well
                refusals += 1
    assert refusals > 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the columns are ''"),
        ("a,b\n1,2\n", "the columns are 'a, b'"),
        ("Question,Options\n痛风,A 嘌呤\n", "expected CMMLU's"),
        ("[", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[" + "9" * 5000 + "]", "not JSON"),
        ("[]", "no questions"),
        ('[{"question": "痛风"', "not JSON"),
        ('[{"question": "痛风"}] [', "not JSON"),
        ("Question,Options,Answer\n" + "x" * 140_000, "not CSV"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_is_none_of_these_kinds_is_refused(put, text, message):
    path = put(text, "q.csv")
    with pytest.raises(ValueError, match=message) as refused:
        read_questions(path)
    assert str(refused.value).startswith(f"{path}:")
    assert len(str(refused.value)) < 2 * len(str(path)) + 300


def test_gbk_is_refused_not_read_as_other_characters(put):
    for kind, text in texts().items():
        path = put(text.encode("gbk", "ignore"), f"{kind}.json")
        with pytest.raises(ValueError, match=r"not UTF-8|utf-8"):
            read_questions(path)


def test_a_missing_file_is_named(tmp_path, put):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: no such file"):
        read_questions(tmp_path / "nowhere.csv")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such file"):
        read_questions(put(texts()["cmb"], "q.json"), tmp_path / "nowhere.json")


def test_a_directory_is_its_files_in_the_order_of_their_names(put, tmp_path):
    for name, kind in (("q/d.jsonl", "own"), ("q/b.csv", "cmexam"), ("q/a.csv", "cmmlu"), ("q/c.json", "cmb")):
        put(texts()[kind], name)
    for name in ("q/notes.txt", "q/README", "q/a.csv.bak"):
        put("not questions", name)
    (tmp_path / "q" / "0.csv").mkdir()
    text, starts = routed_texts("cmexam", [*CMEXAM, CMEXAM[0][:1]])
    bad = put(text, "q/bb.csv")
    rows, odd = read_questions(tmp_path / "q")
    alone = [read_questions(tmp_path / "q" / name).rows for name in ("a.csv", "b.csv", "bb.csv", "c.json", "d.jsonl")]
    assert rows == [one for part in alone for one in part]
    assert odd == [f"{bad}:{starts[-1]}: not as many cells as columns"]
    assert {one.topic for one in rows if one.exam == "cmmlu"} == {"a"}


def test_a_directory_without_such_files_is_refused(put, tmp_path):
    put("not questions", "q/notes.txt")
    with pytest.raises(FileNotFoundError, match=r"q: no \.csv, \.json, \.jsonl file here"):
        read_questions(tmp_path / "q")


def test_one_file_that_holds_no_questions_spoils_its_directory(put, tmp_path):
    put(texts()["cmmlu"], "q/a.csv")
    put("a,b\n1,2\n", "q/b.csv")
    with pytest.raises(ValueError, match=r"b\.csv: the columns are"):
        read_questions(tmp_path / "q")


def without(record, *keys):
    return {key: value for key, value in record.items() if key not in keys}


def answer_of(record):
    return without(record, "question", "option")


def test_answers_come_from_the_second_file_by_id_in_any_order(put):
    records = [*CMB[:2], {**CMB[2], "id": "z"}]
    questions = put(json.dumps([without(record, "answer", *INTERNAL) for record in records]), "q.json")
    blind = read_questions(questions)
    assert [one.answer for one in blind.rows] == ["", "", ""]
    assert [len(one.messages) for one in blind.rows] == [1, 1, 1]
    assert [one.metadata for one in blind.rows] == [SINGLE, SEVERAL, SINGLE]
    for order in (records, records[::-1]):
        answers = put(json.dumps([answer_of(record) for record in order]), "a.json")
        whole = read_questions(put(json.dumps(records), "whole.json"))
        assert read_questions(questions, answers) == whole
        assert whole.rows[:2] == CMB_ROWS[:2]


def test_questions_that_the_file_of_answers_does_not_know_stay_without(put):
    questions = put(json.dumps([without(record, "answer") for record in CMB]), "q.json")
    answers = put(json.dumps([answer_of(CMB[1])]), "a.json")
    rows, odd = read_questions(questions, answers)
    assert odd == []
    assert [one.answer for one in rows] == ["", "ABD", ""]


def test_answers_to_no_question_are_reported(put):
    questions = put(json.dumps([without(record, "answer") for record in CMB]), "q.json")
    others = [{"id": 98, "answer": "A"}, {"id": 99, "answer": "B"}]
    answers = put(json.dumps([*others, answer_of(CMB[1])]), "a.json")
    rows, odd = read_questions(questions, answers)
    assert odd == [f"{answers}: 2 of 3 answers are for no question that was read"]
    assert [one.answer for one in rows] == ["", "ABD", ""]


@pytest.mark.parametrize("key", ["exam_type", "exam_class", "exam_subject", "question_type", "answer"])
def test_a_file_of_answers_that_disagrees_is_of_other_questions(put, key):
    questions = put(json.dumps(CMB), "q.json")
    answers = put(json.dumps([{**answer_of(CMB[0]), key: "A"}, answer_of(CMB[1])]), "a.json")
    rows, odd = read_questions(questions, answers)
    assert [one.id for one in rows] == ["12", "row-3"]
    assert odd == [
        f"{questions}:1: {key} is {CMB[0][key]!r}, in the file of answers 'A'",
        f"{answers}: 1 of 2 answers are for no question that was read",
    ]


def test_the_file_of_answers_is_no_file_of_questions(put):
    answers = put(json.dumps([answer_of(record) for record in CMB[:2]]), "a.json")
    with pytest.raises(ValueError, match="an answer without a question; a file of answers is given with --answers"):
        read_questions(answers)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"answer": "A"}, "expected"),
        ({"id": 1}, "expected"),
        ({"id": 1, "answer": 3}, "expected"),
        ("A", "expected"),
        (["A"], "expected"),
    ],
)
def test_a_bad_answer_is_named_by_file_and_line(put, bad, message):
    text, starts = routed_texts("cmb", [answer_of(CMB[0]), bad])
    answers = put(text, "a.json")
    with pytest.raises(ValueError, match=message) as refused:
        read_questions(put(json.dumps(CMB), "q.json"), answers)
    assert str(refused.value).startswith(f"{answers}:{starts[1]}: ")


def dict_rows(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@present("cmmlu_med")
def test_all_of_cmmlu_med():
    rows, odd = read_questions(DATA / "cmmlu_med" / "test")
    assert odd == []
    assert len(rows) == 1709
    assert len({one.topic for one in rows}) == 8
    plain = [
        (path.stem, f"{path.stem}-{i}", cells["Question"].strip(), {x: cells[x] for x in "ABCD"}, cells["Answer"])
        for path in sorted((DATA / "cmmlu_med" / "test").glob("*.csv"))
        for i, cells in enumerate(dict_rows(path))
    ]
    assert [(one.topic, one.id, one.question, one.options, one.answer) for one in rows] == plain
    assert {(one.exam, one.multiple_answers, one.explanation) for one in rows} == {("cmmlu", False, "")}


@present("cmexam/val.csv")
def test_all_of_cmexam_val():
    path = DATA / "cmexam" / "val.csv"
    rows, odd = read_questions(path)
    assert (len(rows), len(odd)) == (6810, 1)
    assert odd[0].startswith(f"{path}:26678: ")
    assert "'nan'" in odd[0]
    assert sum(one.multiple_answers for one in rows) == sum(len(one.answer) > 1 for one in rows) == 210
    plain = dict_rows(path)
    assert len(plain) == 6811
    assert {f"val-{i}" for i, cells in enumerate(plain) if cells["Answer"] != "nan"} == {one.id for one in rows}
    for one in rows:
        cells = plain[int(one.id.removeprefix("val-"))]
        assert one.question == cells["Question"].strip()
        assert set(one.answer) == set(cells["Answer"])
        assert [x + text.strip() for x, text in one.options.items()] == [
            line[0] + line[2:].strip() for line in cells["Options"].split("\n") if line
        ]
        assert one.explanation == ("" if cells["Explanation"] == "nan" else cells["Explanation"].strip())


@present("cmb/CMB-sample.json")
def test_all_of_cmbs_sample_with_its_answers_in_one_file_or_two(put):
    path = DATA / "cmb" / "CMB-sample.json"
    rows, odd = read_questions(path)
    assert odd == []
    records = json.loads(path.read_text(encoding="utf-8"))
    assert len(rows) == len(records) == 190
    for one, record in zip(rows, records, strict=True):
        assert (one.question, one.answer) == (record["question"].strip(), record["answer"])
        assert one.options == {letter: text for letter, text in record["option"].items() if text}
        assert one.messages[0] == asked(one.question, one.options.items())
    records = [{"id": i, **record} for i, record in enumerate(records)]
    stripped = put(json.dumps([without(record, "answer") for record in records]), "stripped.json")
    blind = read_questions(stripped)
    assert (len(blind.rows), {one.answer for one in blind.rows}, blind.malformed) == (190, {""}, [])
    random.Random(0).shuffle(records)
    answers = put(json.dumps([answer_of(record) for record in records]), "answers.json")
    assert read_questions(stripped, answers).malformed == []
    for one, whole in zip(read_questions(stripped, answers).rows, rows, strict=True):
        assert vars(one) == vars(whole) | {"id": one.id}


@present("cmb/CMB-test-choice-answer-first300.json")
def test_cmbs_own_file_of_answers_is_read(put):
    path = DATA / "cmb" / "CMB-test-choice-answer-first300.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    assert read_answers(path) == {str(record["id"]): record for record in records}
    option = {letter: f"选项{letter}" for letter in "ABCDE"}
    asks = [{"id": record["id"], "question": f"题 {record['id']}", "option": option} for record in records]
    rows, odd = read_questions(put(json.dumps(asks), "q.json"), path)
    assert odd == []
    assert [one.answer for one in rows] == ["".join(sorted(record["answer"])) for record in records]
    assert [(one.topic, one.multiple_answers) for one in rows] == [
        (record["exam_subject"], record["question_type"] != "单项选择题") for record in records
    ]
    with pytest.raises(ValueError, match="--answers"):
        read_questions(path)


def test_each_answer_is_counted_once_however_often_its_question_stands(put):
    questions = [without(CMB[1], "answer")] * 2
    answers = put(json.dumps([answer_of(CMB[1]), {"id": 99, "answer": "B"}]), "a.json")
    rows, odd = read_questions(put(json.dumps(questions), "q.json"), answers)
    assert [one.answer for one in rows] == ["ABD", "ABD"]
    assert odd == [f"{answers}: 1 of 2 answers are for no question that was read"]


def test_answers_are_for_cmb_alone(put):
    answers = put('[{"id": 1, "answer": "A"}]', "a.json")
    assert read_questions(put(texts()["own"], "q.jsonl"), answers).malformed == [
        f"{answers}: 1 of 1 answers are for no question that was read"
    ]


def test_the_same_letters_in_another_order_are_the_same_answer(put):
    questions = put(json.dumps([CMB[1]]), "q.json")
    for order in ("ABD", "BDA", "DAB"):
        answers = put(json.dumps([{**answer_of(CMB[1]), "answer": order}]), "a.json")
        assert read_questions(questions, answers).malformed == []


def test_a_file_of_answers_is_a_list_in_utf_8_with_one_answer_for_each_question(put):
    text = json.dumps([answer_of(CMB[0])], ensure_ascii=False)
    assert read_answers(put(BOM + text, "a.json")) == read_answers(put(text, "a.json"))
    with pytest.raises(ValueError, match=r"a\.json: not UTF-8"):
        read_answers(put(text.encode("gbk"), "a.json"))
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON list"):
        read_answers(put('{"answers": []}', "a.json"))
    with pytest.raises(ValueError, match=r"a\.json:2: a second answer for question 1"):
        read_answers(put('[{"id": 1, "answer": "A"},\n{"id": 1, "answer": "B"}]', "a.json"))


def test_an_id_that_cannot_be_written_is_odd(put):
    rows, odd = read_questions(put(json.dumps([{**CMB[0], "id": "\ud83d"}, CMB[1]]), "q.json"))
    assert (len(rows), len(odd)) == (1, 1)
    assert "half a character" in odd[0]


@pytest.mark.parametrize("kind", ["cmmlu", "cmexam"])
def test_space_before_the_columns_does_not_matter(put, kind):
    for start in ("\n", " ", "\r\n \r\n"):
        text = start + texts()[kind]
        assert read_questions(put(text, NAMES[kind] + ".csv")) == (EXPECTED[kind], [])
