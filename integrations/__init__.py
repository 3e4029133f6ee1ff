"""Framework wrappers around a resident `DnD`."""
