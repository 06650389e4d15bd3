"""The page of results is what its files give; plans and choices do what they say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.files import read_json
from results import campaign, tables
from results.choose import choose
from results.run import RunConfig, Runner
from tests.bench import gradmix as bench
from trainer.registry import load_model
from trainer.train import parse_config

SMALL = "--protocol digits --epochs 1 --encoder.width 4 --encoder.hidden-dim 16 --encoder.embedding-dim 8"


@pytest.mark.parametrize(("page", "number"), zip(tables.PAGES, ("| 98.56 |", "| 35.7 |")))
def test_a_page_is_what_the_files_give(page, number):
    page = page.read_text(encoding="utf-8")
    assert tables.rebuilt(page) == page
    assert number in page and tables.rebuilt(page.replace(number, "| 3.57 |")) == page
    with pytest.raises(InputError, match="asks for a table 'unheard of'"):
        tables.rebuilt(page + "<!-- unheard of -->\n\n<!-- end -->")


def test_the_kernels_table_is_made_of_what_their_bench_writes(tmp_path, monkeypatch):
    """On a machine without a GPU, of what it would measure."""
    rows = [
        bench.Row("moved", lambda: bench.Figures(2e-6, 6000), False),
        bench.Row("called", lambda: bench.Figures(3e-6, reference=6e-6), False),
    ]
    monkeypatch.setattr(bench, "GROUPS", [lambda: rows])
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 4e9)
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(tmp_path / "kernels.json")])
    bench.main()
    written = read_json(tmp_path / "kernels.json", "figures")
    (tmp_path / "kernels.json").write_text(json.dumps({"copy_gb_per_s": 4.0, **written}))
    *_, only = tables.kernels_table(tmp_path / "kernels.json").splitlines()
    assert only == "| moved | 2 | 3 | 75% |"


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """Two arms on one split, as the page wants them."""
    folder = tmp_path_factory.mktemp("results")
    config = RunConfig(plan=folder / "plan.json", data=digits.folder, out=folder / "out", work=folder / "runs")
    run = Runner(config)
    run.console = Console(quiet=True)
    for arm in tables.ARMS:
        run(f"{arm}-split0", f"{SMALL} --method {arm}")
    return run


def test_a_run_keeps_its_figures_on_both_kinds_of_features(finished, digits):
    kept = read_json(finished.config.out / "gradmix-split0.json", "result")
    assert kept["epochs"] == 1 and len(kept["curve"]) == 1 and kept["split_hash"] == digits.manifest.split_hash
    assert kept["config"]["encoder"]["width"] == 4 and kept["wall_seconds"] > kept["train_seconds"] > 0
    model = load_model(str(finished.config.work / "gradmix-split0" / "model"))
    assert model.card.features == "embedding" and kept["auroc"] != kept["on_backbone"]["auroc"]


def test_what_is_there_is_not_run_again_and_nothing_starts_without_time_for_it(finished, digits):
    path = finished.config.out / "gradmix-split0.json"
    before = path.stat().st_mtime_ns
    assert finished("gradmix-split0", "--nonsense")["epochs"] == 1 and path.stat().st_mtime_ns == before
    short = Runner(RunConfig(plan=path, data=digits.folder, out=finished.config.out, work=path.parent, seconds=0.0))
    assert short("another", SMALL) is None and not (finished.config.out / "another.json").exists()


def test_tables_hold_the_figures_of_the_runs(finished):
    runs = [read_json(finished.config.out / f"{arm}-split0.json", "result") for arm in tables.ARMS]
    by_k, by_split = tables.splits_table(finished.config.out), tables.each_split_table(finished.config.out)
    for run in runs:
        for found in (run, run["on_backbone"]):
            assert all(f"{100 * value:.2f}" in by_k for value in found["auroc"].values())
        assert f"{100 * run['on_backbone']['auroc']['10']:.2f}" in by_split
    tables.figures(finished.config.out)
    assert (finished.config.out / "auroc_over_k.svg").stat().st_size > 1000


def test_table_2_has_each_split_and_the_means_over_those_that_were_run(tmp_path):
    for split, auroc in ((0, 0.9), (1, 0.8), (2, 0.7)):
        numbers = {"osr/auroc": auroc, "osr/oscr": 0.5, "osr/closed_set_accuracy": auroc / 2}
        (tmp_path / f"supcon+simclr-mnist-{split}-seed0.json").write_text(json.dumps({"numbers": numbers}))
        if split:
            (tmp_path / f"supcon-mnist-{split}-seed0.json").write_text(json.dumps({"numbers": numbers}))
    header, _, supcon, both = tables.open_set_table(tmp_path, "mnist").splitlines()
    assert header == "|  | AUROC, split 0 | 1 | 2 | AUROC, mean | OSCR, mean | accuracy, mean |"
    assert supcon == "| SupCon | – | 80.00 | 70.00 | 75.00 ± 7.07 | 50.00 ± 0.00 | 37.50 ± 3.54 |"
    assert both == "| SupCon + SimCLR | 90.00 | 80.00 | 70.00 | 80.00 ± 10.00 | 50.00 ± 0.00 | 40.00 ± 5.00 |"


def test_a_split_that_one_arm_lacks_is_left_out(tmp_path):
    for name in ("gradmix-split0", "gradmix-split1", "supcon+simclr-split1"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name}))
    assert {arm: [run["name"] for run in runs] for arm, runs in tables.arms(tmp_path).items()} == {
        "gradmix": ["gradmix-split1"],
        "supcon+simclr": ["supcon+simclr-split1"],
    }


def test_a_change_is_kept_only_if_it_is_better_and_the_next_builds_on_it(tmp_path):
    values = {"base": 0.7, "a": 0.8, "b": 0.75, "c": 0.9, "d": None}
    tried = {}

    def run(name: str, arguments: str):
        tried[name] = arguments
        value = values[name]
        # The better of the two kinds of features counts.
        return None if value is None else {"auroc": {"10": 0.1}, "on_backbone": {"auroc": {"10": value}}}

    run.config, run.console = SimpleNamespace(out=tmp_path), Console(quiet=True)
    given = {"base": "-p", "variants": [{"name": name, "args": f"-{name}"} for name in "abcd"]}
    assert choose(given, run) == "-a -c"
    assert tried == {"base": "-p", "a": "-p -a", "b": "-p -a -b", "c": "-p -a -c", "d": "-p -a -c -d"}
    choice = read_json(tmp_path / "choice.json", "choice")
    assert [(step["name"], step["kept"]) for step in choice["steps"]] == [
        ("base", True), ("a", True), ("b", False), ("c", True),
    ]  # fmt: skip
    assert torch.tensor([step["auroc"] for step in choice["steps"]]).max() == pytest.approx(0.9)


def test_a_campaign_fits_its_trainings_into_the_time(tmp_path, monkeypatch):
    finished = {"train_seconds": 20.0, "wall_seconds": 24.0, "epochs": 10, "train_images": 1000}
    # 2 ms an image, 1,500 images, two arms of three and two views: 5.1 s an epoch and split, and 12 s beside them.
    assert campaign.epochs_that_fit(2 * (12 + 7 * 5.1) + 0.1, 2, [finished, {**finished, "train_seconds": 30.0}]) == 7
    assert campaign.epochs_that_fit(1.0, 5, [finished]) == 1

    calls = []

    class Recorder:
        def __init__(self, config) -> None:
            self.config, self.console = config, Console(quiet=True)
            config.out.mkdir(parents=True, exist_ok=True)

        def __call__(self, name: str, arguments: str):
            calls.append((name, arguments.split()))
            value = {"base": 0.7, "better": 0.8, "worse": 0.6}.get(name, 0.5)
            kept = {**finished, "auroc": {"10": value}, "on_backbone": {"auroc": {"10": 0.0}}}
            (self.config.out / f"{name}.json").write_text(json.dumps(kept))
            return kept

    monkeypatch.setattr(campaign, "Runner", Recorder)
    plan = tmp_path / "variants.json"
    variants = [{"name": "better", "args": "--k 7"}, {"name": "worse", "args": "--k 9"}]
    plan.write_text(json.dumps({"base": "--protocol digits-pseudo0 --epochs 2", "variants": variants}))
    campaign.campaign(
        campaign.CampaignConfig(plan=plan, out=tmp_path / "out", protocol="digits", splits=(0, 3), seconds=60.0)
    )
    trained = dict(calls)
    assert list(trained) == [
        "base", "better", "worse", *(f"{arm}-split{split}" for split in (0, 3) for arm in tables.ARMS),
    ]  # fmt: skip
    config = parse_config([*trained["supcon+simclr-split3"], "--data", "x"])
    assert (config.protocol, config.split, config.method, config.k) == ("digits", 3, "supcon+simclr", 7)
    assert config.epochs == 3
