"""The simulator runs the real scheduler under virtual time, on traces, GPU cost models and fleets.  See docs/simulator.md."""
