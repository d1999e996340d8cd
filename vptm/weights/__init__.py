"""Weights of backbones and adapters, as files; knows no model."""
