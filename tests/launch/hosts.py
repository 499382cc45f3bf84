"""Two hosts on one machine: network namespaces on one cable, each with its own host name."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    card: str
    namespace: str = ""

    @property
    def inside(self) -> tuple[str, ...]:
        """What stands before a command that runs there."""
        if not self.namespace:
            return ()
        named = ("unshare", "--uts", "bash", "-c", 'hostname "$0"; exec "$@"', self.name)
        return ("ip", "netns", "exec", self.namespace, *named)

    def link(self, state: str) -> None:
        """Cut the cable (``down``) or mend it (``up``)."""
        assert _ip("-n", self.namespace, "link", "set", self.card, state)


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


def can_have_two() -> bool:
    probe = f"dobd{os.getpid()}p"
    return bool(shutil.which("ip")) and os.geteuid() == 0 and _ip("netns", "add", probe) and _ip("netns", "del", probe)


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two namespaces where names resolve; loopback alone where namespaces are forbidden."""
    if not can_have_two():
        yield [Host("", "127.0.0.1", "lo"), Host("", "127.0.0.1", "lo")]
        return
    hosts = [Host(f"node{i}", f"10.77.0.{i}", "eth0", f"dobd{os.getpid()}n{i}") for i in (1, 2)]
    known = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
    files = [Path("/etc/netns") / host.namespace for host in hosts]
    try:
        for host, folder in zip(hosts, files, strict=True):
            assert _ip("netns", "add", host.namespace)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(known)
        a, b = (host.namespace for host in hosts)
        assert _ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for host in hosts:
            assert _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.card)
            assert _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.link("up")
        yield hosts
    finally:
        for host, folder in zip(hosts, files, strict=True):
            _ip("netns", "del", host.namespace)
            shutil.rmtree(folder, ignore_errors=True)
