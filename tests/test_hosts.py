"""Two processes with four devices each stand for two hosts: the same numbers, and no hanging."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HOST = Path(__file__).with_name("hosts.py")
PATIENCE = 300  # seconds, on a loaded machine; what is waited for takes some ten


def start(processes: int, number: int, port: int, steps: int) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HOST.parents[1]), *sys.path])
    command = [sys.executable, str(HOST), *map(str, (processes, number, port, steps))]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("localhost", 0))
        return any_port.getsockname()[1]


def ended(host: subprocess.Popen) -> tuple[str, str]:
    try:
        return host.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        host.kill()
        pytest.fail(f"hangs: {host.communicate()}")


def numbers(text: str) -> np.ndarray:
    lines = [line.split() for line in text.splitlines() if line.startswith("step ")]
    return np.array([[float(word) for word in words] for _, *words in lines])


def test_two_hosts_compute_what_one_does():
    port = free_port()
    alone, first, second = start(1, 0, 0, 3), start(2, 0, port, 3), start(2, 1, port, 3)
    outputs = [ended(host) for host in (alone, first, second)]
    for host, (_, errors) in zip((alone, first, second), outputs, strict=True):
        assert host.returncode == 0, errors
    one, *both = [numbers(errors) for _, errors in outputs]
    assert one.shape == (3, 5) and np.all(np.isfinite(one))
    assert np.ptp(one[:, 2]) > 1e-4  # it trains: LAR moves
    for each in both:
        np.testing.assert_allclose(each, one, rtol=1e-6)


@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_a_host_ends_the_other_with_an_error(killed):
    """At once where its connection breaks, else after jax.distributed's heartbeat timeout."""
    port = free_port()
    hosts = [start(2, number, port, 10**6) for number in (0, 1)]
    try:
        for host in hosts:
            assert host.stderr is not None
            assert any(line.startswith("step ") for line in host.stderr)  # in the midst of training
        hosts[killed].kill()
        survivor = hosts[1 - killed]
        _, errors = ended(survivor)
        assert survivor.returncode != 0
        # Gloo, the coordination service or its heartbeat: whichever notices first.
        said = ("another task died", "Connection", "heartbeat", "Gloo", "unhealthy")
        assert any(word in errors for word in said), errors
    finally:
        for host in hosts:
            with host:  # closes its pipes, and waits
                host.kill()
