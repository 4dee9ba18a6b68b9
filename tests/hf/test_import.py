"""Imports compute the logits of transformers; what cannot be held exactly is refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sffn.hf.export import export
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.utils.errors import ConfigError
from tests.hf.test_export import combinations
from tests.support.jobs import run_as_job
from tests.support.megatron_models import Saved, flags_of, logits_of_all, save_models
from tests.support.slow import slow

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "intermediate_size": 48,
}
WITHOUT_GROUPS = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
MOE = {**BASE, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**BASE, "attention_bias": True, "mlp_bias": True}),
    "llama-3": ("Llama", {**BASE, "rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**BASE, "sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", BASE),
    "qwen3": ("Qwen3", {**BASE, "head_dim": 16}),
    "gpt_neox": ("GPTNeoX", {**WITHOUT_GROUPS, "use_parallel_residual": False}),
    "starcoder2": ("Starcoder2", {**BASE, "sliding_window": None, "tie_word_embeddings": True}),
    "starcoder2-gelu": ("Starcoder2", {**BASE, "sliding_window": None, "hidden_act": "gelu"}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**MOE, "head_dim": 16, "num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "mixtral": ("Mixtral", {**BASE, "num_local_experts": 8, "num_experts_per_tok": 4}),
    "olmoe": (
        "Olmoe",
        {
            **BASE,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "glm4_moe-scaled": (
        "Glm4Moe",
        {
            **MOE,
            "n_routed_experts": 9,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
            "head_dim": 16,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **MOE,
            "n_routed_experts": 9,
            "n_shared_experts": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 1,
            "head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}
"""Name -> the class of transformers without its end, and its settings."""
CHANGED = {
    "mistral": "llama",
    "olmoe": "qwen3_moe",
    "llama-3": "llama",
    "starcoder2-gelu": "starcoder2",
    "glm4_moe-scaled": "glm4_moe",
}
"""Name -> the architecture of the export, where it is another."""


def make_model(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Save a model of random weights; returns ids and its logits."""
    family, settings = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1:  # norms, biases, and the bias that chooses experts
                tensor += torch.randn_like(tensor) * 0.1
        ids = torch.randint(96, (2, 24))
        logits = model(ids).logits
    model.save_pretrained(folder)
    return ids, logits


def run_imports(folder: Path, commands: Sequence[str]) -> list[str]:
    """Run the command with each of several lists of words; returns what each run printed."""

    def body() -> list[str]:
        from tools import import_model

        printed = []
        for words in commands:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                import_model.main(shlex.split(words))
            printed.append(output.getvalue())
        return printed

    (output,) = run_as_job(1, body, folder=folder)
    printed: list[str] = output.result
    return printed


def flags_of_model(printed: str) -> str:
    """Flags of the model, as the command printed them, and what else Megatron needs."""
    flags = next(line for line in printed.splitlines() if line.startswith("  --"))
    return f"{flags} --micro-batch-size 1 --global-batch-size 1 --train-iters 1"


def check_logits(imported: Mapping[Path, tuple[str, Tensor, Tensor]]) -> None:
    """Compare Megatron's logits of checkpoints: folder -> flags, ids, and expected logits."""
    logits = logits_of_all({load: (flags, ids) for load, (flags, ids, _) in imported.items()})
    for load, (_, _, expected) in imported.items():
        torch.testing.assert_close(
            logits[load],
            expected,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, name=load.name: f"{name}: {text}",
        )


def files_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder."""
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(before: Path, after: Path, name: str) -> None:
    """Two Hugging Face folders have the same tensors, bit for bit; `name` is for the message."""
    expected, actual = files_of(before), files_of(after)
    assert expected.keys() == actual.keys(), name
    assert all(torch.equal(expected[key], actual[key]) for key in expected), name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of every architecture."""
    folder = tmp_path_factory.mktemp("models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in CONFIGS:
            torch.save(make_model(folder / name, name), folder / f"{name}.pt")
    return folder


def test_imports_compute_what_transformers_computes_and_export_the_same_bits(
    models: Path, tmp_path: Path
) -> None:
    commands = [f"--model {models / name} --save runs/{name}" for name in CONFIGS]
    imported = {}
    for name, printed in zip(CONFIGS, run_imports(tmp_path, commands), strict=True):
        ids, logits = torch.load(models / f"{name}.pt")
        imported[tmp_path / "runs" / name] = flags_of_model(printed), ids, logits
    check_logits(imported)
    for name in CONFIGS:
        exported = export(tmp_path / "runs" / name, tmp_path / "hf" / name)
        assert exported.architecture == CHANGED.get(name, name), exported.reason
        assert_same_tensors(models / name, tmp_path / "hf" / name, name)


OWN = [
    "--sffn-router sigma-moe --sffn-shared-blocks 2 --sffn-gate-network mlp --squared-relu",
    "--sffn-router rand-hash --swiglu --position-embedding-type learned_absolute",
    "--sffn-router avg-k --sffn-descriptor subset --normalization RMSNorm --sffn-relu",
    f"{flags_of('lorkm')} --sffn-aggregator max --rotary-percent 0.5 "
    "--moe-router-load-balancing-type quantile_balancing",
    "--moe-router-num-groups 4 --moe-router-group-topk 2 --sffn-group-score mean",
    f"{flags_of('peer')} --sffn-gate sigmoid --quick-geglu --activation-func-clamp-value 0.02 "
    "--glu-linear-offset 1",
    f"{flags_of('lorkm')} --sffn-router lorkm:0,rand-hash:2,switch --swiglu "
    "--num-layers 4 --sffn-layers last:3",
    f"{flags_of('memory-plus')} --sffn-product-key-norm",
    "--sffn-router softmax-after --swiglu --normalization RMSNorm --add-qkv-bias "
    "--group-query-attention --num-query-groups 2",
]


def flags_of_all_settings(router: str) -> list[str]:
    """Flags of all combinations of settings that a router has."""
    choices = [choice for choice in combinations() if choice[0] == router]
    return [" ".join([flags_of(router), *settings]) for _, *settings in choices]


@pytest.mark.parametrize(
    "flags",
    [OWN, *(slow(flags_of_all_settings(router)) for router in ROUTERS)],
    ids=["other settings", *ROUTERS],
)
def test_exports_of_ours_come_back_bit_for_bit(tmp_path: Path, flags: list[str]) -> None:
    models: list[Saved] = save_models(tmp_path, flags)
    for number, saved in enumerate(models):
        export(saved.load, tmp_path / f"hf/{number}")
    commands = [f"--model hf/{number} --save runs/{number}" for number in range(len(flags))]
    imported = {}
    for number, printed in enumerate(run_imports(tmp_path, commands)):
        load, saved = tmp_path / f"runs/{number}", models[number]
        imported[load] = flags_of_model(printed), saved.ids, saved.logits
        export(load, tmp_path / f"again/{number}")
        first, second = tmp_path / f"hf/{number}", tmp_path / f"again/{number}"
        configs = [json.loads((path / "config.json").read_text()) for path in (first, second)]
        assert_same_tensors(first, second, flags[number])
        eos = "eos_token_id"  # of NullTokenizer, whose last id is another one
        assert {**configs[0], eos: 0} == {**configs[1], eos: 0}, flags[number]
    check_logits(imported)


def test_an_import_reads_and_writes_text_with_the_tokenizer_of_its_folder(
    tmp_path: Path, bytes_tokenizer: str
) -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**BASE, "vocab_size": 300})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(bytes_tokenizer).save_pretrained(tmp_path / "llama")
    (printed,) = run_imports(tmp_path, ["--model llama --save run"])
    assert f"--tokenizer-model {tmp_path / 'llama'} " in printed

    def generate_text() -> None:
        from tools import generate

        words = "--load run --prompt 'def f(' --max-new-tokens 8 --temperature 0 --json"
        generate.main(shlex.split(words))

    (output,) = run_as_job(1, generate_text, folder=tmp_path)
    export(tmp_path / "run", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("def f(", return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(written[0, prompt.shape[1] :])
    assert json.loads(output.stdout)["text"] == text


def test_reblock_cuts_the_experts_of_an_import(models: Path, tmp_path: Path) -> None:
    from tools import convert_checkpoint

    (printed,) = run_imports(tmp_path, [f"--model {models / 'mixtral'} --save runs/mixtral"])
    words = f"reblock --load {tmp_path}/runs/mixtral --save {tmp_path}/cut --block-size 4"
    words += " --no-evaluate"
    convert_checkpoint.main(shlex.split(words))
    ids, logits = torch.load(models / "mixtral.pt")
    flags = f"{flags_of_model(printed)} --sffn-block-size 4"
    check_logits({tmp_path / "cut": (flags, ids, logits)})


# Bad input


def refusal(folder: Path, *words: str) -> str:
    """The sentence of the command, which leaves nothing behind."""
    from tools import import_model

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        with pytest.raises(ConfigError) as error:
            import_model.main([*words, "--save", "new/run"])
    assert not (folder / "new").exists()
    return str(error.value)


@pytest.fixture
def llama(models: Path, tmp_path: Path) -> Path:
    """A copy of the Llama in two shards."""
    source, folder = models / "llama", tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = files_of(source)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def remove_shard(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def changed(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **fields)


BAD = [
    (lambda folder: (folder / "config.json").unlink(), r"llama has no config\.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    (remove_shard, "shard llama/model-1.safetensors is missing"),
    (cut_shard, "model-1.safetensors is damaged"),
    (changed(model_type="bert"), "model_type bert is no architecture that can be imported"),
    (changed(model_type="martian"), "model_type martian is no architecture"),
    (changed(hidden_act="gelu"), "config.json says hidden_act gelu, which no model of ours has"),
    (
        changed(rope_parameters={**LLAMA_3, "low_freq_factor": 2.0}),
        "config.json says rope_parameters",
    ),
    (changed(num_hidden_layers=1), r"tensor model\.layers\.1\..* is not one of architecture llama"),
]


@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")  # Megatron's own
@pytest.mark.parametrize(("spoil", "sentence"), BAD, ids=[text[:30] for _, text in BAD])
def test_a_folder_that_cannot_be_imported_is_refused_in_a_sentence(
    llama: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(llama)
    text = refusal(llama.parent, "--model", "llama")
    assert re.search(sentence, text), text
    assert "\n" not in text


@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")  # Megatron's own
def test_other_obstacles_are_refused_in_a_sentence(
    models: Path, llama: Path, tmp_path: Path, bytes_tokenizer: str
) -> None:
    folder = llama.parent
    assert "--model none is no folder" in refusal(folder, "--model", "none")
    change_config(llama, vocab_size=8)
    text = refusal(folder, "--model", "llama", "--tokenizer-model", bytes_tokenizer)
    assert "but the embedding has 8 rows" in text
    change_config(llama, vocab_size=96, num_attention_heads=4, model_type="olmoe")
    assert "over all 4 heads together" in refusal(folder, "--model", "llama")
    mixtral = ("--model", str(models / "mixtral"), "--sffn-router", "avg-k")
    assert "but this one has sparse layers" in refusal(folder, *mixtral)


def test_a_folder_without_an_index_of_its_shards_lacks_tensors(llama: Path) -> None:
    (llama / "model.safetensors.index.json").unlink()
    (llama / "model-1.safetensors").rename(llama / "model.safetensors")
    with pytest.raises(AssertionError, match=r"ConfigError: tensor .* is missing; give a (fol|mo)"):
        run_imports(llama.parent, ["--model llama --save new/run"])
    assert not (llama.parent / "new").exists()
