"""The journal: a record of what came into the step machine, from which every step can be computed again."""
