"""Prompted backbones: prompts, verbalizers and the classes that hold them."""
