"""The actor runtime: mailboxes, processes, rings in shared memory, and one deterministic system of all actors for tests."""
