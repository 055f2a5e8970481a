"""One timeline of all processes, as a file for Perfetto.  Nobody else knows of it while nobody traces."""
