"""Several processes as one run: how they find each other, agree, and hear of each other's end.

They meet at the first process over a line of plain TCP, before jax is told of each other: whoever
is missing, comes twice or has another config is named in one message to all, where jax's own
coordinator would abort. The line stays open, so that a process that fails takes the others with it
at once, with its message and its exit code, out of a collective that would wait for it forever.

The addresses come from the command line, or from what jax reads of a TPU pod, GKE, SLURM or Open
MPI. What goes over the line is JSON; whoever can reach the port can end the run, no more.
"""

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxseg.errors import RESTART, InputError, RestartError, exit_code, translated

PATIENCE = 300  # seconds until all have come
FAREWELL = 5  # seconds for the last word: the first process waits for the others to hang up


class Place(NamedTuple):
    """Where the first process listens, how many there are, and which one this is."""

    host: str
    port: int
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None  # of the machine's; None: all


def find(coordinator: str, processes: int, process: int, multihost: bool) -> Place | None:
    """This process' place by the command line or by its environment; None where it is alone.

    multihost: there must be one in the environment. Raises InputError for half an address.
    """
    if coordinator or processes or process >= 0:
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(f"--coordinator {coordinator!r}: needs HOST:PORT of the first process")
        if not 0 <= process < processes:
            raise InputError(
                f"--processes {processes} --process {process}: needs N of 1 or more and I of "
                "0 .. N - 1, both"
            )
        return Place(host, int(port), processes, process) if processes > 1 else None
    if not (multihost or _told()):
        return None
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(*[None] * 5, PATIENCE)
    except Exception as error:  # of many kinds: metadata servers, Kubernetes, what is not set
        raise InputError(
            f"the other processes are not found: {error}. Use --coordinator HOST:PORT "
            "--processes N --process I"
        ) from error
    address, count, index, devices = found
    if address is None or count is None or index is None:
        raise InputError(
            "--multihost: neither a TPU pod, GKE, SLURM nor Open MPI is found. Use "
            "--coordinator HOST:PORT --processes N --process I"
        )
    host, _, port = address.rpartition(":")
    devices = None if devices is None else tuple(devices)
    return Place(host, int(port), count, index, devices) if count > 1 else None


def _told() -> bool:
    """Whether the environment names other processes; a metadata server is not asked."""
    env = os.environ
    counts = ("SLURM_NTASKS", "SLURM_STEP_NODELIST"), ("OMPI_COMM_WORLD_SIZE",)
    launched = any(
        all(key in env for key in keys) and env[keys[0]].isdecimal() and int(env[keys[0]]) > 1
        for keys in counts
    )
    return launched or "," in env.get("TPU_WORKER_HOSTNAMES", "")


@contextlib.contextmanager
def joined(place: Place | None, patience: float = PATIENCE) -> Iterator["Line | None"]:
    """The line to the other processes, None where there are none.

    What is raised inside ends all processes, this one too, before it gets out; without an error,
    all leave together. Raises InputError where they do not meet.
    """
    if place is None:
        yield None
        return
    line = Line(place, patience)
    try:
        yield line
        line.done()
    except BaseException as raised:  # the others wait for this process
        error = translated(raised)
        code, problem = exit_code(error), str(error) or type(error).__name__
        if code == 1:
            traceback.print_exc()
        print(f"error: {problem}", file=sys.stderr, flush=True)
        line.fail(code, problem)


class Line:
    """The open connections of this process: to the first one, or of that to all others.

    First `agree`, then `start`, and in the end `done` or `fail`.
    """

    def __init__(self, place: Place, patience: float = PATIENCE):
        """Waits until all have come. Raises InputError, everywhere, where they do not."""
        self.place, self.peers, self.lock = place, {}, threading.Lock()
        self.over, self.deadline = False, time.monotonic() + patience
        self.listeners: list[threading.Thread] = []
        try:
            self._meet(patience)
        except BaseException:
            self.close()
            raise

    def _meet(self, patience: float) -> None:
        if not self.place.process:
            return self._gather(patience)
        self.peers[0] = _Peer(self._reach(patience))
        self.peers[0].send({"hello": [self.place.process, self.place.processes]})
        self._hear(0, patience + FAREWELL)  # it says who is missing

    def _reach(self, patience: float) -> socket.socket:
        address = (self.place.host, self.place.port)
        while True:
            try:
                return socket.create_connection(address, timeout=5)
            except OSError as error:
                if time.monotonic() > self.deadline:
                    raise InputError(
                        f"the first process is not reached at {address[0]}:{address[1]} in "
                        f"{patience:g} s ({error}): is it running, and is the port open?"
                    ) from error
            time.sleep(0.2)

    def _gather(self, patience: float) -> None:
        port, count = self.place.port, self.place.processes
        try:
            door = _door(port)
        except OSError as error:
            raise InputError(f"cannot listen on port {port}: {error.strerror}") from error
        problem = ""
        with door:
            while len(self.peers) < count - 1 and not problem:
                door.settimeout(max(0.01, self.deadline - time.monotonic()))
                try:
                    peer = _Peer(door.accept()[0])
                except TimeoutError:
                    missing = [i for i in range(1, count) if i not in self.peers]
                    problem = f"no word of process {missing} of {count} in {patience:g} s"
                    continue
                said = peer.hello()
                if said is None:  # a stranger: a port scan, a health check
                    continue
                index, number = said
                if number != count or not 0 < index < count:
                    problem = f"process {index} is one of {number}, and process 0 of {count}"
                elif index in self.peers:
                    problem = f"two processes are number {index}"
                self.peers[-1 if problem else index] = peer
        if problem:
            raise self._refuse(problem)
        self._tell({})

    def _refuse(self, problem: str) -> InputError:
        self._tell({"error": problem, "code": 2})
        self.over = True
        return InputError(problem)

    def agree(self, config: dict[str, Any]) -> None:
        """Raises InputError, everywhere, where a process has another config than the first."""
        left = max(1.0, self.deadline - time.monotonic())
        if self.place.process:
            self.peers[0].send({"config": config})
            self._hear(0, left + FAREWELL)
            return
        mine = json.loads(json.dumps(config))
        for index in sorted(self.peers):
            theirs = self._hear(index, left)["config"]
            keys = sorted(k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k))
            if keys:
                key, more = keys[0], f" and {len(keys) - 1} more" if keys[1:] else ""
                raise self._refuse(
                    f"process {index} has another config: {key} is {theirs.get(key)!r} there and "
                    f"{mine.get(key)!r} in process 0{more}: start all with the same command"
                )
        self._tell({})

    def start(self) -> None:
        """Makes one jax of the processes, and listens for their end from now on."""
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # where there is no GPU
        jax.distributed.initialize(
            f"{self.place.host}:{self.place.port}",
            self.place.processes,
            self.place.process,
            self.place.local_devices,
            cluster_detection_method="deactivate",
        )
        for pair in self.peers.items():
            listener = threading.Thread(target=self._listen, args=pair, daemon=True)
            listener.start()
            self.listeners.append(listener)

    def _tell(self, message: dict, but: int | None = None) -> None:
        for index, peer in self.peers.items():
            if index != but:
                peer.send(message)

    def _hear(self, index: int, seconds: float) -> dict:
        """The peer's next message. Raises what it says of an error, after telling the others."""
        try:
            said = self.peers[index].receive(seconds)
        except TimeoutError:
            raise self._refuse(f"no word of process {index} in {seconds:.0f} s") from None
        if said is None:
            said = {"error": f"process {index} is gone", "code": RESTART}
        if "error" in said:
            self._tell(said, but=index)
            self.over = True
            kind = InputError if said["code"] == 2 else RestartError
            raise kind(said["error"])
        return said

    def _listen(self, index: int, peer: "_Peer") -> None:
        """Waits for the peer's last word; ends this process too where it failed."""
        said = peer.receive(None)
        if said is None:
            said = {"error": f"process {index} is gone: the same command goes on", "code": RESTART}
        if "error" not in said:
            return
        with self.lock:
            if self.over:
                return
            self.over = True
            print(f"error: {said['error']}", file=sys.stderr, flush=True)
            self._tell(said, but=index)
            self._leave(said["code"])

    def close(self) -> None:
        """Hangs up, the first process last: the others may not have read its word yet, and it holds
        jax's coordinator, without which they would abort."""
        sockets = [peer.socket for peer in self.peers.values()]
        end, self.peers = time.monotonic() + FAREWELL, {}
        while not self.place.process and sockets and time.monotonic() < end:
            ready, _, _ = select.select(sockets, [], [], 0.1)
            for gone in [s for s in ready if not _still_open(s)]:
                sockets.remove(gone)
                gone.close()
        for rest in sockets:
            rest.close()

    def _leave(self, code: int) -> None:
        self.close()
        sys.stdout.flush()
        os._exit(code)

    def done(self) -> None:
        """Waits until all are done: none leaves jax's coordinator while another still works."""
        if self.place.process:
            self._tell({"done": True})
        for listener in self.listeners:
            listener.join()
        if not self.place.process:
            self._tell({"done": True})

    def fail(self, code: int, problem: str) -> None:
        """Ends all processes with that code, this one too; they say why."""
        with self.lock:
            if not self.over:
                self.over = True
                me = f"process {self.place.process} of {self.place.processes}"
                self._tell({"error": f"{me}: {problem}", "code": code})
            self._leave(code)


def _door(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _still_open(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(4096))
    except OSError:
        return False


class _Peer:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.socket, self.rest = connection, b""

    def send(self, message: dict) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # it is gone, which whoever listens to it finds out
            pass

    def hello(self) -> tuple[int, int] | None:
        """(its number, how many it believes there are) of a process; None of anyone else."""
        try:
            index, count = self.receive(5)["hello"]
            return int(index), int(count)
        except (TimeoutError, TypeError, KeyError, ValueError):
            self.socket.close()
            return None

    def receive(self, seconds: float | None) -> Any:
        """The next message; None at the end of the line, or for what is no JSON.

        Raises TimeoutError.
        """
        self.socket.settimeout(seconds)
        while b"\n" not in self.rest:
            try:
                more = self.socket.recv(65536)
            except TimeoutError:
                raise
            except OSError:
                return None
            if not more or len(self.rest) > 2**24:
                return None
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError:
            return None
