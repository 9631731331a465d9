"""Ray of this machine alone: on the loopback address, with a token that no file holds.

Ray's own choice is a port or two per process on every address, and a token in a file of the home folder that others of
the machine can read. `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0` is its switch for laptops: the node is then `127.0.0.1`, and
each of its processes listens there.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"


@contextmanager
def only_this_machine() -> Iterator[None]:
    """Whatever Ray is started while the block runs, its processes included, is reached from this machine and user only.

    The environment says so to processes that Ray starts, and is as it was afterwards. `RAY_AUTH_MODE=disabled` does
    without the token: any user of the machine may then use that Ray.
    """
    before = {name: os.environ.get(name) for name in (_MODE, _TOKEN, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)}
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    os.environ |= {_TOKEN: _token(), ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when Ray was imported
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        AuthenticationTokenLoader.instance().reset_cache()


@cache
def _token() -> str:
    return secrets.token_hex(32)
