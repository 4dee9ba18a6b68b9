"""Dense models that become sparse compute the same function where all of it is active."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sffn.checkpoints.files import folder_to_load
from megatron_sffn.checkpoints.tensors import by_layer, read_tensors
from tests.hf.test_import import check_logits, flags_of_model, make_model, refusal, run_imports
from tests.support.megatron_models import Saved, logits_of_all, save_models
from tests.support.slow import slow

DENSE = ["--sffn-router dense --swiglu", "--sffn-router dense --squared-relu"]
EXACT = [
    "--sffn-router avg-k --sffn-block-size 4",
    "--sffn-router vanilla-m --sffn-block-size 1 --sffn-aggregator max --sffn-layers 1",
    "--sffn-router softmax-after --upcycle 4 --sffn-active-cells 32",
    "--sffn-router softmax-after --upcycle 4 --sffn-block-size 4",
    "--sffn-router rand-hash --upcycle 4",
]
"""Ways in which the function is the dense one's."""

NEAR = [
    "--sffn-router switch --upcycle 4 --init-method-std 1e-4",
    "--sffn-router sigma-moe --upcycle 4 --sffn-block-size 4 --sffn-active-cells 32",
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Saved]:
    """Dense checkpoints whose FFNs have 16 cells."""
    return save_models(tmp_path_factory.mktemp("dense"), DENSE)


def make_sparse(
    folder: Path, dense: Saved, words: Sequence[str], sentence: str
) -> dict[str, Tensor]:
    """Megatron's logits of a dense run that became sparse in several ways, each as it is told."""
    commands = [f"--load {dense.load} --save {index} {text}" for index, text in enumerate(words)]
    models = {}
    for index, printed in enumerate(run_imports(folder, commands)):
        assert sentence in printed, words[index]
        models[folder / str(index)] = flags_of_model(printed), dense.ids
    return dict(zip(words, logits_of_all(models).values(), strict=True))


@pytest.mark.parametrize("number", [0, slow(1)])
def test_a_dense_run_becomes_sparse_with_the_same_logits(
    dense: list[Saved], tmp_path: Path, number: int
) -> None:
    words = EXACT if number == 0 else EXACT[::3]
    sentence = "computes the function of the dense one"
    for text, logits in make_sparse(tmp_path, dense[number], words, sentence).items():
        torch.testing.assert_close(
            logits,
            dense[number].logits,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda message, text=text: f"{text}: {message}",
        )


def test_fewer_active_cells_compute_a_part(dense: list[Saved], tmp_path: Path) -> None:
    words = "--sffn-router avg-k --sffn-block-size 1 --sffn-active-cells 8"
    logits = make_sparse(tmp_path, dense[0], [words], "computes a part")[words]
    assert not torch.allclose(logits, dense[0].logits, atol=1e-3)


def test_other_gates_start_near(dense: list[Saved], tmp_path: Path) -> None:
    logits = make_sparse(tmp_path, dense[0], NEAR, "starts near")
    # With a gate of scores near 0 every probability is near 1/B.
    torch.testing.assert_close(logits[NEAR[0]], dense[0].logits, rtol=0, atol=0.02)
    tensors = by_layer(read_tensors(folder_to_load(tmp_path / "1", None)))
    gate = tensors["decoder.layers.0.mlp.router.weight"]
    copies = gate.unflatten(0, (4, 4))
    assert torch.equal(copies, copies[:, :1].expand_as(copies))
    assert len(torch.unique(gate, dim=0)) == 4


def test_a_model_of_transformers_becomes_sparse(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids, expected = make_model(tmp_path / "qwen3", "qwen3")
    words = "--sffn-router avg-k --sffn-block-size 16 --moe-aux-loss-coeff 0"
    (printed,) = run_imports(tmp_path, [f"--model qwen3 --save run {words}"])
    check_logits({tmp_path / "run": (flags_of_model(printed), ids, expected)})


BAD = [
    ("", "is a checkpoint already; give --sffn-router"),
    ("--sffn-router avg-k", "--sffn-router avg-k needs --sffn-block-size g; give a divisor of"),
    (
        "--sffn-router avg-k --sffn-block-size 1 --sffn-active-cells 5",
        "--sffn-active-cells 5 does not divide the FFN's 16 cells; the nearest that do are 4 and 8",
    ),
    ("--sffn-router avg-k --sffn-block-size 4 --sffn-active-cells 32", "more than the FFN's 16"),
    ("--sffn-router avg-k --sffn-block-size 3", "--sffn-block-size 3 does not divide"),
    ("--sffn-router sigma-moe --sffn-block-size 4", "has weights of its own"),
    ("--sffn-router avg-k --sffn-gate sigmoid --sffn-block-size 4", "has --sffn-gate sigmoid"),
    ("--sffn-router avg-k --upcycle 4", "--upcycle 4 needs a router that chooses whole copies"),
    ("--sffn-router rand-hash --upcycle 4 --sffn-block-size 4", "--upcycle 4 needs a router"),
    (
        "--sffn-router rand-hash --upcycle 4 --sffn-hash-balance text",
        "--upcycle 4 makes no balanced map",
    ),
    (
        "--sffn-router remoe --upcycle 4",
        "the gates of --sffn-gate relu (--sffn-router remoe) are 0",
    ),
    ("--sffn-router switch --upcycle 1", "--upcycle 1 makes no copies"),
    ("--sffn-router switch --upcycle 3 --sffn-active-cells 32", "no multiple of the 2 copies"),
    ("--sffn-router switch --upcycle 4 --sffn-active-cells 24", "no multiple of the FFN's 16"),
]


@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")  # Megatron's own
@pytest.mark.parametrize(("words", "sentence"), BAD)
def test_what_cannot_become_sparse_is_refused_in_a_sentence(
    dense: list[Saved], tmp_path: Path, words: str, sentence: str
) -> None:
    text = refusal(tmp_path, "--load", str(dense[0].load), *words.split())
    assert sentence in text, text


def test_flags_of_sparse_layers_need_a_router(tmp_path: Path) -> None:
    text = refusal(tmp_path, "--model", "m", "--upcycle", "4")
    assert "--upcycle 4 makes a dense model sparse, which needs --sffn-router" in text
