"""Runs trainings in processes of their own, to be killed: a family of forks, imported once.

`Family` is the test's side; executed, this file is the family's parent, which reads one JSON line
per child and forks it before any jax backend exists.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

# A U-Net on one device whose steps take milliseconds; it never ends by itself.
SMALL = {
    "data.crop": "(16, 16)",
    "data.threads": "1",
    "train.steps": "100000",
    "train.batch": "4",
    "train.log_every": "1",
    "train.eval_every": "0",
    "train.checkpoint_every": "1",
    "eval.pictures": "1",
}


class Child:
    """One training process; its output is in the file `path`."""

    def __init__(self, pid: int, path: Path):
        self.pid, self.path, self.begin, self.code = pid, path, time.monotonic(), None

    def text(self) -> str:
        return self.path.read_text() if self.path.exists() else ""

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Family:
    """Forks trainings. Close it."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.children = folder, 0, {}
        self.parent = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == {"ready": True}

    def _line(self) -> dict:
        return json.loads(self.parent.stdout.readline())

    def start(self, workdir: Path, devices: int = 1, peer: tuple = (), env=None, **config) -> Child:
        """A training of SMALL with these changes, as main would run it; peer: address, n, i."""
        self.count += 1
        path = self.folder / f"{self.count}.txt"
        changes = {**SMALL, **{k.replace("__", "."): str(v) for k, v in config.items()}}
        order = {"workdir": str(workdir), "config": changes, "output": str(path), "peer": peer}
        order |= {"devices": devices, "env": env or {}}
        self.parent.stdin.write(json.dumps(order) + "\n")
        self.parent.stdin.flush()
        child = Child(self._pid(), path)
        self.children[child.pid] = child
        return child

    def _pid(self) -> int:
        while "pid" not in (line := self._line()):
            self.children[line["ended"]].code = line["code"]
        return line["pid"]

    def wait(self, child: Child, seconds: float = 60) -> int:
        """Its exit code, negative for a signal. The family's parent tells as children end."""
        timer = time.monotonic()
        while child.code is None:
            self.parent.stdin.write('{"reap": true}\n')
            self.parent.stdin.flush()
            while "reaped" not in (line := self._line()):
                self.children[line["ended"]].code = line["code"]
            if child.code is None:
                assert time.monotonic() - timer < seconds, f"still running:\n{child.text()}"
                time.sleep(0.02)
        return child.code

    def until(self, child: Child, pattern: str, seconds: float = 60) -> re.Match:
        """Waits until its output matches."""
        timer = time.monotonic()
        while not (match := re.search(pattern, child.text())):
            assert time.monotonic() - timer < seconds, f"no {pattern!r} in:\n{child.text()}"
            time.sleep(0.01)
        return match

    def close(self) -> None:
        for child in self.children.values():
            if child.code is None:
                child.kill(9)
        self.parent.stdin.close()
        self.parent.wait(20)
        self.parent.stdout.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(order: dict) -> None:
    """What a child does: it trains and exits as main would."""
    out = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(order["env"])
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={order['devices']}"
    from jaxseg import config as configs
    from jaxseg import distributed, main, models
    from jaxseg.data.sources import Shapes
    from jaxseg.train import train

    Shapes.SPLITS = {"train": (0, 16), "val": (1, 8), "test": (2, 8)}
    config = configs.default()
    config.model.update(name="unet", num_classes=8, widths=(4, 4), padding="same", dropout=0.0)
    models.complete(config)
    configs.override(config, list(order["config"].items()))

    def run(_: list) -> int:
        address, count, index = order["peer"] or ("", 0, -1)
        with distributed.joined(distributed.find(address, count, index, False)) as line:
            if line:
                line.agree(configs.flat(config))
                line.start()
            return train(config, Path(order["workdir"]))

    main.run = run
    main.main()


def main() -> None:
    """The family's parent."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    cache = Path(__file__).parent.parent / ".cache" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    import jaxseg.main
    import jaxseg.train  # noqa: F401

    def tell(line: dict) -> None:
        print(json.dumps(line), flush=True)

    tell({"ready": True})
    for text in sys.stdin:
        order = json.loads(text)
        if "reap" in order:
            with contextlib.suppress(ChildProcessError):
                while (found := os.waitpid(-1, os.WNOHANG))[0]:
                    tell({"ended": found[0], "code": os.waitstatus_to_exitcode(found[1])})
            tell({"reaped": True})
            continue
        pid = os.fork()
        if not pid:
            work(order)
        tell({"pid": pid})


if __name__ == "__main__":
    main()
