"""The dashboard: reads a run directory and draws it. Nothing in this package imports torch.

tail, decode, series    bytes of metrics.jsonl -> events -> bounded curves
state, verdicts         what is known of a run, and what it means, in words
reader, runs            one run that is followed; all runs of a folder
control                 requests to the trainer
app, screens, widgets   the Textual application on top (the only modules that import Textual)
"""
