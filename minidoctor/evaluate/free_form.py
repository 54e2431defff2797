"""Free-form answers: correct if they contain the expected one as whole words and numbers.

"female" does not contain "male", "15 mg" not "5 mg", "not known" not "no". "15mg" equals "15 mg", "１５ ＭＧ" equals
"15 mg". Chinese has no spaces between words, so there it is containment of characters.
"""

import re
import unicodedata

from minidoctor.text.reasoning import final_part

RULE = "contains the answer as whole words and numbers (Chinese: as characters); case, spaces, width ignored"
FOLD = str.maketrans("’‘“”‐‑‒–—−⁄", "''\"\"------/")
LETTER = "[a-zß-öø-ɏͰ-ԯḀ-ỿ\u0300-\u036f]"  # Latin, Greek, Cyrillic and combining marks, after case folding
NUMBER = r"\d*\.\d+|\d+(?:,\d{3})*(?:\.\d+)?"
# A word may contain digits ("hba1c", "b12"), a number ends before its unit ("15mg"), other characters are single.
TOKEN = re.compile(rf"{LETTER}(?:{LETTER}|\d)*|{NUMBER}|[^\s\u200b\u200d\ufeff]")


def contains(reply: str, answer: str) -> bool:
    """Return whether the reply, after its reasoning, contains the tokens of the answer in a row."""
    texts = (unicodedata.normalize("NFKC", text).casefold() for text in (answer, final_part(reply) or ""))
    expected, actual = (" ".join(TOKEN.findall(text.translate(FOLD))) for text in texts)
    return bool(expected) and f" {expected} " in f" {actual} "
