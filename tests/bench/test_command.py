"""`minisgl bench`: what it refuses, what it runs, and one run of it with real processes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minisgl.__main__ import main
from minisgl.bench import command, replay
from minisgl.bench.replay import Run, Stream
from minisgl.bench.workload import FIRST_ID, Workload, jobs_of
from minisgl.config import AUTO_ITL
from minisgl.errors import UserError
from minisgl.simulation.trace import load

FAKE = ["fake", "--requests", "n=6,input=4-20,output=2-5,shared=16,groups=2"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("", "name what to measure: --ablate"),
        ("--ablate overlop", "did you mean overlap?"),
        ("--ablate graphs", "--ablate graphs: the fake engine has no model"),
        ("--ablate overlap --lag 1", "--ablate overlap: it is off already"),
        ("--ablate overlap --repeats 0", "--repeats must be between 1 and 1000, got 0"),
        ("--ablate overlap --online 0", "--online must be between"),
        ("--ablate overlap --online nan", "--online must be between"),
        ("--ablate overlap --concurrency -1", "--concurrency must be between"),
        ("--ablate overlap --limit 3", "--limit belongs to --trace"),
        ("--ablate overlap --scale 3", "--scale belongs to --trace"),
        ("--ablate overlap --requests rate=3", "--requests: the rate is that of --online"),
        ("--ablate overlap --requests m=3", "--requests: synthetic:"),
        ("--ablate overlap --requests input=9000000", "--requests: no request fits into a context of"),
        ("--ablate overlap --requests n=3 --trace x.csv", "--requests describes those of --offline and --online"),
        ("--ablate overlap --trace nowhere.jsonl", "--trace: nowhere.jsonl: cannot be read as a trace"),
        ("--ablate overlap --trace x.pdf", "--trace: x.pdf: a trace is a .jsonl file"),
        ("--ablate overlap --plot out.png", "--plot out.png: the picture is an SVG"),
        ("--ablate overlap --json no/where/out.json", "--json no/where/out.json: there is no folder no/where"),
        ("--sweep step_tokens", "--sweep step_tokens: write a name and its values"),
        ("--sweep step_tokens=", "--sweep step_tokens=: write a name and its values"),
        ("--sweep step_tokens=256,,512", "write a name and its values"),
        ("--sweep step_tokens=256,256", "a value is given twice"),
        ("--sweep step_tokens=256,x", "--sweep step_tokens: 'x' is no whole number"),
        ("--sweep step_tokens=256,3", "--sweep step_tokens=3: --step-tokens (3) must be larger than --max-running"),
        ("--sweep steptokens=256", "--sweep steptokens: there is no such setting; did you mean step_tokens?"),
        ("--sweep graphs=on,off", "--sweep graphs=off: --graphs off needs a GPU"),
        ("--sweep rate=1,2", "--sweep rate: the rate is that of --online"),
        ("--online 1 --sweep rate=1,nan", "--sweep rate: 'nan' is no number"),
        ("--sweep concurrency=1,1.5", "--sweep concurrency: '1.5' is no whole number"),
        ("--sweep concurrency=0", "--sweep concurrency: '0' is no whole number"),
        ("--sweep lag=1,2 --ablate overlap", "--ablate overlap: it is off already"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(flags: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fake", *flags.split()]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


def test_the_environment_does_not_undo_a_variant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MINISGL_DISABLE_OVERLAP_SCHEDULING", "1")
    assert main(["bench", "fake", "--ablate", "lag=3"]) == 2
    assert "lag=3: MINISGL_DISABLE_OVERLAP_SCHEDULING holds --lag at 1; unset it" in capsys.readouterr().err
    assert main(["bench", "fake", "--ablate", "overlap"]) == 2
    assert "--ablate overlap: it is off already" in capsys.readouterr().err


def fast(name: str, _: Any, setup: Any, work: Workload, **__: Any) -> Run:
    """Stands in for a run: as fast as its budget, and a tenth slower without overlap."""
    seconds = (0.01 if setup.engine.lag > 1 else 0.011) * 256 / setup.engine.step_tokens / (work.concurrency or 1)
    streams = [
        Stream(0.0, 1.0, [1 + seconds * (i + 1) for i in range(j.output)], len(j.prompt), 0, j.output, "", [1], True)
        for j in work.jobs
    ]
    return Run(name, seconds * max(j.output for j in work.jobs), streams, {"busy_us": 3, "idle_us": 1})


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Workload]]:
    """The runs that a command does, without doing them."""
    done: list[tuple[str, Any, Workload]] = []

    def measured(name: str, spec: Any, setup: Any, work: Workload, **more: Any) -> Run:
        done.append((name, setup, work))
        return fast(name, spec, setup, work, **more)

    monkeypatch.setattr(command, "measure", measured)
    return done


def test_base_and_variants_take_turns(order: list[tuple[str, Any, Workload]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *FAKE, "--ablate", "overlap,radix", "--repeats", "2"]) == 0
    assert [name for name, _, _ in order] == ["base", *["overlap off", "base", "radix off", "base"] * 2]
    assert len({id(work.jobs) for _, _, work in order}) == 1
    out = capsys.readouterr().out
    assert "fake on cpu" in out
    row = next(line for line in out.splitlines() if line.startswith("| overlap off"))
    assert "(-9.1 %, -9.1 to -9.1)" in row
    assert "25.0%" in row
    assert "(≈ +0.0 %" in next(line for line in out.splitlines() if line.startswith("| radix off"))


def test_a_sweep_is_run_by_turns_and_printed_by_series(
    order: list[tuple[str, Any, Workload]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--sweep", "step_tokens=256,512", "--ablate", "overlap,radix", "--repeats", "2"]
    assert main(["bench", *FAKE, *flags, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]) == 0
    once = [f"{series}, step_tokens {value}" for series in ("base", "overlap off", "radix off") for value in (256, 512)]
    assert [name for name, _, _ in order] == once * 2
    data = json.loads((tmp_path / "a.json").read_text())
    found = {(p["series"], p["value"]): p["figures"]["tpot_ms"]["mean"] for p in data["points"]}
    usual, slow = {"256": 10.0, "512": 5.0}, {"256": 11.0, "512": 5.5}
    expected = {(s, v): ms for s, of in (("base", usual), ("overlap off", slow), ("radix off", usual)) for v, ms in of.items()}
    assert found == pytest.approx(expected)
    names = {
        (c.attrib["data-series"], c.attrib["data-name"])
        for c in ET.parse(tmp_path / "a.svg").iter()
        if "data-series" in c.attrib
    }
    assert names == set(found)
    assert len(data["runs"]) == 12


def test_rate_and_concurrency_change_the_requests(order: list[tuple[str, Any, Workload]]) -> None:
    assert main(["bench", *FAKE, "--online", "5", "--sweep", "rate=1,10", "--repeats", "1"]) == 0
    slow, quick = (work for _, _, work in order)
    assert [j.prompt for j in slow.jobs] == [j.prompt for j in quick.jobs]
    assert slow.jobs[-1].arrival == pytest.approx(10 * quick.jobs[-1].arrival)
    assert order[0][1].engine.itl_target_ms == AUTO_ITL  # as the server has it
    order.clear()
    assert main(["bench", *FAKE, "--sweep", "concurrency=1,4", "--repeats", "1"]) == 0
    assert [work.concurrency for _, _, work in order] == [1, 4]
    assert order[0][1].engine.itl_target_ms == 0


def test_a_variant_that_cannot_start_is_left_out_and_the_base_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, *args: Any, **more: Any) -> Run:
        if name == bad:
            raise UserError("no memory")
        return fast(name, *args, **more)

    monkeypatch.setattr(command, "measure", broken)
    bad = "radix off"
    assert main(["bench", *FAKE, "--ablate", "overlap,radix", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert "note: radix off: left out, no memory" in out
    assert "| overlap off" in out
    bad = "base"
    assert main(["bench", *FAKE, "--ablate", "overlap"]) == 2
    bad = "overlap off"
    assert main(["bench", *FAKE, "--ablate", "overlap"]) == 2
    assert "nothing could be measured: overlap off: no memory" in capsys.readouterr().err


def test_answers_that_are_missing_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def lossy(*args: Any, **more: Any) -> Run:
        run = fast(*args, **more)
        run.streams[0] = Stream(0.0, 1.0, error="queue_full")
        return run

    monkeypatch.setattr(command, "measure", lossy)
    assert main(["bench", *FAKE, "--ablate", "overlap"]) == 1
    assert "note: base: 1 of 6 requests have no answer (queue_full)" in capsys.readouterr().out

    def lost(*args: Any, **more: Any) -> Run:
        run = fast(*args, **more)
        return replace(run, streams=[Stream(0.0, 1.0, error="queue_full") for _ in run.streams])

    monkeypatch.setattr(command, "measure", lost)
    assert main(["bench", *FAKE, "--ablate", "overlap"]) == 2
    assert "base: no request has an answer (queue_full)" in capsys.readouterr().err


def test_requests_that_do_not_fit_are_left_out_and_counted(
    order: list[tuple[str, Any, Workload]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *FAKE, "--ablate", "overlap", "--max-context", "32", "--page-size", "4"]) == 0
    kept = len(order[0][2].jobs)
    assert 0 < kept < 6
    assert f"note: {6 - kept} of 6 requests are left out: longer than the context of 32 tokens" in capsys.readouterr().out


def test_the_same_requests_for_any_vocabulary() -> None:
    requests = load("synthetic:rate=0,n=9,input=3-30,shared=8,groups=2")
    for vocab in (256, 5000, 150_000):
        jobs = jobs_of(requests, vocab, 2048)
        first = FIRST_ID if vocab > 2 * FIRST_ID else vocab // 8
        assert all(first <= t < vocab for j in jobs for t in j.prompt)
        assert [len(j.prompt) for j in jobs] == [r.input for r in requests]


def test_no_more_than_the_concurrency_is_open() -> None:
    from minisgl import LLM

    jobs, seen = jobs_of(load("synthetic:rate=0,n=12,input=3-30,output=3-9"), 256, 512), []
    with LLM("fake", processes=False, kv_tokens=2048, max_context=512) as llm:
        answered: list[int] = []
        pump = llm.system.pump

        def watched(seconds: float) -> bool:
            seen.append(llm.system.gateway.open_requests)
            return pump(seconds)

        llm.system.pump = watched  # type: ignore[method-assign]
        _, streams = replay.replay(llm, jobs, 3, lambda: answered.append(1))
    assert max(seen) == 3
    assert [s.tokens for s in streams] == [j.output for j in jobs]
    assert len(answered) == 12


def test_the_command_measures_real_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    assert main(["bench", *FAKE, "--ablate", "chunked", "--repeats", "1", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert [r["name"] for r in data["runs"]] == ["base", "chunked off", "base"]
    assert [r["counters"]["admitted"] for r in data["runs"]] == [6, 6, 6]
    assert all(r["counters"]["decode_tokens"] > 0 and len(r["ttft_ms"]) == 6 and r["cached"] > 0 for r in data["runs"])
    assert data["rows"][1]["same_answers"] == 1.0
    assert data["provenance"]["cores"] >= 1
    out, err = capfd.readouterr()
    assert "| chunked off" in out
    assert "req/s" not in err  # no progress bar where there is no terminal
