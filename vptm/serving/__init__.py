"""Many tasks on one frozen backbone: a bank of what was learned, and a server of its answers."""
