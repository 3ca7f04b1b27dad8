"""The desired state: YAML files, read with their places, checked, and resolved per node."""
