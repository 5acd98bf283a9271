"""Checkpoints of CLIP and BLIP, and what the learned picture rewards share."""
