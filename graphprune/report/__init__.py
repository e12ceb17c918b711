"""Programs, groups and plans for people: tables, plots, the HTML page."""
