"""No attribute name twice in a completion: while decoding, tokens that would repeat a name are forbidden.

Two kinds of tokens are forbidden where a name is written: those that complete the letters of a name that the completion
has already, and colons after such a name. The second alone would suffice for the parser (`attributes.text`), but it
comes too late: after `color: red; color` the model can only go on with an invalid pair.

The price: after a name, another one that begins with all of it at a token's end cannot be written (`heel height` after
`heel`; the other order can). Greedy decoding changes only where it would write a name, whole, a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from afmrl_ray.attributes.text import PAIR_MARK, SEPARATOR, fold

_COLON, _SEMICOLON = PAIR_MARK.encode(), SEPARATOR.encode()


class NameTokens:
    """What a byte-level tokenizer's tokens do to attribute text.

    Attributes:
        data: bytes of every token, by id.
        words: tokens without colon and separator, by their bytes in normal form.
        endings: tokens that contain a colon, by the bytes before it: they complete a name that has begun.
        named_endings: the same by the name in them, which they complete where none has begun.
        whole: tokens that contain a name from its separator to its colon, by that name.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = set(tokenizer.get_added_vocab())
        vocabulary = tokenizer.get_vocab()
        code = {letter: byte for byte, letter in _byte_letters().items()}
        self.data = [b""] * (max(vocabulary.values()) + 1)
        self.words: dict[bytes, list[int]] = {}
        self.endings: dict[bytes, list[int]] = {}
        self.named_endings: dict[str, list[int]] = {}
        self.whole: dict[str, list[int]] = {}
        for token, index in vocabulary.items():
            raw = token.encode() if token in added else bytes(code[letter] for letter in token)
            self.data[index] = raw
            first, *later = raw.split(_SEMICOLON)
            if _COLON in first:
                before = first.partition(_COLON)[0]
                self.endings.setdefault(before, []).append(index)
                self.named_endings.setdefault(_name(before), []).append(index)
            elif not later:
                self.words.setdefault(_folded(raw), []).append(index)
            for segment in later:
                if _COLON in segment:
                    self.whole.setdefault(_name(segment.partition(_COLON)[0]), []).append(index)


@dataclass
class _Written:
    """State of one completion.

    Attributes:
        names: complete names.
        letters: the same as bytes, which tokens can split within a character.
        begun: bytes of the name that is being written; none inside a value.
    """

    names: set[str] = field(default_factory=set)
    letters: set[bytes] = field(default_factory=set)
    begun: bytes | None = b""

    def write(self, data: bytes) -> None:
        first, *later = data.split(_SEMICOLON)
        self._write_segment(first)
        for segment in later:
            self.begun = b""
            self._write_segment(segment)

    def _write_segment(self, data: bytes) -> None:
        if self.begun is None:
            return
        before, colon, _ = data.partition(_COLON)
        self.begun += before
        if colon:
            if name := _name(self.begun):
                self.names.add(name)
                self.letters.add(_folded(self.begun))
            self.begun = None

    def repeating(self, tokens: NameTokens) -> list[int]:
        """Ids of the tokens that would complete one of `names` again."""
        if not self.names:
            return []
        found = [index for name in self.names & tokens.whole.keys() for index in tokens.whole[name]]
        if self.begun is None:
            return found
        start = _folded(self.begun)
        for letters in self.letters:
            if letters.startswith(start) and (rest := letters[len(start) :].lstrip()):
                same = tokens.words.get(rest, ())
                found += [index for index in same if _folded(self.begun + tokens.data[index]) == letters]
        if not start:
            return found + [index for name in self.names for index in tokens.named_endings.get(name, ())]
        stem = _name(self.begun.rstrip(b"<|"))
        # Most steps end here: no name begins like what was written.
        if any(name.startswith(stem) for name in self.names):
            for before, ids in tokens.endings.items():
                if _name(self.begun + before) in self.names:
                    found += ids
        return found


class UniqueNames(LogitsProcessor):
    """Forbids repeated names in a batch of completions; the state of each is kept from step to step.

    `generate` calls `forbid` and `write`; as a `LogitsProcessor` it works in transformers' own sampling too.

    Args:
        tokens: of the tokenizer.
        rows: B completions.
    """

    def __init__(self, tokens: NameTokens, rows: int) -> None:
        self._tokens = tokens
        self._rows = [_Written() for _ in range(rows)]
        self._read: int | None = None

    def write(self, tokens: Sequence[int]) -> None:
        """Append a token [B] to every completion."""
        for row, token in zip(self._rows, tokens, strict=True):
            if token < len(self._tokens.data):
                row.write(self._tokens.data[token])

    def forbid(self, logits: Tensor) -> Tensor:
        """Logits or log-probabilities [B, V] with -inf at the tokens that would repeat a name; not renormalised."""
        places = [(row, token) for row, each in enumerate(self._rows) for token in each.repeating(self._tokens)]
        if not places:
            return logits
        rows, tokens = torch.tensor(places, device=logits.device).T
        return logits.index_put((rows, tokens), torch.full_like(rows, -torch.inf, dtype=logits.dtype))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `transformers.LogitsProcessor`; what `input_ids` [B, L] has at the first call is the prompt."""
        if self._read is not None:
            for column in input_ids[:, self._read :].T:
                self.write(column.tolist())
        self._read = input_ids.shape[1]
        return self.forbid(scores)


def _folded(data: bytes) -> bytes:
    """Bytes of a name in lower case (ASCII only) with single spaces."""
    return b" ".join(data.lower().split())


def _name(data: bytes) -> str:
    return fold(data.decode(errors="replace"))


def _byte_letters() -> dict[int, str]:
    """The letter that a byte-level vocabulary (GPT-2, 2019) writes for each byte: itself if printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + place) for place, byte in enumerate(others)}
