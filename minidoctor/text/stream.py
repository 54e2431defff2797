"""TODO"""

from minidoctor.text.tokenizer import Tokenizer

# U+FFFD stands for bytes that are no character (yet): the tail of one that comes in several tokens.
INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes tokens as they come and gives out whole characters only."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.given = 0  # characters

    def push(self, *ids: int) -> str:
        """The text that these tokens complete, perhaps none."""
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        whole = text.rstrip(INCOMPLETE)
        new, self.given = whole[self.given :], max(self.given, len(whole))
        return new

    def rest(self) -> str:
        """What is left at the end, with a replacement character for each byte that never became one."""
        return self.tokenizer.decode(self.ids)[self.given :]


def printable(text: str) -> str:
    r"""Text that is safe to print: `"\x1b[2J"` becomes `"\\x1b[2J"`, so that it cannot command the terminal.

    Newline and tab stay. Also escaped are the marks that reverse the reading direction.
    """
    return "".join(c if c in "\n\t" or not is_control(c) else ascii(c)[1:-1] for c in text)


def is_control(char: str) -> bool:
    code = ord(char)
    return (
        code < 0x20
        or 0x7F <= code < 0xA0
        or 0x2028 <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
        or 0xD800 <= code < 0xE000
    )
