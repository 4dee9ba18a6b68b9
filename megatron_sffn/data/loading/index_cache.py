"""Megatron's index caches: built once, whole, and on every disk that needs them.

Enters: what a run builds its data sets from. Leaves: Megatron's files, which say in what order the
samples of a data set come; in `--data-cache-path`, or beside each data set.

Choices
- Megatron's classes name the files and compute what is in them; here they are written under another
  name and renamed. Megatron itself writes in place, and takes what a kill left for whole.
- In Megatron global rank 0 writes, and the others read from a disk that all nodes share. Here the
  first rank of each node then looks whether its node has the files, and writes what is missing:
  nothing has to be said about the disks.
- Files of another length than the data set demands count as missing, and so do those by which a
  sample starts elsewhere than the documents say: the data set was made anew under the same name.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from numpy.typing import NDArray

from megatron_sffn.data.loading.stale_index import belongs, is_newer
from megatron_sffn.utils.atomic_files import atomic_path
from megatron_sffn.utils.errors import ConfigError

logger = logging.getLogger(__name__)

DESCRIPTION = "description.txt"
Sizes = Sequence[int | None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run builds its data sets from.

    Args:
        kind: class of the data sets.
        sizes: samples for training, validation and test; None for as many as there are.
        config: of the data sets.
    """

    kind: type[GPTDataset]
    sizes: Sizes
    config: GPTDatasetConfig


class IndexSet:
    """The index files of one data set or blend.

    Args:
        dataset: with paths instead of indices, and the config it is built with.
        folder: where the files are.
    """

    def __init__(self, dataset: GPTDataset | BlendedDataset, folder: Path) -> None:
        self._dataset, self._folder = dataset, folder
        length = len(dataset)
        # Array of the data set -> how many entries; None where that is not known.
        lengths: dict[str, int | None] = {"dataset_index": length, "dataset_sample_index": length}
        if isinstance(dataset, GPTDataset):
            lengths = {
                "document_index": None,
                "sample_index": length + 1,
                "shuffle_index": length,
            }
        self._lengths = lengths

    @property
    def title(self) -> str:
        """In words: `train of data/corpus_text_document`."""
        if isinstance(self._dataset, BlendedDataset):
            return f"{self._dataset.split.name}, blend of {len(self._dataset.datasets)}"
        return f"{self._dataset.index_split.name} of {self._dataset.dataset_path}"

    @property
    def paths(self) -> list[Path]:
        """The arrays, and the description, whose name differs in the last part alone."""
        names = [getattr(self._dataset, f"path_to_{name}") for name in self._lengths]
        end = f"{next(iter(self._lengths))}.npy"
        return [self._folder / name for name in (*names, names[0].removesuffix(end) + DESCRIPTION)]

    def is_whole(self) -> bool:
        """Whether all files are there, as long as they should be, and of the data set as it is."""
        *paths, description = self.paths
        if not description.is_file():
            return False
        for path, length in zip(paths, self._lengths.values(), strict=True):
            try:
                found = len(numpy.load(path, mmap_mode="r"))
            except (OSError, EOFError, ValueError):  # absent, or shorter than its head says
                return False
            if length not in (None, found):
                return False
        return not isinstance(self._dataset, GPTDataset) or self._is_of_the_data(description)

    def _is_of_the_data(self, description: Path) -> bool:
        """Whether the files are those of the data set as it is now."""
        dataset = self._dataset
        if isinstance(dataset, MockGPTDataset):
            return True
        if not is_newer(Path(f"{dataset.dataset.path_prefix}.idx"), description):
            return True
        documents, samples = (numpy.load(path, mmap_mode="r") for path in self.paths[:2])
        lengths = dataset.dataset.sequence_lengths
        return belongs(documents, samples, lengths, dataset.config.sequence_length)

    def write(self) -> None:
        """Compute and write the files.

        Raises:
            ConfigError: if they cannot be written.
        """
        *paths, description = self.paths
        arrays = self._arrays()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path, array in zip(paths, arrays, strict=True):
                with atomic_path(path) as partial, partial.open("wb") as file:
                    numpy.save(file, array)
            with atomic_path(description) as partial:
                partial.write_text(self._dataset.unique_description)
        except OSError as error:
            raise ConfigError(
                f"index caches cannot be written to {self._folder} ({error.strerror}); give "
                "--data-cache-path a folder that can be written"
            ) from error

    def _arrays(self) -> Sequence[NDArray[Any]]:
        """What belongs in the files, in the order of `_lengths`.

        Without a path Megatron computes it on every rank, and writes nothing.
        """
        dataset = copy.copy(self._dataset)
        dataset.config = _with(dataset.config, path_to_cache="", defer_npy_index_mmap=False)
        if isinstance(dataset, BlendedDataset):
            arrays: Sequence[NDArray[Any]] = dataset._build_indices()
        else:
            arrays = dataset._build_document_sample_shuffle_indices()
        return arrays


def index_sets(request: Request) -> list[IndexSet]:
    """Every set of index files that a run reads.

    Args:
        request: of the run; may be made on one rank alone.

    Returns:
        Those of the data sets before those of the blends of them.
    """
    cache = request.config.path_to_cache
    config = _with(
        request.config, path_to_cache="", defer_npy_index_mmap=True, fast_cache_load=False
    )
    sets, blends = [], []
    for dataset in _leaves(_Planner(request.kind, request.sizes, lambda: True, config).build()):
        if isinstance(dataset, BlendedDataset):
            # Without --data-cache-path every rank computes a blend for itself.
            blends += [IndexSet(dataset, Path(cache))] if cache else []
        elif cache or not config.mock:
            folder = cache or _default_folder(dataset)
            sets.append(IndexSet(dataset, Path(folder)))
    return [*sets, *blends]


def complete(
    request: Request, report: Callable[[int, int, IndexSet], None] = lambda *_: None
) -> tuple[int, int]:
    """Write the index files that are missing here.

    Args:
        request: of the run.
        report: called after each set that was written: how many are, how many were missing, which.

    Returns:
        Sets of files that the run reads, and how many of them were missing.

    Raises:
        ConfigError: if they cannot be written.
    """
    sets = index_sets(request)
    missing = [one for one in sets if not one.is_whole()]
    threads = request.config.num_dataset_builder_threads
    with _without_remarks(), ThreadPoolExecutor(threads) as pool:
        for done, one in enumerate(pool.map(_write, missing), 1):
            report(done, len(missing), one)
    return len(sets), len(missing)


def _write(one: IndexSet) -> IndexSet:
    one.write()
    return one


def complete_everywhere(request: Request) -> None:
    """Write the index files that are missing on any node; to be called by all ranks.

    Args:
        request: the same on all ranks, but for `path_to_cache`, which each node may have its own.

    Raises:
        ConfigError: if they cannot be written.
    """
    first = torch.distributed.get_rank() == 0
    if first:
        sets, missing = complete(request)
        logger.info(f"index files: {sets} sets, {missing} of them written now")
    torch.distributed.barrier()
    if not first and os.environ.get("LOCAL_RANK", "0") == "0":
        complete(request)
    torch.distributed.barrier()


class _Planner(BlendedMegatronDatasetBuilder):
    """Megatron's builder for one rank alone: it waits for no other."""

    @staticmethod
    def build_generic_dataset(
        cls: Any, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        """One data set; Megatron has rank 0 go first."""
        return cls(*args)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: Any, sizes_per_dataset: list[Sizes]
    ) -> list[list[Any]]:
        """For each split the data sets of a blend; Megatron has rank 0 go first."""
        build = self._build_megatron_dataset_splits
        with ThreadPoolExecutor(self.config.num_dataset_builder_threads) as pool:
            built = pool.map(build, prefixes, repeat(split), sizes_per_dataset)
            return [list(datasets) for datasets in zip(*built, strict=True)]


def _leaves(datasets: Sequence[Any]) -> Iterator[GPTDataset | BlendedDataset]:
    """Every data set, and every blend after those in it."""
    for dataset in datasets:
        if isinstance(dataset, list):
            yield from _leaves(dataset)
        elif isinstance(dataset, BlendedDataset):
            yield from _leaves(dataset.datasets)
            yield dataset
        elif dataset is not None:
            yield dataset


def _default_folder(dataset: GPTDataset) -> str:
    """Where Megatron looks without `--data-cache-path`."""
    return os.path.join(dataset.dataset.path_prefix, "cache", f"{type(dataset).__name__}_indices")


def _with(config: GPTDatasetConfig, **changes: Any) -> GPTDatasetConfig:
    """A config with other values; `dataclasses.replace` would check it again."""
    config = copy.copy(config)
    vars(config).update(changes)
    return config


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Without Megatron's warning that it cannot save, which is meant here."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
