"""How a frozen backbone runs: folded once, exactly, beside the reference it is checked against."""
