"""Turns the facts of steps into English: a headline a step, a sentence for each decision, equal steps folded.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from minisgl.journal.witness import Chunk, End, Join, Step, Wait
from minisgl.sampling_params import Finish

_MISSED = {
    "whole": "all but what has to be computed for its first token",
    "short": "no whole page is left to be cached",
    "new": "the next page was never in the cache",
    "evicted": "the next page was evicted",
    "gone": "the next page is not in the cache",
}
_ENDS = {
    Finish.NONE: "its vector is computed",
    Finish.STOP: "its last token ends it",
    Finish.LENGTH: "it may have no more",
    Finish.ABORT: "it was cancelled",
    Finish.GRAMMAR: "its grammar allowed no token",
    Finish.NAN: "its logits were no numbers",
}
_RETRACTED = {
    "pages": "decodes needed pages, and no cached one could be evicted; it was the largest burden",
    "way": "it makes way for a request whose client holds less",
    "stuck": "half-computed prompts held all the pages between them",
    "nan": "its logits were no numbers, perhaps because of pages that it had borrowed; it computes all of them itself",
}
_NAMED = 4  # requests that a sentence names; of more it says how many


def headline(step: Step) -> str:
    """What a step computes, without its number."""
    if step.number is None:
        if step.held:
            return f"no plan yet: the workers are busy for another {step.held * 1e3:.1f} ms, and newcomers may still join it"
        return "no plan: as many are in flight as may be" if step.full else "no plan: nothing to compute"
    parts = [_count(step.decodes, "decode")] if step.decodes else []
    prompt = sum(chunk.end - chunk.start for chunk in step.chunks)
    if prompt:
        parts.append(_count(prompt, "prompt token"))
    return " and ".join(parts) or "nothing but page tables"


def sentences(step: Step) -> list[str]:
    """Everything special about a step but who waits."""
    out = [f"request {uid} arrives with {_count(tokens, 'token')}" for uid, tokens in step.arrived]
    if step.flushed:
        out.append("the cache is emptied but for what running requests hold")
    out += [_end(e) for e in step.ends]
    out += [f"request {r.uid} is retracted: {_RETRACTED[r.why]}" for r in step.retractions]
    if step.evicted and not step.flushed:
        out.append(f"{_count(step.evicted, 'cached page')} evicted, the least recently used first")
    out += [_join(j) for j in step.joins]
    out += [_chunk(step, c) for c in step.chunks]
    if step.withheld:
        out.append(f"{_count(step.withheld, 'row')} with a grammar must see its token in flight first")
    return out


def _end(e: End) -> str:
    where = " in the queue" if e.waited else ""
    return f"request {e.uid} ends{where} after {_count(e.tokens, 'token')}: {_ENDS.get(e.finish, e.finish.name.lower())}"


def _join(j: Join) -> str:
    again = " again" if j.resumed else ""
    return (
        f"request {j.uid} joins{again}: {j.cached} of its {_count(j.tokens, 'token')} are cached; {_MISSED.get(j.why, j.why)}"
    )


def _chunk(step: Step, c: Chunk) -> str:
    n = _count(c.end - c.start, "token")
    if c.why == "whole":
        how = "its whole prompt" if c.start == 0 else "the rest of its prompt"
        return f"request {c.uid}: {n}, {how}, and its first token"
    left = f"request {c.uid}: {n}, up to {c.end} of {c.tokens}"
    if c.why == "budget":
        return f"{left}: {_budget(step)}"
    return f"{left}: {'no more pages can be had' if c.why == 'pages' else 'the result has no room for more'}"


def _budget(step: Step) -> str:
    """Why prompts get no more in this step."""
    budget = step.budget or 0
    if budget == step.step_tokens - step.decodes:
        beside = f" less {_count(step.decodes, 'decode')}" if step.decodes else ""
        return f"the step's budget of {step.step_tokens}{beside} is used up"
    if step.target:
        return f"more than {budget} prompt tokens would make the step longer than {step.target * 1e3:g} ms"
    if step.decodes:
        return f"more than {budget} prompt tokens would slow {_count(step.decodes, 'decode')} down too much"
    return f"more than {budget} prompt tokens would make the step too long for those who come"


def waiting(step: Step) -> str:
    """Who waits and for what, in one sentence; "" if nobody does."""
    groups: dict[tuple[str, int], list[Wait]] = {}
    for wait in step.waits:
        key = wait.number if wait.reason == "shared" else 0
        groups.setdefault((wait.reason, key), []).append(wait)
    parts = [f"{_requests([w.uid for w in group])} {_reason(group[0], step)}" for group in groups.values()]
    return (
        f"{_count(len(step.waits), 'request')} {'waits' if len(step.waits) == 1 else 'wait'}: {'; '.join(parts)}"
        if parts
        else ""
    )


def _reason(wait: Wait, step: Step) -> str:
    match wait.reason:
        case "slot":
            return f"for a slot (all {wait.number} are taken)"
        case "pages":
            return f"for pages (needs {wait.number}, and {wait.of} can be had beside what running requests need)"
        case "shared":
            return f"for its beginning, which request {wait.number} is computing"
        case "budget":
            return f"for its turn (the step's {wait.number} prompt tokens went to those before)"
        case "rows":
            return f"while its call has a row ({wait.number} run, as many as a step should have)"
        case "blocked":
            return "behind one that many have overtaken, and that waits for pages"
        case "extras":
            return "for the next plan: this one has no room for its penalties or grammar"
        case "plan":
            return "for the next plan"
    return f"for its turn ({wait.number} stand before it)"


def _requests(uids: list[int]) -> str:
    if len(uids) > _NAMED:
        return f"{len(uids)} requests"
    return f"request{'s' * (len(uids) > 1)} {', '.join(map(str, uids))}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


# ---------------- many steps
def narrate(steps: Iterable[Step], began: float = 0.0) -> Iterator[str]:
    """Lines for a run of steps, with times since `began`.

    What is like the step before, and not special, is folded; waits are told when they change.
    """
    folded: tuple[str, int, int] | None = None  # headline, first and last step
    waited: list[tuple[int, str]] = []
    for step in steps:
        head, details = headline(step), sentences(step)
        now_waiting = [(w.uid, w.reason) for w in step.waits if w.reason != "plan"]
        if step.number is not None or now_waiting:
            if now_waiting != waited and (text := waiting(step)):
                details.append(text)
            waited = now_waiting
        if step.number is None and not details:
            continue
        if not details and step.number is not None:
            if folded is not None and folded[0] == head:
                folded = head, folded[1], step.number
                continue
            if folded is not None:
                yield _folded(*folded)
            folded = head, step.number, step.number
            continue
        if folded is not None:
            yield _folded(*folded)
            folded = None
        yield f"{'between steps' if step.number is None else f'step {step.number}'}, {step.now - began:.3f} s: {head}"
        yield from (f"  {text}" for text in details)
    if folded is not None:
        yield _folded(*folded)


def _folded(head: str, first: int, last: int) -> str:
    return f"step {first}: {head}" if first == last else f"steps {first} to {last}: {head} each"
