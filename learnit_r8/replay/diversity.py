"""How far an experience's embedding lies from the others', kept up to date while they come and go."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnit_r8.core.arrays import as_losses
from learnit_r8.core.state import Kind, Saved, maybe, shallow, table
from learnit_r8.errors import ConfigError
from learnit_r8.replay.saving import filled, slots
from learnit_r8.types import Indices

Floats = NDArray[np.float64]
Vector = NDArray[np.float32]

_LARGEST_COMPONENT = 1e15
"""Larger components would overflow the float32 products."""
_EQUAL, _NEARLY_EQUAL = 1e-6, 1e-2
"""Spread of the distances, as a share of the largest, below which they count as equal, and
below which dividing by the spread would make rounding errors look like diversity."""
_ROWS = 8192
"""Rows taken at once where a temporary copy is needed."""


class EmbeddingSpread(Saved):
    """Embeddings in slots and their distances to the centroid, or to that of their cluster.

    The centroid is kept as a running sum. The distances to it are one matrix-vector product,
    |e - c|^2 = |e - a|^2 - 2 (e - a).(c - a) + |c - a|^2, with the first embedding as a, so
    that an offset that all embeddings share cannot cancel the digits that count.
    """

    _saved = table(
        embeddings=Kind(lambda me, rows: rows[: len(me)].copy(), lambda me, saved: me._rows_of(saved)),
        anchor=np.float64,
        sum=np.float64,
        norms=slots(np.float64),
        puts=int,
        centers=maybe(np.float32),
        fitted_at=int,
    )

    def __init__(self, capacity: int, clusters: int | None = None, cluster_above: int = 50_000, seed: int = 0) -> None:
        self.capacity, self._clusters, self._cluster_above, self._seed = capacity, clusters, cluster_above, seed
        self._used = 0  # slots in use: the first ones
        self._kmeans: Any = None
        if clusters is not None:
            try:
                self._kmeans = importlib.import_module("sklearn.cluster").MiniBatchKMeans
            except ImportError as error:
                raise ConfigError(["clusters needs scikit-learn: pip install scikit-learn, or leave it out"]) from error
        self.embeddings: Vector = np.zeros((0, 0), dtype=np.float32)
        self._anchor = np.zeros(0)
        self._sum = np.zeros(0)
        self._norms = np.zeros(capacity)
        self._puts = 0
        self._centers: Vector | None = None
        self._fitted_at = 0
        self._cached = -1, np.zeros(0)  # distances, and number of the put after which they held

    def checked(self, embedding: Any) -> Vector:
        """Return an embedding of any kind as float32, shape `[d]`."""
        try:
            vector = as_losses(embedding)
        except TypeError as error:
            raise ValueError(f"embedding must be a vector of numbers, got {type(embedding).__name__}") from error
        if vector.ndim == 2 and len(vector) == 1:
            vector = vector[0]
        length = self.embeddings.shape[1] or "at least 1"
        if vector.ndim != 1 or not vector.size or (length != "at least 1" and vector.size != length):
            raise ValueError(f"embedding must have shape [d] with d {length}, got shape {vector.shape}")
        if not np.abs(vector).max() <= _LARGEST_COMPONENT:
            raise ValueError(f"embedding must be finite and within +-{_LARGEST_COMPONENT:g}, got {vector}")
        return vector.astype(np.float32)

    def put(self, slot: int, vector: Vector, *, replaces: bool) -> None:
        """Put a checked embedding into a slot: in place of another one, or into the first that is free."""
        if not self.embeddings.size:
            self.embeddings = np.zeros((self.capacity, vector.size), dtype=np.float32)
            self._anchor, self._sum = vector.astype(np.float64), np.zeros(vector.size)
        if replaces:
            self._sum -= self.embeddings[slot] - self._anchor
        offset = vector - self._anchor
        self.embeddings[slot] = vector
        self._sum += offset
        self._norms[slot] = offset @ offset
        self._used += not replaces
        self._puts += 1
        if self._puts % self.capacity == 0:
            held = self.embeddings[: self._used]  # the sum anew, a few rows at once
            parts = ((held[k : k + _ROWS] - self._anchor).sum(axis=0) for k in range(0, len(held), _ROWS))
            self._sum = sum(parts, start=np.zeros_like(self._sum))

    def relative(self, of: Indices | Vector | None = None) -> Floats:
        """Return distance / (largest - smallest distance), the published measure, of slots, one embedding or all.

        Where all distances are nearly equal that ratio has no meaning (it is 1e6 in the known
        version); then it is the place between smallest and largest, and 0 where they are equal.
        """
        distances = self._distances()
        if not distances.size:
            return np.zeros(1 if of is not None and of.dtype.kind == "f" else 0)
        low, high = float(distances.min()), float(distances.max())
        if of is None:
            asked = distances
        elif of.dtype.kind == "f":
            asked = np.array([self._distance_of(np.asarray(of, dtype=np.float32))])
        else:
            asked = distances[of]
        if high - low >= _NEARLY_EQUAL * high and high > low:
            return asked / (high - low)
        if high - low <= _EQUAL * high:
            return np.zeros(len(asked))
        return np.clip((asked - low) / (high - low), 0.0, 1.0)

    def emptied(self, used: int) -> EmbeddingSpread:
        """Return one made like this, to load a state of so many embeddings into."""
        other: EmbeddingSpread = shallow(self)
        other._used = used
        return other

    def __len__(self) -> int:
        return self._used

    def _rows_of(self, saved: Any) -> Vector:
        held = np.asarray(saved, dtype=np.float32)
        if not self._used:
            return np.zeros((0, 0), dtype=np.float32)
        return filled(held, self._used, np.zeros((self.capacity, held.shape[1]), dtype=np.float32))

    def _state_taken(self) -> None:
        width = self.embeddings.shape[1]
        if self._anchor.shape != (width,) or self._sum.shape != (width,):
            raise ValueError(f"anchor and sum must have {width} components")
        self._cached = -1, np.zeros(0)

    def _distances(self) -> Floats:
        used, (puts, distances) = self._used, self._cached
        if puts != self._puts or len(distances) != used:
            squares = self._cluster_squares(used) if self._clustered else self._squares(used)
            distances = np.sqrt(np.maximum(squares, 0.0))
            self._cached = self._puts, distances
        return distances

    @property
    def _clustered(self) -> bool:
        return self._kmeans is not None and self._used > self._cluster_above

    def _squares(self, used: int) -> Floats:
        """Return the squared distances to the centroid."""
        offset = self._sum / max(used, 1)
        products = self.embeddings[:used] @ offset.astype(np.float32)
        squares: Floats = self._norms[:used] + (offset @ offset + 2.0 * (self._anchor @ offset))
        squares -= 2.0 * products
        return squares

    def _cluster_squares(self, used: int) -> Floats:
        if self._centers is None or self._puts - self._fitted_at >= used // 4:
            stride = -(-used // 20_000)  # k-means on at most 20 000 of them: enough to place the centres
            model = self._kmeans(self._clusters, random_state=self._seed, n_init=1, batch_size=4096)
            self._centers = model.fit(self.embeddings[:used:stride]).cluster_centers_.astype(np.float32)
            self._fitted_at = self._puts
        offsets = self._centers.astype(np.float64) - self._anchor
        # One product for all clusters; the anchor keeps it exact as in `_squares`.
        squares = -2.0 * (self.embeddings[:used] @ offsets.T.astype(np.float32))
        squares += ((offsets * offsets).sum(axis=1) + 2.0 * (offsets @ self._anchor)).astype(np.float32)
        nearest: Floats = squares.min(axis=1) + self._norms[:used]
        return nearest

    def _distance_of(self, vector: Vector) -> float:
        if self._clustered and self._centers is not None:
            return float(np.sqrt(((self._centers - vector) ** 2).sum(axis=1).min()))
        difference = vector - self._anchor - self._sum / max(self._used, 1)
        return float(np.sqrt(difference @ difference))
