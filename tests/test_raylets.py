"""Oracles: what nodes say of themselves by Ray, and what the head says of them; the kernel, for what is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psycopg
import pytest
from namespaces import can_make_namespaces, left_over, traces
from raylets import frozen, raylets, source_environment
from services import postgres_server

ASK_EVERY_NODE = """
import json, os, socket, sys
import ray

ray.init(sys.argv[1], log_to_driver=False, namespace="test")

@ray.remote(num_cpus=0.5)
class Asked:
    def where(self):
        return ray.util.get_node_ip_address(), os.getpid()

    def reaches(self, host, port):
        socket.create_connection((host, port), timeout=20).close()
        return True

host, port = sys.argv[2].split(":")
actors = {f"node{k}": Asked.options(resources={f"node{k}": 0.1}, lifetime="detached").remote() for k in (1, 2)}
print(json.dumps({name: ray.get(actor.where.remote()) for name, actor in actors.items()}))
assert all(ray.get([actor.reaches.remote(host, int(port)) for actor in actors.values()]))
"""

KILLED = """
import os, signal, sys
from namespaces import can_make_namespaces
from raylets import Cluster

cluster = Cluster(can_make_namespaces(), {})
cluster.start_head()
cluster.start_node()
print(cluster.folder.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nodes_have_addresses_of_their_own_and_one_dies():
    with raylets(1, 1) as cluster, postgres_server(cluster.head_address) as database:
        server = database.uri.rpartition("@")[2].partition("/")[0]
        asked = subprocess.run(
            [sys.executable, "-c", ASK_EVERY_NODE, cluster.address, server],
            env=cluster.environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert asked.returncode == 0, asked.stderr
        said = json.loads(asked.stdout)
        addresses = {name: address for name, (address, _) in said.items()}
        assert addresses == {name: cluster.nodes[name].address for name in ("node1", "node2")}
        assert len({cluster.head_address, *addresses.values()}) == (3 if can_make_namespaces() else 1)
        for name, (_, pid) in said.items():
            assert cluster.actors(name) == {pid: "Asked"}
            assert pid in {process.pid for process in cluster.nodes[name].workers()}

        with frozen(said["node1"][1]):
            assert "T (stopped)" in Path(f"/proc/{said['node1'][1]}/status").read_text()
        cluster.nodes["node2"].kill()
        assert not cluster.nodes["node2"].processes()
        cluster.wait_dead("node2")
        assert cluster.states() == {"head": "ALIVE", "node1": "ALIVE", "node2": "DEAD"}
        cluster.start_node()
        cluster.wait_for("node3")

        unknown = urllib.request.Request(f"{cluster.jobs_address}/api/jobs/")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(unknown, timeout=20)
        assert refused.value.code in (401, 403)

        database.stop()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(database.uri)
        database.start()
        psycopg.connect(database.uri).close()
    assert not traces(cluster.folder.name)


def test_a_killed_run_is_tidied_up_by_the_next():
    dying = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        env=source_environment() | {"PYTHONPATH": os.path.dirname(__file__)},
        stdout=subprocess.PIPE,
        text=True,
    )
    name = dying.communicate(timeout=120)[0].strip()
    assert dying.returncode == -signal.SIGKILL
    assert name in left_over()
    assert len(traces(name)) >= 3
    with raylets(namespaces=False) as cluster:  # a head alone, on the loopback address
        assert cluster.states() == {"head": "ALIVE"}
        socket.create_connection((cluster.head_address, int(cluster.address.rpartition(":")[2])), timeout=20).close()
        assert not traces(name)
    assert not traces(cluster.folder.name)
