"""Host lists, and tables assembled from several processes."""

import socket

import pytest
import torch

from base import distributed
from base.errors import UserError
from tests.helpers.processes import start_processes


def test_threads_of_the_group_get_pythons_lock_before_it_ends(monkeypatch):
    """torch 2.6 waits for them for ever: a hundred groups of two processes hung."""
    calls = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: calls.append("end"))
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: calls.append(seconds))
    distributed.shutdown()
    assert calls == [distributed.PAUSE, "end"] and 0 < distributed.PAUSE < 1


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu7", "gpu7"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("a1,a2", "a1"),
        ("n[1,3]-ib", "n1-ib"),
        ("x[08]", "x08"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    assert distributed.first_host(nodes) == first


def test_slurm_variables_become_torchruns(monkeypatch):
    env = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "36007",
    }
    env |= {"SLURM_STEP_NODELIST": "gpu[12-13]", "MASTER_ADDR": ""}
    distributed._adopt_slurm(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("3", "8", "1")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("gpu12", "20007")


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def set_launcher(monkeypatch, **variables: str) -> None:
    for name in (*LAUNCHED, "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_without_a_rank_is_alone(monkeypatch):
    """It evaluated an eighth of the images, and the others' rows were zeros."""
    set_launcher(monkeypatch, WORLD_SIZE="8", LOCAL_RANK="3", MASTER_ADDR="gpu1")
    world = distributed.init("cpu")
    assert (world.rank, world.size, world.local_rank) == (0, 1, 0)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "RANK=0 is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (
            {**LAUNCHED, "WORLD_SIZE": "two"},
            "WORLD_SIZE=two is no whole number: start with torchrun",
        ),
        ({"SLURM_STEP_NUM_TASKS": "2(x3)"}, r"SLURM_STEP_NUM_TASKS=2\(x3\) is no whole number"),
        ({**LAUNCHED, "MASTER_PORT": "65536"}, "MASTER_PORT=65536: ports are numbers up to 65535"),
        ({**LAUNCHED, "RANK": "1"}, "RANK=1 of WORLD_SIZE=1"),
    ],
)
def test_half_a_launcher_is_one_clear_error(monkeypatch, variables, said):
    set_launcher(monkeypatch, **variables)
    with pytest.raises(UserError, match=said):
        distributed.init("cpu")


def test_a_port_that_is_taken_is_one_clear_error(monkeypatch):
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        port = str(taken.getsockname()[1])
        set_launcher(monkeypatch, **{**LAUNCHED, "MASTER_PORT": port})
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: another program has this port"):
            distributed.init("cpu")


def test_helpers_are_the_identity_on_one_process():
    x = torch.arange(3.0)
    assert torch.equal(distributed.all_reduce(x, "mean"), x)
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    table = distributed.gather_rows(x[:, None], torch.tensor([2, 0, 1]), 3)
    assert table.squeeze(1).tolist() == [1.0, 2.0, 0.0]


def test_a_device_that_torch_does_not_know_is_one_clear_error():
    with pytest.raises(UserError, match="--device tpu: no device of torch; use auto, cpu or cuda"):
        distributed.init("tpu")


@pytest.mark.parametrize("device", ["mps", "mps:0", "xpu", "meta"])
def test_a_device_that_scripts_do_not_compute_on_is_one_clear_error(device):
    with pytest.raises(UserError, match=f"--device {device}: .* use auto, cpu or cuda"):
        distributed.init(device)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("cuda:x", "no device of torch"),
        ("cudas", "no device of torch"),
        ("cuda:2", "--device cuda:2: this node shows 2 GPUs"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_clear_error(monkeypatch, asked, said):
    for name, value in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert distributed.init("cuda:1").device == torch.device("cuda", 1)
    with pytest.raises(UserError, match=said):
        distributed.init(asked)


@pytest.mark.parametrize("name, value", [("GPUS_PER_TASK", "1"), ("GPU_BIND", "single:1")])
def test_a_task_that_sees_its_own_gpu_alone_computes_on_it(monkeypatch, name, value):
    """`srun --gpus-per-task 1` shows the GPU of every task as the first one."""
    for known, answer in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, known, lambda *_, answer=answer: answer)
    with pytest.raises(UserError, match="local rank 3 has no GPU"):
        distributed._device("auto", 3)
    monkeypatch.setenv(f"SLURM_{name}", value)
    assert distributed._device("auto", 3) == torch.device("cuda", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one task, whose torchrun has started too many")
    with pytest.raises(UserError, match="local rank 3 has no GPU"):
        distributed._device("auto", 3)


@pytest.mark.parametrize(
    ("given", "driver", "sign"),
    [
        ({}, False, None),
        ({}, True, "nvidia0 is there"),
        ({"SLURM_JOB_GPUS": "3"}, False, "SLURM_JOB_GPUS=3 names a GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, True, "CUDA_VISIBLE_DEVICES=0,1 names a GPU"),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "3"}, True, None),  # hidden on purpose
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True, None),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_said(given, driver, sign, monkeypatch, tmp_path, capsys):
    """With a broken driver the script computes on the CPU, but not in silence."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "NVIDIA", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if driver:
        (tmp_path / "nvidia0").touch()
    for device, local_rank in (("cpu", 0), ("auto", 1)):
        assert distributed._device(device, local_rank).type == "cpu"
        assert capsys.readouterr().err == ""
    assert distributed._device("auto", 0).type == "cpu"
    said = capsys.readouterr().err
    assert (sign in said and "nvidia-smi" in said) if sign else said == ""


def test_cuda_without_a_gpu_is_one_clear_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="--device cpu"):
        distributed.init("cuda")


def test_a_gpu_rounds_nothing_to_tf32_unless_a_script_allows_it(monkeypatch):
    """Also in tools without a Precision, such as the demo: PyTorch would round convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for name, value in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    try:
        distributed.allow_tf32(True)
        assert torch.backends.cudnn.allow_tf32
        assert distributed.init("cuda").device == torch.device("cuda", 0)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _three_processes(rank: int, rendezvous: str, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=3
    )
    indices = torch.arange(rank, 7, 3)
    table = distributed.gather_rows(indices[:, None].float() * 10, indices, 7)
    assert table.squeeze(1).tolist() == [0, 10, 20, 30, 40, 50, 60]
    with pytest.raises(UserError, match="different data: one has 7 entries, another 6;"):
        distributed.gather_rows(indices[:, None].float(), indices, 7 - (rank == 2))
    assert distributed.all_reduce(torch.tensor(float(rank)), "mean").item() == 1.0
    assert distributed.all_reduce(torch.tensor(float(rank)), "max").item() == 2.0
    assert distributed.all_reduce(torch.tensor(float(rank + 1))).item() == 6.0
    assert distributed.any_rank(rank == 2, torch.device("cpu"))
    parts = [torch.tensor([[True], [False]])] if rank == 1 else []  # the others have none
    table = distributed.gather_parts(parts, [1, 0] if parts else [], 2, torch.device("cpu"))
    assert table.dtype == torch.bool and table.squeeze(1).tolist() == [False, True]
    try:
        with distributed.rank_0_first():
            raise ZeroDivisionError
    except (ZeroDivisionError, UserError) as error:
        with open(f"{folder}/{rank}", "w") as file:
            file.write(type(error).__name__)
    distributed.shutdown()


def test_three_processes_agree_on_tables_and_share_a_failure(tmp_path):
    start_processes(_three_processes, (str(tmp_path / "rendezvous"), str(tmp_path)), 3)
    errors = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert errors == ["ZeroDivisionError", "UserError", "UserError"]
