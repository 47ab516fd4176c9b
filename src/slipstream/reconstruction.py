"""Learning to draw observations beside the algorithm's own loss: the decoder, and its part in a minibatch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slipstream import dice, tree
from slipstream.algos.algorithm import Batch
from slipstream.nets.autoencoder import Decoder
from slipstream.nets.policy import Outputs
from slipstream.nets.trunk import Encoded


class Reconstruction:
    """Adds the loss of a decoder to minibatches.

    Args:
        decoder: Learned together with the policy; nobody acts with it.
        seed: The run's seed, for the draws of a variational decoder.
    """

    def __init__(self, decoder: Decoder, seed: int) -> None:
        self.decoder, self._seed = decoder, seed

    def with_dice(self, batch: Batch, version: int, minibatch: int, shard: int) -> Batch:
        """The batch with what this loss draws by, keyed by the other arguments."""
        if not self.decoder.dice_width:
            return batch
        rows = batch.weight.numel()
        keys = dice.keys(self._seed, "latent", [version])
        numbers = dice.uniform(keys, minibatch * 4096 + shard, 1, rows * self.decoder.dice_width)
        drawn = torch.from_numpy(numbers).view(rows, self.decoder.dice_width)
        return replace(batch, columns={**batch.columns, _DICE: drawn})

    def beside(self, batch: Batch) -> Batch:
        """The batch with this loss beside the algorithm's own."""
        return replace(batch, auxiliary=self._loss)

    def _loss(self, out: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the minibatch's valid rows; rows beyond T, there to bootstrap from, are not drawn."""
        assert out.encoded is not None, "the policy does not tell what its heads were given"
        count, leading = batch.weight.numel(), batch.weight.dim()
        encoded = Encoded(*(part[:count] for part in out.encoded))
        obs = tree.map(lambda leaf: leaf.flatten(0, 1)[:count] if leading == 2 else leaf, batch.obs)
        rows, parts = self.decoder.loss(encoded, obs, batch.columns.get(_DICE))
        weight = batch.weight.flatten()
        return (rows * weight).sum(), {name: (part * weight).sum() for name, part in parts.items()}


_DICE = "latent_dice"
