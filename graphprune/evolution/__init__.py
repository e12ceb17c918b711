"""The evolutionary search for how much each group loses: levels, budgets, fitness, generations."""
