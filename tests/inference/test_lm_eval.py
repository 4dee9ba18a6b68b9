"""Tasks of lm-evaluation-harness from local files, without a network."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sffn.utils.errors import ConfigError
from tests.support.jobs import run_as_job

pytest.importorskip("lm_eval", reason="pip install 'megatron-sffn[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of thirty packages

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATION = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{greedy}}"
generation_kwargs: {until: ["%s"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = ["def f(x", "import os, ", "#", ""]
CONTEXT = 64
TEXTS = [f"class Name{number}:\n    pass\n" * 5 for number in range(5)]
LAYOUTS = (
    (1, ""),
    (2, "--pipeline-model-parallel-size 2"),
    (2, "--expert-model-parallel-size 2"),
)


def write_task(folder: Path, name: str, body: str, documents: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / f"{name}.jsonl").write_text(lines)
    head = TASK.format(name=name, data=folder / f"{name}.jsonl")
    (folder / f"{name}.yaml").write_text(head + body)


def answers(model: Any, question: str) -> tuple[str, int]:
    """Greedy text, and the likelier of two choices, computed without lm-eval."""
    from megatron_sffn.inference.generate import generate
    from megatron_sffn.inference.sampling import Sampling

    prompt = [*question.encode()] or [model.eod]
    made = generate(model, [prompt], Sampling(temperature=0, max_new_tokens=12))[0]
    losses = []
    for choice in (" self", "qqqq"):
        ids = torch.tensor([[*prompt, *choice.encode()]])
        score, _ = model.score(ids[:, :-1], ids[:, 1:])
        losses.append(float(score[0, -len(choice) :].sum()))
    return model.tokenizer.detokenize(made.tokens), losses.index(min(losses))


def text_loss(model: Any, text: str) -> float:
    """Nats of a text in two windows: the first ones, and those that end with the text."""
    ids = torch.tensor([model.eod, *text.encode()])
    first, _ = model.score(ids[None, :CONTEXT], ids[None, 1 : CONTEXT + 1])
    last, _ = model.score(ids[None, -CONTEXT - 1 : -1], ids[None, -CONTEXT:])
    return float(first.sum() + last[0, CONTEXT + 1 - len(ids) :].sum())


def test_tasks_of_local_files_have_the_numbers_of_the_model(use, trained, tmp_path: Path) -> None:
    expected = use(trained("avg-k"), lambda model: [answers(model, q) for q in QUESTIONS])
    documents = [
        {"question": question, "choices": [" self", "qqqq"], "answer": answer, "greedy": text}
        for question, (text, answer) in zip(QUESTIONS, expected, strict=True)
    ]
    write_task(tmp_path, "choice", CHOICE, documents)
    write_task(tmp_path, "rolling", ROLLING, [{"text": text} for text in TEXTS])
    # Generation ends before the third character of the first document's greedy text.
    stop = expected[0][0][2]
    cut = [{**d, "greedy": d["greedy"].split(stop)[0]} for d in documents]
    write_task(tmp_path, "generation", GENERATION % stop.encode("unicode_escape").decode(), cut)

    def results(model: Any) -> Any:
        from megatron_sffn.inference.lm_eval import evaluate_tasks, find_tasks

        names = ["choice", "rolling", "generation"]
        options = argparse.Namespace(tasks=names, batch_size=3, num_fewshot=None, limit=None)
        metrics = evaluate_tasks(model, find_tasks(names, tmp_path), options)
        nats = sum(text_loss(model, text) for text in TEXTS)
        return metrics, nats / math.log(2) / sum(len(text) for text in TEXTS)

    for ranks, layout in LAYOUTS:
        metrics, bits = use(trained("avg-k"), results, layout, ranks)
        assert metrics["choice"]["acc,none"] == 1
        assert metrics["generation"]["exact_match,none"] == 1
        assert metrics["rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)


def test_the_command_prints_nothing_but_the_results(trained, tmp_path: Path) -> None:
    from tools import eval as tool

    write_task(tmp_path, "rolling", ROLLING, [{"text": text} for text in TEXTS])
    flags = ["--load", str(trained("avg-k")), "--tasks", "rolling", "--include-path", str(tmp_path)]
    (output,) = run_as_job(1, lambda: tool.main([*flags, "--json"]), folder=tmp_path)
    metrics = json.loads(output.stdout)["tasks"]["rolling"]
    assert metrics.keys() == {"bits_per_byte,none"}


def test_an_unknown_task_is_one_sentence(tmp_path: Path) -> None:
    from megatron_sffn.inference.lm_eval import find_tasks

    write_task(tmp_path, "mine", ROLLING, [])
    assert "mine" in find_tasks(["mine"], tmp_path).all_tasks
    with pytest.raises(ConfigError, match=r"^--tasks hellaswagg is no .* mean hellaswag\? give"):
        find_tasks(["hellaswagg"], tmp_path)
    with pytest.raises(ConfigError, match=r"^--include-path .*nothing is no folder; give"):
        find_tasks(["mine"], tmp_path / "nothing")
