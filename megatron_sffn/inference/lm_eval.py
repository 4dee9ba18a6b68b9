"""Adapter of lm-evaluation-harness: tasks on a loaded model, on any layout.

Inputs: names of tasks, which may be YAML files of one's own. Outputs: the metrics of each task.

Design notes: `simple_evaluate` runs on every rank with the same requests, and the model shares the
work, so the adapter says that there is one rank. Log likelihoods are computed in windows of the
model's context; a longer context loses its first tokens, as with lm-eval's own models.
"""

from __future__ import annotations

import difflib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, override

import lm_eval
import numpy
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_sffn.data.tokenize.tokenizer import bos_of
from megatron_sffn.inference.eval_data import text_ids
from megatron_sffn.inference.evaluate import Window, scores_of
from megatron_sffn.inference.generate import generate
from megatron_sffn.inference.model import InferenceModel
from megatron_sffn.inference.prompts import continuation_text, encode, prompt_ids
from megatron_sffn.inference.sampling import Sampling
from megatron_sffn.utils.errors import ConfigError

TEXT = "a text of --tasks"
"""Name of a text in errors."""

NEW_TOKENS = 256
"""New tokens of a request that does not say how many, as for lm-eval's own models."""


class CheckpointLM(TemplateLM):
    """A loaded model, as lm-eval sees it.

    Args:
        model: the loaded model, whose tokenizer has an end of a document.
        batch_size: requests of a batch on each replica.
    """

    def __init__(self, model: InferenceModel, batch_size: int) -> None:
        super().__init__()
        if model.eod is None:
            raise ConfigError(
                "--tasks needs a tokenizer with an end of a document, which is the context of a "
                "text's first token; name one as eos_token in tokenizer_config.json"
            )
        self.model = model
        self.batch_size = batch_size * model.num_replicas
        self._bos = bos_of(model.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        assert self.model.eod is not None, "checked at the start"
        return self.model.eod

    @override
    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        ids = encode(self.model.tokenizer, string, TEXT)
        if ids and ids[-1] == self.model.eod:
            ids.pop()
        if add_special_tokens is False and ids and ids[0] == self._bos:
            ids.pop(0)
        return ids

    @override
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scored = []
        for _, context, continuation in requests:
            if len(continuation) > self.model.context:
                raise ConfigError(
                    f"--tasks has a continuation of {len(continuation)} tokens, more than the "
                    f"context of the model, {self.model.context} tokens; use "
                    "loglikelihood_rolling for long texts"
                )
            ids = numpy.array((context + continuation)[-(self.model.context + 1) :])
            window = Window(inputs=ids[:-1], labels=ids[1:], first=len(ids) - 1 - len(continuation))
            scored.append(window)
        return self._scores(scored)

    @override
    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            ids = text_ids(self.model.tokenizer, request.args[0], TEXT)
            first, *ids = ids or [self.eot_token_id]
            pieces = get_rolling_token_windows(ids, first, self.model.context, context_len=1)
            pairs = [(None, *make_disjoint_window(piece)) for piece in pieces]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def _scores(self, scored: Sequence[Window]) -> list[tuple[float, bool]]:
        """Log likelihood of each window's last labels, and whether each is the likeliest."""
        # Windows of one length share a batch, so that little of it is padding.
        order = sorted(range(len(scored)), key=lambda number: -len(scored[number].labels))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(scored)
        for batch in _runs(order, self.batch_size):
            chosen = [scored[number] for number in batch]
            losses, hits = scores_of(self.model, chosen, greedy=True)
            assert hits is not None, "asked for"
            for number, window, loss, hit in zip(batch, chosen, losses, hits, strict=True):
                span = slice(window.first, len(window.labels))
                results[number] = (-float(loss[span].double().sum()), bool(hit[span].all()))
        return results

    @override
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        settings = [normalize_gen_kwargs(request.args[1], NEW_TOKENS) for request in requests]
        groups: dict[str, list[int]] = {}
        for number, setting in enumerate(settings):
            groups.setdefault(repr(sorted(setting.items())), []).append(number)
        for group in groups.values():
            setting = settings[group[0]]
            prompts = {number: self._prompt(requests[number].args[0], setting) for number in group}
            group.sort(key=lambda number: -len(prompts[number]))
            for batch in _runs(group, self.batch_size):
                made = self._continue([prompts[number] for number in batch], setting)
                for number, text in zip(batch, made, strict=True):
                    texts[number] = text
        return texts

    def _prompt(self, text: str, setting: Any) -> list[int]:
        """The ids of a context: the last ones, if it leaves no room for the new tokens."""
        room = self.model.context - setting["max_gen_toks"]
        if room < 1:
            raise ConfigError(
                f"--tasks asks for {setting['max_gen_toks']} new tokens, and the context of the "
                f"model is {self.model.context}; set max_gen_toks in the task's generation_kwargs"
            )
        return prompt_ids(self.model.tokenizer, text, "a context of --tasks")[-room:]

    def _continue(self, prompts: list[list[int]], setting: Any) -> list[str]:
        """The texts that continue prompts, up to the first of the strings that end them."""
        tokenizer, until = self.model.tokenizer, [text for text in setting["until"] if text]

        def is_end(number: int, tokens: list[int]) -> bool:
            text = continuation_text(tokenizer, prompts[number], tokens)
            return any(end in text for end in until)

        sampling = Sampling(
            temperature=setting.get("temperature", 0.0) if setting.get("do_sample") else 0.0,
            top_k=setting.get("top_k") or 0,
            top_p=setting.get("top_p") or 1.0,
            max_new_tokens=setting["max_gen_toks"],
        )
        made = generate(self.model, prompts, sampling, is_end=is_end)
        texts = []
        for prompt, continuation in zip(prompts, made, strict=True):
            text = continuation_text(tokenizer, prompt, continuation.tokens)
            ends = [text.find(end) for end in until if end in text]
            texts.append(text[: min(ends, default=len(text))])
        return texts


def _runs(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Pieces of at most `size`."""
    return (order[start : start + size] for start in range(0, len(order), size))


def find_tasks(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """The index of all tasks, which has these names.

    Args:
        names: of tasks, groups and tags, or paths of YAML files.
        include_path: folder with tasks of one's own.

    Raises:
        ConfigError: a task does not exist.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path {include_path} is no folder; give one with YAML files")
    own = None if include_path is None else str(include_path)
    known = TaskManager(include_path=own, include_defaults=False)
    if not all(_is_known(name, known) for name in names):
        known = TaskManager(include_path=own)  # reads ten thousand files
    for name in names:
        if not _is_known(name, known):
            similar = difflib.get_close_matches(name, known.all_tasks, n=1)
            meant = f"did you mean {similar[0]}? " if similar else ""
            raise ConfigError(
                f"--tasks {name} is no task of lm-eval; {meant}give --include-path DIR for tasks "
                "of your own, or list them all with: lm_eval ls tasks"
            )
    return known


def _is_known(name: str, manager: TaskManager) -> bool:
    return name in manager.all_tasks or (name.endswith((".yaml", ".yml")) and Path(name).is_file())


def evaluate_tasks(
    model: InferenceModel, manager: TaskManager, options: Namespace
) -> dict[str, dict[str, Any]]:
    """Run tasks; all ranks call it together.

    Args:
        model: the loaded model.
        manager: of `find_tasks`.
        options: flags of `tools/eval.py`.

    Returns:
        Task -> metrics, under lm-eval's names.
    """
    results = lm_eval.simple_evaluate(
        model=CheckpointLM(model, options.batch_size),
        tasks=[*options.tasks],
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        log_samples=False,
    )
    metrics = [
        {
            task: {name: value for name, value in of_task.items() if _is_number(name, value)}
            for task, of_task in (results or {"results": {}})["results"].items()
        }
    ]
    # lm-eval gives the results to the first rank alone.
    torch.distributed.broadcast_object_list(metrics, src=0)
    return metrics[0]


def _is_number(name: str, value: Any) -> bool:
    """True if a metric is a number, which lm-eval's names of tasks and N/A are not."""
    return name not in ("alias", "name", "sample_len") and isinstance(value, int | float)
