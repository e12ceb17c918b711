"""From scores and a budget to the units that go."""
