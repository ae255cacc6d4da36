"""Under torchrun a mistake is said twice: in one line by the script, and at the end of torchrun's
report of the failed process."""

from torch.distributed import run as torchrun

from tests.helpers.processes import run_script


def test_torchruns_report_ends_with_the_sentence(tmp_path):
    # processes that are forks have imported PyTorch; those of a user import it for seconds each
    forks = ["--start-method", "fork", "--run-path"]
    words = ["--standalone", "--nproc_per_node=2", "--log-dir", tmp_path, *forks, "Pretrain.py"]
    words += ["--config", "configs/Pretrain/debug.yaml", "--queu_size", "3"]
    said = run_script(torchrun.__file__, words, expect=1)
    sentence = "error: --queu_size: unknown key; did you mean --queue-size?"
    lines = [line for line in said.splitlines() if sentence in line]
    assert lines[0] == sentence
    assert lines[-1].strip() == f"traceback : {sentence}"
    assert len(lines) == 2
