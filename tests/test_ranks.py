"""Training on several ranks is the same mathematics as on one: losses, gradients, weights, statistics and peaks."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.beton import find_build
from data_pipeline.errors import InputError
from data_pipeline.loader import Batch, Partitions
from tests.ranks import on_ranks
from trainer.attribution import PeakStore
from trainer.batch_norm import synchronise
from trainer.config import EncoderConfig, MoCoConfig, OptimizerConfig, TrainConfig
from trainer.distributed import from_first_rank, rank, world_size
from trainer.encoder import Encoder
from trainer.engine import join_ranks
from trainer.evaluation.attribution_maps import Coverage
from trainer.evaluation.evaluators import FeatureModel, Subject
from trainer.recipes import recipe
from trainer.step import Trainer

CPU = torch.device("cpu")


def _train(configs: list[TrainConfig], epochs: int) -> list[dict]:
    """What each configuration leaves on this rank. All in one process: starting one costs more than training here."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    device = join_ranks()
    return [
        _train_one(Trainer(config, Partitions(find_build(config.data, "digits", 0), device)), epochs)
        for config in configs
    ]


def _train_one(trainer: Trainer, epochs: int) -> dict:
    losses, gradients = [], {}
    for epoch in range(epochs):
        for step, batch in enumerate(trainer.loader.epoch(epoch)):
            losses.append(trainer.train_step(batch, epoch, step))
            if not gradients:
                parameters = trainer.engine.module.named_parameters()
                gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
        trainer.peaks.synchronise()
    state = {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}
    return {"losses": torch.stack(losses), "gradients": gradients, "state": state, "peaks": trainer.peaks.places}


@pytest.fixture(scope="module")
def configs(digits, tmp_path_factory) -> list[TrainConfig]:
    """Plain, ZeRO 1, ZeRO 2, two micro-batches accumulated, and MoCo."""
    plain = dataclasses.replace(
        recipe("digits"),
        data=digits.folder,
        batch_size=96,
        encoder=EncoderConfig(width=4, hidden_dim=16, embedding_dim=16),
        # Adam divides by the gradient's size: where that is rounding alone, so is the step. And small steps, since
        # large ones make more and more of what rounding did.
        optimizer=OptimizerConfig(name="sgd", learning_rate=3e-5),
    )
    folder, variants = tmp_path_factory.mktemp("deepspeed"), [plain]
    for name, settings in (
        ("one", {"zero_optimization": {"stage": 1}}),
        ("two", {"zero_optimization": {"stage": 2}}),
        ("accumulate", {"gradient_accumulation_steps": 2}),
    ):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(settings))
        variants.append(dataclasses.replace(plain, deepspeed_config=path))
    # Momentum 0: the key encoder moves as far as the encoder does.
    return [*variants, dataclasses.replace(plain, method="moco", objective=MoCoConfig(queue_size=200, momentum=0.0))]


@pytest.fixture(scope="module")
def alone(configs) -> list[dict]:
    return on_ranks(_train, 1, configs, 1)[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_gradients_weights_and_peaks_do_not_depend_on_the_number_of_ranks(configs, alone, ranks):
    # Four ranks of a plain run are as telling as of every variant, and two cores have enough to do with them.
    variants = configs if ranks == 2 else configs[:1]
    together = on_ranks(_train, ranks, variants, 1)
    for place, expected in enumerate(alone[: len(variants)]):
        results = [result[place] for result in together]
        assert len(results[0]["losses"]) == (14 if place == 3 else 7)
        first_losses = torch.stack([result["losses"][0] for result in results]).mean(dim=0)
        # A similarity is right to 1e-7, and divided by a temperature of 0.05.
        torch.testing.assert_close(first_losses, expected["losses"][0], atol=1e-5, rtol=1e-6)
        for result in results:
            for name, gradient in result["gradients"].items() if place == 0 else ():
                torch.testing.assert_close(gradient, expected["gradients"][name], atol=1e-5, rtol=1e-4, msg=name)
            for name, value in expected["state"].items():
                torch.testing.assert_close(result["state"][name], value, atol=1e-3, rtol=1e-3, msg=name)
            assert torch.equal(result["peaks"].isnan(), expected["peaks"].isnan())
            # Where two of a map's four cells tie up to rounding, either is right.
            same = torch.isclose(result["peaks"], expected["peaks"], atol=1e-5, equal_nan=True).float().mean()
            assert same > 0.95
            assert torch.equal(result["peaks"].nan_to_num(-1), results[0]["peaks"].nan_to_num(-1))


def _decide_slowly() -> int:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    return from_first_rank(lambda: time.sleep(4) or 7)


def test_what_the_first_rank_does_may_take_longer_than_a_collective_waits():
    assert on_ranks(_decide_slowly, 2) == [7, 7]


def _measure_on_the_first_rank() -> tuple[int, dict[str, float], int]:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=10))
    return world_size(), from_first_rank(_attribution), world_size()


def _attribution() -> dict[str, float]:
    """What an evaluator finds whose loss, in training, is that of all ranks."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(width=4, hidden_dim=8, embedding_dim=8), 3)
    model = FeatureModel(encoder, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3, layer=encoder.stages[-1])
    images = torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8)
    return Coverage()(Subject(model, {"test_known": Batch(images, torch.zeros(6).long(), torch.arange(6))})).numbers


def test_what_the_first_rank_measures_by_itself_waits_for_nobody():
    expected = 2, pytest.approx(_attribution(), abs=1e-6), 2
    assert on_ranks(_measure_on_the_first_rank, 2) == [expected, expected]


def _fail_on_the_first_rank() -> list[str]:
    said = []
    for error in (InputError("no file"), ZeroDivisionError("a bug")):

        def action(error=error):
            raise error

        try:
            from_first_rank(action)
        except Exception as raised:
            said.append(f"{type(raised).__name__}: {raised}")
    return [*said, from_first_rank(lambda: "next")]


def test_what_fails_on_the_first_rank_leaves_the_others_neither_waiting_nor_a_step_behind():
    shared = "SharedError: no file"
    assert on_ranks(_fail_on_the_first_rank, 2) == [
        [shared, "ZeroDivisionError: a bug", "next"],
        [shared, "SharedError: the first rank failed (ZeroDivisionError: a bug)", "next"],
    ]


def _dtypes_added_up(config: TrainConfig) -> list[str]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    trainer = Trainer(config, Partitions(find_build(config.data, "digits", 0), join_ranks()))
    return [str(dtype) for dtype in trainer.engine.optimizer.ipg_buckets]


def test_gradients_are_added_up_over_ranks_in_float32(configs, tmp_path):
    path = tmp_path / "bf16.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    config = dataclasses.replace(configs[0], deepspeed_config=path)
    assert on_ranks(_dtypes_added_up, 2, config) == [["torch.float32"]] * 2


def test_zero_stages_compute_what_plain_training_does(alone):
    def furthest(result: dict) -> float:
        return max(
            (result["state"][n] - v).abs().max().item() for n, v in alone[0]["state"].items() if v.is_floating_point()
        )

    # Plain training keeps its weights channels-last, so its convolutions round differently.
    assert max(map(furthest, alone[1:3])) < 0.01
    assert furthest(alone[3]) > 0.1, "accumulation contrasts within micro-batches: it must differ"


def _normalise(features: torch.Tensor, weight: torch.Tensor) -> tuple:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).double()
    layer = synchronise(layer, CPU).double() if world_size() > 1 else layer
    shard = len(features) // world_size()
    mine = slice(rank() * shard, (rank() + 1) * shard)
    loss = (layer(features[mine]) * weight[mine]).sum() / shard
    loss.backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    with torch.no_grad():
        evaluated = layer.eval()(features)
    return loss.detach(), gradients, dict(layer.named_buffers()), evaluated


@pytest.mark.parametrize("ranks", [2, 3])
def test_global_batch_normalisation_is_that_of_the_whole_batch(ranks):
    features, weight = torch.randn(6, 3, 7, 5).double(), torch.randn(6, 5, 5, 3).double()
    loss, gradients, buffers, evaluated = _normalise(features, weight)
    results = on_ranks(_normalise, ranks, features, weight)
    torch.testing.assert_close(torch.stack([result[0] for result in results]).mean(), loss)
    for column, gradient in enumerate(gradients):
        mean = torch.stack([result[1][column] for result in results]).mean(dim=0)
        torch.testing.assert_close(mean, gradient, atol=1e-12, rtol=1e-10)
    for result in results:
        for name, buffer in buffers.items():
            torch.testing.assert_close(result[2][name], buffer)
        torch.testing.assert_close(result[3], evaluated)


def _learn_peaks(path: Path) -> torch.Tensor:
    store = PeakStore(6, 1, CPU)
    store.update(torch.arange(6), torch.zeros(6, 1, 2))
    store._updated.zero_()
    store.update(torch.tensor([rank(), rank() + 2]), torch.full((2, 1, 2), 0.25 * (rank() + 1)))
    if rank() == 1:
        store.update(torch.tensor([4]), torch.full((1, 1, 2), torch.nan))
    store.synchronise()
    return store.places


def test_peaks_reach_every_rank(tmp_path):
    for places in on_ranks(_learn_peaks, 2, tmp_path):
        assert places[:, 0, 0].nan_to_num(-1).tolist() == [0.25, 0.5, 0.25, 0.5, -1, 0]
