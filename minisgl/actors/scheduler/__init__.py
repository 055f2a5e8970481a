"""The scheduler room: a pure step machine, and the actor that connects it to the other processes."""
