"""Nodes of flannel itself beside ours: run as root in a kernel with TUN, VXLAN and br_netfilter, with flanneld's path in FLANNELD.

    FLANNELD=/path/to/flanneld tests/run build peers"""

import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "kernel"))

from rig import Lab  # noqa: E402


@pytest.fixture
def lab():
    """Three nodes on a wire, nothing started."""
    lab = Lab(f"p{os.getpid() % 100000}", 3)
    try:
        yield lab
    finally:
        lab.down()


def pytest_sessionstart():
    path = os.environ.get("FLANNELD")
    if not path or not os.access(path, os.X_OK):
        pytest.exit(f"FLANNELD={path or ''}: it must be the path of a flanneld that can be run", 2)
