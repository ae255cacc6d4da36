"""torchrun's elastic agents: a node dies, the other continues alone, another one joins."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from base import distributed
from tests.helpers.elastic_trainer import EPOCHS, RECORDS
from tests.helpers.processes import ROOT, free_port, start_processes
from tests.helpers.runs import log_lines

LIMIT = 240  # seconds for what takes a few on an idle machine
TIMES = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=15"


def remember(rank: int, value: str) -> None:
    """What processes find in the launcher's store, and leave there."""
    distributed.init("cpu")
    store = distributed.store("test")
    assert not store.check(["key"])
    distributed.barrier()
    if rank == 0:
        store.set("key", value)
    distributed.barrier()
    assert store.get("key") == value.encode()
    distributed.shutdown()


def joined(rank: int, value: str) -> None:
    os.environ["RANK"] = str(rank)
    remember(rank, value)


def test_processes_that_torchrun_starts_again_find_nothing_of_those_before(monkeypatch):
    """The store is the agent's and outlives them: neither an old answer there is taken for a new
    one, nor do they wait at the old addresses of gloo."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.port), "WORLD_SIZE": "2"}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for value in ("first", "second"):
        start_processes(joined, (value,), 2)


class Agent:
    """torchrun on a node of its own."""

    def __init__(self, folder: Path, name: str, port: int):
        self.output = folder / name
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2"]
        torchrun += ["--nproc_per_node=1", "--max-restarts=5", "--rdzv_backend=c10d"]
        torchrun.append(f"--log-dir={folder / 'torchrun'}")
        times = f"{TIMES},is_host={name == 'first'}"
        torchrun += [f"--rdzv_endpoint=localhost:{port}", f"--rdzv_conf={times}", "--rdzv_id=test"]
        # a node that joins later waits in vain for the store of torch 2.5 to 2.14
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*torchrun, "-m", "tests.helpers.elastic_trainer", str(folder)],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.output.read_text()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)  # its trainers die with it
            self.process.wait()


def taken(folder: Path) -> list[dict]:
    """What the updates were made of, by step; an update that was made again counts as it was last."""
    updates: dict[int, dict] = {}
    files = sorted(folder.glob("taken_*"), key=lambda path: float(path.stem.split("_")[1]))
    for path in files:
        begun = path.stem.split("_")[1]
        for text in path.read_text().splitlines():
            line = json.loads(text)
            update = updates.get(line["step"])
            if update is None or update["begun"] != begun:
                update = updates[line["step"]] = {**line, "numbers": [], "begun": begun}
            update["numbers"] += line["numbers"]
    return [updates[step] for step in sorted(updates)]


def wait_for(reached, agents: list[Agent]) -> None:
    deadline = time.monotonic() + LIMIT
    while not reached():
        said = "\n".join(agent.said()[-3000:] for agent in agents)
        assert time.monotonic() < deadline, said
        time.sleep(0.1)


def waits(folder: Path, processes: int, after: int) -> bool:
    """Whether the newest training is on so many processes, and has made its last update before it
    waits."""
    updates = taken(folder)
    begun = max((update["begun"] for update in updates), default="")
    newest = [update for update in updates if update["begun"] == begun]
    whole = all(len(u["numbers"]) == 2 * u["processes"] == 2 * processes for u in newest)
    return len(newest) >= after and whole


@pytest.mark.slow
def test_a_node_dies_and_another_one_joins(tmp_path):
    port = free_port()
    agents = [Agent(tmp_path, "first", port), Agent(tmp_path, "second", port)]
    try:
        wait_for(lambda: waits(tmp_path, 2, after=6), agents)
        agents[1].end()
        (tmp_path / "go").touch()
        alone = "resumed on 1 process (was 2)"
        wait_for(lambda: alone in agents[0].said() and waits(tmp_path, 1, after=3), agents)
        agents.append(Agent(tmp_path, "third", port))
        for agent in (agents[0], agents[2]):
            wait_for(lambda agent=agent: agent.process.poll() is not None, agents)
            assert agent.process.returncode == 0, agent.said()[-3000:]
    finally:
        for agent in agents:
            agent.end()
    said = agents[0].said() + agents[2].said()
    assert "resumed on 2 processes (was 1)" in said
    updates = taken(tmp_path)
    worlds = [update["processes"] for update in updates]
    [at] = [step for step in range(1, len(worlds)) if worlds[step] < worlds[step - 1]]
    assert worlds[at : at + 4] == [1, 1, 1, 2] and set(worlds[at + 3 :]) == {2}
    counts = Counter(number for update in updates for number in update["numbers"])
    assert len(counts) == RECORDS and set(counts.values()) <= {EPOCHS, EPOCHS + 1}
    beyond = sum(counts.values()) - EPOCHS * RECORDS
    assert 0 <= beyond <= 4  # the last update may not come out even
    lines = log_lines(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, len(updates) + 1)]
    assert losses[-1] < 0.1 * losses[0]
    epochs = [line["epoch"] for line in lines if "loss" in line]
    assert epochs == sorted(epochs) and epochs[-1] == EPOCHS
    events = [line["event"] for line in lines if "event" in line]
    assert events[-2:] == [alone, "resumed on 2 processes (was 1)"]
