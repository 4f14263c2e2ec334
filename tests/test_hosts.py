"""Two machines that see one folder: each has a name, processes and a network of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from claims import SCRIPT
from numerics import relative_error

from dtrak.runs.files import LOCK_FILE, claim

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0, reason="namespaces take root"
    ),
]
ADDRESSES = {"left": "10.213.77.1", "right": "10.213.77.2"}


@pytest.fixture(scope="module")
def hosts():
    """How a command is begun on a machine, by the machine's name; a cable lies between them."""
    spaces = {name: f"dtrak-{name}-{os.getpid()}" for name in ADDRESSES}
    words = [["netns", "add", space] for space in spaces.values()]
    ends = [["eth0", "netns", space] for space in spaces.values()]
    words.append(["link", "add", *ends[0], "type", "veth", "peer", *ends[1]])
    for name, space in spaces.items():
        words.append(["-n", space, "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0"])
        words += [["-n", space, "link", "set", device, "up"] for device in ("lo", "eth0")]
    try:
        for each in words:
            try:
                done = subprocess.run(["ip", *each], capture_output=True, text=True)
                failed = done.returncode and done.stderr.strip()
            except FileNotFoundError as error:
                failed = str(error)
            if failed:
                pytest.skip(f"no network of its own: {failed}")
        yield {
            name: ["ip", "netns", "exec", space, "unshare", "--uts", "--pid", "--fork",
                   "--kill-child", "sh", "-c", f'hostname {name}; exec "$@"', name]
            for name, space in spaces.items()
        }  # fmt: skip
    finally:
        for space in spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def test_a_claim_ends_with_its_process_on_another_machine(hosts, tmp_path):
    command = [*hosts["left"], sys.executable, "-c", SCRIPT, tmp_path / LOCK_FILE, "3", "4"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    with claim(tmp_path / LOCK_FILE, part=range(3, 4)) as is_ours:
        assert not is_ours
    other.kill()
    other.communicate()
    with claim(tmp_path / LOCK_FILE, part=range(3, 4), wait=True) as is_ours:
        assert is_ours


def test_two_machines_explain_together(hosts, tmp_path):
    script = [Path(__file__).with_name("launched_explain.py"), tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    started = [
        subprocess.Popen(
            [*hosts[name], sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
             "--node-rank", str(rank), "--nproc-per-node", "1", "--master-addr",
             ADDRESSES["left"], "--master-port", "29500", *script, "two"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, name in enumerate(ADDRESSES)
    ]  # fmt: skip
    said = [one.communicate(timeout=900)[0] for one in started]
    assert [one.returncode for one in started] == [0, 0], said
    assert "features of training images: 60 of 60" in said[0]
    assert "features" not in said[1]
    done = subprocess.run([sys.executable, *script, "one"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    one, *two = (torch.load(tmp_path / name) for name in ("one-0.pt", "two-0.pt", "two-1.pt"))
    for found in two:
        assert torch.equal(found["drawn"], one["drawn"])
        for ours, alone in zip(found["scores"], one["scores"], strict=True):
            assert relative_error(ours, alone) < 1e-6
