"""The central learner: credit, losses, batches, ranks, checkpoints. Start at `learner.py`; Ray is not known here."""
