"""Read a JSON document value by value, so that a long list is never in memory at once."""

import json
import re
from collections.abc import Iterator
from typing import IO, Any

CHUNK_CHARACTERS = 1 << 16
SPACE = re.compile(r"[ \t\r\n]*")
LONGEST_TOKEN = 16
"""Characters of a token, such as -Infinity, that the end of the buffer may interrupt."""


class JsonDocument:
    """The values of a document in their order."""

    def __init__(self, stream: IO[str], decoder: json.JSONDecoder) -> None:
        self._stream = stream
        self._decoder = decoder
        self._buffer = ""
        self._position = 0
        self._is_complete = False
        self._dropped_lines = 0

    def next_character(self) -> str:
        """Return the next character that is not white space, without reading it; "" at the end."""
        while True:
            match = SPACE.match(self._buffer, self._position)
            assert match is not None
            self._position = match.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._fill():
                return ""

    def value(self) -> Any:
        """Read the next value."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                if self._is_interrupted(error) and self._fill():
                    continue
                raise self._error(error.msg, error.pos) from error
            if self._may_continue(value, end) and self._fill():
                continue
            self._position = end
            return value

    def elements(self) -> Iterator[Any]:
        """Read a list; yield its elements."""
        self._take("[")
        if self.next_character() != "]":
            yield self.value()
            while self.next_character() == ",":
                self._take(",")
                yield self.value()
        self._take("]")

    def members(self) -> Iterator[str]:
        """Read an object; yield its keys. The caller reads the value after each of them."""
        self._take("{")
        if self.next_character() != "}":
            yield self._key()
            while self.next_character() == ",":
                self._take(",")
                yield self._key()
        self._take("}")

    def skip(self) -> None:
        """Read the next value without keeping all of it, if it is a list."""
        if self.next_character() != "[":
            self.value()
            return
        for _ in self.elements():
            pass

    def check_end(self) -> None:
        """Raise ValueError if anything follows.

        Raises:
            ValueError: the document has ended, and something follows it.
        """
        if self.next_character():
            raise self._error("nothing may follow the document", self._position)

    def _key(self) -> str:
        if self.next_character() != '"':
            raise self._error("Expecting a key in double quotes", self._position)
        key = str(self.value())
        self._take(":")
        return key

    def _take(self, character: str) -> None:
        if self.next_character() != character:
            raise self._error(f"Expecting {character!r}", self._position)
        self._position += 1

    def _may_continue(self, value: Any, end: int) -> bool:
        """Return whether a number may have more digits after the end of the buffer."""
        is_at_end = end > len(self._buffer) - LONGEST_TOKEN
        return is_at_end and isinstance(value, (int, float))

    def _is_interrupted(self, error: json.JSONDecodeError) -> bool:
        """Return whether the end of the buffer may have caused the error."""
        if error.msg.startswith("Unterminated string"):
            return True
        return error.pos >= len(self._buffer) - LONGEST_TOKEN

    def _fill(self) -> bool:
        """Drop what has been read, and add at least as much as is left; False at the end."""
        if self._is_complete:
            return False
        unread = len(self._buffer) - self._position
        chunk = self._stream.read(max(CHUNK_CHARACTERS, unread))
        if not chunk:
            self._is_complete = True
            return False
        self._dropped_lines += self._buffer.count("\n", 0, self._position)
        self._buffer = self._buffer[self._position :] + chunk
        self._position = 0
        return True

    def _error(self, message: str, position: int) -> ValueError:
        line = 1 + self._dropped_lines + self._buffer.count("\n", 0, position)
        return ValueError(f"{message} in line {line}")
