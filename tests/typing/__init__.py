"""Code that is only type-checked: what users write passes mypy's strict mode, what is wrong not."""
