"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, all in one folder, for any user.

The nodes are called 127.0.0.1 and 127.0.0.2, names that resolve anywhere, so that processes find the first node as they
do on a cluster. Each has one GPU, which is /dev/null or /dev/zero. Daemons stay children of the tests and are ended by
their process numbers; so is everything else that carries this cluster's configuration in its environment.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")
# Debian's daemons are where only root looks.
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"))
# Longest that anything may take, in seconds; two loaded cores need most of it to start Python.
LIMIT = 400

CONFIGURATION = """
ClusterName=evaclip
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
FirstJobId={first_job}
ReturnToService=2
JobRequeue=1
KillWait=60
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
WaitTime=0
SlurmdParameters=config_overrides
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {hardware}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {hardware}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
HARDWARE = "CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4096 Gres=gpu:1"
DEVICES = "NodeName=127.0.0.1 Name=gpu File=/dev/null\nNodeName=127.0.0.2 Name=gpu File=/dev/zero\n"


def missing_programs() -> list[str]:
    """Of the programs that a cluster needs, those that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """Two running nodes. Ends all of its processes on leaving, whatever happened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "etc" / "slurm.conf"
        self.environment = os.environ | {"SLURM_CONF": str(self.configuration), "PATH": PATH}
        self._daemons: dict[str, subprocess.Popen] = {}
        for name in ("etc", "run", "log", "state", "munge", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        ports = free_ports(3)
        self.configuration.write_text(CONFIGURATION.format(
            host=socket.gethostname().split(".")[0], user=getpass.getuser(), folder=folder, ports=ports, nodes=NODES,
            hardware=HARDWARE, first_job=ports[0],
        ))  # fmt: skip
        (folder / "etc" / "gres.conf").write_text(DEVICES)

    def __enter__(self) -> "Cluster":
        try:
            munge = self.folder / "munge"
            options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            # Forced: it would rather have a folder that every user may enter.
            self._start(
                "munged", "--foreground", "--force", *(f"--{option}={munge / name}" for option, name in options.items())
            )
            self.wait(lambda: (munge / "socket").exists(), "munged")
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait(lambda: self.idle() == set(NODES), "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons.values():
            daemon.terminate()
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
            for daemon in self._daemons.values():
                daemon.poll()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons.values():
            daemon.wait(10)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start("slurmd", "-D", "-N", node, node=node)

    def lose_node(self, node: str) -> None:
        """As a power cut does: at once, and nobody is told."""
        for _ in range(2):  # what was being started when the first look was taken
            for pid in {*self.processes(EVACLIP_TEST_NODE=node), *self.processes(SLURMD_NODENAME=node)}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._daemons.pop(f"slurmd{node}").wait(10)

    def processes(self, **variables: str) -> list[int]:
        """The numbers of this cluster's processes, daemons and jobs, in whose environment the variables stand so."""
        wanted = {
            f"{name}={value}".encode() for name, value in {"SLURM_CONF": str(self.configuration), **variables}.items()
        }
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                    found.append(int(folder.name))
            except OSError:  # it has ended, or belongs to another user
                continue
        return [pid for pid in found if pid != os.getpid()]

    def run(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=LIMIT)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode and more."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def idle(self) -> set[str]:
        """The nodes that wait for work."""
        try:
            rows = self.run("sinfo", "--Node", "--noheader", "--format=%N %t").split("\n")
        except AssertionError:  # slurmctld is not there yet
            return set()
        return {row.split()[0] for row in rows if row.endswith(" idle")}

    def wait(self, until: Callable[[], bool], what: str, report: Callable[[], str] = lambda: "") -> None:
        """Wait for something. Fails after LIMIT seconds, or when a daemon has ended, with what the daemons said."""
        deadline = time.monotonic() + LIMIT
        while not until():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            assert not ended, f"{ended} ended while waiting for {what}\n{report()}\n{self._said()}"
            assert time.monotonic() < deadline, f"no {what} in {LIMIT} s\n{report()}\n{self._said()}"
            time.sleep(0.2)

    def _start(self, program: str, *options: str, node: str = "") -> None:
        with (self.folder / "log" / f"{program}{node}.out").open("a") as output:
            path = shutil.which(program, path=PATH)
            assert path is not None
            self._daemons[program + node] = subprocess.Popen(
                [path, *options], env=self.environment | {"EVACLIP_TEST_NODE": node}, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _said(self) -> str:
        logs = sorted((self.folder / "log").iterdir())
        return "\n".join(f"== {log.name}\n" + "\n".join(log.read_text().splitlines()[-15:]) for log in logs)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
