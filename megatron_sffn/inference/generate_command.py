"""The command `generate`: prompts from flags, a file or a terminal, and where the text goes.

Inputs: the flags of `tools/generate.py`. Outputs: text or JSON lines on stdout or in a file.

Design notes: everything that can be refused is refused before Megatron starts: the tokenizer of the
run reads all prompts first. With several ranks, the first one reads the terminal and prints.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sffn.data.tokenize.tokenizer import Tokenizer, load_tokenizer
from megatron_sffn.inference.checkpoint_args import checked_args, find_checkpoint
from megatron_sffn.inference.generate import Continuation, generate
from megatron_sffn.inference.model import InferenceModel, finish, is_output_rank, load_model
from megatron_sffn.inference.prompts import (
    TextStream,
    check_length,
    continuation_text,
    prompt_ids,
)
from megatron_sffn.inference.quiet import quiet
from megatron_sffn.inference.sampling import Sampling
from megatron_sffn.utils.atomic_files import atomic_write_text
from megatron_sffn.utils.errors import ConfigError
from megatron_sffn.utils.stderr import say

DEFAULT_NEW_TOKENS = 128
"""New tokens of a prompt without `--max-new-tokens`, if the context has room for them."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt.

    Args:
        text: as given.
        ids: its tokens.
        new_tokens: limit of its continuation.
    """

    text: str
    ids: list[int]
    new_tokens: int


def run(options: Namespace) -> None:
    """Run the command.

    Raises:
        ConfigError: the checkpoint, the layout, a prompt or a sampling flag cannot work.
    """
    sampling = sampling_of(options, options.max_new_tokens or DEFAULT_NEW_TOKENS)
    source = find_checkpoint(options)
    texts = list(_texts(options))
    args = checked_args(source, options)
    with quiet():
        tokenizer = load_tokenizer(args)
    reader = PromptReader(tokenizer, source.context, options.max_new_tokens)
    prompts = [reader.read(text, name) for name, text in texts]
    model = load_model(source, args)
    if options.interactive:
        _interactive(model, reader, sampling, options)
    elif options.json or options.output or len(prompts) > 1:
        _batches(model, prompts, options)
    else:
        _stream(model, prompts[0], options)
    finish()


def sampling_of(options: Namespace, new_tokens: int) -> Sampling:
    """The sampling that the flags describe."""
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        max_new_tokens=new_tokens,
        stops_at_eod=not options.ignore_eod,
    )


class PromptReader:
    """Makes prompts of texts, and checks them.

    Args:
        tokenizer: of the run.
        context: tokens that a prompt and its continuation may have together.
        new_tokens: `--max-new-tokens`; None for the default, or the rest of the context.
    """

    def __init__(self, tokenizer: Tokenizer, context: int, new_tokens: int | None) -> None:
        self.tokenizer, self.context, self.new_tokens = tokenizer, context, new_tokens

    def read(self, text: str, name: str = "--prompt") -> Prompt:
        """The prompt of a text.

        Raises:
            ConfigError: the tokenizer cannot read it, or it is too long.
        """
        ids = prompt_ids(self.tokenizer, text, name)
        check_length(ids, self.new_tokens or 1, self.context, name)
        new_tokens = self.new_tokens or min(DEFAULT_NEW_TOKENS, self.context - len(ids))
        return Prompt(text=text, ids=ids, new_tokens=new_tokens)


def _texts(options: Namespace) -> Iterator[tuple[str, str]]:
    """Name in messages and text of every prompt; none of an interactive command."""
    for number, text in enumerate(options.prompt or [], 1):
        yield f"--prompt{f' {number}' if len(options.prompt) > 1 else ''}", text
    if options.prompt_file is not None:
        yield from read_prompt_file(options.prompt_file)


def read_prompt_file(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each prompt of a file: one prompt per line, or JSON lines with `prompt`.

    Raises:
        ConfigError: the file is missing, not UTF-8 or without prompts, or a line has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompt-file {path} cannot be read ({error}); give a text file in UTF-8"
        ) from error
    is_json = path.suffix in (".jsonl", ".json", ".ndjson")
    if not any(line.strip() for line in lines):
        raise ConfigError(f"--prompt-file {path} has no prompts; write one on each line")
    for number, line in enumerate(lines, 1):
        name = f"--prompt-file {path} line {number}"
        if not line.strip():
            continue
        yield name, _prompt_in(line, name) if is_json else line


def _prompt_in(line: str, name: str) -> str:
    """The prompt in a line of JSON."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ConfigError(f'{name} is not JSON ({error}); write {{"prompt": "..."}}') from error
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise ConfigError(f'{name} has no string under "prompt"; write {{"prompt": "..."}}')
    return str(content["prompt"])


def _batches(model: InferenceModel, prompts: list[Prompt], options: Namespace) -> None:
    """Continue all prompts, and print or write them in their order."""
    lines = []
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        limit = max(prompt.new_tokens for prompt in batch)
        made = generate(
            model,
            [prompt.ids for prompt in batch],
            sampling_of(options, limit),
            limits=[prompt.new_tokens for prompt in batch],
            use_cache=options.kv_cache,
        )
        for prompt, continuation in zip(batch, made, strict=True):
            result = record(model.tokenizer, prompt, continuation)
            lines.append(json.dumps(result, ensure_ascii=False))
            if not is_output_rank() or options.output:
                continue
            shown = lines[-1] if options.json else f"{prompt.text}{result['text']}\n"
            print(shown, flush=True)
    if options.output and is_output_rank():
        atomic_write_text(options.output, "".join(f"{line}\n" for line in lines))
        say(f"{len(lines)} continuations -> {options.output}")


def _stream(model: InferenceModel, prompt: Prompt, options: Namespace) -> None:
    """Continue one prompt, and print every token as it comes."""
    stream = TextStream(model.tokenizer, prompt.ids)

    def show(_: int, token: int) -> None:
        if is_output_rank():
            print(stream.add(token), end="", flush=True)

    if is_output_rank():
        print(prompt.text, end="", flush=True)
    sampling = sampling_of(options, prompt.new_tokens)
    generate(model, [prompt.ids], sampling, use_cache=options.kv_cache, on_token=show)
    if is_output_rank():
        print(stream.rest(), flush=True)


def _interactive(
    model: InferenceModel, reader: PromptReader, sampling: Sampling, options: Namespace
) -> None:
    """Continue every line of standard input, until its end."""
    if is_output_rank():
        say("one prompt per line; the end of input (Ctrl-D) ends")
    while True:
        text = _next_line()
        if text is None:
            return
        try:
            prompt = reader.read(text, "the prompt")
        except ConfigError as error:
            if is_output_rank():
                say(f"error: {error}")
            continue
        _stream(model, prompt, options)


def _next_line() -> str | None:
    """The next line of the first rank's standard input, on all ranks; None at its end."""
    import torch

    line: list[str | None] = [None]
    if is_output_rank():
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        text = sys.stdin.readline()
        line = [text.removesuffix("\n") if text else None]
    torch.distributed.broadcast_object_list(line, src=0)
    return line[0]


def record(tokenizer: Tokenizer, prompt: Prompt, continuation: Continuation) -> dict[str, Any]:
    """A continuation as JSON."""
    return {
        "prompt": prompt.text,
        "text": continuation_text(tokenizer, prompt.ids, continuation.tokens),
        "tokens": continuation.tokens,
        "num_prompt_tokens": len(prompt.ids),
        "finish_reason": continuation.finish_reason,
    }
