# Completion of options, choices and recipes, for bash and zsh: source scripts/completion.sh
#
#     python main.py --opt<TAB>      torchrun --nproc_per_node=8 Pretrain.py --config <TAB>
#
# The options are those of `python SCRIPT --help all`. They are kept below $QUINTET_CACHE, else ~/.cache/quintet, and
# asked again where a Python file is newer: the first <TAB> of a script takes seconds, the others a few milliseconds.

if [ -n "${ZSH_VERSION:-}" ]; then
    autoload -U +X compinit bashcompinit && compinit -i && bashcompinit
    _quintet_root=${${(%):-%x}:A:h:h}
else
    _quintet_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
fi

# Whether a Python file that a script's options may come from is newer than a file.
_quintet_changed() (
    cd "$_quintet_root" &&
        find "$1" base runtime models dataset evaluation scripts -name '*.py' -newer "$2" -print -quit | grep -q .
)

# Lines `--option KIND`, one for each option of the script; KIND as --help shows it.
_quintet_options() {
    local script=$1 folder=${QUINTET_CACHE:-$HOME/.cache/quintet}/completion
    local kept=$folder/${script//\//_}.txt
    if [ ! -s "$kept" ] || _quintet_changed "$script" "$kept"; then
        mkdir -p "$folder" || return
        (cd "$_quintet_root" && "${QUINTET_PYTHON:-python}" "$script" --help all 2> /dev/null) | awk '
            /--config FILE/ { print "--config PATH"; print "--overrides KEY=VALUE" }
            /^  -/ {
                kind = ""
                for (i = 1; i <= NF && kind == ""; i++) if ($i !~ /^-/) kind = $i
                for (i = 1; i <= NF && $i ~ /^-/; i++) { sub(/,$/, "", $i); if ($i ~ /^--/) print $i, kind }
            }' > "$kept.$$" && mv "$kept.$$" "$kept"
    fi
    cat "$kept"
}

_quintet() {
    local word=${COMP_WORDS[COMP_CWORD]} script="" launcher="" option="" i options kind
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            --*) option=${COMP_WORDS[i]} ;;
            *.py)
                # run_with_submitit.py takes the options of the script behind it, too
                case $script in *run_with_submitit.py) launcher=run_with_submitit.py script="" ;; esac
                [ -n "$script" ] || { script=${COMP_WORDS[i]}; option=""; } ;;
        esac
    done
    [ -f "$script" ] || return 0
    script=$(cd "$(dirname "$script")" && pwd -P)/${script##*/}
    case $script in "$_quintet_root"/*) script=${script#"$_quintet_root"/} ;; *) return 0 ;; esac
    options=$(_quintet_options "$script"; [ -z "$launcher" ] || _quintet_options "$launcher")
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$(echo "$options" | cut -d' ' -f1)" -- "$word"))
        return 0
    fi
    kind=$(echo "$options" | awk -v option="${option//_/-}" '$1 == option { print $2; exit }')
    case $kind in
        {*}) kind=${kind#\{}; COMPREPLY=($(compgen -W "$(echo "${kind%\}}" | tr ',' ' ')" -- "$word")) ;;
        "[true|false]") COMPREPLY=($(compgen -W "true false" -- "$word")) ;;
    esac
    if [ "$option" = --config ]; then
        COMPREPLY=($(cd "$_quintet_root" && compgen -G "configs/$(basename "$script" .py)/*.yaml" | grep -F -- "$word"))
    fi
}

complete -o bashdefault -o default -F _quintet python python3 torchrun
