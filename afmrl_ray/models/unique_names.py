"""Decoding without repeated attribute names, which make a completion invalid.

A token is forbidden where it would complete a name that the completion already has. The choice is cut off as it is by
top-k or top-p sampling: log-probabilities stay those of the whole distribution, which the learner computes too. A name
whose first tokens spell a used name (`color family` after `color`) is not written either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from afmrl_ray.attributes.text import SEPARATOR

_MARK = ":"
"""Ends a name."""


@dataclass
class _Row:
    """One completion: folded names of the pairs that it has begun, and the text since the last separator."""

    names: set[str] = field(default_factory=set)
    text: str = ""

    def add(self, text: str) -> None:
        self.text += text
        *closed, self.text = self.text.split(SEPARATOR)
        for segment in closed:
            self.names.add(_folded(segment.partition(_MARK)[0]))

    @property
    def prefix(self) -> str | None:
        """The name as far as it is written; None where no name that may repeat is being written."""
        return None if _MARK in self.text or not self.names else _folded(self.text, end=False)


class TokenEnds:
    """Tokens by what they add to a name.

    Args:
        texts: text of every token by id.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self._by_end: dict[str, list[int]] = {}
        for index, text in enumerate(texts):
            if SEPARATOR not in text.partition(_MARK)[0]:
                self._by_end.setdefault(_folded(text.partition(_MARK)[0], start=False), []).append(index)

    def completing(self, name: str, prefix: str) -> list[int]:
        """Ids of the tokens that make `name` of `prefix`, or that end the name if both are equal."""
        rest = name[len(prefix) :]
        found = self._by_end.get(rest, [])
        # At the start of a name, and where a space was written already, a token may bring a space of its own.
        return found if prefix and not prefix.endswith(" ") else found + self._by_end.get(f" {rest}", [])


class UniqueNames:
    """Forbids tokens of a batch of completions, step by step.

    Args:
        ends: of the tokenizer.
        rows: completions.
    """

    def __init__(self, ends: TokenEnds, rows: int) -> None:
        self._ends, self._rows = ends, [_Row() for _ in range(rows)]

    def add(self, tokens: Sequence[int]) -> None:
        """The next token of every completion, whatever it is after its end."""
        for row, token in zip(self._rows, tokens, strict=True):
            row.add(self._ends.texts[token])

    def forbidden(self) -> Mapping[int, list[int]]:
        """Token ids that must not come next, by row; rows without any are left out."""
        found: dict[int, list[int]] = {}
        for index, row in enumerate(self._rows):
            if (prefix := row.prefix) is None:
                continue
            tokens = [
                token for name in row.names if name.startswith(prefix) for token in self._ends.completing(name, prefix)
            ]
            if tokens:
                found[index] = tokens
        return found

    def without_forbidden(self, logp: Tensor) -> Tensor:
        """Log-probabilities [rows, V] with -inf at the forbidden tokens; a copy if there are any."""
        found = self.forbidden()
        if not found:
            return logp
        rows = [row for row, tokens in found.items() for _ in tokens]
        tokens = [token for each in found.values() for token in each]
        return logp.index_put((torch.tensor(rows, device=logp.device), torch.tensor(tokens, device=logp.device)),
                              logp.new_tensor(-torch.inf))  # fmt: skip


def _folded(text: str, *, start: bool = True, end: bool = True) -> str:
    """Lower case with single spaces, as the parser compares names; an outer space is kept where it is not cut."""
    folded = " ".join(text.lower().split())
    if not folded:
        return ""
    before = " " if not start and text[0].isspace() else ""
    after = " " if not end and text[-1].isspace() else ""
    return f"{before}{folded}{after}"
