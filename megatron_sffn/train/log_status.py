"""The progress of a run by the lines that Megatron prints.

Inputs: lines of a log, as they appear. Outputs: step, loss, time left, and the last evaluation.

Design notes: a job of Slurm imports this module before it has prepared its process for Megatron, so
nothing here may import Megatron.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STEP = re.compile(
    r"iteration +(?P<iteration>\d+)/ *(?P<total>\d+) \|.*?"
    r"elapsed time per iteration \(ms\): (?P<milliseconds>[\d.]+) \|.*?"
    r"lm loss: (?P<loss>[-+.\dEeinfa]+) \|"
)
EVALUATION = re.compile(
    r"validation\S* loss at iteration (?P<iteration>\d+)\b.*?lm loss PPL: (?P<perplexity>[-+.\dE]+)"
)
PHASES = (
    # Megatron switches its checks off for an evaluation, and prints nothing else before its end.
    (re.compile(r"RerunMode\.DISABLED"), "evaluating"),
    (re.compile(r"Evaluating iter (\d+/\d+)"), r"evaluating \1"),
    (re.compile(r"saving checkpoint at iteration"), "saving"),
    (re.compile(r"successfully saved checkpoint|RerunMode\.VALIDATE_RESULTS"), ""),
)
"""Pattern of a log line -> the phase that begins with it."""


@dataclass
class Status:
    """The progress of a run by its log; values are 0 or None until the log has them."""

    iteration: int = 0
    total: int = 0
    milliseconds: float = 0.0
    loss: float | None = None
    evaluated_at: int = 0
    perplexity: float | None = None
    phase: str = ""

    def read(self, line: str) -> None:
        """Update the status from a line of the log."""
        if match := STEP.search(line):
            self.iteration, self.total = int(match["iteration"]), int(match["total"])
            self.milliseconds, self.loss = float(match["milliseconds"]), float(match["loss"])
            self.phase = ""
        elif match := EVALUATION.search(line):
            self.evaluated_at = int(match["iteration"])
            self.perplexity = float(match["perplexity"])
        for pattern, phase in PHASES:
            if match := pattern.search(line):
                self.phase = match.expand(phase)

    def __str__(self) -> str:
        """The status as a line for the terminal."""
        phrases = []
        if self.loss is not None:
            seconds_left = (self.total - self.iteration) * self.milliseconds / 1000
            phrases = [
                f"iteration {self.iteration}/{self.total}",
                f"loss {self.loss:.3f}",
                f"{self.milliseconds:.0f} ms per iteration",
                f"ETA {clock(seconds_left)}",
            ]
        if self.perplexity is not None:
            phrases.append(f"held-out perplexity {self.perplexity:.1f} at {self.evaluated_at}")
        return ", ".join([*phrases, self.phase] if self.phase else phrases) or "starting the ranks"


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds: 2:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
