"""Several hosts on one machine: network namespaces on a bridge, with links as slow as one says.

Namespaces have no names here, and end with the processes in them: whatever happens to a benchmark, nothing is left.
Root makes them, and whoever may be root in a user namespace of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

INTERFACE = "eth0"
_INSIDE = "BENCHMARK_IN_NAMESPACE"
_TOOLS = ("ip", "tc", "unshare", "nsenter")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class NoNetworkError(RuntimeError):
    """This machine makes no namespaces, or cannot limit links."""


def enter_namespace(module: str, arguments: Sequence[str]) -> None:
    """Start this program again in a network namespace of its own, unless it is in one; does not return then.

    Args:
        module: Of the program, as for ``python -m``.
        arguments: Of its command line.

    Raises:
        NoNetworkError: It cannot be.
    """
    if os.environ.get(_INSIDE):
        return
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    if sys.platform != "linux" or missing:
        raise NoNetworkError(f"hosts are simulated by Linux's network namespaces, with {', '.join(missing or _TOOLS)}")
    unshare = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--net"]
    tried = subprocess.run([*unshare, "ip", "link"], capture_output=True, text=True, check=False, env=_environment())  # noqa: S603
    if tried.returncode:
        raise NoNetworkError(f"network namespaces may not be made here ({tried.stderr.strip()}); run it as root")
    command = [*unshare, sys.executable, "-m", module, *arguments]
    os.execvpe(command[0], command, {**_environment(), _INSIDE: "1"})  # noqa: S606 - this program itself


class Network:
    """Hosts on a bridge, each in a namespace of its own, with an address and a link that can be limited.

    This process has to be in a namespace that is not the machine's: the bridge is in it.

    Args:
        hosts: How many.
    """

    def __init__(self, hosts: int) -> None:
        self._holders = [
            subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, env=_environment())  # noqa: S607
            for _ in range(hosts)
        ]
        self.latency = 0.0

    def __enter__(self) -> Self:
        """Connect the hosts."""
        try:
            _run("ip", "link", "set", "lo", "up")
            _run("ip", "link", "add", "bridge", "type", "bridge")
            _run("ip", "link", "set", "bridge", "up")
            for host, holder in enumerate(self._holders):
                self._wait_for_namespace(holder)
                pair = ("type", "veth", "peer", "name", INTERFACE, "netns", str(holder.pid))
                _run("ip", "link", "add", f"port{host}", *pair)
                _run("ip", "link", "set", f"port{host}", "master", "bridge", "up")
                self.run_on(host, "ip", "link", "set", "lo", "up")
                self.run_on(host, "ip", "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
                self.run_on(host, "ip", "link", "set", INTERFACE, "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the hosts, and with them their links."""
        for holder in self._holders:
            if holder.stdin is not None:
                holder.stdin.close()
            holder.wait()
        subprocess.run(["ip", "link", "delete", "bridge"], capture_output=True, check=False, env=_environment())  # noqa: S607

    def address(self, host: int) -> str:
        """Return a host's address."""
        return f"10.77.0.{host + 1}"

    def command(self, host: int, *command: str) -> list[str]:
        """Return the command that runs another one on a host."""
        return ["nsenter", f"--net=/proc/{self._holders[host].pid}/ns/net", *command]

    def run_on(self, host: int, *command: str) -> None:
        """Run a command on a host."""
        _run(*self.command(host, *command))

    def limit(self, megabits: float, milliseconds: float) -> None:
        """Limit what each host sends.

        Args:
            megabits: A second.
            milliseconds: From one host to another; left out, and `latency` then says 0, where the kernel has no netem.
        """
        rate = f"{megabits:g}mbit"
        self.latency = 0.0
        for host in range(len(self._holders)):
            root = ("tc", "qdisc", "replace", "dev", INTERFACE, "root")
            if milliseconds:
                try:
                    delay = ("netem", "rate", rate, "delay", f"{milliseconds:g}ms", "limit", "100000")
                    self.run_on(host, *root, *delay)
                except NoNetworkError:
                    pass
                else:
                    self.latency = milliseconds
                    continue
            # Deep enough for whole segments of TCP, and short beside what is measured: 2 ms of 1 Gbit/s.
            burst = str(max(1 << 18, int(megabits * 1e6 / 8 * 2e-4)))
            self.run_on(host, *root, "tbf", "rate", rate, "burst", burst, "latency", "100ms")

    @staticmethod
    def _wait_for_namespace(holder: subprocess.Popen[bytes]) -> None:
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
            if holder.poll() is not None:
                raise NoNetworkError("a host's namespace could not be made")


def sent_bytes(interface: str = INTERFACE) -> int:
    """Return the bytes that have left this host so far, headers included.

    Args:
        interface: By which.
    """
    # Unlike /sys, which shows the namespace that it was mounted in, this is the reader's own.
    listed = Path("/proc/self/net/dev").read_text(encoding="ascii")
    found = re.search(rf"^\s*{interface}:(.*)$", listed, re.MULTILINE)
    assert found is not None  # noqa: S101 - every host has it
    return int(found[1].split()[8])


def _environment() -> Mapping[str, str]:
    return {**os.environ, "PATH": _PATH}


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())  # noqa: S603 - ip and tc
    if done.returncode:
        raise NoNetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
