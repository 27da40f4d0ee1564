"""Text as bytes: a corpus that lies on every machine, batches that can be drawn again, and a baseline.

The default corpus is the sources of the Python standard library. Files go to training or validation as a
whole, and the sequences of a step depend on (seed, step) alone: a resumed run continues the same stream, and one rank,
16 with an expert each, and a pipeline share the same sequences.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ds_moe_ep.errors import ConfigError

Size = tuple[int, int]  # sequences of a batch, tokens of a sequence
Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and target ids, both [sequences, tokens]

VALIDATION_EVERY = 10  # one file of ten
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib-dynload"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from and bytes to judge by, and the bytes' entropy as a baseline."""

    train: torch.Tensor
    validation: torch.Tensor

    def unigram_entropy(self) -> float:
        """Nats a validation byte costs a model that knows the training bytes' frequencies and nothing else.

        Every byte is counted once more than it was seen, so that an unseen one has a price.
        """
        seen = torch.bincount(self.train.int(), minlength=256).double() + 1
        to_judge = torch.bincount(self.validation.int(), minlength=256).double()
        price = math.log(float(seen.sum())) - seen.log()
        return float((to_judge * price).sum() / to_judge.sum())


def load_corpus(paths: Sequence[str] = (), max_bytes: int = 8_000_000) -> Corpus:
    """The corpus in `paths` (files, or folders with all their files), or the standard library's sources.

    Files come in an order that depends on their names alone, until `max_bytes` are read. A corpus of fewer
    than ten files is cut by its last tenth of bytes. Raises ConfigError where there is nothing to read.
    """
    named = sorted(files_of(paths) if paths else standard_library(), key=lambda item: fingerprint(item[0]))
    texts: list[bytes] = []
    for _, path in named:
        texts.append(path.read_bytes())
        if sum(map(len, texts)) >= max_bytes:
            break
    if len(texts) < VALIDATION_EVERY:
        whole = b"".join(texts)[:max_bytes]
        train, validation = whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]
    else:
        validation = b"".join(texts[VALIDATION_EVERY - 1 :: VALIDATION_EVERY])
        train = b"".join(text for i, text in enumerate(texts) if i % VALIDATION_EVERY != VALIDATION_EVERY - 1)
    if not validation:
        raise ConfigError(f"data={' '.join(paths)}: no text found; name files or folders that hold some")
    return Corpus(as_bytes(train), as_bytes(validation))


def standard_library() -> Iterator[tuple[str, Path]]:
    """The names and paths of the standard library's sources, without its tests."""
    root = Path(os.__file__).parent
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts):
            yield relative.as_posix(), path


def files_of(paths: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The names and paths of all files that `paths` name."""
    for given in map(Path, paths):
        if given.is_dir():
            yield from ((p.relative_to(given).as_posix(), p) for p in given.rglob("*") if p.is_file())
        elif given.is_file():
            yield given.name, given
        else:
            raise ConfigError(f"data={given}: no such file or folder; name ones that exist")


def fingerprint(*values: object) -> int:
    """A number of 63 bits that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "big") >> 1


def as_bytes(text: bytes) -> torch.Tensor:
    """The bytes of a text as a tensor of uint8."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def training_batch(text: torch.Tensor, size: Size, *, seed: int, step: int, first: int, num_sequences: int) -> Batch:
    """Sequences `first` and following of the `num_sequences` of an optimizer step: random windows of `text`."""
    generator = torch.Generator().manual_seed(fingerprint(seed, step))
    starts = torch.randint(last_start(text, size) + 1, (num_sequences,), generator=generator)
    return windows(text, starts[first : first + size[0]], size)


def micro_batch_starts(count: int, rank: int, num_ranks: int, accumulation: int) -> range:
    """First sequences of a rank's micro-batches of `count` in a step: ranks lie side by side in each micro-step."""
    return range(rank * count, accumulation * num_ranks * count, num_ranks * count)


def micro_batches(
    text: torch.Tensor, size: Size, *, seed: int, step: int, rank: int, num_ranks: int, accumulation: int
) -> Iterator[Batch]:
    """The micro-batches of one of `num_ranks` data-parallel ranks in an optimizer step, of `size` each."""
    share = {"seed": seed, "step": step, "num_sequences": accumulation * num_ranks * size[0]}
    for first in micro_batch_starts(size[0], rank, num_ranks, accumulation):
        yield training_batch(text, size, first=first, **share)


def validation_batch(text: torch.Tensor, size: Size, *, index: int, num_batches: int) -> Batch:
    """Batch `index` of `num_batches` whose windows lie evenly spread over `text`, the same in every run."""
    places = torch.arange(index * size[0], (index + 1) * size[0], dtype=torch.float64)
    starts = (places / (num_batches * size[0]) * last_start(text, size)).long()
    return windows(text, starts, size)


def last_start(text: torch.Tensor, size: Size) -> int:
    """The last place where a window and the byte after it fit. Raises ConfigError where none does."""
    if len(text) <= size[1]:
        raise ConfigError(
            f"data: {len(text)} bytes hold no sequence of {size[1]} and the byte after it; give more text"
        )
    return len(text) - size[1] - 1


def windows(text: torch.Tensor, starts: torch.Tensor, size: Size) -> Batch:
    """Token ids at `starts`, and the ids one byte later as their targets."""
    ids = text[starts[:, None] + torch.arange(size[1] + 1)].long()
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
