"""Two processes train what one does, each on its own rows of every batch, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jlar_experiments.pretraining import corpus, study

OPTIONS = [
    "--width=16", "--layers=1", "--heads=2", "--hidden=16", "--length=8", "--batch=8", "--steps=6",
    "--unique-tokens=800", "--validation-tokens=64", "--validate-every=2", "--inspect-every=3",
    "--checkpoint-every=3", "--warm-up=2", "--unroll=1",
]  # fmt: skip
# What a shell runs in the background ignores SIGINT, and so does what that starts.
PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from jlar_experiments import cli; sys.exit(cli.main())"
)
PATIENCE = 240  # seconds, on a loaded machine


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a corpus of thirty small documents, and what one run compiles for the next."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "text").mkdir()
    random = np.random.default_rng(0)
    for i in range(30):
        (folder / "text" / f"{i}.txt").write_text("".join(random.choice(list("abcdefgh"), 200)))
    return folder


def started(root, out, processes, *options, own=((), ())):
    """All processes of one run, each with options of its own."""
    command = [sys.executable, "-c", PROGRAM, "pretrain", *OPTIONS, *options]
    command += [f"--corpus={root / 'text'}", f"--data={root / 'data'}", f"--out={out}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
    environment["PYTHONPATH"] = str(Path(study.__file__).parents[2])
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 // processes}"
    port = free_port()
    others = [
        [f"--distributed=localhost:{port},{processes},{i}", *own[i]] for i in range(processes)
    ]
    return [
        subprocess.Popen(
            [*command, *(each if processes > 1 else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in others
    ]


def ended(hosts):
    """Their exit codes and what they said."""
    try:
        said = [each.communicate(timeout=PATIENCE)[0] for each in hosts]
    finally:
        for each in hosts:
            each.kill()
    return [each.returncode for each in hosts], said


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(6))
    return np.array([[row["train_loss"], row["lar"], row.get("val_loss", 0.0)] for row in rows])


def test_two_processes(root):
    for processes in (1, 2):
        codes, said = ended(started(root, root / str(processes), processes))
        assert codes == [0] * processes, said
    # The same sequences in each batch, in another order of rows: sums round differently.
    np.testing.assert_allclose(losses(root / "1"), losses(root / "2"), rtol=1e-4)
    assert (root / "2" / "report.html").exists()
    assert {each.name for each in (root / "2" / "checkpoints").iterdir()} == {"3", "6"}


def test_what_one_host_refuses_ends_both_with_the_same_line(root, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    codes, said = ended(started(root, tmp_path, 2))
    last = [each.splitlines()[-1] for each in said]
    assert codes == [2, 2] and last[0] == last[1], said
    assert last[0].startswith("jlar pretrain: error: ") and "is not a run's folder" in last[0]
    assert "Traceback" not in "".join(said)


def test_token_files_that_one_host_refuses_end_both_with_the_same_line(root, tmp_path):
    """They are read for the settings, which is before anything else."""
    corpus.prepare(str(root / "text"), "bytes", 256, tmp_path / "0", print)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    (tmp_path / "1" / "train.bin").write_bytes(b"short")
    own = [[f"--corpus={tmp_path / name}"] for name in ("0", "1")]
    codes, said = ended(started(root, tmp_path / "run", 2, own=own))
    last = [each.splitlines()[-1] for each in said]
    assert codes == [2, 2] and last[0] == last[1] and "train.bin has 5 bytes" in last[0], said


def training(root, out):
    """Two hosts that train without end, once they do."""
    hosts, rows = started(root, out, 2, "--steps=1000000"), out / "metrics.jsonl"
    until = time.monotonic() + PATIENCE
    while not rows.exists():
        if time.monotonic() > until or any(each.poll() is not None for each in hosts):
            pytest.fail(f"never trained: {ended(hosts)}")
        time.sleep(0.05)
    return hosts


@pytest.mark.parametrize("host", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_loss_of_a_host_ends_the_other(host, how, root, tmp_path):
    """A killed host closes its connections, a stopped one is just silent, like a lost network.

    Of silence JAX's own default is to wait for 100 s.
    """
    hosts = training(root, tmp_path / "run")
    try:
        hosts[host].send_signal(how)
        assert hosts[1 - host].wait(timeout=60) != 0
    finally:
        hosts[host].kill()
        ended(hosts)


@pytest.mark.parametrize("host", [0, 1])
def test_an_interrupt_of_one_host_saves_on_both(host, root, tmp_path):
    hosts = training(root, tmp_path / "run")
    hosts[host].send_signal(signal.SIGINT)
    codes, said = ended(hosts)
    assert codes[host] == 130 and codes[1 - host] == 143, said
    last = [each.splitlines()[-1] for each in said]
    steps = {line.partition("saved at step ")[2] for line in last}
    assert len(steps) == 1 and "Traceback" not in "".join(said), said
    [step] = {line.split(";")[0] for line in steps}
    assert (tmp_path / "run" / "checkpoints" / step).exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n") == int(step)


def test_a_host_that_fails_alone_leaves_at_once(root, tmp_path):
    """Without waiting for the other, which does not know of it and is ended by its absence."""
    hosts = training(root, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()  # so that the first host can write no more
    codes, said = ended(hosts)
    assert codes[0] == 1 and codes[1] != 0, said
    assert said[0].splitlines()[-1].startswith("jlar pretrain: error: "), said
