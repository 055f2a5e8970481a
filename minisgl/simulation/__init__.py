"""The scheduler under virtual time: traces, GPU cost models, replicas, a router, reports.  See docs/simulator.md."""
