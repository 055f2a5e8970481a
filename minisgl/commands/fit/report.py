"""What `minisgl fit` says: one document, for programs as it is and for people as a table."""

from __future__ import annotations

from typing import Any

from minisgl.commands.fit.bounds import Bounds
from minisgl.commands.fit.estimate import GIB, Estimate, Load, remedies
from minisgl.config import Config

_TYPICAL = 1024  # tokens of the shorter of two contexts for which steps are bounded


def document(found: Estimate, load: Load) -> dict[str, Any]:
    """Everything, for people and programs."""
    bounds, spec, engine = Bounds(found), found.spec, found.engine
    fits = found.holds(load)
    contexts = sorted({min(_TYPICAL, load.context), load.context})
    rows = sorted({1, load.users})
    return {
        "model": spec.name,
        "hardware": {"name": found.hardware.name, "gib": found.hardware.gib, "source": found.hardware.source},
        "ranks": engine.tp,
        "users": load.users,
        "context": load.context,
        "fits": fits,
        "why_not": "" if fits else _why_not(found, load),
        "bytes": {
            "weights": found.weights,
            "weights_total": sum(found.weights.values()),
            **found.entries,
            "kv_cache": found.kv_tokens * found.token,
            "kv_token": found.token,
            "kv_load": found.pages_of(load) * engine.page_size * found.token,
        },
        "kv_tokens": found.kv_tokens,
        "max_running": {str(c): found.users_at(c) for c in contexts},
        "decode_step_seconds": {f"{r} x {c}": bounds.seconds(bounds.decode(r, c)) for r in rows for c in contexts},
        "prefill_tokens_per_s": {
            str(c): c / s for c in contexts if (s := bounds.seconds(bounds.prefill(c))) is not None and found.hardware.flops
        },
        "ttft_seconds": bounds.seconds(bounds.prefill(load.context)) if found.hardware.flops else None,
        "remedies": [] if fits else [_remedy(r.flags, r.estimate, r.load) for r in remedies(found, load)],
    }


def _remedy(flags: str, with_it: Estimate, load: Load) -> dict[str, Any]:
    return {
        "flags": flags,
        "kv_tokens": with_it.kv_tokens,
        "users": load.users,
        "context": load.context,
        "weights": sum(with_it.weights.values()),
        "kv_load": with_it.pages_of(load) * with_it.engine.page_size * with_it.token,
    }


def _why_not(found: Estimate, load: Load) -> str:
    if not found.pages and found.entries.get("free", 0) < 0:
        return f"what must be there before the KV cache takes {-found.entries['free'] / GIB:.2f} GiB more than there is"
    if not found.pages:
        return found.refused
    if load.users > found.engine.max_running:
        return f"{load.users} users are more than --max-running {found.engine.max_running}"
    need = found.pages_of(load) * found.engine.page_size
    return f"the KV cache has {found.kv_tokens} tokens, and {load.users} x {load.context} need {need}"


def lines(found: Estimate, load: Load, said: dict[str, Any]) -> list[str]:
    """The table for people.  said: the `document`."""
    engine, spec, h = found.engine, found.spec, found.hardware
    each = " on each" if engine.tp > 1 else ""
    how = engine.quantization if engine.quantization not in ("auto", "none") else Config(spec, engine).dtype
    how = "4 and 8 bits" if engine.quantization == "auto" and engine.eight_bits else how
    out = [f"minisgl fit: {spec.name} ({how}) on {engine.tp} x {h.name}, {h.gib:.1f} GiB; {h.source}", ""]
    out.append(f"{f'memory{each}':<30} {'GiB':>9}")
    rows = [*found.weights.items(), *found.entries.items(), ("KV cache", found.kv_tokens * found.token)]
    rows = [("MISSING" if n < 0 else name, n) for name, n in rows]
    notes = dict.fromkeys(found.weights, "weights") | {
        "taken before": "by CUDA itself",
        "slots": "page tables",
        "largest step": f"activations of {engine.step_tokens} tokens, and workspaces",
        "graphs": f"and logits of {engine.max_running} rows",
        "KV cache": f"{found.kv_tokens} tokens of {found.token / 1024:.1f} KiB (--memory-fraction {engine.memory_fraction:g})",
        "free": "the rest",
        "MISSING": "",
    }
    out += [f"  {name:<28} {n / GIB:>9.2f}  {notes[name]}" for name, n in rows]
    need = said["bytes"]["kv_load"] / GIB
    users = f"{load.users} request{'s' * (load.users > 1)} of {load.context} tokens"
    out += ["", f"{users}: {need:.2f} GiB of KV cache{each}; {'it fits' if said['fits'] else 'IT DOES NOT FIT'}"]
    if not said["fits"]:
        out += _remedies(found, said)
    out += ["", "limits"]
    out += [f"  requests of {c} tokens that run at the same time: {n}" for c, n in said["max_running"].items()]
    return out + _times(found, load, said)


def _remedies(found: Estimate, said: dict[str, Any]) -> list[str]:
    out = [f"  {said['why_not']}"]
    out.append("what would make it fit:" if said["remedies"] else "no change of one thing makes it fit")
    for r in said["remedies"]:
        taken = f"{r['users']} x {r['context']} tokens take {r['kv_load'] / GIB:.2f} GiB"
        out.append(f"  {r['flags']:<44} {taken} of a cache of {r['kv_tokens']} tokens, weights {r['weights'] / GIB:.2f}")
    return out


def _times(found: Estimate, load: Load, said: dict[str, Any]) -> list[str]:
    if not (found.hardware.bandwidth or found.hardware.flops):
        return ["  times: no rates are known of this hardware; --bandwidth GB/S (and --tflops) give their bounds"]
    out = ["lower bounds on times by these rates, of prompts that are not cached; what is reached is slower"]
    for case, seconds in said["decode_step_seconds"].items():
        rows, _, context = case.partition(" x ")
        if seconds is not None:
            rate = int(rows) / seconds
            out.append(f"  a decode step of {rows} at {context} tokens: {seconds * 1e3:.2f} ms, {rate:.0f} tokens/s")
    out += [f"  prefill of {c} tokens: {rate:,.0f} tokens/s" for c, rate in said["prefill_tokens_per_s"].items()]
    if said["ttft_seconds"] is not None:
        out.append(f"  TTFT of {load.context} tokens: {said['ttft_seconds'] * 1e3:,.0f} ms")
    return out
