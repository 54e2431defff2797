"""Replies of reasoning and chat models in shapes that they really have, with the letters that a person reads.

Most have a chain of thought before them, which contains other letters. Some were cut off within it.
"""

import pytest

from minidoctor.evaluate.extraction import read_letters

EN = {"A": "Asthma", "B": "Pneumonia", "C": "Pulmonary embolism", "D": "Heart failure", "E": "None of the above"}
ZH = {"A": "肺炎", "B": "维生素C", "C": "肺栓塞", "D": "CT", "E": "以上都是"}
HUATUO_O1 = "## Thinking\n\n{thought}\n\n## Final Response\n\n{reply}"
R1 = "<think>\n{thought}\n</think>\n\n{reply}"
OPENED = "{thought}\n</think>\n\n{reply}"  # the prompt has begun the reasoning
NO_THOUGHT = "<think>\n\n</think>\n\n{reply}"  # Qwen3 with thinking off
PLAIN = "{reply}"
CUT_OFF = ("## Thinking\n\n{thought} {reply}", "<think>\n{thought} {reply}")
THOUGHTS = ("Is it E? The answer is E, or maybe E and B.", "嗯，答案是E。再想想，也许应该选B？")

TO_ENGLISH_OPTIONS = [
    (HUATUO_O1, "The most likely diagnosis is **C. Pulmonary embolism**.", "C"),
    (HUATUO_O1, "Based on the sudden dyspnea, the correct answer is C. Pulmonary embolism. A and B are slower.", "C"),
    (HUATUO_O1, "The answer is D.", "D"),
    (HUATUO_O1, "The best next consideration among the given options is **D. Heart failure**, because of edema.", "D"),
    (HUATUO_O1, "Given the findings, the most appropriate option is:\n\n**B. Pneumonia**", "B"),
    (HUATUO_O1, "I would lean toward option C, pulmonary embolism, as the most likely cause.", "C"),
    (HUATUO_O1, "This presentation could fit either A or B, and more tests are needed.", ""),
    (CUT_OFF[0], "Let's see. The answer is A.", ""),
    (R1, "**Answer:** C", "C"),
    (R1, "**Final Answer:** \\boxed{C}", "C"),
    (R1, "The correct answer is:\n\n**C) Pulmonary embolism**\n\n**Why:**\n- **A) Asthma**: wheezing.", "C"),
    (R1, "### Correct Option: **C**\n\n### Why not the others?\n- A: wheezing\n- B: fever", "C"),
    (R1, "1. **Asthma (A)**: wheezing.\n2. **Pneumonia (B)**: fever.\n\nThe onset strongly suggests **C**.", "C"),
    (R1, "**Correct answer: (B) Pneumonia**\n\nThe fever and the infiltrate are typical.", "B"),
    (R1, "The patient most likely has **pulmonary embolism (Option C)**.", "C"),
    (R1, "Therefore, the correct choice is **(D)**.", "D"),
    (R1, "*Final Correct Answer: B*", "B"),
    (R1, "I cannot determine the answer without more information.", ""),
    (R1, '{"answer": "C"}', "C"),
    (R1, '```json\n{"answer": "C", "reason": "sudden onset"}\n```', "C"),
    (R1, "<answer>C</answer>", "C"),
    (R1, "<answer>\nC. Pulmonary embolism\n</answer>", "C"),
    (R1, "<answer>The best option is A and C.</answer>", "AC"),
    (CUT_OFF[1], "The answer is C, but let me double-check A", ""),
    (OPENED, "Thus, the answer is (C).", "C"),
    (OPENED, "**Option C is correct.**\n\nOption A is incorrect because there is no wheezing.", "C"),
    (OPENED, "All of A, B and C are possible, so the question cannot be answered.", ""),
    (OPENED, "Option A: Incorrect. \nOption B: Incorrect.\nOption C: Correct.\nOption D: Incorrect.", "C"),
    (NO_THOUGHT, "C", "C"),
    (NO_THOUGHT, "C. Pulmonary embolism", "C"),
]
TO_CHINESE_OPTIONS = [
    (HUATUO_O1, "根据患者的表现，最可能的诊断是C. 肺栓塞。", "C"),
    (HUATUO_O1, "因此，正确答案是选项C：肺栓塞。", "C"),
    (HUATUO_O1, "综合以上分析，这道题应选择B选项，即维生素C。", "B"),
    (HUATUO_O1, "在这些选项中，最符合题意的是D. CT。", "D"),
    (HUATUO_O1, "所以，这道题的答案应该是C选项，即肺栓塞。", "C"),
    (HUATUO_O1, "综上所述，A、B、C均有可能，需要进一步检查才能确定。", ""),
    (CUT_OFF[0], "选A吧，不对，应该再看看", ""),
    (R1, "**答案：C**", "C"),
    (R1, "正确答案是 **C. 肺栓塞**。\n\n**解析：**\n- A. 肺炎：多有发热。\n- B. 维生素C：无关。", "C"),
    (R1, "### 答案\n**C. 肺栓塞**\n\n### 解析\n患者突发胸痛。", "C"),
    (R1, "本题正确选项为 ACD 选项。", "ACD"),
    (R1, "答案：A、C、D\n\n解析：B选项与本题无关，故排除。", "ACD"),
    (R1, "\\boxed{C}", "C"),
    (R1, "$$\\boxed{\\text{C}}$$", "C"),
    (R1, "选项分析：\n- A选项：错误。\n- B选项：错误。\n- C选项：正确。\n\n因此，正确选项为**C**。", "C"),
    (R1, "<answer>ACE</answer>", "ACE"),
    (CUT_OFF[1], "应该选C，不过再核对一下A", ""),
    (OPENED, "综上，本题选C。", "C"),
    (OPENED, "综上所述，选项B是正确的。", "B"),
    (OPENED, "所以选择答案C。", "C"),
    (OPENED, "故答案为：B、C、D。", "BCD"),
    (OPENED, "【答案】ABC\n【解析】D项为检查方法。", "ABC"),
    (OPENED, "正确的选项有：A、B、E。", "ABE"),
    (NO_THOUGHT, "最佳答案：C（肺栓塞）", "C"),
    (NO_THOUGHT, "题目信息不足，无法判断正确选项。", ""),
    (NO_THOUGHT, "A选项不正确，B选项也不正确，因此无法选出答案。", ""),
    (PLAIN, "根据题目描述，患者突发胸痛、呼吸困难，最可能的诊断是肺栓塞。因此，答案是C。", "C"),
    (PLAIN, "您好，根据您提供的信息，正确答案应为C、肺栓塞。", "C"),
    (PLAIN, "这道题的正确答案是：A 肺炎。肺炎的治疗以抗感染为主。", "A"),
    (PLAIN, "最终答案：$\\boxed{ACD}$", "ACD"),
]


@pytest.mark.parametrize("thought", [*THOUGHTS, ""])
def test_58_of_60_replies_are_read_and_none_is_misread(thought):
    readings = [
        (reply, letters, read_letters(style.format(thought=thought, reply=reply), options))
        for replies, options in ((TO_ENGLISH_OPTIONS, EN), (TO_CHINESE_OPTIONS, ZH))
        for style, reply, letters in replies
    ]
    assert len({reply for reply, _, _ in readings}) == 60
    different = [reading for reading in readings if reading[1] != reading[2]]
    assert len(different) <= 2, different
    assert [reading for reading in different if reading[2]] == []  # rather unanswered than a wrong letter


def test_thoughts_contain_letters_that_would_be_read():
    for options in (EN, ZH):
        assert [read_letters(thought, options) != "" for thought in THOUGHTS] == [True, True]
