"""What the server answers, one module for each family of paths; each has a function that returns its routes."""
