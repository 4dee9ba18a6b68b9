"""examples/launch: the commands of the scripts for torchrun, Slurm, docker and Kubernetes.

tests/integration/test_two_nodes.py runs two of the scripts on two nodes.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import config_from_args, get_args_parser

from megatron_sffn.patches import cpu
from megatron_sffn.train.arguments import parse
from tests.support.paths import ROOT
from tests.support.pretraining import MODEL
from tests.support.processes import HANGS, kill_all

LAUNCH = ROOT / "examples" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
ENVIRONMENTS = sorted(LAUNCH.glob("*.env"))
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)


def call_script(
    script: str, *flags: str, tools: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script; commands in the folder `tools` come first in PATH."""
    path = os.environ["PATH"] if tools is None else f"{tools}:{os.environ['PATH']}"
    return subprocess.run(
        [LAUNCH / script, *flags],
        env={"PATH": path, "HOME": os.environ["HOME"], **variables},
        capture_output=True,
        text=True,
        check=False,
    )


STATIC = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-a"}
ELASTIC = {"NNODES": "2:4", "MASTER_ADDR": "node-a", "RUN_ID": "mine"}
DOCKER = {**STATIC, "IMAGE": "image", "DATA": "/nfs/data", "RUNS": "/nfs/runs"}


@pytest.mark.parametrize(
    ("script", "variables", "name"),
    [
        (script, variables, name)
        for script, variables in [
            ("static.sh", STATIC),
            ("elastic.sh", ELASTIC),
            ("docker.sh", DOCKER),
        ]
        for name in variables
    ],
)
def test_a_missing_variable_is_reported(script: str, variables: dict[str, str], name: str) -> None:
    result = call_script(script, **{key: value for key, value in variables.items() if key != name})
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {name} is not set; see the head of ")


@pytest.mark.parametrize("script", ["elastic.sh", "slurm.sh"])
@pytest.mark.parametrize("missing", ["--save", "--load"])
def test_a_launcher_that_restarts_runs_requires_checkpoints(script: str, missing: str) -> None:
    flags = [flag for flag in ("--save", "--load") if flag != missing]
    result = call_script(script, *(f"{flag}=folder" for flag in flags), **ELASTIC)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {missing} is not among the flags, but ")


def write_executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return path


def torchrun_arguments(output: str) -> Any:
    """The arguments in the output of a fake torchrun, by torchrun's own parser."""
    return get_args_parser().parse_args(output.split())


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        (
            "static.sh",
            STATIC,
            {"nnodes": "2", "node_rank": 1, "master_addr": "node-a", "master_port": 29500},
        ),
        (
            "static.sh",
            {**STATIC, "MASTER_PORT": "7", "GPUS_PER_NODE": "4", "NODE_ADDR": "10.0.0.1"},
            {"master_port": 7, "nproc_per_node": "4", "local_addr": "10.0.0.1"},
        ),
        (
            "elastic.sh",
            {**ELASTIC, "IS_MASTER": "true"},
            {
                "nnodes": "2:4",
                "rdzv_backend": "c10d",
                "rdzv_endpoint": "node-a:29500",
                "rdzv_id": "mine",
                "rdzv_conf": "is_host=true",
                "max_restarts": 3,
                "nproc_per_node": "auto",
            },
        ),
    ],
)
def test_the_script_passes_its_variables_to_torchrun(
    tmp_path: Path, script: str, variables: dict[str, str], expected: dict[str, object]
) -> None:
    write_executable(tmp_path / "torchrun", 'echo "$@"')
    flags = ("--save=a", "--load=a", "--lr", "1e-3")
    result = call_script(script, *flags, tools=tmp_path, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    args = torchrun_arguments(result.stdout)
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.module and args.training_script == "megatron_sffn.pretrain"
    assert args.training_script_args == list(flags)


@pytest.mark.parametrize("file", ENVIRONMENTS, ids=lambda path: path.name)
def test_environment_files_are_commented_and_read_alike_by_docker_and_shell(file: Path) -> None:
    explained = False
    values = {}
    for line in file.read_text().splitlines():
        if match := re.fullmatch(r"#?([A-Z_]+)=(\S+)", line):
            assert explained, f"{line} has no line above it that says what it does"
            if line[0] != "#":
                values[match[1]] = match[2]
        else:
            assert not line or line.startswith("# "), line
            explained = line.startswith("# ")
    assert values
    shell = f"set -a; . {file}; env"
    output = subprocess.run(["bash", "-c", shell], env={}, capture_output=True, text=True).stdout
    assert values.items() <= dict(line.split("=", 1) for line in output.splitlines()).items()


@pytest.mark.parametrize(("gpus", "file"), [({}, "nccl.env"), ({"GPUS": ""}, "gloo.env")])
def test_docker_runs_the_static_launcher(tmp_path: Path, gpus: dict[str, str], file: str) -> None:
    write_executable(tmp_path / "docker", 'printf "%s\\n" "$@"')
    result = call_script("docker.sh", "--lr", "1e-3", tools=tmp_path, **DOCKER, **gpus)
    assert (result.returncode, result.stderr) == (0, "")
    words = result.stdout.splitlines()
    options, command = words[: words.index("image")], words[words.index("image") + 1 :]
    assert command == ["/opt/megatron-sffn/examples/launch/static.sh", "--lr", "1e-3"]
    assert options[:2] == ["run", "--rm"]
    assert ("--gpus" in options) == (not gpus)
    pairs = list(itertools.pairwise(options))
    for pair in [
        ("--network", "host"),
        ("--user", f"{os.getuid()}:{os.getgid()}"),
        ("--env-file", str(LAUNCH / file)),
        ("--env", "NODE_RANK"),
        ("--volume", "/nfs/data:/data:ro"),
    ]:
        assert pair in pairs


# Kubernetes


@pytest.fixture
def job() -> dict[str, Any]:
    """The job as the API server receives it."""
    return dict(yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text()))


def test_the_job_meets_the_rules_of_the_operator(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    master, worker = (job["spec"]["pytorchReplicaSpecs"][name] for name in ("Master", "Worker"))
    assert master["template"] == worker["template"]
    pod = master["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator sets no environment in others"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    assert pod["securityContext"]["runAsNonRoot"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    values = [variable["value"] for variable in container["env"]]
    assert all(isinstance(value, str) for value in values), "Kubernetes refuses numbers"


def test_torchrun_takes_its_arguments_from_the_operators_variables(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    replicas = sum(spec["replicas"] for spec in job["spec"]["pytorchReplicaSpecs"].values())
    # The function setPodEnv of the training operator sets these for the only worker.
    for name, value in {
        "PET_NNODES": str(replicas),
        "PET_NPROC_PER_NODE": job["spec"]["nprocPerNode"],
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "megatron-sffn-master-0",
        "PET_MASTER_PORT": "23456",
    }.items():
        monkeypatch.setenv(name, value)
    assert container["command"][0] == "torchrun"
    args = get_args_parser().parse_args([*container["command"][1:], *container["args"]])
    config, _, _ = config_from_args(args)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert config.rdzv_configs["rank"] == 1
    assert config.rdzv_endpoint == "megatron-sffn-master-0:23456"
    assert args.training_script == "megatron_sffn.pretrain"


@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")
@pytest.mark.parametrize("launcher", ["pytorchjob.yaml", "compose.yaml"])
def test_the_command_line_of_the_example_is_accepted(
    job: dict[str, Any],
    compose: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    launcher: str,
) -> None:
    if launcher == "compose.yaml":
        service = compose["services"]["node-0"]
        ranks, flags = int(service["environment"]["GPUS_PER_NODE"]), service["command"][1:]
    else:
        (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"][
            "containers"
        ]
        ranks, flags = int(job["spec"]["nprocPerNode"]), container["args"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(2 * ranks))
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    args = parse(dict(cpu.HOST_FLAGS.values()))
    assert args.save == args.load
    assert args.expert_model_parallel_size > ranks or launcher == "pytorchjob.yaml"


# Compose


@pytest.fixture
def compose() -> dict[str, Any]:
    """The file as the engine reads it."""
    return dict(yaml.safe_load((LAUNCH / "compose.yaml").read_text()))


def test_the_nodes_of_the_compose_file_differ_only_in_their_rank(compose: dict[str, Any]) -> None:
    services = compose["services"]
    ranks = [service["environment"].pop("NODE_RANK") for service in services.values()]
    first, *others = services.values()
    assert all(service == first for service in others)
    assert ranks == [str(rank) for rank in range(int(first["environment"]["NNODES"]))]
    assert first["environment"]["MASTER_ADDR"] in services
    # The image has the clone in this folder.
    script = Path(first["command"][0]).relative_to("/opt/megatron-sffn")
    assert os.access(ROOT / script, os.X_OK)
    assert (LAUNCH / first["env_file"]).is_file()
    assert (first["cap_drop"], first["init"]) == (["ALL"], True)
    (mount,) = first["volumes"]
    assert mount.split(":")[0] in compose["volumes"]


# Slurm


def test_slurm_options_stand_above_the_first_command() -> None:
    header, _ = (LAUNCH / "slurm.sh").read_text().split("set -euo pipefail", 1)
    options = re.findall(r"^#SBATCH (--\S+)$", header, re.MULTILINE)
    assert {"--signal=B:USR1@600", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= {
        *options
    }
    assert "#SBATCH" not in (LAUNCH / "slurm.sh").read_text().removeprefix(header)


# Fake commands of Slurm for one node: srun starts the step, and scancel signals its processes,
# not the batch script.
SRUN = """
[ "$1 $2" = "--wait 120" ] || exit 9
shift 2
SLURM_NODEID=0 "$@" &
echo $! >"$STATE/step"
wait $!
"""
SCANCEL = """
[ "$*" = "--signal=TERM 77" ] || exit 9
kill -TERM "$(cat "$STATE/step")"
"""
SCONTROL = """
case "$*" in
"show hostnames nodes") echo 127.0.0.1 ;;
*) echo "$*" >>"$STATE/scontrol-asked" ;;
esac
"""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + HANGS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_job_saves_before_its_time_limit_and_resumes_in_the_next_job(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        write_executable(tmp_path / name, text)
    flags = (
        f"{MODEL} --mock-data --train-iters 100000 --save run --load run --save-interval 100000 "
        "--expert-model-parallel-size 2 --eval-iters 0"
    ).split()
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}",
        "STATE": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "nodes",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }
    log = tmp_path / "log"
    iterations = []
    for _ in range(2):
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", LAUNCH / "slurm.sh", *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                env=environment,
            )
        try:
            wait_for(lambda: b"elapsed time per iteration" in log.read_bytes(), process, log)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(HANGS) == 0, log.read_text()[-3000:]
        finally:
            kill_all(process)
        iterations.append(int((tmp_path / "run/latest_checkpointed_iteration.txt").read_text()))
    assert (tmp_path / "scontrol-asked").read_text() == "requeue 77\n" * 2
    assert 0 < iterations[0] < iterations[1] < 100000
    assert f"at iteration {iterations[0]}" in log.read_text()


def test_a_failing_job_is_not_requeued(tmp_path: Path) -> None:
    for name, text in (("srun", "exit 3"), ("scontrol", SCONTROL)):
        write_executable(tmp_path / name, text)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "nodes", "STATE": str(tmp_path)}
    result = call_script("slurm.sh", "--save=a", "--load=a", tools=tmp_path, **slurm)
    assert result.returncode == 3
    assert not (tmp_path / "scontrol-asked").exists()
