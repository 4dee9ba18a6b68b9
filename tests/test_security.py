"""Checkpoints and tokenizers run no code, and no output contains secrets."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sffn.checkpoints.files import COMMON_STATE, read_common, read_metadata
from megatron_sffn.checkpoints.pickle_scan import NOT_FROM_A_CHECKPOINT, without
from megatron_sffn.checks.pickles import check_data_only
from megatron_sffn.patches import unpickling
from megatron_sffn.patches.registry import resolve
from megatron_sffn.tools import convert_checkpoint
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.pretraining import MODEL
from tests.support.slow import slow

FLAGS = "--train-iters 2 --save-interval 1 --split 90,10,0 --eval-iters 1"
EP2 = "--expert-model-parallel-size 2"
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_SecretSecretSecretSecretSecret",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
}


class Code:
    """An object that makes a folder when it is unpickled, in place of hostile code."""

    def __init__(self, code_folder: Path) -> None:
        self.code_folder = code_folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.code_folder), 0o777, True)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run, filled by `load`."""
    return tmp_path_factory.mktemp("original")


@pytest.fixture
def load(pretrain, originals: Path, tmp_path: Path) -> Path:
    """A copy of a run's folder, with iterations 1 and 2."""
    if not any(originals.iterdir()):
        pretrain(2, f"{FLAGS} {EP2} --save {originals}")
    return Path(shutil.copytree(originals, tmp_path / "run"))


@pytest.fixture
def code_folder(tmp_path: Path) -> Path:
    """The folder that exists if the code ran."""
    return tmp_path / "made"


def save_to_bytes(value: Any, **options: Any) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def replace_objects(folder: Path, key: str, data: bytes) -> None:
    """Replace the bytes of the objects of a key in the shards."""
    metadata = read_metadata(folder)
    for index, item in metadata.storage_data.items():
        if index.fqn.startswith(key):
            path = folder / item.relative_path
            start = path.stat().st_size
            with path.open("ab") as file:
                file.write(data)
            metadata.storage_data[index] = replace(item, offset=start, length=len(data))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common_file(folder: Path, code: Code) -> None:
    torch.save({**read_common(folder), "more": code}, folder / "common.pt")


def in_common_state(folder: Path, code: Code) -> None:
    replace_objects(folder, COMMON_STATE, save_to_bytes([{**read_common(folder), "more": code}]))


def in_newer_pickle(folder: Path, code: Code) -> None:
    replace_objects(folder, COMMON_STATE, save_to_bytes([code], pickle_protocol=4))


def in_random_numbers(folder: Path, code: Code) -> None:
    replace_objects(folder, "rng_state", save_to_bytes([code]))


def as_metadata(folder: Path, code: Code) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(code))


def inside_metadata(folder: Path, code: Code) -> None:
    metadata = replace(read_metadata(folder), planner_data={"more": code})
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_legacy_file(folder: Path, code: Code) -> None:
    rank_folder = make_legacy(folder)
    torch.save({"args": None, "more": code}, rank_folder / "model_optim_rng.pt")


def in_legacy_optimizer(folder: Path, code: Code) -> None:
    rank_folder = make_legacy(folder)
    torch.save({"args": None}, rank_folder / "model_optim_rng.pt")
    torch.save({"more": code}, rank_folder / "distrib_optim.pt")


def in_legacy_bare_pickle(folder: Path, code: Code) -> None:
    (make_legacy(folder) / "model_optim_rng.pt").write_bytes(pickle.dumps(code))


def make_legacy(folder: Path) -> Path:
    """Replace an iteration by one in the format `torch`; returns the folder of its first rank."""
    shutil.rmtree(folder)
    (folder / "mp_rank_00").mkdir(parents=True)
    return folder / "mp_rank_00"


HOSTILE_FILES = {
    "common.pt": (in_common_file, "os.makedirs in common.pt"),
    "common state": (in_common_state, r"os.makedirs in __\d_0.distcp"),
    "newer pickle": (in_newer_pickle, r"what torch's checkpoints never hold in __\d_0.distcp"),
    "random numbers": (in_random_numbers, r"os.makedirs in __\d_0.distcp"),
    "metadata": (as_metadata, "os.makedirs in .metadata"),
    "inside metadata": (inside_metadata, "os.makedirs in .metadata"),
    "legacy": (in_legacy_file, "os.makedirs in mp_rank_00/model_optim_rng.pt"),
    "legacy optimizer": (in_legacy_optimizer, "os.makedirs in mp_rank_00/distrib_optim.pt"),
    "legacy bare pickle": (
        in_legacy_bare_pickle,
        "what torch.save before 1.6 could name in mp_rank_00/model_optim_rng.pt",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_code_in_a_checkpoint_is_named_with_its_file_and_not_run(
    load: Path, code_folder: Path, name: str
) -> None:
    write, place = HOSTILE_FILES[name]
    folder = load / "iter_0000002"
    write(folder, Code(code_folder))
    with pytest.raises(ConfigError, match=f"checkpoint {folder} names {place}, which is code"):
        check_data_only(folder)
    assert not code_folder.exists()


@pytest.mark.parametrize("name", ["common state", "metadata", "legacy"])
def test_training_refuses_a_checkpoint_with_code(
    pretrain, load: Path, code_folder: Path, name: str
) -> None:
    write, place = HOSTILE_FILES[name]
    write(load / "iter_0000002", Code(code_folder))
    new_run = load.parent / "new"
    sentence = f"ConfigError: checkpoint {load}/iter_0000002 names {place}, which is code"
    with pytest.raises(AssertionError, match=sentence) as refusal:
        pretrain(1, f"{FLAGS} --load {load} --save {new_run} --auto-detect-ckpt-format")
    assert "add --sffn-trust-checkpoint if you trust" in str(refusal.value)
    assert not code_folder.exists()
    assert not new_run.exists()


def test_no_loading_flag_lets_code_run(pretrain, load: Path, code_folder) -> None:
    in_common_state(load / "iter_0000002", Code(code_folder))
    for flags in (
        f"--load {load} --ckpt-format torch",
        f"--pretrained-checkpoint {load} --load {load / 'none'}",
        f"--load {load} --no-load-optim --no-load-rng --finetune",
    ):
        with pytest.raises(AssertionError, match=r"names os.makedirs in __\d_0.distcp"):
            pretrain(1, f"{FLAGS} {flags}")
    assert not code_folder.exists()


@pytest.mark.parametrize("name", ["common state", slow("random numbers"), slow("inside metadata")])
def test_code_runs_if_the_user_trusts_the_checkpoint(
    pretrain, load: Path, code_folder, name: str
) -> None:
    """This also shows that the code of these tests runs when nothing refuses it."""
    HOSTILE_FILES[name][0](load / "iter_0000002", Code(code_folder))
    flags = f"{FLAGS} {EP2} --load {load} --sffn-trust-checkpoint"
    if name == "random numbers":  # the objects are only code, so loading fails after it ran
        with pytest.raises(AssertionError):
            pretrain(2, flags)
    else:
        pretrain(2, flags)
    assert code_folder.is_dir()


def test_reading_without_the_scan_refuses_code_too(load: Path, code_folder) -> None:
    folder = load / "iter_0000002"
    in_common_state(folder, Code(code_folder))
    with (
        pytest.warns(UserWarning, match=r"torch\.distributed is disabled"),
        pytest.raises(CheckpointException, match="Weights only load failed"),
    ):
        load_common_state_dict(str(folder))
    inside_metadata(folder, Code(code_folder))
    with pytest.raises(unpickling.ForeignCode, match=r"os.makedirs"):
        FileSystemReader(folder).read_metadata()
    assert not code_folder.exists()


def test_a_checkpoint_of_megatron_holds_only_data(load: Path) -> None:
    check_data_only(load / "iter_0000002")


def test_a_damaged_file_does_not_count_as_code(load: Path) -> None:
    folder = load / "iter_0000002"
    replace_objects(folder, COMMON_STATE, bytes(500))
    check_data_only(folder)
    (folder / ".metadata").write_bytes(b"nothing")
    check_data_only(folder)


@pytest.mark.parametrize("row", unpickling.PATCHES, ids=lambda row: row.target)
def test_every_patched_function_is_used_where_the_registry_says(row: Any) -> None:
    owner, user = resolve(row.needed_by)
    name = row.target.rpartition(".")[2]
    code = inspect.getsource(getattr(owner, user))
    assert f" {name}.load(" in code or f".{name}(" in code


def test_installing_the_patches_twice_changes_nothing() -> None:
    functions = [getattr(*resolve(row.target)) for row in unpickling.PATCHES]
    unpickling.install()
    assert [getattr(*resolve(row.target)) for row in unpickling.PATCHES] == functions


def test_names_allowed_in_metadata_exist(tmp_path: Path) -> None:
    for module, names in unpickling.METADATA_NAMES.items():
        if module == "pathlib._local" and sys.version_info < (3, 13):
            continue
        for name in names:
            assert hasattr(importlib.import_module(module), name), (module, name)
    metadata = Metadata({}, planner_data={"dtypes": [torch.bfloat16], "path": tmp_path})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert FileSystemReader(tmp_path).read_metadata().planner_data == metadata.planner_data


# The command line in a checkpoint


def test_permissions_in_the_command_of_a_checkpoint_are_removed() -> None:
    command = "--sffn-trust-checkpoint --lr 1 --spec a b --trust-remote-code --seed 2 --spec=a"
    assert without(command.split(), NOT_FROM_A_CHECKPOINT) == ["--lr", "1", "--seed", "2"]


# The commands, as processes


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def error_sentence(process: subprocess.CompletedProcess[str]) -> str:
    """The error of a command that ended with exit code 2."""
    assert process.returncode == 2, process.stderr
    (sentence,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert "Traceback" not in process.stderr
    return sentence


def test_the_commands_refuse_code_with_one_sentence(load: Path, code_folder, text: str) -> None:
    in_common_state(load / "iter_0000002", Code(code_folder))
    convert = [ROOT / "tools" / "convert_checkpoint.py", "reblock", "--load", load]
    convert += ["--save", load.parent / "finer", "--block-size", "4"]
    assert " names os.makedirs in __" in error_sentence(run(*convert))
    flags = shlex.split(f"{MODEL} {FLAGS} --data-path {text} --load {load}")
    trained = run("-m", "megatron_sffn.pretrain", *flags)
    assert " names os.makedirs in __" in error_sentence(trained)
    assert not code_folder.exists()
    assert not (load.parent / "finer").exists()


def test_the_tool_reads_code_if_the_user_trusts_the_checkpoint(
    load: Path, code_folder, monkeypatch
) -> None:
    in_common_state(load / "iter_0000002", Code(code_folder))
    monkeypatch.setenv(
        unpickling.TRUST, "0"
    )  # so that pytest restores it after the flag has set it
    flags = f"reblock --load {load} --save {load.parent}/finer --block-size 4 --no-evaluate"
    assert convert_checkpoint.main([*flags.split(), "--sffn-trust-checkpoint"]) == 0
    assert code_folder.is_dir()


# Tokenizers


@pytest.fixture
def tokenizer(code_folder: Path, tmp_path: Path) -> Path:
    """A folder with a tokenizer whose code makes a folder."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}, "tokenizer_class": "Tokenizer"}'
    )
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(code_folder)!r})\n")
    return folder


def test_code_of_a_tokenizer_runs_only_on_request(
    pretrain, code_folder, tokenizer: Path, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    flags = f"{FLAGS} --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}"
    with pytest.raises(AssertionError, match=r"ConfigError: .* cannot be loaded"):
        pretrain(1, flags)
    assert not code_folder.exists()
    with pytest.raises(AssertionError, match=r"ConfigError: .* cannot be loaded"):
        pretrain(1, f"{flags} --trust-remote-code")
    assert code_folder.is_dir()


# Secrets


def test_no_output_of_a_run_contains_secrets(pretrain, monkeypatch, tmp_path: Path) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    log = pretrain(2, f"{FLAGS} {EP2} --save {tmp_path}/run --tensorboard-dir {tmp_path}/run/tb")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"summary.json", "routing.jsonl", ".metadata", "__0_0.distcp"} <= names
    assert any(name.startswith("events.out") for name in names)
    report = tmp_path / "run" / "report"
    analyze = [ROOT / "tools" / "analyze_routing.py", tmp_path / "run", "--out", report]
    process = run(*analyze, "--tokens", "512", "--iterations", "2")
    assert process.returncode == 0, process.stderr
    texts = [log.text, process.stdout, process.stderr]
    texts += [path.read_bytes().decode("latin1") for path in report.rglob("*") if path.is_file()]
    texts += [path.read_bytes().decode("latin1") for path in files]
    for value in SECRETS.values():
        assert not any(value in text for text in texts)
