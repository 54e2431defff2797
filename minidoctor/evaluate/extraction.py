"""Answer extraction: the option letters that a generated answer to a multiple-choice question chooses.

    "..., so I would choose (c)." -> "C"     "A、C、E" -> "ACE"     "无法确定" -> ""

Only the part after the reasoning of a reply is read. There is no default letter: an answer that these rules cannot read
is unanswered. The first rule that reads something decides.

1. The last statement of the answer ("答案是", "故选", "the answer is", "I choose"), with letters or one option's text.
2. The reply begins with letters before punctuation, with restated options ("A. text"), or is the text of one option.
3. The last conclusion ("因此", "最可能的诊断是", "the most likely diagnosis is"), with the text of an option.
4. One option is called correct and others wrong ("A错误，B正确").

All options restated are the question repeated ("ABCDE" without texts is an answer). A letter with the text of another
option is unreadable.
"""

import re
import unicodedata

from minidoctor.text.reasoning import final_part

FOLD = str.maketrans("[{【「『〔《]}】」』〕》", "(((((((" + ")))))))", '"“”‘’`*_#$\u200b\ufeff')
MAX_LENGTH = 20_000  # characters; only the last ones are read
COMMA = r",\s?(?:and\s)?(?=\(?[A-Za-z]\)?(?:$|\s?[,、.;。)和及与都均两三\n]|\sand\b))"  # not in "C, A is wrong"
AND = rf"(?:{COMMA}|\s?[、/&]\s?|\sand\s|\s?[和及与]\s?| |\n(?=[A-Z](?:\n|$)))"
LETTER = r"\(?[A-Z](?![A-Za-z0-9])\)?"
RUN = rf"{LETTER}(?:{AND}{LETTER})*"
NEGATIVE = r"错|不正确|不对|(?i:wrong|incorrect|not (?:correct|right))"
# One letter, or several, that end a sentence: "it is B" states an answer, "it is a B-cell lymphoma" does not.
BARE = (
    rf"(?!{LETTER}\.(?: ?[\u4e00-\u9fff]|[^.。,;\n]{{0,60}}(?:{NEGATIVE})))(?={RUN}"
    r"\s?(?:[.。,;!]?\s*$|\(|[.。;]\s[A-Z\u4e00-\u9fff]|,?\s(?:because|since)\b|,?因))"
)
IT_IS = r"(?<!n't think )(?<!not think )(?<!doubt )(?<!if )(?<!whether )\bit(?: is|'?s| must be| should be)"
THUS = r"(?:因此|所以|综上(?:所述)?|故|(?i:\b(?:therefore|thus|hence|so|in conclusion)\b)),? ?"
CONCLUSION = re.compile(  # followed by letters that end a sentence, or by letters with the texts of their options
    r"(?i:\b(?:most (?:likely|probable|appropriate|suitable)|best)\b[^.:?!\n]{0,60}?\b(?:is|are|be)\b):? ?"
    rf"|最(?:可能|符合|合适|恰当|佳)[^。:,;?\n]{{0,15}}?(?<!不)[是为]:? ?|{THUS}"
)
STATEMENT = re.compile(
    r"(?:(?<!错误)(?<!错误的)答案|(?<!不)正确的(?:选项|选择)?|(?<!不)正确选项|最佳选择)(?:应该|应当|应)?[是为有:]{0,2}"
    r"(?:选择?(?=\s?[A-Z]))?"
    # Not every 选: 首选 and 可选 refer to treatments, 不选 and 若选 to options that are not chosen.
    r"|(?:^|(?<=[\s,.;:。应该故题此以我则为得述]))(?<!不.)选(?:择|:)?|^答:"
    r"|(?i:(?<!wrong )(?<!incorrect )(?<!not the )\banswers?\b"
    r"|\b(?:correct|right|best|final|my|most \w+) (?:option|choice)s?\b)"
    r"[^.:?\n]{0,40}?(?::|$|\b(?:is|are|be)\b)"
    r"|(?i:(?<!if )\b(?:i|i'd|would|will|therefore,?|so) (?:choose|select|pick|go with|lean towards?)\b)|\\boxed"
    rf"|(?:(?i:{IT_IS}|(?:\bnot|n't) \(?[A-Z]\)?,? but)|应该?是|应为|而是),? ?{BARE}|(?:{CONCLUSION.pattern}){BARE}"
    rf"|{THUS}(?=(?:选项|(?i:option ))?{RUN}(?:选?项)?(?:[是都]*正确| (?:is|are) (?:the )?correct))",
    re.MULTILINE,
)
FILLER = re.compile(
    r"\)?(?:-\s)?[^\w.?!;。,、)-]*(?:(?i:(?:most )?likely|probably|definitely|options?|both)\b|选?项)?[^\w.?!;。,、)-]*"
)
# Atomic: the "A" of "A和B都不对" must not be read as the answer.
LETTERS = re.compile(rf"(?>[A-Z]{{2,26}}(?![A-Za-z0-9])|{LETTER}(?:{AND}?{LETTER})*|(?i:{RUN}))")
# Text that can follow an answer: not in "B-cell", "A%", "A patient", "e.g.", "A. wrong".
WRONG = rf"(?![.、:)\s]{{0,3}}(?:选?项)?[:\s是都均]*(?i:is|are)?\s?(?:{NEGATIVE}))"
END = r"$|\n|[;。(!]|,(?!\s?[A-Z]\s?(?:[,、或和]|or\b|and\b))|[.:、)](?!\w\.)|-\s|因|(?i:because|since)\b"
STOP = re.compile(rf"{WRONG}(?:(?<=\))|\s?(?:{END}|[选两三]?项(?!\s?[:是有为])))")
CORRECT = re.compile(
    r"(?:选?项)?(?:[是都]|\s(?:is|are)\s)*(?:the )?(?:正确(?:的|答案)?|对|correct)(?: answer)?(?=$|[\s.。,;(因])"
)
VERDICT = re.compile(
    rf"(?<![A-Za-z0-9])([A-Z])\)?(?:选?项)?(?:\s?[,:]?\s?(?:is |是|都)?({NEGATIVE})"
    r"|[,:]?\s?[是都]?(?:正确|对)|(?: is|:) (?i:correct|right)\b)"
)
# Between two restated options: "A. asthma and C. gout", "A(asthma)和C(gout)"
NEXT = r"\)?(?:\s?[、和及与]\s?|\sand\s|\s)\(?[A-Z]\)?[.、:(]"
BETWEEN = re.compile(r"[ \n.,;。、)]*(?:(?:[和及与]|and\b)\s?)?")
LABEL = re.compile(r"\(?([A-Za-z])(?![A-Za-z0-9])[.、:)\s]*\(?")  # a letter before its option's text


def read_letters(reply: str, options: dict[str, str]) -> str:
    """Return the chosen letters in alphabetical order, "" if the answer cannot be read."""
    text = normalize((final_part(reply) or "")[-MAX_LENGTH:])
    texts = {letter: normalize(option).rstrip(".。;,").lower() for letter, option in options.items()}
    statements, conclusions = ([match.end() for match in p.finditer(text)][::-1] for p in (STATEMENT, CONCLUSION))
    starts = [(start, False) for start in (*statements, 0)] + [(start, True) for start in conclusions]
    answers = (letters_at(text, start, texts, only_texts) for start, only_texts in starts)
    chosen = next((letters for letters in answers if letters is not None), only_correct(text))
    return "".join(sorted(set(chosen))) if set(chosen) <= set(options) else ""


def only_correct(text: str) -> str:
    """Return the letter of the only option that is called correct where others are called wrong, otherwise ""."""
    verdicts = [(letter, not negative) for letter, negative in VERDICT.findall(text)]
    letters = {letter for letter, correct in verdicts if correct}
    contrasted = len(letters) == 1 and any(not correct for _, correct in verdicts)
    return letters.pop() if contrasted else ""


def normalize(text: str) -> str:
    """Return the text in half width, with round brackets only, without Markdown and LaTeX, white space folded."""
    # Per character: sorting a long run of combining marks would take quadratic time.
    text = "".join(unicodedata.normalize("NFKC", character) for character in text)
    text = re.sub(r"\\(?:text\w*|math\w*)", "", text).translate(FOLD)
    # "选项A、选项C" and "A选项和C选项" are lists of letters.
    text = re.sub(r"选项\s?(?=[A-Z](?![A-Za-z0-9]))|(?<=[A-Z])选项(?=\s?[,、和及与]\s?[A-Z](?![A-Za-z0-9]))", "", text)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def letters_at(text: str, start: int, texts: dict[str, str], only_texts: bool = False) -> str | None:
    """Return the letters at a position of the text, "" if they contradict their texts, None if there are none.

    With `only_texts`, letters without the texts of their options do not count.
    """
    beginning, at = start == 0, FILLER.match(text, start).end()  # type: ignore[union-attr]  # matches the empty text
    if option := option_at(text, start, texts, beginning) or option_at(text, at, texts, beginning):
        return option
    restated = ""
    while (label := LABEL.match(text, at)) and (option := option_at(text, label.end(), texts)):
        if option != label[1].upper():
            return ""  # "B. asthma" where asthma is C
        restated, at = restated + option, label.end() + len(texts[option])
        at = BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # matches the empty text
    if restated:
        all_options = len(restated) > 1 and set(restated) == set(texts)
        return None if all_options or continues(text[at - 1 :], restated, texts) else restated
    run = LETTERS.match(text, at)
    if only_texts or not run:
        return None
    letters, rest = re.sub(r"\bAND\b|[^A-Z]", "", run[0].upper()), text[run.end() :]
    if beginning and run[0][-1].islower() and not re.match(r"\s?(?:$|[\n.:)、])", rest):
        return None  # "a, perhaps"
    correct = CORRECT.match(rest)
    if correct and re.search("正确|correct", rest[correct.end() :]):
        return None  # one verdict of several
    listed = not rest.startswith("\n") and continues(rest, letters, texts)
    return letters if correct or (STOP.match(text, run.end()) and not listed) else None


def continues(rest: str, letters: str, texts: dict[str, str]) -> bool:
    """Return whether the next option follows, as in a list of all options with or without comments.

    A next option that is called wrong, while these letters are not, does not make a list.
    """
    order = "".join(texts)
    following = order[order.find(letters[-1]) + 1 :][:1]
    label = re.search(rf"\s\W?{following or '(?!)'}(?:[.、:)]|\s-\s)\s?\w[^\n.;。]*", rest)
    if not label:
        return False
    return not re.search(NEGATIVE, label[0]) or re.search(NEGATIVE, rest[: label.start()]) is not None


def option_at(text: str, at: int, texts: dict[str, str], whole: bool = False) -> str | None:
    """Return the letter of the one option whose text is at this position, with nothing after it if `whole`."""
    # An option text that is a letter of another option is read as the letter.
    usable = {letter: option for letter, option in texts.items() if option and option.upper() not in texts}
    matches = [letter for letter, option in usable.items() if text[at : at + len(option)].lower() == option]
    longest = max((len(texts[letter]) for letter in matches), default=0)
    best = [letter for letter in matches if len(texts[letter]) == longest]
    rest = text[at + longest : at + longest + 50]
    stop = re.match(rf"\s?(?:$|[\n,;。(]|[.:、)](?!\w)|因|because\b)|{NEXT}", rest)
    ends = not re.search(r"\w", rest) if whole else stop
    return best[0] if len(best) == 1 and ends else None
