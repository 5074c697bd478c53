"""How a run proceeds: training online, evaluating, and the clocks they follow."""
