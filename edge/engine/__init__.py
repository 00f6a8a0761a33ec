"""Token ids in, logits out. Text, networks and clocks live outside this package."""
