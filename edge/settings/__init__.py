"""The settings of each part, one class for each section of the file; :mod:`edge.config` reads and checks them."""
