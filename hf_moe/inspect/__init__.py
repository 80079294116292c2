"""What a model costs, counted and by formula, and which experts a text meets: `hf-moe inspect` and `hf-moe route`."""
