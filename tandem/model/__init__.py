"""`PolicyModel`: a QLoRA policy in this process and an engine that samples from it."""
