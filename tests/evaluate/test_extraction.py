import random

import pytest

from minidoctor.evaluate.extraction import read_letters

EN = {"A": "Asthma", "B": "Pneumonia", "C": "Pulmonary embolism", "D": "Heart failure", "E": "None of the above"}
ZH = {"A": "肺炎", "B": "维生素C", "C": "肺栓塞", "D": "CT", "E": "以上都是"}
LISTED_EN = "\n".join(f"{letter}. {text}" for letter, text in EN.items())
LISTED_ZH = "\n".join(f"{letter}. {text}" for letter, text in ZH.items())

# Tables of replies and the letters that must be read from them.
STATED_EN = [
    ("The answer is C", "C"),
    ("The answer is: C) Pulmonary embolism", "C"),
    ("The correct answer is C. A is wrong because asthma wheezes.", "C"),
    ("The correct answer is **C**.", "C"),
    ("**Answer: C**", "C"),
    ("Answer: C", "C"),
    ("Answer:\n\nC", "C"),
    ("### Final Answer\nC", "C"),
    ("answer: c", "C"),
    ("ANSWER: C", "C"),
    ("**Correct Answer: (C) Pulmonary embolism**", "C"),
    ("So the answer is C: Pulmonary embolism, not A or B.", "C"),
    ("It could be A or B but I'd pick C", "C"),
    ("The answer to this question is (c).", "C"),
    ("The best answer would be D", "D"),
    ("The final answer is `D`", "D"),
    ("The answer should be option D because of the edema.", "D"),
    ("The correct option is B", "B"),
    ("My final choice: B", "B"),
    ("The best choice in this case is B.", "B"),
    ("I choose B", "B"),
    ("I would choose option (b).", "B"),
    ("I'd go with B since she coughs.", "B"),
    ("Therefore, I would select D.", "D"),
    ("The answer is most likely C", "C"),
    ("The answer is A and C", "AC"),
    ("The correct answers are A, C, and E.", "ACE"),
    ("The answer is (A) and (C).", "AC"),
    ("Answer: A/C", "AC"),
    ("Answer: a, c", "AC"),
    ("Answer: A & C", "AC"),
    ("The answer is both A and C", "AC"),
    ("Answer: ECA", "ACE"),
    ("Answer: C, C, A", "AC"),
    ("The answer is D (not B)", "D"),
    ("The answer is C, A is wrong", "C"),
    ("The answer is B, because a patient with fever coughs", "B"),
    ("The answer is C, CT shows a clot", "C"),
    ("The answer is pulmonary embolism.", "C"),
    ("The answer is pulmonary embolism because of the clot", "C"),
    ("The correct answer is: None of the above", "E"),
    ("The answer is C pulmonary embolism", "C"),
    ("The correct answers are A. Asthma and C. Pulmonary embolism.", "AC"),
    ("The correct answers are A. Asthma C. Pulmonary embolism", "AC"),
    ("The correct answers are A (asthma) and C (pulmonary embolism).", "AC"),
    ("The answer is A. Wait, no: the correct answer is C.", "C"),
    ("Answer: B\nLet me check. Pneumonia needs fever.\nSo I choose D.", "D"),
    ("The answer is not A. The answer is B.", "B"),
    ("The wrong answer is A. The right answer is B.", "B"),
    ("The final result: $\\boxed{D}$", "D"),
    ("\\boxed{D}", "D"),
    ("\\boxed{\\text{C}}", "C"),
    ("The answer is \\(\\boxed{\\textbf{C. Pulmonary embolism}}\\)", "C"),
    ("Answer: A. Asthma\nC. Pulmonary embolism", "AC"),
    ("Answer: A. Asthma, C. Pulmonary embolism", "AC"),
    ("Answer: A\n\nExplanation: B. is wrong, C. is wrong", "A"),
    ("<think>The answer is A? No, B.</think>\nThe answer is C", "C"),
    ("The answer is A.</think>C", "C"),
    ("Answer: ✅ C", "C"),
    (LISTED_EN + "\nAnswer: D", "D"),
    ("We have to find the correct answer:\n" + LISTED_EN + "\nThe answer is C.", "C"),
    ("The answer is not A but B", "B"),
    ("The answer is not A, but B.", "B"),
    ("The answer is not (A) but rather (B) because of the fever", ""),
    ("It isn't A but B.", "B"),
    ("<answer>B</answer>", "B"),
    ("A could fit.\n<answer>\n(B) Pneumonia\n</answer>\nA is an alternative.", "B"),
    ("<answer>A</answer>? No: <answer>B, C</answer>", "BC"),
    ("It is B", "B"),
    ("It's B.", "B"),
    ("I think it is B.", "B"),
    ("I think it is B. The fever is typical.", "B"),
    ("I think it is B because of the fever", "B"),
    ("It must be (B)!", "B"),
    ("Therefore, B.", "B"),
    ("The fever is typical. Thus B", "B"),
    ("Hence, A and B.", "AB"),
    ("Therefore, option C is correct.", "C"),
    ("Thus, option (B) is the correct answer.", "B"),
    ("Therefore, A and C are correct.", "AC"),
    ("In conclusion, C is the correct answer.", "C"),
    ("Thus A. Asthma", "A"),
    ("My answer is C!", "C"),
    ("I would lean towards B.", "B"),
    ("The correct options are A and D.", "AD"),
    ("The most suitable option is **D**, heart failure.", "D"),
    ("The most appropriate choice would be (A) Asthma", "A"),
    ("The best explanation for her symptoms is D.", "D"),
    ("The most likely diagnosis is C. The onset was sudden.", "C"),
    ("The most likely diagnosis is pneumonia.", "B"),
    ("The most likely diagnoses are A and C.", "AC"),
    ("So the final answer is\n$$\\boxed{\\text{B. Pneumonia}}$$", "B"),
]
STATED_ZH = [
    ("正确答案是A. 肺炎和C. 肺栓塞。", "AC"),
    ("正确答案是A. 肺炎、C. 肺栓塞。", "AC"),
    ("正确答案是A. 肺炎 C. 肺栓塞", "AC"),
    ("正确答案是A（肺炎）和C（肺栓塞）。", "AC"),
    ("正确答案是A选项和C选项。", "AC"),
    ("正确答案是选项A、选项C和选项D。", "ACD"),
    ("选项A，选项C，选项D", "ACD"),
    ("综上，A. 肺炎和C. 肺栓塞", "AC"),
    ("最符合题意的是A. 肺炎和C. 肺栓塞", "AC"),
    ("因此，我认为选B。", "B"),
    ("我觉得选A。", "A"),
    ("综上所述选B", "B"),
    ("答：B", "B"),
    ("答: AC", "AC"),
    ("答案是C。", "C"),
    ("答案：C", "C"),
    ("答案:c", "C"),
    ("答案：\nC", "C"),
    ("答案为ABD", "ABD"),
    ("答案C", "C"),
    ("正确答案是A和C", "AC"),
    ("正确答案：A、C、E。", "ACE"),
    ("正确答案为 A，C，E", "ACE"),
    ("正确答案是A及C两项", "AC"),
    ("参考答案：Ｃ", "C"),
    ("【答案】C", "C"),
    ("答案是“C”", "C"),
    ("答案应该是C选项", "C"),
    ("答案选D", "D"),
    ("答案是选D", "D"),
    ("答案应当为D", "D"),
    ("本题答案为C。A、B、D均为干扰项", "C"),
    ("A、B、C、D都正确，故选E", "E"),
    ("排除A、B，选C", "C"),
    ("我认为答案是 B，因为 A 不符合", "B"),
    ("答案是C，A错误，B错误", "C"),
    ("答案是C，不是A", "C"),
    ("答案是C，CT示充盈缺损", "C"),
    ("选 A、C、E", "ACE"),
    ("选C", "C"),
    ("选C因为有咯血", "C"),
    ("选择C项", "C"),
    ("我选择选项C", "C"),
    ("应选B", "B"),
    ("故本题选E", "E"),
    ("综上，故选：D。", "D"),
    ("因此选A和C", "AC"),
    ("正确的选项是B", "B"),
    ("正确的是B、C", "BC"),
    ("最佳选择是B", "B"),
    ("A和B都不对，应选D", "D"),
    ("不选A，选B", "B"),
    ("答案不是A，答案是B", "B"),
    ("答案是A。重新考虑后，正确答案为C。", "C"),
    ("答案是肺栓塞。", "C"),
    ("选择维生素C", "B"),
    ("答案：维生素C", "B"),
    ("选CT", "D"),
    ("答案：以上都是", "E"),
    ("选C肺栓塞", "C"),
    ("答案：C. 肺栓塞", "C"),
    ("答案：C（肺栓塞）", "C"),
    ("答案：\nA. 肺炎\nC. 肺栓塞", "AC"),
    ("答案：ABCDE", "ABCDE"),
    ("答案：C。首选CT检查。", "C"),
    ("答案：C\n解析：患者应做B超检查，A型血，补充维生素A。", "C"),
    ("首先分析A选项：肺炎多有发热。B选项：维生素C无关。" * 50 + "故选C", "C"),
    ("下列正确的是（  ）\n" + LISTED_ZH + "\n答案：D", "D"),
    ("答案不是A而是B", "B"),
    ("不是A，而是B。", "B"),
    ("因此，B。", "B"),
    ("所以B", "B"),
    ("应该是B。", "B"),
    ("<answer>AB</answer>", "AB"),
    ("因此选项C正确。", "C"),
    ("所以A、B、C都正确。", "ABC"),
    ("因此A和C正确，B错误", "AC"),
    ("选项C是正确答案", "C"),
    ("因此，A. 肺炎。", "A"),
    ("答案选择C", "C"),
    ("正确的选择是C", "C"),
    ("正确的有A和C", "AC"),
    ("最可能的诊断为肺栓塞。", "C"),
    ("最可能的诊断是C。", "C"),
    ("最合适的检查是CT", "D"),
    ("最可能缺乏的是维生素C。", "B"),
]
BEGINNING = [
    ("C", "C"),
    ("C.", "C"),
    ("c", "C"),
    (" \n C \n", "C"),
    ("Ｃ", "C"),
    ("Ⓒ", "C"),
    ("C。", "C"),
    ("👉 C", "C"),
    ("- C", "C"),
    ("**C**", "C"),
    ("`C`", "C"),
    ("**C.** Pulmonary embolism", "C"),
    ("C、xxx", "C"),
    ("C. Pulmonary", "C"),
    ("C. Pulmonary embolism", "C"),
    ("C: Pulmonary embolism, because A, B and D do not bleed", "C"),
    ("C - Pulmonary embolism", "C"),
    ("C - the clot", "C"),
    ("C Pulmonary embolism", "C"),
    ("A Asthma", "A"),
    ("(b)", "B"),
    ("(B) text", "B"),
    ("[B]", "B"),
    ("b) Pneumonia", "B"),
    ("b. Pneumonia", "B"),
    ("Option (b)", "B"),
    ("Option B: Pneumonia", "B"),
    ("选项C", "C"),
    ("C选项", "C"),
    ("A,C,E", "ACE"),
    ("A、C、E", "ACE"),
    ("A C E", "ACE"),
    ("ACE", "ACE"),
    ("ACE。", "ACE"),
    ("E, C, A", "ACE"),
    ("A，A，C", "AC"),
    ("A和C", "AC"),
    ("A, C, and E", "ACE"),
    ("(A)(C)", "AC"),
    ("(A) and (C)", "AC"),
    ("A\nC\nE", "ACE"),
    ("C\nC. Pulmonary embolism", "C"),
    ("C\nA. Asthma\nB. Pneumonia\nC. Pulmonary embolism", "C"),
    ("C. Pulmonary embolism\nC. Pulmonary embolism", "C"),
    ("Both A and C", "AC"),
    ("ABCDE", "ABCDE"),
    ("C\n解析：A项没有咯血，A错误；B超无异常。", "C"),
    ("C\nA is wrong", "C"),
    ("A. Asthma\nC. Pulmonary embolism", "AC"),
    ("A. Asthma\nB. Pneumonia", "AB"),
    ("A. Asthma; C. Pulmonary embolism", "AC"),
    ("D (not B)", "D"),
    ("C, A is wrong", "C"),
    ("B. biopsy is the key test. C. CT scan is wrong", "B"),
    ("B. Pneumonia, because of the fever. C. Pulmonary embolism is wrong.", "B"),
    ("B. Pneumonia\nC. Pulmonary embolism is incorrect", "B"),
]
RESTATED = [
    ("Pulmonary embolism", "C"),
    ("pulmonary  embolism.", "C"),
    ("**Pulmonary embolism**", "C"),
    ("None of the above", "E"),
]
VERDICTS = [
    ("B is correct", "B"),
    ("Option B is correct.", "B"),
    ("B is the correct answer.", "B"),
    ("Both A and C are correct", "AC"),
    ("B选项正确", "B"),
    ("选项A错误；选项B正确；选项C错误", "B"),
    ("A和C都正确", "AC"),
    ("A对，B错", "A"),
    ("Answer: C is the correct answer because A is not.", "C"),
    ("A is wrong. B is correct. C is wrong.", "B"),
    ("A is incorrect; B is right.", "B"),
    ("A: wrong. B: correct.", "B"),
    ("A错误，B正确", "B"),
    ("A不正确，B正确。", "B"),
    ("A项错，B项对", "B"),
]
UNREADABLE_EN = [
    "A. Asthma is wrong. B. Pneumonia is wrong.",
    "A is wrong. B is correct. C is correct.",
    "B is wrong. A right ventricular infarction is possible.",
    "I don't think it is B.",
    "I doubt it is B.",
    "Tell me if it is B.",
    "It is not B",
    "It is B or C",
    "It is E. coli",
    "It is A-positive blood",
    "It is a patient",
    "So B cells divide.",
    "Therefore, A is wrong",
    "Therefore, CT.",
    "The answer is not A",
    "It is not A but a virus",
    "<answer></answer>",
    "<answer>A or B</answer>",
    "A ❌ B ✅ C ❌",
    "So B cells are correct.",
    "Therefore, A is correct and B is correct.",
    "Therefore, none of A, B and C is correct.",
    "Therefore, A. Asthma is wrong.",
    "The most likely diagnosis is not A. Asthma.",
    "The most likely diagnosis is B. Asthma.",
    "The most likely diagnosis is either A or B.",
    "The most likely diagnosis is A. Asthma or B. Pneumonia.",
    "The most likely cause is E. coli.",
    "The most likely diagnosis is a patient-reported one.",
    "The best next step is to order a CT.",
    "The least likely diagnosis is C. Pulmonary embolism",
    "Answer: A. Asthma\nB. Pneumonia: needs fever\nC. Pulmonary embolism: needs a clot",
    "",
    " \n\t ",
    "I cannot answer that.",
    "I'm sorry, but as an AI I cannot give medical advice.",
    "I think the patient has a clot.",
    "I, as an AI, cannot choose.",
    "A patient with chest pain needs a scan.",
    "Vitamin A is correct for the eyes",
    "Hepatitis B",
    "T cells, B cells and NK cells",
    "B cells make antibodies",
    "B-cell lymphoma",
    "CT of the chest",
    "C-reactive protein",
    "The answer is not A",
    "A is wrong",
    "(A) and (C) are wrong",
    "None of A, B or C",
    "A, B or C",
    "A) Asthma is unlikely. B) Pneumonia is possible.",
    "A - Asthma: it wheezes.\nB - Pneumonia: it coughs.",
    "A. wrong",
    "Both A and C are wrong",
    "The answer is A or C",
    "The answer is A, B or C",
    "The wrong answer is A.",
    "The incorrect answer is A.",
    "This is not the answer: A",
    "a, patient",
    "The answer is F",
    "Answer: A, F",
    "F",
    "F. Gout",
    "The answer is a patient with fever",
    "The answer is B cells",
    "Is the answer A?",
    "If I choose A, she dies.",
    "I would not choose A",
    "Don't pick B",
    "e.g. asthma",
    "A is correct. C is correct.",
    "A is correct? Perhaps.",
    "B. Asthma",
    "Answer: B. Asthma",
    "C?",
    "<think>The answer is C",
    "<think>The answer is C</think>",
    "Asthma, pneumonia and pulmonary embolism are all possible",
    "A right ventricular infarction",
    LISTED_EN,
    LISTED_EN.replace("\n", " "),
    "Which is the correct answer?\n" + LISTED_EN,
    "Choose the correct answer:\n" + LISTED_EN,
    "Choose the correct answer:\n" + LISTED_EN[:40],
    "\n".join(f"{letter}. {text}: not likely" for letter, text in EN.items()),
    "Let us find the correct answer:\nA. Asthma: it wheezes.\nB. Pneumonia: it coughs.",
]
UNREADABLE_ZH = [
    "无法确定",
    "无法确定答案是A还是B",
    "排除选项A和B",
    "A选项：多有发热。B选项：与本题无关。",
    "可以选择A或者B",
    "可选A",
    "作为AI，我不能回答这个问题。",
    "不选A",
    "不应选A",
    "答案不是A",
    "A和B都不对",
    "A、B都不对",
    "A错误",
    "A选项：错误。",
    "选A、B都不对",
    "选A选项是错误的",
    "错误答案是A",
    "错误的答案是A",
    "不正确的是A",
    "正确答案是？A. 维生素",
    "答案A错误",
    "答案是A或B",
    "答案是F",
    "维生素A",
    "甲型肝炎",
    "乙肝病毒B",
    "B超",
    "做B超检查",
    "选B超检查",
    "A型血",
    "答案是A型血",
    "首选CT检查",
    "应选T细胞",
    "选择维生素A治疗",
    "若选A，则错",
    "A正确，B正确，C错误",
    "A错误，B错误",
    "因此，B细胞增殖",
    "所以维生素B缺乏",
    "不是A而是B细胞",
    "应该是A型血",
    "A正确吗",
    "A不正确",
    "没有正确答案。\nA有一定道理",
    "答案：B. 肺炎",
    "因此，A. 肺炎是错误的。",
    "综上所述，A正确，B正确。",
    "所以选项A不正确。",
    "因此，A型血正确",
    "最可能的诊断不是C. 肺栓塞。",
    "最不可能的诊断是C. 肺栓塞",
    "最可能的病因是A型流感",
    "最可能缺乏的是维生素A。",
    LISTED_ZH,
    LISTED_ZH.replace(". ", "、"),
    "下列正确的是（ ）\n" + LISTED_ZH,
    "选择正确答案：" + LISTED_ZH.replace("\n", " "),
    "答案：\n" + LISTED_ZH,
]


@pytest.mark.parametrize(("reply", "letters"), STATED_EN + BEGINNING + RESTATED + VERDICTS)
def test_reply_to_english_options(reply, letters):
    assert read_letters(reply, EN) == letters


@pytest.mark.parametrize(("reply", "letters"), STATED_ZH)
def test_reply_to_chinese_options(reply, letters):
    assert read_letters(reply, ZH) == letters


@pytest.mark.parametrize("reply", UNREADABLE_EN)
def test_unreadable_reply_to_english_options(reply):
    assert read_letters(reply, EN) == ""


@pytest.mark.parametrize("reply", UNREADABLE_ZH)
def test_unreadable_reply_to_chinese_options(reply):
    assert read_letters(reply, ZH) == ""


@pytest.mark.parametrize(
    ("reply", "options", "letters"),
    [
        ("维生素C", {"A": "维生素A", "B": "维生素C"}, "B"),
        ("维生素C", {"A": "铁", "B": "钙", "C": "锌"}, ""),
        ("E. coli", {"A": "S. aureus", "B": "E. coli", "E": "C. difficile"}, "B"),
        ("The answer is E. coli", {"A": "S. aureus", "B": "E. coli", "E": "C. difficile"}, "B"),
        ("CEA", {"A": "AFP", "B": "CEA", "C": "CA125", "E": "PSA"}, "B"),
        ("答案是CEA", {"A": "AFP", "B": "CEA", "C": "CA125", "E": "PSA"}, "B"),
        ("The answer is B cells", {"A": "T cells", "B": "NK cells", "C": "B cells"}, "C"),
        ("B", {"A": "O", "B": "A", "C": "B", "D": "AB"}, "B"),  # the letter, not the blood group
        ("A and C", {"A": "gout", "C": "flu", "D": "A and B", "E": "A and C"}, "E"),
        ("B. 错误", {"A": "正确", "B": "错误"}, "B"),
        ("此结论\nA. 正确\nB. 不正确", {"A": "正确", "B": "不正确"}, ""),
        ("答案是-5", {"A": "5", "B": "-5"}, "B"),
        ("答案：B. -5", {"A": "5", "B": "-5"}, "B"),
        ("B. -5\nC. 7", {"A": "5", "B": "-5", "C": "7"}, "BC"),
        ("≥ 5mg", {"A": "≥5mg", "B": "≤5mg"}, ""),  # white space hides which
        ("≥5mg", {"A": "≥5mg", "B": "≤5mg"}, "A"),
        ("5~10", {"A": "510", "B": "5~10"}, "B"),
        ("《难经》", {"A": "《内经》", "B": "《难经》"}, "B"),
        ("（年龄×2）+80", {"A": "（年龄×2）+85", "B": "（年龄×2）+80"}, "B"),
        ("M", {"A": "M", "B": "N"}, "A"),
        ("答案是选择偏倚。", {"A": "测量偏倚", "B": "选择偏倚"}, "B"),
        ("The answer is 2.5", {"A": "2", "B": "2.5"}, "B"),
        ("The answer is 2.5", {"A": "2", "B": "3"}, ""),
        ("gout", {"A": "gout", "B": "gout"}, ""),  # of two options
        ("B. gout", {"A": "gout", "B": "gout"}, "B"),
        ("The answer is gout, acute", {"A": "gout", "B": "gout, acute"}, "B"),
        ("A. yes\nB. no", {"A": "yes", "B": "no"}, ""),
        ("A", {"B": "yes", "C": "no"}, ""),
        ("I", {"A": "yes", "I": "no"}, "I"),
        ("I think so", {"A": "yes", "I": "no"}, ""),
        ("A patient with gout", {"A": "patient with gout", "B": "patient with flu"}, "A"),
        ("A patient with gout", {"A": "a child", "B": "A patient with gout"}, "B"),
        ("A", {"A": "", "B": "()*+"}, "A"),
        ("A", {}, ""),
    ],
)
def test_options_that_look_like_letters(reply, options, letters):
    assert read_letters(reply, options) == letters


@pytest.mark.parametrize("order", ["ABCDE", "EDCBA", "CADBE"])
def test_letters_are_alphabetical_for_every_order_of_the_options(order):
    options = {letter: EN[letter] for letter in order}
    for reply in (
        "A, C, E",
        "E, A and C",
        "The answer is CEA",
        "C. Pulmonary embolism\nA. Asthma\nE. None of the above",
    ):
        assert read_letters(reply, options) == "ACE"


def test_restated_text_gives_the_letter_of_its_option():
    texts, generator = list(EN.values()), random.Random(0)
    for _ in range(20):
        generator.shuffle(texts)
        options = dict(zip("ABCDE", texts, strict=True))
        letter = "ABCDE"[texts.index("Pulmonary embolism")]
        for reply in ("pulmonary embolism", "The answer is pulmonary embolism.", f"{letter}. Pulmonary embolism"):
            assert read_letters(reply, options) == letter


def test_every_letter_is_read_in_every_template():
    templates = (
        "{}",
        "{}. {text}",
        "({})",
        "答案：{}",
        "故选{}。",
        "The answer is {}.",
        "答案：{}. {text}\n解析：不是A. 也不是B.",
    )
    for letter, text in EN.items():
        for template in templates:
            assert read_letters(template.format(letter, text=text), EN) == letter


def test_random_text_gives_letters_of_the_options_or_none():
    generator = random.Random(0)
    chunks = [*"ABCFabc \n.,、:：()（）[]{}*\\<>/&-?。，😀\x00\ud800\u0301", *EN.values(), *ZH.values()]
    chunks += ["答案", "是", "选", "不", "正确", "和", "answer", " is ", " and ", "The ", "I choose", "option"]
    chunks += ["<think>", "</think>", "\\boxed{", "<answer>", "not A but ", "it is ", "so ", "错误"]
    read = set()
    for _ in range(5000):
        reply = "".join(generator.choices(chunks, k=generator.randrange(30)))
        letters = read_letters(reply, EN)
        assert letters == "".join(letter for letter in EN if letter in letters)
        read.add(letters)
    assert {"", "A", "B", "C"} <= read


UNITS = [*"AB选?( \n", "A ", "A,", "A、", "(A)", "a, ", "A和", "C. ", "\\a", "\\boxed{", "<think>", "\u0301\u0316"]
UNITS += ["答案", "答案是A\n", "答案：\nA. Asthma\n", "答案：A. Asthma B. Pneumonia: ", "A. Asthma\n", "Asthma"]
UNITS += ["so ", "it is ", "it is A, ", "not A but ", "因此A、", "<answer>", "A错误", "B. x is wrong "]
UNITS += ["最可能的诊断是", "最可能是A. ", "综上所述, ", "most likely is A. ", "best ", "Therefore, A. x wrong "]
UNITS += ["the ", "answer to ", "answer is ", "I would choose ", "A is correct ", ",A正确", "A. Asthma B. Pneumonia "]


@pytest.mark.parametrize("unit", UNITS)
def test_200_000_characters_are_read_in_linear_time(unit):
    # No bound in seconds is needed: quadratic time would be 4e10 steps.
    for reply in (unit * (200_000 // len(unit)), unit * (200_000 // len(unit)) + "x"):
        assert set(read_letters(reply, EN)) <= set(EN)
