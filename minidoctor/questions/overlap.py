"""Questions that occur in training and in evaluation, compared by a hash of the normalized text.

The accuracy on a question that was trained on measures memory. Hashes of 8 bytes are stored with an adapter, so that a
later evaluation can report such questions without the training file. Unicode's compatibility forms (full-width,
decomposed), letter case, white space and punctuation are normalized. Signs are kept: "HBsAg(-)" is not "HBsAg(+)".
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from itertools import accumulate

from minidoctor.questions.rows import Row

DASHES = re.compile("[\u2010-\u2015\u2212]")  # hyphens, dashes and the minus sign
SPACES = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # all but those between two digits
# Punctuation that changes the meaning: any mark between two digits ("5.5", "1:2", "5-10"), % and ‰, and a single "-"
# that does not join two letters ("first-line" equals "first line", but "HBsAg -" does not equal "HBsAg").
SIGNS = re.compile(r"(?<=\d)\W(?=\d)|[%‰]|(?<!-)(?<![^\W\d])-(?!-)|(?<!-)-(?![^\W\d])(?!-)")
OPTION = re.compile(r"^[A-Z]\s*[.、:)]\s*(.+)$", re.MULTILINE)  # a line "A. text"


def normalize_question(text: str) -> str:
    """Return the letters, digits and signs of a text in NFKC, case-folded."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = SPACES.sub("", " ".join(DASHES.sub("-", text).split()))
    signs = {match.start() for match in SIGNS.finditer(text)}
    # Letters, marks, numbers and symbols stay; other punctuation and characters without width do not.
    return "".join(c for i, c in enumerate(text) if i in signs or unicodedata.category(c)[0] in "LMNS")


def hash_question(question: str, options: Sequence[str] = ()) -> int:
    """Return 8 bytes of SHA-256 as a signed integer. The order of the options does not matter.

    Without `options`, lines "A. text" of the question count as options: training data often has them there.
    """
    question = unicodedata.normalize("NFKC", question)
    lines = OPTION.findall(question)
    if len(lines) > 1 and not options:
        question, options = OPTION.sub("", question), lines
    parts = [normalize_question(question), *sorted(map(normalize_question, options))]
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:8], "big", signed=True)


def question_hash(row: Row) -> int:
    """Return the hash of the question that a row asks, with its options and the user's earlier turns."""
    earlier = [message["content"] for message in row.messages if message["role"] == "user"][:-1]
    return hash_question("\n".join([*earlier, row.question]), list(row.options.values()))


def training_hashes(row: Row) -> set[int]:
    """Return the hashes of all questions that are learned from a row: each turn of the user, with and without context.

    A question of the evaluation was trained on if its `question_hash` is among them.
    """
    turns = [message["content"] for message in row.messages if message["role"] == "user"]
    return {question_hash(row), *map(hash_question, [*turns, *accumulate(turns, "{}\n{}".format)])}
