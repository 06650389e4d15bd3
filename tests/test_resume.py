"""Exact resume: whatever ends a run, the same command goes on, and what comes out is what would have come out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from rich.console import Console
from safetensors.torch import load_file

from data_pipeline.beton import find_build
from data_pipeline.build import BuildConfig, build
from data_pipeline.cli import EXIT_INTERRUPTED, EXIT_REQUEUE
from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions
from tests.ranks import on_ranks
from trainer import checkpoint
from trainer import train as train_module
from trainer.config import EncoderConfig, MoCoConfig, OptimizerConfig, TrackingConfig, TrainConfig
from trainer.engine import join_ranks
from trainer.loop import LossLog
from trainer.recipes import recipe
from trainer.step import Trainer
from trainer.train import run_identity, train

QUIET = Console(quiet=True)
STEPS = 6  # of an epoch
DIE = """
import os, signal, sys
sys.path.insert(0, {root!r})
from trainer.train import cli, main
from trainer.step import Trainer
step, dies = Trainer.train_step, {dies}
def step_and_die(self, batch, epoch, number):
    parts = step(self, batch, epoch, number)
    if epoch * {steps} + number == dies:
        os.kill(os.getpid(), signal.{signal})
    return parts
def main_and_hurry():
    try:
        main()
    finally:  # as launchers do with the ranks that are left
        os.kill(os.getpid(), signal.SIGTERM)
Trainer.train_step = step_and_die
cli.run(main_and_hurry)
"""


@pytest.fixture(autouse=True)
def cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)


BASE = dataclasses.replace(
    recipe("digits"),
    epochs=3,
    checkpoint_every=1,
    log_every=2,
    encoder=EncoderConfig(width=4, hidden_dim=16, embedding_dim=16),
    tracking=TrackingConfig(offline=True),
)


@pytest.fixture
def config(digits, tmp_path) -> TrainConfig:
    return dataclasses.replace(BASE, data=digits.folder, run_dir=tmp_path / "run")


@pytest.fixture(scope="module")
def straight(digits, tmp_path_factory) -> dict:
    """What comes out of the same run when nothing interrupts it."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        train(dataclasses.replace(BASE, data=digits.folder, run_dir=run_dir), QUIET)
    return outcome(run_dir)


def outcome(run: Path) -> dict:
    """Everything a run leaves that is not a time."""
    last = max((run / "checkpoints").iterdir())
    tensors = {
        f"{path.name}/{name}": value
        for path in (*last.glob("*.safetensors"), *(run / "model").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    metrics = json.loads((run / "metrics.json").read_text())
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    points = {
        (line["step"], name): value
        for line in journal
        for name, value in line["metrics"].items()
        if name != "train/images_per_second"
    }
    assert len(journal) == len({(line["step"], *line["metrics"]) for line in journal}), "a point was journalled twice"
    kept = {k: v for k, v in metrics.items() if k not in ("train_seconds", "peak_rss_bytes")}
    return {"tensors": tensors, "metrics": kept, "points": points}


def assert_equal(one: dict, other: dict) -> None:
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, value in one["tensors"].items():
        assert torch.equal(value.nan_to_num(-7), other["tensors"][name].nan_to_num(-7)), name
    assert one["metrics"] == other["metrics"] and one["points"] == other["points"]


def command(config: TrainConfig) -> list[str]:
    return [
        "--data", str(config.data), "--epochs", "3", "--checkpoint-every", "1", "--log-every", "2",
        "--encoder.width", "4", "--encoder.hidden-dim", "16", "--encoder.embedding-dim", "16",
        "--run-dir", str(config.run_dir), "--tracking.offline",
    ]  # fmt: skip


def run_and_die(config: TrainConfig, dies: int, name: str) -> int:
    script = DIE.format(root=str(Path(__file__).parents[1]), dies=dies, steps=STEPS, signal=name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *command(config)], env=environment, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.parametrize(
    ("dies", "name"),
    [(8, "SIGKILL"), (9, "SIGTERM"), (14, "SIGUSR1"), (4, "SIGINT"), (3 * STEPS - 1, "SIGTERM")],
)
def test_a_run_that_is_ended_at_any_step_goes_on_bit_for_bit(config, straight, dies, name):
    code = run_and_die(config, dies, name)
    steps = max(json.loads(p.read_text())["progress"]["total_steps"] for p in config.folder.rglob("state.json"))
    if name == "SIGKILL":
        assert code == -signal.SIGKILL and steps == STEPS
    else:  # the very step is kept
        assert code == (EXIT_INTERRUPTED if name == "SIGINT" else EXIT_REQUEUE) and steps == dies + 1
        assert json.loads((config.folder / "mlflow.json").read_text())["status"] == "KILLED"
    train(config, QUIET)
    assert_equal(outcome(config.folder), straight)
    assert json.loads((config.folder / "mlflow.json").read_text())["status"] == "FINISHED"


def test_old_checkpoints_by_the_clock_change_nothing(config, straight):
    often = dataclasses.replace(config, checkpoint_minutes=1e-9, keep_checkpoints=100)
    train(often, QUIET)
    # Of those after steps 2, 4 and 6 of three epochs, the ends of epochs and the newest two.
    steps = [int(path.name.removeprefix("step-")) for path in (often.folder / "checkpoints").iterdir()]
    assert sorted(steps) == [6, 12, 16, 18]
    assert_equal(outcome(often.folder), straight)


def test_a_checkpoint_by_the_clock_comes_at_the_end_of_an_epoch_that_is_read_once(config, straight):
    rarely = dataclasses.replace(
        config, checkpoint_minutes=1e-9, checkpoint_every=1000, log_every=1000, keep_checkpoints=100
    )
    train(rarely, QUIET)
    steps = [int(path.name.removeprefix("step-")) for path in (rarely.folder / "checkpoints").iterdir()]
    assert sorted(steps) == [6, 12, 18]
    assert_equal(outcome(rarely.folder), straight)


def test_with_accumulated_batches_losses_are_read_between_updates(config, monkeypatch, tmp_path):
    """Else their readings might never fall where a checkpoint can be written."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_accumulation_steps": 3}))
    read = []
    monkeypatch.setattr(LossLog, "read", lambda log, *args, r=LossLog.read: (r(log, *args), read.append(log.step))[0])
    config = dataclasses.replace(config, epochs=1, deepspeed_config=path, batch_size=45, log_every=2)
    train(dataclasses.replace(config, checkpoint_minutes=1e-9, keep_checkpoints=100), QUIET)
    assert len(read) > 4 and all(step % 6 == 0 for step in read[:-1])
    written = [int(path.name.removeprefix("step-")) for path in (config.folder / "checkpoints").iterdir()]
    assert sorted(written) == read[-2:], "the newest two"


def test_a_run_that_came_to_no_checkpoint_leaves_nothing_to_another_one(config, monkeypatch):
    """Its points, that is, which would stand for those of the other."""
    lines = []
    for rate, dies in ((1.0, True), (1e-3, False)):
        changed = dataclasses.replace(
            config, epochs=1, checkpoint_every=5, optimizer=OptimizerConfig(learning_rate=rate)
        )
        with pytest.MonkeyPatch.context() as patch:
            if dies:
                patch.setattr(checkpoint, "save", fail)
            with contextlib.suppress(InputError):
                train(changed, QUIET)
        lines.append((config.folder / "journal.jsonl").read_text().splitlines())
    first, second = (json.loads(line[0])["metrics"]["train/total"] for line in lines)
    assert first != second and len([line for line in lines[1] if "train/total" in line]) == 1


def fail(*args, **options):
    raise InputError("the disk is full")


def test_a_finished_run_says_which_options_its_model_was_not_made_with(config):
    config = dataclasses.replace(config, epochs=1)
    train(config, QUIET)
    with pytest.raises(InputError, match=r"holds the finished run, whose model was made with other score_on, k: give"):
        train(dataclasses.replace(config, k=5, score_on="backbone"), QUIET)


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on(config, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        die_after(patch, 1)
        train(config, QUIET)
    train(config, QUIET)
    points = outcome(config.folder)["points"]
    assert points[3, "train/total"] < points[1, "train/total"]


@pytest.mark.parametrize("optimizer", [OptimizerConfig(), OptimizerConfig(name="sgd", learning_rate=0.01)])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage_and_optimizer_resumes_exactly(config, stage, optimizer, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = dataclasses.replace(config, epochs=2, deepspeed_config=path, optimizer=optimizer)
    straight = dataclasses.replace(config, run_dir=config.run_dir.with_name("straight"))
    train(straight, QUIET)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        die_after(patch, 1)
        train(config, QUIET)
    train(config, QUIET)
    assert_equal(outcome(config.folder), outcome(straight.folder))


def test_moco_resumes_its_queue_and_its_key_encoder_exactly(config):
    moco = MoCoConfig(queue_size=500, momentum=0.9)
    config = dataclasses.replace(config, epochs=2, method="moco", objective=moco)
    straight = dataclasses.replace(config, run_dir=config.run_dir.with_name("straight"))
    train(straight, QUIET)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        die_after(patch, 1)
        train(config, QUIET)
    train(config, QUIET)
    expected = outcome(straight.folder)
    assert "keys.safetensors/queue" in expected["tensors"]
    assert_equal(outcome(config.folder), expected)


def test_a_run_says_by_which_commits_it_was_trained(config, monkeypatch):
    def commit() -> str:
        return json.loads((config.folder / "config.json").read_text())["commit"]

    for epochs, name, said in ((1, "a", "a"), (2, "b", "a then b"), (9, "b", "a then b")):
        monkeypatch.setattr(train_module, "source_commit", lambda name=name: name)
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, epochs)
            with contextlib.suppress(KeyboardInterrupt):
                train(config, QUIET)
        assert commit() == said
    train(dataclasses.replace(config, restart=True), QUIET)
    assert commit() == "b"


def die_after(patch: pytest.MonkeyPatch, epochs: int) -> None:
    save = checkpoint.save

    def save_and_die(run_dir, engine, memories, progress, *args, **options):
        save(run_dir, engine, memories, progress, *args, **options)
        if progress.epoch == epochs:
            raise KeyboardInterrupt

    patch.setattr(checkpoint, "save", save_and_die)


def _train_on_ranks(config: TrainConfig, dies: bool) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    with pytest.MonkeyPatch.context() as patch:
        if dies:
            die_after(patch, 1)
        try:
            train(config, None)
        except KeyboardInterrupt:
            assert dies


@pytest.mark.parametrize(("before", "after", "stages"), [(2, 1, (1, 0))])
def test_another_number_of_ranks_goes_on_to_rounding(config, before, after, stages, tmp_path):
    """Also from one ZeRO stage to another: how memory is shared out is not part of what is computed."""
    config = dataclasses.replace(
        config, epochs=2, batch_size=96, optimizer=OptimizerConfig(name="sgd", learning_rate=3e-5)
    )
    straight = dataclasses.replace(config, run_dir=config.run_dir.with_name("straight"))
    train(straight, QUIET)
    for ranks, stage, dies in ((before, stages[0], True), (after, stages[1], False)):
        path = tmp_path / f"{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        on_ranks(_train_on_ranks, ranks, dataclasses.replace(config, deepspeed_config=path), dies)
    assert "going on from" in (config.folder / "log.txt").read_text()
    one, other = outcome(config.folder), outcome(straight.folder)
    for name, value in one["tensors"].items():
        if name.startswith("encoder"):
            torch.testing.assert_close(value, other["tensors"][name], atol=2e-3, rtol=2e-3, msg=name)


def _load_and_save(config: TrainConfig, source: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    device = join_ranks()
    made = find_build(config.data, "digits", 0)
    trainer = Trainer(config, Partitions(made, device))
    identity = run_identity(config, made, device)
    progress = checkpoint.load(source, trainer.engine, trainer.memories, identity)
    checkpoint.save(config.folder, trainer.engine, trainer.memories, progress, identity, keep=1)


@pytest.mark.parametrize("optimizer", [OptimizerConfig(), OptimizerConfig(name="sgd")], ids=["adam", "sgd"])
@pytest.mark.parametrize(("ranks", "stage"), [(2, 0), (2, 1), (2, 2), (1, 2)])
def test_what_is_loaded_is_what_was_saved_on_any_ranks_and_zero_stage(config, optimizer, ranks, stage, tmp_path):
    config = dataclasses.replace(config, epochs=1, batch_size=96, optimizer=optimizer)
    train(config, QUIET)
    source = checkpoint.latest(config.folder)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    on_ranks(
        _load_and_save,
        ranks,
        dataclasses.replace(config, deepspeed_config=path, run_dir=tmp_path / "again", cache="resident"),
        source,
    )
    again = checkpoint.latest(tmp_path / "again")
    for name in ("encoder", "optimizer", "peaks"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (source, again))
        assert one.keys() == other.keys() and one
        assert all(torch.equal(one[key].nan_to_num(-7), other[key].nan_to_num(-7)) for key in one), name
    one, other = (json.loads((folder / "state.json").read_text()) for folder in (source, again))
    assert (one["progress"], one["schedule"]) == (other["progress"], other["schedule"])


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(config, straight):
    train(config, QUIET)
    (config.folder / "metrics.json").unlink()
    newest = checkpoint.latest(config.folder)
    path = newest / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    train(config, QUIET)
    assert f"passing over {newest}: optimizer.safetensors is damaged" in (config.folder / "log.txt").read_text()
    assert_equal(outcome(config.folder), straight)


def test_a_full_disk_while_checkpointing_keeps_the_last_good_one(config, straight, tmp_path):
    """The real thing: a file system that holds one checkpoint, but not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        full = dataclasses.replace(config, run_dir=disk / "run")
        with pytest.raises(InputError, match=r"the disk is full: .*step-0000000"):
            train(full, QUIET)
        kept = checkpoint.latest(full.folder)
        assert kept is not None and [p.name for p in kept.parent.iterdir()] == [kept.name]
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        train(full, QUIET)
        assert_equal(outcome(full.folder), straight)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(("cache", "after"), [("stream", (1, 2)), ("resident", (2, STEPS - 1))])
def test_a_data_folder_that_disappears_is_one_line_and_loses_nothing(config, straight, cache, after, tmp_path):
    """In the middle of training, which holds on to what it has open, or just before the evaluation."""
    data, away = tmp_path / "data", tmp_path / "away"
    shutil.copytree(config.data, data)
    config, step = dataclasses.replace(config, data=data, cache=cache), Trainer.train_step

    def unmount(self, batch, epoch, number):
        if (epoch, number) == after:
            data.rename(away)
        return step(self, batch, epoch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", unmount)
        with pytest.raises(InputError, match=rf"data folder {data} has disappeared: .*same command goes on"):
            train(config, QUIET)
    assert checkpoint.latest(config.folder).name == f"step-{3 * STEPS:09d}"
    with pytest.raises(InputError, match="no files of protocol digits, split 0"):  # it is still away
        train(config, QUIET)
    away.rename(data)
    train(config, QUIET)
    assert_equal(outcome(config.folder), straight)


def test_a_clock_that_jumps_changes_nothing(config, straight, monkeypatch, tmp_path):
    clock, jumps = time.time, itertools.cycle([0, -1e8, 1e8, -2e8])  # years back and forth
    monkeypatch.setattr(time, "time", lambda: clock() + next(jumps))
    store = f"sqlite:///{tmp_path}/store.db"
    online = dataclasses.replace(
        config, checkpoint_minutes=60, keep_checkpoints=100, tracking=TrackingConfig(uri=store)
    )
    train(online, QUIET)
    assert sorted(path.name for path in (config.folder / "checkpoints").iterdir()) == [
        f"step-{epoch * STEPS:09d}" for epoch in (1, 2, 3)
    ]
    assert_equal(outcome(config.folder), straight)
    # MLflow has the points at their steps, and takes the last step for the present value.
    client, run = MlflowClient(store), json.loads((config.folder / "mlflow.json").read_text())["run_id"]
    history = {point.step: point.value for point in client.get_metric_history(run, "train/total")}
    assert history == {step: straight["points"][step, "train/total"] for step in (1, 2, 3)}
    assert client.get_run(run).data.metrics["train/total"] == history[3]


def test_weights_that_are_not_finite_are_never_kept(config, monkeypatch):
    step = Trainer.train_step

    def spoil(self, batch, epoch, number):
        parts = step(self, batch, epoch, number)
        if (epoch, number) == (1, STEPS - 1):  # as after a gradient that was not finite: no loss has seen it yet
            next(self.engine.module.parameters()).data.fill_(torch.nan)
        return parts

    monkeypatch.setattr(Trainer, "train_step", spoil)
    with pytest.raises(InputError, match=r"weights are not finite .*last good checkpoint is .*step-000000006"):
        train(config, QUIET)
    assert checkpoint.latest(config.folder).name == "step-000000006"


def test_a_run_does_not_go_on_with_other_data_or_settings(config, tmp_path):
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        die_after(patch, 1)
        train(config, QUIET)
    fewer = build(BuildConfig(protocol="digits", out=tmp_path / "fewer", train_images=600), QUIET)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_clipping": 1.0}))
    for change, different in (
        ({"data": fewer.folder}, "split_hash, train_images"),
        ({"deepspeed_config": path}, "deepspeed"),
        ({"seed": 4}, "seed"),
    ):
        before = {p: p.read_bytes() for p in config.folder.rglob("*") if p.is_file() and p.name != ".lock"}
        with pytest.raises(InputError, match=rf"another configuration \({different} differ\)"):
            train(dataclasses.replace(config, **change), QUIET)
        assert before == {p: p.read_bytes() for p in config.folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_restart_that_cannot_start_discards_nothing(config):
    train(dataclasses.replace(config, epochs=1), QUIET)
    before = {p.name: p.read_bytes() for p in config.folder.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="do not fill one batch"):
        train(dataclasses.replace(config, restart=True, batch_size=1000), QUIET)
    assert before == {p.name: p.read_bytes() for p in config.folder.rglob("*") if p.is_file()}
    train(dataclasses.replace(config, restart=True, epochs=1, seed=5), QUIET)
    assert json.loads((config.folder / "config.json").read_text())["config"]["seed"] == 5


def test_a_kill_between_the_metrics_and_the_registry_is_made_good(config, tmp_path, monkeypatch):
    store = f"sqlite:///{tmp_path}/store.db"
    online = dataclasses.replace(config, epochs=1, tracking=TrackingConfig(uri=store))

    def die(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "register", die)
        train(online, QUIET)
    monkeypatch.setattr(Trainer, "train_step", None)  # there is nothing left to train
    train(online, QUIET)
    client = MlflowClient(store)
    assert client.get_model_version_by_alias("gradmix-digits", "champion").version in ("1", 1)
    # A kill after the registration, before the note of it: the version is found, not made again.
    link = json.loads((config.folder / "mlflow.json").read_text())
    (config.folder / "mlflow.json").write_text(json.dumps({**link, "version": None}))
    train(online, QUIET)
    assert len(client.search_model_versions("name='gradmix-digits'")) == 1
    # Under another name the run is not registered yet.
    train(dataclasses.replace(online, tracking=TrackingConfig(uri=store, model_name="prod")), QUIET)
    assert client.get_model_version_by_alias("prod", "champion").run_id == link["run_id"]
    # A link of before the name was kept beside the version: nothing is done again, the alias stays where it is.
    (config.folder / "mlflow.json").write_text(json.dumps({key: link[key] for key in link if key != "model_name"}))
    client.delete_registered_model_alias("gradmix-digits", "champion")
    train(online, QUIET)
    assert not client.get_registered_model("gradmix-digits").aliases


@pytest.mark.parametrize("settings", [{"bf16": {"enabled": True}}, {"torch_autocast": {"enabled": True}}])
@pytest.mark.parametrize("peaks_from", ["previous_epoch", "same_step"])
def test_bfloat16_trains_with_float32_weights_and_statistics(config, straight, settings, peaks_from, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    mixing = dataclasses.replace(config.mixing, peaks_from=peaks_from)
    low = dataclasses.replace(config, deepspeed_config=path, mixing=mixing)
    train(low, QUIET)
    points = outcome(low.folder)["points"]
    assert points[3, "train/total"] < points[1, "train/total"]
    assert all(v.dtype in (torch.float32, torch.int64) for v in outcome(low.folder)["tensors"].values())
    # The same run but for its rounding.
    expected = straight["points"][1, "train/total"]
    assert points[1, "train/total"] != expected
    if peaks_from == "previous_epoch":
        assert points[1, "train/total"] == pytest.approx(expected, rel=0.05)
