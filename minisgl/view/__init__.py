"""What pages show of a machine: its past, views of its state as plain values, and the process that makes them of a journal."""
