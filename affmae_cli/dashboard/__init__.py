"""The dashboard: reads a run directory and draws it. Nothing in this package imports torch.

tail, columns, run_model      bytes of metrics.jsonl -> events -> numpy columns: all that is known of one run
status, verdicts, charts      what the run does, what its figures mean, which charts it has
runs, control, alerts         all runs of a folder; requests to the trainer; what is told where nobody looks
remote                        a copy of a folder on another machine, over ssh
text, colors, plot            values, colors and curves as text
chart, pictures, pixels       the two widgets that draw: a chart, the tiles of a preview
run_screen, panes, dialogs    the screen of one run, its tabs, the screens above it
home, forms                   the start screen and forms for commands
app, export, terminal         the application, a screen as SVG or PNG, restoring the terminal
"""
