"""Given first tokens of answers, passed through the model together before their rows begin. A start is cut into tiles
of TILE tokens; samples that begin alike share tiles, so that the longest start of an answer serves every shorter one.

A tile's bits depend on the tokens before it and in it alone, so not on which starts are computed together: every pass
has PACK tiles, since a library may choose another kernel for another number of rows; each attends by itself to its
prompt and to the tiles before it, and what follows a token changes nothing of it. (On a CPU with AVX2, in fp32 and
bf16, passes of 1 to 4 tiles were seen to give the same bits; elsewhere nobody has looked.)

Shapes: X tiles of a pass (PACK), T tokens of a tile (TILE), H query heads, K key-value heads, G = H / K, L keys, C head
size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from aisp_dist.engine import nucleus
from aisp_dist.engine.attention import KV, TILE, Layer, Mask, Prefix, attend_part, mask, seen, sink
from aisp_dist.engine.lm import LM

PACK = 4  # tiles in a pass: 128 tokens cost a CPU little more than 32, whose price is reading the weights

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Tile:
    """Up to TILE tokens of a start. kv: keys and values [K, T, C] by layer; z_D: the hidden state at its last place;
    nll: of each token under the base model, in nats, None where not measured."""

    tokens: Tokens
    kv: list[KV] = field(default_factory=list)
    z_D: torch.Tensor | None = None
    nll: list[float] | None = None


Tiles = dict[Tokens, list[Tile]]  # of a prompt, by the tokens of the start before them


def size(starts: Iterable[Tokens]) -> int:
    """Tokens of the tiles of these starts, at most."""
    return sum(len(start) + -len(start) % TILE for start in set(starts))


def held(tiles: Tiles) -> int:
    """Tokens of tiles."""
    return TILE * sum(map(len, tiles.values()))


def chain(tiles: Tiles, start: Tokens, measured: bool) -> list[Tile] | None:
    """The tiles of a start in order, with likelihoods if `measured`; None if any is missing."""
    found = [_find(tiles, start, place, measured) for place in range(0, len(start), TILE)]
    return None if None in found else [tile for tile in found if tile]


def extend(lm: LM, prefix: Prefix, known: Tiles, starts: Iterable[Tokens], measured: bool) -> Tiles:
    """The tiles of these starts and no others: those of `known`, and the missing ones, computed now."""
    tiles: Tiles = {}
    missing: list[tuple[Tile, list[Tile]]] = []  # with those before it
    for start in sorted(set(starts), key=len, reverse=True):
        before: list[Tile] = []
        for place in range(0, len(start), TILE):
            tile = _find(tiles, start, place, measured)
            if tile is None:
                tile = _find(known, start, place, measured)
                if tile is None:
                    tile = Tile(start[place : place + TILE], nll=[] if measured else None)
                    missing.append((tile, list(before)))
                tiles.setdefault(start[:place], []).append(tile)
            before.append(tile)
    for first in range(0, len(missing), PACK):
        _compute(lm, prefix, missing[first : first + PACK], measured)
    return tiles


def _find(tiles: Tiles, start: Tokens, place: int, measured: bool) -> Tile | None:
    tokens = start[place : place + TILE]
    alike = (tile for tile in tiles.get(start[:place], ()) if tile.tokens[: len(tokens)] == tokens)
    return next((tile for tile in alike if not measured or tile.nll is not None), None)


def _compute(lm: LM, prefix: Prefix, tiles: Sequence[tuple[Tile, list[Tile]]], measured: bool) -> None:
    ids_XT = torch.zeros(PACK, TILE, dtype=torch.long)
    positions_XT = torch.zeros(PACK, TILE, dtype=torch.long)
    for x, (tile, before) in enumerate(tiles):
        last = len(tile.tokens) - 1
        ids_XT[x] = torch.tensor(tile.tokens + tile.tokens[-1:] * (TILE - 1 - last))
        positions_XT[x] = prefix.length + TILE * len(before) + torch.arange(TILE).clamp(max=last)
    ids_XT, positions_XT = ids_XT.to(lm.device), positions_XT.to(lm.device)
    z_XTD = lm.states(StartPass(prefix, tiles), ids_XT, positions_XT)
    for x, (tile, before) in enumerate(tiles):
        tile.z_D = z_XTD[x, -1].clone()
        if measured:
            first_D = before[-1].z_D if before else prefix.z_D
            assert first_D is not None
            nll_T = nucleus.nll(lm.logits(torch.cat([first_D[None], z_XTD[x, :-1]])), ids_XT[x])
            tile.nll = nll_T[: len(tile.tokens)].tolist()


class StartPass:
    """Attention of tiles [X, H, T, C], each to its prompt, to the tiles before it and causally to itself. Keeps their
    keys and values."""

    def __init__(self, prefix: Prefix, tiles: Sequence[tuple[Tile, list[Tile]]]) -> None:
        self.prefix, self.tiles = prefix, tiles
        self._masks: dict[tuple[int, int | None, int], Mask] = {}  # layers with the same window share them

    def __call__(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for x, (tile, _) in enumerate(self.tiles):
            tile.kv.append((k[x].clone(), v[x].clone()))
        heads, kv_heads = q.shape[1], k.shape[1]
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=torch.float32)
        for x, (tile, before) in enumerate(self.tiles):
            parts = [self.prefix.kv[layer.index], *(t.kv[layer.index] for t in (*before, tile))]
            keys, values = (torch.cat(part, dim=1)[:, None] for part in zip(*parts, strict=True))
            keys, values = (part.expand(-1, heads // kv_heads, -1, -1) for part in (keys, values))
            q_KGTC = q[x].view(kv_heads, heads // kv_heads, TILE, -1)
            visible = self._mask(layer, len(before), keys.shape[2], q)
            own, lse = attend_part(layer, q_KGTC, keys, values, visible)
            out[x] = sink(layer, (own[None], lse[None])).reshape(heads, TILE, -1)
        return out

    def _mask(self, layer: Layer, place: int, num_keys: int, q: torch.Tensor) -> Mask:
        key = place, layer.window, num_keys
        if key not in self._masks:
            end = self.prefix.length + TILE * (place + 1)
            at, to = (torch.arange(end - count, end, device=q.device) for count in (TILE, num_keys))
            self._masks[key] = mask(seen(at[:, None], to, layer.window)[None, None], q.dtype)._replace(blind=None)
        return self._masks[key]
