"""What MoCo (He et al. 2020) keeps beside the encoder: a slower copy of it, and a queue of the keys that it made."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.counter_rng import Stream
from trainer.distributed import gather, rank, world_size
from trainer.encoder import Encoder


class KeyMemory:
    """The key encoder and the queue. Every rank holds the same.

    Attributes:
        encoder: the key encoder; it always normalises by the batch, and learns no statistics.
        queue: (Q, D) float32, of length 1; random directions until keys have taken their places.
        position: (1,) int64, where in the queue the next key goes.
    """

    def __init__(self, encoder: Encoder, size: int, *, seed: int) -> None:
        """`encoder` is a copy of the one that is trained, and becomes the key encoder."""
        self.encoder = encoder.requires_grad_(False).train()
        for layer in encoder.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.track_running_stats = False
        device = next(encoder.parameters()).device
        drawn = torch.randn(size, encoder.embedding_dim, generator=torch.Generator().manual_seed(seed))
        self.queue = F.normalize(drawn, dim=1).to(device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def follow(self, encoder: nn.Module, momentum: float) -> None:
        """Each weight of the key encoder becomes m·itself + (1 − m)·that of `encoder`."""
        for own, other in zip(self.encoder.parameters(), encoder.parameters()):
            own.lerp_(other, 1.0 - momentum)

    @torch.no_grad()
    def keys(self, views: Tensor) -> Tensor:
        """Keys (N, D) of this rank's views (N, C, h, w)."""
        return self.encoder(views).embeddings

    def shuffled_keys(self, views: Tensor, *, seed: int, epoch: int, step: int) -> Tensor:
        """`keys` of views that are normalised with others than those beside them: shuffled over all ranks before, and
        put back after. A query could otherwise tell its key by the statistics that they share."""
        if world_size() == 1:
            return self.keys(views)
        n, every = len(views), gather(views).flatten(0, 1)
        order = np.random.default_rng([seed, epoch, step, Stream.SHUFFLE]).permutation(len(every))
        places = torch.from_numpy(order).to(views.device)
        keys = gather(self.keys(every[places[rank() * n :][:n]])).flatten(0, 1)
        return torch.empty_like(keys).index_copy_(0, places, keys)[rank() * n :][:n]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Let the keys (N, D) of all ranks take the places of the oldest in the queue."""
        keys = gather(keys).flatten(0, 1)
        places = (self.position + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        self.position = (self.position + len(keys)) % len(self.queue)

    def state(self) -> dict[str, Tensor]:
        """Everything that a run needs to go on, by name."""
        weights = {f"encoder/{name}": value.contiguous() for name, value in self.encoder.named_parameters()}
        return {**weights, "queue": self.queue, "position": self.position}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.encoder.named_parameters():
            value.copy_(state[f"encoder/{name}"])
        self.queue.copy_(state["queue"])
        self.position.copy_(state["position"])
