"""The queue and the momentum encoder against loops, and keys under each batch-norm policy over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.ranks import on_ranks
from trainer.batch_norm import synchronise
from trainer.config import EncoderConfig
from trainer.distributed import rank, world_size
from trainer.encoder import Encoder
from trainer.moco import KeyMemory

CPU = torch.device("cpu")
CONFIG = EncoderConfig(width=4, hidden_dim=8, embedding_dim=6)


def new_encoder(seed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(CONFIG, 1)


@pytest.mark.parametrize(("size", "batch"), [(5, 3), (7, 7), (12, 4)])
def test_the_queue_holds_the_newest_keys(size, batch):
    memory = KeyMemory(new_encoder(0), size, seed=3)
    torch.testing.assert_close(memory.queue.norm(dim=1), torch.ones(size))
    places, place = memory.queue.tolist(), 0
    for step in range(9):
        keys = torch.full((batch, 6), float(step)) + torch.arange(batch).view(-1, 1) / 10
        memory.enqueue(keys)
        for key in keys.tolist():
            places[place], place = key, (place + 1) % size
        torch.testing.assert_close(memory.queue, torch.tensor(places))
    newest = [step + i / 10 for step in range(9) for i in range(batch)][-size:]
    torch.testing.assert_close(memory.queue[:, 0].sort().values, torch.tensor(newest))


def test_the_key_encoder_follows_slowly_and_is_not_trained():
    encoder, memory = new_encoder(0), KeyMemory(new_encoder(1), 8, seed=0)
    expected = {name: value.clone() for name, value in memory.encoder.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(1.0)
        memory.follow(encoder, 0.9)
        expected = {name: 0.9 * expected[name] + 0.1 * value for name, value in encoder.named_parameters()}
    for name, value in memory.encoder.named_parameters():
        torch.testing.assert_close(value, expected[name])
    keys = memory.keys(torch.randn(4, 1, 16, 16))
    assert not keys.requires_grad and not any(p.requires_grad for p in memory.encoder.parameters())


def test_what_is_saved_is_enough_to_go_on():
    memory, other = KeyMemory(new_encoder(0), 8, seed=0), KeyMemory(new_encoder(1), 8, seed=1)
    views = torch.randn(3, 1, 16, 16)
    memory.enqueue(memory.keys(views))
    other.load_state(memory.state())
    for each in (memory, other):
        each.enqueue(each.keys(views + 1))
    assert torch.equal(memory.queue, other.queue) and torch.equal(memory.position, other.position)


POLICIES = ("global", "local", "shuffled")


def _keys_of_all_policies(views: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {policy: _keys(views, policy) for policy in POLICIES}


def _keys(views: torch.Tensor, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    encoder = new_encoder(0)
    memory = KeyMemory(synchronise(encoder, CPU) if policy == "global" and world_size() > 1 else encoder, 9, seed=0)
    mine = views[rank() * len(views) // world_size() :][: len(views) // world_size()]
    draw = {"seed": 1, "epoch": 2, "step": 4}
    keys = memory.shuffled_keys(mine, **draw) if policy == "shuffled" else memory.keys(mine)
    memory.enqueue(keys)
    return keys, memory.queue


@pytest.mark.parametrize("ranks", [1, 2])
def test_keys_are_normalised_as_the_policy_says(ranks):
    """Global: by all images; local: by those of the rank; shuffled: by as many, drawn from all ranks."""
    views, plain = torch.randn(8, 1, 16, 16), new_encoder(0).train()
    results = on_ranks(_keys_of_all_policies, ranks, views)
    for policy in POLICIES:
        found = [result[policy] for result in results]
        keys = torch.cat([result[0] for result in found])
        for _, queue in found:  # every rank remembers all keys, in their order
            torch.testing.assert_close(queue[:8], keys)
        with torch.no_grad():
            if policy == "global" or ranks == 1:
                torch.testing.assert_close(keys, plain(views).embeddings, atol=1e-5, rtol=1e-4)
                continue
            halves = torch.cat([plain(half).embeddings for half in views.split(4)])
        if policy == "local":
            torch.testing.assert_close(keys, halves, atol=1e-5, rtol=1e-4)
            continue
        # Some division of the eight images into two fours explains all keys, and it is not that of the ranks.
        assert (keys - halves).abs().max() > 1e-3
        found_groups = []
        for group in torch.combinations(torch.arange(8), 4):
            with torch.no_grad():
                if torch.allclose(plain(views[group]).embeddings, keys[group], atol=1e-5, rtol=1e-4):
                    found_groups.append(set(group.tolist()))
        assert len(found_groups) == 2 and found_groups[0] | found_groups[1] == set(range(8))


def test_statistics_of_the_key_encoder_are_those_of_the_batch_and_not_learnt():
    memory = KeyMemory(new_encoder(0), 8, seed=0)
    layer = next(m for m in memory.encoder.modules() if isinstance(m, nn.BatchNorm2d))
    before = layer.running_mean.clone()
    memory.keys(torch.randn(4, 1, 16, 16))
    assert torch.equal(layer.running_mean, before)
