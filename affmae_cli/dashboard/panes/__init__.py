"""What the tabs of the run screen hold: each takes a view of the run and hands parts of it to its widgets."""
