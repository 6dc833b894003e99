"""The method and the state of training: the step, the modules that it needs, what is kept of them."""
