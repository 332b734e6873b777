"""A sign for each state of a run, besides its word and colour."""

SIGNS = {
    "waiting": "◌",
    "running": "●",
    "stalled": "▲",
    "finished": "✔",
    "stopped": "■",
    "failed": "✖",
    "gone": "✖",
}
