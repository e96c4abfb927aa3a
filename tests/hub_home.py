"""A user's machine in the tests of the Hub: the real client in a process of its own.

It is told of the server by environment variables alone. An audit hook ends it at the first
connection to any other machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from llama4q.source import Source

STAY_HOME = """
import os, sys
def stay_home(event, arguments):
    hosts = {"socket.connect": arguments[1:2], "socket.getaddrinfo": [arguments[:1]]}.get(event, [])
    if any(host[0] != "127.0.0.1" for host in hosts):
        print(event, hosts, file=sys.stderr, flush=True)
        os._exit(99)
sys.addaudithook(stay_home)
"""
RESOLVE = """
import json, sys
from llama4q.errors import UserError
from llama4q.hub import resolve
try:
    found = resolve(sys.argv[1])
except UserError as error:
    sys.exit("Error: " + str(error))
print(json.dumps([str(found.folder), found.name, found.revision]))
"""
COMMAND_LINE = "from cli import main; main(prog_name='llama4q')"


@dataclass(frozen=True)
class Home:
    """A user's machine: HF_HOME of its own, and the Hub at some address."""

    folder: Path
    endpoint: str

    def start(self, code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        # nothing of the tester's own settings, tokens or proxies, but bytes may depend on threads
        names = ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", STAY_HOME + code, *arguments],
            cwd=Path(__file__).parent.parent,
            env={
                **kept,
                "HF_ENDPOINT": self.endpoint,
                "HF_HOME": str(self.folder),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_ETAG_TIMEOUT": "60",  # seconds, for a machine that is busy
                "HF_HUB_DOWNLOAD_TIMEOUT": "60",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, code: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        with self.start(code, *arguments, **environment) as process:
            try:
                out, said = process.communicate(timeout=900)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, said)

    def resolve(self, name: str, **environment: str) -> Source:
        done = self.run(RESOLVE, name, **environment)
        assert done.returncode == 0, done.stderr
        folder, repo, revision = json.loads(done.stdout)
        return Source(folder=Path(folder), name=repo, revision=revision)

    def error(self, name: str, **environment: str) -> str:
        """The one line of a run that fails."""
        done = self.run(RESOLVE, name, **environment)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("Error: ")
        return last.removeprefix("Error: ")
