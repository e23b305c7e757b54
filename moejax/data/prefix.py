"""The blank that tokenizers put before a text, so that its first word looks like any other's."""

from __future__ import annotations

from typing import Any


def inside(model: dict, *, after_special: bool) -> dict:
    """The tokenizer, in Hugging Face's JSON, for text that follows other text.

    Within one text a `Metaspace` pre-tokenizer puts its blank before the first stretch between
    special tokens ("first") or before each ("always"); the `Prepend` normalizer and `ByteLevel`
    with `add_prefix_space` before each. Where text goes on there is none.

    Args:
      model: what reads a whole text.
      after_special: the text follows a special token; otherwise other text.
    """
    parts = {"pre_tokenizer": _cut(model.get("pre_tokenizer"), after_special)}
    if not after_special:
        parts["normalizer"] = _without_prepend(model.get("normalizer"))
    return model | parts


def _cut(part: Any, after_special: bool) -> Any:
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence":
        found = [_cut(one, after_special) for one in part["pretokenizers"]]
        return part | {"pretokenizers": found}
    if part.get("type") == "Metaspace":
        scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space") else "never")
        if scheme == "first" or not after_special:
            rest = {name: value for name, value in part.items() if name != "add_prefix_space"}
            return rest | {"prepend_scheme": "never"}
    if part.get("type") == "ByteLevel" and not after_special:
        return part | {"add_prefix_space": False}
    return part


def _without_prepend(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") == "Prepend":
        return None
    if part.get("type") != "Sequence":
        return part
    found = [_without_prepend(one) for one in part["normalizers"]]
    return part | {"normalizers": [one for one in found if one is not None]}
