"""The one error a user can make, and how a command ends on it and on any other failure.

Inputs: whatever a command was given. Outputs: one sentence on stderr and exit code 2, or a
traceback and exit code 1. Under torchrun both are also the root cause that torchrun prints last.

Design notes:
- A single exception type for every bad value, wherever it is found, so that an entry point needs
  one `except`; our own invariants use `assert` instead (style: OLMo-core).
- torchrun reads why a rank failed from the file that it names in TORCHELASTIC_ERROR_FILE. torch's
  own writer of that file (`torch.distributed.elastic.multiprocessing.errors.record`) would import
  torch into commands that start in milliseconds, and would print a refusal as a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import Any, NoReturn

BROKEN_PIPE = 141
"""Exit code of a command whose output nobody reads, as a shell has it."""
OTHER_RANKS_WAIT = 30.0
"""Seconds: ranks reach the same error within a few of each other."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torchrun names the file in which a rank says why it failed."""


class ConfigError(ValueError):
    """A value the user gave that cannot work.

    The message is one sentence with the value, the rule it breaks, and the remedy:
    ``--lr nan is not a finite number; give one``.
    """


def reject(message: str) -> NoReturn:
    """What `argparse.ArgumentParser.error` shall be: its complaint as ours."""
    raise ConfigError(f"{message}; --help lists every flag")


class CommandParser(argparse.ArgumentParser):
    """A command's flags: whole names only, help as it is written, complaints as `ConfigError`.

    Args:
        options: of argparse's parser.
    """

    def __init__(self, **options: Any) -> None:
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**defaults, **options})

    def error(self, message: str) -> NoReturn:
        """What argparse calls."""
        reject(message)


def reason_in(output: str) -> str:
    """The line that says why a command failed, of all that it and its launcher printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return (said or lines[-1:] or ["no output"])[0].removeprefix("error: ")


def require(module: str, asked_by: str, extra: str) -> None:
    """Refuse what needs an optional package where that is not installed.

    Args:
        module: that would be imported.
        asked_by: the flag or command.
        extra: of this package, which brings it.

    Raises:
        ConfigError: with the extra.
    """
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package that it is a part of
        found = None
    if found is None:
        raise ConfigError(
            f"{asked_by} needs {module}, which is not installed; pip install "
            f"'megatron-sffn[{extra}]'"
        )


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as a process: a `ConfigError` becomes one sentence and exit code 2.

    The first rank of each node of a torchrun job speaks; its exit makes torchrun stop the others.
    Any other exception keeps its traceback and its exit code. Both end within seconds, whatever
    child processes the command has started.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has ended, as `| head` does; Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    except ConfigError as error:
        sentence = " ".join(["error:", *str(error).splitlines()])
        _let_go()
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0":
            # Leaving first would stop the first rank before it speaks; a rank that is still there
            # after the wait is the only one that saw the error.
            time.sleep(OTHER_RANKS_WAIT)
        _tell_torchrun(sentence)
        print(sentence, file=sys.stderr, flush=True)
        code = 2
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            _tell_torchrun(traceback.format_exc())
            _let_go()
        raise
    sys.exit(code)


def _let_go() -> None:
    """Give up what could keep this process from ending: signal handlers and child processes.

    Python ends its daemon processes by SIGTERM when it exits, and waits for them. Megatron's data
    workers ignore SIGTERM (they have its handler of `--exit-signal`), and an exception keeps the
    data iterator that would end them.
    """
    if threading.current_thread() is threading.main_thread():
        # torch's handler of SIGCHLD raises when a data worker is killed; Megatron's of the others
        # only sets a flag that nobody reads any more.
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
    import multiprocessing  # 10 ms that a command without child processes does not spend

    for child in multiprocessing.active_children():
        child.kill()


def _tell_torchrun(why: str) -> None:
    """Make `why` what torchrun prints last for this rank; outside torchrun do nothing."""
    if not os.environ.get(ERROR_FILE):
        return
    path = Path(os.environ[ERROR_FILE])
    now = int(time.time())
    # torchrun takes the earliest time for the root cause, in seconds. A rank that fails because
    # another one has left often does so within the same second, so it must come after it.
    for earlier in path.parent.parent.glob(f"*/{path.name}"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            stamp = json.loads(earlier.read_text())["message"]["extraInfo"]["timestamp"]
            now = max(now, int(stamp) + 1)
    message = {"message": why.rstrip(), "extraInfo": {"timestamp": str(now)}}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # the reason itself still goes to stderr
        unfinished.write_text(json.dumps({"message": message}))
        os.replace(unfinished, path)
