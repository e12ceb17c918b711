"""Units that own a part of the graph, as experts do: what goes with one, and what it adds."""
