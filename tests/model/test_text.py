import math
from pathlib import Path

import pytest
import torch

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model.text import Corpus, as_bytes, load_corpus, training_batch, validation_batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"file {i:03d} " * (i + 1))
    return tmp_path


def test_default_corpus_is_the_standard_library_and_the_same_each_time() -> None:
    corpus = load_corpus(max_bytes=300_000)
    again = load_corpus(max_bytes=300_000)
    assert torch.equal(corpus.train, again.train) and torch.equal(corpus.validation, again.validation)
    assert b"import" in corpus.train.numpy().tobytes()
    assert 0 < len(corpus.validation) < len(corpus.train)


def test_each_file_goes_whole_to_training_or_validation(folder: Path) -> None:
    corpus = load_corpus([str(folder)])
    train, validation = corpus.train.numpy().tobytes(), corpus.validation.numpy().tobytes()
    in_train = [f"file {i:03d} ".encode() * (i + 1) in train for i in range(40)]
    in_validation = [f"file {i:03d} ".encode() * (i + 1) in validation for i in range(40)]
    assert sum(in_validation) == 4
    assert all(a != b for a, b in zip(in_train, in_validation, strict=True))
    assert len(train) + len(validation) == sum(9 * (i + 1) for i in range(40))


def test_order_does_not_depend_on_where_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    expected = load_corpus([str(folder)])
    for path in folder.glob("*.txt"):
        path.rename(moved / path.name)
    assert torch.equal(load_corpus([str(moved)]).train, expected.train)


def test_a_single_file_is_cut_by_bytes(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(100)))
    corpus = load_corpus([str(path)])
    assert corpus.train.tolist() == list(range(90))
    assert corpus.validation.tolist() == list(range(90, 100))


def test_size_is_capped_at_the_file_that_crosses_it(folder: Path) -> None:
    corpus = load_corpus([str(folder)], max_bytes=2000)
    assert 2000 <= len(corpus.train) + len(corpus.validation) <= 2000 + 9 * 40


@pytest.mark.parametrize("name", ["absent.txt", "empty"])
def test_nothing_to_read_is_an_error_that_names_the_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"data=.*{name}"):
        load_corpus([str(tmp_path / name)])


def drawn(
    text: torch.Tensor, sequences: int, *, seed: int = 0, step: int = 0, first: int = 0, of: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of 16 bytes from place `first` on, among the `of` of a step."""
    return training_batch(text, (sequences, 16), seed=seed, step=step, first=first, num_sequences=of)


def test_targets_are_the_bytes_that_follow() -> None:
    tokens, targets = drawn(torch.arange(200, dtype=torch.uint8), 5, step=3, first=1)
    assert tokens.shape == targets.shape == (5, 16)
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_the_sequences_of_a_step_depend_on_seed_and_step_alone() -> None:
    text = torch.arange(250, dtype=torch.uint8)
    first, _ = drawn(text, 8)
    torch.manual_seed(99)
    assert torch.equal(drawn(text, 8)[0], first)
    for other in ({"seed": 1}, {"step": 1}, {"first": 8}):
        assert not torch.equal(drawn(text, 8, **other)[0], first)


@pytest.mark.parametrize("of_rank", [1, 2, 4, 16])
def test_one_rank_and_sixteen_share_the_same_sequences_by_place(of_rank: int) -> None:
    """16 ranks with a sequence each, a pipeline with 4 micro-batches of 4, one device with all: one step."""
    text = torch.arange(250, dtype=torch.uint8)
    whole = drawn(text, 16, seed=7, step=2)
    shares = [drawn(text, of_rank, seed=7, step=2, first=place) for place in range(0, 16, of_rank)]
    for side in (0, 1):
        assert torch.equal(torch.cat([share[side] for share in shares]), whole[side])
    assert len({tuple(row) for row in whole[0].tolist()}) > 12, "places hold different sequences"


def test_a_text_that_just_fits_one_window_serves_and_a_shorter_one_is_refused() -> None:
    text = torch.arange(17, dtype=torch.uint8)
    tokens, _ = drawn(text, 3)
    assert tokens.tolist() == [list(range(16))] * 3
    with pytest.raises(ConfigError, match="16 bytes hold no sequence of 16"):
        drawn(text[:16], 3)


def test_validation_windows_spread_evenly_and_do_not_depend_on_how_they_are_cut() -> None:
    text = torch.arange(240, dtype=torch.uint8)
    by_two = [validation_batch(text, (4, 10), index=i, num_batches=2)[0] for i in range(2)]
    by_eight = [validation_batch(text, (1, 10), index=i, num_batches=8)[0] for i in range(8)]
    assert torch.equal(torch.cat(by_two), torch.cat(by_eight))
    steps = torch.cat(by_two)[:, 0].diff()
    assert steps.min() >= steps.max() - 1
    assert by_two[0][0, 0] == 0


def test_unigram_entropy_of_a_known_text() -> None:
    train, validation = as_bytes(b"a" * 3 + b"b"), as_bytes(b"ab")
    prices = [-math.log((3 + 1) / (4 + 256)), -math.log((1 + 1) / (4 + 256))]
    assert Corpus(train, validation).unigram_entropy() == pytest.approx(sum(prices) / 2)
