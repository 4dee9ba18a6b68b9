"""Reads a study: a YAML file that lists the runs of an experiment.

Inputs: the file. Outputs: a `Study`, and a `StudyRun` for each combination of a point with a seed
and a learning rate.

Design notes: a flag whose value is a list stands for one run per value, and a mapping with several
lists for every combination. So a grid is one entry of `points`, and a list of models several.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_sffn.study.learning_rates import FITTED, LADDER, TRANSFERRED
from megatron_sffn.utils.errors import ConfigError

KEYS = (
    *("folder", "flags", "points", "each", "ranks", "parallel", "match", "target-flops"),
    *("include", "sizes", "ladder", "ladder-steps", "ladder-extra", "transfer", "slurm"),
)
MATCHES = ("active", "parameters")
RUNS = "runs"
"""Folder of the folders of runs in that of a study."""
LABELS = {
    "sffn-router": "",
    "sffn-block-size": "g",
    "sffn-expansion": "E",
    "ffn-hidden-size": "k",
    "num-layers": "L",
    "hidden-size": "D",
    "seed": "seed",
    "lr": "lr",
}
"""Flag -> what stands before its value in the name of a run; of other flags it is `flag=`."""
NOT_IN_POINT = ("seed", "lr")
"""Flags of runs that are compared as one point: its seeds and its ladder of learning rates."""
SET_BY_SWEEP = ("save", "load", "tensorboard-dir", "exit-signal")
"""Flags with a value for each run, which `sweep` gives."""


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study.

    Args:
        name: of its folder; unique in the study.
        point: the name without seed and learning rate.
        settings: flag without dashes -> value, of the flags in which the runs differ.
        flags: command line of the run, without the flags that `sweep` sets.
        in_ladder: True if the run only serves to find the learning rate of its point.
        beyond_edge: 0 for a rate of the file. i for the i-th rate above the ladder and -i for the
            i-th below it, which are trained only if the best rate so far is beside them.
    """

    name: str
    point: str
    settings: Mapping[str, Any]
    flags: tuple[str, ...]
    in_ladder: bool = False
    beyond_edge: int = 0

    @property
    def rate_source(self) -> str:
        """Where the learning rate is from: "given", "ladder", "fitted" or "transferred"."""
        if self.in_ladder:
            return LADDER
        rate = self.settings.get("lr")
        return str(rate) if rate in (FITTED, TRANSFERRED) else "given"

    def with_flag(self, name: str, value: float) -> StudyRun:
        """The run with one more flag, whose value has three digits or is whole."""
        text = str(value) if isinstance(value, int) else f"{value:.3g}"
        return dataclasses.replace(self, flags=(*self.flags, f"--{name}", text))


@dataclass(frozen=True, kw_only=True)
class Study:
    """The content of a study's file.

    Args:
        folder: of all results, relative to the working directory.
        runs: all runs, in the order in which they are started.
        ranks: number of ranks of each run.
        parallel: number of runs at the same time.
        match: "active": runs keep their flags, so that a token has as many active cells in all of
            them. "parameters": dense runs get the total parameters of the first sparse run.
        target_flops: training FLOPs of each run, which determine its steps; None if flags do.
        ladder_steps: share of these steps that runs of a ladder train.
        transfer: folder of the study whose results give the learning rates that are transferred.
        slurm: parameter of sbatch, with underscores -> value, for the action `submit`.
    """

    folder: Path
    runs: tuple[StudyRun, ...]
    ranks: int = 1
    parallel: int = 1
    match: str = "active"
    target_flops: float | None = None
    ladder_steps: float = 1.0
    transfer: Path | None = None
    slurm: Mapping[str, Any] = field(default_factory=dict)

    def folder_of(self, name: str) -> Path:
        """The folder of the run of a name."""
        return self.folder / RUNS / name


def read_study(path: Path, size: str | None = None) -> Study:
    """Read and check the file of a study.

    Args:
        path: of the file.
        size: one of the file's `sizes`; None for the first, if there are any.

    Raises:
        ConfigError: if the file cannot be read, a key is unknown or missing, or a value is of the
            wrong kind.
    """
    content = _of_size(path, _with_included(path), size)
    for key in ("folder", "flags", "points"):
        if not content.get(key):
            raise ConfigError(f"{path}: the key {key} is missing; docs/studies.md has an example")
    match, target = content.get("match", "active"), content.get("target-flops")
    if match not in MATCHES:
        raise ConfigError(f"{path}: match {match} is unknown; choose of {', '.join(MATCHES)}")
    flags = _common_flags(path, content["flags"])
    if target is not None and "--train-iters" in flags:
        raise ConfigError(
            f"{path}: target-flops {target} determines the steps of each run, but flags has "
            "--train-iters too; remove one of them"
        )
    return Study(
        folder=Path(str(content["folder"])),
        runs=_runs(path, flags, content),
        ranks=_count(path, content, "ranks"),
        parallel=_count(path, content, "parallel"),
        match=match,
        target_flops=None if target is None else _flops(path, target),
        ladder_steps=_share(path, content.get("ladder-steps", 1.0)),
        transfer=Path(str(content["transfer"])) if "transfer" in content else None,
        slurm=_slurm(path, content.get("slurm") or {}),
    )


def _with_included(path: Path) -> dict[str, Any]:
    """The content of a file and of the file that it includes; its own keys win, flags add up."""
    content = _content(path)
    _check_keys(path, content)
    for keys in (content.get("sizes") or {}).values():
        _check_keys(path, _mapping(path, keys))
    if "include" not in content:
        return content
    return _merged(_with_included(path.parent / str(content["include"])), content)


def _check_keys(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        if key not in KEYS:
            raise ConfigError(f"{path}: the key {key} is unknown; {known_names(str(key), KEYS)}")


def known_names(unknown: str, known: Sequence[str]) -> str:
    """The remedy for an unknown name: the most similar known one, or all of them."""
    nearest = difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"


def _merged(base: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings of keys; those of the second win, and its flags follow those of the first.

    Sizes of one name are merged in the same way.
    """
    merged = {**base, **content}
    if flags := " ".join(_text(keys["flags"]) for keys in (base, content) if "flags" in keys):
        merged["flags"] = flags
    if "sizes" in base and "sizes" in content:
        sizes = (base["sizes"], content["sizes"])
        names = dict.fromkeys(name for keys in sizes for name in keys)
        merged["sizes"] = {name: _merged(*(keys.get(name, {}) for keys in sizes)) for name in names}
    return merged


def _text(flags: Any) -> str:
    """Flags, which may be a list of texts."""
    return " ".join(map(str, flags)) if isinstance(flags, list) else str(flags)


def _of_size(path: Path, content: dict[str, Any], size: str | None) -> dict[str, Any]:
    """The keys of a study in one of its sizes."""
    sizes = content.pop("sizes", {})
    if not sizes and size is None:
        return content
    name = size or next(iter(sizes))
    if name not in sizes:
        known = f"choose of {', '.join(sizes)}" if sizes else "the file has no sizes"
        raise ConfigError(f"--size {name} is unknown in {path}; {known}")
    merged = _merged(content, _mapping(path, sizes[name]))
    return {**merged, "folder": f"{content.get('folder')}/{name}"}


def _content(path: Path) -> dict[str, Any]:
    """The YAML of a file, which has to be a mapping."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give the YAML file of a study"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} has no keys; docs/studies.md has an example")
    return content


def _common_flags(path: Path, flags: Any) -> tuple[str, ...]:
    """The flags of every run, as words."""
    if not isinstance(flags, str | list):
        raise ConfigError(f"{path}: flags has to be text, as on a command line; write flags: |")
    words = tuple(shlex.split(_text(flags), comments=True))
    for word in words:
        _check_flag(path, word.removeprefix("--").partition("=")[0])
    return words


def _check_flag(path: Path, name: str) -> None:
    if name in SET_BY_SWEEP:
        raise ConfigError(f"{path}: --{name} differs from run to run and is set for you; remove it")


def _count(path: Path, content: Mapping[str, Any], key: str, least: int = 1) -> int:
    """A whole number of the file; the least one if it is not given."""
    value = content.get(key, least)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{path}: {key} {value} is no whole number from {least} up; correct it")
    return value


def _flops(path: Path, value: Any) -> float:
    """A number of FLOPs; YAML reads 1e15 as text."""
    try:
        flops = float(value)
    except (TypeError, ValueError):
        flops = 0.0
    if not flops > 0:
        raise ConfigError(f"{path}: target-flops {value} is no positive number; write 1e15")
    return flops


def _share(path: Path, value: Any) -> float:
    """A share of the steps of a run."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ConfigError(
            f"{path}: ladder-steps {value} is no share of the steps; give a number above 0, and 1 "
            "at most"
        )
    return float(value)


def _slurm(path: Path, value: Any) -> dict[str, Any]:
    """The parameters of Slurm; `submit` checks their names."""
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: slurm {value!r} has to be parameters of sbatch with their values; write for "
            "example {partition: gpu, time: 240}"
        )
    return {str(name).replace("-", "_"): setting for name, setting in value.items()}


def _runs(path: Path, flags: Sequence[str], content: Mapping[str, Any]) -> tuple[StudyRun, ...]:
    """A run for each point, seed and learning rate; those of ladders come first."""
    points = content["points"]
    if not isinstance(points, list):
        raise ConfigError(f"{path}: points has to be a list; begin each point with a dash")
    ladder, each = (_mapping(path, content.get(key) or {}) for key in ("ladder", "each"))
    beyond = _rates_beyond(path, ladder, _count(path, content, "ladder-extra", least=0))
    rungs = [(ladder, True, 0)]
    rungs += [({**ladder, "lr": rate}, True, place) for place, rate in beyond.items()]
    of_all = {flag: value for flag, value in each.items() if flag not in NOT_IN_POINT}
    runs: dict[str, StudyRun] = {}
    for added, in_ladder, place in (*rungs, (each, False, 0)):
        for point in points if added or not in_ladder else []:
            named = {**_mapping(path, point), **of_all}
            for settings in _combinations(path, {**named, **added}):
                run = _run(flags, settings, in_ladder, place)
                if run.name in runs:
                    raise ConfigError(
                        f"{path}: the run {run.name} is listed twice; remove one of them"
                    )
                runs[run.name] = run
    _check_rates(path, runs.values(), ladder, content)
    return tuple(runs.values())


def _rates_beyond(path: Path, ladder: Mapping[str, Any], number: int) -> dict[int, str]:
    """Place -> learning rate beyond the edges of a ladder, in the steps between its last two."""
    if number == 0:
        return {}
    try:
        rates = sorted(map(float, ladder.get("lr", [])))
    except (TypeError, ValueError):
        rates = []
    if len(set(rates)) < 2 or rates[0] <= 0:
        raise ConfigError(
            f"{path}: ladder-extra {number} goes on in the steps of the ladder, which needs two "
            "learning rates; add for example ladder: {seed: 1, lr: [1e-3, 2e-3]}"
        )
    places = range(1, number + 1)
    below = {-place: rates[0] * (rates[0] / rates[1]) ** place for place in places}
    above = {place: rates[-1] * (rates[-1] / rates[-2]) ** place for place in places}
    return {place: f"{rate:.2g}" for place, rate in {**below, **above}.items()}


def _check_rates(
    path: Path, runs: Iterable[StudyRun], ladder: Mapping[str, Any], content: Mapping[str, Any]
) -> None:
    """Refuse learning rates that are to come from a ladder or a study that is not named."""
    sources = {run.rate_source for run in runs}
    if FITTED in sources and not isinstance(ladder.get("lr"), list):
        raise ConfigError(
            f"{path}: lr {FITTED} needs a ladder of learning rates; add for example "
            "ladder: {seed: 1, lr: [1e-3, 2e-3, 4e-3]}"
        )
    if TRANSFERRED in sources and "transfer" not in content:
        raise ConfigError(
            f"{path}: lr {TRANSFERRED} needs the folder of a study that has tuned its learning "
            "rates; add for example transfer: runs/studies/block_size/cpu"
        )


def _mapping(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: {value!r} has to be flags with their values; write for example "
            "{sffn-router: avg-k, sffn-block-size: [4, 16]}"
        )
    return {str(flag).removeprefix("--"): setting for flag, setting in value.items()}


def _combinations(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values of lists."""
    for flag, value in settings.items():
        _check_flag(path, flag)
        if value == [] or isinstance(value, dict):
            raise ConfigError(f"{path}: {flag} has no value that a flag takes; give one or a list")
    lists = [value if isinstance(value, list) else [value] for value in settings.values()]
    return [dict(zip(settings, values, strict=True)) for values in itertools.product(*lists)]


def _run(
    common: Sequence[str], settings: Mapping[str, Any], in_ladder: bool, beyond_edge: int
) -> StudyRun:
    """The run of a combination."""
    words = list(common)
    for flag, value in settings.items():
        if value is True:
            words.append(f"--{flag}")
        elif value is not None and value is not False and not _is_derived_rate(flag, value):
            words += [f"--{flag}", *shlex.split(str(value))]
    point = {flag: value for flag, value in settings.items() if flag not in NOT_IN_POINT}
    return StudyRun(
        name=_name(settings),
        point=_name(point) or "all",
        settings=settings,
        flags=tuple(words),
        in_ladder=in_ladder,
        beyond_edge=beyond_edge,
    )


def _is_derived_rate(flag: str, value: Any) -> bool:
    return flag == "lr" and value in (FITTED, TRANSFERRED)


def _name(settings: Mapping[str, Any]) -> str:
    """The settings as the name of a folder."""
    parts = []
    for flag, value in settings.items():
        if value is True:
            parts.append(flag.removeprefix("sffn-"))
        elif value is not None and value is not False:
            label = LABELS.get(flag, f"{flag.removeprefix('sffn-')}=")
            parts.append(label + re.sub(r"[^\w.+-]+", "_", str(value)))
    return "-".join(parts)
