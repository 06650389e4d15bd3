"""The nodes of Ray: joining them, and refusing at once what they cannot do, which Ray would wait for in silence."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError


@contextmanager
def connected(address: str | None, *, dashboard: bool = False) -> Iterator[str]:
    """Ray at `address`, or of the cluster this machine heads, or started here for the block; yields which, in words.

    Args:
        dashboard: whether one that is started here gets the dashboard's agents, on loopback.
    """
    import ray

    # Ray writes an authentication token below the home folder otherwise; its ports listen on loopback here.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None and Path.home().joinpath("ray_bootstrap_config.yaml").is_file():
        address = "auto"  # submitted to the head of a cluster
    where = f"the Ray cluster at {address}" if address else "Ray on this machine"
    try:
        # "local": without an address Ray would join whatever another user or job has started on this machine.
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, configure_logging=False,
            **({} if address else {"include_dashboard": dashboard}),
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"{where} cannot be used ({str(error).strip().splitlines()[0]}): check --address") from error
    try:
        yield where
    finally:
        ray.shutdown()


def nodes_with_cores() -> list[dict[str, Any]]:
    """The nodes, as `ray.nodes()` describes them, that trials can run on."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def preflight(ranks: int, cpus: float, gpus: float, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials of `ranks` processes, each with `cpus` and `gpus`, the `nodes` hold at once.

    Args:
        nodes: the resources of each. A process runs on one of them, a trial's processes on any.

    Raises:
        InputError: not one trial, ever.
    """
    asked = {"CPU": cpus, "GPU": gpus}
    held = [
        min(int(node.get(kind, 0.0) / amount + 1e-6) for kind, amount in asked.items() if amount > 0) for node in nodes
    ]
    if sum(held) >= ranks:
        return sum(held) // ranks
    remedy = "or wait until all nodes have joined (`ray status` on the head)"
    if sum(held):
        room = f"Ray has room for {sum(held)}"
        raise InputError(f"a trial has {ranks} processes, {room}: set --ranks to no more, {remedy}")
    for kind, amount in asked.items():
        most = max((node.get(kind, 0.0) for node in nodes), default=0.0)
        if amount > most:
            raise InputError(
                f"a process of a trial asks for {amount:g} {kind}s, no node of Ray has more than {most:g}: "
                f"set --{kind.lower()}s to no more, {remedy}"
            )
    raise InputError(f"no node of Ray has both {cpus:g} CPUs and {gpus:g} GPUs: set --cpus or --gpus lower")


def check_shared(uri: str | None, paths: Sequence[Path], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that trials on other machines than this find the `paths`, and can reach the tracking store.

    `uri` is None where nothing is tracked. Raises `InputError` that names the machine and what it does not have.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node["NodeID"] != here]
    if others and uri is not None and uri.startswith("sqlite:"):
        raise InputError(
            f"other nodes cannot write to the SQLite file {uri.removeprefix('sqlite:///')}: start a server "
            "(cluster/mlflow) and name it by --base.tracking.uri"
        )
    absent = ray.remote(num_cpus=0)(lambda: [path for path in paths if not path.is_dir()])
    answers = [
        absent.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in others
    ]
    for node, missing in zip(others, ray.get(answers)):
        if missing:
            raise InputError(
                f"{node['NodeManagerAddress']} has no {missing[0]}: --data and --folder have to be shared by all nodes"
            )
