"""The `dnd` command line: parses, calls the library, prints."""
