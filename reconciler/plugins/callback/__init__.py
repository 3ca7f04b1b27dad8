"""Callback plugins of Ansible that the runner switches on."""
