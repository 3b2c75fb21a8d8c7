"""A real SLURM cluster on this machine: controller and node daemons on loopback, in a folder and on ports of their own.

Needs root and Debian's `slurm-wlm` and `munge`, which are installed where apt-get can; else `Unavailable` says why not.
Nothing outside its folder is used, so that it gets along with another cluster on the same machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")

CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SlurmdTimeout=10
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class Unavailable(Exception):
    """There can be no SLURM cluster here; the message says why."""


def install() -> None:
    """Make sure that SLURM's programs are here.

    Raises:
        Unavailable: when they are not and cannot be installed.
    """
    if os.geteuid() != 0:
        raise Unavailable("SLURM's daemons need root")
    if all(shutil.which(program) for program in PROGRAMS):
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"there is no apt-get to install {' and '.join(PACKAGES)} with")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60"]
    for command in ([*get, "update"], [*get, "install", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=100, env=environment)
        except (subprocess.SubprocessError, OSError) as err:
            words = (getattr(err, "stderr", None) or str(err)).strip().splitlines()
            raise Unavailable(f"{' and '.join(PACKAGES)} cannot be installed: {words[-1] if words else err}") from None
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise Unavailable(f"{' and '.join(PACKAGES)} are installed, but there is no {', '.join(missing)}")


class Loopback:
    """`nodes` nodes of 4 CPUs, all of them this machine; a context that ends every daemon that it started.

    Raises:
        Unavailable: on entry, when they do not come up.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Loopback:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", *(f"spool.node{n + 1}" for n in range(self.nodes))):
            (self.folder / name).mkdir()
        first = _free_ports(self.nodes + 1)
        text = CONF.format(
            host=socket.gethostname().split(".")[0], folder=self.folder, nodes=self.nodes,
            controller_port=first, first=first + 1, last=first + self.nodes,
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        try:
            self._start_munge()
            self._daemon("slurmctld", "-c")
            for number in range(self.nodes):
                self.start_node(f"node{number + 1}")
            self.wait_for_idle(self.nodes)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def call(self, *command: str, timeout: float = 20) -> str:
        """Run a command against this cluster; its output, or an error with what it complained of."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=self.environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._daemon("slurmd", "-N", name)

    def kill_node(self, name: str) -> None:
        """As if the power failed: kill a node's daemon, and every process of jobs on it."""
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            psutil.Process(int((self.folder / f"slurmd.{name}.pid").read_text())).kill()
        self._kill_jobs(name)

    def _kill_jobs(self, node: str | None = None) -> None:
        """Kill all processes of jobs of this cluster, of one node or of all, and the daemons of their steps."""
        found, daemons = [], []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                own = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if own and "SLURM_JOB_ID" in environment and node in (None, environment.get("SLURMD_NODENAME")):
                    found.append(process)
                    daemons += [parent for parent in process.parents() if parent.name() == "slurmstepd"]
                elif node is None and process.name() == "slurmstepd" and Path(process.cwd()) == self.folder:
                    daemons.append(process)  # it would wait for its node's daemon for ever
        for process in (*daemons, *found):  # daemons first: they would tell the controller how their tasks ended
            with contextlib.suppress(psutil.Error):
                process.kill()

    def wait_for_idle(self, nodes: int, seconds: float = 20) -> None:
        """Wait until so many nodes can take jobs."""
        until, found = time.monotonic() + seconds, ""
        while time.monotonic() < until:
            with contextlib.suppress(RuntimeError):
                found = self.call("sinfo", "-h", "-N", "-o", "%N %T")
            if sum(line.endswith(" idle") for line in found.splitlines()) >= nodes:
                return
            time.sleep(0.2)
        raise Unavailable(f"{nodes} nodes did not come up in {seconds:.0f} s: {found or 'the controller is silent'}")

    def stop(self) -> None:
        """End every daemon started here, by its own process number, and what jobs left."""
        daemons = []
        for pid in self.folder.glob("*.pid"):
            with contextlib.suppress(ValueError, psutil.NoSuchProcess, FileNotFoundError):
                process = psutil.Process(int(pid.read_text()))
                process.terminate()
                daemons.append(process)
        self._kill_jobs()  # daemons wait for them
        for process in psutil.wait_procs(daemons, timeout=5)[1]:
            process.kill()

    def _start_munge(self) -> None:
        """An authentication daemon of our own: that of the machine, if it has one, is left alone."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {"--key-file": "munge.key", "--socket": "munge.socket", "--pid-file": "munged.pid"}
        names |= {"--log-file": "munged.log", "--seed-file": "munge.seed"}
        self._daemon("munged", "--force", *(f"{option}={self.folder / name}" for option, name in names.items()))

    def _daemon(self, *command: str) -> None:
        done = subprocess.run(
            command, env=self.environment, timeout=20, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            raise Unavailable(f"{command[0]} does not start: {(done.stderr or done.stdout).strip()[-300:]}")


def _free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those that the system gives to clients."""
    start = 20_000 + os.getpid() % 8_000
    for first in range(start, 32_000 - count, count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
        return first
    raise Unavailable(f"no {count} free ports in a row from {start}")
