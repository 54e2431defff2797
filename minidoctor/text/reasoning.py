"""Replies of reasoning models: a chain of thought, and the final part that contains the answer.

<think> ... </think> The answer is B.                  R1, Qwen3; the prompt may already contain <think>
## Thinking ... ## Final Response  The answer is B.    HuatuoGPT-o1
... <answer> B </answer>                               models that were trained with tagged answers
"""

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MARKER = re.compile(r"(?P<begin><think(?:ing)?>|\A\s*#+ *Thinking\b)|</think(?:ing)?>|^#+ *Final Response\b:?", re.M)
ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)


def final_part(reply: str, opened: bool = False) -> str | None:
    """Return the part of a reply that follows its reasoning, or None if the reasoning has begun and not ended.

    A reply without reasoning is returned as a whole. `opened`: the prompt has begun the reasoning, as in
    `Tokenizer.opens_reasoning`, and the reply was cut off at its limit.
    """
    final = None if opened else reply
    for marker in MARKER.finditer(reply):  # the last one counts: a model can reason several times
        final = None if marker["begin"] else reply[marker.end() :].strip()
    if final is None and reply.rstrip().endswith("</answer>"):  # answered without an end of the reasoning
        final = reply
    answers = ANSWER.findall(final or "")
    return answers[-1].strip() if answers else final
