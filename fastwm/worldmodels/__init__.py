"""World models: what is learned from replay."""
