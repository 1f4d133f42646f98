"""A target's server-sent events on their way through: each goes on in the moment in which it is whole.

    pieces of any size --push--> the same bytes, cut between events     what broke off in an event is never sent

So an error can be the next event of a stream that broke off, and a character is never torn apart.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

ENDS: Final = (b"\n\n", b"\n\r\n")  # of an event


class Passing:
    """
    Args:
        final: names, or the whole data, of the events that end a stream.
        ended: that event went through.
    """

    def __init__(self, final: Collection[bytes]) -> None:
        self.final, self.ended = final, False
        self._held = bytearray()

    @property
    def held(self) -> int:
        """How many bytes of an event that isn't whole yet are here."""
        return len(self._held)

    def push(self, piece: bytes) -> bytes:
        """What can be sent now that the piece has come; b"" where nothing can."""
        if not self._held and piece.endswith(b"\n\n"):
            return self._sent(piece)
        searched = max(0, len(self._held) - 2)
        self._held += piece
        cut = max((at + len(end) for end in ENDS if (at := self._held.rfind(end, searched)) >= 0), default=0)
        if not cut and self._is_comment():
            cut = len(self._held)
        return self._sent(self._taken(cut)) if cut else b""

    def rest(self) -> bytes:
        """What is left at the end: an event without its last line break, or half of one."""
        return self._sent(self._taken(len(self._held)))

    def _taken(self, cut: int) -> bytes:
        taken = bytes(self._held[:cut])
        del self._held[:cut]
        return taken

    def _is_comment(self) -> bool:
        """A line that keeps the connection alive, and may stand alone."""
        return self._held[:1] == b":" and self._held.find(b"\n") == len(self._held) - 1

    def _sent(self, events: bytes) -> bytes:
        if not self.ended and any(final in events for final in self.final):
            self.ended = any(_value(line) in self.final for line in events.splitlines())
        return events


def _value(line: bytes) -> bytes | None:
    name, _, value = line.partition(b":")
    return value.strip() if name in (b"data", b"event") else None
