"""The vars plugin for Ansible by hand."""
