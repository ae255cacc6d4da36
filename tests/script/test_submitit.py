"""run_with_submitit.py where there is no Slurm: the batch file it would submit, and what it
says."""

import os
import subprocess
import sys

import pytest

import run_with_submitit
from base.errors import UserError
from runtime import slurm
from runtime.interrupt import EXIT_REQUEUE
from tests.helpers.pretraining import ROOT
from tests.helpers.processes import run_command
from tests.helpers.stand_in_slurm import lines, stand_in_slurm

SLURM = ["Pretrain.py", "--nodes", "2", "--ngpus", "4", "--partition", "gpu", "--timeout", "90"]


@pytest.fixture(autouse=True)
def slurm_signal(monkeypatch):
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR2")


def preview(capsys, *words) -> str:
    cut = words.index("--") if "--" in words else len(words)
    run_with_submitit.main([*words[:cut], "--dry-run", *words[cut:]])
    return capsys.readouterr().out


def srun(text) -> str:
    return next(line for line in text.splitlines() if line.startswith("srun "))


def options(text) -> set[str]:
    return {
        line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")
    }


def test_options_become_sbatch_options(capsys):
    words = [
        "--name",
        "X",
        "--comment",
        "for the deadline",
        "--account",
        "lab",
        "--qos",
        "low",
        "--exclude",
        "n[1-3]",
    ]
    words += [
        "--constraint",
        "a100",
        "--mem",
        "1.5",
        "--cpus",
        "6",
        "--sbatch",
        "reservation=night",
        "--sbatch=exclusive",
        "--max-requeues",
        "7",
    ]
    text = preview(capsys, *SLURM, *words)
    assert options(text) >= {
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=6",
        "--mem=1536M",
        "--partition=gpu",
        "--time=90",
        "--job-name=X",
        "--comment='for the deadline'",
        "--account=lab",
        "--qos=low",
        "--exclude='n[1-3]'",
        "--constraint=a100",
        "--reservation=night",
        "--exclusive",
        "--requeue",
        "--signal=USR1@120",
        "--open-mode=append",
    }
    assert "-ge 7 ]" in text
    assert "--cpus-per-task=6" in srun(text)  # srun does not take it from sbatch


def test_defaults_are_the_originals_launcher(capsys):
    text = preview(capsys, "Pretrain.py", "--use_volta32")
    given = {
        "--nodes=8",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=2800",
        "--mem=327680M",
    }
    given |= {"--cpus-per-task=10", "--constraint=volta32gb", "--job-name=Pretrain"}
    assert options(text) >= given and "-ge 30 ]" in text


def test_an_option_of_sbatch_replaces_ours_however_it_is_spelt(capsys):
    for name in ("gpus-per-node", "gpus_per_node", "--gpus-per-node"):
        found = options(preview(capsys, *SLURM, f"--sbatch={name}=a100:8"))
        assert {each for each in found if each.startswith("--gpus")} == {"--gpus-per-node=a100:8"}


@pytest.mark.parametrize("words, tasks", [([], 1), (["--tasks", "3"], 3)])
def test_cpu_job_asks_for_no_gpu(capsys, words, tasks):
    text = preview(capsys, "Pretrain.py", "--nodes", "1", "--ngpus", "0", "--timeout", "3", *words)
    assert options(text) >= {f"--ntasks-per-node={tasks}", "--cpus-per-task=1"}
    assert "gpus" not in text and "--mem" not in text


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        (["--mem", "0"], {"--mem=0M"}),  # Slurm's word for all of it
        (["--sbatch", "mem_per_gpu=50G"], {"--mem-per-gpu=50G"}),  # which excludes --mem
        (["--sbatch=--mem-per-gpu=50G"], {"--mem-per-gpu=50G"}),
        (["--sbatch", "mem-per-cpu=4G", "--mem", "8"], {"--mem-per-cpu=4G", "--mem=8192M"}),
    ],
)
def test_memory_is_what_was_asked_for(capsys, words, memory):
    found = options(preview(capsys, *SLURM, *words))
    assert {each for each in found if each.startswith("--mem")} == memory


def test_the_script_gets_its_words_unharmed(capsys, tmp_path):
    script = tmp_path / "mine.py"  # whose words are not looked at
    script.write_text("")
    words = [
        "--alpha",
        "0.3",
        "--",
        "--nodes",
        "7",
        "--caption",
        "it's $HOME; 50%",
        "--config",
        "a b.yaml",
    ]
    line = srun(preview(capsys, str(script), *SLURM[1:], "--name", "X", *words))
    split = subprocess.run(
        ["bash", "-c", f'srun() {{ printf "%s\\0" "$@"; }}; {line}'], capture_output=True, text=True
    )
    received = split.stdout.split("\0")[:-1]
    assert {"--wait=300", "--kill-on-bad-exit=0", "-u"} <= {*received}
    received = received[received.index(str(script)) + 1 :]
    assert received[:2] == ["--output_dir", str(ROOT / "output/X")]
    assert received[2:] == [w for w in words if w != "--"]


def test_the_job_number_stands_in_for_percent_j(capsys, tmp_path):
    line = srun(preview(capsys, *SLURM, "--job_dir", f"{tmp_path}/my jobs/%j"))
    shell = f'SLURM_JOB_ID=12; srun() {{ printf "%s\\n" "$@"; }}; {line}'
    assert (
        f"{tmp_path}/my jobs/12"
        in subprocess.run(["bash", "-c", shell], capture_output=True, text=True).stdout
    )
    assert not list(tmp_path.iterdir()), "a dry run wrote something"


@pytest.mark.parametrize("folder", ["runs/%A_%a", "runs/%x", "runs/%4j", "s3://bucket/run"])
def test_a_folder_that_logs_and_results_would_not_share_is_refused(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"%j|--output_dir"):
        run_with_submitit.main([*SLURM, "--job_dir", folder, "--dry-run"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["/proc/none", "a file", "a file/below/%j", "x" * 300])
def test_nothing_is_submitted_where_the_folder_cannot_be_made(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    monkeypatch.setattr(run_with_submitit, "has_slurm", lambda: True)
    monkeypatch.setattr(run_with_submitit, "submit_command", lambda *_: pytest.fail("submitted"))
    with pytest.raises(UserError, match="folder of the job"):
        run_with_submitit.main([*SLURM, "--job_dir", folder])


def test_main_is_the_default_script_and_gets_the_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main.py").touch()
    line = srun(
        preview(
            capsys, "--name", "X", "--nodes", "1", "--model", "CL2L_R50_CL2L", "--separate-proj"
        )
    )
    assert line.endswith(
        f"{tmp_path}/main.py --output_dir {tmp_path}/output/X --name X --model CL2L_R50_CL2L --separate-proj"
    )


def test_the_batch_file_is_valid_shell_and_requeues_only_what_asks_for_it(capsys, tmp_path):
    """The batch file with stand-ins for Slurm's programs: srun ends with STATUS, scontrol notes
    what it is asked."""
    assert slurm.EXIT_REQUEUE == EXIT_REQUEUE
    folder = tmp_path / "LIMIT"  # a word that the batch file's template has as well
    folder.mkdir()
    text = preview(capsys, *SLURM, "--job_dir", str(folder), "--max_requeues", "3")
    (folder / "requeues.log").write_text("job 7 asked\njob 112 asked\njob 1 asked\n")
    stand_ins = f"""
    scontrol() {{ echo "$@" >> {tmp_path}/asked; [ "$2" != node ] || echo "NodeAddr=10.1.2.3 NodeHostName=n1"; }}
    squeue() {{ [ "$*" = "-h -j 12 -o %T" ] && echo "$STATE"; }}
    srun() {{ env | grep -E '^(RANK|MASTER_ADDR)=' > {tmp_path}/env; eval "$BEFORE_END"; return $STATUS; }}
    """

    def requeued(status, before_end=":", state="RUNNING") -> bool:
        (tmp_path / "asked").unlink(missing_ok=True)
        env = {
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "RANK": "5",
            "PATH": os.environ["PATH"],
        }
        env |= {"STATUS": str(status), "BEFORE_END": before_end, "STATE": state}
        done = subprocess.run(
            ["bash", "-c", stand_ins + text], env=env, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        return "requeue 12" in (tmp_path / "asked").read_text()

    assert not requeued(0) and not requeued(1) and not requeued(2) and not requeued(137)
    assert not requeued(75, "kill -TERM $$"), "Slurm ended this job itself"
    # the processes were signalled, and have left, before the batch file was
    assert not requeued(75, state="COMPLETING") and not requeued(143, state="CANCELLED")
    assert requeued(75, state=""), "Slurm does not answer"
    assert requeued(138) and requeued(143) and not requeued(75), "three requeues were allowed"
    assert (tmp_path / "env").read_text() == "MASTER_ADDR=10.1.2.3\n"


def test_absent_slurm_says_how_to_run_without(tmp_path):
    command = [sys.executable, "run_with_submitit.py", *SLURM, "--", "--alpha", "0.3"]
    result = run_command(command, env={"PATH": str(tmp_path)})
    assert (
        result.returncode == 2
        and result.stderr.startswith("error: ")
        and "Traceback" not in result.stderr
    )
    assert "torchrun --standalone --nproc_per_node=4 Pretrain.py --alpha 0.3" in result.stderr
    assert "--nnodes=2" in result.stderr and "scripts/dev/local_slurm.sh" in result.stderr


@pytest.mark.parametrize(
    "words, named",
    [
        (["Pretrian.py"], "there are Classification.py, .*, Pretrain.py, Rec.*, main.py$"),
        (["Pretrain.py", "--nodes", "0"], "--nodes 0: give 1 or more"),
        (["Pretrain.py", "--cpus", "0"], "--cpus 0: give 1 or more"),
        (["Pretrain.py", "--signal-delay", "-1"], "--signal_delay -1: give 0 or more"),
        (["Pretrain.py", "--mem", "inf"], "--mem inf: give 0 or more"),
        (["Pretrain.py", "--sbatch", "array=0-3"], "--sbatch array=0-3: every task would be the"),
        (["Pretrain.py", "--tasks", "0"], "--tasks 0: give 1 or more"),
        (["Pretrain.py", "--timeout", "2"], r"--timeout 2 \(minutes\): Slurm would warn 120"),
        (["Pretrain.py", "--mem", "-0.5"], "--mem -0.5: give 0 or more"),
        (["Pretrain.py", "--mem", "nan"], "--mem nan: give 0 or more"),
        (["Pretrain.py", "--max_requeues", "-1"], "--max_requeues -1: give 0 or more"),
        (["Pretrain.py", "--partion", "gpu"], "--partion: no option .* did you mean --partition?"),
        (["Pretrain.py", "--gpus=8"], "--gpus: no option of .* did you mean --ngpus?"),
        (
            ["Pretrain.py", "--alpah", "0.3"],
            "Pretrain.py: --alpah: unknown key; did you mean --alpha?",
        ),
        (["VQA.py", "--config", "configs/VQA/debug.yml"], "did you mean configs/VQA/debug.yaml"),
    ],
)
def test_a_mistake_is_one_clear_message(words, named):
    with pytest.raises(UserError, match=named):
        run_with_submitit.main([*words, "--dry-run"])


def test_behind_the_dashes_too_nothing_goes_to_the_queue_that_the_script_refuses(tmp_path):
    with pytest.raises(UserError, match=r"VE.py: duration .many.: write"):
        run_with_submitit.main(["VE.py", "--dry-run", "--", "--epochs", "many"])
    clip = ["--model", "CLIP_RT_CLIP", "--dry-run", "--"]
    with pytest.raises(UserError, match=r"main.py: --momentum is for .*BYOLIP"):
        run_with_submitit.main([*clip, "--momentum", "true"])
    zeroshot = ["eval_zeroshot.py", "--dry-run", "--job_dir"]
    with pytest.raises(UserError, match="add --checkpoint FILE, or the folder of a run"):
        run_with_submitit.main([*zeroshot, f"{tmp_path}/none"])
    run_with_submitit.main([*zeroshot, str(tmp_path)])


def test_files_that_are_not_on_this_machine_are_named(capsys, tmp_path):
    (tmp_path / "here.json").touch()
    words = ["--train_file", f"{tmp_path}/here.json", "lost.json", "s3://b/c.json", "p?.json"]
    words += ["data/digitscenes/pretrain_train.json", "--vision_weights", "timm/vit_tiny"]
    words += ["--image_tokenizer_path", "random", "--image_root", "no/folder", "--output_dir", "O"]
    run_with_submitit.main([*SLURM, "--dry-run", "--", *words])
    said = "note: not on this machine: --train-file lost.json, --image-root no/folder\n"
    assert capsys.readouterr().err == said
    evaluation = "--config configs/Retrieval/flickr.yaml --evaluate --test_file t.json"
    evaluation += " --image_root . --checkpoint README.md"
    run_with_submitit.main(["Retrieval.py", "--dry-run", "--", *evaluation.split()])
    assert capsys.readouterr().err.startswith("note: not on this machine: --test-file t.json")
    of_checkpoint = "--evaluate --momentum true --checkpoint README.md --val-folder docs"
    run_with_submitit.main(["--dry-run", "--", *of_checkpoint.split()])  # whose model it is
    built_in = "--train_data cifar10 --val_data cifar10:data"
    run_with_submitit.main(["Classification.py", "--dry-run", "--", *built_in.split()])
    shards = "--bpe_path trained --dataset wds --metadata no.pkl --shards x.tar".split()
    run_with_submitit.main(["--dry-run", "--", *shards])
    assert not capsys.readouterr().err


def test_what_was_submitted_is_said_and_kept(capsys, tmp_path, monkeypatch):
    programs = stand_in_slurm(tmp_path / "bin", monkeypatch)
    words = ["--", "--alpha", "0.3"]
    run_with_submitit.main([*SLURM, "--job-dir", f"{tmp_path}/jobs/%j", *words])
    folder = tmp_path / "jobs/101"
    said = capsys.readouterr().out
    assert f"job 101: Pretrain.py on 2 x 4 processes -> {folder}\n" in said
    assert "runs    Pretrain.py --alpha 0.3\n" in said and "scancel 101 " in said
    assert f"tail -F {folder}/slurm/101_0_log.out\n" in said
    assert (folder / "slurm/job").read_text() == "101\n"
    given, command = lines(programs / "1.sh")
    assert not any(each.startswith(("--error", "--wckey")) for each in given)
    assert command[-4:] == ["--output_dir", f"{tmp_path}/jobs/$SLURM_JOB_ID", "--alpha", "0.3"]
    (programs / "running").write_text("PENDING\n")
    with pytest.raises(UserError, match=rf"^{folder}: job 101 is pending and writes there"):
        run_with_submitit.main([*SLURM, "--job-dir", str(folder), *words])


def test_a_refused_job_leaves_nothing_behind(tmp_path, monkeypatch):
    programs = stand_in_slurm(tmp_path / "bin", monkeypatch)
    (programs / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
    (tmp_path / "used/slurm").mkdir(parents=True)
    for folder in ("new/run", "new/%j", "used"):
        with pytest.raises(UserError, match=r"^sbatch refused the job: .*invalid partition"):
            run_with_submitit.main([*SLURM, "--job_dir", str(tmp_path / folder)])
    assert not (tmp_path / "new").exists() and not list((tmp_path / "used/slurm").iterdir())


def test_what_is_nearly_the_launchers_may_be_the_scripts(capsys, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import argparse; a = argparse.ArgumentParser(); a.add_argument('--node_s')\n"
    )
    script.write_text(script.read_text() + "a.parse_known_args()\n")
    assert srun(preview(capsys, str(script), "--node-s", "2")).endswith("--node-s 2")
    assert srun(preview(capsys, str(script), "--", "--partion", "2")).endswith("--partion 2")
    assert srun(preview(capsys, str(script), "--par", "nodes")).endswith("--par nodes")
    with pytest.raises(UserError, match="--nodess: no option"):
        run_with_submitit.main([str(script), "--nodess", "2", "--dry-run"])


@pytest.mark.parametrize(
    ("text", "beside_the_launcher"),
    [
        ("raise SystemExit(3)\n", True),
        ("def run_script(main):\n    raise SystemExit(3)\nif 1:\n    run_script(main=3)\n", False),
    ],
)
def test_a_script_of_ones_own_is_not_imported(
    text, beside_the_launcher, capsys, tmp_path, monkeypatch
):
    """It might do its work there and then."""
    script = tmp_path / "mine.py"
    script.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    if beside_the_launcher:
        monkeypatch.setattr(run_with_submitit, "ROOT", tmp_path)
    assert srun(preview(capsys, str(script), "--", "--data", "x")).endswith("--data x")
