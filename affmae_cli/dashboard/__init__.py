"""The dashboard: reads a run directory and draws it. Nothing in this package imports torch.

tail, decode, series      bytes of metrics.jsonl -> events -> bounded curves
state, verdicts           what is known of a run, and what it means, in words
reader, runs              one run that is followed; all runs of a folder
control, requests         requests to the trainer, and how far they have come
pixels                    whether pictures can be drawn as pixels on this terminal
app, screens, panes, widgets, messages, theme
                          the Textual application on top (the only modules that import Textual)
"""
