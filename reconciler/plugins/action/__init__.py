"""Action plugins: the controller's side of looking at and acting on a node."""
