"""Ports for the servers that tests start, and waiting for those that answer over HTTP."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request


def free_ports(count: int) -> list[int]:
    """`count` different ports of loopback that nothing listens on."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_until_up(uri: str, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait for the MLflow server that `process` runs at `uri`."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2).close()
            return
        except OSError:
            assert process.poll() is None, f"the server at {uri} ended with status {process.returncode}"
            assert time.monotonic() < end, f"the server at {uri} did not start"
            time.sleep(0.5)
