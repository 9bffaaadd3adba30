"""``python -m launch.doctor network`` and ``links``: do nodes agree on the time, and exchange fast?

``network FOLDER`` runs on every rank under torchrun and writes ``FOLDER/network.json``: each node's
clock against the first's, the bandwidth of an all-reduce over all ranks, and of each pair of
neighbours. ``links FOLDER`` judges it as ``launch.doctor nodes`` does. Bandwidth is bus bandwidth,
2 (n - 1) / n x bytes / time: what every link carries, comparable over any number of ranks n.
"""

import json
import os
import statistics
import time
from datetime import timedelta
from typing import Any

from launch.cluster.attempts import first_failure
from launch.doctor.node import argument_parser, report_refused
from longrope2.files.artifacts import write_text

NETWORK_FILE = "network.json"
# torchrun drops a node whose heartbeat looks 15 seconds old.
MOST_CLOCK_SECONDS = 5.0
SLOW_SHARE = 0.5
CLOCK_ROUNDS = 5
TIMED_REDUCES = 5
MESSAGE_BYTES = {"gpu": 2**28, "cpu": 2**22}
TIMEOUT = timedelta(seconds=120)


def network_command(arguments: list[str]) -> None:
    """One rank of the measurement; the first writes the file."""
    parser = argument_parser("network", __doc__)
    devices = ("gpu", "cpu")
    parser.add_argument("--device", choices=devices, default="gpu", help="what to measure [gpu]")
    given = parser.parse_args(arguments)
    import torch
    import torch.distributed as dist

    local_rank, per_node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if given.device == "gpu" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, os.environ["SLURMD_NODENAME"])
    names = nodes[::per_node]
    measured: dict[str, Any] = {"device": given.device, "clock_seconds": _clocks(names, per_node)}
    message = torch.zeros(MESSAGE_BYTES[given.device] // 4, device=device)
    measured["all_reduce_gbps"] = _bandwidth(message, None)
    measured["pairs"] = _pairs(names, per_node, message) if len(names) > 1 else []
    if dist.get_rank() == 0:
        write_text(given.folder / NETWORK_FILE, json.dumps(measured, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def links_command(arguments: list[str]) -> None:
    """Judge what was measured: code 1 and the nodes to leave out when it will not do."""
    parser = argument_parser("links", __doc__)
    least = "GB/s below which a node is left out [0]"
    parser.add_argument("--min-gbps", type=float, default=0.0, help=least)
    given = parser.parse_args(arguments)
    path = given.folder / NETWORK_FILE
    if not path.is_file():
        failure = first_failure(given.folder / "network")
        node, why = (failure.node, failure.text) if failure else ("", "see above")
        report_refused([(node, f"the nodes could not exchange data: {why}")], what="")
    measured = json.loads(path.read_text(encoding="utf-8"))
    overall = measured["all_reduce_gbps"]
    slowest = min((pair["gbps"] for pair in measured["pairs"]), default=overall)
    clock = max(map(abs, measured["clock_seconds"].values()))
    what = f"all-reduce {overall:.3g} GB/s over all ranks, {slowest:.3g} between the slowest two "
    what += f"nodes; clocks within {clock:.3f} s"
    report_refused(faults_of_links(measured, given.min_gbps), what=what)


def faults_of_links(measured: dict[str, Any], min_gbps: float) -> list[tuple[str, str]]:
    """(Node, fault) pairs: clocks that are off, and nodes that are slow with every neighbour.

    Slow is below ``min_gbps``, and on GPUs below half of what the better quarter of the pairs
    reach. Of two nodes alone nobody can say which is at fault: such a fault has no node ("").
    """
    clocks, pairs = measured["clock_seconds"], measured["pairs"]
    apart = max(clocks.values()) - min(clocks.values())
    if len(clocks) == 2 and apart > MOST_CLOCK_SECONDS:
        both = f"the clocks of {' and '.join(clocks)} are {apart:.1f} s apart"
        found = [("", f"{both}; mend their time service")]
    else:
        middle = statistics.median(clocks.values())
        found = [
            (name, f"its clock is {seconds - middle:+.1f} s off the others'; mend its time service")
            for name, seconds in clocks.items()
            if abs(seconds - middle) > MOST_CLOCK_SECONDS
        ]
    speeds = sorted(pair["gbps"] for pair in pairs) or [measured["all_reduce_gbps"]]
    usual = speeds[3 * len(speeds) // 4]
    limit = max(min_gbps, SLOW_SHARE * usual if measured["device"] == "gpu" else 0.0)
    if len(pairs) <= 1:
        if usual < limit:
            asked = f"at least {limit:.3g} are asked for (MIN_BANDWIDTH_GBPS)"
            found.append(("", f"all-reduce at {usual:.3g} GB/s, {asked}"))
        return found
    slow = f"all-reduce with its neighbours is below {limit:.3g} GB/s, others have {usual:.3g}"
    fast = {name for pair in pairs if pair["gbps"] >= limit for name in pair["nodes"]}
    return found + [(name, slow) for name in clocks if name not in fast]


def _clocks(names: list[str], per_node: int) -> dict[str, float]:
    """Seconds by which each node's clock is ahead of the first's, from its shortest round trip."""
    import torch
    import torch.distributed as dist

    rank, offsets = dist.get_rank(), [0.0] * len(names)
    reading = torch.zeros(1, dtype=torch.float64)
    for node in range(1, len(names)):
        peer, best = node * per_node, float("inf")
        for _ in range(CLOCK_ROUNDS):
            if rank == 0:
                left = time.time()
                dist.send(reading, peer)
                dist.recv(reading, peer)
                back = time.time()
                if back - left < best:
                    best, offsets[node] = back - left, float(reading) - (left + back) / 2
            elif rank == peer:
                dist.recv(reading, 0)
                reading.fill_(time.time())
                dist.send(reading, 0)
    dist.broadcast_object_list(offsets, 0)
    return dict(zip(names, offsets, strict=True))


def _pairs(names: list[str], per_node: int, message: Any) -> list[dict[str, Any]]:
    """Bandwidth between each node and the next in a ring, a node in one measurement at a time."""
    import torch
    import torch.distributed as dist

    count, rank = len(names), dist.get_rank()
    ring = [(i, (i + 1) % count) for i in range(count if count > 2 else 1)]
    groups = []
    for pair in ring:
        ranks = [node * per_node + i for node in pair for i in range(per_node)]
        groups.append(dist.new_group(ranks, timeout=TIMEOUT))
    speeds = torch.zeros(len(ring), dtype=torch.float64)
    for parity in (0, 1, 2):  # 2: the last pair of a ring of odd length
        for index, pair in enumerate(ring):
            is_last_of_odd = count % 2 == 1 and index == count - 1
            if (2 if is_last_of_odd else index % 2) == parity and rank // per_node in pair:
                speed = _bandwidth(message, groups[index])
                if rank == pair[0] * per_node:
                    speeds[index] = speed
        dist.barrier()
    dist.all_reduce(speeds)
    return [
        {"nodes": [names[a], names[b]], "gbps": float(speed)}
        for (a, b), speed in zip(ring, speeds, strict=True)
    ]


def _bandwidth(message: Any, group: Any) -> float:
    """Bus bandwidth of an all-reduce in a group, GB/s."""
    import torch
    import torch.distributed as dist

    def wait() -> float:
        if message.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    dist.all_reduce(message, group=group)
    began = wait()
    for _ in range(TIMED_REDUCES):
        dist.all_reduce(message, group=group)
    seconds = (wait() - began) / TIMED_REDUCES
    ranks = dist.get_world_size(group)
    return 2 * (ranks - 1) / ranks * message.numel() * message.element_size() / seconds / 1e9
