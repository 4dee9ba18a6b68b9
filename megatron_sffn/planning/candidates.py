"""The sizes of a layout, the flags of a run without them, and all sizes on a number of GPUs.

Inputs: the flags of a run. Outputs: a `Base`, and a `Candidate` for each layout, valid or not.

Design notes
- A size that a flag gives is kept; the others are powers of two, or divisors of the layers.
- The pattern of a hybrid model is parsed without its cuts. Each layout cuts it into its chunks,
  unless a flag cuts it: then its pieces are kept.
- No rule about recomputation depends on the layout, so it is checked once for all layouts.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.checks.megatron_rules import as_sentence
from megatron_sffn.flags.sffn_flags import sffn_config, transformer_config
from megatron_sffn.nn.layer_pattern import cut, pipeline_segments
from megatron_sffn.ops import Activation
from megatron_sffn.train.first_rank import parse_as_first_rank
from megatron_sffn.utils.errors import ConfigError

SIZES = {
    "--tensor-model-parallel-size": "tp",
    "--pipeline-model-parallel-size": "pp",
    "--num-virtual-stages-per-pipeline-rank": "virtual_stages",
    "--expert-model-parallel-size": "ep",
    "--expert-tensor-parallel-size": "etp",
    "--micro-batch-size": "micro_batch_size",
}
"""Flag of a size -> field of `Candidate`."""

HYBRID_PATTERN = "--hybrid-layer-pattern"

RECOMPUTATIONS: dict[str, dict[str, str | int]] = {
    "none": {},
    "selective": {"--recompute-granularity": "selective"},
    "full": {
        "--recompute-granularity": "full",
        "--recompute-method": "uniform",
        "--recompute-num-layers": 1,
    },
}
"""Recomputation of activations -> its flags: from the fastest to the smallest. `selective` computes
the attention scores again (Megatron's default module), `full` every layer, one by one."""

REFUSED = {
    "--num-layers-per-virtual-pipeline-stage": "use --num-virtual-stages-per-pipeline-rank",
    "--context-parallel-size": "leave it out, context parallelism is not counted",
}
"""Flag that a plan cannot keep -> what to do instead."""

LARGEST = {"tp": 8, "pp": 64, "virtual_stages": 8, "etp": 8, "micro_batch_size": 16}
"""Largest size that is tried, where no flag gives it."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The sizes of one layout, by the flags of `SIZES`.

    Args:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        virtual_stages: model chunks of a pipeline stage.
        ep: expert-parallel size.
        etp: expert-tensor-parallel size.
        micro_batch_size: sequences of a microbatch.
        pattern: `--hybrid-layer-pattern`, cut into the chunks of all stages, if a flag gives it.
        recompute: key of `RECOMPUTATIONS`; None for what the flags of the run give.
    """

    tp: int = 1
    pp: int = 1
    virtual_stages: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch_size: int = 1
    pattern: str | None = None
    recompute: str | None = None

    def flags(self) -> list[str]:
        """The sizes and the recomputation as flags of a run."""
        recompute = RECOMPUTATIONS[self.recompute or "none"]
        # The cuts of a pattern say how many chunks a stage has.
        largest_chunks = 1 if self.pattern is None else math.inf
        left_out = {"micro_batch_size": 0, "virtual_stages": largest_chunks}
        words = [
            word
            for flag, name in SIZES.items()
            if getattr(self, name) > left_out.get(name, 1)
            for word in (flag, str(getattr(self, name)))
        ]
        words += [] if self.pattern is None else [HYBRID_PATTERN, self.pattern]
        words += ["--sequence-parallel"] if self.tp > 1 else []
        return words + [str(word) for flag in recompute.items() for word in flag]


@dataclass(frozen=True, kw_only=True)
class Base:
    """The flags of a run, parsed on one rank.

    Args:
        flags: of the run, without sizes of the layout, and without the pattern of a hybrid model.
        pattern: `--hybrid-layer-pattern`, if a flag gives it.
        args: Megatron's namespace of these flags.
        given: sizes that flags of the run give.
        keeps_dispatcher: True if a flag gives the dispatcher.
        activation: name of the activation function.
        recomputations: keys of `RECOMPUTATIONS` to try; None alone if a flag gives it.
    """

    flags: tuple[str, ...]
    args: Namespace
    pattern: str | None
    given: dict[str, int]
    keeps_dispatcher: bool
    activation: str
    recomputations: tuple[str | None, ...]


def parse_base(flags: Sequence[str]) -> Base:
    """Parse the flags of a run without its layout.

    Args:
        flags: command line of the run.

    Raises:
        ConfigError: if a run would refuse them on one rank, or a plan cannot keep one.
    """
    given: dict[str, int] = {}
    rest: list[str] = []
    pattern: str | None = None
    words = iter(
        word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])
    )
    for word in words:
        if word in REFUSED:
            raise ConfigError(f"{word} is given, and a plan sets the layout; {REFUSED[word]}")
        if word == HYBRID_PATTERN:
            pattern = next(words, "")
            continue
        if word not in SIZES:
            rest += [] if word == "--sequence-parallel" else [word]
            continue
        value = next(words, "")
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"{word} {value} must be at least 1; give a positive number")
        given[SIZES[word]] = int(value)
    whole = [] if pattern is None else [HYBRID_PATTERN, pattern.replace(Symbols.PIPE, "")]
    args, _ = parse_as_first_rank([*rest, *whole], 1, device="cuda")
    if "," in args.sffn_router:
        raise ConfigError(
            f"--sffn-router {args.sffn_router} has layers of different times, which a plan does "
            "not add up; plan with each of its routers by itself"
        )
    if args.global_batch_size == args.micro_batch_size and "--global-batch-size" not in rest:
        raise ConfigError(
            "--global-batch-size is missing, and the time of a step depends on it; give the "
            "sequences of a step, for example 1024"
        )
    return Base(
        flags=tuple(rest),
        args=args,
        pattern=pattern,
        given=given,
        keeps_dispatcher="--moe-token-dispatcher-type" in rest,
        activation=Activation.of(transformer_config(args, sffn_config(args))).value,
        recomputations=_recomputations(args),
    )


def _recomputations(args: Namespace) -> tuple[str | None, ...]:
    """The recomputations that Megatron accepts with these flags; None if they give one."""
    if args.recompute_granularity is not None or args.moe_layer_recompute:
        return (None,)
    accepted = []
    for name in RECOMPUTATIONS:
        with contextlib.suppress(ConfigError), warnings.catch_warnings(action="ignore"):
            with as_sentence("accept these flags"):
                transformer_config(with_recomputation(args, name), sffn_config(args))
            accepted.append(name)
    return tuple(accepted)


def with_recomputation(args: Namespace, name: str | None) -> Namespace:
    """A copy of Megatron's namespace with a recomputation; None leaves that of the flags."""
    args = copy.copy(args)
    for flag, value in RECOMPUTATIONS[name or "none"].items():
        setattr(args, flag[2:].replace("-", "_"), value)
    return args


def candidates(base: Base, gpus: int) -> Iterator[Candidate]:
    """All sizes whose product fits the number of GPUs, valid or not."""
    powers = [2**power for power in range(gpus.bit_length()) if 2**power <= gpus]
    cuts = given_chunks(base)
    counts = (divided_layers(base), *([cuts] if cuts else []))
    divisors = [
        size
        for size in range(1, gpus + 1)
        if size in powers or any(count % size == 0 for count in counts)
    ]
    is_sparse = base.args.sffn_router != "dense"
    choices = {
        "tp": powers,
        "pp": divisors,
        "virtual_stages": [1, 2, 4, 8],
        "ep": powers if is_sparse else [1],
        "etp": powers if is_sparse else [1],
        "micro_batch_size": [1, 2, 4, 8, 16],
    }
    for name, largest in LARGEST.items():
        choices[name] = [size for size in choices[name] if size <= largest]
    if cuts is not None:
        choices["virtual_stages"] = [size for size in range(1, cuts + 1) if cuts % size == 0]
    choices |= {name: [size] for name, size in base.given.items()}
    for sizes in itertools.product(*choices.values()):
        candidate = Candidate(**dict(zip(choices, sizes, strict=True)))
        chunks = candidate.pp * candidate.virtual_stages
        if cuts not in (None, chunks):
            continue  # a given cut is kept, as a given size is
        if base.pattern is not None:
            if candidate.virtual_stages > 1 and cuts is None and divided_layers(base) % chunks:
                continue
            candidate = replace(candidate, pattern=cut_pattern(base, base.pattern, chunks))
        fits = candidate.tp * candidate.pp <= gpus
        fits &= candidate.ep * candidate.etp * candidate.pp <= gpus
        # One stage is not cut into chunks.
        if fits and (candidate.pp > 1 or candidate.virtual_stages == 1):
            yield candidate


def given_chunks(base: Base) -> int | None:
    """Chunks of all stages into which a flag cuts the pattern of a hybrid model; None without."""
    segments = pipeline_segments(base.pattern or "")
    return segments if segments > 1 else None


def divided_layers(base: Base) -> int:
    """The number of layers that stages divide: those of the GPT that a hybrid model follows."""
    is_derived = base.args.hybrid_layer_pattern is not None and base.pattern is None
    return base.args.num_layers // (2 if is_derived else 1)


def cut_pattern(base: Base, pattern: str, chunks: int) -> str:
    """The pattern in so many chunks; as it is if its layers cannot be cut so."""
    return pattern if divided_layers(base) % chunks else cut(pattern, chunks)
