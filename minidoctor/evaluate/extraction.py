"""The option letters that a model chose, read from what it wrote as the answer to a multiple-choice question.

    "..., so I would choose (c)." -> "C"     "A、C、E" -> "ACE"     "无法确定" -> ""

Strict: what these rules do not read is unanswered, there is no default letter. The first that reads something decides.

1. The last statement of the answer ("答案是", "故选", "the answer is", "I choose"), with letters or one option's text.
2. The reply begins with letters that punctuation follows, or with options restated ("A. text"), or is one's text.

All options restated are the question repeated ("ABCDE" alone is an answer), and an option's letter with another's text
is none.
"""

import re
import unicodedata

FOLD = str.maketrans("[{【「『〔《]}】」』〕》", "(((((((" + ")))))))", '"“”‘’`*_#$\u200b\ufeff')
LONGEST = 20_000  # characters; an answer stands in the last of them
STATEMENT = re.compile(
    r"(?:(?<!错误)(?<!错误的)答案|(?<!不)正确的(?:选项)?|(?<!不)正确选项|最佳选择)(?:应该|应当|应)?[是为:]{0,2}"
    r"(?:选(?=\s?[A-Z]))?"
    # Not every 选: 首选 and 可选 speak of treatments, 不选 and 若选 of what is not chosen.
    r"|(?:^|(?<=[\s,.;:。应该故题此以我则]))(?<!不.)选(?:择|:)?"
    r"|(?i:(?<!wrong )(?<!incorrect )(?<!not the )\banswers?\b|\b(?:correct|right|best|final|my) (?:option|choice)\b)"
    r"[^.:?\n]{0,40}?(?::|$|\b(?:is|are|be)\b)"
    r"|(?i:(?<!if )\b(?:i|i'd|would|will|therefore,?|so) (?:choose|select|pick|go with)\b)|\\boxed",
    re.MULTILINE,
)
FILLER = re.compile(
    r"\)?(?:-\s)?[^\w.?!;。,、)-]*(?:(?i:(?:most )?likely|probably|definitely|options?|both)\b|选?项)?[^\w.?!;。,、)-]*"
)
COMMA = r",\s?(?:and\s)?(?=\(?[A-Za-z]\)?(?:$|\s?[,、.;。)和及与都均两三\n]|\sand\b))"  # not in "C, A is wrong"
AND = rf"(?:{COMMA}|\s?[、/&]\s?|\sand\s|\s?[和及与]\s?| |\n(?=[A-Z](?:\n|$)))"
LETTER = r"\(?[A-Z](?![A-Za-z0-9])\)?"
# Atomic: the "A" of "A和B都不对" alone would be another answer.
RUN = re.compile(rf"(?>[A-Z]{{2,26}}(?![A-Za-z0-9])|{LETTER}(?:{AND}?{LETTER})*|(?i:{LETTER}(?:{AND}{LETTER})*))")
# What may follow: not in "B-cell", "A%", "A patient", "e.g.", "A. wrong".
WRONG = r"(?![.、:)\s]{0,3}(?:选?项)?[:\s是都均]*(?i:is|are)?\s?(?:错|不正确|不对|(?i:wrong|incorrect)\b))"
END = r"$|\n|[;。(]|,(?!\s?[A-Z]\s?(?:[,、或和]|or\b|and\b))|[.:、)](?!\w\.)|-\s|因|(?i:because|since)\b"
STOP = re.compile(rf"{WRONG}(?:(?<=\))|\s?(?:{END}|[选两三]?项(?!\s?[:是有为])))")
CORRECT = re.compile(r"(?:选?项)?(?:[是都]|\s(?:is|are)\s)*(?:the )?(?:正确|对|correct)(?: answer)?(?=$|[\s.。,;(因])")
BETWEEN = re.compile(r"[ \n.,;。、)]*")  # two restated options
NAMED = re.compile(r"\(?([A-Za-z])(?![A-Za-z0-9])[.、:)\s]*")  # in front of its option's text


def read_letters(reply: str, options: dict[str, str]) -> str:
    """The chosen letters in the order of the options, "" if there is no answer that can be read."""
    reply = reply[-LONGEST:].rpartition("</think>")[2]  # some prompts open the block themselves
    if "<think>" in reply:
        return ""
    text = normalize(reply)
    places = [statement.end() for statement in STATEMENT.finditer(text)]
    texts = {letter: normalize(option).rstrip(".。;,").lower() for letter, option in options.items()}
    read = (letters_at(text, at, texts) for at in (*reversed(places), 0))
    chosen = next((letters for letters in read if letters is not None), "")
    return "".join(letter for letter in options if letter in chosen) if set(chosen) <= set(options) else ""


def normalize(text: str) -> str:
    """Full width to half width, all brackets round, no markdown or LaTeX, each white space one."""
    # One by one: a whole text full of combining marks would be sorted in quadratic time.
    text = "".join(unicodedata.normalize("NFKC", character) for character in text)
    text = re.sub(r"\\(?:text\w*|math\w*)", "", text).translate(FOLD)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def letters_at(text: str, start: int, texts: dict[str, str]) -> str | None:
    """The letters that stand at a place of the text; "" if what stands there is contradictory, None if nothing."""
    beginning, at = start == 0, FILLER.match(text, start).end()  # type: ignore[union-attr]  # it matches the empty text
    if option := option_at(text, start, texts, beginning) or option_at(text, at, texts, beginning):
        return option
    restated = ""
    while (name := NAMED.match(text, at)) and (option := option_at(text, name.end(), texts)):
        if option != name[1].upper():
            return ""  # "B. asthma" where asthma is C
        restated, at = restated + option, name.end() + len(texts[option])
        at = BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty text
    if restated:
        everything = len(restated) > 1 and set(restated) == set(texts)
        return None if everything or goes_on(text[at - 1 :], restated, texts) else restated
    run = RUN.match(text, at)
    if not run:
        return None
    letters, rest = re.sub(r"\bAND\b|[^A-Z]", "", run[0].upper()), text[run.end() :]
    if beginning and run[0][-1].islower() and not re.match(r"\s?(?:$|[\n.:)、])", rest):
        return None  # "a, perhaps"
    correct = CORRECT.match(rest)
    if correct and re.search("正确|correct", rest[correct.end() :]):
        return None  # one verdict of several
    listed = not rest.startswith("\n") and goes_on(rest, letters, texts)
    return letters if correct or (STOP.match(text, run.end()) and not listed) else None


def goes_on(rest: str, letters: str, texts: dict[str, str]) -> bool:
    """Whether the option after these follows, as in a list of all of them with or without comments."""
    order = "".join(texts)
    following = order[order.find(letters[-1]) + 1 :][:1]
    return bool(following and re.search(rf"\s\W?{following}(?:[.、:)]|\s-\s)\s?\w", rest))


def option_at(text: str, at: int, texts: dict[str, str], whole: bool = False) -> str | None:
    """The letter of the one option whose text stands here, with nothing after it if `whole`."""
    # An option that reads like a letter cannot be told from it: there the letter counts.
    named = {letter: option for letter, option in texts.items() if option and option.upper() not in texts}
    found = [letter for letter, option in named.items() if text[at : at + len(option)].lower() == option]
    longest = max((len(texts[letter]) for letter in found), default=0)
    here = [letter for letter in found if len(texts[letter]) == longest]
    rest = text[at + longest : at + longest + 50]
    stop = re.match(r"\s?(?:$|[\n,;。(]|[.:、)](?!\w)|因|because\b)", rest)
    ends = not re.search(r"\w", rest) if whole else stop
    return here[0] if len(here) == 1 and ends else None
