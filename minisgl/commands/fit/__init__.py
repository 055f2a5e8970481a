"""`minisgl fit`: the memory ledger and the limits of a model on a machine, without its weights and without the machine."""
