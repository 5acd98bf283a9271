"""GenEval's protocol: tasks, prompts, detectors, colours, rules."""
