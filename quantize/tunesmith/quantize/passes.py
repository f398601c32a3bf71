"""One layer at a time, called as the model's own forward would call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Batch = dict[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]

_KNOWN_BYTES = 2**27
"""Masks and position embeddings that are kept for the next example of the same shape."""


class NotAChainError(Exception):
    """The layers do not simply follow each other."""


class Passes:
    """How a model calls its layers: learnt by running it with layers that only take note of what
    they are given. The model's own embeddings are needed for the first states alone."""

    def __init__(self, model: Any, layers: Sequence[Any]) -> None:
        self._model, self._layers = model, layers
        self._returns_tuple: bool | None = None
        self._known: dict[Any, list[Call]] = {}

    def first(self, batch: Batch) -> Any:
        """The states that the first layer is given."""
        hidden_BSD, _ = self._catch(batch)
        return hidden_BSD

    def check(self, batch: Batch) -> None:
        """Raises NotAChainError unless the layers follow each other and all else that they are
        given depends on shapes alone."""
        hidden_BSD, calls = self._catch(batch)
        _, again = self._catch(_without_text(batch, hidden_BSD * 0))
        if not _equal(calls, again):
            raise NotAChainError("its layers are given values that depend on the text")

    def learn(self, hidden_BSD: Any, batch: Batch) -> None:
        """What `check` also finds out, for work that goes on; before hooks are on the layers."""
        self._catch(_without_text(batch, hidden_BSD))

    def run(self, at: int, hidden_BSD: Any, batch: Batch) -> Any:
        """Pass states through layer `at`; returns those that the next one is given."""
        rest, named = self._arguments(hidden_BSD, batch)[at]
        result = self._layers[at](hidden_BSD, *rest, **named)
        return result[0] if isinstance(result, tuple) else result

    def _arguments(self, hidden_BSD: Any, batch: Batch) -> list[Call]:
        key = _key(batch)
        if key not in self._known:
            found = self._catch(_without_text(batch, hidden_BSD))[1]
            if _bytes([*self._known.values(), found]) > _KNOWN_BYTES:
                self._known.clear()
            self._known[key] = found
        return self._known[key]

    def _catch(self, batch: Batch) -> tuple[Any, list[Call]]:
        """The first layer's states, and what every layer is given beside them."""
        calls: list[Call] = []
        first: list[Any] = []

        def note(hidden_BSD: Any, *rest: Any, **named: Any) -> Any:
            if first and hidden_BSD is not first[0]:
                raise NotAChainError("something happens between its layers")
            first.append(hidden_BSD)
            calls.append((rest, named))
            if len(calls) == len(self._layers):
                raise _Caught
            if self._returns_tuple is None:
                self._returns_tuple = _returns_tuple(self._layers[0], hidden_BSD, rest, named)
            return (hidden_BSD,) if self._returns_tuple else hidden_BSD

        with _in_place_of_forward(self._layers, note):
            try:
                self._model(**batch)
            except _Caught:
                return first[0], calls
        raise NotAChainError("it does not run all of its layers")


class _Caught(Exception):
    """All that was wanted of a forward pass is there."""


@contextmanager
def _in_place_of_forward(layers: Sequence[Any], note: Callable[..., Any]) -> Iterator[None]:
    for layer in layers:
        layer.forward = note
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _returns_tuple(layer: Any, *arguments: Any) -> bool:
    """Whether a layer's states come in a tuple, tried on tensors without contents."""
    hidden_BSD, rest, named = _each(arguments, lambda tensor: tensor.to("meta"))
    return isinstance(type(layer).forward(layer, hidden_BSD, *rest, **named), tuple)


def _without_text(batch: Batch, hidden_BSD: Any) -> Batch:
    rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    return {"inputs_embeds": hidden_BSD, **rest}


def _key(batch: Batch) -> Any:
    """What decides the arguments of the layers: the shape of the text, and all else as it is."""
    rest = _without_text(batch, None)
    del rest["inputs_embeds"]
    contents = tuple((name, tensor.cpu().numpy().tobytes()) for name, tensor in rest.items())
    return tuple(batch["input_ids"].shape), contents


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value with every tensor in it changed."""
    import torch
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, change, value)


def _tensors(value: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(bool((left == right).all()) for left, right in pairs)


def _bytes(value: Any) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in _tensors(value)}.values())
