"""A declarative reconciler for fleets of AI-agent machines.

Data flows one way: desired (git) -> observed (Ansible) -> drift -> plan -> outcome -> events.
Importing this package is free of side effects and cheap: Ansible's workers do it once per node.
"""

__version__ = "0.1.0"
