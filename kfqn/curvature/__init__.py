"""What is kept of each layer's curvature, and how it learns."""
