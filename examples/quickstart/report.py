"""Writes the report of the quick start: a sentence, a table and charts.

Inputs: the folders of finished runs, with `summary.json`, `routing.jsonl` and TensorBoard's events,
and their generated text.
Outputs: `report.html`, which needs no other file, and the same table for the terminal.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart import charts, samples
from examples.quickstart.charts import Curve, Load
from examples.quickstart.runs import RUNS, Plan, Run, program
from examples.quickstart.samples import Sample
from megatron_sffn.study.scalars import read_scalars
from megatron_sffn.utils.atomic_files import read_records
from megatron_sffn.utils.text_table import text_table

SAME = 0.005
"""Relative difference of perplexities below which one seed cannot show a difference."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run.

    Args:
        run: its plan.
        summary: the content of its `summary.json`.
        training: loss of each step.
        validation: loss of each evaluation.
        loads: load of each sparse layer at each evaluation, by evaluation, then by layer.
    """

    run: Run
    summary: dict[str, Any]
    training: Curve
    validation: Curve
    loads: tuple[Load, ...]

    @property
    def perplexity(self) -> float:
        """The perplexity on all of the held-out text after the last step."""
        return float(self.summary["validation_perplexity"])


def read_results(plan: Plan) -> list[Result]:
    """Read every run of a finished quick start."""
    results = []
    for run in RUNS:
        summary = plan.summary(run)
        assert summary is not None, f"{plan.folder_of(run)} holds no finished run"
        training, validation = read_curves(plan.folder_of(run) / "tensorboard")
        results.append(
            Result(
                run=run,
                summary=summary,
                training=training,
                validation=validation,
                loads=read_loads(plan.folder_of(run) / "routing.jsonl"),
            )
        )
    return results


def read_curves(folder: Path) -> tuple[Curve, Curve]:
    """Training and validation loss from TensorBoard's events, of all starts of a run."""
    scalars = read_scalars(folder)
    # Megatron adds the name or number of the validation set to the tag if there can be several.
    (validation,) = (
        tag for tag in scalars if tag.startswith("lm loss validation") and "samples" not in tag
    )

    def curve(tag: str) -> Curve:
        return Curve(steps=tuple(scalars[tag]), losses=tuple(scalars[tag].values()))

    return curve("lm loss"), curve(validation)


def read_loads(path: Path) -> tuple[Load, ...]:
    """The load of every layer's blocks in each evaluation; none for a dense model."""
    records = [record for record in read_records(path) if "tokens_per_block" in record]
    return tuple(
        Load(
            iteration=record["iteration"],
            layer=record["layer"],
            entropy=record["load_entropy"],
            dead=record["dead_blocks"],
            tokens=tuple(record["tokens_per_block"]),
        )
        for record in records
    )


# --- words and numbers


def finding(results: Sequence[Result]) -> str:
    """The result as a sentence."""
    dense, sparse = results
    perplexities = f"{sparse.perplexity:.1f} against {dense.perplexity:.1f} for the dense model"
    change = sparse.perplexity / dense.perplexity - 1
    if abs(change) < SAME:
        verdict = "no difference that one seed could show"
    else:
        verdict = f"{abs(change):.1%} {'lower' if change < 0 else 'higher'}"
    traits = [
        f"{ratio(results, 'parameters_total'):.1f} times the parameters",
        f"{more(ratio(results, 'flops_per_token'))} FLOPs per token",
    ]
    # The speed is unknown if a run was resumed after its last step.
    if all(result.summary["tokens_per_second"] for result in results):
        share = ratio(results, "tokens_per_second")
        traits.append(f"{share:.0%} of the tokens per second on this machine")
    return (
        f"At {sparse.summary['active_cells']} active cells per token in each layer of both models, "
        f"{sparse.run.title} reached a held-out perplexity of {perplexities}: {verdict}, with "
        f"{', '.join(traits[:-1])} and {traits[-1]}."
    )


def ratio(results: Sequence[Result], key: str) -> float:
    """A number of the sparse run divided by that of the dense run."""
    dense, sparse = results
    return float(sparse.summary[key]) / float(dense.summary[key])


def more(factor: float) -> str:
    """A factor as a difference: `7 % more`."""
    if abs(factor - 1) < 0.005:
        return "the same"
    return f"{abs(factor - 1):.0%} {'more' if factor > 1 else 'fewer'}"


COLUMNS = (
    "model",
    "parameters",
    "active per token",
    "FLOPs per token",
    "held-out perplexity",
    "tokens per second",
)


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The table's cells, as text."""
    return [
        [
            result.run.title,
            f"{result.summary['parameters_total'] / 1e6:.2f} M",
            f"{result.summary['parameters_active'] / 1e6:.2f} M",
            f"{result.summary['flops_per_token'] / 1e6:.2f} M",
            f"{result.perplexity:.1f}",
            f"{speed:,.0f}" if (speed := result.summary["tokens_per_second"]) else "unknown",
        ]
        for result in results
    ]


def terminal_table(results: Sequence[Result]) -> str:
    """The table as aligned text."""
    return text_table([COLUMNS, *rows(results)])


# --- the page


def write(plan: Plan, results: Sequence[Result], texts: Sequence[Sequence[Sample]]) -> Path:
    """Write `report.html`; returns its path."""
    path = plan.folder / "report.html"
    partial = path.with_suffix(".part")
    partial.write_text(page(plan, results, texts), encoding="utf-8")
    return partial.replace(path)


def page(plan: Plan, results: Sequence[Result], texts: Sequence[Sequence[Sample]]) -> str:
    """The report as HTML; `texts` are the generated texts of each run."""
    summary = results[0].summary
    versions = summary["versions"]
    commands = "\n\n".join(f"# {result.run.title}\n{plan.shown(result.run)}" for result in results)
    return TEMPLATE.format(
        style=STYLE,
        finding=html.escape(finding(results)),
        setting=html.escape(
            f"One short run each, {summary['tokens'] / 1e6:.2f} million tokens with seed "
            f"{summary['seed']}, on {summary['layout']['world_size']} ranks of the CPU: it shows "
            "the direction, not what long training would give. FLOPs are those of a forward pass. "
            f"megatron-sffn {versions['megatron-sffn']}, megatron-core "
            f"{versions['megatron-core']}, torch {versions['torch']}, "
            f"Python {versions['python']}."
        ),
        table=html_table([list(COLUMNS), *rows(results)]),
        losses=charts.losses(
            [(result.run.title, result.training, result.validation) for result in results]
        ),
        load="\n".join(load_section(result) for result in results if result.loads),
        texts=generated_text(results, texts),
        text_setting=html.escape(f"Temperature {samples.TEMPERATURE}, seed {plan.seed}."),
        commands=html.escape(commands),
        next_commands=html.escape(
            samples.next_commands(plan, results[-1].run, texts[-1][0].prompt)
        ),
        folder=html.escape(str(plan.folder)),
        python=program("python"),
        tensorboard=program("tensorboard"),
    )


def generated_text(results: Sequence[Result], texts: Sequence[Sequence[Sample]]) -> str:
    """The prompts and what each model wrote after them, as a table."""
    lines = [["prompt", *(result.run.title for result in results)]]
    lines += [
        [line[0].prompt, *(sample.shown for sample in line)] for line in zip(*texts, strict=True)
    ]
    return html_table(lines).replace("<table>", '<table class="texts">')


def load_section(result: Result) -> str:
    """Charts and a table of the load of a run's blocks after the last step."""
    last_iteration = max(load.iteration for load in result.loads)
    last_loads = [load for load in result.loads if load.iteration == last_iteration]
    first_loads: dict[int, Load] = {}
    for load in result.loads:
        first_loads.setdefault(load.layer, load)
    lines = [
        ["layer", "entropy, first evaluation", "entropy, last", "busiest block", "dead blocks"]
    ]
    lines += [
        [
            str(load.layer),
            f"{first_loads[load.layer].entropy:.3f}",
            f"{load.entropy:.3f}",
            f"{max(load.shares):.1f} × even",
            f"{load.dead} of {len(load.tokens)}",
        ]
        for load in last_loads
    ]
    return (
        f"<h2>Load of the blocks: {html.escape(result.run.title)}</h2>\n"
        "<p>How often each block was chosen on the held-out text after the last step, in "
        "multiples of an even load, in descending order. Entropy is 1 if all blocks have the same "
        "load and 0 if one block has all of it; a dead block was never chosen.</p>\n"
        f"{charts.loads(last_loads)}\n{html_table(lines)}"
    )


def html_table(lines: Sequence[Sequence[str]]) -> str:
    """A table, of which the first line is the head."""
    head, *body = [[html.escape(cell) for cell in line] for line in lines]
    html_lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    html_lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in body]
    return "<table>\n" + "\n".join(html_lines) + "\n</table>"


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { margin: 3rem auto; max-width: 54rem; padding: 0 1.25rem; line-height: 1.55;
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
p.finding { font-size: 1.2rem; margin: 0 0 .6rem; }
p.setting { opacity: .7; font-size: .9rem; margin: 0 0 1.6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; font-size: .85rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
table.texts td, table.texts th { text-align: left; font-family: ui-monospace, monospace;
  font-size: .8rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; margin: .6rem 0; }
pre { background: var(--soft); padding: .9rem 1rem; border-radius: .4rem; font-size: .8rem;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: .88em; }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quick start: dense and Avg-K at equal active cells</title>
<style>{style}</style>
</head>
<body>
<h1>Dense and Avg-K at equal active cells</h1>
<p class="finding">{finding}</p>
<p class="setting">{setting}</p>
{table}
<h2>Loss</h2>
{losses}
{load}
<h2>Generated text</h2>
<p>The rest of the line that each model wrote after a prompt. {text_setting}</p>
{texts}
<h2>How to go on</h2>
<p>Generate with the Avg-K model, evaluate it on the held-out text, and export it for
transformers:</p>
<pre>{next_commands}</pre>
<p>These commands trained the two models. For a run of your own change <code>--save</code>,
<code>--load</code> and <code>--tensorboard-dir</code>, and then what you like:
<code>--sffn-router</code> has more methods, <code>{python} -m megatron_sffn.pretrain
--help-all</code> has every flag.</p>
<pre>{commands}</pre>
<p>All curves: <code>{tensorboard} --logdir {folder}</code>. More and other text:
<code>make quickstart CORPUS=debian-docs ARGS='--folder runs/docs --train-iters 1500'</code>.</p>
</body>
</html>
"""
