#!/usr/bin/env bash
# One commit, one experiment: run a script from a snapshot of the commit, and keep on record what was run.
#
#     bash run.sh [--nproc N] [--allow-dirty] SCRIPT.py --name X ARGS…                  on this machine
#     bash run.sh [--allow-dirty] run_with_submitit.py --name X --nodes 2 … ARGS…       on Slurm
#     bash run.sh --name X                                                             resume X as it was started
#
# The commit is unpacked into output/experiments/X/code and the script starts there: edit, switch branches or pull as
# you like, neither what runs nor what waits in the queue notices. Called again with the same name, the experiment resumes
# from its newest checkpoint, with the code of its own commit. Without --name it is SCRIPT-COMMIT-hash of the arguments.
#
#     code/             the snapshot; data and output in it point to those of the repository
#     run/              what the script writes (its --output_dir) and Slurm's logs
#     commit.txt        the commit, its branch and subject         changes.patch     with --allow-dirty: edits beyond it
#     command.txt       the command, ready to paste; a line for each start
#     environment.txt   machine, Python, packages as pip freeze lists them, variables that steer CUDA, NCCL, Slurm …
#
#     --nproc N         N processes on this machine, through torchrun (default 1)
#     --allow-dirty     take uncommitted edits along, untracked files included, and keep them as a patch
#     EXPERIMENTS=DIR   put experiments there instead of output/experiments (on Slurm: a folder that all nodes share)
#     PYTHON=python     interpreter; the one on PATH, or the repository's .venv
set -euo pipefail

die() {
    echo "error: $*" >&2
    exit 2
}
explain() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$top/run.sh"; }

top=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    explain
    exit 0
fi

# --- what is asked for: options of ours, SCRIPT.py, words of the script
name="" nproc=1 allow_dirty=no script=""
while [ $# -gt 0 ]; do
    case $1 in
        --allow-dirty | --allow_dirty) allow_dirty=yes ;;
        --nproc | --name) [ $# -gt 1 ] || die "$1: a value is missing" ;;&
        --nproc) nproc=$2 && shift ;;
        --name) name=$2 && shift ;;
        --nproc=*) nproc=${1#*=} ;;
        --name=*) name=${1#*=} ;;
        *.py) script=$1 && shift && break ;;
        *) die "$1: expected SCRIPT.py (bash run.sh explains itself)" ;;
    esac
    shift
done
[[ $nproc =~ ^[1-9][0-9]*$ ]] || die "--nproc $nproc: expected a number of processes"
words=("$@")
script=${script#"$top"/} script=${script#./}
# a name among the words of the script names the experiment; scripts that know no --name do not get to see it
kept=()
for ((i = 0; i < ${#words[@]}; i++)); do
    word=${words[i]}
    case $word in
        --name) [ $((i + 1)) -lt ${#words[@]} ] || die "--name: a value is missing" ; name=${words[++i]} ;;
        --name=*) name=${word#*=} ;;
        --allow-dirty | --allow_dirty) allow_dirty=yes ;;
        --) kept+=("${words[@]:i}") && break ;;
        *) kept+=("$word") ;;
    esac
done
words=("${kept[@]}")

# --- which experiment
git -C "$top" rev-parse --verify -q HEAD >/dev/null ||
    die "$top is not a git repository with a commit; run.sh ties a run to one (without: python ${script:-SCRIPT.py} …)"
commit=$(git -C "$top" rev-parse HEAD)
if [ -z "$name" ]; then
    [ -n "$script" ] || die "no SCRIPT.py (bash run.sh explains itself)"
    name=$(basename "$script" .py)-${commit:0:7}-$(printf '%s\0' "$script" "${words[@]}" | git hash-object --stdin | cut -c 1-6)
fi
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._=+-]*$ ]] || die "--name $name: letters, digits and . _ = + - make a folder's name"
experiments=${EXPERIMENTS:-$top/output/experiments}
mkdir -p "$experiments"
folder=$(cd "$experiments" && pwd)/$name
python=${PYTHON:-$(command -v python || echo "$top/.venv/bin/python")}
command -v "$python" >/dev/null || die "no Python found: source scripts/setup.sh makes .venv, PYTHON=… names another"
python=$(command -v "$python")

# --- its snapshot, made once
changes() { git -C "$top" status --porcelain --untracked-files=all; }

snapshot() { # into folder $1
    local tree=$commit
    if [ -n "$(changes)" ]; then
        [ $allow_dirty = yes ] || die "these files differ from commit ${commit:0:7}:
$(changes | head -n 10)
Commit them (git add -A && git commit), or take them along as a patch: bash run.sh --allow-dirty …
Data, checkpoints and results belong in data/ or output/, which git leaves out."
        # an index of its own: yours stays as it is
        local index
        index=$(mktemp -u)
        export GIT_INDEX_FILE=$index
        git -C "$top" read-tree HEAD
        git -C "$top" add --all
        git -C "$top" diff --cached --binary HEAD >"$1/changes.patch"
        tree=$(git -C "$top" write-tree)
        unset GIT_INDEX_FILE
        rm -f "$index"
    fi
    mkdir "$1/code"
    git -C "$top" archive "$tree" | tar -x -C "$1/code"
    for shared in data output; do # what git ignores, so that relative paths keep their meaning
        [ ! -d "$top/$shared" ] || [ -e "$1/code/$shared" ] || ln -s "$top/$shared" "$1/code/$shared"
    done
    git -C "$top" log -1 --format='commit %H%nauthor %an%ndate %cI%nsubject %s' "$commit" >"$1/commit.txt"
    echo "branch $(git -C "$top" rev-parse --abbrev-ref HEAD)" >>"$1/commit.txt"
    [ ! -e "$1/changes.patch" ] || echo "dirty: changes.patch holds the edits beyond the commit" >>"$1/commit.txt"
}

if [ ! -d "$folder" ]; then
    [ -n "$script" ] || die "no experiment $name in $experiments to resume; known: $(ls "$experiments" | tr '\n' ' ')"
    # made aside and renamed: an experiment is there as a whole or not at all
    making=$(mktemp -d "$experiments/.making-XXXXXX")
    trap 'rm -rf "$making"' EXIT
    snapshot "$making"
    [ -f "$making/code/$script" ] || die "$script: no such script in commit ${commit:0:7}"
    chmod 755 "$making"
    mv -T "$making" "$folder"
    trap - EXIT
    echo "experiment $name: commit ${commit:0:7} -> $folder"
else
    own=$(sed -n 's/^commit //p' "$folder/commit.txt")
    echo "experiment $name resumes with its commit ${own:0:7} -> $folder"
    if [ "$own" != "$commit" ] || { [ -n "$(changes)" ] && [ ! -e "$folder/changes.patch" ]; }; then
        echo "note: later commits and edits are no part of it; for them, choose a new --name"
    fi
fi

# --- one at a time, here (status 1; others: no locks on this file system); on Slurm the launcher looks whether the job
# is still there
exec 9>"$folder/.lock"
flock -n 9 || [ $? -ne 1 ] || die "experiment $name is running (lock $folder/.lock); let it end, or choose another --name"

# --- its command: as given, else as last time
if [ -z "$script" ]; then
    last=()
    while IFS= read -r -d '' word; do last+=("$word"); done <"$folder/.words"
    nproc=${last[0]} script=${last[1]} words=("${last[@]:2}")
else
    printf '%s\0' "$nproc" "$script" "${words[@]}" >"$folder/.words"
fi
[ -f "$folder/code/$script" ] || die "$script: no such script in the experiment's commit"
case $script in main.py | run_with_submitit.py) named=(--name "$name") ;; *) named=() ;; esac
if [ "$script" = run_with_submitit.py ]; then
    target=()
    if [[ ${words[0]:-} == *.py ]]; then target=("${words[0]}") words=("${words[@]:1}"); fi
    command=("$python" "$script" "${target[@]}" --job_dir "$folder/run" "${named[@]}" "${words[@]}")
else
    launch=("$python")
    [ "$nproc" = 1 ] || launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc")
    command=("${launch[@]}" "$script" --output_dir "$folder/run" "${named[@]}" "${words[@]}")
fi

# --- its record
{
    printf '# %s on %s\ncd %q && ' "$(date '+%F %T')" "$(hostname)" "$folder/code"
    printf '%q ' "${command[@]}"
    echo
} >>"$folder/command.txt"
{
    echo "# $(date '+%F %T')"
    uname -a
    "$python" -VV
    command -v nvidia-smi >/dev/null && nvidia-smi -L || echo "no nvidia-smi"
    echo "# variables"
    env | grep -E '^(CUDA|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|SLURM|SBATCH|HF|TRANSFORMERS|TOKENIZERS|WANDB|NLTK|VIRTUAL_ENV|PATH|PYTHON)[A-Z_0-9]*=' |
        grep -vE '^[A-Z_0-9]*(KEY|TOKEN|SECRET|PASSWORD)[A-Z_0-9]*=' | sort || true
    echo "# packages"
    "$python" -c 'from importlib.metadata import distributions
print(*sorted({f"{found.name}=={found.version}" for found in distributions()}, key=str.lower), sep="\n")'
} >>"$folder/environment.txt"

cd "$folder/code"
exec "${command[@]}"
