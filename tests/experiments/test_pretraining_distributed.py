"""Two processes train what one does, each on its own rows of every batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from jlar_experiments.pretraining import study

OPTIONS = [
    "--width=16", "--layers=1", "--heads=2", "--hidden=16", "--length=8", "--batch=8", "--steps=6",
    "--unique-tokens=800", "--validation-tokens=64", "--validate-every=2", "--inspect-every=3",
    "--checkpoint-every=3", "--warm-up=2", "--unroll=1",
]  # fmt: skip


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def train(folder, text, processes):
    """All processes of one run."""
    command = [sys.executable, "-m", "jlar_experiments.cli", "pretrain", *OPTIONS]
    command += [f"--corpus={text}", f"--data={folder / 'data'}", f"--out={folder / 'run'}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(study.__file__).parents[2])
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 // processes}"
    port, started = free_port(), []
    for i in range(processes):
        others = [f"--distributed=localhost:{port},{processes},{i}"] if processes > 1 else []
        started.append(
            subprocess.Popen(
                [*command, *others],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [each.communicate(timeout=240)[0] for each in started]
    assert [each.returncode for each in started] == [0] * processes, said


def losses(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(6))
    return np.array([[row["train_loss"], row["lar"], row.get("val_loss", 0.0)] for row in rows])


def test_two_processes(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    random = np.random.default_rng(0)
    for i in range(30):
        (text / f"{i}.txt").write_text("".join(random.choice(list("abcdefgh"), 200)))
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, text, 1)
    train(two, text, 2)
    # The same sequences in each batch, in another order of rows: sums round differently.
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-4)
    assert (two / "run" / "report.html").exists()
    assert {each.name for each in (two / "run" / "checkpoints").iterdir()} == {"3", "6"}
