"""Code and mathematics of strangers in processes that can be killed."""
