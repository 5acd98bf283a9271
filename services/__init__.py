"""Everything that knows Ray, processes and files: the run, its wiring, its commands. The only importer of Ray."""
