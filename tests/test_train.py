"""Training end to end on digits: what a step computes, what a run leaves behind, and what goes wrong in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from rich.console import Console

from data_pipeline.beton import find_build
from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions, load_all
from data_pipeline.protocols import Protocol
from trainer import checkpoint
from trainer.config import EncoderConfig, MixingConfig, MoCoConfig, TrackingConfig, TrainConfig
from trainer.engine import join_ranks, micro_batch_size, read_deepspeed_config
from trainer.evaluate import EvaluateConfig, evaluate
from trainer.recipes import recipe
from trainer.recognition import evaluate_open_set
from trainer.registry import OpenSetModel, load_model
from trainer.step import Trainer
from trainer.train import train

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)  # artifacts of an SQLite store go to the working folder


@pytest.fixture
def config(digits, tmp_path) -> TrainConfig:
    """Two epochs of a tiny network."""
    return dataclasses.replace(
        recipe("digits"),
        data=digits.folder,
        epochs=2,
        checkpoint_every=1,
        encoder=EncoderConfig(width=4, hidden_dim=16, embedding_dim=16),
        run_dir=tmp_path / "run",
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/store.db"),
    )


def new_trainer(config: TrainConfig) -> Trainer:
    return Trainer(config, Partitions(find_build(config.data, "digits", 0), join_ranks()))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}


def test_a_run_leaves_a_model_that_says_unknown(config, digits, tmp_path):
    train(config, QUIET)
    run = config.folder
    metrics = json.loads((run / "metrics.json").read_text())
    assert (
        set(metrics["auroc"]) == set(metrics["oscr"]) == set(metrics["closed_set_accuracy"]) == {"1", "5", "10", "50"}
    )
    assert metrics["train_seconds"] > 0 and metrics["peak_rss_bytes"] > 10**8
    assert 0.8 <= metrics["known_accepted"] <= 1 and metrics["auroc"]["10"] > 0.6
    record = json.loads((run / "config.json").read_text())
    assert record["split_hash"] == Protocol("digits", 0).split_hash and record["config"]["epochs"] == 2
    assert "training images" in (run / "log.txt").read_text()

    client = MlflowClient(config.tracking.uri)
    version = client.get_model_version_by_alias("gradmix-digits", "champion")
    tracked = client.get_run(version.run_id)
    assert tracked.info.status == "FINISHED" and tracked.data.tags["split_hash"] == record["split_hash"]
    assert tracked.data.params["mixing.kind"] == "gradmix"
    assert [m.step for m in client.get_metric_history(version.run_id, "train/total")] == [1, 2]
    assert tracked.data.metrics["test/auroc_k10"] == pytest.approx(metrics["auroc"]["10"])

    # The registered model is the trained one: the same answers through MLflow's own interface.
    model = load_model("models:/gradmix-digits@champion", config.tracking.uri)
    assert model.card.class_names == ("0", "2", "3", "5", "7", "9")
    images = load_all(digits, "test_unknown", device=torch.device("cpu")).images[:40]
    answers = model.predict(images)
    mlflow.set_tracking_uri(config.tracking.uri)
    through_mlflow = mlflow.pyfunc.load_model("models:/gradmix-digits@champion").predict(images.numpy())
    assert list(through_mlflow.columns)[:3] == ["label", "class", "score"]
    assert through_mlflow["label"].tolist() == answers["label"].tolist()
    np.testing.assert_allclose(through_mlflow["score"], answers["score"], rtol=1e-6)
    unknown = answers["score"] < model.card.threshold
    assert ((answers["label"] == "unknown") == unknown).all() and unknown.any()
    artifacts = Path(mlflow.artifacts.download_artifacts("models:/gradmix-digits@champion"))
    assert not [path for path in artifacts.rglob("*") if path.suffix in (".pkl", ".pt", ".pickle")]

    result = evaluate(
        EvaluateConfig(
            model="models:/gradmix-digits@champion",
            data=config.data,
            tracking_uri=config.tracking.uri,
            ks=(1, 10, 1000),
            run_dir=tmp_path / "evaluation",
            examples=4,
        ),
        QUIET,
    )
    assert result["auroc"].keys() == {1, 10} and result["auroc"][10] == pytest.approx(metrics["auroc"]["10"])
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["oscr"]["1"] == result["oscr"][1]
    with pytest.raises(InputError, match=r"gradmix-digits@nobody is not in .*it has gradmix-digits \(@champion\)"):
        load_model("models:/gradmix-digits@nobody", config.tracking.uri)

    # The same command again neither trains nor registers; another configuration is refused.
    train(config, QUIET)
    assert len(client.search_model_versions("name='gradmix-digits'")) == 1
    before = (run / "metrics.json").read_bytes()
    with pytest.raises(InputError, match="holds a run of another configuration"):
        train(dataclasses.replace(config, seed=1), QUIET)
    assert (run / "metrics.json").read_bytes() == before


def test_going_on_from_a_checkpoint_equals_never_having_stopped(config, monkeypatch):
    offline = dataclasses.replace(config, epochs=3, tracking=TrackingConfig(offline=True))
    straight = dataclasses.replace(offline, run_dir=config.run_dir.with_name("straight"))
    train(straight, QUIET)

    save = checkpoint.save

    def save_and_die(run_dir, *args, **options):
        save(run_dir, *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(offline, QUIET)
    assert not (offline.folder / "metrics.json").exists()
    monkeypatch.undo()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    train(offline, QUIET)
    assert "going on from" in (offline.folder / "log.txt").read_text()
    for name in ("encoder.safetensors", "gallery.safetensors"):
        assert (offline.folder / "model" / name).read_bytes() == (straight.folder / "model" / name).read_bytes()
    a, b = (checkpoint.latest(run.folder) for run in (offline, straight))
    assert (a / "peaks.safetensors").read_bytes() == (b / "peaks.safetensors").read_bytes()
    lines = [json.loads(line) for line in (offline.folder / "journal.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/total" in line["metrics"]] == [1, 2, 3]


def test_only_the_newest_checkpoints_are_kept(config):
    train(dataclasses.replace(config, epochs=4, tracking=TrackingConfig(offline=True)), QUIET)
    assert sorted(path.name for path in (config.folder / "checkpoints").iterdir()) == [
        "step-000000018",
        "step-000000024",
    ]


def test_peaks_are_by_products_of_the_step(config):
    trainer = new_trainer(config)
    batch = next(iter(trainer.loader.epoch(0)))
    assert trainer.peaks.places.isnan().all()
    trainer.train_step(batch, 0, 0)
    known = ~trainer.peaks.places.isnan().flatten(1).any(dim=1)
    assert (
        set(known.nonzero().flatten().tolist()) <= set(batch.indices.tolist()) and known.sum() > len(batch.labels) / 2
    )
    assert ((trainer.peaks.places[known] >= 0) & (trainer.peaks.places[known] <= 1)).all()


def test_the_step_makes_one_forward_pass_of_all_views(config):
    for mixing, expected in (
        (MixingConfig(), [3 * 115]),
        (MixingConfig(kind="none"), [2 * 115]),
        (MixingConfig(place="random"), [3 * 115]),
        (MixingConfig(peaks_from="same_step"), [2 * 115, 3 * 115]),
    ):
        trainer = new_trainer(dataclasses.replace(config, mixing=mixing))
        sizes: list[int] = []
        trainer.engine.module.stem.register_forward_pre_hook(
            lambda module, args, sizes=sizes: sizes.append(len(args[0]))
        )
        trainer.train_step(next(iter(trainer.loader.epoch(0))), 0, 0)
        assert sizes == expected, mixing


def test_same_step_peaks_leave_gradients_and_statistics_alone(config):
    trainer = new_trainer(dataclasses.replace(config, mixing=MixingConfig(peaks_from="same_step")))
    batch = next(iter(trainer.loader.epoch(0)))
    views = trainer.render(batch, trainer.parameters(batch, 0, 0), trainer.parameters(batch, 0, 1))
    before = weights(trainer)
    centers = trainer.same_step_peaks(batch, views, 0, 0)
    assert centers.shape == (115, 1, 2) and not centers.isnan().all()
    assert all(parameter.grad is None for parameter in trainer.engine.module.parameters())
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


@pytest.mark.parametrize(
    "mixing",
    [
        MixingConfig(kind="none"),
        MixingConfig(kind="mixup"),
        MixingConfig(kind="cutmix"),
        MixingConfig(gamma_per="sample", num_patches=2),
        MixingConfig(layers=("conv3_2", "conv4_2", "conv5_2"), attribution="gradcam", gradient_sign=-1),
        MixingConfig(peaks_from="same_step"),
        MixingConfig(place="least"),
    ],
    ids=lambda mixing: f"{mixing.kind}-{mixing.gamma_per}-{len(mixing.layers)}-{mixing.peaks_from}",
)
def test_every_way_of_mixing_trains(config, mixing):
    trainer = new_trainer(dataclasses.replace(config, epochs=3, mixing=mixing))
    before, losses = weights(trainer), []
    for epoch in range(3):
        for step, batch in enumerate(trainer.loader.epoch(epoch)):
            losses.append(trainer.train_step(batch, epoch, step))
    history = torch.stack(losses)
    assert history.isfinite().all()
    assert history[-6:, 0].mean() < history[:6, 0].mean(), "the loss does not fall"
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert (history[:, 3] != 0).all() == (mixing.kind != "none")


@pytest.fixture(scope="module")
def partitions(digits) -> Partitions:
    """Decoded once for the tests that train one method after the other."""
    return Partitions(digits, torch.device("cpu"))


@pytest.mark.parametrize("method", ["cross_entropy", "arpl", "moco"])
def test_every_method_trains_and_its_model_is_measured(config, method, partitions):
    of_method = recipe("digits", method)
    own = {name: getattr(of_method, name) for name in ("method", "objective", "mixing", "optimizer")}
    if method == "moco":
        own["objective"] = MoCoConfig(queue_size=230)
    config = dataclasses.replace(config, **own, epochs=4, tracking=TrackingConfig(offline=True))
    train(config, QUIET, partitions)
    journal = [json.loads(line)["metrics"] for line in (config.folder / "journal.jsonl").read_text().splitlines()]
    losses = [line["train/total"] for line in journal if "train/total" in line]
    # MoCo's first queue is of random directions, which are easy to tell from anything.
    assert len(losses) == 4 and losses[-1] < (max(losses) if method == "moco" else losses[0])
    model = OpenSetModel.load(config.folder / "model")
    assert model.card.method == method and evaluate_open_set(model, partitions, [10])["auroc"][10] > 0.6
    test = partitions["test_known"]
    logits = model.logits(test.images)
    assert (logits is None) == (config.objective.classifier is None)
    if logits is not None:
        assert logits.shape == (len(test.labels), 6)
        assert (logits.argmax(dim=1) == test.labels).float().mean() > 0.5


@pytest.mark.parametrize(
    ("kind", "peaks_from"), [("none", "previous_epoch"), ("cutmix", "previous_epoch"), ("gradmix", "same_step")]
)
def test_moco_sees_queries_and_keys_apart(config, kind, peaks_from, partitions):
    mixing = MixingConfig(kind=kind, peaks_from=peaks_from)
    join_ranks()
    trainer = Trainer(
        dataclasses.replace(config, method="moco", objective=MoCoConfig(queue_size=300), mixing=mixing), partitions
    )
    memory, batch = trainer.method.memory, next(iter(trainer.loader.epoch(0)))
    assert all(torch.equal(a, b) for a, b in zip(memory.encoder.parameters(), trainer.engine.module.parameters()))
    sizes: dict[str, list[int]] = {"queries": [], "keys": []}
    for name, encoder in (("queries", trainer.engine.module), ("keys", memory.encoder)):
        encoder.stem.register_forward_pre_hook(lambda module, args, name=name: sizes[name].append(len(args[0])))
    total, moco, gradmix = trainer.train_step(batch, 0, 0).tolist()
    extra = peaks_from == "same_step"
    assert sizes == {"queries": [115] * extra + [115 if kind == "none" else 230], "keys": [115] * (1 + extra)}
    assert total == pytest.approx(moco + gradmix, rel=1e-5) and (gradmix > 0) == (kind != "none")
    assert memory.position.item() == 115 and not memory.queue.requires_grad
    # What is trained has moved at once, and what follows it by a thousandth of that.
    moved = [(a - b).abs().max() for a, b in zip(memory.encoder.parameters(), trainer.engine.module.parameters())]
    assert max(moved) > 1e-4


def test_phases_switch_the_objective(config):
    trainer = new_trainer(dataclasses.replace(config, phases=("1:0:1", "1:1:0")))
    batch = next(iter(trainer.loader.epoch(0)))
    total, supcon, simclr, gradmix = trainer.train_step(batch, 0, 0).tolist()
    assert supcon == 0 and total == pytest.approx(simclr + gradmix, rel=1e-5)
    total, supcon, simclr, gradmix = trainer.train_step(batch, 1, 0).tolist()
    assert simclr == gradmix == 0 and total == pytest.approx(supcon, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_way_back(config, monkeypatch):
    step = Trainer.train_step

    def spoiled(self, batch, epoch, number):
        parts = step(self, batch, epoch, number)
        return parts * torch.nan if (epoch, number) == (1, 2) else parts

    monkeypatch.setattr(Trainer, "train_step", spoiled)
    with pytest.raises(InputError, match=r"not finite in epoch 2, step 3 \(total nan.*step-000000006"):
        train(dataclasses.replace(config, tracking=TrackingConfig(offline=True)), QUIET)
    assert json.loads((config.folder / "mlflow.json").read_text())["status"] == "FAILED"


def test_weights_of_another_network_are_refused(config, tmp_path):
    train(dataclasses.replace(config, epochs=1, tracking=TrackingConfig(offline=True)), QUIET)
    start = config.folder / "model" / "encoder.safetensors"
    other = dataclasses.replace(config, run_dir=tmp_path / "other", init_from=start)
    trainer = new_trainer(other)
    saved = OpenSetModel.load(config.folder / "model").encoder.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in weights(trainer).items())
    with pytest.raises(InputError, match=r"holds another encoder.*set --encoder"):
        new_trainer(dataclasses.replace(other, encoder=EncoderConfig(width=8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1000}, "690 training images do not fill one batch of 1000"),
        ({"data": Path("/nowhere")}, "run python -m data_pipeline.build --protocol digits"),
        ({"split": 3}, "holds protocol digits, split 0, not digits, split 3"),
        ({"deepspeed_config": Path("/no/ds.json")}, "there is no DeepSpeed configuration /no/ds.json"),
        ({"init_from": Path("/no/encoder.safetensors")}, "not readable as encoder weights"),
        (
            {"tracking": TrackingConfig(uri="http://127.0.0.1:9")},
            "the MLflow server http://127.0.0.1:9 does not answer",
        ),
        ({"run_dir": Path("/proc/run")}, "run folder /proc/run cannot be made"),
        ({"k": 500}, "k is 500, but a class has only"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_any_training(config, change, message, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", None)
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(config, **change), QUIET)


def test_two_runs_do_not_share_a_folder(config):
    from data_pipeline.run_folder import RunFolder

    holder = RunFolder(config.folder)
    with pytest.raises(InputError, match="another process is writing"):
        train(config, QUIET)
    holder.close()


def test_the_users_deepspeed_file_is_used_and_may_not_contradict(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "optimizer": "auto"}))
    read = read_deepspeed_config(path, torch.device("cpu"))
    assert read == {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}
    assert read_deepspeed_config(None, torch.device("cpu"))["gradient_clipping"] == 0.0
    path.write_text(json.dumps({"train_batch_size": 64}))
    with pytest.raises(InputError, match="sets train_batch_size"):
        read_deepspeed_config(path, torch.device("cpu"))
    for text, message in (
        ("{nonsense", "not a readable DeepSpeed configuration"),
        ("[1]", "must hold a JSON object"),
        ('{"bf16": true}', "sets bf16 to True; give a JSON object"),
        ('{"torch_autocast": {"enabled": true, "dtype": "float99"}}', "set it to bfloat16 or float16"),
        ('{"zero_optimization": {"stage": 3}}', "sets ZeRO stage 3; set it to 0, 1 or 2"),
        ('{"gradient_accumulation_steps": 0}', "set it to 1 or more"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_deepspeed_config(path, torch.device("cpu"))
    assert micro_batch_size(256, 4, 2) == 32
    with pytest.raises(InputError, match="set --batch-size to a multiple of 3"):
        micro_batch_size(256, 3, 1)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_stages_and_clipping_from_a_file_train(config, tmp_path, stage):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}))
    trainer = new_trainer(dataclasses.replace(config, deepspeed_config=path))
    losses = [trainer.train_step(b, 0, s) for s, b in enumerate(trainer.loader.epoch(0))]
    assert torch.stack(losses).isfinite().all()
    assert trainer.engine.zero_optimization_stage() == stage and trainer.engine.gradient_clipping() == 1.0
    assert not trainer.peaks.places.isnan().all()


def test_in_the_first_epoch_patches_go_anywhere_in_the_view(config):
    """Not to its edge, where a place of the source that the view does not show would come to lie."""
    trainer = new_trainer(config)
    seen = []
    render = trainer.render

    def note(*args, **patches):
        seen.append(patches["centers"])
        return render(*args, **patches)

    trainer.render = note
    for step, batch in enumerate(trainer.loader.epoch(0)):
        trainer.mixed_views(batch, *(trainer.parameters(batch, 0, view) for view in (0, 1)), 0, step)
    centers = torch.cat(seen).flatten()
    assert ((centers > 0) & (centers < 1)).all() and abs(centers.mean() - 0.5) < 0.03
    assert ((centers * 4).long().bincount() / len(centers) - 0.25).abs().max() < 0.05


def test_alone_no_gradient_is_copied_to_be_added_up(config, monkeypatch):
    trainer = new_trainer(config)
    before = weights(trainer)
    monkeypatch.setattr(trainer.engine, "allreduce_bucket", None)
    trainer.train_step(next(trainer.loader.epoch(0)), 0, 0)
    assert all(not torch.equal(before[name], weight) for name, weight in trainer.engine.module.named_parameters())


def test_the_learning_rate_warms_up_and_falls_to_its_share(config):
    optimizer = dataclasses.replace(config.optimizer, warmup_epochs=1.0, learning_rate=0.01, final_share=0.25)
    trainer = new_trainer(dataclasses.replace(config, epochs=4, optimizer=optimizer))
    rates = []
    for epoch in range(4):
        for step, batch in enumerate(trainer.loader.epoch(epoch)):
            rates.append(trainer.engine.get_lr()[0])
            trainer.train_step(batch, epoch, step)
    assert rates[:6] == pytest.approx([0.01 * (i + 1) / 6 for i in range(6)])
    assert rates[6] == pytest.approx(0.01) and rates == [*rates[:6], *sorted(rates[6:], reverse=True)]
    assert trainer.engine.get_lr()[0] == pytest.approx(0.0025)
