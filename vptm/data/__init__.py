"""Pictures and their labels; knows no model."""
