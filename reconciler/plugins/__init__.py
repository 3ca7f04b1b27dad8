"""What Ansible loads: it runs in Ansible's own processes, not in the reconciler's."""
