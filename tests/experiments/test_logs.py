"""The reading of logs: every form, which column is which, restarts, and what is refused."""

import contextlib
import gzip
import io
import json
import math
import sqlite3
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jlar_experiments import logs
from jlar_experiments.errors import Refusal
from jlar_experiments.pretraining import inputs

STEPS = list(range(10, 210, 10))
LARS = [round(0.7 - 0.001 * i, 4) for i in range(20)]
LOSSES = [round(5 - 0.1 * i, 4) for i in range(20)]
ROWS = [dict(step=s, lar=x, train_loss=y) for s, x, y in zip(STEPS, LARS, LOSSES, strict=True)]


def csv(rows=ROWS, names=None, delimiter=",", end="\n"):
    names = names or list(rows[0])
    lines = [names, *([row.get(name, "") for name in rows[0]] for row in rows)]
    return "".join(delimiter.join(map(str, line)) + end for line in lines)


def jsonl(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written(folder, content, name="log"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def read(tmp_path):
    return lambda content, name="log", **options: logs.read(
        written(tmp_path, content, name), **options
    )


def refused(call, *words):
    with pytest.raises(logs.Unusable) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and said.isprintable()
    for word in words:
        assert word in said, said


def frame(rows=ROWS):
    polars = pytest.importorskip("polars")
    file = io.BytesIO()
    polars.DataFrame(rows).write_parquet(file)
    return file.getvalue()


NOTE = "a, b\nhe said ¦ then"  # ¦ becomes U+2028
NOTED = [row | {"note": NOTE.replace("¦", "\u2028")} for row in ROWS]
QUOTED = [f'{s},"{NOTED[0]["note"]}",{x},{y}' for s, x, y in zip(STEPS, LARS, LOSSES, strict=True)]
NESTED = [{"time": {"step": row["step"]}, "m": {"train": row}} for row in ROWS]
MEGATRON = "".join(
    f"2024-01-01 00:00:01 [rank0] iteration {r['step']:8}/  10,000 | elapsed (ms): 2.0 | "
    f"lm loss: {r['train_loss']:.4E} | lar: {r['lar']} | loss scale: 1.0 |\n"
    for r in ROWS
)
PLAIN = "".join(
    f"\x1b[32mINFO\x1b[0m iter {r['step']}: loss {r['train_loss']}, time 2.1ms, lar {r['lar']}\n"
    for r in ROWS
)
EQUALS = "".join(
    f"12:00:01 step={r['step']} val_loss=9 train_loss={r['train_loss']} lar={r['lar']}\n"
    for r in ROWS
)
PRINTED = "start\n" + "".join(
    str({"loss": r["train_loss"], "lar": r["lar"], "step": r["step"]}) + "\n" for r in ROWS
)
TQDM = "\r".join(
    f"train: 5%|█  | {r['step']}/9000 [00:01<1:00, 9.0it/s, loss={r['train_loss']}, lar={r['lar']}]"
    for r in ROWS
)
FORMS = {
    "csv": csv(),
    "semicolons": csv(delimiter=";"),
    "tabs": csv(delimiter="\t"),
    "spaces": csv(delimiter="  "),
    "crlf": csv(end="\r\n"),
    "bom": b"\xef\xbb\xbf" + csv().encode(),
    "utf-16": csv().encode("utf-16"),
    "utf-16 without a mark": csv().encode("utf-16-le"),
    "gz": gzip.compress(csv().encode()),
    "no last newline": csv()[:-1],
    "comments": "# made by me\n" + csv().replace("\n50,", "\n# restarted\n\n50,"),
    "comment as header": "# " + csv(),
    "Excel's first line": "sep=,\n" + csv(),
    "header again": csv() + csv().splitlines()[0] + "\n",
    "quoted": csv(names=['"step"', '"lar"', '"train_loss"']),
    "newlines in quotes": "\n".join(['step,"a ""note""",lar,train_loss', *QUOTED]) + "\n",
    "long fields": csv([r | {"note": "x" * 200_000} for r in ROWS]),
    "more fields at a restart": csv(ROWS[:10])
    + csv(
        [dict(step=r["step"], new=1, lar=r["lar"], train_loss=r["train_loss"]) for r in ROWS[5:]]
    ),
    "jsonl": jsonl(),
    "jsonl with U+2028": jsonl(NOTED),
    "jsonl with nested keys": jsonl(NESTED),
    "jsonl in utf-16": jsonl(NOTED).encode("utf-16"),
    "jsonl after a comment": "# made by me\n" + jsonl(),
    "array": json.dumps(ROWS),
    "array, indented": json.dumps(NOTED, indent=2),
    "columns": json.dumps({"step": STEPS, "lar": LARS, "train_loss": LOSSES, "config": {"a": [1]}}),
    "columns by row": json.dumps(
        {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}
    ),
    "trainer_state": json.dumps({"epoch": 2, "log_history": ROWS, "best": None}, indent=1),
    "megatron": MEGATRON,
    "nanogpt": PLAIN,
    "equals": EQUALS,
    "objects in lines": "".join(
        f"INFO | {json.dumps({name: str(cell) for name, cell in row.items()})}\n" for row in ROWS
    ),
    "printed dicts": PRINTED,
    "tqdm": TQDM,
    "long table": "run,tag,step,value\n"
    + "".join(f"a,{tag},{r['step']},{r[tag]}\n" for tag in ("lar", "train_loss") for r in ROWS),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, read):
    log = read(FORMS[form])
    np.testing.assert_array_equal(log.step, STEPS)
    np.testing.assert_array_equal(log.lar, LARS)
    np.testing.assert_array_equal(log.loss, LOSSES)
    assert "20 rows" in log.notes[0], log.notes


def test_parquet(read):
    log = read(frame(), "run.parquet")
    np.testing.assert_array_equal(log.lar, LARS)
    refused(lambda: read(frame()[:-30], "torn.parquet"), "torn.parquet", "Parquet")


def events(folder, rows, **options):
    tensorboard = pytest.importorskip("tensorboardX")
    with tensorboard.SummaryWriter(str(folder), **options) as writer:
        for row in rows:
            for name in ("lar", "train_loss"):
                writer.add_scalar(name, row[name], row["step"])
    return max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tensorboard(tmp_path):
    file = events(tmp_path / "a", ROWS[:15], filename_suffix=".1")
    np.testing.assert_allclose(logs.read(file).lar, LARS[:15], rtol=1e-6)
    (tmp_path / "torn.tfevents").mkdir()
    torn = written(tmp_path / "torn.tfevents", file.read_bytes()[:-7])
    assert len(logs.read(torn).step) == 15  # the loss of the last row is gone
    other = [row | {"lar": row["lar"] - 0.1} for row in ROWS[10:]]
    (tmp_path / "b").mkdir()
    second = events(tmp_path / "b", other, filename_suffix=".2")
    second.rename(tmp_path / "a" / "events.out.tfevents.99999999999.x")  # restarted after step 100
    log = logs.read(tmp_path / "a")
    np.testing.assert_array_equal(log.step, STEPS)
    np.testing.assert_allclose(log.lar, LARS[:10] + [row["lar"] for row in other], rtol=1e-6)
    np.testing.assert_allclose(log.loss, LOSSES, rtol=1e-6)
    torn.unlink()
    assert logs.read(tmp_path).lar.tolist() == log.lar.tolist()  # the only run below the folder
    events(tmp_path / "c", ROWS)
    refused(lambda: logs.read(tmp_path), "several runs, 'a', 'c'")


def test_values_as_tensors(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    def record(**fields):
        event = Event(**fields).SerializeToString()
        return len(event).to_bytes(8, "little") + b"\0" * 4 + event + b"\0" * 4

    parts = [record(file_version="brain.Event:2")]
    for row in ROWS:
        value = Summary.Value(tag="lar")
        value.tensor.dtype = 1
        if row["step"] % 20:
            value.tensor.float_val.append(row["lar"])
        else:
            value.tensor.tensor_content = np.float32(row["lar"]).tobytes()
        parts.append(record(step=row["step"], summary=Summary(value=[value])))
    log = logs.read(written(tmp_path, b"".join(parts), "events.out.tfevents.1"))
    np.testing.assert_allclose(log.lar, LARS, rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "module"),
    [
        (b"PAR1....PAR1", "polars"),
        (b"." * 24 + b"brain.Event:2", "tensorb"),
        (b":W&B" + b"\0" * 9, "protobuf"),
    ],
)
def test_without_the_extra_it_is_named(content, module, read, monkeypatch):
    for name in ("polars", "tensorboardX", "tensorboardX.proto.event_pb2", "google.protobuf"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(lambda: read(content), "pip install 'jlar[logs]'", module)


def varint(number):
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def field(number, content):
    return varint(8 * number + 2) + varint(len(content)) + content


def history(count, row):
    """A record of W&B's with what was logged at once."""
    items = [
        b"".join(field(kind, part.encode()) for part in name.split("."))
        + field(16, json.dumps(value).encode())
        for name, value in row.items()
        for kind in [1 if isinstance(value, dict) else 2]  # of versions before 0.17, or later ones
    ]
    content = b"".join(field(1, item) for item in items)
    return b"\x08" + varint(count) + field(2, content + field(2, b"\x08\1"))


HISTORY = """080d128a010a131205747261696e12046c6f7373820103342e390a25120a5f74696d657374616d70820116
    312e37393537323134313630303634333238652b30390a1812085f72756e74696d6582010b302e353633363333343032
    0a0b12055f73746570820101310a12120b676c6f62616c5f7374657082010232300a0d12036c6172820105302e363939
    12020801"""  # written by wandb 0.31.0


def run_file(records):
    """A file of W&B's: a mark, and blocks over which the records are divided."""
    file = bytearray(b":W&B\xe1\xbe\0")
    for record in records:
        left, first = record, True
        while left or first:
            if (space := 32768 - len(file) % 32768) < 7:
                file += b"\0" * space
                continue
            part, left = left[: space - 7], left[space - 7 :]
            kind = (1 if first else 4) if not left else (2 if first else 3)
            file += b"\0" * 4 + len(part).to_bytes(2, "little") + bytes([kind]) + part
            first = False
    return bytes(file)


def test_wandb(tmp_path):
    pytest.importorskip("google.protobuf")
    records = []
    for count, row in enumerate(ROWS):
        logged = {"global_step": row["step"], "lar": row["lar"]}
        loss = {"train.loss": row["train_loss"]}, {"train": {"loss": row["train_loss"]}}
        logged = logged | loss[0] if count % 2 else loss[1] | logged
        records += [history(count, logged), field(7, b"x" * 9000 * (count % 9))]  # and its output
    run = tmp_path / "wandb" / "offline-run-1-abc"
    run.mkdir(parents=True)
    file = written(run, run_file(records), "run-abc.wandb")
    (tmp_path / "wandb" / "latest-run").symlink_to(run.name)
    for path in (file, run, tmp_path / "wandb", tmp_path / "wandb" / "latest-run"):
        log = logs.read(path)
        assert log.step.tolist() == STEPS and log.lar.tolist() == LARS
        assert log.loss.tolist() == LOSSES and "W&B run file" in log.notes[0]
    for end in (-1, -8, -20_000):
        torn = logs.read(written(tmp_path, file.read_bytes()[:end], "torn.wandb"))
        assert 0 < len(torn.step) <= 20 and any("torn" in note for note in torn.notes)
    alone = logs.read(written(tmp_path, run_file([bytes.fromhex(HISTORY)]), "alone.wandb"))
    assert (alone.step, alone.lar, alone.loss) == ([20], [0.699], [4.9])
    refused(lambda: logs.read(written(tmp_path, b":W&B\1", "x.wandb")), "no rows")
    (tmp_path / "wandb" / "run-2").mkdir()
    written(tmp_path / "wandb" / "run-2", file.read_bytes(), "run-2.wandb")
    refused(lambda: logs.read(tmp_path / "wandb"), "several runs, 'offline-run-1-abc', 'run-2'")


def mlflow(run):
    """The folder of an MLflow run, with its metrics of other names and lengths."""
    lines = {
        name: [f"{i} {row[key]} {row['step']}\n" for i, row in enumerate(ROWS)]
        for name, key in {"lar": "lar", "train/loss": "train_loss", "val/loss": "lar"}.items()
    }
    lines["epoch"] = [f"1 {epoch} {100 * epoch} data 5ab1e\n" for epoch in range(3)]
    lines["step"] = ["1 7 100\n"]
    for name, each in lines.items():
        file = run / "metrics" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(each))
    written(run, "lifecycle_stage: active\n", "meta.yaml")
    return run


def test_mlflow(tmp_path):
    store, run = tmp_path / "mlruns", mlflow(tmp_path / "mlruns" / "0" / "ab12")
    mlflow(store / "0" / "models" / "m-1")  # a model that the run has logged
    for path in (run, run / "metrics", store, store / "0"):
        log = logs.read(path)
        assert log.step.tolist() == STEPS and log.lar.tolist() == LARS
        assert log.loss.tolist() == LOSSES
        assert "MLflow metrics: step 'step', LAR 'lar', training loss 'train/loss'" in log.notes[0]
    with (run / "metrics" / "lar").open("a") as file:
        file.write("20 0.5 21")  # of 210
    assert logs.read(run, growing=True).step.tolist() == STEPS
    mlflow(store / "0" / "cd34")
    refused(lambda: logs.read(store), "several runs, '0/ab12', '0/cd34': name one")
    written(run, csv(), "export.csv")
    refused(lambda: logs.read(run), "several logs, 'export.csv', 'metrics'")


def test_mlflow_in_a_database(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        columns = (
            "key TEXT, value FLOAT, timestamp BIGINT, run_uuid TEXT, step BIGINT, is_nan BOOLEAN"
        )
        database.execute(f"CREATE TABLE metrics ({columns})")
        for run in ("a1", "b2"):
            for name, key in {"lar": "lar", "train/loss": "train_loss"}.items():
                rows = [(name, row[key], 0, run, row["step"], False) for row in ROWS]
                database.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
        database.execute("INSERT INTO metrics VALUES ('lar', 0, 0, 'a1', 100000, 1)")  # a nan
        database.commit()
    refused(lambda: logs.read(tmp_path / "mlflow.db"), "run_uuid", "'a1'", "'b2'")
    log = logs.read(tmp_path / "mlflow.db", only=[("run_uuid", "a1")])
    assert log.step.tolist() == STEPS and log.lar.tolist() == LARS
    assert log.loss.tolist() == LOSSES
    assert logs.read(tmp_path, only=[("run_uuid", "b2")]).lar.tolist() == LARS


def test_standard_input(monkeypatch):
    class Input:
        buffer = io.BytesIO(gzip.compress(csv().encode()))

    monkeypatch.setattr(sys, "stdin", Input)
    assert logs.read("-").lar.tolist() == LARS


FOLDERS = {
    "metrics.jsonl": jsonl(),
    "metrics.csv": csv(),
    "trainer_state.json": json.dumps({"log_history": ROWS}),
    "log.jsonl.gz": gzip.compress(jsonl().encode()),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_folder(name, tmp_path):
    written(tmp_path, FOLDERS[name], name)
    written(tmp_path, "{}", "config.json")
    log = logs.read(tmp_path)
    assert log.lar.tolist() == LARS and name in log.notes[0]


def test_a_folder_that_cannot_be_read(tmp_path):
    refused(lambda: logs.read(tmp_path), "holds no log")
    written(tmp_path, csv(), "a.csv")
    written(tmp_path, csv(), "b.csv")
    refused(lambda: logs.read(tmp_path), "several logs", "'a.csv'", "'b.csv'")


def wide(**columns):
    """A table of 20 rows: a number of its own for each column that is given none."""
    rows = [{name: at[i] if at else i + 7 for name, at in columns.items()} for i in range(20)]
    return csv(rows)


# columns of the log, of which those with LARS and LOSSES have to be found
CHOICES = {
    "trainer's step before the tracker's": {"_step": 0, "trainer/global_step": STEPS, "lar": LARS},
    "global_step": {"Step": 0, "global_step": STEPS, "train/lar": LARS},
    "W&B's export": {"Step": STEPS, "a - lar": LARS, "a - lar__MIN": 0, "a - lar__MAX": 0},
    "TensorBoard's export": {"Wall time": 0, "Step": STEPS, "Value": LARS},
    "training before validation": {"step": STEPS, "val/lar": 0, "train/lar": LARS},
    "last part": {"step": STEPS, "metrics.lar": LARS, "metrics.lar_max": 0},
    "epoch last": {"epoch": 0, "iteration": STEPS, "metrics.lar": LARS},
    "camel case": {"globalStep": STEPS, "trainLar": LARS, "valLoss": 0, "trainLoss": LOSSES},
}
for _name, _other in {
    "training/loss": "validation/loss",
    "Loss/train": "Loss/val",
    "train.loss": "eval.loss",
    "learning/loss": "testing/loss",
    "train_loss_step": "train_loss_epoch",
    "a - train/loss": "b - train/loss",
    "loss": "loss_scale",
    "train/loss": "train/aux_loss",
    "lm loss": "z_loss",
    "train_loss": "loss",
}.items():
    CHOICES[_name] = {"step": STEPS, "a - lar": LARS, _other: 0, _name: LOSSES}


@pytest.mark.parametrize("case", CHOICES)
def test_which_column_is_which(case, read):
    log = read(wide(**CHOICES[case]))
    assert log.step.tolist() == STEPS and log.lar.tolist() == LARS
    named = {name: at for name, at in CHOICES[case].items() if at}
    assert all(repr(name) in log.notes[0] for name in named)
    if len(named) == 3:
        assert log.loss.tolist() == LOSSES
    else:
        assert np.isnan(log.loss).all() and "no training loss" in log.notes[0]


def test_a_summary_is_not_the_training_loss(read):
    rows = [dict(step=r["step"], lar=r["lar"], loss=r["train_loss"]) for r in ROWS]
    assert read(jsonl([*rows, {"step": 200, "train_loss": 3.3}])).loss.tolist() == LOSSES


def test_a_step_that_is_not_logged_beside_lar_is_not_its_step(read):
    rows = [{"_step": s, "lar": x} for s, x in zip(STEPS, LARS, strict=True)]
    rows += [{"_step": 210, "global_step": 7, "train_loss": 3.0}]
    assert read(jsonl(rows)).step.tolist() == STEPS


def test_one_run_exported_in_two_ways_is_one_log(read):
    sparse = []
    for i, row in enumerate(ROWS):
        sparse += [
            {"_step": 2 * i, "trainer/global_step": row["step"], "train/loss": row["train_loss"]},
            {"_step": 2 * i + 1, "trainer/global_step": row["step"], "lar": row["lar"]},
        ]
    a, b = read(jsonl(sparse)), read(csv())
    for name in ("step", "lar", "loss"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_the_width(read):
    k = [128.0 ** (2 * (1 - lar)) for lar in LARS]
    assert read(wide(step=STEPS, lar=LARS, k_pred=k)).n == 128
    broken = [math.nan, *LARS[1:]]
    assert read(wide(step=STEPS, lar=broken, k=k)).n == 128
    assert read(wide(step=STEPS, lar=LARS, n=[64] * 20)).n == 64
    assert read(csv()).n is None


TWO_NAMES = "step,lar,lar\n" + "".join(f"{s},0.5,0.6\n" for s in STEPS)
LONG = "run,tag,step,value\n" + "".join(f"{run},lar,{s},0.5\n" for run in "ab" for s in STEPS)
REFUSED = {
    "empty": ("", {}, ["no rows"]),
    "blank": ("\n \n", {}, ["no rows"]),
    "header only": ("step,lar\n", {}, ["no rows"]),
    "no LAR": ("step,accuracy\n1,0.5\n", {}, ["'lar'", "'accuracy'", "--lar-column"]),
    "no step": ("lar,accuracy\n0.5,0.5\n", {}, ["'step'", "'accuracy'", "--step-column"]),
    "not there": (csv(), {"lar": "LAR"}, ["no column 'LAR'", "'step', 'lar'"]),
    "two of one name": (TWO_NAMES, {}, ["--lar-column", "'lar#1'", "'lar#2'"]),
    "two layers": ("step,lar/a,lar/b\n1,0.5,0.6\n", {}, ["--lar-column", "'lar/a'", "'lar/b'"]),
    "layers beside the last": (
        "step,lar/layers.0,lar/unembed\n1,0.5,0.6\n",
        {},
        ["'lar/layers.0', 'lar/unembed'"],
    ),
    "unquoted commas": ("step,lar,note\n1,.5,a, b\n2,.5,a, b\n", {}, ["2 of 2", "quote"]),
    "two losses": (
        "step,lar,train/loss,train.loss\n1,0.5,2,3\n",
        {},
        ["--loss-column", "'train/loss'", "'train.loss'"],
    ),
    "two runs": (LONG, {}, ["'run'", "2", "--only run=a"]),
    "two seeds": ("seed,step,lar\n0,1,.5\n1,1,.5\n", {}, ["'seed'", "--only seed=0"]),
    "layers in rows": ("layer,step,lar\nq,1,.5\nk,1,.5\n", {}, ["--only layer=k"]),
    "series": ("tag,step,value\na,1,0.5\nb,1,0.5\n", {}, ["'lar'", "'a', 'b'"]),
    "above one": (csv([r | {"lar": 61.2} for r in ROWS]), {}, ["'lar'", "61.2", "at most 1"]),
    "all zero": (csv([r | {"lar": 0} for r in ROWS]), {}, ["'lar'", "zero"]),
    "unreadable": (
        csv([*ROWS[:17], *[r | {"lar": "x"} for r in ROWS[17:]]]),
        {},
        ["3 of 20", "'x'"],
    ),
    "lists": (jsonl([r | {"lar": [0.5, 0.6]} for r in ROWS]), {}, ["20 of 20", "'lar'"]),
    "no header": (csv().split("\n", 1)[1], {}, ["header"]),
    "broken rows": ("step,lar\n" + "1,2,3,4\n" * 5 + "10,0.5\n", {}, ["5 of 6", "fields"]),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", {}, ["binary"]),
    "database": (b"SQLite format 3\0" + b"\0" * 80, {}, ["SQLite"]),
    "spreadsheet": (b"PK\3\4" + b"\0" * 80, {}, ["zip"]),
    "no such value": (csv(), {"only": [("step", "7")]}, ["no row with 'step' = '7'"]),
    "no such filter": (csv(), {"only": [("seed", "7")]}, ["no column 'seed'"]),
    "a bad pattern": (csv(), {"pattern": "("}, ["--pattern"]),
    "a pattern without names": (csv(), {"pattern": "a"}, ["--pattern", "(?P<lar>"]),
    "steps within epochs": (
        "epoch,batch,lar\n" + "".join(f"{e},{b},.5\n" for e in range(3) for b in range(9)),
        {"step": "batch"},
        ["'batch'", "'epoch'"],
    ),
    "control characters": ("step,\x1b[31m\x07\n1,2\n", {}, ["\\x1b[31m\\x07"]),
    "deep": ("[" * 100_000, {}, ["no rows"]),
    "keys without end": (jsonl([{f"k{i}": 1} for i in range(10_001)]), {}, ["'k0', 'k1'", "..."]),
    "two tables": (json.dumps({"a": ROWS, "b": ROWS}), {}, ["'a'", "'b'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, read):
    content, options, words = REFUSED[case]
    refused(lambda: read(content, "run.log", **options), "run.log", *words)


def test_what_is_refused_can_be_chosen(read):
    assert read(TWO_NAMES, lar="lar#2").lar.tolist() == [0.6] * 20
    assert len(read(LONG, only=[("run", "b")]).step) == 20
    two = "seed,layer,step,lar\n" + "".join(
        f"{seed},{layer},{s},{0.5 + seed / 10}\n"
        for s in STEPS
        for seed in (0, 1)
        for layer in "qk"
    )
    assert read(two, only=[("seed", "1.0"), ("layer", "q")]).lar.tolist() == [0.6] * 20
    lines = "".join(f"at {r['step']} alignment is {r['lar']}\n" for r in ROWS)
    pattern = r"at (?P<step>\d+) alignment is (?P<lar>\S+)"
    assert read(lines, pattern=pattern).lar.tolist() == LARS


@pytest.mark.parametrize(
    "cell", ["", "NA", "N/A", "None", "null", "-", "nan", "50/10000", "?", "\0"]
)
def test_what_is_no_number_elsewhere_drops_no_lar(cell, read):
    rows = [
        row | {"train_loss": cell if i % 2 else row["train_loss"]} for i, row in enumerate(ROWS)
    ]
    log = read(csv([row | {"note": cell} for row in rows]))
    assert log.step.tolist() == STEPS and log.lar.tolist() == LARS
    if cell != "50/10000":
        assert log.loss[1] == LOSSES[0]  # the last that was logged
    if cell == "?":
        assert any("'train_loss'" in note and note.endswith(": 10") for note in log.notes)


@pytest.mark.parametrize("cell", ["NA", "None", "-", "nan", "inf", "x"])
def test_rows_without_a_lar_are_left_out_and_said(cell, read):
    log = read(csv([r | {"lar": cell} if r["step"] == 50 else r for r in ROWS]))
    assert 50 not in log.step and len(log.step) == 19
    assert any("'lar'" in note and note.endswith(": 1") for note in log.notes[1:]), log.notes


def test_numbers_as_people_write_them(read):
    def like(step, lar, delimiter=";"):
        rows = [[step(r["step"] * 100), lar(r["lar"])] for r in ROWS]
        return "\n".join(delimiter.join(row) for row in [["step", "lar"], *rows]) + "\n"

    for step, lar in [
        (lambda s: f"{s:,}", str),
        (lambda s: f"{s:,}".replace(",", "\u202f"), str),
        (lambda s: f"{s:,}".replace(",", "'"), str),
        (lambda s: f"{s}/10000", lambda x: f" {x} "),
        (str, lambda x: str(x).replace(".", ",")),
        (lambda s: f"{float(s):.3f}".replace(".", ","), lambda x: f"{x:.3f}".replace(".", ",")),
    ]:
        log = read(like(step, lar))
        assert log.step.tolist() == [100 * s for s in STEPS] and log.lar.tolist() == LARS
    quoted = like(lambda s: f'"{s:,}"', lambda x: f'"{x}"', ",")
    assert read(quoted).step.tolist() == [100 * s for s in STEPS]


def test_stray_quotes(read):
    lines = csv([r | {"note": "fine"} for r in ROWS]).splitlines()
    lines[5] = lines[5].replace("fine", '"never closed')
    lines[9] = lines[9].replace("fine", '5" wide')
    lines[12] = lines[12].replace("fine", 'said "so"')
    log = read("\n".join(lines))
    assert log.lar.tolist() == LARS and log.loss.tolist() == LOSSES


def test_a_torn_file(read, tmp_path):
    torn = read(gzip.compress(csv().encode() * 1)[:-30])
    assert 0 < len(torn.step) < 20 and any("torn" in note for note in torn.notes)
    log = read(jsonl() + '{"step": 210, "la\n[1]\n{"step": 220, "lar": 0.6}\n')
    assert log.step.tolist() == [*STEPS, 220] and any(
        "object, left out: 2" in note for note in log.notes
    )
    assert read(csv() + "2", growing=True).step.tolist() == STEPS
    assert len(read(json.dumps(ROWS, indent=1)[:-40]).step) == 19


def series(steps, lars, **more):
    rows = [dict(step=s, lar=x) | {n: v[i] for n, v in more.items()} for i, (s, x) in enumerate(
        zip(steps, lars, strict=True))]  # fmt: skip
    return csv(rows)


def test_restarts(read):
    """As TensorBoard does: the last written counts, and the abandoned branch is left out."""
    log = read(series([10, 20, 30, 40, 50, 25, 35, 45], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]))
    assert log.step.tolist() == [10, 20, 25, 35, 45]
    assert log.lar.tolist() == [0.1, 0.2, 0.6, 0.7, 0.8]
    assert any("left out: 3" in note and "step 25" in note for note in log.notes), log.notes
    again = STEPS[:15] + STEPS[9:]
    log = read(series(again, [0.3] * 15 + [0.6] * 11))
    assert log.step.tolist() == STEPS and log.lar.tolist() == [0.3] * 9 + [0.6] * 11
    log = read(series([10, 20, 30, 20, 30, 20, 30], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]))
    assert log.lar.tolist() == [0.1, 0.6, 0.7] and any("2 times" in note for note in log.notes)
    # The loss of the abandoned branch is abandoned with it, also where LAR is logged less often.
    rows = [{"step": s, "loss": 1.0} | ({"lar": 0.5} if s % 50 == 0 else {}) for s in STEPS]
    log = read(jsonl([*rows, *({"step": s, "loss": 2.0} for s in (110, 120))]))
    assert log.step.tolist() == [50, 100] and log.loss.tolist() == [1, 1]


def test_several_rows_of_a_step_are_averaged(read):
    log = read(series(np.repeat(STEPS, 2), np.tile([0.5, 0.7], 20)))
    assert log.step.tolist() == STEPS and log.lar.tolist() == pytest.approx([0.6] * 20)
    assert any("averaged" in note for note in log.notes)


def test_rows_in_any_order(read):
    order = np.random.default_rng(0).permutation(20)
    for at in (order, np.arange(20)[::-1]):
        log = read(csv([ROWS[i] for i in at]))
        assert log.step.tolist() == STEPS and log.lar.tolist() == LARS
        assert log.loss.tolist() == LOSSES
        assert any("order" in note for note in log.notes)


def test_a_baseline_is_read_by_the_same_reader(tmp_path):
    path = written(tmp_path, b"\xef\xbb\xbf" + jsonl().encode() + b'{"step": 3, "la', "base.jsonl")
    baseline = logs.baseline([path])
    assert math.isclose(float(baseline.at_step(100).lar), LARS[9], abs_tol=1e-3)
    assert math.isclose(float(baseline.at_loss(LOSSES[9]).lar), LARS[9], abs_tol=1e-3)
    both = written(tmp_path, "seed,step,lar\n0,1,.5\n1,1,.5\n", "seeds.csv")
    refused(lambda: logs.baseline([both]), "seeds.csv", "--only seed=0")
    point = written(tmp_path, "step,lar\n1,.5\n", "point.csv")
    refused(lambda: logs.baseline([point]), "point.csv", "two or more different steps")
    (tmp_path / "run").mkdir()
    written(tmp_path / "run", path.read_bytes(), "metrics.jsonl")
    assert inputs.baseline(tmp_path / "run").at_step(100) == baseline.at_step(100)
    with pytest.raises(Refusal, match="nowhere"):
        inputs.baseline(tmp_path / "nowhere")


PIECES = ["step", "lar", "loss", "_step", "value", "tag", "run", "seed", "epoch", "n", "k",
          "a - lar", "0.5", "1", "2", "10", "-1", "1e999", "nan", "1,000", "0,5", "50/100", "None",
          ",", ";", "\t", "|", " ", ": ", "=", '"', "'", "\n", "\r\n", "\r", "#", "{", "}", "[",
          "]", '"lar":', '"step":', "\u2028", "\x1b[31m", "\0", "\x85", "é", "x" * 300, "\ud800",
          "9" * 400]  # fmt: skip
TORN = [content if isinstance(content, bytes) else content.encode() for content in FORMS.values()]


@st.composite
def damaged(draw):
    """A log of some form with parts left out, repeated and put in."""
    content = bytearray(draw(st.sampled_from(TORN)))
    for _ in range(draw(st.integers(0, 6))):
        start, size = draw(st.integers(0, len(content))), draw(st.integers(0, 40))
        piece = draw(st.sampled_from([*PIECES, ""])).encode(errors="surrogatepass")
        content[start : start + size] = piece * draw(st.integers(1, 3))
    return bytes(content)


texts = st.tuples(
    st.sampled_from(
        ["", "step,lar\n", "run,tag,step,value\n", "epoch;step;lar;loss\n", '{"lar": ']
    ),
    st.lists(st.sampled_from(PIECES), max_size=60),
).map(lambda parts: (parts[0] + "".join(parts[1])).encode(errors="surrogatepass"))
objects = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(PIECES[:-2]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(PIECES[:12]), inner, max_size=6)
    ),
    max_leaves=30,
).map(lambda value: json.dumps(value).encode())
starts = st.sampled_from(
    [b"PAR1", b"\x1f\x8b", b"\x18" + b"\0" * 24 + b"brain.Event:2", b"\xff\xfe"]
    + [b":W&B\xe1\xbe\0" + b"\0" * 4 + bytes([size, 0, 1]) for size in (3, 9)]
)
binary = st.tuples(starts, st.binary(max_size=200)).map(b"".join)


options = st.fixed_dictionaries(
    {"growing": st.booleans()},
    optional={
        "step": st.sampled_from(["step", "lar", "note"]),
        "lar": st.sampled_from(["lar", "value", "train_loss"]),
        "loss": st.sampled_from(["train_loss", "step"]),
        "only": st.lists(st.sampled_from([("step", "10"), ("tag", "lar"), ("run", "a")])),
        "pattern": st.sampled_from([r"(?P<step>\d+).*?(?P<lar>[\d.]+)"]),
    },
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "log"


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(damaged() | texts | objects | binary | st.binary(max_size=300), st.just({}) | options)
def test_any_input_is_read_or_refused_in_one_line(path, content, options):
    path.write_bytes(content)
    try:
        log = logs.read(path, **options)
    except logs.Unusable as error:
        assert str(error).isprintable()
        return
    assert len(log.step) == len(log.lar) == len(log.loss) > 0
    assert (np.diff(log.step) > 0).all() and np.isfinite(log.step).all()
    assert np.isfinite(log.lar).all() and log.lar.max() < 1.01 and not np.isinf(log.loss).any()
    assert all(map(str.isprintable, log.notes))
