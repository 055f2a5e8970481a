"""Runs `python -m minisgl prebuild`: compiles the FlashInfer modules of a model before its first start.  Needs no GPU."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from minisgl.commands.flags import add_engine_flags, model_of
from minisgl.commands.parser import Parser
from minisgl.config import engine_config
from minisgl.errors import UserError


def _parser() -> Parser:
    p = Parser(
        engine=True,
        prog="minisgl prebuild",
        description="Compile the FlashInfer modules that a model needs, so that its first start compiles nothing.  Works "
        "without a GPU: name the kind with --arch.  Needs nvcc, a C++ compiler and ninja; --list and --from need none of them.",
    )
    p.add_argument(
        "--arch",
        nargs="+",
        metavar="CC",
        help="compute capabilities of the GPUs to compile for: 9.0a (H100, H200), 8.0 (A100); default: those that are here",
    )
    p.add_argument("--decode", action="store_true", help="also FlashInfer's kernel for decode steps")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="say what is needed and what is there; compile nothing")
    what.add_argument("--out", metavar="DIR", help="write to DIR/<name>/<name>.so, to carry them to other machines")
    what.add_argument("--from", dest="source", metavar="DIR", help="install what --out has written on another machine")
    add_engine_flags(p)
    return p


def run(argv: list[str]) -> int:
    """List, compile or install.  Returns the exit code.  Raises UserError."""
    args = _parser().parse_args(argv)
    from minisgl.model.checkpoint.resolve import resolve
    from minisgl.model.cuda.flashinfer import modules as fm

    if args.source:
        for name in fm.install_from(Path(args.source)):
            print(f"installed {name}")
        return 0
    archs = [fm.parse_arch(a) for a in args.arch or ()] or _visible_archs()
    engine = engine_config(vars(args))
    spec = resolve(model_of(args), args.revision)
    modules = fm.needed(spec, engine, archs, decode=args.decode)
    if not modules:
        dtype = spec.dtype if engine.dtype == "auto" else engine.dtype
        print(f"{spec.name} ({dtype}, head size {spec.head_dim}) needs no FlashInfer module")
        return 0
    found = fm.installation()
    directory = Path(args.out) if args.out else found.aot
    states = fm.status(modules, directory)
    width = max(map(len, map(str, modules)))
    print(f"{spec.name} on {' '.join(archs)}, FlashInfer {found.version}, {directory}:")
    for module, state in states.items():
        print(f"  {module!s:<{width}}  {state.value:<8}  {module.uri}", flush=True)
    if args.list:
        return 0
    todo = []
    for module in (m for m, state in states.items() if state is not fm.State.PREBUILT):
        if library := found.reusable(module):
            fm.install(library, module.uri, directory, found.note(module))
            _say(f"copied from {library}")
        else:
            todo.append(module)
    with tempfile.TemporaryDirectory(prefix="minisgl-prebuild-") as workspace:
        os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", workspace)  # one that is set survives an interruption
        os.environ["FLASHINFER_CUDA_ARCH_LIST"] = " ".join(archs)
        from minisgl.model.cuda.flashinfer.compile import build_all  # imports torch

        build_all(todo, _say, directory)
    _say(f"all {len(modules)} in {directory}")
    return 0


def _visible_archs() -> list[str]:
    from minisgl.model.cuda.flashinfer.compile import visible_archs

    archs = list(visible_archs())
    if not archs:
        raise UserError("no GPU is visible here: name the kind to compile for with --arch, as 9.0a (H100, H200) or 8.0 (A100)")
    return archs


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
