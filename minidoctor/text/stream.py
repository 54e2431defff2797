"""Streaming: text from tokens as they are generated, in whole characters and safe to print."""

import re

from minidoctor.text.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # decoded from the first bytes of a character whose other bytes are in later tokens
CONTEXT = 16  # tokens that are decoded again together with later ones
# Control characters except newline and tab, line and paragraph separators, bidirectional marks, surrogates.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class TextStream:
    """An incremental decoder: the chunks and the rest together are the decoded text of all tokens.

    Each push decodes a bounded number of tokens. Earlier ones are dropped where this cannot change later text: if the
    text of all tokens ends with the text of the kept ones. With the decoder ByteFallback of a tokenizer.json, one
    invalid byte changes the text of all adjacent byte tokens, so that such a sequence is kept as a whole.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tail: list[int] = []
        self.held = ""  # replacement characters of dropped tokens that were not returned
        self.n_sent = 0  # characters of the decoded tail that were returned
        self.incomplete = False  # True after the first bytes of a character
        pair = [i for i in map(tokenizer.backend.token_to_id, ("<0x61>", "<0xFF>")) if i is not None]  # "a", invalid
        self.never_first = set() if "a" in tokenizer.decode(pair) else tokenizer.byte_ids

    def push(self, *ids: int) -> str:
        """Return the text that these tokens complete, which may be empty."""
        self.tail += filter(self.tokenizer.has_text, ids)
        text = self.tokenizer.decode(self.tail)
        complete = text.rstrip(INCOMPLETE)
        self.incomplete = complete != text
        chunk = complete[self.n_sent :]
        if chunk:
            chunk, self.held = self.held + chunk, ""
        self.n_sent = max(self.n_sent, len(complete))
        kept = self.tail[-CONTEXT:]
        if len(self.tail) >= 2 * CONTEXT and kept[0] not in self.never_first:
            kept_text = self.tokenizer.decode(kept)
            if kept_text and text.endswith(kept_text):
                n_dropped = len(text) - len(kept_text)
                self.held += text[self.n_sent : n_dropped]
                self.tail, self.n_sent = kept, max(0, self.n_sent - n_dropped)
        return chunk

    def rest(self) -> str:
        """Return the text that was held back, with a replacement character for bytes that are not a character."""
        return self.held + self.tokenizer.decode(self.tail)[self.n_sent :]


def printable(text: str) -> str:
    r"""Escape text that could control the terminal: `"\x1b[2J"` becomes `"\\x1b[2J"`.

    Newline and tab stay. The marks that reverse the reading direction are also escaped.
    """
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)
