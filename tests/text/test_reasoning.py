import pytest

from minidoctor.text.reasoning import final_part


@pytest.mark.parametrize(
    ("reply", "final"),
    [
        ("B", "B"),
        ("", ""),
        ("The answer is B.\nBecause C is wrong.\n", "The answer is B.\nBecause C is wrong.\n"),
        ("I am thinking: B", "I am thinking: B"),
        ("## Thoughts\n\nB", "## Thoughts\n\nB"),
        ("<think>\nA or C?\n</think>\n\nB", "B"),
        ("A or C?\n</think>\n\nB", "B"),  # the prompt ended with <think>
        ("<think>\n\n</think>\n\nB", "B"),
        ("<thinking>A?</thinking>B", "B"),
        ("<think>A</think>A?\n<think>C</think> B", "B"),
        ("<think>A</think>", ""),
        ("## Thinking\n\nA or C?\n\n## Final Response\n\nThe answer is B.", "The answer is B."),
        ("## Thinking\nThe heading ## Final Response comes later. A\n## Final Response\nB", "B"),
        ("## Final Response: B", "B"),
        ("A or C? <answer> B </answer>", "B"),
        ("<think>A</think><answer>B</answer> Done.", "B"),
        ("<think>Write <answer>A</answer>?</think>\n<answer>\nB\n</answer>", "B"),
        ("<answer>A</answer> No. <answer>B</answer>", "B"),
        ("<answer>B", "B"),
        ("<think>A?\n<answer>B</answer>\n", "B"),
        ("<answer></answer>", ""),
        ("<think>\nA or C? B", None),
        ("\n<think>A", None),
        ("<think>A</think>B<think>C", None),
        ("<think>Write <answer>A</answer>? Hmm", None),
        ("## Thinking\n\nThe answer is B.", None),
        ("## Thinking\n\nSo my ## Final Response is B.", None),
    ],
    ids=repr,
)
def test_final_part_follows_the_reasoning_or_is_none(reply, final):
    assert final_part(reply) == final


def test_reply_to_a_prompt_that_opened_the_reasoning_is_unfinished_without_its_end():
    assert final_part("A or C? B") == "A or C? B"
    assert final_part("A or C? B", opened=True) is None
    assert final_part("A or C?</think>B", opened=True) == "B"
    assert final_part("A or C? <answer>B</answer>", opened=True) == "B"
