"""Hosts on one machine: network namespaces with addresses and host names of their own on one bridge, and a Ray node on each.

    with hosts(folder, 3) as found:
        found.run(0, [sys.executable, "-m", "cluster", "doctor"])       # on the head, RAY_ADDRESS set
        found.cut(1)                                                    # its network cable; `mend` puts it back
        found.kill(2)                                                   # its power

They share this machine's disk, as hosts share NFS, but for what a host keeps `private`. Needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN) and
`ip` (Debian: iproute2): `why_not` says what is missing. Only processes inside of these namespaces are ended.
"""

import os
import secrets
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from base.paths import ROOT

PATIENCE_S = 120.0
_LETTERS = iter(string.ascii_lowercase)  # one process may have several networks
# How soon the head gives a node up that says nothing: 15 s where Ray's own settings take a minute (docs/deploy.md).
HEAD = {
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


def why_not() -> str | None:
    """What is missing for network namespaces here; None where they work."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "no `ip` and `unshare` (Debian: apt install iproute2 util-linux)"
    name = f"agt{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass
class Hosts:
    """`count` hosts called host-0 and so on; the first is Ray's head."""

    folder: Path
    count: int
    cpus: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    tag: str = field(default_factory=lambda: f"ag{os.getpid() % 10000}{next(_LETTERS)}")
    private: dict[int, str] = field(default_factory=dict)

    def address(self, host: int) -> str:
        return f"10.213.{os.getpid() % 200}.{host + 1}"

    def space(self, host: int) -> str:
        return f"{self.tag}-{host}"

    @property
    def ray(self) -> str:
        return f"{self.address(0)}:6379"

    def up(self) -> None:
        """The network, then Ray's nodes."""
        _ip("link", "add", f"{self.tag}b", "type", "bridge")
        _ip("link", "set", f"{self.tag}b", "up")
        for host in range(self.count):
            _ip("netns", "add", self.space(host))
            _ip("link", "add", self._cable(host), "type", "veth", "peer", "name", "eth0", "netns", self.space(host))
            _ip("link", "set", self._cable(host), "master", f"{self.tag}b", "up")
            _ip("-n", self.space(host), "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", self.space(host), "link", "set", "eth0", "up")
            _ip("-n", self.space(host), "link", "set", "lo", "up")
        self._start([0])
        self._start(list(range(1, self.count)))

    def _start(self, wanted: list[int]) -> None:
        """Ray's nodes on these hosts. It gives each 30 s, which a busy machine may exceed: then once more, one at a time."""
        begun = {host: self._node(host) for host in wanted}
        for host, started in begun.items():
            said, _ = started.communicate(timeout=PATIENCE_S)
            for _ in range(3):
                if started.returncode == 0:
                    break
                self.kill(host)
                started = self._node(host)
                said, _ = started.communicate(timeout=PATIENCE_S)
            assert started.returncode == 0, said

    def _node(self, host: int) -> subprocess.Popen[str]:
        # Sockets lie in the temporary folder, and their paths may have 107 characters.
        place = tempfile.mkdtemp(prefix=f"{self.space(host)}-", dir="/tmp")
        role = ["--head", "--port", "6379", "--include-dashboard", "false"] if host == 0 else ["--address", self.ray]
        words = [str(Path(sys.executable).parent / "ray"), "start", *role, "--node-ip-address", self.address(host)]
        words += ["--num-cpus", str(self.cpus), "--num-gpus", "0", "--object-store-memory", "100000000", "--temp-dir", place]
        words += ["--disable-usage-stats"]
        return self.popen(host, words, HEAD)

    def popen(self, host: int, words: Sequence[str], more: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """A command on a host, its output to be read."""
        script = f"hostname host-{host}; exec {shlex.join(words)}"
        if host in self.private:
            script = f"mount -t tmpfs none {shlex.quote(self.private[host])}; {script}"
        command = ["ip", "netns", "exec", self.space(host), "unshare", "--uts", "--mount", "sh", "-c", script]
        environment = {**os.environ, **self.environment, **(more or {})}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, host: int, words: Sequence[str], timeout: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """A command on a host, to its end, with RAY_ADDRESS set."""
        process = self.popen(host, words, {"RAY_ADDRESS": self.ray})
        said, _ = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, said, "")

    def pids(self, host: int) -> list[int]:
        """Processes on a host."""
        shown = subprocess.run(["ip", "netns", "pids", self.space(host)], capture_output=True, text=True, check=True)
        return [int(word) for word in shown.stdout.split()]

    def cut(self, host: int) -> None:
        """Pull its network cable."""
        _ip("link", "set", self._cable(host), "down")

    def mend(self, host: int) -> None:
        """Put it back."""
        _ip("link", "set", self._cable(host), "up")

    def kill(self, host: int) -> None:
        """Its power is gone: every process of it ends at once."""
        for _ in range(3):  # those that were being started
            for pid in self.pids(host):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.2)

    def down(self) -> None:
        """End everything that was started here."""
        for host in range(self.count):
            if self.space(host) in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout:
                self.kill(host)
                _ip("netns", "del", self.space(host))
        subprocess.run(["ip", "link", "del", f"{self.tag}b"], capture_output=True, check=False)
        for place in Path("/tmp").glob(f"{self.tag}-*"):
            shutil.rmtree(place, ignore_errors=True)

    def _cable(self, host: int) -> str:
        return f"{self.tag}v{host}"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {shlex.join(words)}: {done.stderr}"


@contextmanager
def hosts(folder: Path, count: int, cpus: int = 1, private: dict[int, str] | None = None) -> Iterator[Hosts]:
    """Up inside, gone after."""
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
    found = Hosts(folder, count, cpus, environment, private=private or {})
    try:
        found.up()
        yield found
    finally:
        found.down()
