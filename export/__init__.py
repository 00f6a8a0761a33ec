"""The exporter: a checkpoint goes in, a bundle that the runtime serves comes out (docs/architecture.md)."""
