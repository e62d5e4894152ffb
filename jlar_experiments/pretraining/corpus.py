"""Text into token files: documents, a tokenizer, train.bin and validation.bin with tokens.json.

A token file is a plain array of uint16 or uint32 in the machine's little-endian order, documents
one after another with an end token between them. A tenth of the documents, chosen by a digest of
their content, is held out; documents with the same content count once, so none is on both sides.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer

from .. import records

Tokenizer = Literal["bytes", "bpe"]
HELD_OUT = 10  # one document in this many
PIECE = 65_536  # bytes of a piece of a single file, which has no documents
END = "<|end|>"
FILES = {"train": "train.bin", "validation": "validation.bin"}


class Unusable(Exception):
    """The text or the token files cannot be used; the message is one line."""


@dataclass(frozen=True)
class Sidecar:
    """What tokens.json says of the two token files beside it."""

    corpus: str
    tokenizer: str
    vocabulary: int
    dtype: str
    tokens: dict[str, int]
    documents: dict[str, int]
    largest_id: int
    python: str
    sha256: dict[str, str]


def folder(corpus: str, tokenizer: Tokenizer, vocabulary: int, root: Path) -> Path:
    """Where the token files of this corpus are, or are to be made."""
    if (Path(corpus) / "tokens.json").exists():
        return Path(corpus)
    name = Path(corpus).name or "root"
    if corpus not in ("stdlib", "site-packages"):
        name += "-" + hashlib.sha256(str(Path(corpus).resolve()).encode()).hexdigest()[:8]
    return root / (f"{name}-bytes" if tokenizer == "bytes" else f"{name}-bpe{vocabulary}")


def documents(corpus: str) -> Iterator[bytes]:
    """Every different text of the corpus once, in the order of the paths."""
    seen = set()
    for text in _texts(corpus):
        digest = hashlib.sha256(text).digest()
        if text and digest not in seen:
            seen.add(digest)
            yield text


def _texts(corpus: str) -> Iterator[bytes]:
    if corpus == "stdlib":
        root, skip = Path(sysconfig.get_path("stdlib")), ("site-packages", "dist-packages")
        yield from _read(root, ".py", skip)
    elif corpus == "site-packages":
        yield from _read(Path(sysconfig.get_path("purelib")), ".py", ())
    elif Path(corpus).is_dir():
        yield from _read(Path(corpus), "", ())
    elif Path(corpus).is_file():
        lines = Path(corpus).read_bytes().splitlines(keepends=True)
        ends = np.cumsum([len(line) for line in lines]) // PIECE
        for _, piece in itertools.groupby(zip(ends, lines, strict=True), key=lambda pair: pair[0]):
            yield b"".join(line for _, line in piece)
    else:
        raise Unusable(
            f"corpus must be stdlib, site-packages, or an existing file or folder; got {corpus}"
        )


def _read(root: Path, suffix: str, skip: tuple[str, ...]) -> Iterator[bytes]:
    """The UTF-8 files below this folder; others, and hidden ones, are not text."""
    for here, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        for name in sorted(files):
            path = Path(here) / name
            if not name.endswith(suffix) or name.startswith(".") or not path.is_file():
                continue
            text = path.read_bytes()
            try:
                text.decode()
            except UnicodeDecodeError:
                continue
            if b"\0" not in text:
                yield text


def held_out(text: bytes) -> bool:
    """Whether this document is for validation: its content alone decides."""
    return hashlib.sha256(b"held out" + text).digest()[0] * HELD_OUT < 256


def prepare(
    corpus: str, tokenizer: Tokenizer, vocabulary: int, out: Path, say: Callable[[str], None]
) -> Sidecar:
    """Make the token files, whole or not at all; or read the sidecar of those that are there."""
    if (out / "tokens.json").exists():
        return sidecar(out)
    say(f"making token files of {corpus} in {out}")
    draft = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        made = _write(corpus, tokenizer, vocabulary, draft)
        records.write_whole(draft / "tokens.json", json.dumps(asdict(made), indent=2) + "\n")
        try:
            draft.rename(out)
        except OSError:
            if not (out / "tokens.json").exists():  # another process was faster
                raise
        return sidecar(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(corpus: str, tokenizer: Tokenizer, vocabulary: int, out: Path) -> Sidecar:
    encode, size = _encoder(corpus, tokenizer, vocabulary, out)
    dtype = np.dtype("<u2" if size <= 2**16 else "<u4")
    tokens, texts, digests, largest = {}, {}, {}, 0
    with (out / FILES["train"]).open("wb") as train, (out / FILES["validation"]).open("wb") as val:
        files = {False: train, True: val}
        for part, held in (("train", False), ("validation", True)):
            tokens[part], texts[part], digest = 0, 0, hashlib.sha256()
            for text in documents(corpus):
                if held_out(text) != held:
                    continue
                ids = encode(text)
                largest = max(largest, int(ids.max()))
                digest.update(data := ids.astype(dtype).tobytes())
                files[held].write(data)
                tokens[part] += len(ids)
                texts[part] += 1
            digests[part] = digest.hexdigest()
    if not all(texts.values()):
        raise Unusable(
            f"corpus {corpus} has {sum(texts.values())} documents, too few to hold some out"
        )
    python = sys.version.split()[0]
    return Sidecar(corpus, tokenizer, size, dtype.str, tokens, texts, largest, python, digests)


Encode = Callable[[bytes], Integer[np.ndarray, " ids"]]


def _encoder(corpus: str, tokenizer: Tokenizer, vocabulary: int, out: Path) -> tuple[Encode, int]:
    """What turns a text into ids that end in the end token, and the number of ids."""
    if tokenizer == "bytes":
        # Texts hold no NUL, which ends them.
        return lambda text: np.frombuffer(text + b"\0", dtype=np.uint8), 256
    from tokenizers import Tokenizer as Tokens
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe: Any = Tokens(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    training = (text.decode() for text in documents(corpus) if not held_out(text))
    bpe.train_from_iterator(training, trainer)
    bpe.save(str(out / "tokenizer.json"))
    end = [bpe.token_to_id(END)]
    return lambda text: np.array(bpe.encode(text.decode()).ids + end), bpe.get_vocab_size()


def sidecar(folder: Path) -> Sidecar:
    """The sidecar in this folder, checked against the files; `Unusable` where they differ."""
    path = folder / "tokens.json"
    try:
        stored = Sidecar(**json.loads(path.read_text(encoding="utf-8")))
        width = np.dtype(stored.dtype).itemsize
    except (OSError, ValueError, TypeError) as error:
        raise Unusable(f"{path} does not describe token files ({type(error).__name__})") from None
    for part, name in FILES.items():
        file, expected = folder / name, stored.tokens[part] * width
        size = file.stat().st_size if file.exists() else 0
        if size != expected:
            raise Unusable(f"{file} has {size} bytes, not {expected} as tokens.json says")
    return stored
