"""Our class in transformers: cache, padding, gradient checkpointing, torch.compile, its folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sffn.hf.export import export
from megatron_sffn.utils.errors import ConfigError
from tests.support.megatron_models import ITERATION, Saved, flags_of, save_models
from tools.export import main

FLAGS = {
    "avg-k": "--swiglu --sffn-shared-blocks 1",
    "rand-hash": flags_of("rand-hash"),
    "vanilla-m, learned positions": f"{flags_of('vanilla-m')} "
    "--position-embedding-type learned_absolute",
    "pkm": flags_of("pkm"),
    "sigma-moe": f"{flags_of('sigma-moe')} --moe-router-enable-expert-bias",
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Saved, Path]]:
    """Checkpoints, and their exports in our class."""
    folder = tmp_path_factory.mktemp("models")
    saved = dict(zip(FLAGS, save_models(folder, list(FLAGS.values())), strict=True))
    for name, checkpoint in saved.items():
        export(checkpoint.load, folder / name, architecture="sparse_ffn", max_shard_size="10KB")
    return {name: (checkpoint, folder / name) for name, checkpoint in saved.items()}


@pytest.fixture(params=list(FLAGS))
def loaded(request: pytest.FixtureRequest, exports: dict[str, tuple[Saved, Path]]):
    """A checkpoint and its model."""
    saved, folder = exports[request.param]
    return saved, AutoModelForCausalLM.from_pretrained(folder)


def test_generation_is_the_same_with_and_without_the_cache(loaded) -> None:
    saved, model = loaded
    prompt = {"input_ids": saved.ids[:, :5], "attention_mask": torch.ones(2, 5).long()}
    cached, anew = (
        model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, anew) and cached.shape == (2, 17)
    with torch.no_grad():
        greedy = model(cached[:, :-1]).logits[:, 4:].argmax(dim=2)
    assert torch.equal(cached[:, 5:], greedy)


def test_padding_on_the_left_changes_nothing(loaded) -> None:
    saved, model = loaded
    padded = torch.cat((torch.zeros(2, 3).long(), saved.ids), dim=1)
    mask = torch.cat((torch.zeros(2, 3), torch.ones(saved.ids.shape)), dim=1).long()
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(logits, saved.logits, rtol=1e-4, atol=1e-4)
    one, two = (
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, -5:]
        for ids, mask in ((padded, mask), (saved.ids, torch.ones_like(saved.ids)))
    )
    assert torch.equal(one, two)


def test_gradient_checkpointing_gives_the_same_gradients(loaded) -> None:
    saved, model = loaded
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        model(saved.ids, labels=saved.ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    missing = {name for name, gradient in gradients[0].items() if gradient is None}
    assert all(name.endswith("descriptor_weight") for name in missing), missing
    for name in gradients[0].keys() - missing:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], msg=name)


def test_the_whole_model_compiles(loaded) -> None:
    saved, model = loaded
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = compiled(saved.ids, use_cache=False).logits
    torch.testing.assert_close(logits, saved.logits, rtol=1e-5, atol=1e-5)


def test_both_implementations_of_attention_agree(exports: dict[str, tuple[Saved, Path]]) -> None:
    saved, folder = exports["avg-k"]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits = model(saved.ids).logits
    torch.testing.assert_close(logits, saved.logits, rtol=1e-5, atol=1e-5)


def test_descriptors_follow_the_weights(exports: dict[str, tuple[Saved, Path]]) -> None:
    saved, folder = exports["avg-k"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(saved.ids)
        state = {name: tensor.flip(0) for name, tensor in model.state_dict().items()}
        model.load_state_dict(state)
        changed = model(saved.ids).logits
        fresh = AutoModelForCausalLM.from_pretrained(folder)
        fresh.load_state_dict(state)
        torch.testing.assert_close(changed, fresh(saved.ids).logits)


def test_the_file_in_the_folder_loads_without_the_package(
    exports: dict[str, tuple[Saved, Path]], tmp_path: Path
) -> None:
    saved, folder = exports["rand-hash"]
    torch.save((saved.ids, saved.logits), tmp_path / "expected.pt")
    script = """
import sys
sys.modules["megatron_sffn"] = sys.modules["megatron"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids, expected = torch.load("expected.pt")
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
model.save_pretrained("again")
print("equal")
"""
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", "-c", script, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


def test_weights_are_sharded_and_described(exports: dict[str, tuple[Saved, Path]]) -> None:
    _, folder = exports["sigma-moe"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert len(shards) > 2
    card = (folder / "README.md").read_text()
    for text in ("`sigma-moe`", "iteration 3", "expert bias", "| validation loss | unknown |"):
        assert text in card


def test_the_card_has_what_eval_measured_of_the_iteration(
    exports: dict[str, tuple[Saved, Path]], tmp_path: Path
) -> None:
    run = shutil.copytree(exports["sigma-moe"][0].load, tmp_path / "run")
    measured = {"data": "books/a.txt", "loss": 1.5, "perplexity": 4.4817, "bits_per_byte": None}
    results = {"dtype": "float32", "context": 64, "stride": 32, "results": [measured]}
    results["tasks"] = {"choose": {"acc,none": 0.25}}
    for iteration, rows in (
        (3, ["| a.txt | loss | 1.5000 |", "| choose | acc,none | 0.2500 |"]),
        (2, ["no `eval.json` of `megatron-sffn eval` is in the run"]),
    ):
        (run / "eval.json").write_text(json.dumps({**results, "iteration": iteration}))
        export(run, tmp_path / str(iteration))
        card = (tmp_path / str(iteration) / "README.md").read_text()
        assert all(row in card for row in rows) and "bits per byte" not in card
    (run / "eval.json").write_text("{")
    with pytest.raises(ConfigError, match=r"eval\.json is no JSON .*; write it again or remove it"):
        export(run, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_half_precision_keeps_the_biases_of_the_choice_in_fp32(
    exports: dict[str, tuple[Saved, Path]], tmp_path: Path
) -> None:
    saved, _ = exports["sigma-moe"]
    export(saved.load, tmp_path / "half", architecture="sparse_ffn", dtype="bf16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes.pop("model.layers.1.mlp.router.expert_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    with torch.no_grad():
        error = (model(saved.ids).logits.float() - saved.logits).abs().mean()
    assert error < 0.1 * saved.logits.std()


def test_the_command_never_overwrites_in_silence(
    exports: dict[str, tuple[Saved, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load, output = exports["avg-k"][0].load, tmp_path / "model"
    flags = ["--load", str(load), "--output", str(output)]
    assert main(flags) == 0
    assert f"iteration {ITERATION} of {load} -> {output}" in capsys.readouterr().out
    (output / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match=r"exists; give another folder, or add --overwrite"):
        main(flags)
    assert (output / "mine.txt").exists()
    assert main([*flags, "--overwrite"]) == 0
    assert not (output / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--load", "nowhere"], "--load nowhere does not exist"),
        (["--ckpt-step", "7"], "--ckpt-step 7 is not there"),
        (["--max-shard-size", "big"], "--max-shard-size big is no size"),
    ],
)
def test_bad_input_leaves_nothing(
    exports: dict[str, tuple[Saved, Path]], tmp_path: Path, flags: list[str], sentence: str
) -> None:
    load = ["--load", str(exports["avg-k"][0].load), "--output", str(tmp_path / "model")]
    with pytest.raises(ConfigError, match=sentence):
        main([*load, *flags])
    assert not list(tmp_path.iterdir())
