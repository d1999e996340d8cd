"""What a model looks at and what it costs."""
