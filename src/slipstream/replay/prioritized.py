"""Proportional prioritised replay (Schaul et al., 2016): a sum tree, draws from it, importance weights.

    P(i) = p_i^alpha / sum_k p_k^alpha,    p_i = |delta_i| + epsilon                       (eq. 1 and section 3.3)
    w_i = (N P(i))^-beta / max_j w_j                                                       (section 3.4)

The paper does not say what `max_j` is taken over; here it is the batch.

The tree's leaves hold `p_i^alpha`; every node above is the sum of its sixteen children, and the few nodes at the top
have their cumulative sum beside them, where a draw begins with one binary search. A node is always computed anew from
all of its children: its bits depend on the leaves and not on what they were before, so that the leaves are
enough to restore it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Items = NDArray[np.int64]
Values = NDArray[np.float64]

_BITS = 4
_FAN_OUT = 1 << _BITS  # children of a node; of 4 to 64, 8 and 16 are the fastest: cumulative sums cost most
_TOP = 4096  # nodes of which the cumulative sum is kept, at most


class SumTree:
    """Priorities of items `0 .. capacity-1`, all 0 at first, and the cumulative sum c(i) = sum_{k <= i} value_k.

    Identities: with values whose sums are exact, `find` is `np.searchsorted(np.cumsum(values), mass, "right")`; a tree
    filled with another's `leaves` equals it bit by bit.

    Args:
        capacity: Number of items.

    Attributes:
        capacity: Number of items.
        leaves: float64 `[capacity]`, the value of every item; a view that can't be written to.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._levels: list[Values] = []  # from the leaves to the top, each but the last a multiple of the fan-out
        nodes = capacity
        while nodes > _TOP:
            parents = -(-nodes // _FAN_OUT)
            self._levels.append(np.zeros(parents * _FAN_OUT))
            nodes = parents
        self._levels.append(np.zeros(nodes))
        self._cumulative = np.zeros(nodes + 1)
        self._leaves = self._levels[0][:capacity]
        self.leaves = self._leaves.view()
        self.leaves.flags.writeable = False

    @property
    def total(self) -> float:
        """Sum of all values."""
        return float(self._cumulative[-1])

    def values(self, items: Items) -> Values:
        """Values of items, float64 `[N]`, of items int64 `[N]`."""
        return self._leaves.take(items)

    def set(self, items: Items, values: Values) -> None:
        """Gives items new values; of equal items the last counts.

        Args:
            items: int64 `[N]`.
            values: float64 `[N]`.

        Raises:
            IndexError: An item isn't in `[0, capacity)`.
            ValueError: A value is negative, infinite or not a number; nothing has changed.
        """
        if not items.size:
            return
        if items.min() < 0:
            raise IndexError(f"item {items.min()} is not in [0, {self.capacity})")
        _check(values)
        self._leaves[items] = values
        nodes = items
        for level, above in pairwise(self._levels):
            blocks = level.reshape(-1, _FAN_OUT)
            nodes = nodes >> _BITS if len(nodes) <= len(blocks) else np.arange(len(blocks))
            above[nodes] = np.add.reduce(blocks.take(nodes, axis=0), axis=1)
        np.add.accumulate(self._levels[-1], out=self._cumulative[1:])

    def fill(self, start: int, stop: int, value: float | Values) -> None:
        """Gives items `start .. stop-1` one value, or one each; `fill(0, capacity, leaves)` restores a tree.

        Args:
            start: First item.
            stop: The item after the last.
            value: A number, or float64 `[stop - start]`.

        Raises:
            IndexError: The items aren't all in `[0, capacity)`.
            ValueError: A value is negative, infinite or not a number; nothing has changed.
        """
        if not 0 <= start <= stop <= self.capacity:
            raise IndexError(f"items {start} to {stop} are not in [0, {self.capacity})")
        _check(np.asarray(value))
        self._leaves[start:stop] = value
        for level, above in pairwise(self._levels):
            start, stop = start // _FAN_OUT, -(-stop // _FAN_OUT)
            above[start:stop] = np.add.reduce(level.reshape(-1, _FAN_OUT)[start:stop], axis=1)
        np.add.accumulate(self._levels[-1], out=self._cumulative[1:])

    def find(self, mass: Values) -> Items:
        """The items i with c(i-1) <= mass < c(i), up to rounding; never one of value 0, whatever the rounding.

        Args:
            mass: float64 `[N]` in `[0, total)`, fastest if ascending.

        Returns:
            int64 `[N]`.

        Raises:
            ValueError: All values are 0.
        """
        if self.total <= 0:
            raise ValueError("no item has a priority above 0; set some before drawing")
        # A rest just below the total of a block lies in its last child that has a value: rounding can't run past it.
        rest = np.minimum(mass, np.nextafter(self.total, 0.0))
        node = self._cumulative.searchsorted(rest, side="right") - 1
        rest -= self._cumulative.take(node)
        sums = np.zeros((len(node), _FAN_OUT + 1))
        before, upto = sums.reshape(-1), sums[:, 1:]
        rows = np.arange(0, sums.size, _FAN_OUT + 1)
        for level in reversed(self._levels[:-1]):
            np.add.accumulate(level.reshape(-1, _FAN_OUT).take(node, axis=0), axis=1, out=upto)
            np.minimum(rest, np.nextafter(upto[:, -1], 0.0), out=rest)
            child = (upto > rest[:, None]).argmax(axis=1)
            rest -= before.take(rows + child)
            node = (node << _BITS) + child
        return node

    def sample(self, uniforms: NDArray[np.floating]) -> Items:
        """Stratified draws with replacement (Schaul et al., 2016, appendix B.2.1): one from each N-th of the total.

            mass_i = (i + u_i) / N total,    i = 0 .. N-1

        Args:
            uniforms: float `[N]` in `[0, 1)`.

        Returns:
            int64 `[N]`, ascending.

        Raises:
            ValueError: All values are 0.
        """
        return self.find((np.arange(len(uniforms)) + uniforms) * (self.total / max(len(uniforms), 1)))


def importance_weights(probability: Values, count: int, beta: float) -> Values:
    """Weights that undo the bias of prioritised draws as far as `beta` says (Schaul et al., 2016, section 3.4).

        w_i = (N P(i))^-beta / max_j (N P(j))^-beta

    Identities: 1 everywhere at `beta = 0`; at 1 the weighted mean is that of uniform draws, up to a factor. The least
    probable item of the batch has weight 1; `count` cancels.

    Args:
        probability: float64 `[..., N]`, P(i) of the items drawn, above 0; one batch along the last axis.
        count: Items that could have been drawn (N of the paper).
        beta: Exponent in `[0, 1]`.

    Returns:
        float64 `[..., N]` in `(0, 1]`.
    """
    weight = (count * probability) ** -beta
    return weight / weight.max(axis=-1, keepdims=True)


class Draws(NamedTuple):
    """A batch of prioritised draws.

    Attributes:
        items: int64 `[N]`, ascending.
        weight: float64 `[N]`, importance weights.
    """

    items: Items
    weight: Values


class Proportional:
    """Prioritised draws with priorities proportional to errors (Schaul et al., 2016, algorithm 1).

        every step:    insert(items that came), remove(items that went)
        every update:  items, weight = draw(uniforms, count, beta)
                       update(items, errors of the items)

    Args:
        capacity: Number of items.
        alpha: Exponent of the priorities; 0 draws uniformly.
        epsilon: Added to errors, so that no item loses its last chance.

    Attributes:
        tree: The sum tree; its leaves are `p_i^alpha`, 0 for items that aren't there.
        max_priority: `max_i p_i` so far, at first 1.
    """

    def __init__(self, capacity: int, alpha: float = 0.6, epsilon: float = 1e-6) -> None:
        self.alpha, self.epsilon = alpha, epsilon
        self.tree = SumTree(capacity)
        self.max_priority = 1.0

    def insert(self, items: Items) -> None:
        """Lets items int64 `[N]` be drawn, with the greatest priority so far: `p_t = max_{i<t} p_i` (line 6)."""
        self.tree.set(items, np.full(len(items), self.max_priority**self.alpha))

    def remove(self, items: Items) -> None:
        """Lets items int64 `[N]` be drawn no more."""
        self.tree.set(items, np.zeros(len(items)))

    def draw(self, uniforms: NDArray[np.floating], count: int, beta: float) -> Draws:
        """Draws N items, with replacement, and weighs them.

        Args:
            uniforms: float `[N]` in `[0, 1)`.
            count: Items that can be drawn.
            beta: Exponent of the importance weights; the paper anneals it to 1 over the run.

        Raises:
            ValueError: There is nothing to draw.
        """
        items = self.tree.sample(uniforms)
        return Draws(items, importance_weights(self.tree.values(items) / self.tree.total, count, beta))

    def update(self, items: Items, errors: NDArray[np.floating]) -> None:
        """Gives items that were drawn the priority `|delta_i| + epsilon`; those removed since then stay away.

        Args:
            items: int64 `[N]`; of equal items the last counts.
            errors: float `[N]`, delta.

        Raises:
            ValueError: An error is infinite or not a number; nothing has changed.
        """
        priority = np.abs(errors.astype(np.float64)) + self.epsilon
        self.tree.set(items, priority**self.alpha * (self.tree.values(items) > 0))
        self.max_priority = max(self.max_priority, float(priority.max(initial=0.0)))

    def state(self) -> dict[str, Tensor]:
        """Copies of all that a later `load` needs: `priorities` float64 `[capacity]` and `max_priority` float64 `[]`.

        The priorities are the leaves `p_i^alpha`, in full: 8 bytes per item.
        """
        return {
            "priorities": torch.from_numpy(self.tree.leaves.copy()),
            "max_priority": torch.tensor(self.max_priority, dtype=torch.float64),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Makes the draws those of whom `state` is from, bit by bit: sums follow from the leaves, as do draws.

        Raises:
            KeyError: A tensor is missing.
            ValueError: The number of items is another.
        """
        self.tree.fill(0, self.tree.capacity, state["priorities"].numpy())
        self.max_priority = float(state["max_priority"])


def _check(values: NDArray[np.floating]) -> None:
    """Refuses values that aren't a priority."""
    if not (values.min(initial=0.0) >= 0.0 and values.max(initial=0.0) < np.inf):  # not a number fails both
        bad = values[~((values >= 0) & (values < np.inf))][0]
        raise ValueError(f"priority {bad} is not a finite number of at least 0; look for where errors became so")
