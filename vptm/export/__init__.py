"""Prompted models as files that run without vptm."""
