"""Questions written for the tests, in the file formats of CMMLU, CMExam and CMB, and the rows expected of them."""

import csv
import io
import json

from minidoctor.questions.rows import Row, conversation

BOM = "\ufeff"
HEADERS = {
    "cmmlu": ["", "Question", "A", "B", "C", "D", "Answer"],
    "cmexam": ["Question", "Options", "Answer", "Explanation"],
}
CMMLU = [
    ["0", "正常人右肺的肺叶数为", "一叶", "二叶", "三叶", "四叶", "C"],
    ["1", "分泌胰岛素的细胞是", "胰岛α细胞", "胰岛β细胞", "胰岛δ细胞", "胃主细胞", "B"],
    ["2", "下列疾病, 由缺乏维生素C引起的是", "坏血病", "脚气病, 湿性", '所谓"夜盲"', "佝偻病", "A"],
    ["3", "乙型肝炎病毒\n所含的核酸是", "单链RNA", "双链RNA", "单链DNA", "不完全\n双链DNA", "D"],
]
CMEXAM = [
    ["儿童缺乏维生素D可引起", "A 佝偻病\nB 坏血病\nC 夜盲症\nD 脚气病", "A", "维生素D促进钙的吸收，\n缺乏则骨化不足。"],
    ["属于脂溶性维生素的有", "A. 维生素A\nB. 维生素C\nC. 维生素D\nD. 维生素E\nE. 维生素B1", "DAC", "nan"],
    ["痛风是哪种物质代谢紊乱", "A、嘌呤\nB、糖\nC、铁\nD、铜", "A", ""],
    ["哮喘的典型体征是", "A．呼气相哮鸣音\nB: 三凹征\nC：杵状指\nD  奔马律", "A", "nan"],
]
INTERNAL = {"exam_type": "医师考试", "exam_class": "执业医师", "exam_subject": "内科学"}
ONE, SEVERAL = {"question_type": "单项选择题"}, {"question_type": "多项选择题"}
CMB = [
    {
        "id": 11,
        **INTERNAL,
        **ONE,
        "question": "原发性高血压最常损害的器官不包括",
        "option": {"A": "心", "B": "脑", "C": "肾", "D": "胰", "E": ""},
        "answer": "D",
        "explanation": "胰腺少受累。",
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
        **ONE,
        "answer": "A",
    },
]
RECORDS = {"cmmlu": CMMLU, "cmexam": CMEXAM, "cmb": CMB}
NAMES = {"cmmlu": "anatomy", "cmexam": "val", "cmb": "CMB-test"}


def format_csv(header, rows, end="\r\n"):
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([header, *rows])
    return text.getvalue()


def format_file(kind, records, start=""):
    """Return the text of a file with these records, and the line on which each of them starts."""
    text, lines = start + ("[\n" if kind == "cmb" else format_csv(HEADERS[kind], [])), []
    for i, record in enumerate(records):
        if kind == "cmb":
            text += ",\n" if i else ""
            lines.append(text.count("\n") + 1)
            text += json.dumps(record, ensure_ascii=False, indent=1)
        else:
            lines.append(text.count("\n") + 1)
            text += format_csv(record, [])
    return text + ("\n]" if kind == "cmb" else ""), lines


def expected_row(id, question, texts, answer, **fields):
    options = dict(zip("ABCDE", texts, strict=False))
    prompt = "".join([question, *(f"\n{letter}. {text}" for letter, text in options.items())])
    messages = conversation(prompt, "\n".join(f"{letter}. {options[letter]}" for letter in answer))
    return Row(id, messages, question, options, answer, **{"topic": "", "language": "zh", **fields})


VITAMINS = ["维生素A", "维生素C", "维生素D", "维生素E", "维生素B1"]
SEVERAL_FIELDS = {"multiple_answers": True, "topic": "内科学", "metadata": INTERNAL | SEVERAL}
ONE_FIELDS = {"explanation": "胰腺少受累。", "topic": "内科学", "metadata": INTERNAL | ONE}
EXPECTED = {
    "cmmlu": [
        expected_row(f"anatomy-{i}", cells[1], cells[2:6], cells[6], exam="cmmlu", topic="anatomy")
        for i, cells in enumerate(CMMLU)
    ],
    "cmexam": [
        expected_row(f"val-{i}", CMEXAM[i][0], texts, answer, exam="cmexam", **fields)
        for i, (texts, answer, fields) in enumerate(
            [
                (["佝偻病", "坏血病", "夜盲症", "脚气病"], "A", {"explanation": CMEXAM[0][3]}),
                (VITAMINS, "ACD", {"multiple_answers": True}),
                (["嘌呤", "糖", "铁", "铜"], "A", {}),
                (["呼气相哮鸣音", "三凹征", "杵状指", "奔马律"], "A", {}),
            ]
        )
    ],
    "cmb": [
        expected_row(id, record["question"], record["option"].values(), answer, exam="cmb", **fields)
        for record, id, answer, fields in zip(
            [CMB[0] | {"option": dict(zip("ABCD", "心脑肾胰", strict=True))}, *CMB[1:]],
            ["11", "12", "row-3"],
            ["D", "ABD", "A"],
            [ONE_FIELDS, SEVERAL_FIELDS, {"metadata": ONE}],
            strict=True,
        )
    ],
}

ANATOMY = """,Question,A,B,C,D,Answer
0,痛风的关键检查是,尿酸,关节液,夜间咳嗽,风湿科,A
1,哮喘属于哪个科,风湿科,呼吸科,关节,夜间,B
2,痛风属于哪个科,夜间,关节,风湿科,呼吸科,C
"""  # a file of CMMLU that a small model can be asked
