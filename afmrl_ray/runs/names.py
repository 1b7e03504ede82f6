"""Names of stages: a kind and, where the stage belongs to a round, the round."""

from __future__ import annotations

import re
from dataclasses import dataclass

_KIND = re.compile(r"[a-z][a-z0-9]*(-[a-z][a-z0-9]*)*")
_WITH_ROUND = re.compile(r"(?P<kind>.+)-r(?P<round>\d+)")


@dataclass(frozen=True)
class StageName:
    """A stage's kind, such as `agcl`, and its round; `str()` gives the name on disk, such as `agcl-r0`.

    Attributes:
        kind: lower-case words joined by hyphens.
        round: number of the round, from 0; none = the stage belongs to no round.

    Raises:
        ValueError: the kind is malformed or ends like a round, or the round is negative.
    """

    kind: str
    round: int | None = None

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind) or _WITH_ROUND.fullmatch(self.kind):
            raise ValueError(f"{self.kind!r} is no kind of stage; use words of lower-case letters joined by hyphens")
        if self.round is not None and self.round < 0:
            raise ValueError(f"stage {self.kind}: round {self.round} is negative; rounds count from 0")

    def __str__(self) -> str:
        return self.kind if self.round is None else f"{self.kind}-r{self.round}"

    @classmethod
    def parse(cls, text: str) -> StageName:
        """The name that `str()` wrote.

        Raises:
            ValueError: `text` is no name of a stage.
        """
        match = _WITH_ROUND.fullmatch(text)
        return cls(text) if match is None else cls(match["kind"], int(match["round"]))
