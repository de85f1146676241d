"""Finds the first stop string in text that arrives in pieces, in time linear in the text.

An Aho-Corasick automaton: its state is the longest end of the text that begins a stop string, which is
exactly what must be held back from the client until it is clear that it is not one.
Source: Aho and Corasick 1975, doi:10.1145/360825.360855.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

_CODE_POINTS = 0x110000


class StopStrings:
    """The automaton of one request; immutable, shared by its choices. About 150 bytes per character."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._edges: dict[int, int] = {}  # state * _CODE_POINTS + character -> next state
        self._fail = [0]  # the longest proper end of the state that is a state too
        self._depth = [0]  # characters from the root
        self._match = [0]  # length of the longest stop string that ends here, 0 for none
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        code = ord(character)
        following = self._edges.get(state * _CODE_POINTS + code)
        while following is None and state:
            state = self._fail[state]
            following = self._edges.get(state * _CODE_POINTS + code)
        return following or 0

    def held(self, state: int) -> int:
        """How many of the last characters may begin a stop string."""
        return self._depth[state]

    def match(self, state: int) -> int:
        """Length of the longest stop string that just ended, 0 for none."""
        return self._match[state]

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            key = state * _CODE_POINTS + ord(character)
            if key not in self._edges:
                self._edges[key] = len(self._fail)
                self._fail.append(0)
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
            state = self._edges[key]
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Set the failure links breadth first, so that the shorter states they lead to are ready."""
        children: dict[int, list[tuple[str, int]]] = {}
        for key, following in self._edges.items():
            state, code = divmod(key, _CODE_POINTS)
            children.setdefault(state, []).append((chr(code), following))
        queue = deque(following for _, following in children.get(0, []))
        while queue:
            state = queue.popleft()
            for character, following in children.get(state, []):
                fail = self.step(self._fail[state], character)
                self._fail[following] = fail
                self._match[following] = self._match[following] or self._match[fail]
                queue.append(following)


class StopMatcher:
    """Follows one text; gives out what cannot belong to a stop string any more."""

    def __init__(self, stops: StopStrings, *, include_stop: bool = False) -> None:
        self._stops = stops
        self._include_stop = include_stop
        self._state = 0
        self._held = ""
        self.found = False
        self.rest = ""  # of the text given to `add`, what came behind the match

    def add(self, text: str) -> str:
        """What may be sent now. At the first match `found` is set and nothing more may be added.

        The match that ends first wins; of those that end together, the longest.
        """
        stops, state, buffer = self._stops, self._state, self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            state = stops.step(state, character)
            length = stops.match(state)
            if length:
                self.found, self.rest, self._held, self._state = True, buffer[end:], "", 0
                return buffer[:end] if self._include_stop else buffer[: end - length]
        self._state = state
        cut = len(buffer) - stops.held(state)
        self._held = buffer[cut:]
        return buffer[:cut]

    def flush(self) -> str:
        """The text ended: what was held back is text after all."""
        held, self._held, self._state = self._held, "", 0
        return held
