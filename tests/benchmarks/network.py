"""Ranks in network namespaces whose links are as slow as one asks for.

    with emulated(num_ranks=4, num_nodes=2, slow_mbit=1000) as network:
        done = run_ranks([sys.executable, "worker.py"], network)
        sent = network.bytes_sent()

Every rank has a namespace of its own, with one address and at most two interfaces: ``slow``
leads to the ranks of other nodes, ``fast`` to those of the own node. Each is one end of a
veth pair; the other end is a port of a bridge in one more namespace, the switch. A token
bucket (``tc tbf``) limits the interface of the rank, which is what the rank sends, and the
port of the switch, which is what it receives. So every rank has a network port of its own,
full duplex, as each GPU of a usual cluster has, and the switch between them is never the
bottleneck. ``fast`` is as fast as the machine unless ``fast_mbit`` limits it too.

The queues are so long that nothing is dropped, as in a lossless fabric; there is no delay
on the wire (that takes netem, which not every kernel has), so the latency is that of the
kernel and the processes. All ranks share the cores and the memory of one machine, so the
emulation shows what counts and how curves bend, not the seconds of a cluster.

Needs root, ``ip`` and ``tc`` (iproute2), ``setpriv`` (util-linux) and the kernel's tbf.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

PREFIX = "placer-emulated"
#: Jumbo frames: headers are 0.7 % of what is sent.
MTU = 9000
#: A bucket holds what the link sends in this time, so that short messages are limited too.
BURST_SECONDS = 5e-4
QUEUE_BYTES = 64 * 2**20
MASTER_PORT = 29500
#: Nothing but the limit shapes the traffic: no pauses or slow starts of the sender's own.
SETTINGS = (
    "net.ipv4.tcp_congestion_control=reno",
    "net.ipv4.tcp_slow_start_after_idle=0",
    "net.ipv4.tcp_no_metrics_save=1",
    "net.ipv6.conf.all.disable_ipv6=1",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Namespaces of ranks, numbered node by node.

    Attributes
    ----------
    num_ranks, num_nodes
        Every node has ``num_ranks / num_nodes`` ranks.
    slow_mbit, fast_mbit
        What a rank can send, and receive, per second to other nodes and inside its own,
        headers included; ``None`` is unlimited.
    """

    num_ranks: int
    num_nodes: int
    slow_mbit: float | None
    fast_mbit: float | None = None

    def __post_init__(self) -> None:
        if self.num_ranks < 2 or self.num_nodes < 1 or self.num_ranks % self.num_nodes:
            raise ValueError(f"{self.num_ranks} ranks do not divide over {self.num_nodes}")

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def interfaces(self) -> tuple[str, ...]:
        """The interfaces of every rank."""
        slow = ("slow",) if self.num_nodes > 1 else ()
        return ("fast", *slow) if self.ranks_per_node > 1 else slow

    def joined_by(self, rank: int, other: int) -> str:
        """Return the interface that leads from one rank to another."""
        near = rank // self.ranks_per_node == other // self.ranks_per_node
        return "fast" if near else "slow"

    @property
    def switch(self) -> str:
        return f"{PREFIX}-{os.getpid()}-switch"

    def namespace(self, rank: int) -> str:
        return f"{PREFIX}-{os.getpid()}-{rank}"

    def address(self, rank: int) -> str:
        return f"10.77.0.{rank + 1}"

    def environment(self, rank: int) -> dict[str, str]:
        """Return what torchrun would set for this rank."""
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(rank % self.ranks_per_node),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(MASTER_PORT),
            "GLOO_SOCKET_IFNAME": self.interfaces[-1],
        }

    def bytes_sent(self) -> dict[str, list[int]]:
        """Return the bytes that each rank has sent so far, by interface.

        Those of the interfaces' own counters: payload, acknowledgements and headers (one
        per segment that the kernel passed on, which may be larger than a packet).
        """
        sent: dict[str, list[int]] = {name: [] for name in self.interfaces}
        for rank in range(self.num_ranks):
            told = _run("ip", "-n", self.namespace(rank), "-s", "-j", "link", "show")
            links = {link["ifname"]: link["stats64"]["tx"]["bytes"] for link in told}
            for name, counts in sent.items():
                counts.append(links[name])
        return sent


def require_namespaces() -> None:
    """Skip the test where no network can be emulated."""
    missing = [name for name in ("ip", "tc", "setpriv") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"emulated networks need {', '.join(missing)}: iproute2, util-linux")
    if os.geteuid() != 0:
        pytest.skip("emulated networks need root: sudo make bench-network")
    probe = f"{PREFIX}-{os.getpid()}-probe"
    tries = (
        ("ip", "netns", "add", probe),
        ("ip", "-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "two"),
        ("ip", "-n", probe, "link", "add", "bridge", "type", "bridge"),
        ("tc", "-n", probe, *_limit("one", 100)),
    )
    try:
        for words in tries:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no emulated networks here: {' '.join(words)}: {done.stderr}")
    finally:
        _delete(probe)


@contextmanager
def emulated(
    *,
    num_ranks: int,
    num_nodes: int,
    slow_mbit: float | None,
    fast_mbit: float | None = None,
) -> Iterator[Network]:
    """Make the namespaces for the length of the block, and remove them whatever happens.

    Skips the test where that cannot be done. Namespaces that a killed process left are
    removed at the next start.
    """
    require_namespaces()
    network = Network(
        num_ranks=num_ranks, num_nodes=num_nodes, slow_mbit=slow_mbit, fast_mbit=fast_mbit
    )
    _delete_abandoned()
    try:
        _make(network)
        yield network
    finally:
        for rank in range(num_ranks):
            _delete(network.namespace(rank))
        _delete(network.switch)


def run_ranks(
    command: Sequence[str | Path],
    network: Network,
    *,
    timeout: float = 300,
    env: Mapping[str, str] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command once per rank, each in its namespace, and return what they printed.

    The environment is that of torchrun (RANK, WORLD_SIZE, ...), with one thread each, so
    ``torch.distributed.init_process_group`` needs no arguments.

    Raises
    ------
    RuntimeError
        If a rank fails or ``timeout`` seconds are over; the others are killed.
    """
    words = [str(word) for word in command]
    with ExitStack() as stack:
        outputs: list[tuple[IO[str], IO[str]]] = []
        started: list[subprocess.Popen[str]] = []
        for rank in range(network.num_ranks):
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            outputs.append((out, err))
            # The rank dies with this process, even where that is killed.
            inside = ("ip", "netns", "exec", network.namespace(rank))
            process = subprocess.Popen(
                [*inside, "setpriv", "--pdeathsig", "KILL", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    **network.environment(rank),
                    **(env or {}),
                },
            )
            stack.callback(process.wait)
            stack.callback(_kill_inside, network.namespace(rank))
            stack.callback(process.kill)
            started.append(process)
        failed = _wait(started, timeout)
        done = [
            subprocess.CompletedProcess(words, process.returncode, _text(out), _text(err))
            for process, (out, err) in zip(started, outputs, strict=True)
        ]
    if failed is not None:
        what = "had not ended" if done[failed].returncode is None else "failed"
        raise RuntimeError(
            f"rank {failed} {what} ({' '.join(words)}):\n{done[failed].stderr[-4000:]}"
        )
    return done


def _make(network: Network) -> None:
    _run("ip", "netns", "add", network.switch)
    bridges = [f"fast{node}" for node in range(network.num_nodes)]
    for bridge in ("slow", *bridges):
        _run("ip", "-n", network.switch, "link", "add", bridge, "type", "bridge")
        _run("ip", "-n", network.switch, "link", "set", bridge, "mtu", str(MTU), "up")
    for rank in range(network.num_ranks):
        _run("ip", "netns", "add", network.namespace(rank))
        _run("ip", "-n", network.namespace(rank), "link", "set", "lo", "up")
        inside = ("ip", "netns", "exec", network.namespace(rank))
        _run(*inside, "sysctl", "-q", "-w", *SETTINGS)
        node = rank // network.ranks_per_node
        for name in network.interfaces:
            bridge = "slow" if name == "slow" else bridges[node]
            _connect(network, rank, name, bridge)
        _address(network, rank)


def _connect(network: Network, rank: int, name: str, bridge: str) -> None:
    """Join an interface of a rank to a bridge, limited both ways."""
    own, switch, port = network.namespace(rank), network.switch, f"{name}-{rank}"
    pair = ("name", name, "netns", own, "type", "veth", "peer", "name", port)
    _run("ip", "link", "add", *pair, "netns", switch)
    _run("ip", "-n", own, "link", "set", name, "mtu", str(MTU), "up")
    _run("ip", "-n", switch, "link", "set", port, "mtu", str(MTU), "master", bridge, "up")
    rate = network.slow_mbit if name == "slow" else network.fast_mbit
    if rate is not None:
        _run("tc", "-n", own, *_limit(name, rate))
        _run("tc", "-n", switch, *_limit(port, rate))


def _address(network: Network, rank: int) -> None:
    """Give a rank one address, and a route to every other through the right interface."""
    own, address = network.namespace(rank), network.address(rank)
    name = network.interfaces[-1]
    _run("ip", "-n", own, "address", "add", f"{address}/32", "dev", name)
    for other in range(network.num_ranks):
        if other == rank:
            continue
        route = (f"{network.address(other)}/32", "dev", network.joined_by(rank, other))
        _run("ip", "-n", own, "route", "add", *route, "src", address)


def _limit(device: str, mbit: float) -> tuple[str, ...]:
    burst = max(MTU + 100, round(mbit * 1e6 / 8 * BURST_SECONDS))
    bucket = ("rate", f"{round(mbit * 1e6)}bit", "burst", f"{burst}b")
    return (
        *("qdisc", "add", "dev", device, "root", "tbf"),
        *bucket,
        *("limit", f"{QUEUE_BYTES}b"),
    )


def _run(*words: str) -> list[dict[str, object]]:
    """Run a command that must succeed; return the JSON that it prints, if any."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
    return json.loads(done.stdout) if done.stdout.strip() else []


def _delete(namespace: str) -> None:
    """Remove a namespace, with the interfaces in it and their other ends."""
    _kill_inside(namespace)
    words = ("ip", "netns", "delete", namespace)
    subprocess.run(words, capture_output=True, check=False)


def _kill_inside(namespace: str) -> None:
    """Kill what runs in a namespace, children of ranks too."""
    words = ("ip", "netns", "pids", namespace)
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _delete_abandoned() -> None:
    for path in Path("/run/netns").glob(f"{PREFIX}-*"):
        owner = path.name.removeprefix(f"{PREFIX}-").split("-")[0]
        if not Path("/proc", owner).exists():
            _delete(path.name)


def _wait(processes: Sequence[subprocess.Popen[str]], timeout: float) -> int | None:
    """Wait until all have ended; return the rank that failed or is late, if one is."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return codes.index(None)
        time.sleep(0.05)


def _text(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()
