"""Masks the texts of a stream of events, where a match may be spread over many of them. Pure."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.serve.guard.bodies import change_texts, filtered_answer, without_tokens
from tunesmith.serve.guard.scan import Found, Matcher, Scanner, mask

_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "text", "arguments")
Json = dict[str, Any]
Key = tuple[Any, ...]
"""Which text of a stream: the choice, the tool call in it, and the field."""


class StreamMask:
    """Chat, completions and responses; each text in them has a scanner of its own."""

    def __init__(self, matchers: Sequence[Matcher]) -> None:
        self._matchers = matchers
        self._scanners: dict[Key, Scanner] = {}
        self._ended: set[Any] = set()
        """Choices that were ended here."""

        self._last: Json = {}
        """The newest piece, or response, as a form for what is made here."""

        self._added = 0
        """Events that were made here, by which the numbers of later ones grow."""

        self.found: list[Found] = []
        self.cuts = False
        """Whether an answer was ended here."""

    def copied(self) -> StreamMask:
        """One to go on with that leaves this one as it is."""
        found = copy.copy(self)
        found._scanners = {key: copy.copy(one) for key, one in self._scanners.items()}
        found._ended, found.found = set(self._ended), []
        return found

    def cut(self) -> bytes:
        """End all answers now; what was held back of them is lost."""
        self.cuts = True
        if "object" not in self._last or self._last["object"] == "response":
            return b"".join(self._written(one, b"event") for one in self._incomplete(0))
        indices = {key[0] for key in self._scanners} - self._ended or {0}
        self._ended |= indices
        choices = [_empty(self._last, index, "content_filter") for index in sorted(indices)]
        return self._written({**self._last, "choices": choices}, b"")

    def feed(self, events: bytes, deadline_s: float, *, is_last: bool = False) -> bytes:
        """What may go on of whole events, and with `is_last` of all that was held back.

        Raises TimeoutError like `Scanner.feed`.
        """
        passed = [
            one
            for event in events.split(b"\n\n")
            if event.strip()
            for one in self._event(event, deadline_s)
        ]
        return b"".join((*passed, *(self._rest(deadline_s) if is_last else ())))

    def _event(self, event: bytes, deadline_s: float) -> Iterator[bytes]:
        head, found, payload = event.partition(b"data:")
        payload = payload.strip()
        if not found:
            yield event + b"\n\n"
            return
        if payload == b"[DONE]":
            yield from self._rest(deadline_s)
            yield event + b"\n\n"
            return
        try:
            piece = json.loads(payload)
        except ValueError:
            return  # not what an engine sends, and text could hide in it
        if not isinstance(piece, dict):
            return
        if isinstance(piece.get("choices"), list):
            changed: Iterator[Json] = self._piece(copy.deepcopy(piece), deadline_s)
        elif isinstance(piece.get("type"), str):
            changed = self._typed(piece, deadline_s)
        else:
            changed = iter([piece])
        for one in changed:
            yield event + b"\n\n" if one == piece else self._written(one, head)

    def _written(self, piece: Json, head: bytes) -> bytes:
        """An event; those that had a name get it from their type."""
        name = f"event: {piece['type']}\n" if head and "type" in piece else ""
        return f"{name}data: {json.dumps(piece)}\n\n".encode()

    def _piece(self, piece: Json, deadline_s: float) -> Iterator[Json]:
        """A piece of chat or completions, changed in its place."""
        asked = piece["choices"]
        choices = [
            without_tokens(one)
            for one in asked
            if isinstance(one, dict) and one.get("index") not in self._ended
        ]
        for choice in choices:
            self._choice(choice, deadline_s)
        if choices:
            self._last = piece
        piece["choices"] = choices
        if choices or not asked or piece.get("usage"):
            yield piece

    def _choice(self, choice: Json, deadline_s: float) -> None:
        index = choice.get("index")
        for place, holder in _holders(choice):
            for name in _TEXTS:
                if isinstance(text := holder.get(name), str):
                    holder[name] = self._text((*place, name), text, deadline_s)
        if choice.get("finish_reason") is not None:
            self._finish(choice, deadline_s)
        if any(one.blocked for key, one in self._scanners.items() if key[0] == index):
            choice["finish_reason"] = "content_filter"
            self._ended.add(index)
            self.cuts = True

    def _finish(self, choice: Json, deadline_s: float) -> None:
        """Put what was held back for a choice into a piece of it."""
        index = choice.get("index")
        for key in [key for key in self._scanners if key[0] == index]:
            rest = self._text(key, "", deadline_s, is_last=True)
            holder = _holder(choice, key) if rest else {}
            holder[key[-1]] = (holder.get(key[-1]) or "") + rest

    def _rest(self, deadline_s: float) -> Iterator[bytes]:
        """What is held back of choices that never told that they ended."""
        if not self._last or self._last.get("object") == "response":
            return
        for index in {key[0]: None for key in self._scanners}:
            if index in self._ended:
                continue
            choice = _empty(self._last, index, None)
            before = copy.deepcopy(choice)
            self._finish(choice, deadline_s)
            if choice != before:
                yield self._written({**self._last, "choices": [choice]}, b"")

    def _typed(self, event: Json, deadline_s: float) -> Iterator[Json]:
        """An event of the responses API."""
        if "response" in self._ended:
            return
        event = self._numbered(without_tokens(event), self._added)
        stem, _, step = event["type"].rpartition(".")
        key = ("response", event.get("item_id"), event.get("content_index"), stem)
        if step == "delta" and isinstance(text := event.get("delta"), str):
            event["delta"] = self._text(key, text, deadline_s)
        else:
            if step == "done" and (rest := self._closed(key, deadline_s)):
                named = ("item_id", "output_index", "content_index", "sequence_number")
                place = {name: event[name] for name in named if name in event}
                yield place | {"type": f"{stem}.delta", "delta": rest}
                self._added += 1
                event = self._numbered(event, 1)
            event = change_texts(event, lambda text: self._whole(text, deadline_s))
        if isinstance(response := event.get("response"), dict):
            self._last = response
        self.cuts = self.cuts or any(one.blocked for one in self._scanners.values())
        if not self.cuts:
            yield event
        else:
            yield from self._incomplete(event.get("sequence_number"))

    def _incomplete(self, number: Any) -> Iterator[Json]:
        """The end of a response that is ended here."""
        self._ended.add("response")
        ended = filtered_answer({"object": "response", **self._last, "output": []})
        event = {"type": "response.incomplete", "response": ended}
        yield event | ({"sequence_number": number} if number is not None else {})

    def _numbered(self, event: Json, more: int) -> Json:
        number = event.get("sequence_number")
        return event | {"sequence_number": number + more} if isinstance(number, int) else event

    def _closed(self, key: Key, deadline_s: float) -> str:
        if key not in self._scanners:
            return ""
        rest = self._text(key, "", deadline_s, is_last=True)
        if not self._scanners[key].blocked:
            del self._scanners[key]
        return rest

    def _whole(self, text: str, deadline_s: float) -> str:
        """A text that repeats what came in pieces, and was counted there."""
        changed, scanner = mask(text, self._matchers, deadline_s)
        self.cuts = self.cuts or scanner.blocked is not None
        return changed

    def _text(self, key: Key, text: str, deadline_s: float, *, is_last: bool = False) -> str:
        scanner = self._scanners.setdefault(key, Scanner(self._matchers))
        passed = scanner.feed(text, deadline_s, is_last=is_last)
        self.found += scanner.found
        return passed


def _holders(choice: Json) -> Iterator[tuple[Key, Json]]:
    """The places in a choice where texts are."""
    index, delta = choice.get("index"), choice.get("delta")
    if not isinstance(delta, dict):
        yield (index,), choice
        return
    yield (index,), delta
    for call in delta.get("tool_calls") or ():
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            yield (index, call.get("index")), call["function"]


def _holder(choice: Json, key: Key) -> Json:
    """The place of one text, made where the choice has none."""
    for place, holder in _holders(choice):
        if place == key[:-1]:
            return holder
    call: Json = {"index": key[1], "function": {}}
    choice["delta"]["tool_calls"] = [*(choice["delta"].get("tool_calls") or ()), call]
    made: Json = call["function"]
    return made


def _empty(last: Json, index: Any, reason: str | None) -> Json:
    """A choice with no text."""
    first: Json = next(iter(last.get("choices") or ()), {})
    text: Json = {"text": ""} if "text" in first else {"delta": {}}
    return {"index": index, **text, "finish_reason": reason}
