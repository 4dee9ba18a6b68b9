"""Encodes chunks on the machines of a Ray cluster, with results in the order of the chunks.

Design notes:
- The driver (the machine of the command) reads and writes, and the cluster encodes. No shared disk
  is needed, the files are those of a run on one machine, and a killed run resumes in the same way.
- Tasks have no state, so Ray repeats a task whose worker or machine is lost.
- Each worker builds its encoder once: a process of Ray serves one job only. It refuses to work if
  its tokenizer differs from that of the driver.
"""

from __future__ import annotations

import os
import platform
import socket
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from megatron_sffn.data.text.chunks import TextChunk, place
from megatron_sffn.data.tokenize.encoder import Encoded, Encoder
from megatron_sffn.data.tokenize.encoder_spec import EncoderSpec, Loaded
from megatron_sffn.data.tokenize.workers import AHEAD_BYTES, in_order
from megatron_sffn.utils.errors import ConfigError, require

TRIES = 10
"""Retries of a task whose worker dies: after so many the chunk itself is the cause."""
SILENCE_SECONDS = 60.0
REACH_SECONDS = 10.0

_encoder: Encoder | None = None  # the encoder of a worker process


class Cluster:
    """A Ray cluster that this process is connected to.

    Args:
        say: receives lines for the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        import ray

        self._ray, self._say = ray, say
        self._bytes: Counter[str] = Counter()  # machine -> bytes that it has encoded

    @property
    def workers(self) -> int:
        """Number of CPUs of the cluster."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    def work(
        self, encoder_spec: EncoderSpec, loaded: Loaded
    ) -> Callable[[Encoder, Iterable[TextChunk]], Generator[Encoded, None, None]]:
        """A function that encodes chunks on all CPUs, with results in order.

        Args:
            encoder_spec: from which each worker builds its encoder.
            loaded: the result of `encoder_spec.load` on the driver.
        """
        return partial(self._encode_in_order, encoder_spec, encoder_spec.digest(loaded))

    def _encode_in_order(
        self, encoder_spec: EncoderSpec, digest: str, encoder: Encoder, chunks: Iterable[TextChunk]
    ) -> Generator[Encoded, None, None]:
        encoder_spec = replace(encoder_spec, engine=encoder.engine.name)
        task = self._ray.remote(num_cpus=1, max_retries=TRIES)(_encode)
        start = partial(self._start, task, self._ray.put((encoder_spec, digest)))
        yield from in_order(start, chunks, AHEAD_BYTES * max(self.workers, 1))
        shares = ", ".join(f"{size / 1e6:.1f} MB on {node}" for node, size in self._bytes.items())
        self._say(f"Ray encoded {shares}")

    def _start(self, task: Any, shared: Any, chunks: list[TextChunk]) -> Callable[[], Encoded]:
        return partial(self._result, task.remote(shared, chunks), chunks)

    def _result(self, reference: Any, chunks: Sequence[TextChunk]) -> Encoded:
        exceptions = self._ray.exceptions
        first_document = place(chunks[0].source.name, chunks[0].source.unit, chunks[0].number)
        while True:
            try:
                node, encoded = self._ray.get(reference, timeout=SILENCE_SECONDS)
            except exceptions.GetTimeoutError:
                self._say(
                    f"waiting for the text from {first_document} on; Ray has {self.workers} CPUs"
                )
            except exceptions.RayTaskError as error:
                if isinstance(error.cause, ImportError):
                    raise ConfigError(
                        f"a machine of the Ray cluster cannot work for this command "
                        f"({error.cause}); install the same megatron-sffn there"
                    ) from error
                raise error.cause from error
            except exceptions.RayError as error:
                raise ConfigError(
                    f"Ray gave up the text from {first_document} on ({type(error).__name__}), most "
                    "often for lack of memory; give it fewer CPUs on each machine, and the same "
                    "command to resume"
                ) from error
            else:
                self._bytes[node] += encoded.num_bytes
                return encoded


@contextmanager
def connected(address: str, say: Callable[[str], None]) -> Iterator[Cluster]:
    """Connect to a cluster, until the `with` block ends.

    Args:
        address: `auto` for the cluster of this machine, or `HOST:PORT` of the head.
        say: receives lines about the cluster.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster.
    """
    require("ray", "--ray", "ray")
    import ray

    try:
        _reach(address)
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"--ray {address} leads to no cluster ({reason}); start one with ray start --head here "
            "and ray start --address HOST:6379 on the other machines"
        ) from error
    try:
        cluster = Cluster(say)
        nodes = sum(node["Alive"] for node in ray.nodes())
        say(f"{cluster.workers} CPUs on {nodes} machines of the Ray cluster {address}")
        yield cluster
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Fail at once if nothing answers; Ray would try for a quarter of an hour."""
    if address != "auto":
        head = urlsplit(address if "//" in address else f"//{address}")
        socket.create_connection((head.hostname, head.port), timeout=REACH_SECONDS).close()


def _encode(shared: tuple[EncoderSpec, str], chunks: list[TextChunk]) -> tuple[str, Encoded]:
    """The task of a worker: returns its machine and the result."""
    import ray

    node = f"{platform.node()} ({ray.get_runtime_context().get_node_id()[:6]})"
    global _encoder
    if _encoder is None:
        _encoder = _make_encoder(*shared, node)
    return node, _encoder(chunks)


def _make_encoder(encoder_spec: EncoderSpec, digest: str, node: str) -> Encoder:
    # A worker has one CPU, so the library shall start no threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        loaded = encoder_spec.load()
        if encoder_spec.digest(loaded) != digest:
            raise ConfigError(
                "the tokenizer is another than where the command was given; copy its files, and "
                "install the same versions"
            )
        return encoder_spec.encoder(loaded, [], lambda message: None)
    except ConfigError as error:
        raise ConfigError(f"on {node}: {error}") from error
