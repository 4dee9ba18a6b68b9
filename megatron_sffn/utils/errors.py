"""`ConfigError` for every bad value, and how a command ends on it and on any other exception.

A `ConfigError` becomes one sentence on stderr and exit code 2. Any other exception keeps its
traceback and exit code 1. Under torchrun both are also the root cause that torchrun prints last.

Design notes:
- Every bad value raises the same exception type, so that an entry point needs one `except`. Our own
  invariants use `assert` instead (style: OLMo-core).
- torchrun reads why a rank failed from the file that it names in TORCHELASTIC_ERROR_FILE. torch's
  own writer of that file (`torch.distributed.elastic.multiprocessing.errors.record`) would import
  torch into commands that start in milliseconds, and would print a refusal as a traceback.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, override

BROKEN_PIPE = 141
"""Exit code of a command that a SIGPIPE ends, as in a shell: 128 + 13."""
OTHER_RANKS_WAIT = 30.0
"""Seconds that other ranks wait for the first rank to report an error that all of them reach."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable with the path of the file in which torchrun expects the reason of a failure."""


class ConfigError(ValueError):
    """A value the user gave that cannot work.

    The message is one sentence with the value, the rule it breaks, and the remedy:
    ``--lr nan is not a finite number; give one``.
    """


def reject(message: str) -> NoReturn:
    """Replace `argparse.ArgumentParser.error`: raise its message as a `ConfigError`."""
    raise ConfigError(f"{message}; --help lists every flag")


class CommandParser(argparse.ArgumentParser):
    """Parser of a command: no abbreviated flags, raw help text, errors as `ConfigError`.

    Args:
        options: options of argparse's parser.
    """

    def __init__(self, **options: Any) -> None:
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**defaults, **options})

    @override
    def error(self, message: str) -> NoReturn:
        reject(message)


def reason_in(output: str) -> str:
    """Find the line that says why a command failed in the output of it and its launcher."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return (errors or lines[-1:] or ["no output"])[0].removeprefix("error: ")


def require(module: str, asked_by: str, extra: str) -> None:
    """Refuse a flag or command that needs an optional package which is not installed.

    Args:
        module: that would be imported.
        asked_by: the flag or command.
        extra: the extra of this package that installs the module.

    Raises:
        ConfigError: if the module is not installed.
    """
    try:
        is_installed = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        is_installed = False
    if not is_installed:
        raise ConfigError(
            f"{asked_by} needs {module}, which is not installed; pip install "
            f"'megatron-sffn[{extra}]'"
        )


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as a process: a `ConfigError` becomes one sentence and exit code 2.

    In a torchrun job, the first rank of each node prints the sentence, and its exit makes torchrun
    stop the other ranks. Any other exception keeps its traceback and its exit code. The process
    ends within seconds, whatever child processes the command has started.
    """
    # Python's last garbage collections would visit every object of torch and Megatron: 1.5 s.
    atexit.register(gc.freeze)
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has ended, as `| head` does. Python would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    except ConfigError as error:
        sentence = " ".join(["error:", *str(error).splitlines()])
        _release_process()
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0":
            # An earlier exit would make torchrun stop the first rank before it prints the sentence.
            # A rank that still runs after the wait is the only one that reached the error.
            time.sleep(OTHER_RANKS_WAIT)
        _report_to_torchrun(sentence)
        print(sentence, file=sys.stderr, flush=True)
        code = 2
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            _report_to_torchrun(traceback.format_exc())
            _release_process()
        raise
    sys.exit(code)


def _release_process() -> None:
    """Drop signal handlers and child processes that could keep this process from ending.

    At exit, Python sends SIGTERM to its daemon processes and waits for them. Megatron's data
    workers ignore SIGTERM (they have the handler of `--exit-signal`), and the exception keeps the
    data iterator alive that would end them.
    """
    if threading.current_thread() is threading.main_thread():
        # torch's handler of SIGCHLD raises when a data worker is killed. Megatron's handlers of the
        # other signals only set a flag, which is no longer read.
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
    import multiprocessing  # 10 ms that a command without child processes does not spend

    for child in multiprocessing.active_children():
        child.kill()


def _report_to_torchrun(reason: str) -> None:
    """Give torchrun the reason that it prints last for this rank; outside torchrun do nothing."""
    if not os.environ.get(ERROR_FILE):
        return
    path = Path(os.environ[ERROR_FILE])
    now = int(time.time())
    # torchrun takes the failure with the earliest time, in seconds, for the root cause. A rank that
    # fails because another rank has failed often does so within the same second, and must not win.
    for earlier in path.parent.parent.glob(f"*/{path.name}"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            stamp = json.loads(earlier.read_text())["message"]["extraInfo"]["timestamp"]
            now = max(now, int(stamp) + 1)
    message = {"message": reason.rstrip(), "extraInfo": {"timestamp": str(now)}}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # the reason itself still goes to stderr
        unfinished.write_text(json.dumps({"message": message}))
        os.replace(unfinished, path)
