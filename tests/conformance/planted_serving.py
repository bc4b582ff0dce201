"""Served layers with one bug each, and the schedules each bug can show in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from golden_server import GoldenServer, array

import golden
from conformance.subjects import ServeCall, ServeOutput, ServeStep
from golden import Array

_LAYER = "h64-hq4-hkv2-d16"

CASES: dict[str, str] = {
    "plain": f"{_LAYER}-rope10000/serve-bf16-b2-kv0-contiguous-prompt9_5.decode2",
    "ring": f"{_LAYER}-window8-rope10000/serve-bf16-b2-kv0-rolling-prompt13_9.decode2",
    "prefix": f"{_LAYER}-window4-rope10000/serve-bf16-b2-kv0-paged4-prompt9_5.prompt4.decode1",
    "sequence ids": f"{_LAYER}-rope10000/serve-bf16-b3-kv0-paged4-prompt9_5at2_0.decode2at0_2",
    "row taken over": f"{_LAYER}/serve-bf16-b2-kv0-contiguous-prompt9.prompt5at0new.decode2at0",
    "drafts": f"{_LAYER}-polar10000/serve-bf16-b2-kv0-contiguous-prompt9_5.draft4keep2_1.decode2",
    "sinks": f"{_LAYER}-sinks/serve-bf16-b2-kv0-contiguous-prompt9_5.decode2",
    "adapters": f"{_LAYER}-lora2_4/serve-bf16-b3-kv0-contiguous-prompt9_5_7.decode1",
    "axes": f"{_LAYER}-rope10000-mrope2_3_3/serve-bf16-b2-kv0-contiguous-prompt20_18.decode2",
}
"""Schedules by what they alone show."""


@dataclass(frozen=True)
class Shown:
    """A cache whose keys are handed out otherwise than they are held.

    Attributes:
        inner: the cache.
        change: what becomes of the held keys, given the step's positions.
    """

    inner: Any
    change: Callable[[golden.Held, golden.Positions, Any], golden.Held]

    @property
    def rows(self) -> int:
        count: int = self.inner.rows
        return count

    def prior(self, positions: golden.Positions, *, seq_ids: Any = None) -> golden.Held:
        return self.change(self.inner.prior(positions, seq_ids=seq_ids), positions, seq_ids)


class RingOffByOne(GoldenServer):
    """A decoded token is written one slot too far, over a key that the window still reaches.

    Reading each slot one too far would show nothing: a window's keys carry their positions in their
    rotation, and a sum over all of a ring does not mind their order.
    """

    def take(self, step: ServeStep) -> Any:
        before = self.cache
        output = super().take(step)
        after = self.cache
        if isinstance(after, golden.RollingCache) and step.kind == "decode":
            newest = array(step.position_ids)[:, -1]
            k, v = before.held.k.copy(), before.held.v.copy()
            for row, position in enumerate(newest.tolist()):
                right, wrong = position % after.ring, (position + 1) % after.ring
                k[row, :, wrong] = after.held.k[row, :, right]
                v[row, :, wrong] = after.held.v[row, :, right]
            self.cache = replace(after, held=after.held._replace(k=k, v=v))
        return output


class StaleSlots(GoldenServer):
    """What an earlier sequence left in a row is seen by the one that took it over."""

    def attend(self, step: ServeStep, hidden: Array, cache: Any) -> golden.Step:
        everything = self.cache

        def with_stale(held: golden.Held, positions: golden.Positions, ids: Any) -> golden.Held:
            if not isinstance(everything, golden.ContiguousCache) or (positions < 0).any():
                return held
            rows = np.arange(everything.rows) if ids is None else ids
            first = positions.min(axis=1, keepdims=True)
            left = everything.positions[rows]
            seen = np.where((left >= first) & (first > 0), first - 1, held.positions)
            return held._replace(positions=seen)

        return super().attend(step, hidden, Shown(cache, with_stale))


class DraftsLeftVisible(StaleSlots):
    """Rejected drafts are written, and seen by later steps."""

    def written(self, step: ServeStep) -> Any:
        return array(step.position_ids) >= 0

    def attend(self, step: ServeStep, hidden: Array, cache: Any) -> golden.Step:
        if any(other.kind == "drafts" for other in self.call.steps):
            return super().attend(step, hidden, cache)
        return GoldenServer.attend(self, step, hidden, cache)


class PrefixUnmasked(GoldenServer):
    """A prompt sees its whole cached prefix, whatever the layer's window."""

    def attend(self, step: ServeStep, hidden: Array, cache: Any) -> golden.Step:
        window, positions = self.call.config.sliding_window, array(step.position_ids)
        if window is None or step.kind != "prompt" or positions.max() < hidden.shape[1]:
            return super().attend(step, hidden, cache)
        tokens = np.arange(hidden.shape[1])
        own = tokens[:, None] - tokens
        return golden.attend_with_cache(
            replace(self.call.config, sliding_window=None),
            self.weights,
            hidden,
            position_ids=positions,
            cache=cache,
            seq_ids=self.seq_ids(step),
            active_mask=(own >= 0) & (own < window),
            observe=self.observe,
        )


class RowsInOrder(GoldenServer):
    """Batch row `b` reads and writes cache row `b`, whatever its sequence id."""

    def seq_ids(self, step: ServeStep) -> Any:
        return None if step.seq_ids is None else np.arange(len(step.seq_ids))


class SinkTwice(GoldenServer):
    """The sink counts once with the cached keys and once with the step's own."""

    def attend(self, step: ServeStep, hidden: Array, cache: Any) -> golden.Step:
        weights, sinks = self.weights, self.weights.sinks
        if sinks is not None and step.kind == "decode":
            self.weights = replace(weights, sinks=sinks + math.log(2.0))
        try:
            return super().attend(step, hidden, cache)
        finally:
            self.weights = weights


class AdapterOfTheNextRow(GoldenServer):
    """Each row uses its neighbour's adapter."""

    def adapter_ids(self, step: ServeStep) -> Any:
        return np.roll(super().adapter_ids(step), 1)


class AxesSwapped(GoldenServer):
    """Height and width of M-RoPE's positions change places."""

    def rotary(self, step: ServeStep) -> Any:
        axes = super().rotary(step)
        return None if axes is None else axes[[0, 2, 1]]


def serving(server: type[GoldenServer]) -> Callable[[ServeCall], ServeOutput]:
    """The subject that a server is."""
    return lambda call: server(call).serve()


BUGS: dict[str, tuple[type[GoldenServer], str]] = {
    "ring slot off by one": (RingOffByOne, "ring"),
    "stale slot visible": (StaleSlots, "row taken over"),
    "rejected draft left visible": (DraftsLeftVisible, "drafts"),
    "prefix mask ignored": (PrefixUnmasked, "prefix"),
    "wrong cache row for a sequence id": (RowsInOrder, "sequence ids"),
    "sink counted per part": (SinkTwice, "sinks"),
    "adapter of the wrong row": (AdapterOfTheNextRow, "adapters"),
    "M-RoPE axes swapped": (AxesSwapped, "axes"),
}
"""Bugs by name, each with the one of `CASES` that it shows in."""
