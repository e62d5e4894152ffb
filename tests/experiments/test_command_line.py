"""What the commands say and derive: missing extras, kinds of text, settings that follow."""

import gzip
import json
import tomllib
from pathlib import Path

import polars
import pytest

from jlar_experiments import cli, errors
from jlar_experiments.pretraining import corpus

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i} " + "words and words " * 200 for i in range(60)]


@pytest.mark.parametrize("command", [["grok"], ["pretrain"], ["report", "."], ["data", "."]])
def test_a_plain_install_names_the_extra(command, monkeypatch, capsys):
    def lacks(*_):
        raise ModuleNotFoundError("No module named 'optax'", name="optax")

    parser = cli._parser
    monkeypatch.setattr(cli, "_parser", lambda: (chosen := parser()) and _with(chosen, lacks))
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith('optax: pip install "jlar[experiments]"\n')


def _with(parser, command):
    parse = parser.parse_known_args

    def parsed(arguments):
        chosen, unknown = parse(arguments)
        chosen.command = command
        return chosen, unknown

    parser.parse_known_args = parsed
    return parser


def test_modules_of_extras(monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    needs = [f"{need}; extra == '{extra}'" for extra, all_of in extras.items() for need in all_of]
    monkeypatch.setattr(errors.metadata, "requires", lambda _: needs)

    def told(name):
        return errors.missing(ModuleNotFoundError(name=name))

    assert (
        told("orbax.checkpoint") == 'this needs orbax.checkpoint: pip install "jlar[experiments]"'
    )
    assert told("polars").endswith('"jlar[logs]"') and told("nowhere") is None


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_documents_of_jsonl_gz_and_parquet(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"texts.{kind}"
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()
    if kind == "parquet":
        polars.DataFrame({"body": TEXTS}).write_parquet(path)
    else:
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    assert cli.main(["data", path.name, "--field", "body", "--out", "tokens"]) == 0
    assert "train on it: jlar pretrain --corpus tokens" in capsys.readouterr().out
    made = corpus.sidecar(tmp_path / "tokens")
    assert sum(made.documents.values()) == len(TEXTS)
    assert cli.main(["data", path.name, "--out", "other"]) == 2  # no field of this name
    said = capsys.readouterr().err
    assert "(--field)" in said.splitlines()[-1]


def test_binary_files_are_refused(tmp_path, capsys):
    for name, data in (
        ("a.bin", b"\x00\xff\x80" * 50),
        ("b.gz", b"not gzip"),
        ("c.parquet", b"no"),
    ):
        (tmp_path / name).write_bytes(data)
        assert cli.main(["data", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        assert "is not text" in capsys.readouterr().err.splitlines()[-1]


def test_settings_follow_from_the_data_and_a_longer_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    bpe = ["--tokenizer=bpe", "--vocabulary=300", "--out=tokens"]
    assert cli.main(["data", "texts", *bpe]) == 0
    small = ["--width=16", "--hidden=16", "--heads=2", "--layers=1", "--unroll=1", "--length=32"]
    command = ["pretrain", "--corpus=tokens", *small, "--schedule=cosine"]
    assert cli.main([*command, "--steps=6"]) == 0  # fewer steps than the preset warms up for
    [folder] = (tmp_path / "runs" / "bytes-tiny").glob("*/config.json")
    settings = json.loads(folder.read_text())["settings"]
    made = corpus.sidecar(tmp_path / "tokens")
    assert settings["vocabulary"] == made.vocabulary and settings["tokenizer"] == "bpe"
    assert settings["warm_up"] == 6
    assert settings["unique_tokens"] == made.tokens["train"] // 33 * 32
    longer = [*command, "--warm-up=6"]
    assert cli.main([*longer, "--steps=12"]) == 0
    earlier = capsys.readouterr().err
    assert "had steps 6 and now has 12, with the learning rate" in earlier
    assert "compiling" in earlier and "? left" not in earlier
    rows = (folder.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(12))
    assert cli.main([*longer, "--steps=6"]) == 2
    said = capsys.readouterr().err
    assert "steps 12, not 6" in said
