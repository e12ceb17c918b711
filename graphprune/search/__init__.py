"""The search for the recipe that loses least: what can be tried, measuring it, and the choice."""
