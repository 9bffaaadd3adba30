"""A real Slurm of emulated nodes: Debian's munged, slurmctld and one slurmd a node.

Each slurmd lives in UTS and mount namespaces of its own, so that a job on n2 sees the host name n2
and resolves n1, n2, ...; GPUs are copies of /dev/null that Slurm counts and binds. CPUs and memory
are declared, not enforced. All nodes share this machine's network and files. Nothing outside the
cluster's folder is touched, and stopping it ends its own processes only.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
PACKAGES = "slurmctld slurmd slurm-client munge"
SLURM_CONF = """
ClusterName=emulated
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=86400
FirstJobId={first_job}
KillWait=30
SlurmdTimeout=30
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
GresTypes=gpu
NodeName=n[1-{nodes}] NodeAddr=127.0.1.[1-{nodes}] Port=[{first}-{last}] CPUs=96 \
    RealMemory=1000000 Gres=gpu:{gpus}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP LLN=YES
"""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

ROOT = Path(__file__).parent.parent.parent
SITE = """PYTHON=({python})
DEVICE=cpu
MIN_FREE_GB=0.1
export WANDB_MODE=offline OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
"""
# Python of a container: it is not there where srun's options have not been.
INSIDE = """#!/bin/bash
[ "${{INSIDE:-}}" = yes ] || {{ echo "not there outside of the container: $0" >&2; exit 127; }}
exec {python} "$@"
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None when one can."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [daemon for daemon in DAEMONS if shutil.which(daemon) is None]
    if missing:
        install = f"apt-get install --no-install-recommends {PACKAGES}"
        return f"{', '.join(missing)} not installed: {install}"
    if os.geteuid() != 0:
        return "emulated nodes need root (namespaces and device files)"
    return None


class EmulatedSlurm:
    """One cluster; use it in ``with``."""

    def __init__(self, nodes: int, gpus: int) -> None:
        self.nodes, self.gpus = nodes, gpus
        self.folder = Path(
            tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
        )  # short: daemons put sockets there
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "EmulatedSlurm":
        self._write_files()
        self._start_munge()
        self.command("slurmctld")
        wait_until(
            lambda: "UP" in self.command("scontrol", "ping", check=False), 20, "slurmctld answers"
        )
        for number in range(1, self.nodes + 1):
            self.start_node(f"n{number}")
        wait_until(self._all_up, 60, "all nodes are up")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.command("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 60
        while self.command("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for number in range(1, self.nodes + 1):
            self.crash_node(f"n{number}")
        for name in ("slurmctld", "munged"):
            self._end(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *words: str, check: bool = True) -> str:
        """Output of a command that talks to this cluster."""
        ended = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or ended.returncode == 0, f"{words}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def start_node(self, name: str) -> None:
        """Start the daemon of a node (again)."""
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        inside = (
            f"hostname {name}; mount --bind {self.folder}/hosts /etc/hosts; exec slurmd -N {name}"
        )
        self.command("unshare", "--uts", "--mount", "--propagation", "slave", "bash", "-ec", inside)

    def crash_node(self, name: str) -> None:
        """Kill everything that runs on a node, as when it loses power."""
        namespace = self._namespace(name)
        for _ in range(2):  # a process may start another while we look
            for pid in _processes_in(namespace):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        (self.folder / f"slurmd-{name}.pid").unlink(missing_ok=True)

    def processes(self, name: str) -> list[int]:
        """Process ids of all that runs on a node, its slurmd among them."""
        return _processes_in(self._namespace(name))

    def _namespace(self, name: str) -> str:
        """The UTS namespace of a node's processes; "" when its slurmd does not run."""
        pid = self._pid(f"slurmd-{name}")
        namespace = "" if pid is None else os.readlink(f"/proc/{pid}/ns/uts")
        assert namespace != os.readlink("/proc/self/ns/uts")
        return namespace

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", job_id)))

    def wait_for(self, job_id: str, seconds: float) -> dict[str, str]:
        """The job when it has ended for good; requeued ones are waited for, their delay cut short.

        Raises:
            AssertionError: it has not ended in time.
        """
        deadline = time.monotonic() + seconds
        while (found := self.job(job_id))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"job {job_id} has not ended: {found}"
            time.sleep(1)
        return found

    def _all_up(self) -> bool:
        states = self.command("sinfo", "-h", "-N", "-o", "%t", check=False).split()
        return len(states) == self.nodes and all(state == "idle" for state in states)

    def _write_files(self) -> None:
        port = free_ports(self.nodes + 1)
        for name in ("state",):
            (self.folder / name).mkdir()
        text = SLURM_CONF.format(
            folder=self.folder,
            port=port,
            nodes=self.nodes,
            first=port + 1,
            last=port + self.nodes,
            gpus=self.gpus,
            first_job=random.randrange(
                1, 10000
            ),  # ports of a job follow from its id: clusters side by side differ
        )
        (self.folder / "slurm.conf").write_text(text)
        for index in range(self.gpus):
            os.mknod(self.folder / f"nvidia{index}", 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"Name=gpu File={self.folder}/nvidia[0-{self.gpus - 1}]\n"
        )
        names = "".join(f"127.0.1.{number} n{number}\n" for number in range(1, self.nodes + 1))
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(random.randbytes(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        where = self.folder
        self.command(
            "munged",
            "--force",
            f"--socket={where}/munge.sock",
            f"--key-file={key}",
            f"--pid-file={where}/munged.pid",
            f"--seed-file={where}/munge.seed",
            f"--log-file={where}/munged.log",
        )

    def _pid(self, name: str) -> int | None:
        file = self.folder / f"{name}.pid"
        try:
            pid = int(file.read_text())
            program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
        except (OSError, ValueError):
            return None
        return (
            pid if program.startswith(name.split("-")[0]) else None
        )  # Debian has slurmd-wlm, slurmctld-wlm

    def _end(self, name: str) -> None:
        pid = self._pid(name)
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: self._pid(name) is None, 20, f"{name} ends")


def _processes_in(namespace: str) -> list[int]:
    """Ids of the processes in a UTS namespace."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "ns/uts") == namespace:
                found.append(int(process.name))
    return found


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until ``condition`` holds.

    Raises:
        AssertionError: it does not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.2)


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nobody listens on now."""
    while True:
        first = random.randrange(40000, 60000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
