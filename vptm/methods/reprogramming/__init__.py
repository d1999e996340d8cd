"""Labels for a frozen classifier: SeMap, label mappings and prompts of pixels."""
