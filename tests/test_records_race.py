"""Oracle: two processes that open a store that is not there yet at once, both of which have to succeed."""

import subprocess
import sys

_OPEN = """
import sys
from pathlib import Path
from halora.records.store import Store
from halora.records.tracking import open_client

store = Store(Path(sys.argv[1]))
store.check_writable()
print("ready", flush=True)
sys.stdin.read()
print(len(open_client(store).search_experiments()))
"""


def test_processes_that_make_a_store_at_once_do_not_disturb_each_other(tmp_path):
    start = [sys.executable, "-c", _OPEN, str(tmp_path / "store")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(start, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.close()
    for process in processes:
        with process:
            out, err = process.stdout.read(), process.stderr.read()
        assert (process.returncode, out) == (0, "1\n"), err
