"""Writes Megatron's index files once, atomically, and on every disk that needs them.

Inputs: the request from which a run builds its data sets. Outputs: Megatron's index files, which
have the order of the samples of each data set, in `--data-cache-path` or beside the data set.

Design notes:
- Megatron's classes name the files and compute their content; we write them atomically. Megatron
  writes in place, and takes a file that a kill truncated for a complete one.
- In Megatron global rank 0 writes, and the other ranks read from a shared disk. Here the first rank
  of each node then writes the files that its node does not see, so disks may be local or shared.
- A file counts as missing if its length does not fit the data set, or if a sample does not start
  where the lengths of the documents say: the data set was written again under the same name.
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
    """The data sets that a run builds.

    Args:
        kind: class of the data sets.
        sizes: numbers of samples for training, validation and test; None: all.
        config: config of the data sets.
    """

    kind: type[GPTDataset]
    sizes: Sizes
    config: GPTDatasetConfig


class IndexSet:
    """The index files of one data set or blend.

    Args:
        dataset: a data set built without its indices.
        folder: folder of the files.
    """

    def __init__(self, dataset: GPTDataset | BlendedDataset, folder: Path) -> None:
        self._dataset, self._folder = dataset, folder
        length = len(dataset)
        # Array of the data set -> number of entries; None if it is unknown.
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
        """Name for messages: `train of data/corpus_text_document`."""
        if isinstance(self._dataset, BlendedDataset):
            return f"{self._dataset.split.name}, blend of {len(self._dataset.datasets)}"
        return f"{self._dataset.index_split.name} of {self._dataset.dataset_path}"

    @property
    def paths(self) -> list[Path]:
        """Paths of the arrays and of the description, which differ in the last part of the name."""
        names = [getattr(self._dataset, f"path_to_{name}") for name in self._lengths]
        end = f"{next(iter(self._lengths))}.npy"
        return [self._folder / name for name in (*names, names[0].removesuffix(end) + DESCRIPTION)]

    def is_complete(self) -> bool:
        """True if all files exist, have the right length, and belong to the present data set."""
        *paths, description = self.paths
        if not description.is_file():
            return False
        for path, length in zip(paths, self._lengths.values(), strict=True):
            try:
                actual_length = len(numpy.load(path, mmap_mode="r"))
            except (OSError, EOFError, ValueError):  # the file is missing or truncated
                return False
            if length not in (None, actual_length):
                return False
        return not isinstance(self._dataset, GPTDataset) or self._belongs_to_dataset(description)

    def _belongs_to_dataset(self, description: Path) -> bool:
        """True if the files were written for the present data set."""
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
            ConfigError: they cannot be written.
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
        """Compute the arrays, in the order of `_lengths`.

        Without a cache path Megatron computes them and writes nothing.
        """
        dataset = copy.copy(self._dataset)
        dataset.config = _with(dataset.config, path_to_cache="", defer_npy_index_mmap=False)
        if isinstance(dataset, BlendedDataset):
            arrays: Sequence[NDArray[Any]] = dataset._build_indices()
        else:
            arrays = dataset._build_document_sample_shuffle_indices()
        return arrays


def index_sets(request: Request) -> list[IndexSet]:
    """All sets of index files that a run reads; may be called on one rank alone.

    Args:
        request: the data sets of the run.

    Returns:
        The sets of all data sets, then the sets of their blends.
    """
    cache = request.config.path_to_cache
    config = _with(
        request.config, path_to_cache="", defer_npy_index_mmap=True, fast_cache_load=False
    )
    sets, blends = [], []
    for dataset in _leaves(_Planner(request.kind, request.sizes, lambda: True, config).build()):
        if isinstance(dataset, BlendedDataset):
            # Without --data-cache-path every rank computes its blends itself.
            blends += [IndexSet(dataset, Path(cache))] if cache else []
        elif cache or not config.mock:
            folder = cache or _default_folder(dataset)
            sets.append(IndexSet(dataset, Path(folder)))
    return [*sets, *blends]


def complete(
    request: Request, report: Callable[[int, int, IndexSet], None] = lambda *_: None
) -> tuple[int, int]:
    """Write the index files that this node does not see.

    Args:
        request: the data sets of the run.
        report: called after each written set, with the number of written sets, the number of
            missing ones, and the set.

    Returns:
        The number of sets that the run reads, and the number of missing ones.

    Raises:
        ConfigError: they cannot be written.
    """
    sets = index_sets(request)
    missing = [index_set for index_set in sets if not index_set.is_complete()]
    threads = request.config.num_dataset_builder_threads
    with _without_save_warnings(), ThreadPoolExecutor(threads) as pool:
        for num_written, index_set in enumerate(pool.map(_write, missing), 1):
            report(num_written, len(missing), index_set)
    return len(sets), len(missing)


def _write(index_set: IndexSet) -> IndexSet:
    index_set.write()
    return index_set


def complete_everywhere(request: Request) -> None:
    """Write the index files that are missing on any node; a collective call of all ranks.

    Args:
        request: the same on all ranks, except `path_to_cache`, which may differ between nodes.

    Raises:
        ConfigError: they cannot be written.
    """
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        sets, missing = complete(request)
        logger.info(f"index files: {sets} sets, {missing} of them written now")
    torch.distributed.barrier()
    if not is_first and os.environ.get("LOCAL_RANK", "0") == "0":
        complete(request)
    torch.distributed.barrier()


class _Planner(BlendedMegatronDatasetBuilder):
    """Megatron's builder for one rank alone: it does not wait for other ranks."""

    @staticmethod
    def build_generic_dataset(
        cls: Any, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        """Build one data set; in Megatron the other ranks wait for rank 0."""
        return cls(*args)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: Any, sizes_per_dataset: list[Sizes]
    ) -> list[list[Any]]:
        """Build the data sets of a blend for each split; in Megatron the others wait for rank 0."""
        build = self._build_megatron_dataset_splits
        with ThreadPoolExecutor(self.config.num_dataset_builder_threads) as pool:
            built = pool.map(build, prefixes, repeat(split), sizes_per_dataset)
            return [list(datasets) for datasets in zip(*built, strict=True)]


def _leaves(datasets: Sequence[Any]) -> Iterator[GPTDataset | BlendedDataset]:
    """All data sets, and each blend after its data sets."""
    for dataset in datasets:
        if isinstance(dataset, list):
            yield from _leaves(dataset)
        elif isinstance(dataset, BlendedDataset):
            yield from _leaves(dataset.datasets)
            yield dataset
        elif dataset is not None:
            yield dataset


def _default_folder(dataset: GPTDataset) -> str:
    """The folder in which Megatron looks without `--data-cache-path`."""
    return os.path.join(dataset.dataset.path_prefix, "cache", f"{type(dataset).__name__}_indices")


def _with(config: GPTDatasetConfig, **changes: Any) -> GPTDatasetConfig:
    """A copy of a config with changed values; `dataclasses.replace` would validate it again."""
    config = copy.copy(config)
    vars(config).update(changes)
    return config


@contextlib.contextmanager
def _without_save_warnings() -> Iterator[None]:
    """Silence Megatron's warning that it cannot save the indices, which is intended here."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
