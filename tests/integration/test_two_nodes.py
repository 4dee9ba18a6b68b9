"""Two nodes of two ranks each train the model that one node trains.

A node is a network of its own, with a cable to the other: a namespace with one end of a veth pair.
The scripts of examples/launch start torchrun in each. Nodes share this machine's disk.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT
from tests.support.pretraining import MODEL, Log
from tests.support.processes import HANGS, kill_all, wait_until
from tests.support.slow import slow

LAUNCH = ROOT / "examples" / "launch"
ADDRESSES = ("198.18.0.1", "198.18.0.2")  # of the range for tests of networks, RFC 2544
FLAGS = "--train-iters 5 --split 90,10,0"
# Both kinds of exchange inside a sparse layer cross the cable: blocks lie on all four ranks.
LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4"
# A command with this prefix ends with pytest, even when pytest is killed.
WITH_PYTEST = ("setpriv", "--pdeathsig", "KILL")


@pytest.fixture
def nodes() -> Iterator[list[int]]:
    """Two processes in their own network namespaces, joined by a cable named `cable`.

    The namespaces and the cable go with the last process in them.
    """
    if os.geteuid():
        pytest.skip("two nodes are two network namespaces, which only root can make")
    if not all(map(shutil.which, ("ip", "unshare", "nsenter", "setpriv"))):
        pytest.skip("two nodes need ip (iproute2) and unshare, nsenter, setpriv (util-linux)")
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("this container may not make network namespaces (CAP_SYS_ADMIN)")
    holders = [
        subprocess.Popen(
            [*WITH_PYTEST, "unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"],
            stdout=subprocess.PIPE,
        )
        for _ in ADDRESSES
    ]
    try:
        for holder in holders:
            assert holder.stdout and holder.stdout.readline() == b"ready\n"
        first, second = (holder.pid for holder in holders)
        cable = f"link add cable netns {first} type veth peer name cable netns {second}"
        subprocess.run(["ip", *cable.split()], check=True)
        for node, address in zip((first, second), ADDRESSES, strict=True):
            setup = f"ip addr add {address}/30 dev cable; ip link set cable up; ip link set lo up"
            subprocess.run([*inside(node), "sh", "-ec", setup], check=True)
        yield [first, second]
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def inside(node: int) -> list[str]:
    """The prefix of a command that runs in a node."""
    return [*WITH_PYTEST, "nsenter", f"--net=/proc/{node}/ns/net"]


@contextmanager
def started(
    nodes: list[int], script: str, variables: list[dict[str, str]], flags: str, folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run a script of examples/launch on all nodes, and end it with the block.

    Args:
        nodes: from the fixture.
        script: name of the script.
        variables: environment variables of each node.
        flags: of the training command.
        folder: gets the output of the nodes, `node0.log` and `node1.log`.

    Yields:
        The torchrun process of each node.
    """
    # As docs/cluster.md says: variables from the file, and those of this network by hand.
    command = ["bash", "-c", 'set -a; . "$0"; set +a; exec "$@"', LAUNCH / "gloo.env"]
    command += [LAUNCH / script, *shlex.split(flags)]
    processes = []
    try:
        for rank, node in enumerate(nodes):
            environment = {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "GLOO_SOCKET_IFNAME": "cable",
                "MASTER_ADDR": ADDRESSES[0],
                "NODE_ADDR": ADDRESSES[rank],
                "NNODES": "2",
                "GPUS_PER_NODE": "2",
                **variables[rank],
            }
            with (folder / f"node{rank}.log").open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [*inside(node), *command],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        cwd=folder,
                        env=os.environ | environment,
                    )
                )
        yield processes
    finally:
        for process in processes:
            kill_all(process)


def train(
    nodes: list[int], script: str, variables: list[dict[str, str]], flags: str, folder: Path
) -> Log:
    """Run a script to its end on all nodes."""
    with started(nodes, script, variables, flags, folder) as processes:
        codes = [process.wait(HANGS) for process in processes]
    logs = [(folder / f"node{rank}.log").read_text() for rank in range(len(nodes))]
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    return Log(text=logs[-1])


@pytest.mark.parametrize(
    ("script", "variables", "flags"),
    [
        ("static.sh", [{"NODE_RANK": "0"}, {"NODE_RANK": "1"}], FLAGS),
        slow(
            "elastic.sh",
            # The first address is none of the host itself, where c10d would look for it.
            [{"RUN_ID": "x", "IS_MASTER": "true"}, {"RUN_ID": "x", "IS_MASTER": "false"}],
            f"{FLAGS} --save run --load run --save-interval 1000",
        ),
    ],
    ids=["static", "c10d"],
)
def test_two_nodes_train_the_model_of_one_node(
    nodes,
    pretrain,
    text: str,
    tmp_path: Path,
    script: str,
    variables: list[dict[str, str]],
    flags: str,
) -> None:
    flags = f"{MODEL} --data-path {text} {LAYOUT} {flags}"
    log = train(nodes, script, variables, flags, tmp_path)
    one_node, one_rank = pretrain(4, f"{FLAGS} {LAYOUT}"), pretrain(1, FLAGS)
    for name in ("lm loss", "grad norm"):
        assert len(log.values(name)) == 5
        assert log.values(name) == one_node.values(name), name
        assert log.values(name) == pytest.approx(one_rank.values(name), rel=2e-3), name
    assert log.validation_loss == one_node.validation_loss
    assert log.validation_loss == pytest.approx(one_rank.validation_loss, rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_without_a_node_that_is_lost(
    nodes, pretrain, text: str, tmp_path: Path
) -> None:
    """One node loses its power; the other goes on alone, and ends with the same model."""
    flags = "--train-iters 24 --split 90,10,0 --expert-model-parallel-size 2"
    saved = f"{MODEL} --data-path {text} {flags} --save run --load run --save-interval 8"
    # 6 seconds to miss a node in place of 15, and 8 to wait for others in place of 30.
    timeouts = "keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=8"
    variables = [
        {"RUN_ID": "x", "NNODES": "1:2", "IS_MASTER": f"{master},{timeouts}"}
        for master in ("true", "false")
    ]
    with started(nodes, "elastic.sh", variables, saved, tmp_path) as processes:
        log = (tmp_path / "node1.log").read_text
        wait_until(lambda: bool(re.search(r"iteration +10/", log())), HANGS, log)
        kill_all(processes[1])
        assert processes[0].wait(HANGS) == 0, (tmp_path / "node0.log").read_text()[-3000:]
    alone = Log(text=(tmp_path / "node0.log").read_text())
    one_rank = pretrain(1, flags.replace("--expert-model-parallel-size 2", ""))
    norms = alone.values("grad norm")
    assert len(norms) in (8, 16), "it went on from a checkpoint"
    assert norms == pytest.approx(one_rank.values("grad norm")[-len(norms) :], rel=2e-3)
    assert alone.validation_loss == pytest.approx(one_rank.validation_loss, rel=1e-4)


@pytest.mark.slow
def test_the_containers_of_the_compose_file_train_and_resume(nodes, tmp_path: Path) -> None:
    services = yaml.safe_load((LAUNCH / "compose.yaml").read_text())["services"].values()
    (command,) = {tuple(service["command"]) for service in services}
    # The names of hosts and cables are those of this test.
    own = ("MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    variables = [
        {name: value for name, value in service["environment"].items() if name not in own}
        for service in services
    ]
    script = Path(command[0]).name
    flags = shlex.join([*command[1:], "--train-iters=6", "--exit-interval=4", "--log-interval=1"])
    for _ in range(2):
        log = train(nodes, script, variables, flags, tmp_path)
    assert len(log.values("lm loss")) == 2, "the second run goes on after step 4"
    assert log.values("lm loss")[-1] < 6.9, "less than a model that knows nothing, log(1024)"
