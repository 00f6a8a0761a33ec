"""Number formats: recipes say which tensor gets which, one file per method says how."""
