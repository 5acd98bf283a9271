"""What judges are made of: engines, prompts, rubrics, reading of answers, comparisons, canaries."""
