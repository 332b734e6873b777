"""Command line of affmae: parses, calls one engine function, prints."""
