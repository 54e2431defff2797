import pytest

from minidoctor.evaluate.free_form import contains


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("It is uric acid.", "uric acid"),
        ("URIC\n  Acid", "uric acid"),
        ("Take 15mg daily.", "15 mg"),
        ("15 mg", "15mg"),
        ("１５ＭＧ", "15 mg"),
        ("(15 mg)", "15 mg"),
        ("0.5 mg", "0.5mg"),
        ("Me\u0301nie\u0300re's disease", "Ménière's disease"),
        ("Crohn\u2019s disease", "Crohn's disease"),
        ("5 \u00b5g", "5 \u03bcg"),
        ("39.5℃", "39.5 °C"),
        ("HEUSTRASSE", "Heustraße"),
        ("half: ½", "1/2"),
        ("beta\u2010blocker", "Beta-blocker"),
        ("No, never.", "no"),
        ("vitamin B12 deficiency", "Vitamin B12"),
        ("关键检查是尿酸。", "尿酸"),
        ("尿 酸", "尿酸"),
        ("做ＣＴ检查", "CT"),
        ("维生素B12缺乏", "维生素b12"),
        ("<think>Is it gout?</think>asthma", "asthma"),
    ],
)
def test_reply_contains_the_answer(reply, answer):
    assert contains(reply, answer)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("female", "male"),
        ("15 mg", "5 mg"),
        ("15mg", "5mg"),
        ("1.5 mg", "5 mg"),
        (".5 mg", "5 mg"),
        ("1,500 mg", "500 mg"),
        ("50 mg", "5 mg"),
        ("5 mg", "5 m"),
        ("not known", "no"),
        ("neurology", "urology"),
        ("Urologe", "urolog"),
        ("Ménière", "re"),
        ("vitamin B12", "vitamin B1"),
        ("vitamin B12", "vitamin B"),
        ("HbA1c", "HbA1"),
        ("维生素B12", "维生素B1"),
        ("第11型", "第1型"),
        ("uricacid", "uric acid"),
        ("uric (or lactic) acid", "uric acid"),
        ("尿", "尿酸"),
        ("", "gout"),
        ("gout", "\u200b"),
        ("<think>Is it gout?</think>asthma", "gout"),
        ("<think>It is gout.", "gout"),
    ],
)
def test_reply_does_not_contain_the_answer(reply, answer):
    assert not contains(reply, answer)
