"""What a run will need before it is started: `raylign plan`.

sizes        names and shapes of a checkpoint, from the headers of its files
activations  what autograd keeps of a micro-batch, counted on tensors without storage
memory       bytes of each role, part by part          batches   how a step is cut, and what it computes
probe        one chunk, one score, one update, for real, each role in a process of its own
timing       a step's seconds, composed of what the probe measured for the placement
verdict      what fits on a GPU of some size, and the key to change where it does not
"""
