"""A tokenizer small enough to check by eye: one id per character, and named tokens that a text may spell out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NAMED = ("<pad>", "<bos>", "<eos>", "<turn>")
_OFFSET = 100  # leaves room under the characters

CHAT = "chat"
TRIMMING_CHAT = "trimming chat"


@dataclass(frozen=True)
class CharacterTokenizer:
    """Follows TokenizerLike.

    Attributes:
        chat_template: CHAT, TRIMMING_CHAT (which alters the content), or None.
        prefix_space: whether every text starts with a space, as sentencepiece does it.
        merge: a pair of characters that are one token (id 99).
    """

    chat_template: str | None = None
    prefix_space: bool = False
    merge: str | None = None
    add_bos: bool = False
    eos_id: int | None = 2

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        pieces = re.findall("|".join((*map(re.escape, [*_NAMED, self.merge or "<pad>"]), ".")), text, re.DOTALL)
        if self.prefix_space and text:
            pieces = [" ", *pieces]
        ids = [self._id(piece) for piece in pieces]
        return [1, *ids] if (self.add_bos if add_bos is None else add_bos) else ids

    def _id(self, piece: str) -> int:
        if piece in _NAMED:
            return _NAMED.index(piece)
        return 99 if piece == self.merge else ord(piece) + _OFFSET

    def decode(self, ids: Sequence[int]) -> str:
        named = {**dict(enumerate(_NAMED)), 99: self.merge or ""}
        return "".join(named[i] if i in named else chr(i - _OFFSET) for i in ids)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        turns = []
        for message in messages:
            content = message["content"]
            if self.chat_template == TRIMMING_CHAT:
                content = content.upper()
            turns.append(f"<bos><turn>{message['role']}\n{content}<eos>\n")
        return "".join(turns) + ("<turn>assistant\n" if add_generation_prompt else "")
