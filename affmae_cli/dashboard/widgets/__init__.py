"""Parts of the dashboard's screens: each draws what it is given and knows no run."""
