"""Text into token files: documents, a tokenizer, train.bin and validation.bin with tokens.json.

A token file is a plain array of uint16 or uint32 in the machine's little-endian order, documents
one after another with an end token between them. A tenth of the documents, chosen by a digest of
their content, is held out; documents with the same content count once, so none is on both sides.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from jaxtyping import Integer

from .. import drafts, errors, records
from ..errors import Refusal
from ..folder import unused
from .texts import NAMES, Say, documents, files

Tokenizer = Literal["bytes", "bpe"]
HELD_OUT = 10  # one document in this many
READ = 2**33  # bytes of a token file up to which its digest is checked before each run
END = "<|end|>"
FILES = {"train": "train.bin", "validation": "validation.bin"}
ALL_FILES = (*FILES.values(), "tokens.json", "tokenizer.json")


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
    source: str
    sha256: dict[str, str]


def folder(
    corpus: str, tokenizer: Tokenizer, vocabulary: int, root: Path, field: str = "text"
) -> Path:
    """Where the token files of this corpus are, or are to be made."""
    if (Path(corpus) / "tokens.json").exists():
        return Path(corpus)
    name = Path(corpus).name or "root"
    if corpus not in NAMES:
        name += "-" + hashlib.sha256(_named(Path(corpus).resolve(), field)).hexdigest()[:8]
    return root / (f"{name}-bytes" if tokenizer == "bytes" else f"{name}-bpe{vocabulary}")


def _named(path: Path, field: str) -> bytes:
    """The path, with the field where it is not the usual one."""
    return os.fsencode(path if field == "text" else f"{path}\0{field}")


def _source(corpus: str, field: str) -> str:
    """A digest of what the files of the corpus are called, how large and how old they are."""
    digest = hashlib.sha256(b"" if field == "text" else field.encode())
    for path in files(corpus):
        at = path.stat()
        digest.update(f"{path}\0{at.st_size}\0{at.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def held_out(text: bytes) -> bool:
    """Whether this document is for validation: its content alone decides."""
    return hashlib.sha256(b"held out" + text).digest()[0] * HELD_OUT < 256


def prepare(
    corpus: str,
    tokenizer: Tokenizer,
    vocabulary: int,
    out: Path,
    say: Say,
    field: str = "text",
) -> Sidecar:
    """Make the token files, whole or not at all; or read the sidecar of those that are there.

    Where the text has changed since, those of the old text are set aside under another name.
    """
    if (out / "tokens.json").exists():
        there = sidecar(out)
        gone = corpus not in NAMES and not os.path.exists(corpus)
        if gone or Path(corpus) == out or there.source == _source(corpus, field):
            return there
        say(f"{corpus} has changed since the token files in {out} were made")
    elif os.path.lexists(out):
        raise Refusal(f"{out} exists and holds no token files; choose another folder")
    say(f"making token files of {corpus} in {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with drafts.folder(out.parent, f"{out.name}.", ALL_FILES) as draft:
        made = _write(corpus, tokenizer, vocabulary, draft, say, field)
        records.write_json(draft / "tokens.json", asdict(made))
        draft.chmod(0o755)
        if (out / "tokens.json").exists():
            if sidecar(out).sha256 == made.sha256:  # touched, or another process was faster
                records.write_json(out / "tokens.json", asdict(made))
                return made
            out.rename(unused(out.with_name(f"{out.name}.earlier")))
        draft.rename(out)
        (out / drafts.LOCK).unlink(missing_ok=True)
    return made


def _write(
    corpus: str, tokenizer: Tokenizer, vocabulary: int, out: Path, say: Say, field: str
) -> Sidecar:
    source = _source(corpus, field)
    encode, size = _encoder(corpus, tokenizer, vocabulary, out, field)
    dtype, largest = np.dtype("<u2" if size <= 2**16 else "<u4"), 0
    tokens, texts = dict.fromkeys(FILES, 0), dict.fromkeys(FILES, 0)
    digests = {part: hashlib.sha256() for part in FILES}
    with contextlib.ExitStack() as stack:
        parts = {part: stack.enter_context((out / name).open("xb")) for part, name in FILES.items()}
        for text in documents(corpus, say, field):
            part = "validation" if held_out(text) else "train"
            ids = encode(text)
            largest = max(largest, int(ids.max()))
            data = ids.astype(dtype).tobytes()
            digests[part].update(data)
            parts[part].write(data)
            tokens[part] += len(ids)
            texts[part] += 1
        for each in parts.values():
            each.flush()
            os.fsync(each.fileno())
    if not all(texts.values()):
        raise Refusal(
            f"corpus {corpus} has {sum(texts.values())} documents, too few to hold some out"
        )
    sha256 = {part: digest.hexdigest() for part, digest in digests.items()}
    python = sys.version.split()[0]
    return Sidecar(
        corpus, tokenizer, size, dtype.str, tokens, texts, largest, python, source, sha256
    )


Encode = Callable[[bytes], Integer[np.ndarray, " ids"]]


def _encoder(
    corpus: str, tokenizer: Tokenizer, vocabulary: int, out: Path, field: str
) -> tuple[Encode, int]:
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
    training = (text.decode() for text in documents(corpus, field=field) if not held_out(text))
    # In a thread of its own, since tokenizers do not heed an interrupt, but waiting for them does.
    thread = ThreadPoolExecutor(1)
    trained = thread.submit(bpe.train_from_iterator, training, trainer)
    thread.shutdown(wait=False)
    trained.result()
    bpe.save(str(out / "tokenizer.json"))
    end = [bpe.token_to_id(END)]
    return lambda text: np.array(bpe.encode(text.decode()).ids + end), bpe.get_vocab_size()


def sidecar(folder: Path) -> Sidecar:
    """The sidecar in this folder, checked against the files; `Refusal` where they differ."""
    path = folder / "tokens.json"
    try:
        records.regular(path)
        stored = Sidecar(**json.loads(path.read_text(encoding="utf-8")))
        _check(stored)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refusal(f"{path} does not describe token files ({errors.line(error)})") from None
    for part, name in FILES.items():
        file, expected = folder / name, stored.tokens[part] * np.dtype(stored.dtype).itemsize
        size = file.stat().st_size if records.regular(file) else 0
        if size != expected:
            raise Refusal(f"{file} has {size} bytes, not {expected} as tokens.json says")
    return stored


def _check(stored: Sidecar) -> None:
    """ValueError, TypeError or KeyError if it is not what `prepare` may have written."""
    for name, kind in get_type_hints(Sidecar).items():
        value, of = getattr(stored, name), kind
        values = [value]
        if get_origin(kind) is dict:
            values, of = [value[part] for part in FILES], get_args(kind)[1]
        if any(type(each) is not of for each in values):
            raise ValueError(f"{name} is of another type")
    if stored.dtype not in ("<u2", "<u4") or stored.tokenizer not in get_args(Tokenizer):
        raise ValueError("its dtype or tokenizer is none of this version's")
    if not 0 <= stored.largest_id < stored.vocabulary <= 2**32:
        raise ValueError("largest_id must be below vocabulary")


def verify(folder: Path) -> None:
    """`Refusal` unless the token files are what they were when they were made.

    Files of more than `READ` bytes are not read for that: their size has to do.
    """
    stored = sidecar(folder)
    for part, name in FILES.items():
        with (folder / name).open("rb") as file:
            if os.fstat(file.fileno()).st_size > READ:
                continue
            if hashlib.file_digest(file, "sha256").hexdigest() != stored.sha256.get(part):
                raise Refusal(f"{folder / name} is not what it was when it was made (sha256)")
