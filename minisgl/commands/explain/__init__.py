"""`minisgl explain`: the decisions of the scheduler, step by step, in English."""
