"""Rows become tokens, tokens micro-batches: templates, what carries loss, layouts, measurements."""
