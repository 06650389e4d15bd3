"""`python -m results.choose VARIANTS.json --data DATA --out FOLDER`: a recipe, one change after the other.

The file holds `{"base": "…", "variants": [{"name": …, "args": "…"}, …]}`, the args those of `trainer.train`. Each
variant is added to what was kept so far, trained, and kept if the AUROC at k = 10 is higher than before, on the
embedding or on the backbone, whichever is better. The protocol should be a pseudo-open one: what is chosen then never
saw the real unknowns. `choice.json` in the folder holds every step and the arguments that were kept.
"""

from __future__ import annotations

from typing import Any

from data_pipeline import cli
from data_pipeline.files import read_json, write_json
from results.run import RunConfig, Runner


def auroc(kept: dict[str, Any]) -> float:
    return max(kept["auroc"]["10"], kept["on_backbone"]["auroc"]["10"])


def choose(given: dict[str, Any], run: Runner) -> str:
    """The arguments that were kept, those of the base left out."""
    base = arguments = given["base"]
    best, steps = -1.0, []
    for variant in [{"name": "base", "args": ""}, *given["variants"]]:
        tried = f"{arguments} {variant['args']}".strip()
        kept = run(variant["name"], tried)
        if kept is None:
            continue
        better = auroc(kept) > best
        steps.append({**variant, "auroc": auroc(kept), "kept": better})
        if better:
            arguments, best = tried, auroc(kept)
        chosen = arguments.removeprefix(base).strip()
        write_json(run.config.out / "choice.json", {"base": base, "steps": steps, "chosen": chosen})
        outcome = "kept" if better else "dropped"
        run.console.print(f"    {outcome}; best so far {100 * best:.2f}: {chosen or 'the base'}")
    return arguments.removeprefix(base).strip()


def main() -> None:
    config = cli.parse(RunConfig, prog="python -m results.choose", description=__doc__.split("\n")[0])
    choose(read_json(config.plan, "list of variants"), Runner(config))


if __name__ == "__main__":
    cli.run(main)
