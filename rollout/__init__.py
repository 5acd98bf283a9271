"""Rollouts: which prompts, how samples are drawn from keys, and the buffer that bounds their age."""
