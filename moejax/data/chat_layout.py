"""Which text of a rendered conversation is the template's, which a message's, and what is scored.

A template is rendered with placeholders in the place of the contents, once for every sequence of
roles. A second rendering, with the contents, must give the same text: a template that looks into
messages is refused rather than masked by guess.

A response is scored from where generation would begin (behind the template's generation prompt,
or else at the content) to the first special token that closes the turn.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from moejax.data.chat_template import ChatTemplate, Messages
from moejax.data.errors import DataError

# Private characters stand for the contents. The wide blank around them shows what is stripped.
_BLANK, _BEGIN, _END = "\u2003", "\ue000", "\ue001"
_SLOT = re.compile(f"({_BLANK}?){_BEGIN}([0-9]+){_END}({_BLANK}?)")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a conversation: of the template's `own`, or of a message's content.

    `special` is the special token that the template's own text consists of, if it is one.
    """

    text: str
    scored: bool
    own: bool
    special: str | None = None


def laid_out(
    template: ChatTemplate, messages: Messages, specials: tuple[str, ...], where: str
) -> list[Piece]:
    """The pieces of a conversation, in order; together they are what the template renders.

    Args:
      template: of the tokenizer.
      messages: of one conversation.
      specials: texts of the tokenizer's special tokens.
      where: file and line, for messages.

    Raises:
      DataError: the template refuses the roles, drops, repeats or reorders messages, or its text
        depends on what messages say.
    """
    try:
        pieces = []
        for piece in _shape(template, tuple(role for role, _ in messages), specials):
            if isinstance(piece, _Slot):
                pieces.append(piece.filled(*messages[piece.index]))
            else:
                pieces.append(piece)
        if "".join(piece.text for piece in pieces) != template.render(messages):
            raise DataError(
                "the chat template changes what messages say, so it is not known which tokens are "
                "the response: use a template that keeps contents as they are"
            )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return pieces


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The place of a message's content, and whether the template strips its blanks."""

    index: int
    strip_left: bool
    strip_right: bool

    def filled(self, role: str, content: str) -> Piece:
        content = content.lstrip() if self.strip_left else content
        content = content.rstrip() if self.strip_right else content
        return Piece(content, scored=role == "assistant", own=False)


@functools.lru_cache(maxsize=4096)
def _shape(
    template: ChatTemplate, roles: tuple[str, ...], specials: tuple[str, ...]
) -> tuple[Piece | _Slot, ...]:
    """A conversation of these roles: the template's text, cut at special tokens, and slots."""
    texts, slots = _split(_rendered(template, roles))
    if [slot.index for slot in slots] != list(range(len(roles))):
        raise DataError(
            "the chat template drops, repeats or reorders messages of the roles "
            f"{', '.join(roles)}: use one that writes every message once, in order"
        )
    special = re.compile("|".join(re.escape(s) for s in sorted(specials, key=len)[::-1]) or r"(?!)")
    scored = [(0, 0)] * len(texts)  # of texts[i]: (end of what closes a turn, start of the next)
    for i, text in enumerate(texts):
        closing = _closing(template, roles, i - 1, text, special) if i else 0
        opening = _opening(template, roles, i, text) if i < len(roles) else len(text)
        scored[i] = (closing, max(closing, opening))
    out: list[Piece | _Slot] = []
    for i, text in enumerate(texts):
        end, start = scored[i]
        for part, is_scored in ((text[:end], True), (text[end:start], False), (text[start:], True)):
            out += _cut(part, is_scored, special)
        out += slots[i : i + 1]
    return tuple(out)


def _opening(template: ChatTemplate, roles: tuple[str, ...], index: int, before: str) -> int:
    """Where in the text before message `index` its response begins; its length where nowhere."""
    if roles[index] != "assistant" or index == 0:
        return len(before)
    earlier = _rendered(template, roles[:index])
    prompted = _rendered(template, roles[:index], add_generation_prompt=True)
    header = prompted[len(earlier) :] if prompted.startswith(earlier) else ""
    at = before.rfind(header) if header else -1
    return len(before) if at < 0 else at + len(header)


def _closing(
    template: ChatTemplate, roles: tuple[str, ...], index: int, after: str, special: re.Pattern
) -> int:
    """Where in the text behind message `index` its turn ends; 0 where nothing closes it."""
    if roles[index] != "assistant":
        return 0
    tail = _split(_rendered(template, roles[: index + 1]))[0][-1]
    found = special.search(tail)
    end = found.end() if found else 0
    if after[:end] != tail[:end]:
        raise DataError(
            "the chat template closes a response differently when others follow: use one that "
            "always closes it alike"
        )
    return end


def _cut(text: str, scored: bool, special: re.Pattern) -> list[Piece]:
    out, at = [], 0
    for found in special.finditer(text):
        out.append(Piece(text[at : found.start()], scored, own=True))
        out.append(Piece(found.group(), scored, own=True, special=found.group()))
        at = found.end()
    return [piece for piece in [*out, Piece(text[at:], scored, own=True)] if piece.text]


def _rendered(
    template: ChatTemplate, roles: tuple[str, ...], *, add_generation_prompt: bool = False
) -> str:
    slots = [f"{_BLANK}{_BEGIN}{i}{_END}{_BLANK}" for i in range(len(roles))]
    messages = list(zip(roles, slots, strict=True))
    return template.render(messages, add_generation_prompt=add_generation_prompt)


def _split(text: str) -> tuple[list[str], list[_Slot]]:
    """The template's texts and the slots between them."""
    texts, slots, at = [], [], 0
    for found in _SLOT.finditer(text):
        texts.append(text[at : found.start()])
        slots.append(_Slot(int(found[2]), strip_left=not found[1], strip_right=not found[3]))
        at = found.end()
    return [*texts, text[at:]], slots
