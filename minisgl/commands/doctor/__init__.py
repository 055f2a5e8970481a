"""`minisgl doctor`: what this machine has and what is used of it, why not better ones, and the commands that change that."""
