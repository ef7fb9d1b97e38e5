"""Gaussian filtering of scattered points on the permutohedral lattice, in time linear in them.

Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
Eurographics 2010. Every point spreads its value over the d + 1 vertices of the simplex around it
(splat), the values are blurred along the d + 1 directions of the lattice, and every point reads its
vertices again (slice). The result is sum_j exp(-|f_i - f_j|^2 / 2) x_j to a few per cent, up to one
common factor that any normalisation cancels.

Only vertices around a point exist. Sorting finds them, so that every array has a fixed shape and
everything runs under jit on any device.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

# Room for vertices, in vertices per point: the smallest that suffices is chosen while the program
# runs. The colours of photographs need 0.1 to 2.5; nothing needs more than d + 1.
ROOM = (1 / 8, 1 / 4, 1 / 2, 1, 2)
SMALL = 4096  # points: up to here there is one room for all
BLOCK = 8192  # vertices whose neighbours are looked for at once


class Lattice(NamedTuple):
    """N points in d dimensions among their vertices. Vertex 0 is none: its value stays 0.

    The E = (d+1) N pairs of a point and a vertex around it are listed by point and by vertex.
    """

    vertex: jax.Array  # int32 [d+1,N]: the vertices around each point
    weight: jax.Array  # float32 [d+1,N]: barycentric weights; 0 for points that are not valid
    start: jax.Array  # int32 [E+2]: where the pairs of each vertex start in the next two
    point: jax.Array  # int32 [E]: points, in the order of their vertices
    share: jax.Array  # float32 [E]: their weights
    neighbours: jax.Array  # int32 [d+1,2,E+1]: the vertices before and after each
    count: jax.Array  # int32 scalar: number of vertices, vertex 0 included


def fits(span: np.ndarray | jax.Array, n: int) -> np.ndarray | jax.Array:
    """Whether 64 bits can tell the vertices around n points apart: a bool scalar.

    span [d]: the features go from 0 to there.
    """
    low, high = _reach(span)
    return (high - low).prod() < 2.0 ** (64 - _bits(n))


@jax.custom_batching.sequential_vmap  # a whole batch at once would pay for every room
def build(features: jax.Array, span: jax.Array, valid: jax.Array) -> Lattice:
    """The lattice of features float32 [d,N], in standard deviations.

    span [d]: the features go from 0 to there, and it `fits`. valid bool [N]: who takes part.
    """
    d, n = features.shape
    entries = (d + 1) * n
    # What takes no part must not add vertices either: it joins a point that does.
    features = jnp.where(valid, features, features[:, jnp.argmax(valid)][:, None])
    # A CPU sorts one word of 64 bits five times as fast as a key and its point apart.
    with jax.enable_x64(True):
        strides, lowest = _strides(span)
        keys, weight = _simplex(features, strides)
        # The r-th vertices of all simplices are a set of their own, so d + 1 short sorts do.
        packed = ((keys - lowest) << _bits(n)) | jnp.arange(n, dtype=jnp.uint64)
        packed = jnp.stack([jax.lax.sort(row) for row in packed])
        point = (packed & (2 ** _bits(n) - 1)).astype(jnp.int32)
        keys = packed >> _bits(n)  # [d+1,N]
        first = jnp.pad(keys[:, 1:] != keys[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        number = jnp.cumsum(first.ravel(), dtype=jnp.int32).reshape(d + 1, n)
        at = jnp.where(first, number, entries + 2).ravel()
        start = jnp.full(entries + 2, entries, jnp.int32).at[0].set(0)
        start = start.at[at].set(jnp.arange(entries, dtype=jnp.int32), mode="drop")
        bounds = jnp.append(number[:, 0], number[-1, -1] + 1)
        keys = keys.ravel().at[start[:-1]].get(mode="clip")  # of each vertex
        neighbours = _neighbours(keys, bounds, strides)
    weight = weight * valid
    share = jnp.take_along_axis(weight, point, 1, mode="promise_in_bounds")
    vertex = jax.vmap(lambda at, value: jnp.zeros(n, jnp.int32).at[at].set(value))(point, number)
    return Lattice(vertex, weight, start, point.ravel(), share.ravel(), neighbours, bounds[-1])


def scale(lattice: Lattice, send: jax.Array, receive: jax.Array) -> Lattice:
    """The lattice that filters send * x and multiplies the result by receive [N]."""
    share = lattice.share * _take(send, lattice.point)
    return lattice._replace(weight=lattice.weight * receive, share=share)


@jax.custom_vjp
def apply(lattice: Lattice, transpose: Lattice, x: jax.Array) -> jax.Array:
    """Filters x float32 [N,C]: linear in x, and differentiable with respect to x alone.

    transpose: for the gradient, the lattice with `send` and `receive` exchanged.
    """
    return _forwards(lattice, x)


def _apply_forward(lattice: Lattice, transpose: Lattice, x: jax.Array) -> tuple[jax.Array, Lattice]:
    return _forwards(lattice, x), transpose


def _apply_backward(transpose: Lattice, cotangent: jax.Array) -> tuple[None, None, jax.Array]:
    # Slice is the transpose of splat and a blur its own: what is left is the order of the blurs.
    return None, None, _backwards(transpose, cotangent)


apply.defvjp(_apply_forward, _apply_backward)


@jax.custom_batching.sequential_vmap
def _forwards(lattice: Lattice, x: jax.Array) -> jax.Array:
    return _filter(lattice, x, backwards=False)


@jax.custom_batching.sequential_vmap
def _backwards(lattice: Lattice, x: jax.Array) -> jax.Array:
    return _filter(lattice, x, backwards=True)


def _filter(lattice: Lattice, x: jax.Array, backwards: bool) -> jax.Array:
    n, channels = x.shape
    d = len(lattice.weight) - 1

    def blur(table: jax.Array, neighbours: jax.Array) -> tuple[jax.Array, None]:
        before, after = neighbours
        return table + 0.5 * (_take(table, before) + _take(table, after)), None

    x = jnp.pad(x, ((0, 0), (0, -channels % 8)))  # whole vectors of a processor

    def in_room(room: int) -> jax.Array:
        pairs = (lattice.share, lattice.point, lattice.start[: room + 1])
        table = sparse.BCSR(pairs, shape=(room, n)) @ x
        table, _ = jax.lax.scan(blur, table, lattice.neighbours[..., :room], reverse=backwards)
        parts = zip(lattice.weight, lattice.vertex, strict=True)
        return sum(weight[:, None] * _take(table, vertex) for weight, vertex in parts)

    rooms = [int(part * n) for part in ROOM if n > SMALL] + [(d + 1) * n + 1]
    which = sum((lattice.count > room).astype(jnp.int32) for room in rooms[:-1])
    return jax.lax.switch(which, [partial(in_room, room) for room in rooms])[:, :channels]


def _take(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="promise_in_bounds")


def _simplex(features: jax.Array, strides: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys uint64 [d+1,N] and barycentric weights float32 [d+1,N] of the vertices around points.

    The lattice is Z^(d+1) projected along (1, .., 1): d + 1 whole numbers name a vertex, up to a
    common summand. Each vertex of a simplex follows from the one before by taking 1 from one
    coordinate, in ascending order of what rounding the point left over.
    """
    d = len(features)
    elevated = jnp.matmul(_elevation(d), features, precision="highest")  # [d+1,N]
    base = jnp.round(elevated)
    rest, excess = elevated - base, base.sum(0).astype(jnp.int32)
    index = jnp.arange(d + 1)[:, None]
    larger = [(rest > r) | ((rest == r) & (index < i)) for i, r in enumerate(rest)]
    rank = excess + jnp.stack([each.sum(0, dtype=jnp.int32) for each in larger])
    # Where rounding left the plane of sum 0, the coordinates it moved farthest move back.
    move = (rank < 0).astype(jnp.int32) - (rank > d)
    rank, base, rest = rank + (d + 1) * move, base.astype(jnp.int32) + move, rest - move

    def ranked(r: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = rank == r
        return jnp.where(chosen, rest, 0).sum(0), jnp.where(chosen, strides, 0).sum(0)

    # A loop, because XLA on a CPU would work the ranks out again for each. Smallest rest first.
    rest, step = jax.lax.map(ranked, jnp.arange(d, -1, -1, dtype=jnp.int32))  # [d+1,N] each
    keys = [(strides * base.astype(jnp.uint64)).sum(0)]
    for each in step[:-1]:
        keys.append(keys[-1] - each)
    return jnp.stack(keys), jnp.concatenate([1 + rest[:1] - rest[-1:], rest[1:] - rest[:-1]])


def _neighbours(keys: jax.Array, bounds: jax.Array, strides: jax.Array) -> jax.Array:
    """The vertices before and after each vertex in every direction: int32 [d+1,2,V], 0 for none.

    keys uint64 [V] of the vertices, of which those from bounds[r] to bounds[r + 1] [d+2] are the
    r-th of their simplices, in order; strides uint64 [d+1,1] of the directions.
    """
    d, room = len(bounds) - 2, len(keys)
    size = min(BLOCK, room)
    halvings = 32 - jax.lax.clz(jnp.diff(bounds).max())
    direction = jnp.arange(d + 1, dtype=jnp.int32)[:, None]

    def block(i: jax.Array, neighbours: jax.Array) -> jax.Array:
        first = jnp.minimum(i * size, room - size).astype(jnp.int32)
        number = first + jnp.arange(size, dtype=jnp.int32)
        wanted = jax.lax.dynamic_slice_in_dim(keys, first, size) + strides
        # One more in a coordinate leads from the r-th set to the one before.
        there = (jnp.searchsorted(bounds, number, side="right") - 2) % (d + 1)

        def halve(_: int, limits: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = limits
            middle = (low + high) // 2
            less = (keys.at[middle].get(mode="clip") < wanted) & (low < high)
            return jnp.where(less, middle + 1, low), jnp.where(less, high, middle)

        limits = [jnp.broadcast_to(bounds[r], (d + 1, size)) for r in (there, there + 1)]
        found, _ = jax.lax.fori_loop(0, halvings, halve, tuple(limits))
        same = (keys.at[found].get(mode="clip") == wanted) & (found < bounds[there + 1])
        after = jnp.where(same & (number > 0) & (number < bounds[-1]), found, 0)
        neighbours = neighbours.at[direction, 0, after].set(number, mode="promise_in_bounds")
        corner = (jnp.int32(0), jnp.int32(1), first)
        return jax.lax.dynamic_update_slice(neighbours, after[:, None], corner)

    none = jnp.zeros((d + 1, 2, room), jnp.int32)
    # Blocks, so that the time depends on the vertices that exist.
    blocks = (bounds[-1] + size - 1) // size
    return jax.lax.fori_loop(0, blocks, block, none).at[:, 0, 0].set(0)


def _elevation(d: int) -> np.ndarray:
    """Float32 [d+1,d]: onto the plane where d + 1 coordinates sum to 0, in cells of the lattice.

    Scaled so that splat, blur and slice together have variance 1 (section 4.1).
    """
    axis = np.arange(1, d + 1)
    matrix = np.triu(np.ones((d + 1, d))) - np.eye(d + 1, k=-1)[:, :d] * axis
    return np.float32(matrix * np.sqrt(2 / 3) / np.sqrt(axis * (axis + 1)))


def _bits(n: int) -> int:
    """Bits of the number of a point."""
    return max((n - 1).bit_length(), 1)


def _reach(span: np.ndarray | jax.Array) -> tuple[jax.Array, jax.Array]:
    """From where to where the d differences of successive coordinates of a vertex go: [d] each.

    Those depend on few features each, the first on the first alone. Three are for rounding and for
    the neighbours.
    """
    matrix = -np.diff(_elevation(len(span)), axis=0)
    return np.minimum(matrix, 0) @ span // 1 - 3, np.maximum(matrix, 0) @ span // 1 + 4


def _strides(span: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What 1 in each coordinate adds to a key, uint64 [d+1,1], and the lowest key, uint64.

    A key numbers the differences of successive coordinates, so that a summand common to all
    coordinates does not count; modulo 2^64. Keys in order go through the first features slowest:
    with a position there, neighbours in space are neighbours in memory.
    """
    low, high = _reach(span)
    size = (high - low).astype(jnp.uint64)
    place = jnp.append(jnp.cumprod(size[:0:-1])[::-1], jnp.uint64(1))  # [d]
    strides = jnp.pad(place, (0, 1)) - jnp.pad(place, (1, 0))
    return strides[:, None], (low.astype(jnp.int64).astype(jnp.uint64) * place).sum()
