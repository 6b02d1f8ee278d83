"""What passes are run to learn curvature, and what factors learn from them."""
