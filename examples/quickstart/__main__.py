"""The quick start: `python -m examples.quickstart` (`make quickstart`).

Outputs: a folder with two finished pretraining runs, dense and Avg-K, and `report.html`, which
compares them; the same table on the terminal, ten generated lines, and the commands to go on.

Design notes: a step whose complete output exists is skipped, and a training run resumes from its
newest checkpoint. So the same command resumes after Ctrl-C, a crash or a reboot. `settings.json`
records the experiment of a folder, so that a folder holds only one.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from examples.quickstart import corpus, data, samples
from examples.quickstart.runs import RUNS, TRAIN_ITERS, VOCAB_SIZE, Plan, Run, environment
from megatron_sffn.study.running.launch import RunFailedError, launch
from megatron_sffn.train.log_status import clock
from megatron_sffn.utils.errors import CommandParser, ConfigError, require, run_command

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
SETTINGS = "settings.json"


class Steps:
    """Prints headings with a number and the time since the start."""

    def __init__(self, total: int) -> None:
        self._total, self._number, self._start = total, 0, time.monotonic()

    @property
    def elapsed(self) -> str:
        """Time since the start."""
        return clock(time.monotonic() - self._start)

    def begin(self, title: str) -> None:
        """Announce the next step."""
        self._number += 1
        log(f"[{self._number}/{self._total}] {self.elapsed} {title}")


def log(message: str) -> None:
    """Print a line of progress."""
    print(message, file=sys.stderr, flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = CommandParser(
        prog="python -m examples.quickstart",
        description="Train two small language models on real text, one dense and one with Avg-K "
        "sparse layers\nof the same active cells, on 2 CPU ranks, and compare them.\n"
        "Interrupt it when you like: the same command continues.",
    )
    parser.add_argument(
        "--corpus",
        default=os.environ.get("CORPUS") or "stdlib",
        help="stdlib: source text of this Python's standard library; debian-docs: prose from "
        "Debian's documentation packages, which apt-get downloads (default: $CORPUS or stdlib)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=os.environ.get("SEED") or 1234,
        help="seed of the weights and of the order of the data (default: $SEED or 1234)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder of all results (default: runs/quickstart)",
    )
    parser.add_argument(
        "--train-iters",
        type=int,
        default=TRAIN_ITERS,
        help=f"training steps of each run (default: {TRAIN_ITERS})",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="remove former runs in the folder, keep the corpus"
    )
    args = parser.parse_args(argv)
    if args.corpus not in corpus.KINDS:
        raise ConfigError(
            f"--corpus {args.corpus} is unknown; choose one of: {', '.join(corpus.KINDS)}"
        )
    if args.train_iters < 1:
        raise ConfigError(f"--train-iters {args.train_iters} is less than 1; give at least 1")
    if args.seed < 1:
        raise ConfigError(f"--seed {args.seed} is less than 1, which Megatron needs; give another")
    if args.folder.exists() and not args.folder.is_dir():
        raise ConfigError(f"--folder {args.folder} is a file; give the path of a folder")
    return args


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, because two quick starts would overwrite each other's checkpoints.

    Raises:
        ConfigError: if another quick start uses the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"--folder {folder} cannot be written ({error.strerror}); give another --folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--folder {folder} is in use by another quick start; wait for its end, or give "
                "another --folder"
            ) from None
        yield


def settings_of(plan: Plan, kind: str) -> dict[str, object]:
    """The settings that determine the results in a folder."""
    return {
        "corpus": [kind, corpus.RECIPE],
        # The text of the standard library depends on it.
        "python": platform.python_version(),
        "vocab_size": VOCAB_SIZE,
        "runs": {run.name: plan.flags(run) for run in RUNS},
    }


def claim_folder(plan: Plan, settings: dict[str, object], *, fresh: bool) -> None:
    """Make sure that the content of the folder belongs to this experiment.

    Raises:
        ConfigError: if it belongs to another experiment and `fresh` is off; nothing is changed.
    """
    path = plan.folder / SETTINGS
    # A folder without settings.json may not be of a quick start, so nothing is removed from it.
    if fresh and path.exists():
        for name in ("data", *(run.name for run in RUNS)):
            shutil.rmtree(plan.folder / name, ignore_errors=True)
        for name in ("report.html", SETTINGS):
            (plan.folder / name).unlink(missing_ok=True)
    try:
        saved_settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    if saved_settings != settings:
        differing = next(key for key in settings if saved_settings.get(key) != settings[key])
        raise ConfigError(
            f"--folder {plan.folder} holds a quick start with other settings ({differing} differ); "
            "add --fresh to replace it, or give another --folder"
        )


def run_steps(plan: Plan, args: argparse.Namespace) -> None:
    """Run all steps in order, except those whose output exists."""
    settings = settings_of(plan, args.corpus)
    claim_folder(plan, settings, fresh=args.fresh)
    steps = Steps(total=5 + len(RUNS))

    steps.begin(f"corpus: {args.corpus}")
    text = corpus.build_corpus(args.corpus, plan.folder / "corpus")
    # Written only now: if a corpus cannot be built, the folder stays free for another one.
    (plan.folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    folder = plan.folder / "data"
    complete = data.is_complete(folder, text, VOCAB_SIZE)
    steps.begin(f"tokenizer: {VOCAB_SIZE} ids{', there already' if complete else ''}")
    if not complete:
        data.train_tokenizer(folder, text, VOCAB_SIZE)
    steps.begin(f"data sets{': there already' if complete else ''}")
    if not complete:
        data.make_datasets(folder, text, VOCAB_SIZE)

    for run in RUNS:
        done, saved = plan.summary(run) is not None, plan.saved_iteration(run)
        state = (
            ", there already" if done else f", continued from iteration {saved}" if saved else ""
        )
        steps.begin(f"pretraining and evaluation: {run.title}{state}")
        if not done:
            pretrain(plan, run)

    steps.begin("generated text")
    prompts = samples.PROMPTS[args.corpus]
    texts = [generated(plan, run, prompts) for run in RUNS]

    steps.begin("report")
    # Imported late, because matplotlib and TensorBoard take seconds to import.
    from examples.quickstart import report

    results = report.read_results(plan)
    page = report.write(plan, results, texts)
    log(f"finished in {steps.elapsed}")
    print(f"\n{report.terminal_table(results)}\n\n{report.finding(results)}\n")
    print(samples.terminal_lines(plan, RUNS[-1], texts[-1]))
    print(f"\nreport: {page}\ngo on:\n{samples.next_commands(plan, RUNS[-1], prompts[0])}")


def pretrain(plan: Plan, run: Run) -> None:
    """Train a model to the last step; resume from its newest checkpoint if it has one."""
    log_file = plan.folder_of(run) / "train.log"
    launch(plan.command(run, sys.executable), log_file, environment(), title=run.title)
    if plan.summary(run) is None:
        raise RunFailedError(f"the {run.title} run ended without its summary; see {log_file}")


def generated(plan: Plan, run: Run, prompts: Sequence[str]) -> list[samples.Sample]:
    """The texts of a finished run; generated, unless they exist."""
    found = samples.read_samples(plan, run, prompts)
    if found is None:
        samples.generate_samples(plan, run, prompts)
        found = samples.read_samples(plan, run, prompts)
    if found is None:
        raise data.ToolFailedError(f"tools/generate.py wrote other prompts for the {run.title} run")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parse_arguments(argv)
    require("matplotlib", "the quick start", "plot")
    # A closed terminal and `kill` save a checkpoint, as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    plan = Plan(folder=args.folder, seed=args.seed, train_iters=args.train_iters)
    try:
        with locked(plan.folder):
            run_steps(plan, args)
    except KeyboardInterrupt:
        saved = [
            f"{run.title} is saved at iteration {plan.saved_iteration(run)} of {args.train_iters}"
            for run in RUNS
            if plan.saved_iteration(run) and plan.summary(run) is None
        ]
        log("\n" + "; ".join([*saved, "interrupted: the same command continues from here"]))
        return INTERRUPTED
    except (RunFailedError, data.ToolFailedError) as error:
        log(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
