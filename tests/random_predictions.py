"""Predictions for the tests of summary, table and comparison."""

import random

from minidoctor.evaluate.records import Outcome, Prediction

EXAM_TYPES = ("医师考试", "护理考试", "药师考试")
TOPICS = ("anatomy", "virology", "traditional_chinese_medicine")


def make_prediction(outcome=None, outcomes=None, **fields):
    """Return a prediction whose headline `scoring` has this outcome, or that is not done without one."""
    values = {"id": "1", "answer": "A", "scoring": "logits", "exam": "cmb", "topic": "", "metadata": {}}
    values |= {"language": "zh", "multiple_answers": False, "n_options": 4, "longest_option": "A", "shots": 0}
    values |= {"question_sha256": "", "prompt_sha256": "", "scores": {}, "file": "", "trained_on": None} | fields
    if outcome is None:
        return Prediction(prediction=None, correct=None, outcomes=outcomes or {}, **values | {"scoring": None})
    outcomes = {values["scoring"]: outcome} | (outcomes or {})
    return Prediction(prediction=outcome.prediction, correct=outcome.correct, outcomes=outcomes, **values)


def n_correct_of(n, n_correct, **fields):
    """Return n questions with four options, the first of them answered correctly."""
    fields = {"metadata": {"exam_type": EXAM_TYPES[0]}} | fields
    return [
        make_prediction(Outcome(prediction="AB"[i >= n_correct], correct=i < n_correct), **fields) for i in range(n)
    ]


def random_prediction(rng, id, exam="cmb", skill=0.6, multiple_answers=None):
    """Return a prediction of a benchmark's question or, with exam "", of a user's question."""
    letters = "ABCDE"[: rng.choice((4, 5))]
    multiple_answers = rng.random() < 0.3 if multiple_answers is None else multiple_answers
    answer = "".join(sorted(rng.sample(letters, rng.randint(2, 3)))) if multiple_answers else rng.choice(letters)
    if rng.random() < 0.1:
        answer = ""  # not published

    def outcome(skill):
        wrong = rng.choice([*letters, "AB", "CD", ""])
        prediction = answer if answer and rng.random() < skill else wrong
        unfinished = prediction == "" and rng.random() < 0.5
        return Outcome(prediction=prediction, correct=prediction == answer if answer else None, unfinished=unfinished)

    scoring = "logits" if exam else "text"
    others = sorted({"logits", "text", "generate"} - {scoring})
    outcomes = {method: outcome(skill / 2) for method in others if rng.random() < 0.8}
    headline = outcome(skill)
    if rng.random() < 0.1:
        headline = Outcome(too_long=True, correct=False if answer else None)
    if answer and rng.random() < 0.8:
        outcomes["loss"] = Outcome(nll=rng.uniform(0.1, 9), n_tokens=rng.randint(1, 6))
    return make_prediction(
        headline,
        outcomes,
        id=id,
        scoring=scoring,
        answer=answer,
        exam=exam,
        metadata={"exam_type": rng.choice(EXAM_TYPES)} if exam == "cmb" else {},
        topic=rng.choice(TOPICS) if exam == "cmmlu" else "",
        language=rng.choice(("zh", "zh", "en")),
        multiple_answers=multiple_answers,
        n_options=len(letters),
        longest_option=rng.choice(letters),
        shots=rng.choice((0, 0, 5)),
    )


def random_predictions(seed, n=200):
    """Return predictions of all kinds, a tenth of them not done."""
    rng = random.Random(seed)
    predictions = []
    for i in range(n):
        kind = rng.choice(("cmb", "cmb", "cmmlu", "cmexam", "", "free-form"))
        if kind == "free-form":
            outcome = Outcome(reply="It is uric acid.", prediction="It is uric acid.", correct=rng.random() < 0.5)
            fields = {"id": str(i), "scoring": "generate", "answer": "uric acid", "exam": "", "language": "en"}
            predictions.append(make_prediction(outcome, n_options=0, longest_option="", **fields))
        else:
            predictions.append(random_prediction(rng, str(i), kind))
        if rng.random() < 0.1:
            fields = vars(predictions[-1]) | {"outcomes": {}}
            predictions[-1] = make_prediction(**{k: v for k, v in fields.items() if k not in ("prediction", "correct")})
    return predictions
