"""The scheduler under virtual time: traces, GPU cost models, replicas, a router, and reports.  numpy only; see docs/simulator.md."""
